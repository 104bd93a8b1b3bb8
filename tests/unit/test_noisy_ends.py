"""How a fit by draws ends: when it is broken off, and when it has settled."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem
from autoem._em import Progress
from autoem.e_step import SAEM, MonteCarlo
from autoem.treatments import sampling

KEY = jax.random.key(0)
Y = np.array([0.3, -0.4, 1.1, 2.0, 0.2, -1.0])
FEW = {"e_step": MonteCarlo(num_draws=1, num_chains=1, warmup=5), "init": "model", "progress": False}


def effects(y):
    between = numpyro.param("between", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", 3):
        u = numpyro.sample("u", dist.Normal(0, between))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(u[jnp.arange(6) // 2], 0.7), obs=y)


@pytest.fixture
def broken_off(monkeypatch):
    """An interrupt at the first look at a fit that runs."""
    looks = []

    def report(self, state):
        looks.append(int(state.step))
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "report", report)
    return looks


def test_an_interrupt_keeps_the_last_completed_step(broken_off):
    result = autoem.EM(effects, tol=0.0, **FEW).run(KEY, Y)  # with no tolerance nothing settles
    assert result.status.startswith("interrupted") and not result.converged
    assert len(broken_off) == 1 and result.num_steps == broken_off[0] == len(result.history) - 1
    assert np.isfinite(result.log_likelihood) and result.standard_error > 0
    assert float(result.params["between"]) != 1.0


def test_an_interrupt_while_going_on_keeps_what_had_settled(broken_off):
    result = autoem.EM(effects, **FEW).run(KEY, Y)
    assert result.status.startswith("settled") and result.converged and len(broken_off) == 1
    assert result.num_steps == len(result.history) - 1 < broken_off[0]
    assert np.all(np.isfinite(result.history))


def test_a_likelihood_that_is_not_estimated_is_no_number(monkeypatch):
    """With more coordinates than a curvature is taken of, chains tell of differences of log-likelihoods alone."""
    monkeypatch.setattr(sampling, "MAX_COORDINATES", 2)
    result = autoem.EM(effects, **FEW).run(KEY, Y)
    assert np.isnan(result.log_likelihood) and np.isinf(result.standard_error) and result.converged
    assert "not estimated" in result.status and np.isfinite(result.history).all()
    assert np.isfinite(result.posterior(Y).mean["u"]).all()


PAIRS = np.repeat(np.arange(30), 2)
RNG = np.random.default_rng(3)
SLOW = 1.0 + 0.4 * RNG.normal(size=30)[PAIRS] + 1.5 * RNG.normal(size=60)


def hardly_told(y):
    """Effects that the noise all but hides: EM climbs slowly."""
    mu = numpyro.param("mu", 0.0)
    between = numpyro.param("between", 2.0, constraint=constraints.positive)
    within = numpyro.param("within", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", 30):
        u = numpyro.sample("u", dist.Normal(0, between))
    with numpyro.plate("rows", 60):
        numpyro.sample("y", dist.Normal(mu + u[PAIRS], within), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_slow_climb_is_not_taken_for_rest(seed):
    """The exact log-likelihood where four draws a step end, against its maximum; a first rest is up to 0.35 below."""
    exact = autoem.EM(hardly_told, tol=1e-12, max_steps=5000, progress=False)
    best = exact.run(KEY, SLOW).log_likelihood
    e_step = MonteCarlo(num_draws=2, num_chains=2, warmup=50)
    result = autoem.EM(hardly_told, e_step=e_step, init="model", progress=False).run(jax.random.key(seed), SLOW)
    held = autoem.EM(hardly_told, init=dict(result.params), max_steps=0, progress=False).run(KEY, SLOW)
    assert 0 <= best - held.log_likelihood < 0.15


SHARP = RNG.normal(size=8).repeat(4) + 0.02 * RNG.normal(size=32)


def sharpening(y):
    """Effects whose posterior is fifty times narrower at the end than where the fit begins."""
    between = numpyro.param("between", 1.0, constraint=constraints.positive)
    within = numpyro.param("within", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", 8):
        u = numpyro.sample("u", dist.Normal(0, between))
    with numpyro.plate("rows", 32):
        numpyro.sample("y", dist.Normal(u[jnp.arange(32) // 4], within), obs=y)


@pytest.mark.parametrize("e_step", [MonteCarlo(num_draws=4, warmup=50), SAEM(burn_in=40, memory=20, warmup=50)])
def test_chains_follow_a_posterior_that_narrows(e_step):
    """With the step size of the start every transition would be refused, and the draws stay where they were."""
    best = autoem.EM(sharpening, tol=1e-12, max_steps=5000, progress=False).run(KEY, SHARP).log_likelihood
    result = autoem.EM(sharpening, e_step=e_step, init="model", progress=False).run(KEY, SHARP)
    held = autoem.EM(sharpening, init=dict(result.params), max_steps=0, progress=False).run(KEY, SHARP)
    assert 0 <= best - held.log_likelihood < 0.3

"""Approximate E-steps on models that nobody tuned them for: masks, curvature, several modes, against quadrature."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from scipy import stats
from scipy.special import logsumexp

import autoem
from autoem.e_step import SAEM, Laplace, MonteCarlo, Variational

GROUP = np.repeat(np.arange(6), 4)
rng = np.random.default_rng(17)
COUNTS = rng.poisson(np.exp(0.5 + 0.9 * rng.normal(size=6)[GROUP]))
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
START = {"mean": 0.3, "spread": 0.6}
DRAWS = MonteCarlo(num_draws=4, num_chains=2, kernel="HMC", warmup=30)
KEY = jax.random.key(0)


def effects(y, group, present=None, weight=None, prior=False):
    mean = numpyro.sample("mean", dist.Normal(0.0, 0.5)) if prior else numpyro.param("mean", 0.3)
    spread = numpyro.param("spread", 0.6, constraint=constraints.positive)
    present = np.ones(6, bool) if present is None else present
    weighted = contextlib.nullcontext if weight is None else lambda: handlers.scale(scale=weight)
    with numpyro.plate("groups", 6), handlers.mask(mask=present), weighted():
        u = numpyro.sample("u", dist.Normal(mean, spread))
    with numpyro.plate("rows", len(y)), handlers.mask(mask=present[group]), weighted():
        numpyro.sample("y", dist.Poisson(jnp.exp(u[group])), obs=y)


def by_hand(mean, spread, groups=range(6)):
    rate = np.exp(mean + spread * NODES)[:, None]
    return sum(logsumexp(stats.poisson.logpmf(COUNTS[j == GROUP], rate).sum(1), b=WEIGHTS) for j in groups)


def at_start(e_step, model=effects, **options):
    em = autoem.EM(model, e_step=e_step, init=START, max_steps=0, progress=False)
    return em.run(KEY, COUNTS, GROUP, **options)


@pytest.mark.parametrize("e_step", [DRAWS, Variational()], ids=lambda e: type(e).__name__)
def test_cells_that_a_mask_takes_out_leave_the_objective_as_it_is(e_step):
    present = np.array([1, 1, 0, 1, 1, 0], bool)
    result = at_start(e_step, present=present)
    truth = by_hand(**START, groups=np.flatnonzero(present))
    if isinstance(e_step, Variational):
        assert truth - 0.3 < result.log_likelihood < truth + 3 * result.standard_error
    else:
        np.testing.assert_allclose(result.log_likelihood, truth, atol=0.05)
    assert np.abs(np.asarray(result.posterior().mean["u"])[~present]).max() < 0.3


@pytest.mark.parametrize("e_step, prior", [(DRAWS, True), (Laplace(), False)], ids=["draws", "Laplace"])
def test_standard_errors_are_those_of_the_curvature_of_the_marginal_likelihood(e_step, prior):
    def value(x):
        return by_hand(x[0], np.exp(x[1])) + prior * stats.norm.logpdf(x[0], 0, 0.5)

    at, h, eye = np.array([0.3, np.log(0.6)]), 1e-3, np.eye(2) * 1e-3
    bend = np.array(
        [[value(at + a + b) - value(at + a - b) - value(at - a + b) + value(at - a - b) for b in eye] for a in eye]
    )
    truth = np.sqrt(np.diag(np.linalg.inv(-bend / (4 * h * h)))) * [1, 0.6]
    found = at_start(e_step, prior=prior).standard_errors()
    np.testing.assert_allclose([found["mean"], found["spread"]], truth, rtol=0.05)


@pytest.mark.parametrize("e_step", [DRAWS, Variational()], ids=lambda e: type(e).__name__)
def test_weights_around_a_latent_that_is_drawn_are_refused(e_step):
    with pytest.raises(autoem.PlanError, match="stands around a continuous latent"):
        at_start(e_step, weight=2.0)


def classes(y, group, apart=1.2):
    share = numpyro.param("share", 0.5, constraint=constraints.unit_interval)
    centre = numpyro.param("centre", jnp.array([-0.4, apart]))
    with numpyro.plate("groups", 6):
        kind = numpyro.sample("kind", dist.Bernoulli(share))
        u = numpyro.sample("u", dist.Normal(centre[kind], 0.1))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Poisson(jnp.exp(u[group])), obs=y)


def test_an_estimate_that_misses_modes_claims_no_small_error():
    em = autoem.EM(classes, e_step={"u": DRAWS}, init="model", max_steps=5, progress=False)
    result = em.run(KEY, COUNTS, GROUP)
    share, centre = float(result.params["share"]), np.asarray(result.params["centre"])
    truth = 0.0
    for j in range(6):
        each = [stats.poisson.logpmf(COUNTS[j == GROUP], np.exp(c + 0.1 * NODES)[:, None]).sum(1) for c in centre]
        truth += logsumexp([logsumexp(e, b=WEIGHTS) for e in each], b=[1 - share, share])
    assert abs(result.log_likelihood - truth) < 4 * result.standard_error + 0.01


def test_ends_of_noisy_starts_are_told_by_estimates_and_not_by_their_paths():
    em = autoem.EM(effects, e_step=SAEM(kernel="HMC", warmup=20), restarts=2, max_steps=12, tol=0.0, progress=False)
    result = em.run(KEY, COUNTS, GROUP)
    truth = [by_hand(**{n: float(v) for n, v in p.items()}) for p in result.restarts.params]
    np.testing.assert_allclose(result.restarts.objective, truth, atol=0.1)
    assert result.objective == result.restarts.objective.max()


def test_a_strategy_for_latents_that_are_not_there_is_refused():
    def mixture(y):
        centre = numpyro.param("centre", jnp.array([-1.0, 1.0]))
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("y", dist.Normal(centre[z], 1.0), obs=y)

    for strategy in (autoem.e_step.Laplace(), autoem.e_step.MonteCarlo(), autoem.e_step.Quadrature()):
        with pytest.raises(autoem.PlanError, match="continuous latents, and the model has none"):
            autoem.EM(mixture, e_step=strategy).plan(np.array([0.3, -0.8]))

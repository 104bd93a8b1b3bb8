"""Sequences as people write them elsewhere, each against an answer worked out without autoem."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import biject_to, constraints

import autoem
from autoem.checks.check import Call, simulate

KEY = jax.random.key(0)
POSITIVE, UNIT, SIMPLEX = constraints.positive, constraints.unit_interval, constraints.simplex


def forward(start, trans, log_density) -> Any:
    """The log-likelihood of a chain by the forward recursion, in logarithms."""

    def step(message, now):
        return jax.nn.logsumexp(message[:, None] + jnp.log(trans), axis=0) + now, None

    return jax.nn.logsumexp(jax.lax.scan(step, jnp.log(start) + log_density[0], log_density[1:])[0])


def check_errors(result, log_likelihood) -> None:
    """Standard errors against the Hessian of an independent log-likelihood, carried back by its own delta method."""
    params = {n: jnp.asarray(v) for n, v in result.params.items()}
    maps = {n: biject_to(p.constraint) for n, p in result.plan.program.params.items()}
    flat, unravel = jax.flatten_util.ravel_pytree({n: maps[n].inv(v) for n, v in params.items()})

    def values(v):
        return {n: maps[n](x) for n, x in unravel(v).items()}

    information = -jax.jit(jax.hessian(lambda v: log_likelihood(values(v))))(flat)
    covariance = np.linalg.inv(information)
    found = result.standard_errors()
    for name, jacobian in jax.jacobian(values)(flat).items():
        expected = np.sqrt(np.einsum("...i,ij,...j->...", jacobian, covariance, jacobian))
        np.testing.assert_allclose(found[name], expected, rtol=2e-3)


def test_standard_errors_of_counts_with_a_covariate():
    """A maximum's derivative compares it with its entries, which a program that computes them twice rounds twice."""
    steps = 60
    x = np.sin(np.arange(steps) / 7.0)
    rng = np.random.default_rng(0)
    y = rng.poisson(np.exp(0.5 + 1.5 * (np.arange(steps) // 10 % 2) + 0.4 * x))

    def model(x, y):
        trans = numpyro.param("trans", jnp.array([[0.8, 0.2], [0.2, 0.8]]), constraint=SIMPLEX)
        level, slope = numpyro.param("level", jnp.array([0.0, 1.5])), numpyro.param("slope", 0.0)

        def step(z, now):
            x, y = now
            z = numpyro.sample("z", dist.Categorical(trans[z]))
            numpyro.sample("y", dist.Poisson(jnp.exp(level[z] + slope * x)), obs=y)
            return z, None

        scan(step, 0, (x, y))

    def log_likelihood(p):
        rate = jnp.exp(p["level"] + p["slope"] * x[:, None])
        return forward(p["trans"][0], p["trans"], jax.scipy.stats.poisson.logpmf(y[:, None], rate))

    result = autoem.EM(model, tol=1e-12, progress=False).run(KEY, x, y)
    np.testing.assert_allclose(result.log_likelihood, log_likelihood(result.params), atol=1e-8)
    check_errors(result, log_likelihood)


def test_standard_errors_of_eight_states():
    """Eight states of four emissions (islands of CpG): only tangents are several in the Hessian's messages."""
    rng = np.random.default_rng(1)
    dna = rng.integers(0, 4, 30)

    def model(dna):
        stay = numpyro.param("stay", 0.8, constraint=UNIT)
        bias = numpyro.param("bias", jnp.array([0.4, 0.3, 0.2, 0.1]), constraint=SIMPLEX)
        to = jnp.concatenate([bias, jnp.full(4, 0.25)]) * jnp.array([[stay] * 4 + [1 - stay] * 4] * 4)
        back = jnp.concatenate([bias, jnp.full(4, 0.25)]) * jnp.array([[1 - stay] * 4 + [stay] * 4] * 4)
        trans = jnp.concatenate([to, back])

        def step(state, base):
            state = numpyro.sample("state", dist.Categorical(trans[state]))
            numpyro.sample("base", dist.Categorical(jnp.tile(jnp.eye(4), (2, 1))[state]), obs=base)
            return state, None

        scan(step, 0, dna)

    result = autoem.EM(model, max_steps=20, progress=False).run(KEY, dna)
    assert all(np.isfinite(v).all() for v in result.standard_errors().values())


DIPPERS = [
    [11, 2, 0, 0, 0, 0, 9], [0, 24, 1, 0, 0, 0, 35], [0, 0, 34, 2, 0, 0, 42], [0, 0, 0, 45, 1, 2, 32],
    [0, 0, 0, 0, 51, 0, 37], [0, 0, 0, 0, 0, 52, 46],
]  # fmt: skip


def test_survival_and_recapture_of_dippers():
    """Lebreton et al. 1992, constant model: survival 0.560 (0.025), recapture 0.903 (0.029), -2 log L 666.84 (MARK).

    The dead are never seen, so that densities hold hard zeros; birds are followed up to their last sight.
    """
    seen, first, last = [], [], []
    for released, row in enumerate(DIPPERS):
        for again, count in enumerate(row):
            history = np.zeros(7, int)
            history[released], history[min(again + 1, 6)] = 1, int(again < 6)
            seen += [history] * count
            first += [released] * count
            last += [min(again + 1, 6)] * count

    def model(seen, first, last):
        survival = numpyro.param("survival", 0.6, constraint=UNIT)
        recapture = numpyro.param("recapture", 0.7, constraint=UNIT)

        def step(alive, now):
            year, seen = now
            with numpyro.plate("birds", len(seen)), handlers.mask(mask=(year > first) & (year <= last)):
                alive = numpyro.sample("alive", dist.Bernoulli(alive * survival))
                numpyro.sample("seen", dist.Bernoulli(alive * recapture), obs=seen)
            return jnp.where(year > first, alive, 1), None

        scan(step, jnp.ones(len(first), int), (jnp.arange(seen.shape[1]), seen.T))

    result = autoem.EM(model, progress=False).run(KEY, np.array(seen), np.array(first), np.array(last))
    np.testing.assert_allclose(-2 * result.log_likelihood, 666.84, atol=0.01)
    found = [result.params["survival"], result.params["recapture"]]
    np.testing.assert_allclose(found, [0.5602, 0.9026], atol=1e-4)
    errors = result.standard_errors()
    np.testing.assert_allclose([errors["survival"], errors["recapture"]], [0.0251, 0.0286], atol=1e-4)


def returns(r):
    trans = numpyro.param("trans", jnp.array([[0.9, 0.1], [0.1, 0.9]]), constraint=SIMPLEX)
    scale = numpyro.param("scale", jnp.array([0.5, 2.0]), constraint=POSITIVE)
    df, pull = numpyro.param("df", 5.0, constraint=POSITIVE), numpyro.param("pull", 0.9)

    def step(carry, r):
        s, before = carry
        s = numpyro.sample("s", dist.Categorical(trans[s]))
        r = numpyro.sample("r", dist.StudentT(df, pull * before, scale[s]), obs=r)
        return (s, r), None

    scan(step, (0, 0.0), r)


def test_draws_of_laws_that_numpyro_cannot_draw_stacked():
    """The law of all steps at once, which NumPyro sends out after a scan, is no law that can be drawn from."""
    r = np.random.default_rng(2).standard_t(5.0, 30)
    r[-2:] = np.nan
    em = autoem.EM(returns, m_step=autoem.m_step.Fixed(), init="model", missing="marginalize", progress=False)
    result = em.run(KEY, r)
    drawn = np.asarray(result.posterior(r).impute(KEY, 5)["r"])
    np.testing.assert_array_equal(drawn[:, :-2], np.tile(r[:-2], (5, 1)))
    assert np.isfinite(drawn).all()


@pytest.mark.parametrize("pull", [0.0, 0.95])
def test_simulated_data_are_carried_on_as_they_were_drawn(pull):
    """An autoregression of strength `pull` shows in the simulated data, whatever the data that were fitted."""
    r = np.random.default_rng(3).normal(size=400)
    em = autoem.EM(returns, m_step=autoem.m_step.Fixed(), init="model", progress=False)
    built, source = em._derive((r,), {})
    params = {**built.start(source, KEY), "pull": jnp.asarray(pull)}
    drawn = np.asarray(simulate(returns, params, KEY, Call(built, source, (r,), {}))["r"])
    np.testing.assert_allclose(np.corrcoef(drawn[1:], drawn[:-1])[0, 1], pull, atol=0.2)

"""Models of continuous latents as people write them elsewhere, each against an answer worked out without autoem."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy.optimize import minimize

import autoem

KEY = jax.random.key(0)
GROUP = np.repeat(np.arange(6), 5)
RNG = np.random.default_rng(1)
Y = 1 + 2 * RNG.normal(size=6)[GROUP] + RNG.normal(size=30)


def positive(name: str, value: float = 1.0) -> Any:
    return numpyro.param(name, value, constraint=constraints.positive)


def best(negative, start) -> tuple[np.ndarray, float]:
    """The maximum of a log-likelihood, by an optimiser that knows nothing of EM."""
    slope = jax.jit(jax.value_and_grad(negative))
    found = minimize(lambda x: [np.asarray(v, float) for v in slope(x)], np.asarray(start, float), jac=True)
    return found.x, -float(found.fun)


PICKS = {
    "index": lambda u, group: u[group],
    "take": jnp.take,
}


@pytest.mark.parametrize("pick", PICKS.values(), ids=PICKS)
def test_scaled_effects_read_by_group_after_scaling(pick):
    """The derivative by `tau` holds every group, though the effect has one cell where tables are made."""

    def model(y, group):
        mu, tau, noise = numpyro.param("mu", 0.0), positive("tau"), positive("noise")
        with numpyro.plate("groups", 6):
            z = numpyro.sample("z", dist.Normal(0, 1))
        u = numpyro.deterministic("u", tau * z)
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(mu + pick(u, group), noise), obs=y)

    result = autoem.EM(model, tol=1e-12, progress=False).run(KEY, Y, GROUP)
    same = GROUP[:, None] == GROUP

    def negative(v):
        cov = v[1] ** 2 * same + v[2] ** 2 * jnp.eye(30)
        return -jax.scipy.stats.multivariate_normal.logpdf(jnp.asarray(Y), v[0] * jnp.ones(30), cov)

    at, height = best(negative, [1.0, 1.5, 1.0])
    np.testing.assert_allclose(result.log_likelihood, height, atol=1e-6)
    np.testing.assert_allclose([result.params[n] for n in ("mu", "tau", "noise")], at, rtol=1e-3)
    errors = result.standard_errors()
    expected = np.sqrt(np.diag(np.linalg.inv(jax.hessian(negative)(jnp.asarray(at)))))
    np.testing.assert_allclose([errors[n] for n in ("mu", "tau", "noise")], expected, rtol=1e-3)


def test_classes_of_groups_read_after_a_table():
    """The same where the latent is discrete: rows read `exp(level[z])` by their group."""
    counts = np.random.default_rng(2).poisson(np.array([2.0, 9.0])[np.array([0, 1, 1, 0, 1, 0])][GROUP])

    def model(y, group):
        share = numpyro.param("share", 0.5, constraint=constraints.unit_interval)
        level, dose = numpyro.param("level", jnp.array([0.0, 1.0])), jnp.linspace(-1, 1, len(y))
        slope = numpyro.param("slope", 0.0)
        with numpyro.plate("groups", 6):
            z = numpyro.sample("z", dist.Bernoulli(share))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Poisson(jnp.exp(level[z][group] + slope * dose)), obs=y)

    result = autoem.EM(model, init="model", tol=1e-12, progress=False).run(KEY, counts, GROUP)

    def negative(v):
        rate = jnp.exp(v[1:3, None] + v[3] * jnp.linspace(-1, 1, 30))
        rows = jax.scipy.stats.poisson.logpmf(jnp.asarray(counts), rate)
        groups = jax.vmap(lambda r: jax.ops.segment_sum(r, GROUP, 6))(rows)
        weights = jnp.array([jax.nn.log_sigmoid(-v[0]), jax.nn.log_sigmoid(v[0])])
        return -jax.nn.logsumexp(groups + weights[:, None], axis=0).sum()

    at, height = best(negative, [0.0, 0.5, 2.0, 0.0])
    np.testing.assert_allclose(result.log_likelihood, height, atol=1e-6)
    np.testing.assert_allclose(result.params["level"], at[1:3], atol=1e-3)

"""Parameters whose maxima move together are maximised together, against steps and fits worked out without them."""

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
RNG = np.random.default_rng(0)
GROUP = np.repeat(np.arange(10), 5)
X = RNG.normal(size=50)
OWN = RNG.multivariate_normal([1, 2], [[1, 0.3], [0.3, 0.5]], 10)
Y = OWN[GROUP, 0] + OWN[GROUP, 1] * X + 0.5 * RNG.normal(size=50)


def by_factor():
    deviation = numpyro.param("deviation", jnp.array([1.0, 0.5]), constraint=constraints.positive)
    correlation = numpyro.param("correlation", jnp.eye(2), constraint=constraints.corr_cholesky)
    return {"scale_tril": deviation[:, None] * correlation}


def by_matrix():
    deviation = numpyro.param("deviation", jnp.array([1.0, 0.5]), constraint=constraints.positive)
    correlation = numpyro.param("correlation", jnp.eye(2), constraint=constraints.corr_matrix)
    return {"covariance_matrix": jnp.outer(deviation, deviation) * correlation}


def whole():
    start = jnp.diag(jnp.array([1.0, 0.25]))
    return {"covariance_matrix": numpyro.param("spread", start, constraint=constraints.positive_definite)}


def slopes(y, x, group, matrix):
    mean, noise = numpyro.param("mean", jnp.zeros(2)), numpyro.param("noise", 1.0, constraint=constraints.positive)
    law = dist.MultivariateNormal(mean, **matrix())
    with numpyro.plate("groups", 10):
        own = numpyro.sample("own", law)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(own[group, 0] + own[group, 1] * x, noise), obs=y)


@pytest.mark.parametrize("matrix", [by_factor, by_matrix])
def test_deviations_and_correlations_are_one_covariance(matrix):
    """The same iterates as those of a free covariance, whose update is the textbook's scatter."""
    fits = [
        autoem.EM(slopes, init="model", max_steps=5, progress=False).run(KEY, Y, X, GROUP, m) for m in (matrix, whole)
    ]
    assert "deviations" in str(fits[0].plan) and "Newton" not in str(fits[0].plan)
    np.testing.assert_allclose(fits[0].history, fits[1].history, rtol=1e-9)
    found = fits[0].params
    correlation = found["correlation"] @ found["correlation"].T if matrix is by_factor else found["correlation"]
    spread = np.outer(found["deviation"], found["deviation"]) * correlation
    np.testing.assert_allclose(spread, fits[1].params["spread"], rtol=1e-6)


def test_correlations_of_classes():
    """A matrix and deviations for each component, read by its index: those of a mixture of free covariances."""
    x = np.concatenate([RNG.normal(size=(40, 2)), 4 + RNG.normal(size=(40, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])])

    def mixture(x, split):
        loc = numpyro.param("loc", jnp.array([[0.0, 0.0], [3.0, 3.0]]))
        tril = numpyro.param("tril", jnp.tile(jnp.eye(2), (2, 1, 1)), constraint=constraints.lower_cholesky)
        if split:
            deviation = numpyro.param("deviation", jnp.ones((2, 2)), constraint=constraints.positive)
            factor = numpyro.param("factor", jnp.tile(jnp.eye(2), (2, 1, 1)), constraint=constraints.corr_cholesky)
            tril = deviation[..., None] * factor
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.MultivariateNormal(loc[z], scale_tril=tril[z]), obs=x)

    fits = [autoem.EM(mixture, init="model", max_steps=5, progress=False).run(KEY, x, split) for split in (True, False)]
    np.testing.assert_allclose(fits[0].history, fits[1].history, rtol=1e-9)


def test_deviations_shared_by_other_matrices_are_no_free_covariance():
    """One vector of deviations for two correlation matrices is left to Newton's method."""
    x = RNG.normal(size=(30, 2))

    def model(x):
        deviation = numpyro.param("deviation", jnp.ones(2), constraint=constraints.positive)
        start = jnp.tile(jnp.eye(2), (2, 1, 1))
        factor = numpyro.param("factor", start, constraint=constraints.corr_cholesky)
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(2), scale_tril=deviation[:, None] * factor[z]), obs=x)

    assert "Newton" in str(autoem.EM(model, progress=False).plan(x))


def test_levels_and_slopes_of_a_poisson_regression():
    """One M-step is the whole weighted regression: SciPy maximises it, given the classes' probabilities."""
    counts = RNG.poisson(np.exp(np.where(np.arange(50) % 2, 1.5, 0.3) + 0.4 * X))

    def model(counts, x):
        level, slope = numpyro.param("level", jnp.array([0.0, 1.0])), numpyro.param("slope", 0.0)
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("counts", dist.Poisson(jnp.exp(level[z] + slope * x)), obs=counts)

    found = autoem.EM(model, init="model", max_steps=1, progress=False).run(KEY, counts, X)
    assert "with level at the closed form" in str(found.plan)
    weight = jax.nn.softmax(jax.scipy.stats.poisson.logpmf(counts[:, None], np.exp([0.0, 1.0])), axis=1)

    def negative(v):
        rate = np.exp(v[:2] + v[2] * X[:, None])
        return (np.asarray(weight) * (rate - counts[:, None] * np.log(rate))).sum()

    expected = minimize(negative, np.zeros(3), tol=1e-12).x
    np.testing.assert_allclose([*found.params["level"], found.params["slope"]], expected, atol=1e-5)

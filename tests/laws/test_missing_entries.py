"""Law: vectors of a multivariate normal seen in part count by what was seen of them, and are filled in from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import autoem

RNG = np.random.default_rng(7)
ROWS = RNG.multivariate_normal([0.0, 2.0, -1.0], [[2.0, 1.0, 0.5], [1.0, 3.0, -0.5], [0.5, -0.5, 1.0]], size=60)
HOLES = RNG.random(ROWS.shape) < 0.3
SEEN_IN_PART = np.where(HOLES, np.nan, ROWS)
COVARIATE = RNG.normal(size=60)


def one(x):
    mu = numpyro.param("mu", jnp.zeros(3))
    cov = numpyro.param("cov", jnp.eye(3), constraint=constraints.positive_definite)
    with numpyro.plate("n", len(x)):
        numpyro.sample("x", dist.MultivariateNormal(mu, cov), obs=x)


def by_precision(x):
    mu = numpyro.param("mu", jnp.zeros(3))
    precision = numpyro.param("precision", jnp.eye(3), constraint=constraints.positive_definite)
    with numpyro.plate("n", len(x)):
        numpyro.sample("x", dist.MultivariateNormal(mu, precision_matrix=precision), obs=x)


def regressed(x):
    beta = numpyro.param("beta", jnp.zeros((2, 3)))
    cov = numpyro.param("cov", jnp.eye(3), constraint=constraints.positive_definite)
    with numpyro.plate("n", len(x)):
        numpyro.sample("x", dist.MultivariateNormal(beta[0] + COVARIATE[:, None] * beta[1], cov), obs=x)


def mixed(x):
    weights = numpyro.param("weights", jnp.array([0.5, 0.5]), constraint=constraints.simplex)
    mu = numpyro.param("mu", jnp.array([[0.0, 1.0, 0.0], [1.0, 3.0, -1.0]]))
    cov = numpyro.param("cov", jnp.tile(jnp.eye(3), (2, 1, 1)), constraint=constraints.positive_definite)
    with numpyro.plate("n", len(x)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.MultivariateNormal(mu[z], cov[z]), obs=x)


def components(model, p):
    """Log weight, location of every row and covariance, of each component."""
    covariance = np.linalg.inv(p["precision"]) if "precision" in p else p["cov"]
    if model is mixed:
        return [(np.log(p["weights"][k]), np.tile(p["mu"][k], (60, 1)), covariance[k]) for k in range(2)]
    loc = p["beta"][0] + COVARIATE[:, None] * p["beta"][1] if model is regressed else np.tile(p["mu"], (60, 1))
    return [(0.0, loc, covariance)]


def by_hand(model, params):
    """Log density, completed mean and variance of every row, from SciPy and the textbook's conditional normal."""
    p = {n: np.asarray(v) for n, v in params.items()}
    density, mean, square = [], np.zeros(ROWS.shape), np.zeros(ROWS.shape)
    for i, row in enumerate(SEEN_IN_PART):
        o, m = ~np.isnan(row), np.isnan(row)
        parts, filled, spread = [], [], []
        for weight, loc, cov in components(model, p):
            shown = multivariate_normal(loc[i][o], cov[np.ix_(o, o)]).logpdf(row[o]) if o.any() else 0.0
            gain = np.linalg.solve(cov[np.ix_(o, o)], cov[np.ix_(o, m)]).T
            full, var = row.copy(), np.zeros(3)
            full[m] = loc[i][m] + gain @ (row[o] - loc[i][o])
            var[m] = np.diag(cov[np.ix_(m, m)] - gain @ cov[np.ix_(o, m)])
            parts.append(weight + shown)
            filled.append(full)
            spread.append(var)
        share = np.exp(parts - logsumexp(parts))
        density.append(logsumexp(parts))
        mean[i] = share @ np.array(filled)
        square[i] = share @ (np.array(spread) + np.array(filled) ** 2) - mean[i] ** 2
    return np.array(density), mean, square


@functools.cache
def fitted(model):
    em = autoem.EM(model, missing="marginalize", max_steps=40, tol=1e-12, progress=False)
    return em, em.run(jax.random.key(0), SEEN_IN_PART)


MODELS = [one, by_precision, regressed, mixed]


@pytest.mark.parametrize("model", MODELS)
def test_density_and_completion(model):
    result = fitted(model)[1]
    density, mean, variance = by_hand(model, result.params)
    posterior = result.posterior(SEEN_IN_PART)
    np.testing.assert_allclose(result.log_likelihood, density.sum(), rtol=1e-9)
    np.testing.assert_allclose(posterior.log_likelihood, density, atol=1e-8)
    np.testing.assert_allclose(posterior.mean["x"], mean, atol=1e-8)
    np.testing.assert_allclose(posterior.sd["x"] ** 2, variance, atol=1e-8)


@pytest.mark.parametrize("model", MODELS)
def test_steps_rise_and_are_closed(model):
    em, result = fitted(model)
    assert np.diff(result.history[: result.num_steps + 1]).min() > -1e-9
    assert all(row.strategy == "closed form" for row in result.plan.parameters)
    assert em.check(jax.random.key(0), SEEN_IN_PART).ok


def test_draws_have_the_moments_of_the_completion():
    posterior = fitted(one)[1].posterior(SEEN_IN_PART)
    mean, sd = np.asarray(posterior.mean["x"]), np.asarray(posterior.sd["x"])
    for draws in (
        posterior.impute(jax.random.key(1), 4000)["x"],
        posterior.sample(jax.random.key(2), 4000)["x"],
    ):
        away = np.abs(np.asarray(draws).mean(0) - mean)
        assert (away <= 5 * sd / np.sqrt(4000) + 1e-9).all()  # five standard errors: one in a million an entry
        np.testing.assert_allclose(np.asarray(draws).std(0), sd, atol=0.15)
        np.testing.assert_allclose(np.asarray(draws)[:, ~HOLES], np.tile(ROWS[~HOLES], (4000, 1)), atol=1e-9)


def test_one_derivation_serves_data_with_and_without_holes():
    em = autoem.EM(one, missing="marginalize", max_steps=30, progress=False)
    whole = em.run(jax.random.key(0), ROWS)
    np.testing.assert_allclose(whole.params["mu"], ROWS.mean(0), rtol=1e-10)
    np.testing.assert_allclose(
        em.run(jax.random.key(0), SEEN_IN_PART).log_likelihood,
        by_hand(one, em.run(jax.random.key(0), SEEN_IN_PART).params)[0].sum(),
    )


def test_a_covariance_of_every_row_is_refused():
    def model(x, size):
        cov = numpyro.param("cov", jnp.eye(3), constraint=constraints.positive_definite)
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(3), size[:, None, None] * cov), obs=x)

    with pytest.raises(autoem.PlanError, match=r"site 'x': .*partly NaN, and its covariance differs from row to row"):
        autoem.EM(model, missing="marginalize").plan(SEEN_IN_PART, np.ones(60))


def test_murray_1977_from_the_textbook_start():
    """Two maxima of equal height at correlation one half; the start leads to the positive one (Murray 1977)."""
    nan = np.nan
    first = [1, 1, -1, -1, 2, 2, -2, -2, nan, nan, nan, nan]
    second = [1, -1, 1, -1, nan, nan, nan, nan, 2, 2, -2, -2]
    x = np.array([first, second], float).T

    def model(x):
        mu = numpyro.param("mu", jnp.zeros(2))
        cov = numpyro.param("cov", jnp.array([[2.0, 0.5], [0.5, 2.0]]), constraint=constraints.positive_definite)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.MultivariateNormal(mu, cov), obs=x)

    result = autoem.EM(model, missing="marginalize", tol=1e-13, progress=False).run(jax.random.key(0), x)
    np.testing.assert_allclose(result.log_likelihood, -29.97428641, atol=1e-6)
    np.testing.assert_allclose(result.params["cov"], [[8 / 3, 4 / 3], [4 / 3, 8 / 3]], atol=1e-3)
    np.testing.assert_allclose(result.params["mu"], 0, atol=1e-6)

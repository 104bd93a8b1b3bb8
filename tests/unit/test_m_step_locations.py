"""Angles, medians and quantiles against formulas, searches over the data and linear programs."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.optimize
from numpyro.distributions import constraints

from tests.maximal import assert_maximal, fitted, positive

ANGLES = np.random.default_rng(5).vonmises(np.repeat([2.9, -0.5], 60), 4.0)


def angle_model(x, shift):
    w = numpyro.param("w", jnp.ones(2) / 2, constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.array([2.0, 0.5]))
    concentration = positive("concentration", (2,))
    with numpyro.plate("n", len(x)):
        z = numpyro.sample("z", dist.Categorical(w))
        numpyro.sample("x", dist.VonMises(loc[z] + shift, concentration[z]), obs=x)


@pytest.mark.parametrize("shift", [0.0, np.linspace(-1, 1, len(ANGLES))], ids=["copied", "turned by data"])
def test_a_mixture_of_angles(shift) -> None:
    result = fitted(angle_model, ANGLES, shift, init="model")
    assert (result.plan.m_step("loc"), result.plan.m_step("concentration")) == ("closed form", "Newton")
    assert_maximal(angle_model, result, ANGLES, shift)


def test_one_angle_of_rows_that_differ_in_concentration() -> None:
    def model(x, known):
        loc = numpyro.param("loc", 0.0, constraint=constraints.circular)
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.VonMises(loc, known), obs=x)

    known = np.linspace(0.1, 5, len(ANGLES))
    result = fitted(model, ANGLES, known)
    expected = np.arctan2((known * np.sin(ANGLES)).sum(), (known * np.cos(ANGLES)).sum())
    np.testing.assert_allclose(result.params["loc"], expected, rtol=1e-12)


@pytest.mark.parametrize("prior", [dist.VonMises(1.0, 9.0), dist.Uniform(-np.pi, np.pi)], ids=["VonMises", "Uniform"])
def test_a_prior_of_an_angle(prior) -> None:
    def model(x):
        loc = numpyro.sample("loc", prior)
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.VonMises(loc, 2.0), obs=x)

    result = fitted(model, ANGLES[:60])
    assert result.plan.m_step("loc") == "closed form"
    assert_maximal(model, result, ANGLES[:60])


def laplace_mixture(x, shift):
    w = numpyro.param("w", jnp.ones(2) / 2, constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.array([-1.0, 6.0]))
    scale = positive("scale", (2,))
    with numpyro.plate("n", len(x)):
        z = numpyro.sample("z", dist.Categorical(w))
        numpyro.sample("x", dist.Laplace(loc[z] + shift, scale[z]), obs=x)


@pytest.mark.parametrize("shift", [0.0, np.linspace(-1, 1, 121)], ids=["copied", "shifted by data"])
def test_locations_of_a_laplace_mixture_are_weighted_medians(shift) -> None:
    rng = np.random.default_rng(8)
    x = shift + rng.laplace(np.where(np.arange(121) < 50, 0, 5), 0.8)
    result = fitted(laplace_mixture, x, shift, init="model")
    assert {result.plan.m_step(n) for n in ("w", "loc", "scale")} == {"closed form"}
    assert (np.diff(result.history) >= -1e-9).all()
    weight = np.asarray(result.posterior(x, shift).marginals["z"]).T
    for j in range(2):  # by search over all data, given the posterior
        loss = (weight[j] * np.abs((x - shift)[None] - (x - shift)[:, None])).sum(1)
        np.testing.assert_allclose(result.params["loc"][j], (x - shift)[loss.argmin()], rtol=1e-9)
        np.testing.assert_allclose(result.params["scale"][j], loss.min() / weight[j].sum(), rtol=1e-6)


def test_a_location_of_two_sites_some_rows_hidden() -> None:
    def model(x, y, group, seen):
        loc = numpyro.param("loc", jnp.zeros(3))
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.Laplace(loc[group], 0.5).mask(seen), obs=x)
            numpyro.sample("y", dist.Laplace(loc[group] + 1.0, 2.0), obs=y)

    rng = np.random.default_rng(9)
    group, seen = np.repeat([0, 2], [41, 60]), rng.random(101) < 0.7
    x, y = rng.laplace(group, 0.5), rng.laplace(group + 1.0, 2.0)
    x[~seen] = np.nan
    result = fitted(model, x, y, group, seen)
    assert float(result.params["loc"][1]) == 0.0  # nothing reads it
    for g in (0, 2):
        both = np.concatenate([x[(group == g) & seen], y[group == g] - 1])
        w = np.repeat([2.0, 0.5], [((group == g) & seen).sum(), (group == g).sum()])
        loss = (w * np.abs(both[None] - both[:, None])).sum(1)
        mine = (w * np.abs(both - float(result.params["loc"][g]))).sum()
        np.testing.assert_allclose(mine, loss.min(), rtol=1e-12)


def test_a_median_of_evenly_many_is_the_middle() -> None:
    def model(x):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.Laplace(loc, 1.0), obs=x)

    x = np.array([1.0, 9.0, 2.0, 4.0])
    assert float(fitted(model, x).params["loc"]) == np.median(x)


def test_a_regression_of_least_absolute_deviations_reaches_its_optimum() -> None:
    def model(design, y):
        beta = numpyro.param("beta", jnp.zeros(2))
        with numpyro.plate("n", len(y)):
            numpyro.sample("y", dist.Laplace(design @ beta, 1.0), obs=y)

    rng = np.random.default_rng(2)
    design = np.stack([np.ones(60), rng.normal(size=60)], 1)
    y = design @ [1.0, 2.0] + rng.laplace(size=60)
    cost = np.concatenate([np.zeros(2), np.ones(120)])  # y = X beta + plus - minus
    equal = np.concatenate([design, np.eye(60), -np.eye(60)], 1)
    exact = scipy.optimize.linprog(cost, A_eq=equal, b_eq=y, bounds=[(None, None)] * 2 + [(0, None)] * 120).fun
    result = fitted(model, design, y)
    assert "inside an absolute value" in next(r.reason for r in result.plan.parameters if r.name == "beta")
    np.testing.assert_allclose(result.log_likelihood, -exact - 60 * np.log(2), rtol=1e-6)


def test_quantile_regression_reaches_its_optimum() -> None:
    def model(design, y):
        beta = numpyro.param("beta", jnp.zeros(2))
        with numpyro.plate("n", len(y)):
            numpyro.sample("y", dist.AsymmetricLaplaceQuantile(design @ beta, 1.0, 0.8), obs=y)

    rng = np.random.default_rng(2)
    design = np.stack([np.ones(60), rng.normal(size=60)], 1)
    y = design @ [1.0, 2.0] + rng.normal(size=60)
    cost = np.concatenate([np.zeros(2), np.full(60, 0.8), np.full(60, 0.2)])
    equal = np.concatenate([design, np.eye(60), -np.eye(60)], 1)
    exact = scipy.optimize.linprog(cost, A_eq=equal, b_eq=y, bounds=[(None, None)] * 2 + [(0, None)] * 120).fun
    result = fitted(model, design, y)
    np.testing.assert_allclose(result.log_likelihood, -exact + 60 * np.log(0.8 * 0.2), rtol=1e-6)


def test_an_asymmetric_laplace_location_is_a_quantile() -> None:
    def model(x):
        loc = numpyro.param("loc", 0.0)
        scale = positive("scale")
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.AsymmetricLaplaceQuantile(loc, scale, 0.3), obs=x)

    x = np.random.default_rng(4).normal(size=101)
    result = fitted(model, x)
    assert result.plan.m_step("loc") == "closed form"
    loc = np.quantile(x, 0.3, method="inverted_cdf")
    assert float(result.params["loc"]) == loc
    np.testing.assert_allclose(result.params["scale"], np.mean((x - loc) * (0.3 - (x < loc))), rtol=1e-12)


def test_a_location_of_rows_that_differ_in_covariance() -> None:
    """No plain mean: each row counts by its own precision."""

    def model(x, factor):
        loc = numpyro.param("loc", jnp.array([[-1.0, 0.0], [3.0, 3.0]]))
        with numpyro.plate("n", len(x)):
            z = numpyro.sample("z", dist.Categorical(jnp.ones(2) / 2))
            numpyro.sample("x", dist.MultivariateNormal(loc[z], scale_tril=factor), obs=x)

    rng = np.random.default_rng(0)
    factor = np.array([[1.0, 0.0], [0.5, 1.0]]) * np.geomspace(0.1, 4, 80)[:, None, None]
    x = 4.0 * rng.integers(2, size=(80, 1)) + np.einsum("nij,nj->ni", factor, rng.normal(size=(80, 2)))
    assert_maximal(model, fitted(model, x, factor, init="model"), x, factor)


def test_a_location_of_two_sites_that_differ_in_covariance() -> None:
    def model(x, y):
        loc = numpyro.param("loc", jnp.zeros(2))
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.MultivariateNormal(loc, jnp.eye(2)), obs=x)
            numpyro.sample("y", dist.MultivariateNormal(loc, jnp.array([[4.0, 3.0], [3.0, 5.0]])), obs=y)

    x, y = np.random.default_rng(0).normal(size=(2, 30, 2)) + np.array([0.0, 3.0])[:, None, None]
    result = fitted(model, x, y)
    assert result.plan.m_step("loc") == "closed form"
    assert_maximal(model, result, x, y)


@pytest.mark.parametrize(
    "spread",
    [
        lambda mu: jnp.broadcast_to(mu, (3,)),
        lambda mu: jnp.stack([mu, jnp.asarray(0.0), jnp.asarray(1.0)]),
        lambda mu: jnp.stack([mu, mu, jnp.asarray(0.5)]),
    ],
    ids=["all entries", "one entry", "two entries"],
)
def test_a_location_in_some_places_of_a_vector(spread) -> None:
    """The covariance weighs what is seen of it: generalised least squares, by NumPy."""
    covariance = np.array([[1.0, 0.9, 0.0], [0.9, 1.5, 0.2], [0.0, 0.2, 0.7]])
    x = np.random.default_rng(6).normal(size=(8, 3))

    def model(x):
        mu = numpyro.param("mu", 0.3)
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.MultivariateNormal(spread(mu), covariance), obs=x)

    result = fitted(model, x)
    known = np.asarray(spread(jnp.zeros(())))
    design = np.asarray(spread(jnp.ones(()))) - known
    inverse = np.linalg.inv(covariance)
    expected = (design @ inverse @ (x - known).mean(0)) / (design @ inverse @ design)
    np.testing.assert_allclose(result.params["mu"], expected, rtol=1e-8)
    assert_maximal(model, result, x)

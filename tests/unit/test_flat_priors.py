"""Flat priors: restricted likelihoods and diffuse starts, against published fits; what is improper is refused."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import autoem
from autoem import PlanError
from tests.dense_gaussian import Dense
from tests.normal_law_models import diffuse_trend, flat, flat_by_group, restricted
from tests.state_space_models import COVARIANCE, POSITIVE, normal, param

KEY = jax.random.key(0)
RNG = np.random.default_rng(9)


def fit(model, *args, **options):
    return autoem.EM(model, init="model", progress=False, **{"tol": 1e-11, "max_steps": 4000, **options}).run(
        KEY, *args
    )


def read(name: str) -> np.ndarray:
    path = pathlib.Path(__file__).parents[1] / "data" / name
    return np.genfromtxt(path, delimiter=",", names=True)


def test_sleepstudy_by_reml() -> None:
    """lme4 (Bates et al. 2015, section 3): REML criterion 1743.6283, its deviations, fixed effects and their errors."""

    def model(y, days, subject):
        scatter = param("scatter", np.diag([600.0, 40.0]), COVARIANCE)
        sd, beta = param("sd", 30.0, POSITIVE), flat("beta", 2)
        with numpyro.plate("subjects", 18):
            b = numpyro.sample("b", dist.MultivariateNormal(jnp.zeros(2), scatter))
        with numpyro.plate("rows", len(y)):
            normal("y", beta[0] + b[subject, 0] + (beta[1] + b[subject, 1]) * days, sd, y)

    data = read("sleepstudy.csv")
    subject = np.unique(data["subject"], return_inverse=True)[1]
    result = fit(model, data["reaction"], data["days"], subject, latent=["beta"])
    scatter, posterior = result.params["scatter"], result.posterior()
    np.testing.assert_allclose(-2 * result.log_likelihood, 1743.6283, atol=5e-5)
    np.testing.assert_allclose(np.sqrt(np.diag(scatter)), [24.741, 5.922], rtol=1e-4)
    np.testing.assert_allclose(scatter[0, 1] / np.sqrt(scatter[0, 0] * scatter[1, 1]), 0.066, atol=5e-4)
    np.testing.assert_allclose(result.params["sd"], 25.592, atol=5e-4)
    np.testing.assert_allclose(posterior.mean["beta"], [251.405, 10.467], atol=5e-4)
    np.testing.assert_allclose(posterior.sd["beta"], [6.825, 1.546], atol=6e-4)
    assert "REML" in str(result.plan)


def test_dyestuff_by_reml() -> None:
    """lme4 (Bates 2010, section 1.3): REML criterion 319.6543, deviations 42.001 and 49.510, mean 1527.50 (19.38)."""

    def model(y, batch):
        between, sd, mu = param("between", 40.0, POSITIVE), param("sd", 50.0, POSITIVE), flat("mu")
        with numpyro.plate("batches", 6):
            u = normal("u", 0.0, between)
        with numpyro.plate("rows", len(y)):
            normal("y", mu + u[batch], sd, y)

    data = read("dyestuff.csv")
    result = fit(model, data["yield"], np.unique(data["batch"], return_inverse=True)[1], latent=["mu"])
    np.testing.assert_allclose(-2 * result.log_likelihood, 319.6543, atol=5e-5)
    np.testing.assert_allclose((result.params["between"], result.params["sd"]), (42.001, 49.510), atol=1e-3)
    np.testing.assert_allclose(
        (result.posterior().mean["mu"], result.posterior().sd["mu"]), (1527.5, 19.383), atol=5e-4
    )


def test_nile_from_a_diffuse_start() -> None:
    """Durbin and Koopman 2012, section 2.10.3: variances 15099 and 1469.1; log-likelihood as KFAS prints it."""

    def model(y):
        move, sd = param("move", 40.0, POSITIVE), param("sd", 120.0, POSITIVE)

        def step(level, seen):
            level = normal("level", level, move)
            normal("y", level, sd, seen)
            return level, None

        scan(step, flat("start"), y)

    y = read("nile.csv")
    result = fit(model, y[y.dtype.names[-1]])
    np.testing.assert_allclose(result.params["sd"] ** 2, 15099, atol=2)
    np.testing.assert_allclose(result.params["move"] ** 2, 1469.1, atol=0.7)
    np.testing.assert_allclose(result.log_likelihood, -632.5456, atol=5e-5)


def test_many_groups_below_fixed_effects() -> None:
    """Eliminated group by group, in the dense normal's likelihood."""
    group = np.repeat(np.arange(40), 3)
    x = RNG.normal(size=120)
    y = 0.3 + 0.5 * x + RNG.normal(size=40)[group] + 0.4 * RNG.normal(size=120)
    args = (y, x, group, 40)
    result = fit(restricted, *args, latent=["beta"], max_steps=3)
    assert "eliminated cell by cell" in str(result.plan)
    truth = Dense(restricted, args).moments(dict(result.params))
    np.testing.assert_allclose(result.log_likelihood, truth.log_likelihood, rtol=1e-9)
    np.testing.assert_allclose(result.posterior().mean["beta"], truth.mean["beta"], rtol=1e-8)


def test_as_wide_a_prior_as_one_likes_comes_to_the_same() -> None:
    """A `Normal` of deviation `s` costs `log(s) + log(2 pi) / 2` a coordinate, and gives the same estimates."""
    y = np.cumsum(RNG.normal(size=30)) + 0.5 * RNG.normal(size=30)

    def wide(y):
        diffuse_trend(y, start=lambda name: normal(name, 0.0, 1e5))

    exact, near = fit(diffuse_trend, y, max_steps=5, tol=0.0), fit(wide, y, max_steps=5, tol=0.0)
    price = 2 * np.log(1e5) + np.log(2 * np.pi)
    np.testing.assert_allclose(exact.history, near.history + price, atol=1e-4)
    np.testing.assert_allclose(exact.params["move"], near.params["move"], rtol=1e-4)


def twice(y, x):
    """An intercept for all beside one for each of two groups."""
    sd, mu = param("sd", 1.0, POSITIVE), flat("mu")
    with numpyro.plate("groups", 2):
        u = flat("u")
    with numpyro.plate("rows", len(y)):
        normal("y", mu + u[x], sd, y)


def collinear(y, x):
    sd, beta = param("sd", 1.0, POSITIVE), flat("beta", 3)
    with numpyro.plate("rows", len(y)):
        normal("y", x @ beta, sd, y)


def alone(y):
    sd, mu = param("sd", 1.0, POSITIVE), flat("mu")
    del mu
    with numpyro.plate("groups", len(y)):
        u = normal("u", 0.0, 1.0)
        normal("y", u, sd, y)


DESIGN = np.column_stack([np.ones(8), np.arange(8.0), 1 + 2 * np.arange(8.0)])


@pytest.mark.parametrize(
    ("model", "args", "names", "site"),
    [
        (twice, (RNG.normal(size=6), np.arange(6) % 2), ["mu", "u"], "mu"),
        (collinear, (RNG.normal(size=8), DESIGN), ["beta"], "beta"),
        (collinear, (RNG.normal(size=2), DESIGN[:2, [0, 1, 1]]), ["beta"], "beta"),
        (flat_by_group, (RNG.normal(size=6), np.ones(6), np.array([0, 1, 3, 0, 1, 3])), ["u"], "u"),
        (diffuse_trend, (np.array([0.3]),), [], "level0"),
        (alone, (RNG.normal(size=5),), ["mu"], "mu"),
    ],
    ids=["twice", "collinear", "few rows", "no row", "one step", "unread"],
)
def test_an_improper_posterior_is_refused(model, args, names, site) -> None:
    em = autoem.EM(model, init="model", latent=names, progress=False)
    with pytest.raises(PlanError, match=f"'{site}'.*improper"):
        em.run(KEY, *args)


def test_flat_effects_below_counts() -> None:
    """Not Gaussian: by the rule for what is not, with the flat prior as it stands."""

    def model(y, group):
        spread, mu = param("spread", 0.5, POSITIVE), flat("mu")
        with numpyro.plate("groups", 4):
            u = normal("u", 0.0, spread)
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Poisson(jnp.exp(mu + u[group])), obs=y)

    group = np.repeat(np.arange(4), 5)
    y = RNG.poisson(np.exp(1 + 0.4 * RNG.normal(size=4))[group])
    result = fit(model, y, group, latent=["mu"], max_steps=20, tol=1e-6)
    assert "Laplace" in result.objective_name and np.isfinite(result.log_likelihood)

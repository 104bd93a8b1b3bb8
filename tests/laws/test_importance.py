"""Importance sampling as an E-step: against quadrature, and against sums over every path of a switching model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from scipy.stats import multivariate_normal

import autoem
from autoem.e_step import Importance, Quadrature
from autoem.e_step.cells.importance import t_density, t_draws
from autoem.m_step import Fixed
from autoem.treatments.sampling import estimated

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
GROUP = np.repeat(np.arange(8), 4)
COUNTS = RNG.poisson(np.exp(0.5 + 0.7 * RNG.normal(size=8))[GROUP])
Y = np.array([0.3, -0.2, 1.0, 0.8, -1.2, 0.1])
TRANS, NOISE = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0.5, 1.5])


def groups(y):
    mu, s = numpyro.param("mu", 0.5), numpyro.param("s", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", 8):
        u = numpyro.sample("u", dist.Normal(mu, s))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Poisson(jnp.exp(u[GROUP])), obs=y)


def outliers(y):
    """A path seen through noise that switches."""
    trans = numpyro.param("trans", jnp.asarray(TRANS), constraint=constraints.simplex)
    a = numpyro.param("a", 0.8)
    r = numpyro.param("r", jnp.asarray(NOISE), constraint=constraints.positive)

    def step(carry, y):
        z, x = carry
        z = numpyro.sample("z", dist.Categorical(trans[z]))
        x = numpyro.sample("x", dist.Normal(a * x, 1.0))
        numpyro.sample("y", dist.Normal(x, r[z]), obs=y)
        return (z, x), None

    scan(step, (0, 0.0), y)


@pytest.mark.parametrize("freedom", [6.0, np.inf])
def test_standard_error_is_that_of_many_seeds(freedom):
    """The integral of a wider Gaussian over three dimensions, by 200 seeds: error and spread as stated."""

    def one(key):
        t = t_draws(key, (400, 3), freedom)
        return estimated(-0.5 * 0.8 * (t**2).sum(-1) - t_density(t, freedom))

    values, errors = jax.vmap(one)(jax.random.split(KEY, 200))
    exact = 1.5 * np.log(2 * np.pi / 0.8)
    assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(200) + errors.mean() ** 2
    np.testing.assert_allclose(errors.mean(), values.std(), rtol=0.2)
    assert np.mean(np.abs(values - exact) > 3 * errors) < 0.03


def test_cells_agree_with_quadrature_within_the_standard_error():
    fits = [autoem.EM(groups, e_step={"u": e}, progress=False).run(KEY, COUNTS) for e in (Importance(), Quadrature(31))]
    ours, exact = fits
    assert ours.converged and ours.objective_name == "log-likelihood by importance sampling"
    assert 0 < ours.standard_error < 0.1 and 300 < ours.effective_sample_size <= 500
    assert abs(ours.log_likelihood - exact.log_likelihood) < 4 * ours.standard_error
    for name in ("mu", "s"):  # a tenth of their standard errors
        assert abs(ours.params[name] - exact.params[name]) < 0.02
    assert exact.effective_sample_size is None


def by_hand():
    """Likelihood, and one EM update of every parameter, by enumeration of the classes."""
    time = np.arange(len(Y))
    lower = np.where(time[:, None] >= time, 0.8 ** (time[:, None] - time), 0.0)
    prior = lower @ lower.T
    logs, classes, seconds, means = [], [], [], []
    for z in itertools.product(range(2), repeat=len(Y)):
        noise = np.diag(NOISE[list(z)] ** 2)
        path = sum(np.log(TRANS[i, j]) for i, j in zip((0, *z), z, strict=False))
        gain = prior @ np.linalg.inv(prior + noise)
        mean = gain @ Y
        logs.append(path + multivariate_normal.logpdf(Y, np.zeros(len(Y)), prior + noise))
        classes.append(z)
        means.append(mean)
        seconds.append(prior - gain @ prior + np.outer(mean, mean))
    total = np.logaddexp.reduce(logs)
    weight, z, xx = np.exp(np.array(logs) - total), np.array(classes), np.array(seconds)
    second = np.einsum("p,pij->ij", weight, xx)
    a = np.trace(second[:-1, 1:]) / np.trace(second[:-1, :-1])
    residual = Y**2 - 2 * Y * np.array(means) + np.einsum("pii->pi", xx)
    share = [(weight[:, None] * (z == k)) for k in range(2)]
    r = [np.sqrt((s * residual).sum() / s.sum()) for s in share]
    count = np.zeros((2, 2))
    for w, path in zip(weight, classes, strict=True):
        np.add.at(count, ((0, *path[:-1]), path), w)
    return total, count / count.sum(1, keepdims=True), a, np.array(r)


def test_switching_model_agrees_with_enumeration():
    """The likelihood within four standard errors (0.007 there), and one M-step within that of some 8,000 draws."""
    total, trans, a, r = by_hand()
    em = autoem.EM(outliers, e_step={"x": Importance(20_000)}, init="model", max_steps=1, progress=False)
    result = em.run(KEY, Y)
    assert abs(result.history[0] - total) < 0.028 and 0 < result.standard_error < 0.01
    np.testing.assert_allclose(result.params["trans"], trans, atol=0.02)
    np.testing.assert_allclose(result.params["a"], a, atol=0.04)
    np.testing.assert_allclose(result.params["r"], r, rtol=0.04)


def two_hills(y):
    """A mode tells nothing of the other hill."""
    s = numpyro.param("s", 3.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(y)):
        u = numpyro.sample("u", dist.Normal(0.3, s))
        numpyro.sample("y", dist.Normal(u**2, 0.005), obs=y)


def test_draws_that_are_worth_few_are_told():
    result = autoem.EM(two_hills, e_step=Importance(100), m_step=Fixed(), init="model", progress=False).run(
        KEY, np.array([0.001, 0.0, 4.0, 6.0])
    )
    assert result.effective_sample_size < 30
    assert any("too few to rely on" in w for w in result.warnings) and "too few" in result.status


@pytest.mark.parametrize("bad", [{"num_samples": 1}, {"num_samples": 2.5}, {"freedom": 2.0}])
def test_what_cannot_be_drawn_is_refused(bad):
    with pytest.raises(ValueError, match=f"Importance.{next(iter(bad))}="):
        Importance(**bad)


def test_rule_of_one_point_is_laplace():
    plan = autoem.EM(groups, e_step=Quadrature(1), progress=False).plan(COUNTS)
    assert plan.e_step("u").startswith("Laplace")

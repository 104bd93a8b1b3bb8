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


def scaled(y, group, pick=lambda u, group: u[group]):
    mu, tau, noise = numpyro.param("mu", 0.0), positive("tau"), positive("noise")
    with numpyro.plate("groups", 6):
        z = numpyro.sample("z", dist.Normal(0, 1))
    u = numpyro.deterministic("u", tau * z)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mu + pick(u, group), noise), obs=y)


def test_scaled_effects_read_by_group_after_scaling():
    """The derivative by `tau` holds every group, though the effect has one cell where tables are made."""
    result = autoem.EM(scaled, tol=1e-12, progress=False).run(KEY, Y, GROUP)
    same = GROUP[:, None] == GROUP

    def negative(v):
        cov = v[1] ** 2 * same + v[2] ** 2 * jnp.eye(30)
        return -jax.scipy.stats.multivariate_normal.logpdf(jnp.asarray(Y), v[0] * jnp.ones(30), cov)

    at, height = best(negative, [1.0, 1.5, 1.0])
    np.testing.assert_allclose(result.log_likelihood, height, atol=1e-6)
    np.testing.assert_allclose([result.params[n] for n in ("mu", "tau", "noise")], at, rtol=1e-3)
    errors = result.standard_errors()
    expected = np.sqrt(np.diag(np.linalg.inv(jax.jit(jax.hessian(negative))(jnp.asarray(at)))))
    np.testing.assert_allclose([errors[n] for n in ("mu", "tau", "noise")], expected, rtol=1e-3)


def test_take_reads_an_effect_as_an_index_does():
    assert "Gaussian" in str(autoem.EM(scaled).plan(Y, GROUP, pick=jnp.take))


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


DESIGN = np.random.default_rng(5).normal(size=(40, 4))
RESPONSE = DESIGN[:, 0] * 2 - DESIGN[:, 3] + 0.3 * np.random.default_rng(6).normal(size=40)


def test_maximised_coefficients_whose_prior_reads_a_discrete_latent():
    """Spike and slab: the prior of each coefficient is a mixture, summed by hand here."""

    def model(x, y):
        with numpyro.plate("columns", 4):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            w = numpyro.sample("w", dist.Normal(0, jnp.array([0.1, 3.0])[z]))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    em = autoem.EM(model, maximize=["w"], tol=1e-12, progress=False)
    assert "its prior reads latents" in str(em.plan(DESIGN, RESPONSE))
    result = em.run(KEY, DESIGN, RESPONSE)

    def negative(w):
        normal = jax.scipy.stats.norm.logpdf
        spike, slab = jnp.log(0.7) + normal(w, 0, 0.1), jnp.log(0.3) + normal(w, 0, 3.0)
        return -jnp.logaddexp(spike, slab).sum() - normal(RESPONSE, DESIGN @ w, 0.3).sum()

    at, height = best(negative, [2.0, 0.0, 0.0, -1.0])
    np.testing.assert_allclose(result.history[-1], height, atol=1e-6)
    np.testing.assert_allclose(result.params["w"], at, atol=1e-3)


def test_lasso_by_latent_scales():
    """The exponential mixture of normals is a Laplace law: scikit-learn's lasso has the same coefficients."""

    def model(x, y):
        with numpyro.plate("columns", 4):
            tau = numpyro.sample("tau", dist.Exponential(2.0))
            w = numpyro.sample("w", dist.Normal(0, jnp.sqrt(tau)))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    lasso = pytest.importorskip("sklearn.linear_model").Lasso(2 * 0.3**2 / 40, fit_intercept=False, tol=1e-10)
    em = autoem.EM(model, maximize=["w"], latent=["tau"], progress=False)
    found = em.run(KEY, DESIGN, RESPONSE).params["w"]
    np.testing.assert_allclose(found, lasso.fit(DESIGN, RESPONSE).coef_, atol=1e-3)


def test_pairs_of_bounds_and_points_seen_of_a_latent():
    """Interval censoring with infinite bounds is read; a value seen exactly of a latent is refused with a rewrite."""
    low, high = np.array([0.0, 1.0, -np.inf, 2.0]), np.array([1.0, np.inf, 0.5, 2.5])

    def intervals(bounds):
        mu = numpyro.param("mu", 0.0)
        censored = dist.IntervalCensoredDistribution(
            dist.Normal(mu, 1.0), jnp.isinf(bounds[:, 0]), jnp.isinf(bounds[:, 1])
        )
        with numpyro.plate("rows", len(bounds)):
            numpyro.sample("y", censored, obs=bounds)

    result = autoem.EM(intervals, progress=False).run(KEY, np.stack([low, high], 1))
    cdf = jax.scipy.stats.norm.cdf
    _, height = best(lambda v: -jnp.log(cdf(high - v[0]) - cdf(low - v[0])).sum(), [1.0])
    np.testing.assert_allclose(result.log_likelihood, height, atol=1e-6)

    def tobit(y):
        mu = numpyro.param("mu", 0.0)
        with numpyro.plate("rows", len(y)):
            star = numpyro.sample("star", dist.Normal(mu, 1.0))
            numpyro.sample("y", dist.Delta(jnp.maximum(star, 0.0)), obs=y)

    with pytest.raises(autoem.ModelError, match="Delta of the continuous latent 'star'"):
        autoem.EM(tobit, progress=False).plan(np.array([0.0, 1.0]))


def test_matrix_times_a_random_number_has_a_closed_form():
    """The multivariate t by its latent precision: a step is the textbook's (Liu and Rubin 1995, section 2)."""
    x = np.random.default_rng(8).standard_t(3.0, size=(25, 2)) @ np.array([[1.0, 0.4], [0.0, 0.7]])

    def model(x, nu=4.0):
        centre = numpyro.param("centre", jnp.zeros(2))
        spread = numpyro.param("spread", jnp.eye(2), constraint=constraints.positive_definite)
        with numpyro.plate("rows", len(x)):
            w = numpyro.sample("w", dist.Gamma(nu / 2, nu / 2))
            numpyro.sample("x", dist.MultivariateNormal(centre, spread / w[:, None, None]), obs=x)

    em = autoem.EM(model, init="model", max_steps=1, progress=False)
    assert "closed form: E[scaled scatter] / E[count]" in str(em.plan(x))
    found = em.run(KEY, x).params
    weight = (4.0 + 2) / (4.0 + (x**2).sum(1))
    centre = weight @ x / weight.sum()
    apart = x - centre
    np.testing.assert_allclose(found["centre"], centre, rtol=1e-6)
    np.testing.assert_allclose(found["spread"], (weight[:, None] * apart).T @ apart / 25, rtol=1e-6)


def test_a_latent_that_nothing_reads_is_refused():
    def model(y):
        mu = numpyro.param("mu", 0.0)
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            numpyro.sample("new", dist.StudentT(4.0, mu, 1.0))

    with pytest.raises(autoem.PlanError, match="no observed site reads it"):
        autoem.EM(model, progress=False).plan(Y)


def test_counts_of_a_gaussian_process_are_differentiated_three_times():
    """Laplace's correction differentiates the density forwards, twice; the M-step's derivative comes on top."""

    def model(y):
        f = numpyro.sample("f", dist.MultivariateNormal(jnp.zeros(4), positive("a") * (jnp.eye(4) + 0.5)))
        numpyro.sample("y", dist.Poisson(jnp.exp(f)).to_event(1), obs=y)

    assert "Laplace" in str(autoem.EM(model, progress=False).plan(np.array([1, 2, 0, 4])))


def test_loadings_with_fixed_zeros():
    """Two group factors beside a general one: entries that nothing reads leave the others' steps alone."""
    pattern = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1], [1, 0, 1.0]])
    rng = np.random.default_rng(9)
    y = 1 + rng.normal(size=(60, 3)) @ (pattern * rng.uniform(0.5, 1, (4, 3))).T + 0.5 * rng.normal(size=(60, 4))

    def model(y):
        mu, loading = numpyro.param("mu", jnp.zeros(4)), numpyro.param("loading", jnp.asarray(0.5 * pattern))
        noise = numpyro.param("noise", jnp.ones(4), constraint=constraints.positive)
        with numpyro.plate("rows", len(y)):
            general = numpyro.sample("general", dist.Normal(0, 1))
            group = numpyro.sample("group", dist.Normal(0, 1).expand([2]).to_event(1))
            scores = jnp.concatenate([general[:, None], group], -1)
            numpyro.sample("y", dist.Normal(mu + scores @ (loading * pattern).T, noise).to_event(1), obs=y)

    found = autoem.EM(model, init="model", max_steps=1, progress=False).run(KEY, y).params
    weights = 0.5 * pattern
    gain = np.linalg.solve(weights @ weights.T + np.eye(4), weights).T
    scores = y @ gain.T
    spread = 60 * (np.eye(3) - gain @ weights) + scores.T @ scores
    for row in range(4):  # the regression of each column on an intercept and the scores that it reads
        read = np.flatnonzero(pattern[row])
        moments = np.block(
            [[60.0, scores[:, read].sum(0)], [scores[:, read].sum(0)[:, None], spread[np.ix_(read, read)]]]
        )
        expected = np.linalg.solve(moments, np.append(y[:, row].sum(), scores[:, read].T @ y[:, row]))
        np.testing.assert_allclose(found["mu"][row], expected[0], rtol=1e-7)
        np.testing.assert_allclose(found["loading"][row][read], expected[1:], rtol=1e-7)


def test_intervals_of_a_waiting_time_that_begin_at_zero():
    """Standard errors too: a piece of no length has a density of no mass, and no derivatives."""
    low = np.array([0.0, 0.0, 1.0, 2.0, 0.0, 3.0])

    def model(low):
        rate = positive("rate")
        with numpyro.plate("rows", len(low)):
            t = numpyro.sample("t", dist.Exponential(rate))
            seen = (t > low) & (t <= low + 1)
            numpyro.sample("seen", dist.Bernoulli(probs=seen.astype(float)), obs=jnp.ones(len(low)))

    result = autoem.EM(model, tol=1e-13, progress=False).run(KEY, low)
    share = 6 / (6 + low.sum())  # whole units waited are geometric
    np.testing.assert_allclose(result.params["rate"], -np.log(1 - share), rtol=1e-5)
    error = np.sqrt((1 - share) * share**2 / 6) / (1 - share)  # that of the share, by the delta method
    np.testing.assert_allclose(result.standard_errors()["rate"], error, rtol=1e-4)

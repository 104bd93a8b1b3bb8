"""Closed forms of constrained parameters: inside the maximum without bounds, elsewhere that of the closed domain."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from scipy.optimize import lsq_linear, minimize

import autoem
from autoem.m_step.closed_form.bounded import Domain, domain_of, in_order, on_box

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def fitted(model, *args, **options):
    em = autoem.EM(model, tol=1e-12, max_steps=5000, progress=False, **options)
    return em.run(KEY, *args)


@pytest.mark.parametrize(
    ("constraint", "domain"),
    [
        (constraints.real, Domain()),
        (constraints.positive, Domain(0.0)),
        (constraints.interval(-1.0, 1.0), Domain(-1.0, 1.0)),
        (constraints.less_than(3.0), Domain(high=3.0)),
        (constraints.positive_ordered_vector, Domain(0.0, ordered=True)),
        (constraints.independent(constraints.ordered_vector, 1), Domain(ordered=True)),
        (constraints.simplex, None),
        (constraints.circular, None),
        (constraints.interval(jnp.zeros(2), jnp.ones(2)), None),
    ],
)
def test_domains_of_constraints(constraint, domain):
    assert domain_of(constraint) == domain


def test_the_maximum_on_a_box_is_scipys():
    """Bounded least squares by SciPy; where a bound is met the step goes nine tenths of the way."""
    x = RNG.normal(size=(20, 4))
    y = x @ np.array([1.0, -0.5, 1.0, 2.0]) + RNG.normal(size=20)
    low, high = np.array([-0.1, -1.0, 0.0, -5.0]), np.array([0.1, 1.0, 0.3, 5.0])
    free = np.linalg.lstsq(x, y, rcond=None)[0]
    curvature, slope = jnp.asarray(x.T @ x), jnp.asarray(x.T @ y)
    step = on_box(curvature, slope, jnp.asarray(free), jnp.asarray(low), jnp.asarray(high))
    expected = lsq_linear(x, y, (low, high), tol=1e-12).x
    assert (np.abs(free) > high).any()
    np.testing.assert_allclose(step, 0.9 * expected, atol=1e-5)
    inside = on_box(curvature, slope, jnp.asarray(free), -10 * jnp.ones(4), 10 * jnp.ones(4))
    np.testing.assert_array_equal(inside, free)


def test_increasing_means_are_those_of_an_optimiser():
    """Isotonic regression, by SciPy's optimiser of the gaps."""
    best, weight = np.array([0.0, 3.0, 1.0, 2.0, 1.5, 6.0]), np.array([1.0, 2.0, 3.0, 0.5, 2.0, 1.0])
    found = in_order(
        jnp.zeros(6), jnp.asarray(best), jnp.asarray(weight * best), jnp.asarray(weight), lambda a, b: a / b, -jnp.inf
    )
    gaps = minimize(
        lambda v: (weight * (np.cumsum(v) - best) ** 2).sum(), np.ones(6), bounds=[(None, None)] + 5 * [(0, None)],
        options={"ftol": 1e-15, "gtol": 1e-12},
    ).x  # fmt: skip
    np.testing.assert_allclose(found, 0.9 * np.cumsum(gaps), atol=1e-5)


LOADINGS = np.array([1.0, 0.6, 0.8])
SCORES = 1 + RNG.normal(size=(150, 1)) * LOADINGS + 0.5 * RNG.normal(size=(150, 3))


def one_factor(y, constraint):
    nu, sd = numpyro.param("nu", jnp.zeros(3)), numpyro.param("sd", jnp.ones(3), constraint=constraints.positive)
    loading = numpyro.param("loading", jnp.ones(3), constraint=constraint)
    with numpyro.plate("rows", len(y)):
        f = numpyro.sample("f", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(nu + loading * f[:, None], sd).to_event(1), obs=y)


def test_positive_loadings_take_the_steps_of_free_ones():
    """A constraint that is never met changes nothing: least squares with the intercepts, as without it."""
    paths = []
    for constraint in (constraints.real, constraints.positive):
        em = autoem.EM(one_factor, init="model", max_steps=30, progress=False)
        result = em.run(KEY, SCORES, constraint)
        assert "closed form: weighted least squares of nu, loading together" in str(result.plan)
        paths.append(result.history)
    np.testing.assert_allclose(paths[0], paths[1], rtol=1e-12)


def noncentred(y, group):
    mu, noise = numpyro.param("mu", 0.0), numpyro.param("noise", 1.0, constraint=constraints.positive)
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    reparam = {"u": numpyro.infer.reparam.LocScaleReparam(0)}
    with numpyro.plate("groups", 8), numpyro.handlers.reparam(config=reparam):
        u = numpyro.sample("u", dist.Normal(mu, tau))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(u[group], noise), obs=y)


def test_numpyros_own_reparametrisation_has_a_closed_form():
    """`LocScaleReparam` raises the scale to a power of one; one step is the regression on the effects' moments."""
    group = np.repeat(np.arange(8), 6)
    y = 3 + 2 * RNG.normal(size=8)[group] + RNG.normal(size=48)
    found = autoem.EM(noncentred, init="model", max_steps=1, progress=False).run(KEY, y, group)
    z = (group[:, None] == np.arange(8)).astype(float)
    cov = np.linalg.inv(np.eye(8) + z.T @ z)
    mean = cov @ z.T @ y
    second = z @ (cov + np.outer(mean, mean)) @ z.T
    normal = np.array([[48.0, (z @ mean).sum()], [(z @ mean).sum(), np.trace(second)]])
    expected = np.linalg.solve(normal, [y.sum(), y @ z @ mean])
    np.testing.assert_allclose([found.params["mu"], found.params["tau"]], expected, rtol=1e-9)


def line(x, y, constraint):
    a, s = numpyro.param("a", 0.0), numpyro.param("s", 1.0, constraint=constraints.positive)
    slope = numpyro.param("slope", 0.5, constraint=constraint)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(a + slope * x, s), obs=y)


@pytest.mark.parametrize(("constraint", "edge"), [(constraints.positive, 0.0), (constraints.interval(0.1, 2.0), 0.1)])
def test_a_slope_whose_maximum_is_at_its_bound(constraint, edge):
    x = RNG.normal(size=40)
    y = 1 - x + RNG.normal(size=40)
    found = fitted(line, x, y, constraint)
    np.testing.assert_allclose(found.params["slope"], edge, atol=1e-4)
    left = y - edge * x
    expected = -20 * (np.log(2 * np.pi * left.var()) + 1)
    np.testing.assert_allclose(found.log_likelihood, expected, atol=1e-3)
    assert np.all(np.diff(found.history) > -1e-9)


def in_sequence(y, shares, family, constraint):
    start = jnp.array([1.0, 2.0, 3.0])
    level: Any = numpyro.param("level", start, constraint=constraint)
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Categorical(shares))
        numpyro.sample("y", family(level[z]), obs=y)


@pytest.mark.parametrize("family", [dist.Poisson, lambda level: dist.Normal(level, 1.0), dist.Exponential])
def test_levels_in_order_that_would_cross(family):
    """Classes are all but known, and their means fall: by pooling, all levels are one."""
    shares = jnp.tile(jnp.eye(3) * 0.999999 + 1e-7, (10, 1))
    y = np.tile([6.0, 4.0, 2.0], 10)
    found = fitted(in_sequence, y, shares, family, constraints.positive_ordered_vector, init="model")
    assert "in order" in str(found.plan)
    rising = family is dist.Exponential  # of which the levels are rates: their reciprocals rise
    expected = np.array([1 / 6, 1 / 4, 1 / 2]) if rising else np.full(3, 4.0)
    np.testing.assert_allclose(found.params["level"], expected, rtol=2e-3)


def test_a_scale_kept_from_zero():
    y = 0.01 * RNG.normal(size=30)

    def model(y):
        scale = numpyro.param("scale", 1.0, constraint=constraints.greater_than(0.05))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(0.0, scale), obs=y)

    found = fitted(model, y)
    assert "within its bounds" in str(found.plan)
    np.testing.assert_allclose(found.params["scale"], 0.05, rtol=1e-4)


def test_an_autoregression_kept_stationary():
    """The regression of each state on the one before, by the smoother's moments: Shumway and Stoffer 1982."""

    def model(y):
        phi = numpyro.param("phi", 0.5, constraint=constraints.interval(-1.0, 1.0))
        noise = numpyro.param("noise", 0.5, constraint=constraints.positive)

        def step(x, seen):
            x = numpyro.sample("x", dist.Normal(phi * x, 1.0))
            numpyro.sample("y", dist.Normal(x, noise), obs=seen)
            return x, None

        scan(step, 0.0, y)

    x = np.zeros(41)
    for t in range(40):
        x[t + 1] = 0.8 * x[t] + RNG.normal()
    y = x[1:] + 0.5 * RNG.normal(size=40)
    found = autoem.EM(model, init="model", max_steps=1, progress=False).run(KEY, y)
    assert "phi    closed form" in str(found.plan)
    root = np.linalg.inv(np.eye(40) - 0.5 * np.eye(40, k=-1))
    precision = np.linalg.inv(root @ root.T) + np.eye(40) / 0.25
    cov = np.linalg.inv(precision)
    mean = cov @ y / 0.25
    second = cov + np.outer(mean, mean)
    expected = np.diagonal(second, 1).sum() / np.diagonal(second)[:-1].sum()
    np.testing.assert_allclose(found.params["phi"], expected, rtol=1e-9)

"""Normal laws by other names: found by their density, integrated, and read step by step where they are paths.

The laws of `tests/laws/test_gaussian.py` hold for each of them; here stand the ways in which they are read.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from scipy.linalg import toeplitz
from scipy.stats import multivariate_normal

import autoem
from autoem.families.laws import law_of
from autoem.graph.affine import is_affine
from autoem.graph.jaxpr import trace_graph
from tests import normal_law_models as models
from tests.normal_law_models import BORDERS, Exchangeable
from tests.state_space_models import POSITIVE, SCATTER, normal, param

KEY = jax.random.key(0)
ROOT = np.linalg.cholesky(SCATTER)
VECTOR = jnp.array([0.3, -0.2, 0.5, 0.1])


def drift(x, _):
    return -0.3 * x, jnp.ones_like(x)


def growth(x, _):
    return -0.3 * x, x


LAWS = {
    "CAR": dist.CAR(VECTOR[:1], 0.6, 1.5, BORDERS.astype(float)),
    "CAR of JAX's own array": dist.CAR(0.0, 0.6, 1.5, jnp.asarray(BORDERS, float)),
    "sparse CAR": dist.CAR(0.0, 0.6, 1.5, BORDERS.astype(float), is_sparse=True),
    "random walk": dist.GaussianRandomWalk(0.7, 5),
    "random walks": dist.GaussianRandomWalk(jnp.array([0.7, 1.2]), 5),
    "low rank": dist.LowRankMultivariateNormal(VECTOR, jnp.ones((4, 2)) * 0.3, jnp.ones(4)),
    "matrix": dist.MatrixNormal(jnp.ones((2, 2)), ROOT, 2 * ROOT),
    "state space": dist.GaussianStateSpace(4, jnp.array([[0.8, 0.1], [0.0, 0.5]]), scale_tril=ROOT),
    "state space from a start": dist.GaussianStateSpace(4, jnp.eye(2), ROOT @ ROOT.T, initial_value=jnp.ones(2)),
    "circle": dist.CirculantNormal(VECTOR, jnp.array([1.0, 0.4, 0.2, 0.4])),
    "linear equation": dist.EulerMaruyama(jnp.arange(4.0), drift, dist.Normal(0.0, 1.0)),
    "transformed": dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(1.0, 2.0)),
    "sheared": dist.TransformedDistribution(
        dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)),
        dist.transforms.LowerCholeskyAffine(jnp.array([1.0, -2.0]), ROOT),
    ),
    "unseen": Exchangeable(0.8, 0.5, 4),
}
OTHERS = {
    "t": dist.StudentT(3.0),
    "vector t": dist.MultivariateStudentT(3.0, jnp.zeros(2), jnp.eye(2)),
    "asymmetric": dist.AsymmetricLaplace(0.0, 1.0, 2.0),
    "soft": dist.SoftLaplace(0.0, 1.0),
    "logistic": dist.Logistic(0.0, 1.0),
    "mixture": dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(jnp.zeros(2), 1.0)),
    "nonlinear equation": dist.EulerMaruyama(jnp.arange(4.0), growth, dist.Normal(0.0, 1.0)),
    "point": dist.Delta(0.0),
    "flat": dist.ImproperUniform(constraints.real, (), ()),
    "positive": dist.HalfCauchy(1.0),
    "censored": dist.LeftCensoredDistribution(dist.Normal(0.0, 1.0), 0.0),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_law_is_known_by_its_density(name: str) -> None:
    """At random values the law found has the density that NumPyro's class has."""
    law, given = law_of(LAWS[name]), LAWS[name]
    assert law is not None
    value = jax.random.normal(KEY, given.shape())
    found = dist.MultivariateNormal(**law.args) if given.event_shape else dist.Normal(**law.args)
    np.testing.assert_allclose(found.log_prob(law.flat(value)), given.log_prob(value), rtol=1e-10)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_normal_is_no_law(name: str) -> None:
    assert law_of(OTHERS[name]) is None


@pytest.mark.parametrize(
    ("function", "affine"),
    [
        (lambda x: 3 * x + 1, True),
        (lambda x: jnp.cumsum(x)[::-1] / 2, True),
        (lambda x: jnp.where(jnp.isfinite(x), x, 0.0), True),
        (lambda x: jnp.linalg.solve(jnp.eye(3) * 2, x), True),
        (lambda x: jax.lax.scan(lambda c, v: (0.5 * c + v, c - v), 0.0, x)[1], True),
        (lambda x: jax.lax.scan(lambda c, v: (c * v, c), 1.0, x)[1], False),
        (lambda x: x * x, False),
        (lambda x: jnp.where(x > 0, x, 0.0), False),
        (lambda x: jnp.sort(x), False),
        (lambda x: 1 / x, False),
        (lambda x: jnp.abs(x), False),
        (lambda x: x[jnp.argmax(x)], False),
    ],
)
def test_affine(function, affine: bool) -> None:
    graph = trace_graph(lambda inputs: {("out", 0): function(inputs["in", 0])}, {("in", 0): jnp.ones(3)})
    assert is_affine(graph, ("out", 0), ("in", 0)) is affine


def fit(model, *args, **options):
    return autoem.EM(model, init="model", progress=False, **options).run(KEY, *args)


RNG = np.random.default_rng(3)
LONG = np.cumsum(0.4 * RNG.normal(size=2000)) + 0.6 * RNG.normal(size=2000)


def test_a_long_walk_is_a_chain() -> None:
    """Against the dense normal of 2,000 dimensions by SciPy: covariance `min(i, j)` moves, and the noise."""
    result = fit(models.random_walk, LONG, max_steps=3)
    assert "carried along 2,000 steps" in str(result.plan)
    move, sd = (float(result.params[n]) for n in ("move", "sd"))
    step = np.arange(1, 2001)
    dense = move**2 * np.minimum(step[:, None], step) + sd**2 * np.eye(2000)
    np.testing.assert_allclose(result.log_likelihood, multivariate_normal.logpdf(LONG, cov=dense), rtol=1e-9)
    gain = move**2 * np.minimum(step[:, None], step)
    np.testing.assert_allclose(result.posterior().mean["x"], gain @ np.linalg.solve(dense, LONG), rtol=1e-7, atol=1e-9)


def test_a_walk_is_what_its_scan_is() -> None:
    """NumPyro's own class and the same steps by hand are one model: they end at the same maximum."""

    def by_hand(y):
        move, sd = param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

        def step(x, seen):
            x = normal("x", x, move)
            normal("y", x, sd, seen)
            return x, None

        scan(step, 0.0, y)

    whole, steps = fit(models.random_walk, LONG[:150]), fit(by_hand, LONG[:150])
    np.testing.assert_allclose(whole.history, steps.history, rtol=1e-9)
    np.testing.assert_allclose(whole.posterior().sd["x"], steps.posterior().sd["x"], rtol=1e-7)


def test_answers_have_the_shape_of_the_site() -> None:
    """Of walks in a plate the steps come last, as in the model."""
    y = RNG.normal(size=(7, 3)).cumsum(0)
    result = fit(models.walks, y, max_steps=2)
    posterior = result.posterior()
    assert posterior.mean["x"].shape == posterior.sd["x"].shape == (3, 7)
    assert posterior.covariance["x"].shape == (3, 7, 1, 1)
    assert posterior.sample(KEY, 5)["x"].shape == (5, 3, 7)
    assert posterior.mode()["x"].shape == (3, 7)
    np.testing.assert_allclose(posterior.mode()["x"], posterior.mean["x"], rtol=1e-10)


def test_rows_that_read_several_steps_make_it_one_vector() -> None:
    plan = autoem.EM(models.spline, init="model", progress=False).plan(LONG[:9])
    assert "carried along" not in str(plan) and "5 dimensions" in str(plan)
    assert plan.m_step("move") == "closed form"


def test_a_walk_below_counts_stays_one_vector() -> None:
    def counts(y):
        move = param("move", 0.3, POSITIVE)
        x = numpyro.sample("x", dist.GaussianRandomWalk(move, len(y)))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)

    plan = autoem.EM(counts, init="model", progress=False).plan(np.array([1, 0, 2, 3, 1]))
    assert "Laplace" in str(plan)


def test_a_walk_of_known_scale_may_be_maximised() -> None:
    """With fixed numbers as its law it is a parameter with a prior; its mode is the posterior's mean, by SciPy."""

    def known(y):
        x = numpyro.sample("x", dist.GaussianRandomWalk(0.5, len(y)))
        with numpyro.plate("rows", len(y)):
            normal("y", x, 0.6, y)

    y, step = LONG[:9], np.arange(1, 10)
    gain = 0.25 * np.minimum(step[:, None], step)
    mean = gain @ np.linalg.solve(gain + 0.36 * np.eye(9), y)
    np.testing.assert_allclose(fit(known, y).params["x"], mean, rtol=1e-4)
    np.testing.assert_allclose(fit(known, y, latent=["x"]).posterior().mean["x"], mean, rtol=1e-8)


def test_an_observed_walk_is_its_moves() -> None:
    """The scale is the root mean square of the moves, the first from zero."""

    def seen(y):
        numpyro.sample("y", dist.GaussianRandomWalk(param("move", 0.8, POSITIVE), len(y)), obs=y)

    result = fit(seen, LONG)
    moves = np.diff(LONG, prepend=0.0)
    np.testing.assert_allclose(result.params["move"], np.sqrt((moves**2).mean()), rtol=1e-6)
    expected = dist.GaussianRandomWalk(result.params["move"], 2000).log_prob(LONG)
    np.testing.assert_allclose(result.log_likelihood, expected, rtol=1e-10)


def test_an_observed_walk_with_holes() -> None:
    """What is not seen is integrated: the density of the moves between what is, by SciPy."""

    def seen(y):
        numpyro.sample("y", dist.GaussianRandomWalk(param("move", 0.8, POSITIVE), y.shape[-1]), obs=y)

    y = np.where(np.arange(12) % 4 == 1, np.nan, LONG[:12])
    result = fit(seen, y, missing="marginalize", max_steps=3)
    at, step = np.flatnonzero(~np.isnan(y)), np.arange(1, 13)
    covariance = float(result.params["move"]) ** 2 * np.minimum(step[:, None], step)[np.ix_(at, at)]
    np.testing.assert_allclose(result.log_likelihood, multivariate_normal.logpdf(y[at], cov=covariance), rtol=1e-8)


def test_an_observed_state_space_has_closed_forms() -> None:
    """Regression of each state on the one before, and the scatter of what is left."""

    def seen(y):
        a, q = param("a", np.eye(2) * 0.5), param("q", SCATTER, constraints.positive_definite)
        numpyro.sample("y", dist.GaussianStateSpace(len(y), a, covariance_matrix=q), obs=y)

    y = RNG.normal(size=(40, 2)).cumsum(0)
    result = fit(seen, y)
    before = np.concatenate([np.zeros((1, 2)), y[:-1]])
    a = np.linalg.lstsq(before, y, rcond=None)[0].T
    left = y - before @ a.T
    np.testing.assert_allclose(result.params["a"], a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.params["q"], left.T @ left / 40, rtol=1e-4, atol=1e-6)


def test_observed_areas_with_closed_forms() -> None:
    """At a known correlation: generalised least squares for the mean, and for the precision the mean square."""
    y = RNG.normal(size=(12, 6)) + 0.5
    inner = np.diag(BORDERS.sum(1)) - 0.6 * BORDERS

    def maps(y):
        mu, tau = param("mu", 0.0), param("tau", 1.0, POSITIVE)
        with numpyro.plate("years", len(y)):
            numpyro.sample("y", dist.CAR(mu, 0.6, tau, BORDERS.astype(float)), obs=y)

    result = fit(maps, y)
    assert result.plan.m_step("mu") == result.plan.m_step("tau") == "closed form"
    one = np.ones(6)
    mu = (y @ inner @ one).mean() / (one @ inner @ one)
    tau = 6 / np.einsum("ni,ij,nj->n", y - mu, inner, y - mu).mean()
    np.testing.assert_allclose(result.params["mu"], mu, rtol=1e-6)
    np.testing.assert_allclose(result.params["tau"], tau, rtol=1e-6)


def test_observed_areas_with_holes() -> None:
    """Areas not seen are integrated, each year by what was seen of it: normals of fewer dimensions, by SciPy."""
    y = RNG.normal(size=(5, 6))
    y[[0, 2, 2, 3], [1, 0, 4, 5]] = np.nan

    def maps(y):
        tau = param("tau", 1.0, POSITIVE)
        with numpyro.plate("years", len(y)):
            numpyro.sample("y", dist.CAR(0.2, 0.6, tau, BORDERS.astype(float)), obs=y)

    result = fit(maps, y, missing="marginalize", max_steps=4)
    inner = float(result.params["tau"]) * (np.diag(BORDERS.sum(1)) - 0.6 * BORDERS)
    covariance = np.linalg.inv(inner)
    seen = [np.flatnonzero(~np.isnan(row)) for row in y]
    each = [
        multivariate_normal.logpdf(row[at], np.full(len(at), 0.2), covariance[np.ix_(at, at)])
        for row, at in zip(y, seen, strict=True)
    ]
    np.testing.assert_allclose(result.log_likelihood, sum(each), rtol=1e-8)


def test_a_law_on_a_circle() -> None:
    """The same as the normal law of that Toeplitz covariance, by SciPy."""
    y = LONG[:8]
    result = fit(models.circle, y, max_steps=2)
    away = np.minimum(np.arange(8), 8 - np.arange(8))
    height, sd = float(result.params["height"]), float(result.params["sd"])
    dense = toeplitz(height * np.exp(-away / 2)) + sd**2 * np.eye(8)
    np.testing.assert_allclose(result.log_likelihood, multivariate_normal.logpdf(y, cov=dense), rtol=1e-8)

"""Augmented locations and logits: one update against the textbook's weights, the end against another maximiser."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy import optimize, stats

import autoem
from autoem import PlanError
from autoem.m_step import Augmented

KEY = jax.random.key(0)
RNG = np.random.default_rng(3)
X = np.column_stack([np.ones(60), RNG.normal(size=(60, 2))])
Y = X @ [1.0, 2.0, -1.0] + 0.5 * RNG.standard_t(2, size=60)
SIGN = (Y > 1).astype(float)


def positive(name, value=1.0):
    return numpyro.param(name, value, constraint=constraints.positive)


def student(x, y):
    beta, scale, df = numpyro.param("beta", jnp.zeros(3)), positive("scale"), positive("df", 4.0)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.StudentT(df, x @ beta, scale), obs=y)


def cauchy(x, y):
    beta, scale = numpyro.param("beta", jnp.zeros(3)), positive("scale")
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Cauchy(x @ beta, scale), obs=y)


def laplace(x, y):
    beta, scale = numpyro.param("beta", jnp.zeros(3)), positive("scale")
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Laplace(x @ beta, scale), obs=y)


def logistic(x, y):
    beta = numpyro.param("beta", jnp.zeros(3))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def fitted(model, y, **options):
    options = {"max_steps": 3000, "tol": 1e-13, "m_step": {"beta": Augmented()}, **options}
    return autoem.EM(model, init="model", progress=False, **options).run(KEY, X, y)


def least_squares(weight, y):
    return np.linalg.solve((X * weight[:, None]).T @ X, X.T @ (weight * y))


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        (student, lambda r: (4.0 + 1) / (4.0 + r**2)),
        (cauchy, lambda r: 2 / (1 + r**2)),
        (laplace, lambda r: 1 / np.abs(r)),
    ],
)
def test_the_first_update_is_weighted_least_squares(model, weights):
    """Lange, Little and Taylor 1989, section 3: weights of a Student t; Schlossmacher 1973: of a Laplace."""
    others = {n: autoem.m_step.Fixed() for n in ("scale", "df")[: {student: 2}.get(model, 1)]}
    result = fitted(model, Y, max_steps=1, m_step={"beta": Augmented(), **others})
    np.testing.assert_allclose(result.params["beta"], least_squares(weights(Y), Y), rtol=1e-8)


def test_the_first_update_of_logits_is_that_of_polya_gamma():
    """Polson, Scott and Windle 2013, section 3: E[omega] is a quarter at zero, and the working response is y - 1/2."""
    result = fitted(logistic, SIGN, max_steps=1)
    np.testing.assert_allclose(result.params["beta"], np.linalg.solve(X.T @ X / 4, X.T @ (SIGN - 0.5)), rtol=1e-8)


def test_student_ends_where_a_general_maximiser_ends():
    def loss(v):
        return -stats.t.logpdf((Y - X @ v[:3]) / np.exp(v[3]), np.exp(v[4])).sum() + len(Y) * v[3]

    best = optimize.minimize(loss, np.array([1, 2, -1, 0, 1.0]), method="BFGS", options={"gtol": 1e-8})
    result = fitted(student, Y)
    assert result.log_likelihood == pytest.approx(-best.fun, rel=1e-9)
    np.testing.assert_allclose(result.params["beta"], best.x[:3], atol=1e-4)
    np.testing.assert_allclose(result.params["df"], np.exp(best.x[4]), rtol=1e-3)


@pytest.mark.parametrize(("model", "y"), [(cauchy, Y), (logistic, SIGN), (laplace, Y)])
def test_ends_where_newton_ends(model, y):
    ours, newton = fitted(model, y), fitted(model, y, m_step=None)
    assert ours.log_likelihood == pytest.approx(newton.log_likelihood, abs=2e-3 if model is laplace else 1e-6)
    assert (np.diff(ours.history) >= -1e-9).all()


def test_beside_a_discrete_latent_and_a_prior():
    def model(x, y):
        beta = numpyro.sample("beta", dist.Normal(jnp.zeros((2, 3)), 2.0).to_event(2))
        start = numpyro.param("start", jnp.array([0.4, 0.6]), constraint=constraints.simplex)
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Categorical(start))
            numpyro.sample("y", dist.StudentT(4.0, (x * beta[z]).sum(-1), 0.7), obs=y)

    given = {"beta": jnp.array([[1.0, 2.0, -1.0], [0.0, 0.0, 1.0]]), "start": jnp.array([0.4, 0.6])}
    ours, newton = (
        autoem.EM(model, init=given, m_step=m, max_steps=3000, tol=1e-13, progress=False).run(KEY, X, Y)
        for m in ({"beta": Augmented()}, None)
    )
    assert ours.objective == pytest.approx(newton.objective, abs=1e-6)
    assert (np.diff(ours.history) >= -1e-9).all()


def test_many_entries_go_by_conjugate_gradients():
    x = np.random.default_rng(4).normal(size=(300, 80))
    y = x.sum(1) + np.random.default_rng(5).standard_t(3, size=300)

    def model(x, y):
        beta = numpyro.param("beta", jnp.zeros(80))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.StudentT(3.0, x @ beta, 1.0), obs=y)

    em = autoem.EM(model, init="model", m_step={"beta": Augmented()}, max_steps=1, progress=False)
    weight = 4 / (3 + y**2)
    expected = np.linalg.solve((x * weight[:, None]).T @ x, x.T @ (weight * y))
    np.testing.assert_allclose(em.run(KEY, x, y).params["beta"], expected, rtol=1e-6, atol=1e-8)


WAYS = {
    "a distribution": lambda w: dist.Normal(0.0, 1.0).cdf(w),
    "scipy": lambda w: jax.scipy.stats.norm.cdf(w),
    "ndtr": lambda w: jax.scipy.special.ndtr(w),
    "erf": lambda w: 0.5 * (1 + jax.scipy.special.erf(w / jnp.sqrt(2.0))),
    "erfc": lambda w: 0.5 * jax.scipy.special.erfc(-w / np.sqrt(2.0)),
    "one minus": lambda w: 1 - jax.scipy.special.ndtr(-w),
    "kept off zero": lambda w: jnp.clip(jax.scipy.special.ndtr(w), 1e-7, 1 - 1e-7),
    "of a standard deviation": lambda w: dist.Normal(0.0, 3.0).cdf(3 * w),
}


def binary(probability):
    def model(x, y):
        beta = numpyro.param("beta", jnp.zeros(3))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Bernoulli(probs=probability(x @ beta)), obs=y)

    return model


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_probit_is_known_however_it_is_written(way):
    """Albert and Chib 1993, section 3: the first update is least squares on the expected utilities, by SciPy."""
    expected = np.where(SIGN > 0, stats.truncnorm.mean(0, np.inf), stats.truncnorm.mean(-np.inf, 0))
    result = fitted(binary(way), SIGN, max_steps=1)
    np.testing.assert_allclose(result.params["beta"], least_squares(np.ones(len(X)), expected), rtol=1e-6, atol=1e-7)
    assert "the sign of a latent Normal utility" in str(result.plan)


def test_a_logistic_probability_is_known_and_scaled_ones_are():
    plain = fitted(logistic, SIGN, max_steps=2).params["beta"]
    for way in (jax.nn.sigmoid, lambda w: 1 / (1 + jnp.exp(-w)), lambda w: 1 - jax.nn.sigmoid(-w)):
        np.testing.assert_allclose(fitted(binary(way), SIGN, max_steps=2).params["beta"], plain, rtol=1e-6)
    steep = fitted(binary(lambda w: jax.nn.sigmoid(1.702 * w)), SIGN, max_steps=2)
    np.testing.assert_allclose(steep.params["beta"], plain / 1.702, rtol=1e-6)


@pytest.mark.parametrize(
    "way",
    [
        lambda w: 0.5 + jnp.arctan(w) / jnp.pi,
        lambda w: 1 - jnp.exp(-jnp.exp(w)),
        lambda w: jax.scipy.special.ndtr(w**3),
        lambda w: jax.scipy.special.ndtr(w) ** 2,
        lambda w: jnp.flip(jax.scipy.special.ndtr(w)),
        lambda w: jax.scipy.special.ndtr(w) * jax.nn.sigmoid(w[0]),
        lambda w: 0.1 + 0.8 * jax.scipy.special.ndtr(w),
    ],
    ids=["cauchit", "cloglog", "curved", "squared", "other rows", "two", "lapses"],
)
def test_other_probabilities_are_not_taken_for_it(way):
    model = binary(way)
    with pytest.raises(PlanError, match="an augmentation does not serve it"):
        autoem.EM(model, m_step=Augmented(), progress=False).plan(X, SIGN)
    assert "Augmented" not in str(autoem.EM(model, progress=False).plan(X, SIGN))


def test_a_probit_in_single_precision():
    with jax.enable_x64(False):
        x, y = jnp.asarray(X, "float32"), jnp.asarray(SIGN, "float32")
        em = autoem.EM(binary(WAYS["ndtr"]), init="model", m_step=Augmented(), max_steps=200, progress=False)
        found = em.run(KEY, x, y).params["beta"]
    np.testing.assert_allclose(found, fitted(binary(WAYS["ndtr"]), SIGN).params["beta"], rtol=2e-2)


def test_a_censored_regression_takes_the_value_that_is_expected():
    """Amemiya 1984, section 4: least squares on the values, those not seen at their expectation, by SciPy."""
    over = Y > 2

    def tobit(x, y):
        beta = numpyro.param("beta", jnp.zeros(3))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.RightCensoredDistribution(dist.Normal(x @ beta, 1.5), over), obs=y)

    limit = np.minimum(Y, 2.0)
    expected = np.where(over, stats.truncnorm.mean(limit / 1.5, np.inf, scale=1.5), limit)
    result = fitted(tobit, limit, max_steps=1)
    np.testing.assert_allclose(result.params["beta"], least_squares(np.ones(len(X)), expected), rtol=1e-8)


def test_parameters_that_multiply_each_other_take_turns():
    """A product is affine in each factor and not in both: one least squares of both would overshoot."""

    def model(x, y):
        a, b = numpyro.param("a", jnp.array([1.0, 1.0, -1.0])), numpyro.param("b", jnp.ones(3))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.StudentT(4.0, (x * a) @ b, 0.5), obs=y)

    result = fitted(model, Y, m_step=Augmented())
    assert [b.names for b in result.plan.blocks] == [("a",), ("b",)]
    assert (np.diff(result.history) >= -1e-9).all()
    alone = fitted(fixed_student, Y)
    assert result.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-5)


def fixed_student(x, y):
    beta = numpyro.param("beta", jnp.zeros(3))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.StudentT(4.0, x @ beta, 0.5), obs=y)


def test_a_location_of_a_normal_beside():
    """One coefficient in robust and in Normal rows: SciPy maximises the sum of both."""

    def model(x, y, more):
        beta = numpyro.param("beta", jnp.zeros(3))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.StudentT(4.0, x @ beta, 0.5), obs=y)
            numpyro.sample("more", dist.Normal(2 * (x @ beta), 1.5), obs=more)

    more = np.random.default_rng(7).normal(size=len(Y)) + Y
    em = autoem.EM(model, init="model", m_step=Augmented(), max_steps=2000, tol=1e-14, progress=False)
    result = em.run(KEY, X, Y, more)

    def loss(b):
        return -(stats.t.logpdf(Y, 4.0, X @ b, 0.5) + stats.norm.logpdf(more, 2 * (X @ b), 1.5)).sum()

    best = optimize.minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-8})
    assert result.log_likelihood == pytest.approx(-best.fun, abs=1e-7)
    np.testing.assert_allclose(result.params["beta"], best.x, atol=1e-5)
    with pytest.raises(PlanError, match="quadratic without one"):
        autoem.EM(plain_normal, m_step=Augmented(), progress=False).plan(X, Y)


def plain_normal(x, y):
    beta = numpyro.param("beta", jnp.zeros(3))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def test_a_parameter_that_enters_twice_is_refused():
    def model(x, y):
        beta = numpyro.param("beta", jnp.zeros(3))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.StudentT(jnp.exp(beta[0]), x @ beta, 1.0), obs=y)

    with pytest.raises(PlanError, match="otherwise than through the location"):
        autoem.EM(model, m_step=Augmented(), progress=False).plan(X, Y)

    def other_base(x, y):
        beta = numpyro.param("beta", jnp.zeros(3))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.TruncatedCauchy(x @ beta, 1.0, low=-90.0), obs=y)

    with pytest.raises(PlanError, match="another base than a Normal"):
        autoem.EM(other_base, m_step=Augmented(), progress=False).plan(X, Y)


@pytest.mark.parametrize(
    ("model", "y", "source"),
    [
        (student, Y, "Liu and Rubin 1995"),
        (logistic, SIGN, "Polson, Scott and Windle 2013"),
        (binary(WAYS["erf"]), SIGN, "Albert and Chib 1993"),
    ],
)
def test_it_is_offered_where_it_would_serve(model, y, source):
    plan = autoem.EM(model, progress=False).plan(X, y)
    assert f'm_step={{"beta": Augmented()}} would make it least squares: {source}' in " ".join(str(plan).split())
    offered = next(a for a in plan.alternatives("beta") if "Augmented" in a.strategy)
    assert offered.source == source and source in " ".join(str(plan.alternatives("beta")).split())
    taken = autoem.EM(model, progress=False, **offered.options).plan(X, y)
    assert "least squares with the augmented weights" in str(taken)
    if model is student:
        assert "Augmented" not in str(plan.alternatives("scale"))


def test_the_plan_names_the_latent():
    text = str(autoem.EM(student, m_step={"beta": Augmented()}, progress=False).plan(X, Y))
    assert "a Normal whose precision is Gamma" in text and "least squares with the augmented weights" in text


def test_what_has_no_augmentation_is_refused():
    def curved(x, y):
        beta = numpyro.param("beta", jnp.zeros(3))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.StudentT(4.0, jnp.sin(x @ beta), 1.0), obs=y)

    with pytest.raises(PlanError, match="site 'beta': an augmentation does not serve it: "):
        autoem.EM(curved, m_step={"beta": Augmented()}, progress=False).plan(X, Y)
    with pytest.raises(PlanError, match="site 'scale': an augmentation does not serve it: it is constrained"):
        autoem.EM(student, m_step={"scale": Augmented()}, progress=False).plan(X, Y)

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


def test_the_plan_names_the_latent():
    text = str(autoem.EM(student, m_step={"beta": Augmented()}, progress=False).plan(X, Y))
    assert "a Normal whose precision is Gamma" in text and "least squares with the augmented weights" in text


def test_what_has_no_augmentation_is_refused():
    def curved(x, y):
        beta = numpyro.param("beta", jnp.zeros(3))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.StudentT(4.0, jnp.sin(x @ beta), 1.0), obs=y)

    with pytest.raises(PlanError, match="site 'beta': no augmentation serves it: "):
        autoem.EM(curved, m_step={"beta": Augmented()}, progress=False).plan(X, Y)
    with pytest.raises(PlanError, match="site 'scale': no augmentation serves it: it is constrained"):
        autoem.EM(student, m_step={"scale": Augmented()}, progress=False).plan(X, Y)

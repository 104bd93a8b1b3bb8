"""Closed forms against answers found otherwise: no other value has a higher likelihood, by search or by formula."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem
from tests.maximal import assert_maximal, fitted, positive

D = 3
R = np.array([[1.0, 0.6, 0.2], [0.6, 2.0, -0.3], [0.2, -0.3, 0.5]])
L = np.linalg.cholesky(R)


def rows_of(k: int = 1, n: int = 120, d: int = D) -> np.ndarray:
    rng = np.random.default_rng(3)
    z = rng.integers(k, size=n)
    spread = np.array([0.5, 1.5, 1.0])[z % 3]
    return 4.0 * z[:, None] + spread[:, None] * (rng.normal(size=(n, d)) @ L.T)


EYE = np.eye(D)
ALL = {
    "variance": ("covariance_matrix", (), lambda s: s * jnp.eye(D)),
    "squared": ("covariance_matrix", (), lambda s: s**2 * jnp.eye(D)),
    "diagonal": ("covariance_matrix", (D,), lambda s: jnp.diag(s)),
    "diagonal by eye": ("covariance_matrix", (D,), lambda s: s[:, None] * jnp.eye(D)),
    "proportional": ("covariance_matrix", (), lambda s: s * R),
    "two blocks": ("covariance_matrix", (2,), lambda s: jnp.diag(jnp.stack([s[0], s[1], s[0]]))),
    "partly known": ("covariance_matrix", (), lambda s: jnp.diag(jnp.stack([s, 1.0, s]))),
    "precision": ("precision_matrix", (), lambda s: s * R),
    "precisions": ("precision_matrix", (D,), lambda s: jnp.diag(s)),
    "scale": ("scale_tril", (), lambda s: s * jnp.eye(D)),
    "scales": ("scale_tril", (D,), lambda s: jnp.diag(s)),
    "scaled factor": ("scale_tril", (), lambda s: s * L),
    "inverse scale": ("scale_tril", (), lambda s: L / s),
}


@pytest.mark.parametrize("name", ALL)
def test_shared_structured_covariance(name: str) -> None:
    argument, shape, matrix = ALL[name]

    def model(x):
        loc = numpyro.param("loc", jnp.zeros(D))
        s = positive("s", shape)
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.MultivariateNormal(loc, **{argument: matrix(s)}), obs=x)

    x = rows_of()
    result = fitted(model, x)
    assert result.plan.m_step("s") == "closed form"
    assert result.num_steps <= 3  # exact at once
    assert_maximal(model, result, x)


EACH = {
    "variance": ("covariance_matrix", (2,), lambda s, z, r: s[z][..., None, None] * jnp.eye(D)),
    "one variance": ("covariance_matrix", (), lambda s, z, r: s * jnp.eye(D)),
    "diagonals": ("covariance_matrix", (2, D), lambda s, z, r: s[z][..., None] * jnp.eye(D)),
    "one diagonal": ("covariance_matrix", (D,), lambda s, z, r: jnp.diag(s)),
    "mapped diagonals": ("covariance_matrix", (2, D), lambda s, z, r: jax.vmap(jnp.diag)(s)[z]),
    "proportional": ("covariance_matrix", (2,), lambda s, z, r: s[z][..., None, None] * R),
    "scaled factor": ("scale_tril", (2,), lambda s, z, r: s[z][..., None, None] * L),
    "scaled data": ("scale_tril", (2,), lambda s, z, r: s[z][..., None, None] * r),
    "scales": ("scale_tril", (2, D), lambda s, z, r: s[z][..., None] * jnp.eye(D)),
    "precisions": ("precision_matrix", (2, D), lambda s, z, r: s[z][..., None] * jnp.eye(D)),
    "constant of each": ("precision_matrix", (), lambda s, z, r: s * jnp.stack([R, 2 * EYE])[z]),
}


@pytest.mark.parametrize("name", EACH)
def test_structured_covariance_of_each_component(name: str) -> None:
    argument, shape, matrix = EACH[name]

    def model(x, factor):
        w = numpyro.param("w", jnp.ones(2) / 2, constraint=constraints.simplex)
        loc = numpyro.param("loc", jnp.array([[-1.0], [5.0]]) * jnp.ones(D))
        s = positive("s", shape)
        with numpyro.plate("n", len(x)):
            z = numpyro.sample("z", dist.Categorical(w))
            numpyro.sample("x", dist.MultivariateNormal(loc[z], **{argument: matrix(s, z, factor)}), obs=x)

    x = rows_of(2)
    result = fitted(model, x, L, init="model")
    assert result.plan.m_step("s") == "closed form"
    assert_maximal(model, result, x, L)


def test_structured_covariance_behind_a_logarithm_with_a_prior_and_a_second_site() -> None:
    def model(x, y):
        s = numpyro.sample("s", dist.InverseGamma(3.0, 2.0))
        u = numpyro.param("u", 0.1)
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(D), s * jnp.eye(D)), obs=x)
            numpyro.sample("y", dist.Normal(0.0, jnp.sqrt(s)), obs=y)
            numpyro.sample("v", dist.MultivariateNormal(jnp.zeros(D), scale_tril=jnp.exp(u) * L), obs=x)

    x = rows_of()
    y = x[:, 0] * 2
    result = fitted(model, x, y)
    assert (result.plan.m_step("s"), result.plan.m_step("u")) == ("closed form", "closed form")
    assert_maximal(model, result, x, y)


@pytest.mark.parametrize(
    "matrix",
    [lambda s: s[:, None] * L, lambda s: jnp.diag(s) @ L, lambda s: jnp.where(EYE > 0, s[0], s[1] * jnp.tril(R) / 5)],
    ids=["rows", "product", "off the diagonal"],
)
def test_entries_that_mix_have_no_power_form(matrix: Callable) -> None:
    def model(x):
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(D), scale_tril=matrix(positive("s", (D,)))), obs=x)

    x = rows_of()
    result = fitted(model, x)
    assert result.plan.m_step("s") == "Newton"
    assert_maximal(model, result, x)


def unseen(prior, x):
    loc = numpyro.param("loc", 0.0)
    theta = numpyro.param("theta", 0.7) if prior is None else numpyro.sample("theta", prior)
    numpyro.deterministic("twice", 2 * theta)
    with numpyro.plate("n", len(x)):
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)


MODES = {
    "Dirichlet": (dist.Dirichlet(jnp.array([2.0, 3.0, 5.0])), [1 / 7, 2 / 7, 4 / 7]),
    "Beta": (dist.Beta(3.0, 2.0), 2 / 3),
    "Gamma": (dist.Gamma(3.0, 4.0), 0.5),
    "Exponential": (dist.Exponential(2.0), 0.0),
    "InverseGamma": (dist.InverseGamma(3.0, 2.0), 0.5),
    "Normal": (dist.Normal(1.5, 2.0), 1.5),
    "Normals": (dist.Normal(jnp.array([0.0, 1.5]), 2.0).to_event(1), [0.0, 1.5]),
    "LogNormal": (dist.LogNormal(0.3, 0.5), np.exp(0.3 - 0.25)),
    "StudentT": (dist.StudentT(4.0, 1.5, 2.0), 1.5),
}


@pytest.mark.parametrize("name", MODES)
def test_what_nothing_observed_depends_on_goes_to_the_mode_of_its_prior(name: str) -> None:
    prior, mode = MODES[name]
    x = np.array([0.3, 1.0])
    result = fitted(unseen, prior, x)
    row = next(r for r in result.plan.parameters if r.name == "theta")
    assert row.strategy == ("Newton" if name in ("LogNormal", "StudentT") else "closed form")
    assert "nothing observed depends on it" in row.reason
    np.testing.assert_allclose(result.params["theta"], mode, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("asked", [None, autoem.m_step.Newton(), autoem.m_step.ClosedForm()])
def test_what_nothing_depends_on_stays(asked) -> None:
    x = np.array([0.3, 1.0])
    em = autoem.EM(unseen, m_step=asked, progress=False)
    assert em.plan(None, x).m_step("theta") == "fixed"
    assert float(em.run(jax.random.key(0), None, x).params["theta"]) == 0.7


BOUNDS = {
    "Uniform": lambda b: dist.Uniform(0.0, b),
    "both": lambda b: dist.Uniform(b - 10, b),
    "Uniform scaled": lambda b: dist.Uniform(0.0, b**2),
    "LogUniform": lambda b: dist.LogUniform(0.01, b),
    "Pareto": lambda b: dist.Pareto(b, 2.0),
    "Levy": lambda b: dist.Levy(b, 2.0),
    "low": lambda b: dist.TruncatedNormal(0.0, 1.0, low=b),
    "high": lambda b: dist.TruncatedNormal(0.0, 1.0, high=b + 3),
    "low of both": lambda b: dist.TruncatedNormal(0.0, 1.0, low=b, high=9.0),
    "truncated Cauchy": lambda b: dist.TruncatedCauchy(0.0, 1.0, low=b),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_free_bound_of_the_support_is_refused(name: str) -> None:
    def model(x, known=None):
        b = positive("b") if known is None else known
        numpyro.param("other", 0.0)
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", BOUNDS[name](b), obs=x)

    x = np.array([2.0, 3.0])
    with pytest.raises(autoem.ModelError, match=r"site 'x': the support of .* depends on the parameter 'b'") as error:
        autoem.EM(model, progress=False).plan(x)
    assert "pass the bound as data" in str(error.value)
    known = 7.0 if name in ("Uniform", "both", "Uniform scaled", "LogUniform") else 1.0
    bounds_known = autoem.EM(model, progress=False).plan(x, known)
    assert bounds_known.m_step("other") == "fixed"


def test_a_bound_that_a_parameter_of_a_prior_moves_is_refused() -> None:
    def model(x):
        theta = numpyro.sample("theta", dist.Uniform(0.0, positive("b")))
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.Exponential(theta), obs=x)

    with pytest.raises(autoem.ModelError, match="site 'theta'"):
        autoem.EM(model, progress=False, maximize=("theta",)).plan(np.array([2.0, 3.0]))


@pytest.mark.parametrize("start", [1.0, 3.0])
@pytest.mark.parametrize("family", [dist.Beta, lambda a, b: dist.BetaBinomial(a, b, 9)], ids=["Beta", "BetaBinomial"])
def test_concentrations_that_start_equal(family, start) -> None:
    """JAX's log beta function has wrong second derivatives where its arguments are equal."""

    def model(x):
        a = numpyro.param("a", start, constraint=constraints.positive)
        b = numpyro.param("b", start, constraint=constraints.positive)
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", family(a, b), obs=x)

    x = np.asarray(family(4.0, 2.0).sample(jax.random.key(0), (100,)))
    assert_maximal(model, fitted(model, x), x)


MATRIX_PRIORS = {
    "precision": ("precision_matrix", dist.Wishart(6.0, jnp.eye(D) + 0.2)),
    "covariance": ("covariance_matrix", dist.InverseWishart(6.0, jnp.eye(D) + 0.2)),
    "flat": ("covariance_matrix", dist.ImproperUniform(constraints.positive_definite, (), (D, D))),
}


@pytest.mark.parametrize("name", MATRIX_PRIORS)
def test_a_conjugate_or_flat_prior_of_a_matrix(name: str) -> None:
    argument, prior = MATRIX_PRIORS[name]

    def model(x):
        m = numpyro.sample("m", prior) if name != "flat" else numpyro.sample("m", prior, rng_key=jax.random.key(0))
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(D), **{argument: m}), obs=x)

    x = rows_of(n=20)
    result = fitted(model, x)
    assert result.plan.m_step("m") == "closed form"
    if name == "flat":
        np.testing.assert_allclose(result.params["m"], x.T @ x / len(x), rtol=1e-12)
    else:
        assert_maximal(model, result, x)


def truncated_gamma(x):
    gamma = dist.Gamma(positive("a"), positive("b"))
    with numpyro.plate("n", len(x)):
        numpyro.sample("x", dist.LeftTruncatedGamma(gamma, low=0.5), obs=x)


def test_where_jax_has_no_second_derivative_slopes_are_followed() -> None:
    x = 0.5 + np.random.default_rng(1).gamma(2.0, 1.0, 100)
    result = fitted(truncated_gamma, x)
    assert (result.plan.m_step("a"), result.plan.m_step("b")) == ("gradient", "gradient")
    assert_maximal(truncated_gamma, result, x)
    with pytest.raises(autoem.PlanError, match="no second derivative"):
        autoem.EM(truncated_gamma, m_step=autoem.m_step.Newton(), progress=False).plan(x)


@pytest.mark.parametrize(
    "family",
    [lambda p: dist.NegativeBinomialProbs(20.0, p), lambda p: dist.Beta(60 * p, 70 - 60 * p)],
    ids=["NegativeBinomial", "Beta"],
)
def test_large_counts_and_concentrations_are_not_mistaken_for_an_odd_table(family) -> None:
    """JAX's log beta function errs by 1e-7 there, which NumPyro's densities share or do not."""

    def model(x):
        probs = numpyro.param("probs", jnp.array([0.3, 0.7]), constraint=constraints.unit_interval)
        with numpyro.plate("n", len(x)):
            z = numpyro.sample("z", dist.Categorical(jnp.ones(2) / 2))
            numpyro.sample("x", family(probs[z]), obs=x)

    x = np.asarray(family(jnp.where(jnp.arange(60) < 30, 0.4, 0.8)).sample(jax.random.key(0)))
    assert_maximal(model, fitted(model, x), x)

"""Fits that see their rows through mean and covariance alone take the very path of fits that see the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints

import autoem
from autoem import _em
from autoem.graph.named import Named
from autoem.lowering.moments import AT_ONCE, joint_moments

RNG = np.random.default_rng(8)
KEY = jax.random.key(0)
X = RNG.normal(size=(90, 2)) @ RNG.normal(size=(2, 4)) + RNG.normal(size=(90, 4)) * 0.7 + 3.0
LOADINGS = np.array([[1.0, 0.1], [0.2, -0.8], [0.5, 0.6], [-0.3, 0.4]])


def factors(x):
    loadings = numpyro.param("loadings", jnp.asarray(LOADINGS))
    centre = numpyro.param("centre", jnp.zeros(4))
    scale = numpyro.param("scale", jnp.ones(4), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        f = numpyro.sample("f", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(centre + f @ loadings.T, scale).to_event(1), obs=x)


def two_views(x):
    centre = numpyro.param("centre", jnp.zeros(4))
    noise = numpyro.param("noise", jnp.eye(2), constraint=constraints.positive_definite)
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        f = numpyro.sample("f", dist.Normal(0.0, 1.0))
        numpyro.sample(
            "a",
            dist.MultivariateNormal(centre[:2] + f[:, None] * numpyro.param("a_loads", jnp.ones(2)), noise),
            obs=x[:, :2],
        )
        numpyro.sample(
            "b",
            dist.Normal(centre[2:] + f[:, None] * numpyro.param("b_loads", jnp.ones(2)), scale).to_event(1),
            obs=x[:, 2:],
        )


def balanced_effects(x):
    mean = numpyro.param("mean", 0.0)
    spread = numpyro.param("spread", 1.0, constraint=constraints.positive)
    noise = numpyro.param("noise", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", len(x), dim=-1):
        u = numpyro.sample("u", dist.Normal(mean, spread))
        with numpyro.plate("repeats", x.shape[1], dim=-2):
            numpyro.sample("x", dist.Normal(u, noise), obs=x.T)


def paths(monkeypatch, model, x) -> tuple[autoem.EMResult, autoem.EMResult]:
    def fitted():
        em = autoem.EM(model, init="model", max_steps=15, tol=0.0, progress=False)
        assert "mean and covariance alone" in str(em.plan(x))
        return em.run(KEY, x)

    few = fitted()
    monkeypatch.setattr(_em, "condensed", lambda kernel, bundle: (kernel, bundle))
    return few, fitted()


@pytest.mark.parametrize("model", [factors, two_views, balanced_effects])
def test_the_path_is_that_of_all_rows(model, monkeypatch):
    few, all_rows = paths(monkeypatch, model, X)
    np.testing.assert_allclose(few.history, all_rows.history, rtol=1e-10)
    for name, value in all_rows.params.items():
        np.testing.assert_allclose(few.params[name], value, rtol=1e-7, atol=1e-9, err_msg=name)


def test_columns_that_are_sums_of_others(monkeypatch):
    few, all_rows = paths(monkeypatch, factors, np.column_stack([X[:, :3], X[:, 0] + X[:, 1]]))
    np.testing.assert_allclose(few.history, all_rows.history, rtol=1e-9)


def test_questions_go_to_the_rows_themselves():
    result = autoem.EM(factors, init="model", progress=False).run(KEY, X)
    posterior = result.posterior(X)
    assert posterior.mean["f"].shape == (90, 2)
    covariance = result.params["loadings"] @ result.params["loadings"].T + jnp.diag(result.params["scale"] ** 2)
    own = dist.MultivariateNormal(result.params["centre"], covariance).log_prob(X)
    np.testing.assert_allclose(posterior.log_likelihood, own, rtol=1e-8)
    np.testing.assert_allclose(result.log_likelihood, own.sum(), rtol=1e-10)


def test_restarts_and_acceleration_see_few_rows_too():
    result = autoem.EM(factors, restarts=3, accelerate=autoem.accelerate.Anderson(), progress=False).run(KEY, X)
    plain = autoem.EM(factors, max_steps=3000, tol=1e-13, progress=False).run(KEY, X)
    assert result.log_likelihood == pytest.approx(plain.log_likelihood, rel=1e-6)


@pytest.mark.parametrize("lies", [("rows", "event0"), ("event0", "rows"), ("#0", "rows", "event0")])
@pytest.mark.parametrize("count", [7, 2 * AT_ONCE, 2 * AT_ONCE + 7])
def test_moments_are_those_of_numpy(lies, count):
    """In whatever order the rows lie, and however many blocks they fill."""
    sizes = {"rows": count, "event0": 3, "#0": 2}
    x = RNG.normal(size=[sizes[a] for a in lies]) + 50.0
    other = RNG.normal(size=sizes["rows"]) * 0.1
    mean, covariance = joint_moments([Named(jnp.asarray(x), lies), Named(jnp.asarray(other), ("rows",))], "rows")
    both = np.column_stack([np.moveaxis(x, lies.index("rows"), 0).reshape(sizes["rows"], -1), other])
    np.testing.assert_allclose(mean, both.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(both.T, bias=True), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("offset", [0.0, 1e2])
def test_single_precision_keeps_its_digits_far_from_zero(offset):
    """Few rows are made around the mean, which is large here beside what lies around it."""
    far = np.asarray(X, np.float32) + np.float32(offset)
    with jax.enable_x64(False):
        result = autoem.EM(factors, init="model", max_steps=500, tol=0.0, progress=False).run(KEY, jnp.asarray(far))
    wide = autoem.EM(factors, init="model", max_steps=500, tol=0.0, progress=False).run(KEY, jnp.asarray(far, float))
    np.testing.assert_allclose(result.params["scale"], wide.params["scale"], rtol=5e-3)


@pytest.mark.parametrize("what", ["mask", "weight", "covariate"])
def test_rows_that_differ_are_left_as_they_are(what):
    def model(x):
        loads, scale = numpyro.param("loads", jnp.ones(4)), numpyro.param("scale", 1.0, constraint=constraints.positive)
        t = jnp.linspace(0.0, 1.0, len(x))
        with numpyro.plate("rows", len(x)):
            f = numpyro.sample("f", dist.Normal(0.0, 1.0))
            loc = f[:, None] * loads + (t[:, None] if what == "covariate" else 0.0)
            one = (
                handlers.scale(scale=jnp.where(t > 0.5, 2.0, 1.0))
                if what == "weight"
                else handlers.mask(mask=t > 0.5 if what == "mask" else jnp.array(True))
            )
            with one:
                numpyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    assert "mean and covariance alone" not in str(autoem.EM(model, progress=False).plan(X))

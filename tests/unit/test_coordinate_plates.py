"""Continuous latents whose coordinates are a plate: the same as with the coordinates in an event, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem

RNG = np.random.default_rng(5)
LOADINGS = RNG.normal(size=(4, 2))
X = RNG.normal(size=(30, 2)) @ LOADINGS.T + 0.5 * RNG.normal(size=(30, 4))


def loadings(d):
    return numpyro.param("w", jnp.asarray(LOADINGS + 0.3)), numpyro.param(
        "s", jnp.ones(d), constraint=constraints.positive
    )


def observed(mean, s, x, binary):
    law = dist.Bernoulli(logits=mean) if binary else dist.Normal(mean, s)
    return numpyro.sample("x", law.to_event(1), obs=x)


def in_event(x, binary=False):
    w, s = loadings(x.shape[1])
    with numpyro.plate("n", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        observed(z @ w.T, s, x, binary)


def inner(x, binary=False):
    w, s = loadings(x.shape[1])
    with numpyro.plate("n", len(x), dim=-2):
        with numpyro.plate("k", 2, dim=-1):
            z = numpyro.sample("z", dist.Normal(0, 1))
        with numpyro.plate("d", x.shape[1], dim=-1):
            law = dist.Bernoulli(logits=z @ w.T) if binary else dist.Normal(z @ w.T, s)
            numpyro.sample("x", law, obs=x)


def outer(x, binary=False):
    w, s = loadings(x.shape[1])
    with numpyro.plate("n", len(x)):
        with numpyro.plate("k", 2):
            z = numpyro.sample("z", dist.Normal(0, 1))
        observed(z.T @ w.T, s, x, binary)


def fitted(model, *data, steps=6, **kwargs):
    return autoem.EM(model, init="model", max_steps=steps, progress=False).run(jax.random.key(0), *data, **kwargs)


def same(a, b, *data, turn=lambda v: v):
    assert a.history[-1] == pytest.approx(b.history[-1], rel=1e-10)
    for name, value in a.params.items():
        np.testing.assert_allclose(b.params[name], value, rtol=1e-9, atol=1e-9)
    ours, theirs = a.posterior(*data), b.posterior(*data)
    np.testing.assert_allclose(turn(theirs.mean["z"]), ours.mean["z"], atol=1e-9)
    np.testing.assert_allclose(turn(theirs.sd["z"]), ours.sd["z"], atol=1e-9)
    np.testing.assert_allclose(theirs.covariance["z"], ours.covariance["z"], atol=1e-9)


@pytest.mark.parametrize("model", [inner, outer])
def test_factors_in_a_plate(model):
    same(fitted(in_event, X), fit := fitted(model, X), X, turn=np.transpose if model is outer else lambda v: v)
    posterior = fit.posterior(X)
    np.testing.assert_allclose(posterior.log_likelihood.sum(), posterior.total)
    draws = posterior.sample(jax.random.key(1), 2000)["z"]
    assert draws.shape == (2000, *posterior.mean["z"].shape)
    np.testing.assert_allclose(draws.mean(0), posterior.mean["z"], atol=0.1)


def test_the_checks_hold():
    report = autoem.EM(outer, init="model", progress=False).check(jax.random.key(0), X[:8])
    assert report.ok, str(report)


def test_missing_entries():
    holes = X.copy()
    holes[3, 1] = holes[5, 0] = np.nan

    def run(model):
        em = autoem.EM(model, init="model", max_steps=4, missing="marginalize", progress=False)
        return em.run(jax.random.key(0), holes)

    ours, theirs = run(in_event), run(outer)
    assert ours.history[-1] == pytest.approx(theirs.history[-1], rel=1e-10)
    imputed = theirs.posterior(holes).impute(jax.random.key(0), 3)["x"]
    assert imputed.shape == (3, *X.shape) and np.isfinite(imputed).all()


def test_two_abilities_are_integrated_person_by_person():
    answers = (X > 0) * 1
    event, plate = fitted(in_event, answers, steps=3, binary=True), fitted(outer, answers, steps=3, binary=True)
    assert plate.history[-1] == pytest.approx(event.history[-1], rel=1e-10)
    np.testing.assert_allclose(plate.params["w"], event.params["w"], rtol=1e-9)
    assert "30 cells" in str(plate.plan)


def test_random_slopes_and_an_intercept():
    group, rows = np.repeat(np.arange(8), 5), RNG.normal(size=(40, 2))
    y = (RNG.normal(size=(8, 2))[group] * rows).sum(1) + 0.2 * RNG.normal(size=40)

    def slopes(plate):
        m, s = numpyro.param("m", jnp.zeros(2)), numpyro.param("s", 1.0, constraint=constraints.positive)
        with numpyro.plate("group", 8):
            a = numpyro.sample("a", dist.Normal(0, 1))
            if plate:
                with numpyro.plate("coefficient", 2):
                    b = numpyro.sample("b", dist.Normal(m[:, None], 1))[:, group]
            else:
                b = numpyro.sample("b", dist.Normal(m, 1).to_event(1))[group].T
        with numpyro.plate("rows", 40):
            numpyro.sample("y", dist.Normal(a[group] + (b * rows.T).sum(0), s), obs=y)

    event, plate = fitted(slopes, False), fitted(slopes, True)
    assert plate.history[-1] == pytest.approx(event.history[-1], rel=1e-10)
    np.testing.assert_allclose(plate.params["m"], event.params["m"], rtol=1e-9)
    assert "8 cells of 2 dimensions" in str(plate.plan)


def test_a_mean_for_each_coordinate_nests():
    def model(x, plate=False):
        w, s = loadings(4)
        t = numpyro.param("t", 1.0, constraint=constraints.positive)
        axis, rows = numpyro.plate("k", 2, dim=-1), numpyro.plate("n", len(x), dim=-2)
        if plate:
            with axis:
                m = numpyro.sample("m", dist.Normal(0, t))
            with rows, axis:
                z = numpyro.sample("z", dist.Normal(m, 1))
            with rows, numpyro.plate("d", 4, dim=-1):
                numpyro.sample("x", dist.Normal(z @ w.T, s), obs=x)
        else:
            m = numpyro.sample("m", dist.Normal(0, t).expand([2]).to_event(1))
            with numpyro.plate("n", len(x)):
                z = numpyro.sample("z", dist.Normal(m, 1).to_event(1))
                numpyro.sample("x", dist.Normal(z @ w.T, s).to_event(1), obs=x)

    assert fitted(model, X, plate=True).history[-1] == pytest.approx(fitted(model, X).history[-1], rel=1e-10)


def test_states_of_a_scan():
    def chains(x, plate):
        w, s = loadings(4)
        a = numpyro.param("a", jnp.array([[0.5, 0.2], [-0.1, 0.4]]))

        def in_plate(z, x):
            with numpyro.plate("n", 2):
                with numpyro.plate("k", 2):
                    z = numpyro.sample("z", dist.Normal(a @ z, 1.0))
                with numpyro.plate("d", 4):
                    numpyro.sample("x", dist.Normal(w @ z, s[:, None]), obs=x.T)
            return z, None

        def in_event(z, x):
            with numpyro.plate("n", 2):
                z = numpyro.sample("z", dist.Normal(z @ a.T, 1.0).to_event(1))
                numpyro.sample("x", dist.Normal(z @ w.T, s).to_event(1), obs=x)
            return z, None

        scan(in_plate if plate else in_event, jnp.zeros((2, 2)), x)

    x = X[:24].reshape(12, 2, 4)
    event, plate = fitted(chains, x, plate=False), fitted(chains, x, plate=True)
    assert plate.history[-1] == pytest.approx(event.history[-1], rel=1e-10)
    ours, theirs = event.posterior(x, False), plate.posterior(x, True)
    np.testing.assert_allclose(theirs.mean["z"].swapaxes(1, 2), ours.mean["z"], atol=1e-9)


def test_steps_that_one_row_reads_together_are_no_coordinates():
    def model(x):
        s = numpyro.param("s", 1.0, constraint=constraints.positive)

        def step(z, x):
            z = numpyro.sample("z", dist.Normal(0.5 * z, 1.0))
            numpyro.sample("x", dist.Normal(z, s), obs=x)
            return z, z

        _, path = scan(step, 0.0, x)
        numpyro.sample("y", dist.Normal(path.sum(), s), obs=1.0)

    with pytest.raises(autoem.PlanError, match="several steps of 'z'"):
        autoem.EM(model, e_step=autoem.e_step.Exact(), init="model", progress=False).plan(X[:6, 0])


def test_cost_is_linear_in_rows():
    x = RNG.normal(size=(5000, 4))
    assert np.isfinite(fitted(outer, x, steps=2).history[-1])

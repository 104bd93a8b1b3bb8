"""A second fit of the same structure waits for no compiler; the last step is judged alike wherever it is judged."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem
import autoem._em

X = np.random.default_rng(0).normal(size=(60, 2)) + np.repeat([[0.0, 0.0], [3.0, 1.0]], 30, 0)


@contextlib.contextmanager
def compilations():
    """The names of events by which JAX says that it compiled a program, collected while it is open."""
    found: list[str] = []

    def listen(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def mixture(x):
    weights = numpyro.param("weights", jnp.ones(2) / 2, constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.array([[0.0, 0.0], [1.0, 1.0]]))
    cov = numpyro.param("cov", jnp.stack([jnp.eye(2)] * 2), constraint=constraints.positive_definite)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.MultivariateNormal(loc[z], cov[z]), obs=x)


def chain(x):
    trans = numpyro.param("trans", jnp.array([[0.8, 0.2], [0.2, 0.8]]), constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.array([0.0, 2.0]))

    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(trans[z]))
        numpyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)
        return z, None

    scan(step, 0, x[:, 0])


def groups(x):
    mean = numpyro.param("mean", 0.0)
    between = numpyro.param("between", 1.0, constraint=constraints.positive)
    within = numpyro.param("within", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", 6):
        effect = numpyro.sample("effect", dist.Normal(mean, between))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(effect[np.arange(60) // 10], within), obs=x[:, 0])


@pytest.mark.parametrize("model", [mixture, chain, groups], ids=lambda m: m.__name__)
def test_a_second_fit_compiles_nothing(model):
    em = autoem.EM(model, progress=False)
    first = em.run(jax.random.key(0), X)
    with compilations() as found:
        second = em.run(jax.random.key(1), X + 0.125)
    assert found == []
    assert second.log_likelihood != first.log_likelihood


@pytest.mark.parametrize(
    ("model", "restarts", "accelerate"),
    [(chain, 1, None), (groups, 1, autoem.accelerate.Squarem()), (mixture, 3, autoem.accelerate.Squarem())],
)
def test_a_last_step_of_its_own_changes_nothing(monkeypatch, model, restarts, accelerate):
    def fit(steps):
        em = autoem.EM(model, progress=False, max_steps=steps, restarts=restarts, accelerate=accelerate)
        return em.run(jax.random.key(0), X)

    inside = [fit(steps) for steps in (4, 10_000)]
    monkeypatch.setattr(autoem._em, "APART_FROM", 0)
    apart = [fit(steps) for steps in (4, 10_000)]
    for a, b in zip(inside, apart, strict=True):
        assert (a.status, a.num_steps) == (b.status, b.num_steps)
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-12)
        np.testing.assert_allclose(a.history, b.history, rtol=1e-12)
        for name in a.params:
            np.testing.assert_allclose(a.params[name], b.params[name], rtol=1e-9, atol=1e-12)

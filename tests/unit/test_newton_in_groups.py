"""Newton's method on entries that no datum ties together: the same steps as on all at once, for less."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem
from autoem.m_step.apart import along
from autoem.m_step.newton import NewtonBlock, maximise

KEY = jax.random.key(0)


def answers(people, items, seed=0):
    rng = np.random.default_rng(seed)
    ability, easy = rng.normal(size=(people, 1)), rng.normal(size=items)
    return (rng.uniform(size=(people, items)) < 1 / (1 + np.exp(-ability - easy))) * 1


def two_parameters(y):
    slope = numpyro.param("slope", jnp.ones(y.shape[1]), constraint=constraints.positive)
    easy = numpyro.param("easy", jnp.zeros(y.shape[1]))
    with numpyro.plate("people", len(y)):
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
        logits = slope * ability[:, None] + easy
        numpyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


def long_format(y, person, item, people, items):
    slope = numpyro.param("slope", jnp.ones(items), constraint=constraints.positive)
    easy = numpyro.param("easy", jnp.zeros(items))
    with numpyro.plate("people", people):
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
    with numpyro.plate("answers", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=slope[item] * ability[person] + easy[item]), obs=y)


def ranks(y):
    """Every item's effect is compared with the last: all are tied."""
    easy = numpyro.param("easy", jnp.zeros(y.shape[1]))
    with numpyro.plate("people", len(y)):
        numpyro.sample("y", dist.Categorical(logits=easy), obs=jnp.argmax(y, axis=1))
        numpyro.sample("w", dist.Gamma(jnp.exp(easy.sum()), 1.0), obs=1.0 + y.sum(1))


def blocks_of(em, *args):
    return {b.names: b for b in em._derive(args, {})[0].kernel.blocks}


@pytest.mark.parametrize("form", ["wide", "long"])
def test_items_of_a_test_are_apart_and_end_where_all_at_once_do(form, monkeypatch):
    y = answers(300, 8)
    wide = form == "wide"
    args = (y,) if wide else (y.ravel(), np.repeat(np.arange(300), 8), np.tile(np.arange(8), 300), 300, 8)
    model = two_parameters if wide else long_format
    options = {"init": "model", "max_steps": 4, "tol": 0.0, "progress": False}
    em = autoem.EM(model, **options)
    (block,) = blocks_of(em, *args).values()
    assert block.groups.shape == (8, 2) and "8 groups apart" in str(em.plan(*args))
    apart = em.run(KEY, *args)
    monkeypatch.setattr("autoem.planning.build.in_groups", lambda block, *_: block)
    together = autoem.EM(lambda *a: model(*a), **options)
    (block,) = blocks_of(together, *args).values()
    assert block.groups is None
    found = together.run(KEY, *args)
    np.testing.assert_allclose(apart.history, found.history, rtol=1e-10)
    for name, value in found.params.items():
        np.testing.assert_allclose(apart.params[name], value, rtol=1e-4, atol=1e-5)


def test_hundreds_of_items_are_few_parameters_each():
    y = answers(60, 150)
    em = autoem.EM(two_parameters, init="model", max_steps=2, progress=False)
    (block,) = blocks_of(em, y).values()
    assert isinstance(block, NewtonBlock) and block.groups.shape == (150, 2)
    assert "too many" not in em.plan(y)._repr_html_()


def test_entries_that_data_tie_stay_together():
    (block,) = blocks_of(autoem.EM(ranks, progress=False), answers(40, 14)).values()
    assert isinstance(block, NewtonBlock) and block.groups is None


def test_a_maximum_in_groups_is_that_of_each():
    target = jnp.arange(12.0).reshape(4, 3) / 3
    groups = along({"x": np.zeros((4, 3))}, 0)
    found = maximise(lambda v: -jnp.cosh(v.reshape(4, 3) - target).sum(), jnp.zeros(12), 25, 1e-12, groups)
    np.testing.assert_allclose(found, target.ravel(), atol=1e-7)
    assert along({"x": np.zeros((4, 3)), "y": np.zeros(())}, 0) is None
    assert [g.shape for g in (along({"x": np.zeros((4, 3)), "y": np.zeros(3)}, -1),)] == [(3, 5)]

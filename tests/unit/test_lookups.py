"""Indices past the end of what they index are refused where they count, and only there.

What JAX does with them is known (it clamps), so each case is either a wrong answer that must not come, or an idiom
whose answer does not depend on them: that answer must equal the one without the rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem
from autoem import DataError

GROUP = np.array([0, 1, 2, 3, 0, 1, 2, 3])
Y = np.array([0.1, -0.4, 1.2, 4.0, 5.5, 3.9, 0.3, 4.4])
KEY = jax.random.key(0)


def real(name: str, *shape: int) -> Any:
    return numpyro.param(name, jnp.zeros(shape))


def positive(name: str) -> Any:
    return numpyro.param(name, 1.0, constraint=constraints.positive)


def share(name: str, k: int) -> Any:
    return numpyro.param(name, jnp.ones(k) / k, constraint=constraints.simplex)


def regression(y, group):
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(real("level", 4)[group], positive("noise")), obs=y)


def by_take(y, group):
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(jnp.take(real("level", 4), group), positive("noise")), obs=y)


def table_of_two_indices(y, group):
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(real("level", 2, 4)[group % 2, group], positive("noise")), obs=y)


def row_by_row(y, group):
    level = real("level", 4)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(jax.vmap(lambda i: level[i])(group), positive("noise")), obs=y)


def random_effect(y, group):
    spread = positive("spread")
    with numpyro.plate("groups", 4):
        u = numpyro.sample("u", dist.Normal(0.0, spread))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(real("mean") + u[group], positive("noise")), obs=y)


def nested(y, group):
    with numpyro.plate("schools", 2):
        a = numpyro.sample("a", dist.Normal(0.0, positive("of_schools")))
    with numpyro.plate("classes", 4):
        u = numpyro.sample("u", dist.Normal(a[jnp.array([0, 0, 1, 1])], positive("of_classes")))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(u[group], positive("noise")), obs=y)


def mixture_of_groups(y, group):
    with numpyro.plate("groups", 4):
        z = numpyro.sample("z", dist.Categorical(share("weights", 2)))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(real("level", 2)[z[group]], positive("noise")), obs=y)


def prior_by_group(y, group):
    weights = numpyro.param("weights", jnp.ones((4, 2)) / 2, constraint=constraints.simplex)
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Categorical(weights[group]))
        numpyro.sample("y", dist.Normal(jnp.array([0.0, 4.0])[z], positive("noise")), obs=y)


def driven_chain(y, group):
    moves = numpyro.param(
        "moves", jnp.tile(jnp.array([[0.8, 0.2], [0.3, 0.7]]), (4, 1, 1)), constraint=constraints.simplex
    )

    noise = positive("noise")

    def step(z, seen):
        y, group = seen
        z = numpyro.sample("z", dist.Categorical(moves[group, z]))
        numpyro.sample("y", dist.Normal(jnp.array([0.0, 4.0])[z], noise), obs=y)
        return z, None

    scan(step, 0, (y, group))


def state_space(y, group):
    level, noise = real("level", 4), positive("noise")

    def step(x, seen):
        y, group = seen
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(x + level[group], noise), obs=y)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), (y, group))


MODELS = (
    regression, by_take, table_of_two_indices, row_by_row, random_effect, nested, mixture_of_groups, prior_by_group,
    driven_chain, state_space,
)  # fmt: skip


def changed(row: int, value: int) -> np.ndarray:
    return np.where(np.arange(len(GROUP)) == row, value, GROUP)


def fitted(model, *args, **options) -> autoem.EMResult:
    return autoem.EM(model, progress=False, init="model", max_steps=3, **options).run(KEY, *args)


@pytest.mark.parametrize("model", MODELS)
def test_an_index_past_the_end_is_refused_by_name(model):
    em = autoem.EM(model, progress=False, init="model", max_steps=3)
    with pytest.raises(DataError, match=r"'group' holds 99 \(row 5\).* has 4 entries"):
        em.plan(Y, changed(5, 99))  # at the first reading
    em.plan(Y, GROUP)
    for wrong in (4, -5):
        with pytest.raises(DataError, match=rf"'group' holds {wrong} \(row 5\).* has 4 entries"):
            em.plan(Y, changed(5, wrong))  # and of new data


@pytest.mark.parametrize("model", [regression, random_effect, driven_chain])
def test_indices_from_the_end_mean_what_they_mean_in_python(model):
    em = autoem.EM(model, progress=False, init="model", max_steps=3)
    result = em.run(KEY, Y, GROUP)
    again = em.run(KEY, Y, np.where(GROUP == 3, -1, GROUP))
    assert again.log_likelihood == pytest.approx(result.log_likelihood, rel=1e-12)
    with pytest.raises(DataError, match="'group' holds 99"):
        result.score(Y, changed(5, 99))


def test_labels_that_count_from_one_are_recognised():
    with pytest.raises(DataError, match="pass group - 1"):
        fitted(regression, Y, GROUP + 1)

    def shifted(y, group):
        return regression(y, group - 1)

    assert fitted(shifted, Y, GROUP + 1).log_likelihood == pytest.approx(fitted(regression, Y, GROUP).log_likelihood)
    with pytest.raises(DataError, match=r"an index computed from 'group' is 4 \(row 3\)"):
        fitted(shifted, Y, GROUP + 2)


def masked_rows(y, group, seen):
    spread = positive("spread")
    with numpyro.plate("groups", 4):
        u = numpyro.sample("u", dist.Normal(0.0, spread))
    with numpyro.plate("rows", len(y)), handlers.mask(mask=seen):
        numpyro.sample("y", dist.Normal(real("mean") + u[group], positive("noise")), obs=y)


def weightless_rows(y, group, seen):
    spread = positive("spread")
    with numpyro.plate("groups", 4):
        u = numpyro.sample("u", dist.Normal(0.0, spread))
    with numpyro.plate("rows", len(y)), handlers.scale(scale=jnp.where(seen, 1.0, 0.0)):
        numpyro.sample("y", dist.Normal(real("mean") + u[group], positive("noise")), obs=y)


@pytest.mark.parametrize("model", [masked_rows, weightless_rows])
def test_padding_that_does_not_count_may_hold_anything(model):
    expected = fitted(random_effect, Y, GROUP).log_likelihood
    em = autoem.EM(model, progress=False, init="model", max_steps=3)
    for filler in (-1, 4, 99, -77):
        y, group = np.append(Y, [0.0, 0.0]), np.append(GROUP, [filler, filler])
        result = em.run(KEY, y, group, np.arange(10) < 8)
        assert result.log_likelihood == pytest.approx(expected, rel=1e-10)
        if filler != -1:
            with pytest.raises(DataError, match=rf"'group' holds {filler} \(row 9\)"):
                em.plan(y, group, np.arange(10) != 8)


def absent_by_where(y, group):
    level = jnp.where(group < 4, real("level", 4)[group], 0.0)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(level, positive("noise")), obs=y)


def absent_by_product(y, group):
    level = (group < 4) * real("level", 4)[group]
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(level, positive("noise")), obs=y)


def absent_by_fill(y, group):
    level = real("level", 4).at[group].get(mode="fill", fill_value=0.0)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(level, positive("noise")), obs=y)


def absent_by_append(y, group):
    level = jnp.append(real("level", 4), 0.0)[group]
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(level, positive("noise")), obs=y)


@pytest.mark.parametrize("model", [absent_by_where, absent_by_product, absent_by_fill])
def test_what_the_text_says_of_indices_past_the_end_holds(model):
    group = changed(5, 4)
    assert fitted(model, Y, group).log_likelihood == pytest.approx(fitted(absent_by_append, Y, group).log_likelihood)


def test_clamping_that_is_asked_for_is_not_refused():
    def clipped(y, group):
        with numpyro.plate("rows", len(y)):
            level = real("level", 4).at[group].get(mode="clip")
            numpyro.sample("y", dist.Normal(level, positive("noise")), obs=y)

    expected = fitted(regression, Y, changed(5, 3)).log_likelihood
    assert fitted(clipped, Y, changed(5, 99)).log_likelihood == pytest.approx(expected)


def test_an_index_written_in_the_text_is_checked():
    def model(y):
        with numpyro.plate("rows", len(y)):
            level = real("level", 2)[jnp.array([0, 1, 2, 0, 1, 0, 1, 0])]
            numpyro.sample("y", dist.Normal(level, positive("noise")), obs=y)

    with pytest.raises(DataError, match=r"site 'y': an index computed from constants is 2 \(row 2\)"):
        fitted(model, Y)


def test_a_number_that_picks_an_entry_is_checked():
    def model(y, which):
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(jnp.array([0.0, 1.0, 2.0])[which], positive("noise")), obs=y)

    fitted(model, Y, np.array(2))
    with pytest.raises(DataError, match="'which' holds 3, but the array that it indexes has 3 entries"):
        fitted(model, Y, np.array(3))

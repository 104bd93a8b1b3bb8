"""Compiled programs: shared where they say the same, and only there; grouped without changing what they compute."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.extend import core as jex
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem
from autoem.graph import grouping, programs
from autoem.graph.grouping import grouped
from autoem.graph.programs import jit_once, jit_small
from tests.as_users_run import environment


def run_parts(function, *args):
    """What the parts of a grouped program compute, handed on from one to the next, and the parts."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    parts, values = grouped(closed), jax.tree.leaves(args)
    for part in parts:
        values = jit_once(jex.jaxpr_as_fun(part))(*values)
    return jax.tree.unflatten(jax.tree.structure(shapes), values), parts


def sites(scale, rows):
    """A sum over many like sites, each with its own rows, some in other orders and depths."""
    total, last = 0.0, jnp.zeros(3)
    for i, x in enumerate(rows):
        table = jax.nn.log_softmax(jnp.outer(scale[i % 5], x), axis=0)
        last = jax.nn.logsumexp(table + 0.5 * last[:, None], axis=1) if i % 3 else jnp.sort(table @ x)
        total = total + (last * (i + 1)).sum() + jax.nn.relu(x).sum() + table[i % 3, i % 4]
    return total


@pytest.fixture
def rows():
    return list(np.random.default_rng(0).normal(size=(12, 4)))


def test_grouping_changes_no_value_and_no_derivative(monkeypatch, rows):
    monkeypatch.setattr(grouping, "MANY", 50)
    scale = np.random.default_rng(1).normal(size=(5, 3))
    function = jax.value_and_grad(sites, (0, 1))
    found, parts = run_parts(function, scale, rows)
    before, after = len(jax.make_jaxpr(function)(scale, rows).eqns), sum(len(p.eqns) for p in parts)
    assert after < before / 2
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(function)(scale, rows)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_a_loop_carries_stacks_and_gives_back_what_it_carried(monkeypatch, rows):
    monkeypatch.setattr(grouping, "MANY", 50)

    def function(limit, values, rows):
        def step(carry):
            count, values = carry
            slopes = jax.grad(lambda v: sites(jnp.ones((5, 3)), [a * b for a, b in zip(v, rows, strict=True)]))(values)
            return count + 1, [v - 0.01 * s / (1 + jnp.abs(s)) for v, s in zip(values, slopes, strict=True)]

        return jax.lax.while_loop(lambda c: c[0] < limit, step, (0, values))

    values = [r + 1 for r in rows]
    found, parts = run_parts(function, 3, values, rows)
    assert len(parts) == 3 and [e.primitive.name for e in parts[1].eqns] == ["while"]
    assert len(parts[1].eqns[0].outvars) < 5  # not one for each of the twelve
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(function)(3, values, rows)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_loops_side_by_side_end_each_at_its_own_step(monkeypatch, rows):
    monkeypatch.setattr(grouping, "MANY", 20)

    def count(limit, values):
        step = lambda c: (c[0] + 1, [jnp.sin(v) + jnp.exp(-v) * r.sum() for v, r in zip(c[1], rows, strict=True)])  # noqa: E731
        return jax.lax.while_loop(lambda c: c[0] < limit, step, (0, values))

    limits, values = jnp.array([1, 4, 2]), [jnp.arange(3.0) + i for i in range(len(rows))]
    found, parts = run_parts(jax.vmap(count), limits, values)
    assert len(parts) == 3
    np.testing.assert_array_equal(found[0], limits)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(jax.vmap(count))(limits, values)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_what_is_not_finite_stays_so_and_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(grouping, "MANY", 20)
    xs = [np.array([1.0, v]) for v in (0.0, 2.0, -1.0, np.inf, 3.0, 0.5, 4.0, 9.0, 1.5, 2.5)]
    function = lambda xs: [jnp.log(x) - jnp.sqrt(x) / (x - 2) for x in xs]  # noqa: E731
    found, _ = run_parts(function, xs)
    np.testing.assert_allclose(np.stack(found), np.stack(function(xs)), rtol=1e-12)


def test_programs_that_differ_in_a_constant_alone_are_two():
    x = jnp.arange(3.0)
    for number in (2.0, 3.0):
        table = np.full(3, number)
        assert float(jit_once(lambda x, table=table: (x * table).sum())(x)) == 3 * number


def test_programs_that_differ_in_what_they_leave_unread_are_two():
    """The same operation on other arguments: what is not read is no part of the text that JAX would lower."""
    one, two = jit_once(lambda a, b, c: a - c), jit_once(lambda a, b, c: b - c)
    given = 3.0, 5.0, 1.0
    assert (float(one(*given)), float(two(*given))) == (2.0, 4.0)


def test_a_program_is_shared_whatever_function_it_came_from_but_not_its_options():
    programs.forget()
    x = jnp.arange(7.0)
    made = [make(lambda x: jnp.sin(x).sum() * 0.125) for make in (jit_once, jit_once, jit_small)]
    values = [float(p(x)) for p in made]
    np.testing.assert_allclose(values, 0.125 * np.sin(np.arange(7)).sum())
    assert len(programs._known) == 2


def test_a_program_that_failed_to_compile_says_so_again():
    program = jit_once(lambda x: jax.pure_callback(lambda v: 1 / 0, jax.ShapeDtypeStruct((), float), x))
    for _ in range(2):
        with pytest.raises(Exception, match="division by zero"):
            jax.block_until_ready(program(jnp.ones(())))


def latent_class(answers, apart):
    """Items as sites and parameters of their own, or all in one."""
    items = answers.shape[1]
    weights = numpyro.param("weights", jnp.array([0.6, 0.4]), constraint=constraints.simplex)
    start = jnp.linspace(0.2, 0.7, 2 * items).reshape(items, 2)
    names = [f"yes{j}" for j in range(items)] if apart else ["yes"]
    yes = [numpyro.param(n, start[j] if apart else start, constraint=constraints.unit_interval)
           for j, n in enumerate(names)]  # fmt: skip
    with numpyro.plate("persons", len(answers)):
        kind = numpyro.sample("kind", dist.Categorical(weights))
        if not apart:
            numpyro.sample("answers", dist.Bernoulli(yes[0].T[kind]).to_event(1), obs=answers)
        for j in range(items if apart else 0):
            numpyro.sample(f"answer{j}", dist.Bernoulli(yes[j][kind]), obs=answers[:, j])


def test_sites_in_a_python_loop_fit_as_the_same_in_one_site(monkeypatch):
    """The path of EM is the same, whether equal sites are grouped or were never apart."""
    monkeypatch.setattr(grouping, "MANY", 200)
    rng = np.random.default_rng(2)
    kind = rng.random(150) < 0.5
    answers = (rng.random((150, 12)) < np.where(kind[:, None], 0.8, 0.3)).astype(int)
    fits = [autoem.EM(latent_class, init="model", max_steps=25, tol=0.0, progress=False).run(
                jax.random.key(0), answers, apart) for apart in (True, False)]  # fmt: skip
    np.testing.assert_allclose(fits[0].history, fits[1].history, rtol=1e-10)
    stacked = np.stack([fits[0].params[f"yes{j}"] for j in range(12)])
    np.testing.assert_allclose(stacked, fits[1].params["yes"], rtol=1e-7)


def hidden_markov(y):
    jump = numpyro.param("jump", jnp.array([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
    level = numpyro.param("level", jnp.array([-1.0, 1.0]))

    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(jump[z]))
        numpyro.sample("y", dist.Normal(level[z], 1.0), obs=y)
        return z, None

    scan(step, numpyro.sample("z0", dist.Categorical(jnp.array([0.5, 0.5]))), y)


def test_another_em_of_the_same_model_compiles_nothing_and_its_loop_was_compiled_ahead():
    rng = np.random.default_rng(3)
    y = np.repeat([-1.0, 1.0, -1.0, 1.0], 10) + rng.normal(size=40)
    fit = lambda em: em.run(jax.random.key(0), y)  # noqa: E731
    first = autoem.EM(hidden_markov, progress=False)
    result, known = fit(first), len(programs._known)
    assert [len(loop.advance._compiled) for loop in first._loops.values()] == [1]
    again = fit(autoem.EM(hidden_markov, progress=False))
    assert len(programs._known) == known
    np.testing.assert_array_equal(result.history, again.history)
    errors = result.standard_errors()  # of tables made along time, twice differentiated
    assert np.isfinite(np.asarray(errors["level"])).all()
    assert "<svg" in autoem.EM(hidden_markov, progress=False).plan(y)._repr_html_()


SQUARES = """
import jax, jax.numpy as jnp
x = jnp.stack([jnp.arange(32_769.0), jnp.zeros(32_769), jnp.zeros(32_769)], 1)
squares = jax.jit(lambda x: jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(x))(x)
assert float(squares[-1]) == 32_768.0**2, squares[-1]
"""


def test_the_compiler_sums_products_of_rows_rightly():
    """JAX 0.10.2 does not on CPUs, compiled as users do, and is excluded by what this package requires."""
    done = subprocess.run([sys.executable, "-c", SQUARES], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

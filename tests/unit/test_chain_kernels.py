"""The forms that a chain's numbers take for speed give what the plain forms give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoem.e_step.elimination import chains
from autoem.e_step.elimination.chain_tables import TIME, ChainTables, Frame, fits, small_product
from autoem.e_step.elimination.reductions import log_sum_exp
from autoem.graph.named import AT_ONCE, Named, contract, contract_sum, looked_up

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("k", [6, 7, 8, 11, 12])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_product_by_rows(k: int, dtype: type) -> None:
    message, table = RNG.random((3, k)).astype(dtype), RNG.random((k, k)).astype(dtype)
    scale = np.asarray([0.5, 2.0, 1.0], dtype)
    expected = message * scale[:, None] @ table
    one = [small_product(m, s, jnp.asarray(table)) for m, s in zip(message, scale, strict=True)]
    several = jax.vmap(small_product, (0, 0, None))(message, scale, jnp.asarray(table))
    np.testing.assert_allclose(one, expected, rtol=1e-6)
    np.testing.assert_allclose(several, expected, rtol=1e-6)


def chain_of(k: int, lanes: int, flow: str, zeros: bool) -> tuple[tuple[np.ndarray, ...], object]:
    """Tables of a chain, and the chain that they make; `flow` is the order of the axes of the table of neighbours."""
    steps, kept = 30, ("n",) if lanes else ()
    pairs = np.log(RNG.dirichlet(np.ones(k), k))
    if zeros:
        pairs = np.where(np.triu(np.ones((k, k))) > 0, pairs, -np.inf)
    pairs = pairs if flow == "pc" else pairs.T
    head = np.log(RNG.dirichlet(np.ones(k)))
    single = RNG.normal(size=(steps, k, *([lanes] if lanes else []))) * 3

    def make(head, single, pairs) -> ChainTables:
        frame = Frame(kept, ("p",), ("c",))
        tables = (Named(pairs, tuple(flow)),)
        return ChainTables(frame, Named(head, ("p",)), Named(single, (TIME, "c", *kept)), tables, steps)

    return (head, single, pairs), make


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("flow", ["pc", "cp"])
@pytest.mark.parametrize(("k", "lanes"), [(3, 0), (8, 0), (9, 0), (8, 5)])
def test_marginals_are_those_in_logarithms(k: int, lanes: int, flow: str, zeros: bool) -> None:
    tables, make = chain_of(k, lanes, flow, zeros)
    scaled = jax.value_and_grad(lambda *t: chains.total(make(*t)).array.sum(), (0, 1))(*tables)
    exact = jax.value_and_grad(lambda *t: chains.log_sum(make(*t), log_sum_exp).array.sum(), (0, 1))(*tables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), scaled, exact)
    counts = jax.grad(lambda p: chains.total(make(*tables[:2], p)).array.sum())(tables[2])
    np.testing.assert_allclose(counts.sum(), 30 * max(lanes, 1))
    assert not (np.asarray(counts)[np.isinf(tables[2])]).any()


def test_several_chains_at_once() -> None:
    (head, single, pairs), make = chain_of(8, 0, "pc", zeros=False)
    assert fits(jnp.asarray(pairs))
    many = np.stack([pairs, pairs[::-1]])
    both = jax.vmap(jax.grad(lambda p: chains.total(make(head, single, p)).array))(many)
    each = [jax.grad(lambda p: chains.total(make(head, single, p)).array)(p) for p in many]
    np.testing.assert_allclose(both, each, rtol=1e-9)


@pytest.mark.parametrize("shape", [(2 * AT_ONCE + 7,), (50, 4)])
def test_looking_up_is_the_product_with_one_hot(shape: tuple[int, ...]) -> None:
    eta, index = RNG.normal(size=(3, 5)), RNG.integers(0, 5, shape).astype(np.int8)
    axes, weight = ("t", "n")[: len(shape)], RNG.random((*shape, 3))

    def read(eta):
        return looked_up(Named(eta, ("z", "v")), "v", Named(jnp.asarray(index), axes))

    assert read(eta).axes == (*axes, "z")
    np.testing.assert_array_equal(read(eta).array, eta.T[index])
    slope = jax.grad(lambda e: (read(e).array * weight).sum())(eta)
    expected = weight.reshape(-1, 3).T @ np.eye(5)[index.ravel()]
    np.testing.assert_allclose(slope, expected, rtol=1e-10)


def test_a_product_asked_for_with_its_columns_first() -> None:
    eta, features = RNG.normal(size=(3, 4)), RNG.normal(size=(4, 20))
    weight = RNG.random((20, 3))

    def table(eta, contracted):
        return contracted(("t", "z"), (Named(eta, ("z", "f")), Named(features, ("f", "t")))).to(("t", "z"))

    found, known = (
        jax.value_and_grad(lambda e, c=c: (table(e, c) * weight).sum())(eta)
        for c in (contract_sum, lambda keep, pair: contract(keep, *pair))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, known)

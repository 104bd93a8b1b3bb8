"""Some rows of a data flow: those of the whole, whatever it is made of; or the operation that mixes them, by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoem.graph.jaxpr import trace_graph
from autoem.graph.rows import ROWS, Whole, rows_of, shared

N, M = 12, 5
RNG = np.random.default_rng(0)
A, B, V, W = (jnp.asarray(RNG.uniform(0.1, 1, size=s)) for s in ((N, M), (M, N, 3), (M,), (N,)))
INDEX = jnp.asarray(RNG.integers(M, size=(N, 3)))
TAKEN = jnp.array([7, 2, 11])
KEYS = {("a", 0): A, ("b", 0): B, ("v", 0): V, ("w", 0): W, ("i", 0): INDEX}

FLOWS = {  # along which axis the rows of the output lie, and how it is computed
    "elementwise": (0, lambda a, b, v, w, i: jnp.exp(w) * 2 + jnp.sqrt(w) / w - w**2),
    "choice": (0, lambda a, b, v, w, i: jnp.where(w > 0.5, w, v[0])),
    "broadcast": (0, lambda a, b, v, w, i: a * v + w[:, None]),
    "matrix times vector": (0, lambda a, b, v, w, i: a @ v),
    "vector times matrix": (0, lambda a, b, v, w, i: v @ a.T),
    "outer": (1, lambda a, b, v, w, i: jnp.outer(v, w)),
    "batched product": (0, lambda a, b, v, w, i: jnp.einsum("ij,jik->ik", a, b)),
    "sum": (0, lambda a, b, v, w, i: b.sum((0, 2))),
    "maximum along the others": (1, lambda a, b, v, w, i: b.max(2)),
    "running sum along the others": (0, lambda a, b, v, w, i: jnp.cumsum(a, 1)),
    "transpose": (2, lambda a, b, v, w, i: b.transpose(2, 0, 1)),
    "reshape": (0, lambda a, b, v, w, i: b.transpose(1, 0, 2).reshape(N, -1)),
    "new axes": (1, lambda a, b, v, w, i: w[None, :, None].squeeze(2)),
    "gather by rows": (0, lambda a, b, v, w, i: v[i]),
    "gather of columns": (0, lambda a, b, v, w, i: a[:, jnp.array([3, 1])]),
    "gather of both": (0, lambda a, b, v, w, i: jnp.take_along_axis(a, i, 1)),
    "slice of the others": (0, lambda a, b, v, w, i: a[:, 1:3]),
    "joined along the others": (0, lambda a, b, v, w, i: jnp.concatenate([a, a[:, :2]], 1)),
    "stacked": (1, lambda a, b, v, w, i: jnp.stack([w, w**2])),
    "numbers of the rows": (0, lambda a, b, v, w, i: jnp.arange(N) + w),
    "other numbers": (0, lambda a, b, v, w, i: a * jnp.arange(M)),
    "map": (0, lambda a, b, v, w, i: jax.lax.map(lambda r: (r[0] * r[1]) @ v, (a, w))),
    "what mixes rows beside": (0, lambda a, b, v, w, i: a @ v / jnp.sort(w).sum()),
}


def traced(flow):
    return trace_graph(lambda x: {("out", 0): flow(*(x[k] for k in KEYS))}, KEYS)


@pytest.mark.parametrize("name", FLOWS)
def test_rows_are_those_of_the_whole(name):
    axis, flow = FLOWS[name]
    graph = traced(flow)
    cut = rows_of(graph, {("out", 0): axis}, len(TAKEN))
    found = cut.evaluate([("out", 0)], {**KEYS, ROWS: TAKEN})[0]
    expected = np.take(np.asarray(graph.evaluate([("out", 0)], KEYS)[0]), TAKEN, axis)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("flow", "operation"),
    [
        (lambda a, b, v, w, i: jnp.sort(w), "sort"),
        (lambda a, b, v, w, i: jnp.cumsum(w), "cumsum"),
        (lambda a, b, v, w, i: jnp.roll(w, 1), "concatenate"),
        (lambda a, b, v, w, i: a.reshape(-1)[:N], "slice"),
        (lambda a, b, v, w, i: jax.lax.scan(lambda c, x: (c + x, c), 0.0, w)[1], "scan"),
        (lambda a, b, v, w, i: jnp.zeros(N).at[i[:, 0]].add(w), "scatter-add"),
        (lambda a, b, v, w, i: jnp.fft.fft(w).real, "fft"),
    ],
)
def test_what_mixes_rows_is_named(flow, operation):
    with pytest.raises(Whole, match=operation):
        rows_of(traced(flow), {("out", 0): 0}, len(TAKEN))


def test_what_all_rows_share_is_computed_once():
    graph = traced(lambda a, b, v, w, i: (a / a.sum(0)) @ v)
    cut = rows_of(graph, {("out", 0): 0}, len(TAKEN))
    assert not shared(cut, [("out", 0)])  # nothing here is called data
    keys = {("data", 0): A, ("param", "v"): V}
    graph = trace_graph(lambda x: {("out", 0): (x["data", 0] / x["data", 0].sum(0)) @ x["param", "v"]}, keys)
    cut = rows_of(graph, {("out", 0): 0}, len(TAKEN))
    (found,) = [v for v in shared(cut, [("out", 0)]) if v.shape == (M,) or v.shape == (1, M)][:1]
    np.testing.assert_allclose(np.ravel(cut.evaluate_atoms([found], keys)[0]), A.sum(0))

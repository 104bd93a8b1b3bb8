"""Which cell of a latent does each cell of a factor read? Element provenance, followed through the model's data flow.

In: a graph at full shape, one of its latents, and the data. Out: for an atom, an integer array of its shape: the flat
number of the one latent cell that the element depends on, `NONE`, or `SEVERAL`. Sound for every primitive: one that has
no rule is taken to mix all that it reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from autoem.graph.jaxpr import Atom, Constant, Equation, Graph, Variable, graph_of

NONE, SEVERAL = -1, -2

STRUCTURAL = {"reshape", "broadcast_in_dim", "squeeze", "transpose", "slice", "rev", "expand_dims", "copy", "copy_p"}
MATRIX = {"cholesky", "triangular_solve", "lu", "eigh", "qr", "householder_product"}
REDUCING = ("reduce_", "argmax", "argmin", "cum")


def merge(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Provenance of a value made of two."""
    return np.where((a == b) | (b == NONE), a, np.where(a == NONE, b, SEVERAL))


def merge_axes(ids: np.ndarray, axes: tuple[int, ...], keepdims: bool = False) -> np.ndarray:
    """Provenance of a value made of everything along `axes`."""
    known = np.where(ids == NONE, np.iinfo(np.int64).max, ids)
    low, high = known.min(axes, keepdims=keepdims), ids.max(axes, keepdims=keepdims)
    some = ids.min(axes, keepdims=keepdims) == SEVERAL
    out = np.where(high == NONE, NONE, np.where(low == high, high, SEVERAL))
    return np.where(some, SEVERAL, out)


def cells_read(
    graph: Graph, atom: Atom, latent: tuple, shape: tuple[int, ...], values: Mapping, along: int | None = None
) -> np.ndarray:
    """Provenance of `atom` with respect to the input `latent`, whose batch has `shape`; `values` are the data.

    Cells are told apart by their number `along` one axis, where that is given.
    """
    source = graph.inputs[latent]
    start = np.arange(int(np.prod(shape, dtype=int))).reshape(shape) if along is None else np.indices(shape)[along]
    start = np.broadcast_to(start.reshape(shape + (1,) * (len(source.shape) - len(shape))), source.shape)
    ids: dict[Variable, np.ndarray] = {source: start}
    walk(graph, graph.slice([atom]), ids, values)
    if isinstance(atom, Constant) or atom not in ids:
        return np.full(np.shape(atom.value) if isinstance(atom, Constant) else atom.shape, NONE)
    return ids[atom]


def walk(graph: Graph, equations, ids: dict[Variable, np.ndarray], values: Mapping) -> None:
    """Give every output that depends on the latent its provenance."""
    for eqn in equations:
        if any(isinstance(a, Variable) and a in ids for a in eqn.inputs):
            inputs = [ids.get(a) if isinstance(a, Variable) else None for a in eqn.inputs]
            for out, got in zip(eqn.outputs, follow(graph, eqn, inputs, values), strict=True):
                ids[out] = np.broadcast_to(got, out.shape)


def follow(graph: Graph, eqn: Equation, inputs: list, values: Mapping) -> list[np.ndarray]:
    """Provenance of the outputs of one equation."""
    name = eqn.primitive.name
    if name in STRUCTURAL:
        return [np.asarray(eqn.apply([jnp.asarray(inputs[0])])[0])]
    if name in ("concatenate", "stack"):
        parts = [jnp.asarray(_or_none(i, a)) for i, a in zip(inputs, eqn.inputs, strict=True)]
        return [np.asarray(eqn.apply(parts)[0])]
    if name in ("split", "unstack", "tile"):
        return [np.asarray(o) for o in eqn.apply([jnp.asarray(inputs[0])])]
    if name in ("gather", "dynamic_slice"):
        return [_gather(graph, eqn, inputs, values)]
    if name.startswith(REDUCING) and "axes" in eqn.params:
        return [merge_axes(inputs[0], tuple(eqn.params["axes"]))]
    if name == "dot_general":
        return [_dot(eqn, inputs)]
    if name in MATRIX:
        return _matrix(eqn, inputs)
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return _call(graph, eqn, inputs, values)
    if all(
        broadcasts(np.shape(a.value if isinstance(a, Constant) else a.aval), eqn.outputs[0].shape) for a in eqn.inputs
    ):
        return [_elementwise(eqn, inputs) for _ in eqn.outputs]
    known = [merge_axes(i, tuple(range(i.ndim))) if i.ndim else i for i in inputs if i is not None]
    return [np.full(o.shape, _fold(known)) for o in eqn.outputs]


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an operand of `shape` enters a result of shape `to` element by element."""
    return not shape or (len(shape) == len(to) and all(s in (1, t) for s, t in zip(shape, to, strict=True)))


def _or_none(ids: np.ndarray | None, atom: Atom) -> np.ndarray:
    shape = np.shape(atom.value) if isinstance(atom, Constant) else atom.shape
    return np.full(shape, NONE) if ids is None else ids


def _fold(parts: list[np.ndarray]) -> np.ndarray:
    out = parts[0]
    for part in parts[1:]:
        out = merge(out, part)
    return out


def _elementwise(eqn: Equation, inputs: list) -> np.ndarray:
    # an integer power, a comparison, a sum: element by element;
    # anything of the same shape that mixes rows (sort) is not
    shape = eqn.outputs[0].shape
    if eqn.primitive.name in ("sort", "fft", "scan", "while", "cond", "conv_general_dilated", "custom_root"):
        return np.full(shape, SEVERAL)
    if eqn.primitive.name.startswith("cum"):
        return merge_axes(inputs[0], (eqn.params["axis"],), keepdims=True)
    return _fold([np.broadcast_to(i, shape) for i in inputs if i is not None])


def _gather(graph: Graph, eqn: Equation, inputs: list, values: Mapping) -> np.ndarray:
    operand, index = inputs[0], inputs[1:]
    out = eqn.outputs[0]
    result = np.full(out.shape, NONE)
    if operand is not None:
        if any(i is not None for i in index):
            return np.full(out.shape, merge_axes(operand, tuple(range(operand.ndim))))
        if not graph.needs_of(eqn.inputs[1:]) <= set(values):  # an index that is not data may point anywhere
            searched = (
                eqn.params["dimension_numbers"].start_index_map
                if eqn.primitive.name == "gather"
                else range(operand.ndim)
            )
            operand = np.broadcast_to(merge_axes(operand, tuple(searched), keepdims=True), operand.shape)
            at = [jnp.zeros(np.shape(a.value) if isinstance(a, Constant) else a.shape, int) for a in eqn.inputs[1:]]
        else:
            at = graph.evaluate_atoms(list(eqn.inputs[1:]), values)
        integral = {**eqn.params, "fill_value": NONE} if "fill_value" in eqn.params else eqn.params
        picked = np.asarray(dataclasses.replace(eqn, params=integral).apply([jnp.asarray(operand), *at])[0])
        result = np.where(picked < 0, np.where(picked == SEVERAL, SEVERAL, NONE), picked)
    if index[0] is not None and eqn.primitive.name == "gather":
        by_row = merge_axes(index[0], (index[0].ndim - 1,))
        offset = eqn.params["dimension_numbers"].offset_dims
        shape = [1 if d in offset else s for d, s in enumerate(out.shape)]
        result = merge(result, np.broadcast_to(by_row.reshape(shape), out.shape))
    elif any(i is not None for i in index):
        result = np.full(out.shape, _fold([i for i in index if i is not None]))
    return result


def _dot(eqn: Equation, inputs: list) -> np.ndarray:
    (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    shape = eqn.outputs[0].shape
    free = [np.ndim(_or_none(i, a)) for i, a in zip(inputs, eqn.inputs, strict=True)]
    free_l = [d for d in range(free[0]) if d not in (*contract_l, *batch_l)]
    free_r = [d for d in range(free[1]) if d not in (*contract_r, *batch_r)]
    parts = []
    for ids, contract, batch, own, before, after in (
        (inputs[0], contract_l, batch_l, free_l, 0, len(free_r)),
        (inputs[1], contract_r, batch_r, free_r, len(free_l), 0),
    ):
        if ids is None:
            continue
        kept = merge_axes(ids, tuple(contract), keepdims=True).transpose((*batch, *own, *contract))
        sizes = kept.shape[: len(batch) + len(own)]
        spread = sizes[: len(batch)] + (1,) * before + sizes[len(batch) :] + (1,) * after
        parts.append(np.broadcast_to(kept.reshape(spread), shape))
    return _fold(parts)


def _matrix(eqn: Equation, inputs: list) -> list[np.ndarray]:
    known = [merge_axes(i, (i.ndim - 2, i.ndim - 1)) for i in inputs if i is not None]
    batch = _fold(known)
    return [
        np.broadcast_to(batch.reshape(batch.shape + (1,) * (len(o.shape) - batch.ndim)), o.shape) for o in eqn.outputs
    ]


def _call(graph: Graph, eqn: Equation, inputs: list, values: Mapping[Any, Any]) -> list[np.ndarray]:
    inner = graph_of(eqn.params["call_jaxpr"])
    ids = {v: i for v, i in zip(inner.inputs.values(), inputs, strict=True) if i is not None}
    known = {}
    for key, atom, i in zip(inner.inputs, eqn.inputs, inputs, strict=True):
        if i is None and graph.needs_of([atom]) <= set(values):
            known[key] = graph.evaluate_atoms([atom], values)[0]
    walk(inner, inner.equations, ids, known)
    return [_or_none(ids.get(o) if isinstance(o, Variable) else None, o) for o in inner.outputs.values()]

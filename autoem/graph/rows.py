"""Some rows of a value of the data flow, at the price of these rows.

In: a graph, some of its outputs, and along which axis the rows of each lie. Out: a graph with one input more, the
numbers of the rows, whose outputs have these alone. From an output backwards each operation tells which axis of its
inputs the rows are, or that an input is the same for all rows; data are cut where they come in. `Whole`, where an
operation mixes rows, or none is known to keep them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.graph.jaxpr import Atom, Constant, Equation, Graph, Key, Variable, trace_graph
from autoem.graph.rules import Rules

ROWS: Key = ("rows", 0)
ELEMENTWISE = {
    "add", "add_any", "sub", "mul", "div", "neg", "max", "min", "pow", "integer_pow", "square", "sqrt", "rsqrt", "exp",
    "exp2", "expm1", "log", "log1p", "abs", "sign", "floor", "ceil", "round", "logistic", "tanh", "sin", "cos", "erf",
    "erfc", "real", "imag", "lgamma", "digamma", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "xor", "rem",
    "select_n", "clamp", "is_finite", "convert_element_type", "reduce_precision", "copy", "copy_p", "stop_gradient",
}  # fmt: skip

Cut = tuple[tuple[int | None, ...], Mapping[str, Any]]  # the axis of rows in each input, and the parameters' changes
Rule = Callable[[Equation, int, int], Cut]


class Whole(Exception):
    """No rows can be taken apart; the text names the operation."""


def rows_of(graph: Graph, axes: Mapping[Key, int | None], count: int) -> Graph:
    """The graph whose outputs `axes` have `count` rows along these axes, those whose numbers its input `ROWS` holds.

    An output whose axis is None is the same for all rows.

    Raises:
        Whole: an operation on the way does not keep rows apart.
    """
    shapes: dict[Key, Any] = {k: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for k, v in graph.inputs.items()}
    shapes[ROWS] = jax.ShapeDtypeStruct((count,), jnp.result_type(int))

    def cut(inputs: dict) -> dict:
        taker = Taker(graph, {graph.inputs[k]: x for k, x in inputs.items() if k != ROWS}, inputs[ROWS])
        return {key: taker.value(graph.outputs[key], axis) for key, axis in axes.items()}

    return trace_graph(cut, shapes)


def shared(graph: Graph, keys: Sequence[Key]) -> list[Variable]:
    """Values that depend on no rows and on data alone, and that others are computed from: once would do for all."""
    fixed = {"data", "key"}
    out: dict[Variable, None] = {}
    for equation in graph.slice([graph.outputs[k] for k in keys]):
        if graph.kinds[equation.outputs[0]] <= fixed:
            continue
        read = [a for a in equation.inputs if isinstance(a, Variable) and a in graph.makers]
        out.update(dict.fromkeys(a for a in read if graph.kinds[a] and graph.kinds[a] <= fixed))
    return list(out)


@dataclasses.dataclass(eq=False)
class Taker:
    """Computes values of a graph, whole or some rows of them."""

    graph: Graph
    inputs: Mapping[Variable, Array]
    rows: Array
    known: dict[Any, Array] = dataclasses.field(default_factory=dict)

    def value(self, atom: Atom, axis: int | None) -> Array:
        """A value; of its rows along `axis` those that were asked for."""
        if axis is None:
            return self.whole(atom)
        if isinstance(atom, Constant) or atom not in self.graph.makers:
            return jnp.take(jnp.asarray(self.whole(atom)), self.rows, axis, mode="clip")
        if (atom, axis) not in self.known:
            equation = self.graph.equations[self.graph.makers[atom]]
            found = self.taken(equation, atom, axis)
            self.known.update({(o, axis): x for o, x in zip(equation.outputs, found, strict=True)})
        return self.known[atom, axis]

    def whole(self, atom: Atom) -> Array:
        if isinstance(atom, Constant):
            return atom.value
        if atom in self.inputs:
            return self.inputs[atom]
        if (atom, None) not in self.known:
            equation = self.graph.equations[self.graph.makers[atom]]
            found = equation.apply([self.whole(a) for a in equation.inputs])
            self.known.update({(o, None): x for o, x in zip(equation.outputs, found, strict=True)})
        return self.known[atom, None]

    def taken(self, equation: Equation, atom: Variable, axis: int) -> list[Array]:
        """The outputs of an equation at these rows."""
        name = equation.primitive.name
        if name == "iota":
            shape = [len(self.rows) if i == axis else s for i, s in enumerate(atom.shape)]
            own = equation.params["dimension"] == axis
            numbers = self.rows if own else jnp.arange(shape[equation.params["dimension"]])
            along = axis if own else equation.params["dimension"]
            aligned = numbers.reshape([-1 if i == along else 1 for i in range(len(shape))])
            return [jnp.broadcast_to(aligned, shape).astype(atom.aval.dtype)]
        rule = RULES.get(name, elementwise if name in ELEMENTWISE else None)
        if rule is None:
            raise Whole(f"it passes through `{name}`, of which no row can be had without the others")
        axes, changes = rule(equation, axis, len(self.rows))
        values = [self.value(a, i) for a, i in zip(equation.inputs, axes, strict=True)]
        return dataclasses.replace(equation, params={**equation.params, **changes}).apply(values)


RULES: Rules[Rule] = Rules()


def shape_of(atom: Atom) -> tuple[int, ...]:
    return np.shape(atom.value) if isinstance(atom, Constant) else atom.shape


def mixing(equation: Equation) -> Whole:
    return Whole(f"it passes through `{equation.primitive.name}`, which mixes its rows")


def resized(shape: Sequence[int], axis: int, count: int) -> tuple[int, ...]:
    return tuple(count if i == axis else s for i, s in enumerate(shape))


def elementwise(equation: Equation, axis: int, count: int) -> Cut:
    """An input that is one along the axis is the same for all rows."""
    del count
    size = equation.outputs[0].shape[axis]
    shapes = [shape_of(a) for a in equation.inputs]
    return tuple(axis if len(s) > axis and s[axis] == size else None for s in shapes), {}


@RULES.of("broadcast_in_dim")
def _broadcast(equation: Equation, axis: int, count: int) -> Cut:
    dims, shape = equation.params["broadcast_dimensions"], equation.params["shape"]
    read = shape_of(equation.inputs[0])
    own = dims.index(axis) if axis in dims and read[dims.index(axis)] == shape[axis] else None
    return (own, *(None for _ in equation.inputs[1:])), {"shape": resized(shape, axis, count)}


@RULES.of("reshape")
def _reshape(equation: Equation, axis: int, count: int) -> Cut:
    before, after = shape_of(equation.inputs[0]), equation.params["new_sizes"]
    if equation.params.get("dimensions") is not None:
        raise mixing(equation)
    for i, size in enumerate(before):
        if size == after[axis] and np.prod(before[:i], dtype=int) == np.prod(after[:axis], dtype=int):
            return (i,), {"new_sizes": resized(after, axis, count)}
    raise mixing(equation)


@RULES.of("squeeze")
def _squeeze(equation: Equation, axis: int, count: int) -> Cut:
    rank, gone = len(shape_of(equation.inputs[0])), {int(d) for d in equation.params["dimensions"]}
    return ([d for d in range(rank) if d not in gone][axis],), {}


@RULES.of("transpose")
def _transpose(equation: Equation, axis: int, count: int) -> Cut:
    return (int(equation.params["permutation"][axis]),), {}


@RULES.of("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
def _reduce(equation: Equation, axis: int, count: int) -> Cut:
    rank, gone = len(shape_of(equation.inputs[0])), set(equation.params["axes"])
    return ([d for d in range(rank) if d not in gone][axis],), {}


@RULES.of("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _along(equation: Equation, axis: int, count: int) -> Cut:
    if equation.params["axis"] == axis:
        raise mixing(equation)
    return (axis,), {}


@RULES.of("concatenate")
def _concatenate(equation: Equation, axis: int, count: int) -> Cut:
    if equation.params["dimension"] == axis:
        raise mixing(equation)
    return (axis,) * len(equation.inputs), {}


@RULES.of("stack")
def _stack(equation: Equation, axis: int, count: int) -> Cut:
    along = equation.params["axis"]
    if along == axis:
        raise mixing(equation)
    return (axis - (along < axis),) * len(equation.inputs), {}


@RULES.of("slice")
def _slice(equation: Equation, axis: int, count: int) -> Cut:
    size = shape_of(equation.inputs[0])[axis]
    if equation.outputs[0].shape[axis] != size:
        raise mixing(equation)
    return (axis,), {"limit_indices": resized(equation.params["limit_indices"], axis, count)}


@RULES.of("dot_general")
def _dot(equation: Equation, axis: int, count: int) -> Cut:
    (contract_l, contract_r), (batch_l, batch_r) = equation.params["dimension_numbers"]
    if axis < len(batch_l):
        return (int(batch_l[axis]), int(batch_r[axis])), {}
    ranks = [len(shape_of(a)) for a in equation.inputs]
    free_l = [d for d in range(ranks[0]) if d not in (*contract_l, *batch_l)]
    free_r = [d for d in range(ranks[1]) if d not in (*contract_r, *batch_r)]
    at = axis - len(batch_l)
    return (free_l[at], None) if at < len(free_l) else (None, free_r[at - len(free_l)]), {}


@RULES.of("gather")
def _gather(equation: Equation, axis: int, count: int) -> Cut:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    operand = shape_of(equation.inputs[0])
    if axis not in numbers.offset_dims:
        batch = [d for d in range(len(equation.outputs[0].shape)) if d not in numbers.offset_dims]
        own = batch.index(axis)
        pairs = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
        return (pairs.get(own), own), {}
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [d for d in range(len(operand)) if d not in gone]
    own = kept[numbers.offset_dims.index(axis)]
    if sizes[own] != operand[own] or own in numbers.start_index_map:
        raise mixing(equation)
    return (own, None), {"slice_sizes": resized(sizes, own, count)}


@RULES.of("scan")
def _scan(equation: Equation, axis: int, count: int) -> Cut:
    """Steps that carry nothing on are rows: `jax.lax.map`."""
    fixed, carried = equation.params["num_consts"], equation.params["num_carry"]
    if carried or axis:
        raise mixing(equation)
    return (None,) * fixed + (0,) * (len(equation.inputs) - fixed), {"length": count}


__all__ = ["ROWS", "Whole", "rows_of", "shared"]

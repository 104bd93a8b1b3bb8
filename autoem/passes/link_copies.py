"""Rules of primitives that copy elements: reshaping, indexing, joining, choosing.

In: an equation and its inputs as values of the algebra. Out: its outputs, of the same form as the inputs; or
`Declined`. The table is `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from autoem.graph.rules import Rules
from autoem.passes.forms import Declined, Known, Linear, Monomial, Value, each, log_of

RULES = Rules()


@RULES.of(
    "reshape",
    "broadcast_in_dim",
    "squeeze",
    "transpose",
    "slice",
    "rev",
    "expand_dims",
    "copy",
    "copy_p",
    "stop_gradient",
)
def _copy(eqn, inputs):
    return each(inputs[0], lambda v: eqn.apply([v])[0])


@RULES.of("convert_element_type", "reduce_precision")
def _convert(eqn, inputs):
    if not jnp.issubdtype(eqn.params.get("new_dtype", float), jnp.floating):
        raise Declined("it is rounded to an integer")
    return inputs[0]


@RULES.of("gather", "dynamic_slice")
def _gather(eqn, inputs):
    if not all(isinstance(i, Known) for i in inputs[1:]):
        raise Declined("it is used as an index")
    index = [i.value for i in inputs[1:]]
    return each(inputs[0], lambda v: eqn.apply([v, *index])[0])


def together(inputs: list, combine: Callable[[list], Any]) -> Value:
    """Join values of one kind (constants fit either) by an operation that copies elements."""
    kinds = {type(i) for i in inputs if not isinstance(i, Known)}
    if kinds == {Linear}:
        parts = [i if isinstance(i, Linear) else Linear(i.value, None) for i in inputs]
        own = [p for p, i in zip(parts, inputs, strict=True) if not isinstance(i, Known)]
        value = combine([jnp.asarray(p.value, float) for p in parts])
        return Linear(value, _agree([p.power for p in own]), all(p.simple for p in own), False, None)
    if kinds == {Monomial}:
        own = [i for i in inputs if isinstance(i, Monomial)]
        logs = [log_of(i) for i in inputs]
        co = combine([c for _, c in logs]) if all(c is not None for _, c in logs) else None
        pure = all(i.pure for i in own) and len(own) == len(inputs)
        return Monomial(
            combine([v for v, _ in logs]), co, _agree([i.power for i in own]), all(i.simple for i in own), pure
        )
    raise Declined("terms of different form are joined")


def _agree(powers: list) -> float | None:
    return powers[0] if all(p == powers[0] for p in powers) else None


@RULES.of("concatenate")
def _concatenate(eqn, inputs):
    return together(inputs, lambda parts: jnp.concatenate(parts, eqn.params["dimension"]))


@RULES.of("stack")
def _stack(eqn, inputs):
    return together(inputs, lambda parts: eqn.apply(parts)[0])


@RULES.of("split", "unstack")
def _split(eqn, inputs):
    (x,) = inputs
    count = len(eqn.outputs)
    return [each(x, lambda v, i=i: eqn.apply([v])[i]) for i in range(count)]


@RULES.of("tile")
def _tile(eqn, inputs):
    return each(inputs[0], lambda v: eqn.apply([v])[0])


@RULES.of("select_n")
def _select(eqn, inputs):
    if not isinstance(inputs[0], Known):
        raise Declined("a choice depends on it")
    which = inputs[0].value
    return together(inputs[1:], lambda cases: jax.lax.select_n(which, *cases))


@RULES.of("pad")
def _pad(eqn, inputs):
    def combine(parts):
        return eqn.apply([parts[0], parts[1]])[0]

    return together(inputs, combine)


@RULES.of("scatter")
def _scatter(eqn, inputs):
    operand, index, update = inputs
    if not isinstance(index, Known):
        raise Declined("it is used as an index")
    return together([operand, update], lambda parts: eqn.apply([parts[0], index.value, parts[1]])[0])


@RULES.of("dynamic_update_slice")
def _update_slice(eqn, inputs):
    if not all(isinstance(i, Known) for i in inputs[2:]):
        raise Declined("it is used as an index")
    index = [i.value for i in inputs[2:]]
    return together(inputs[:2], lambda parts: eqn.apply([*parts, *index])[0])

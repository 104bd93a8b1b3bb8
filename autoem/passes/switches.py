"""Switches: values that are 0 or 1, and what is certain of a product or a power with one in it.

In: an equation whose inputs no target enters. Out: its output with the switch that it is, and those without which it
is 0 or 1. `z * p + (1 - z) * q`, `p ** z * q ** (1 - z)` and `z * p` are then choices between two values, as
`where(z, p, q)` is, and so is one minus them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from autoem.passes.forms import Known, Monomial, Switch, Value

COPIES = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "copy", "copy_p", "slice", "transpose", "rev"}
OF_SWITCHES = {"mul", "max", "min", "and", "or", "xor", "stack", "concatenate", "gather", "dynamic_slice", "select_n"}


def switch_of(value: Any, token: Any, known: bool) -> Switch | None:
    """The switch that an input is: one that is `known` to be, or of booleans."""
    return (token, True) if known or is_boolean(value) else None


def is_boolean(value: Any) -> bool:
    return bool(jnp.issubdtype(getattr(value, "dtype", float), jnp.bool_))


def marked(eqn, inputs: Sequence[Known], outputs: Sequence[Known]) -> list[Known]:
    """The outputs of an equation with what is certain of them."""
    if not inputs:  # a range of numbers
        return list(outputs)
    return [dataclasses.replace(out, **certain(eqn, inputs, (eqn, i), out.value)) for i, out in enumerate(outputs)]


def certain(eqn, inputs: Sequence[Known], token: Any, value: Any) -> dict[str, Any]:
    name, first = eqn.primitive.name, inputs[0]
    if name == "convert_element_type":
        return dict(switch=first.switch, zero=first.zero, one=first.one)
    if name in COPIES:

        def wrap(s: Switch) -> Switch:
            return (name, str(eqn.params), s[0]), s[1]

        switch = first.switch and wrap(first.switch)
        return dict(switch=switch, zero=frozenset(map(wrap, first.zero)), one=frozenset(map(wrap, first.one)))
    if name == "sub" and first.uniform == 1.0 and inputs[1].switch:
        return dict(switch=turned(inputs[1].switch))
    if name == "not" and first.switch:
        return dict(switch=turned(first.switch))
    if name in ("eq", "ne") and (same := compared(inputs)):
        return dict(switch=same if name == "eq" else turned(same))
    if name == "pow" and inputs[1].switch:
        return dict(one=frozenset([inputs[1].switch]))
    every = inputs[1:] if name == "select_n" else inputs[:1] if name in ("gather", "dynamic_slice") else inputs
    if name == "mul" and 1.0 in (first.uniform, inputs[1].uniform):
        other = inputs[1] if first.uniform == 1.0 else first
        return dict(switch=other.switch, zero=other.zero, one=other.one)
    is_switch = is_boolean(value) or (name in OF_SWITCHES and all(i.switch for i in every))
    zero = frozenset(s for i in inputs for s in (*i.zero, *([i.switch] if i.switch else ())))
    return dict(switch=(token, True) if is_switch else None, zero=zero if name in ("mul", "and") else frozenset())


def turned(switch: Switch) -> Switch:
    """The switch that is on where this one is off."""
    return switch[0], not switch[1]


def compared(inputs: Sequence[Known]) -> Switch | None:
    """The switch that tells whether another equals a number, 0 or 1."""
    for a, b in (tuple(inputs), tuple(reversed(inputs))):
        if a.switch and b.uniform in (0.0, 1.0):
            return a.switch if b.uniform else turned(a.switch)
    return None


def choice(a: Value, b: Value, neutral: str, join: Callable[[list, Callable], Value]) -> Value | None:
    """`a` combined with `b` where one of them is `neutral` ('zero' of a sum, 'one' of a product) whenever the other is
    not; None where that is not certain. Of every cell it is then one of the two."""
    if not isinstance(a, Monomial):
        a, b = b, a
    if not isinstance(a, Monomial) or not isinstance(b, Known | Monomial):
        return None
    others = getattr(b, neutral)
    for switch, on in getattr(a, neutral).items():
        if turned(switch) in others:
            return join([a, b], lambda parts, on=on: jnp.where(jnp.asarray(on, bool), *parts))
    return None

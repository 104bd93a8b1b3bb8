"""The closed forms in which a parameter may enter an argument, and what every rule about them shares.

In: nothing. Out: the values of the algebra (`Known`, `Linear`, `Monomial`, `Negated`), and `Declined`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp


class Declined(Exception):
    """The expression has no closed form in this algebra; the text says what stands in the way."""


Switch = tuple[Any, bool]  # what is 0 or 1, by a name of its own, and which of the two counts as on


@dataclasses.dataclass(frozen=True)
class Known:
    """A value that no target enters; `uniform` is its one entry where that is written in the model's text.

    `switch` names it where it is 0 or 1; it is 0 unless all of `zero` are on, and 1 unless one of `one` is.
    """

    value: Any
    uniform: float | None = None
    switch: Switch | None = None
    zero: frozenset[Switch] = frozenset()
    one: frozenset[Switch] = frozenset()


@dataclasses.dataclass(frozen=True)
class Linear:
    """An affine function of the targets, at the targets' current values.

    `power` is the coefficient where it is one known number, `simple` says that no element reads more than one element
    of a target, `pure` that elements are only copied. `pair` holds `(log s(v), log(1 - s(v)))` of the logistic function
    `s`, kept while `pure`.
    """

    value: Any
    power: float | None = 1.0
    simple: bool = True
    pure: bool = True
    pair: tuple[Any, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Monomial:
    """`exp(log)`, where `log` is affine in the logarithms of the targets.

    `co` is the same for one minus the value, or None. The value is 0 unless all of `zero` are on, and 1 unless one of
    `one` is: switches with their values.
    """

    log: Any
    co: Any = None
    power: float | None = 1.0
    simple: bool = True
    pure: bool = True
    zero: Mapping[Switch, Any] = dataclasses.field(default_factory=dict)
    one: Mapping[Switch, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Negated:
    """Minus a monomial, waiting for the `1 +` or `log1p` that makes sense of it."""

    of: Monomial


Value = Known | Linear | Monomial | Negated


def log_of(x: Value) -> tuple[Any, Any]:
    """Logarithms of a value and of one minus it, for mixing constants with monomials."""
    if isinstance(x, Monomial):
        return x.log, x.co
    assert isinstance(x, Known)
    v = jnp.asarray(x.value, float)
    safe = jnp.clip(v, 1e-300 if v.dtype == jnp.float64 else 1e-37, None)
    return jnp.log(safe), jnp.log(jnp.clip(1 - v, 1e-300 if v.dtype == jnp.float64 else 1e-37, None))


def each(x: Value, function: Callable[[Any], Any]) -> Value:
    """Apply a copying operation (a gather, a reshape) to every part of `x`."""
    if isinstance(x, Linear):
        pair = None if x.pair is None else (function(x.pair[0]), function(x.pair[1]))
        return dataclasses.replace(x, value=function(x.value), pair=pair)
    if isinstance(x, Monomial):
        return _each_of_monomial(x, function)
    if isinstance(x, Negated):
        return Negated(_each_of_monomial(x.of, function))
    return Known(function(x.value))


def _each_of_monomial(x: Monomial, function: Callable[[Any], Any]) -> Monomial:
    co = None if x.co is None else function(x.co)
    return dataclasses.replace(x, log=function(x.log), co=co, zero={}, one={})

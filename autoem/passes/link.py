"""How a parameter enters an argument: an interpreter of the model's data flow that answers in a closed-form algebra.

In: a graph, one of its atoms, and for each target parameter a symbolic start (`Linear` for a real parameter, `Monomial` for a
probability or a positive one). Out: the atom as a `Linear` function of the targets, or as a `Monomial`, whose logarithm is linear
in the logarithms of the targets and of one minus them; or `Declined`, with the reason that the plan prints.

The interpreter both classifies and evaluates, so what the plan says of a link is what the M-step differentiates:
expected counts flow back to the parameters through the transpose of the linear map that it returns. It runs inside
`vmap` over latent states and never looks at numbers that the data could change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoem._jaxpr import Atom, Constant, Equation, Graph, Variable, inline

TINY = 1e-6  # clamps and guards closer than this to 0 or 1 leave a probability what it is


class Declined(Exception):
    """The expression has no closed form in this algebra; the text says what stands in the way."""


@dataclasses.dataclass(frozen=True)
class Known:
    """A value that no target enters; `uniform` is its one entry where that is written in the model's text."""

    value: Any
    uniform: float | None = None


@dataclasses.dataclass(frozen=True)
class Linear:
    """An affine function of the targets, at the targets' current values.

    `power` is the coefficient where it is one known number, `simple` says that no element reads more than one element of a
    target, `pure` that elements are only copied. `pair` holds `(log s(v), log(1 - s(v)))` of the logistic function `s`, kept
    while `pure`.
    """

    value: Any
    power: float | None = 1.0
    simple: bool = True
    pure: bool = True
    pair: tuple[Any, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Monomial:
    """`exp(log)`, where `log` is affine in the logarithms of the targets; `co` is the same for one minus the value, or None."""

    log: Any
    co: Any = None
    power: float | None = 1.0
    simple: bool = True
    pure: bool = True


@dataclasses.dataclass(frozen=True)
class Negated:
    """Minus a monomial, waiting for the `1 +` or `log1p` that makes sense of it."""

    of: Monomial


Value = Known | Linear | Monomial | Negated
Rule = Callable[[Equation, list], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def interpret(graph: Graph, atom: Atom, targets: Mapping[Any, Value], values: Mapping[Any, Any]) -> Value:
    """`atom` as a function of the `targets`, every other input standing at its value in `values`.

    Raises:
        Declined: a target enters in a way that the algebra does not hold.
    """
    env: dict[Variable, Value] = {}
    for key, var in graph.inputs.items():
        if key in targets:
            env[var] = targets[key]
        elif key in values:
            env[var] = Known(values[key])
    run(graph.slice([atom]), env)
    return look_up(atom, env)


def look_up(atom: Atom, env: Mapping[Variable, Value]) -> Value:
    if isinstance(atom, Variable):
        return env[atom]
    value = atom.value
    try:
        entries = np.unique(np.asarray(value)) if np.size(value) <= 4096 else np.empty(0)
        uniform = float(entries[0]) if len(entries) == 1 else None
    except (TypeError, ValueError):
        uniform = None
    return Known(value, uniform)


UNIFORM = {
    "stack",
    "concatenate",
    "tile",
    "broadcast_in_dim",
    "reshape",
    "convert_element_type",
    "squeeze",
    "transpose",
    "copy",
    "copy_p",
    "expand_dims",
}


def run(equations: list[Equation], env: dict[Variable, Value]) -> None:
    """Interpret `equations` in order."""
    for eqn in equations:
        inputs = [look_up(a, env) for a in eqn.inputs]
        if all(isinstance(i, Known) for i in inputs):
            out = eqn.apply([i.value for i in inputs])
            entries = {i.uniform for i in inputs}
            uniform = inputs[0].uniform if eqn.primitive.name in UNIFORM and len(entries) == 1 else None
            env.update({v: Known(o, uniform) for v, o in zip(eqn.outputs, out, strict=True)})
            continue
        apply = RULES.get(eqn.primitive.name)
        if apply is None:
            raise Declined(f"it passes through `{eqn.primitive.name}`")
        out = apply(eqn, inputs)
        env.update(zip(eqn.outputs, out if isinstance(out, list) else [out], strict=True))


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
        return dataclasses.replace(x, log=function(x.log), co=None if x.co is None else function(x.co))
    if isinstance(x, Negated):
        return Negated(each(x.of, function))  # type: ignore[arg-type]
    return Known(function(x.value))


@rule(
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


@rule("convert_element_type", "reduce_precision")
def _convert(eqn, inputs):
    if not jnp.issubdtype(eqn.params.get("new_dtype", float), jnp.floating):
        raise Declined("it is rounded to an integer")
    return inputs[0]


@rule("gather", "dynamic_slice")
def _gather(eqn, inputs):
    if not all(isinstance(i, Known) for i in inputs[1:]):
        raise Declined("it is used as an index")
    index = [i.value for i in inputs[1:]]
    return each(inputs[0], lambda v: eqn.apply([v, *index])[0])


def _together(inputs: list, combine: Callable[[list], Any]) -> Value:
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


@rule("concatenate")
def _concatenate(eqn, inputs):
    return _together(inputs, lambda parts: jnp.concatenate(parts, eqn.params["dimension"]))


@rule("stack")
def _stack(eqn, inputs):
    return _together(inputs, lambda parts: eqn.apply(parts)[0])


@rule("split", "unstack")
def _split(eqn, inputs):
    (x,) = inputs
    count = len(eqn.outputs)
    return [each(x, lambda v, i=i: eqn.apply([v])[i]) for i in range(count)]


@rule("tile")
def _tile(eqn, inputs):
    return each(inputs[0], lambda v: eqn.apply([v])[0])


@rule("select_n")
def _select(eqn, inputs):
    if not isinstance(inputs[0], Known):
        raise Declined("a choice depends on it")
    which = inputs[0].value
    return _together(inputs[1:], lambda cases: jax.lax.select_n(which, *cases))


@rule("pad")
def _pad(eqn, inputs):
    def combine(parts):
        return eqn.apply([parts[0], parts[1]])[0]

    return _together(inputs, combine)


@rule("scatter")
def _scatter(eqn, inputs):
    operand, index, update = inputs
    if not isinstance(index, Known):
        raise Declined("it is used as an index")
    return _together([operand, update], lambda parts: eqn.apply([parts[0], index.value, parts[1]])[0])


@rule("dynamic_update_slice")
def _update_slice(eqn, inputs):
    index = [i.value for i in inputs[2:]]
    return _together(inputs[:2], lambda parts: eqn.apply([*parts, *index])[0])


@rule("add", "add_any")
def _add(eqn, inputs):
    a, b = inputs
    if isinstance(a, Negated) or isinstance(b, Negated):
        negated, other = (a, b) if isinstance(a, Negated) else (b, a)
        return _one_minus(other, negated.of)
    if isinstance(a, Monomial) or isinstance(b, Monomial):
        monomial, other = (a, b) if isinstance(a, Monomial) else (b, a)
        if isinstance(other, Known) and other.uniform is not None and abs(other.uniform) <= TINY:
            return monomial
        raise Declined("it enters a sum")
    return _linear_sum(a, b, 1.0)


def _linear_sum(a: Value, b: Value, sign: float) -> Linear:
    if isinstance(b, Known) and isinstance(a, Linear):
        return dataclasses.replace(a, value=a.value + sign * b.value, pure=False, pair=None)
    if isinstance(a, Known) and isinstance(b, Linear):
        power = None if b.power is None else sign * b.power
        return dataclasses.replace(b, value=a.value + sign * b.value, power=power, pure=False, pair=None)
    if isinstance(a, Linear) and isinstance(b, Linear):
        return Linear(a.value + sign * b.value, None, False, False, None)
    raise Declined("it enters a sum with terms of another form")


@rule("sub")
def _sub(eqn, inputs):
    a, b = inputs
    if isinstance(b, Monomial):
        return _one_minus(a, b)
    if isinstance(a, Monomial):
        if isinstance(b, Known) and b.uniform is not None and abs(b.uniform) <= TINY:
            return a
        raise Declined("it enters a difference")
    return _linear_sum(a, b, -1.0)


def _one_minus(one: Value, x: Monomial) -> Monomial:
    if not (isinstance(one, Known) and one.uniform == 1.0 and x.co is not None):
        raise Declined("it enters a sum")
    return Monomial(x.co, x.log, None, x.simple, False)


@rule("neg")
def _neg(eqn, inputs):
    (x,) = inputs
    if isinstance(x, Monomial):
        return Negated(x)
    if isinstance(x, Negated):
        return x.of
    return Linear(-x.value, None if x.power is None else -x.power, x.simple, False, None)


@rule("mul")
def _mul(eqn, inputs):
    a, b = inputs
    if isinstance(a, Known):
        a, b = b, a
    if isinstance(a, Linear):
        if not isinstance(b, Known):
            raise Declined("it is multiplied by another parameter of the same block")
        power = None if a.power is None or b.uniform is None else a.power * b.uniform
        return Linear(a.value * b.value, power, a.simple, False, None)
    if isinstance(a, Monomial) and isinstance(b, Monomial):
        power = None if a.power is None or b.power is None else a.power + b.power
        return Monomial(a.log + b.log, None, power, False, False)
    if isinstance(a, Monomial) and isinstance(b, Known):
        return Monomial(a.log + log_of(b)[0], None, a.power, a.simple, False)
    raise Declined("it enters a product with a term of another form")


@rule("div")
def _div(eqn, inputs):
    a, b = inputs
    if isinstance(a, Linear) and isinstance(b, Known):
        power = None if a.power is None or b.uniform is None else a.power / b.uniform
        return Linear(a.value / b.value, power, a.simple, False, None)
    if isinstance(b, Linear) or isinstance(a, Linear | Negated) or isinstance(b, Negated):
        raise Declined("it stands in a quotient")
    if isinstance(a, Monomial) and isinstance(b, Known):
        return Monomial(a.log - log_of(b)[0], None, a.power, a.simple, False)
    power = None if b.power is None else -b.power
    if isinstance(a, Known):
        return Monomial(log_of(a)[0] - b.log, None, power, b.simple, False)
    power = None if a.power is None or power is None else a.power + power
    return Monomial(a.log - b.log, None, power, False, False)


def _raised(x: Value, power: float) -> Monomial:
    if not isinstance(x, Monomial):
        raise Declined("it is raised to a power")
    return Monomial(power * x.log, None, None if x.power is None else power * x.power, x.simple, False)


@rule("integer_pow")
def _integer_pow(eqn, inputs):
    return _raised(inputs[0], eqn.params["y"])


@rule("pow")
def _pow(eqn, inputs):
    if not isinstance(inputs[1], Known) or inputs[1].uniform is None:
        raise Declined("it stands in an exponent")
    return _raised(inputs[0], inputs[1].uniform)


@rule("sqrt")
def _sqrt(eqn, inputs):
    return _raised(inputs[0], 0.5)


@rule("rsqrt")
def _rsqrt(eqn, inputs):
    return _raised(inputs[0], -0.5)


@rule("square")
def _square(eqn, inputs):
    return _raised(inputs[0], 2.0)


@rule("max", "min", "clamp")
def _guard(eqn, inputs):
    if eqn.primitive.name == "clamp":
        low, x, high = inputs
        limits = [(low, 0.0), (high, 1.0)]
    else:
        x, limit = (inputs[1], inputs[0]) if isinstance(inputs[0], Known) else inputs
        limits = [(limit, 0.0 if eqn.primitive.name == "max" else 1.0)]
    for limit, end in limits:
        if not (isinstance(x, Monomial) and isinstance(limit, Known) and limit.uniform is not None):
            raise Declined(f"it passes through `{eqn.primitive.name}`")
        if abs(limit.uniform - end) > TINY:
            raise Declined(f"it is clamped at {limit.uniform:g}")
    return x


@rule("log")
def _log(eqn, inputs):
    (x,) = inputs
    if not isinstance(x, Monomial):
        raise Declined("its logarithm is taken")
    return Linear(x.log, x.power, x.simple, False, None)


@rule("log1p")
def _log1p(eqn, inputs):
    (x,) = inputs
    if not (isinstance(x, Negated) and x.of.co is not None):
        raise Declined("it passes through `log1p`")
    return Linear(x.of.co, None, x.of.simple, False, None)


@rule("exp")
def _exp(eqn, inputs):
    (x,) = inputs
    if not isinstance(x, Linear):
        raise Declined("its exponential is taken")
    return Monomial(x.value, None, x.power, x.simple, False)


@rule("logistic")
def _logistic(eqn, inputs):
    (x,) = inputs
    if not (isinstance(x, Linear) and x.pair is not None):
        raise Declined("it passes through `logistic`")
    return Monomial(x.pair[0], x.pair[1], None, x.simple, False)


@rule("dot_general")
def _dot(eqn, inputs):
    if (copied := _product_with_one(eqn, inputs)) is not None:
        return copied
    values = [i.value if isinstance(i, Known | Linear) else None for i in inputs]
    if any(v is None for v in values) or all(isinstance(i, Linear) for i in inputs):
        raise Declined("it enters a matrix product" if any(v is None for v in values) else "it is multiplied by itself")
    return Linear(eqn.apply(values)[0], None, False, False, None)


def _product_with_one(eqn, inputs) -> Value | None:
    """A product with a column of ones (an intercept alone) copies; None where it is no such thing."""
    (contract, _), _ = eqn.params["dimension_numbers"]
    length = int(
        np.prod(
            [
                eqn.inputs[0].shape[d] if isinstance(eqn.inputs[0], Variable) else np.shape(eqn.inputs[0].value)[d]
                for d in contract
            ]
        )
    )
    for i, one in enumerate(inputs):
        x = inputs[1 - i]
        if isinstance(one, Known) and one.uniform == 1.0 and length == 1 and isinstance(x, Linear | Monomial):
            return each(x, lambda v, i=i, one=one: eqn.apply([one.value, v] if i == 0 else [v, one.value])[0])
    return None


@rule("reduce_sum", "cumsum", "scatter-add", "scatter_add", "conv_general_dilated")
def _linear_map(eqn, inputs):
    if any(isinstance(i, Monomial | Negated) for i in inputs):
        raise Declined("it enters a sum")
    if sum(isinstance(i, Linear) for i in inputs[1:]) and eqn.primitive.name == "conv_general_dilated":
        raise Declined("it is convolved")
    return Linear(eqn.apply([i.value for i in inputs])[0], None, False, False, None)


@rule("custom_jvp_call", "custom_vjp_call")
def _call(eqn, inputs):
    closed = eqn.params["call_jaxpr"]
    equations: list[Equation] = []
    names = [Variable(v.aval) for v in closed.jaxpr.invars]
    outs = inline(closed, dict(zip(closed.jaxpr.invars, names, strict=True)), equations)
    env: dict[Variable, Value] = dict(zip(names, inputs, strict=True))
    run(Graph({}, dict(enumerate(outs)), tuple(equations)).slice(outs), env)
    return [look_up(o, env) for o in outs]


__all__ = ["Constant", "Declined", "Known", "Linear", "Monomial", "interpret"]

"""Rules of primitives that compute: sums, products, powers, logarithms, linear maps.

In: an equation and its inputs as values of the algebra. Out: its output, whose form may be another one; or `Declined`.
The table is `RULES`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from autoem.graph.jaxpr import Variable
from autoem.graph.rules import Rules
from autoem.passes.forms import Declined, Known, Linear, Monomial, Negated, Value, each, log_of
from autoem.passes.link_copies import together
from autoem.passes.switches import choice

RULES = Rules()
TINY = 1e-6  # clamps and guards closer than this to 0 or 1 leave a probability what it is


@RULES.of("add", "add_any")
def _add(eqn, inputs):
    a, b = inputs
    if (chosen := choice(a, b, "zero", together)) is not None:
        return chosen
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


@RULES.of("sub")
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


@RULES.of("neg")
def _neg(eqn, inputs):
    (x,) = inputs
    if isinstance(x, Monomial):
        return Negated(x)
    if isinstance(x, Negated):
        return x.of
    return Linear(-x.value, None if x.power is None else -x.power, x.simple, False, None)


@RULES.of("mul")
def _mul(eqn, inputs):
    a, b = inputs
    if (chosen := choice(a, b, "one", together)) is not None:
        return chosen
    if isinstance(a, Known):
        a, b = b, a
    if isinstance(a, Linear):
        if not isinstance(b, Known):  # one of them may be nothing, as the location times how centred it is
            if not isinstance(b, Linear) or 0.0 not in (a.power, b.power):
                raise Declined("it is multiplied by another parameter of the same block")
            power = 0.0 if a.power == b.power else None
            return Linear(a.value * b.value, power, a.simple and b.simple, False, None)
        power = None if a.power is None or b.uniform is None else a.power * b.uniform
        return Linear(a.value * b.value, power, a.simple, False, None)
    if isinstance(a, Monomial) and isinstance(b, Monomial):
        power = None if a.power is None or b.power is None else a.power + b.power
        return Monomial(a.log + b.log, None, power, False, False)
    if isinstance(a, Monomial) and isinstance(b, Known):
        if b.uniform == 1.0:
            shape = eqn.outputs[0].shape  # of which a number alone need not be
            return a if jnp.shape(a.log) == shape else each(a, lambda v: jnp.broadcast_to(v, shape))
        co = jnp.where(jnp.asarray(b.value, bool), a.co, 0) if b.switch and a.co is not None else None
        zero = {**a.zero, b.switch: b.value} if b.switch else a.zero
        return Monomial(a.log + log_of(b)[0], co, a.power, a.simple, False, zero)
    raise Declined("it enters a product with a term of another form")


@RULES.of("div")
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


def _raised(x: Value, power: float) -> Value:
    if power == 1.0 and isinstance(x, Linear):
        return x
    if not isinstance(x, Monomial):
        raise Declined("it is raised to a power")
    return Monomial(power * x.log, None, None if x.power is None else power * x.power, x.simple, False)


@RULES.of("integer_pow")
def _integer_pow(eqn, inputs):
    return _raised(inputs[0], eqn.params["y"])


@RULES.of("pow")
def _pow(eqn, inputs):
    x, exponent = inputs
    if not isinstance(exponent, Known) or not isinstance(x, Monomial | Linear | Known):
        raise Declined("it stands in an exponent")
    if exponent.uniform is not None:
        return _raised(x, exponent.uniform)
    if not isinstance(x, Monomial):
        raise Declined("it stands in an exponent")
    if exponent.switch:
        on = jnp.asarray(exponent.value, bool)
        chosen = together([x, Known(jnp.ones(on.shape), 1.0)], lambda parts: jnp.where(on, *parts))
        return dataclasses.replace(chosen, one={exponent.switch: on})
    return Monomial(exponent.value * x.log, None, None, x.simple, False)


@RULES.of("sqrt")
def _sqrt(eqn, inputs):
    return _raised(inputs[0], 0.5)


@RULES.of("rsqrt")
def _rsqrt(eqn, inputs):
    return _raised(inputs[0], -0.5)


@RULES.of("square")
def _square(eqn, inputs):
    return _raised(inputs[0], 2.0)


@RULES.of("max", "min", "clamp")
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


@RULES.of("log")
def _log(eqn, inputs):
    (x,) = inputs
    if not isinstance(x, Monomial):
        raise Declined("its logarithm is taken")
    return Linear(x.log, x.power, x.simple, False, None)


@RULES.of("log1p")
def _log1p(eqn, inputs):
    (x,) = inputs
    if not (isinstance(x, Negated) and x.of.co is not None):
        raise Declined("it passes through `log1p`")
    return Linear(x.of.co, None, x.of.simple, False, None)


@RULES.of("exp")
def _exp(eqn, inputs):
    (x,) = inputs
    if not isinstance(x, Linear):
        raise Declined("its exponential is taken")
    return Monomial(x.value, None, x.power, x.simple, False)


@RULES.of("logistic")
def _logistic(eqn, inputs):
    (x,) = inputs
    if not (isinstance(x, Linear) and x.pair is not None):
        raise Declined("it passes through `logistic`")
    return Monomial(x.pair[0], x.pair[1], None, x.simple, False)


@RULES.of("dot_general")
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
    first = eqn.inputs[0]
    shape = first.shape if isinstance(first, Variable) else np.shape(first.value)
    length = int(np.prod([shape[d] for d in contract]))
    for i, one in enumerate(inputs):
        x = inputs[1 - i]
        if isinstance(one, Known) and one.uniform == 1.0 and length == 1 and isinstance(x, Linear | Monomial):
            return each(x, lambda v, i=i, one=one: eqn.apply([one.value, v] if i == 0 else [v, one.value])[0])
    return None


@RULES.of("reduce_sum", "cumsum", "scatter-add", "scatter_add", "conv_general_dilated")
def _linear_map(eqn, inputs):
    if any(isinstance(i, Monomial | Negated) for i in inputs):
        raise Declined("it enters a sum")
    if sum(isinstance(i, Linear) for i in inputs[1:]) and eqn.primitive.name == "conv_general_dilated":
        raise Declined("it is convolved")
    return Linear(eqn.apply([i.value for i in inputs])[0], None, False, False, None)

"""Which values of a graph cannot be negative, and which functions of an input have a constant slope.

In: a graph with the numbers that its data have, and signs of its other inputs; or a function. Out: whether an output is
certainly not negative (False proves nothing); or whether the derivative is free of the point where it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import partial_eval

from autoem.graph.jaxpr import Atom, Equation, Graph, Variable, graph_of
from autoem.passes.forms import Declined, Known

Sign = Known | bool  # a number, or whether the value is known not to be negative

# primitives that make no negative number of inputs without one
KEEPS = {
    "add", "add_any", "mul", "div", "dot_general", "reduce_sum", "cumsum", "reduce_prod", "cumprod", "scatter-add",
    "scatter_add", "scatter-mul", "scatter", "conv_general_dilated", "reshape", "broadcast_in_dim", "squeeze",
    "transpose", "rev", "expand_dims", "copy", "copy_p", "stop_gradient", "convert_element_type", "reduce_precision",
    "concatenate", "stack", "tile", "pad", "split", "unstack", "slice", "sqrt", "rsqrt", "integer_pow", "pow", "min",
    "reduce_max", "reduce_min", "cummax", "cummin", "clamp", "bcoo_dot_general", "bcoo_todense", "bcoo_extract",
    "bcoo_transpose", "bcoo_reduce_sum", "bcsr_dot_general", "coo_matvec", "coo_matmat", "csr_matvec", "csr_matmat",
}  # fmt: skip
NEVER_NEGATIVE = {"exp", "exp2", "abs", "square", "logistic"}
# of these only some inputs are numbers, the others say where they stand
NUMBERS = {
    "gather": slice(0, 1),
    "dynamic_slice": slice(0, 1),
    "dynamic_update_slice": slice(0, 2),
    "select_n": slice(1, None),
    "scatter": slice(0, 3, 2),
    "scatter-add": slice(0, 3, 2),
    "scatter_add": slice(0, 3, 2),
}


def nonnegative(graph: Graph, atom: Atom, values: Mapping[Any, Any], signs: Mapping[Any, bool]) -> bool:
    """Whether `atom` is certainly not negative, some inputs having `values` and others the given `signs`."""
    env: dict[Variable, Sign] = {}
    for key, var in graph.inputs.items():
        env[var] = Known(values[key]) if key in values else signs.get(key, False)
    run(asked(graph.slice([atom]), [atom], env), env)
    return is_nonnegative(look_up(atom, env))


def asked(equations: list[Equation], atoms: Iterable[Atom], env: Mapping[Variable, Sign]) -> list[Equation]:
    """The equations that the signs of `atoms` depend on: nobody asks that of an index, which need not be computed."""
    numbers = {v for v, sign in env.items() if isinstance(sign, Known)}
    for eqn in equations:
        if numbers.issuperset(variables(eqn.inputs)):
            numbers.update(eqn.outputs)
    wanted, kept = set(variables(atoms)), []
    for eqn in reversed(equations):
        if wanted.isdisjoint(eqn.outputs):
            continue
        kept.append(eqn)
        whole = numbers.issuperset(eqn.outputs)
        wanted.update(variables(eqn.inputs if whole else eqn.inputs[NUMBERS.get(eqn.primitive.name, slice(None))]))
    return kept[::-1]


def variables(atoms: Iterable[Atom]) -> list[Variable]:
    return [a for a in atoms if isinstance(a, Variable)]


def look_up(atom: Atom, env: Mapping[Variable, Sign]) -> Sign:
    return env.get(atom, False) if isinstance(atom, Variable) else Known(atom.value)


def is_nonnegative(x: Sign) -> bool:
    if not isinstance(x, Known):
        return x
    value = jnp.asarray(x.value)
    real = jnp.issubdtype(value.dtype, jnp.number) and not jnp.issubdtype(value.dtype, jnp.complexfloating)
    return value.dtype == bool or (real and bool(value.size == 0 or np.asarray(value).min() >= 0))


def run(equations: list[Equation], env: dict[Variable, Sign]) -> None:
    """Signs of the outputs of `equations`, in order; numbers where every input is one."""
    for eqn in equations:
        inputs = [look_up(a, env) for a in eqn.inputs]
        if all(isinstance(i, Known) for i in inputs):
            outputs = [Known(o) for o in eqn.apply([i.value for i in inputs if isinstance(i, Known)])]
        else:
            outputs = signs_of(eqn, inputs)
        env.update(zip(eqn.outputs, outputs, strict=True))


def signs_of(eqn: Equation, inputs: list[Sign]) -> list[Sign]:
    name = eqn.primitive.name
    if name in ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"):
        closed = eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
        return list(inner_signs(closed, inputs))
    if name == "scan":
        return signs_of_scan(eqn, inputs)
    if name in NEVER_NEGATIVE:
        return [True] * len(eqn.outputs)
    if name in ("max", "and", "or"):
        return [any(is_nonnegative(i) for i in inputs)]
    own = inputs[NUMBERS.get(name, slice(None))]
    kept = name in KEEPS or name in NUMBERS
    return [kept and all(is_nonnegative(i) for i in own)] * len(eqn.outputs)


def inner_signs(closed: Any, inputs: list[Sign]) -> list[Sign]:
    graph = graph_of(closed)
    outs = list(graph.outputs.values())
    env: dict[Variable, Sign] = dict(zip(graph.inputs.values(), inputs, strict=True))
    run(asked(graph.slice(outs), outs, env), env)
    return [look_up(o, env) for o in outs]


def signs_of_scan(eqn: Equation, inputs: list[Sign]) -> list[Sign]:
    """What is carried is not negative if it begins so and every step keeps it so; supposed, then tried."""
    fixed, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    consts, begin, xs = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
    carry: list[Sign] = [is_nonnegative(i) for i in begin]
    each: list[Sign] = [is_nonnegative(x) for x in xs]
    while True:
        out = [is_nonnegative(o) for o in inner_signs(eqn.params["jaxpr"], [*consts, *carry, *each])]
        after: list[Sign] = [bool(a and b) for a, b in zip(carry, out, strict=False)]
        if after == carry:
            return [*carry, *out[carried:]]
        carry = after


def refuse_curved(function: Callable[[Array], Array], at: Array) -> None:
    """Check that a function of a float array is affine, whatever JAX code it is made of.

    Its transposed derivative is traced with the point as an input: the function is affine if that input goes unused.

    Raises:
        Declined: it is not affine, or JAX cannot transpose its derivative.
    """

    def slope(x: Array, cotangent: Array) -> Array:
        return jax.vjp(function, x)[1](cotangent)[0]

    try:
        out = jax.eval_shape(function, at)
        closed = jax.make_jaxpr(slope)(at, jnp.zeros(out.shape, out.dtype))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise Declined(f"JAX cannot transpose it ({str(error).splitlines()[0]})") from None
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True])
    if used[0]:
        raise Declined("the rate is not linear in it")

"""Is a value of a graph affine in one of its inputs, whatever the other inputs are?

In: a graph, one of its outputs and an input. Out: yes, or no where it is not or cannot be told. Every equation on the
way has to be linear in what it gets of the input. What only asks whether a number is finite is taken to be told that it
is: so densities guard themselves against values outside of their support.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from autoem.graph.jaxpr import WITH_RULES, Atom, Constant, Equation, Graph, Key, Variable, graph_of

LINEAR = {
    "add", "sub", "add_any", "neg", "reduce_sum", "cumsum", "reshape", "broadcast_in_dim", "transpose", "squeeze",
    "expand_dims", "slice", "concatenate", "pad", "rev", "copy", "copy_p", "convert_element_type", "reduce_precision",
    "split", "stack", "unstack", "tile", "real", "imag", "complex", "conj", "fft", "reduce_window_sum",
}  # fmt: skip
PRODUCTS = {"mul", "dot_general", "conv_general_dilated", "bcoo_dot_general"}  # linear in one factor, the other known
ONLY = {  # linear in these operands, the others known
    "div": (0,),
    "triangular_solve": (1,),
    "gather": (0,),
    "dynamic_slice": (0,),
    "scatter-add": (0, 2),
    "scatter_add": (0, 2),
    "scatter": (0, 2),
    "dynamic_update_slice": (0, 1),
}


class Curved(Exception):
    """A value is not affine in the input, or not known to be."""


def is_affine(graph: Graph, output: Key, source: Key) -> bool:
    """Whether the output `output` is affine in the input `source`."""
    atom = graph.outputs[output]
    try:
        moving({graph.inputs[source]}, graph.slice([atom]))
    except Curved:
        return False
    return True


def moving(start: Iterable[Variable], equations: Sequence[Equation]) -> set[Variable]:
    """All variables that move with those of `start`, each of them affinely.

    Raises:
        Curved: one of them does not.
    """
    found = set(start)
    for eqn in equations:
        which = [i for i, a in enumerate(eqn.inputs) if isinstance(a, Variable) and a in found]
        if which and not asks_if_finite(eqn):
            found.update(v for v, moves in zip(eqn.outputs, images(eqn, which), strict=True) if moves)
    return found


def images(eqn: Equation, which: Sequence[int]) -> list[bool]:
    """Which outputs of an equation move with its inputs `which`."""
    name, every = eqn.primitive.name, [True] * len(eqn.outputs)
    if name == "scan":
        return through_scan(eqn, which)
    if name == "custom_linear_solve":
        known = sum(eqn.params["const_lengths"])
        return every if min(which) >= known else curved(name)
    if name in WITH_RULES:
        return within(eqn.params.get("call_jaxpr", eqn.params.get("jaxpr")), which)
    if name in LINEAR or (name in PRODUCTS and len(which) == 1):
        return every
    if name == "select_n" and 0 not in which:
        return every
    if name in ONLY and set(which) <= set(ONLY[name]):
        return every
    return curved(name)


def curved(name: str) -> list[bool]:
    raise Curved(name)


def within(closed, which: Sequence[int]) -> list[bool]:
    """The same of what a call runs."""
    inner = graph_of(closed)
    sources = [inner.inputs["in", i] for i in which]
    found = moving(sources, inner.slice(inner.outputs.values()))
    return [isinstance(a, Variable) and a in found for a in inner.outputs.values()]


def through_scan(eqn: Equation, which: Sequence[int]) -> list[bool]:
    """The same of a loop, in which what moves may come to be carried."""
    consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    inputs = set(which)
    while True:
        out = within(eqn.params["jaxpr"], sorted(inputs))
        more = {consts + i for i, moves in enumerate(out[:carried]) if moves} - inputs
        if not more:
            return [moves or consts + i in inputs for i, moves in enumerate(out[:carried])] + out[carried:]
        inputs |= more


def asks_if_finite(eqn: Equation) -> bool:
    """Whether an equation asks whether a number is one, and is finite."""
    if eqn.primitive.name == "is_finite":
        return True
    if len(eqn.inputs) != 2 or eqn.primitive.name not in ("eq", "ne"):
        return False
    a, b = eqn.inputs
    return a is b if eqn.primitive.name == "eq" else is_infinite(a) or is_infinite(b)


def is_infinite(atom: Atom) -> bool:
    """Whether an atom is infinity, in the program's text."""
    return isinstance(atom, Constant) and np.ndim(atom.value) == 0 and bool(np.isinf(np.asarray(atom.value)))

"""How a parameter enters an argument: an interpreter of the model's data flow that answers in a closed-form algebra.

In: a graph, one of its atoms, and for each target parameter a symbolic start (`Linear` for a real parameter, `Monomial`
for a probability or a positive one). Out: the atom as a `Linear` function of the targets, or as a `Monomial`, whose
logarithm is linear in the logarithms of the targets and of one minus them; or `Declined`, with the reason that the plan
prints.

The interpreter both classifies and evaluates, so what the plan says of a link is what the M-step differentiates:
expected counts flow back to the parameters through the transpose of the linear map that it returns. It runs inside
`vmap` over latent states and never looks at numbers that the data could change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from autoem.graph.jaxpr import Atom, Equation, Graph, Variable, graph_of
from autoem.graph.rules import Rules
from autoem.passes import link_arithmetic, link_copies
from autoem.passes.forms import Declined, Known, Linear, Monomial, Value
from autoem.passes.switches import marked, switch_of

RULES = Rules({**link_copies.RULES, **link_arithmetic.RULES})
UNIFORM = {  # copies of one number stay copies of one number
    "stack", "concatenate", "tile", "broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "transpose",
    "copy", "copy_p", "expand_dims",
}  # fmt: skip


def interpret(
    graph: Graph,
    atom: Atom,
    targets: Mapping[Any, Value],
    values: Mapping[Any, Any],
    switches: Collection[Any] = (),
) -> Value:
    """`atom` as a function of the `targets`, every other input standing at its value in `values`.

    Of the inputs `switches` it is known that they are 0 or 1.

    Raises:
        Declined: a target enters in a way that the algebra does not hold.
    """
    env: dict[Variable, Value] = {}
    for key, var in graph.inputs.items():
        if key in targets:
            env[var] = targets[key]
        elif key in values:
            env[var] = Known(values[key], switch=switch_of(values[key], var, key in switches))
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


def run(equations: list[Equation], env: dict[Variable, Value]) -> None:
    """Interpret `equations` in order."""
    for eqn in equations:
        inputs = [look_up(a, env) for a in eqn.inputs]
        known = [i for i in inputs if isinstance(i, Known)]
        if len(known) == len(inputs):
            out = eqn.apply([i.value for i in known])
            entries = {i.uniform for i in known}
            same = eqn.primitive.name in UNIFORM or (eqn.primitive.name == "mul" and entries == {1.0})
            uniform = known[0].uniform if same and len(entries) == 1 else None
            env.update(zip(eqn.outputs, marked(eqn, known, [Known(o, uniform) for o in out]), strict=True))
            continue
        if eqn.primitive.name in ("ne", "eq") and eqn.inputs[0] is eqn.inputs[1]:  # whether it is a number at all
            env[eqn.outputs[0]] = Known(jnp.full(eqn.outputs[0].shape, eqn.primitive.name == "eq"))
            continue
        apply = RULES.get(eqn.primitive.name)
        if apply is None:
            raise Declined(f"it passes through `{eqn.primitive.name}`")
        out = apply(eqn, inputs)
        env.update(zip(eqn.outputs, out if isinstance(out, list) else [out], strict=True))


@RULES.of("custom_jvp_call", "custom_vjp_call")
def _call(eqn, inputs):
    inner = graph_of(eqn.params["call_jaxpr"])
    outs = inner.outputs.values()
    env: dict[Variable, Value] = dict(zip(inner.inputs.values(), inputs, strict=True))
    run(inner.slice(outs), env)
    return [look_up(o, env) for o in outs]


__all__ = ["Declined", "Known", "Linear", "Monomial", "Value", "interpret", "look_up", "run"]

"""What a graph computes from numbers alone: found, computed once, and left out of what is computed over and over.

In: a graph, and the values of some of its inputs at every step of a scan. Out: the values of whatever depends on these
alone, told apart by whether they are the same at all steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from autoem.graph.jaxpr import Constant, Graph, Variable


def only_of(graph: Graph, key: tuple, known: set) -> bool:
    """Whether an output is computed from the inputs `known` and numbers in the model's text alone."""
    atoms = [graph.outputs[key]]
    for eqn in graph.slice(atoms):
        atoms += eqn.inputs
    constants = [a.value for a in atoms if isinstance(a, Constant)]
    return graph.needs(key) <= known and not any(isinstance(c, Tracer) for c in constants)


def folded(graph: Graph, atoms: Sequence[Any], counted: Mapping) -> tuple[dict, dict]:
    """Values of the graph that depend on `counted` alone: those that are the same at all steps, and the others."""
    sources = {graph.inputs[k]: v for k, v in counted.items()}
    known, edge = set(sources), set()
    for eqn in graph.slice(atoms):
        variables = [a for a in eqn.inputs if isinstance(a, Variable)]
        numbers = not any(isinstance(a, Constant) and isinstance(a.value, Tracer) for a in eqn.inputs)
        if variables and numbers and known.issuperset(variables):
            known.update(eqn.outputs)
        else:
            edge.update(known.intersection(variables))
    edge.update(known.intersection(a for a in atoms if isinstance(a, Variable)))
    order = list(edge)
    if not order:
        return {}, {}
    with jax.ensure_compile_time_eval():
        names = list(counted)
        values = jax.vmap(lambda *c: graph.evaluate_atoms(order, dict(zip(names, c, strict=True))))(
            *(jnp.asarray(counted[n]) for n in names)
        )
    values = [np.asarray(v) for v in values]
    same = {a: jnp.asarray(v[0]) for a, v in zip(order, values, strict=True) if (v == v[:1]).all()}
    return same, {a: jnp.asarray(v) for a, v in zip(order, values, strict=True) if a not in same}


def reads(graph: Graph, atom: Any, given: set) -> tuple[frozenset, set]:
    """Inputs, and variables among `given`, that an atom is computed from where those are given."""
    read = {atom} if isinstance(atom, Variable) else set()
    for eqn in graph.slice([atom], given):
        read.update(a for a in eqn.inputs if isinstance(a, Variable))
    return frozenset(k for k, v in graph.inputs.items() if v in read - given), read & given


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of a value or of a placeholder."""
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def dtype_of(graph: Graph, key: tuple) -> Any:
    """Type of an output."""
    atom = graph.outputs[key]
    return (getattr(atom, "aval", None) and atom.aval.dtype) or jnp.result_type(atom.value)  # type: ignore[union-attr]

"""Lookups by a latent, `loc[z]`, read at all of its states at once: what they look up, row by row.

In: a graph, an output and the latents that it is tabulated over. Out: for each lookup by one latent alone, the rows
that its states read. No index is left then, whose derivative adds entry by entry; and states that run from zero to the
end read the array as it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.graph.jaxpr import Atom, Constant, Equation, Graph, Variable, fills
from autoem.graph.on_host import HOST
from autoem.ir import Latent

RESHAPES = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy")  # of one number, which stays that number


@dataclasses.dataclass(frozen=True, eq=False)
class Selected:
    """`output = operand[index]`, where `index` holds an entry for each state of the latent of that number."""

    output: Variable
    operand: Atom
    axis: int
    index: np.ndarray
    latent: int

    def rows(self, graph: Graph, values: Mapping[Any, Any]) -> Array:
        """What the states read, `(states, *shape of the output)`."""
        array = jnp.moveaxis(jnp.asarray(graph.evaluate_atoms([self.operand], values)[0]), self.axis, 0)
        if len(self.index) != len(array) or (self.index != np.arange(len(array))).any():
            array = array[self.index]
        return array.reshape(len(self.index), *self.output.shape)


def selected(graph: Graph, output: tuple, latents: Sequence[Latent]) -> tuple[Selected, ...]:
    """The lookups that an output needs by one of the `latents`, of an array that none has a part in."""
    key = "selected", output, tuple(z.name for z in latents)
    if key not in graph.known:
        graph.known[key] = find(graph, output, latents)
    return graph.known[key]


def find(graph: Graph, output: tuple, latents: Sequence[Latent]) -> tuple[Selected, ...]:
    names = {("latent", z.name): i for i, z in enumerate(latents)}
    out = []
    for equation in graph.slice([graph.outputs[output]]):
        if equation.primitive.name != "gather" or not whole_rows(equation):
            continue
        operand, index = equation.inputs
        read = graph.needs_of([index])
        number = names.get(next(iter(read))) if len(read) == 1 else None
        if number is None or any(k[0] == "latent" for k in graph.needs_of([operand])):
            continue
        at = by_state(graph, index, np.asarray(latents[number].states))
        if at is not None:
            axis = int(equation.params["dimension_numbers"].start_index_map[0])
            last = np.shape(operand.value if isinstance(operand, Constant) else operand)[axis] - 1
            out.append(Selected(equation.outputs[0], operand, axis, np.clip(at, 0, last), number))
    return tuple(out)


def whole_rows(equation: Equation) -> bool:
    """Whether one index tells one entry along one axis, and everything along the others is read."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    operand, index = (np.shape(a.value if isinstance(a, Constant) else a) for a in equation.inputs)
    plain = len(numbers.start_index_map) == 1 and numbers.collapsed_slice_dims == numbers.start_index_map
    if not plain or fills(equation.params):
        return False
    axis = numbers.start_index_map[0]
    others = [d for d in range(len(operand)) if d != axis]
    return np.prod(index, dtype=int) == 1 and all(sizes[d] == operand[d] for d in others)


def by_state(graph: Graph, atom: Atom, states: np.ndarray) -> np.ndarray | None:
    """An index at every state, all that it is computed from being single numbers; None where it is not."""
    known: dict[Variable, np.ndarray] = {v: states for k, v in graph.inputs.items() if k[0] == "latent"}
    for equation in graph.slice([atom]):
        args = [np.ravel(a.value) if isinstance(a, Constant) else known[a] for a in equation.inputs]
        name, one = equation.primitive.name, np.prod(equation.outputs[0].shape, dtype=int) == 1
        if not one or any(len(a) not in (1, len(states)) for a in args):
            return None
        if name in HOST:
            known[equation.outputs[0]] = HOST[name](*args)
        elif name == "convert_element_type":
            known[equation.outputs[0]] = args[0].astype(equation.params["new_dtype"])
        elif name in RESHAPES and len(args) == 1:
            known[equation.outputs[0]] = args[0]
        else:
            return None
    found = known.get(atom) if isinstance(atom, Variable) else None
    return None if found is None else np.broadcast_to(found, states.shape)

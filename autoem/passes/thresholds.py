"""Does a site read a continuous latent through comparisons alone? Then its density is a step function of it.

In: a classified Program, a site and a latent. Out: the comparisons, each of two sides affine in the latent, whose
thresholds are data; or the reason why the density is no step function.
"""

from __future__ import annotations

import dataclasses

from autoem.graph.jaxpr import Atom, Graph, Variable
from autoem.ir import Program, Site
from autoem.passes.gaussian import affine_atom

COMPARISONS = {"gt", "ge", "lt", "le"}


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """`left > right` (or the like) somewhere in the data flow of a site."""

    site: str
    left: Atom
    right: Atom
    output: Variable


def comparisons(program: Program, site: Site, latent: str) -> tuple[Comparison, ...] | str:
    """The comparisons through which a site reads the latent, or why it does not read it through them alone."""
    graph, key = program.full, ("latent", latent)
    atom, source = graph.outputs[site.name, "elem"], graph.inputs[key]
    varying = {source}
    found = []
    for eqn in graph.slice([atom]):
        if any(a in varying for a in eqn.inputs if isinstance(a, Variable)):
            varying.update(eqn.outputs)
            if eqn.primitive.name in COMPARISONS:
                found.append(Comparison(site.name, eqn.inputs[0], eqn.inputs[1], eqn.outputs[0]))
    cut = [c.output for c in found]
    read = {a for eqn in graph.slice([atom], cut) for a in eqn.inputs if isinstance(a, Variable)}
    if not found or source in read or atom is source:
        return f"it reads '{latent}' otherwise than by comparing it"
    for c in found:
        if why := not_a_threshold(graph, c, latent):
            return why
    return tuple(found)


def not_a_threshold(graph: Graph, c: Comparison, latent: str) -> str:
    """Why a comparison does not tell a threshold of the latent that is fixed by the data, or an empty string."""
    key = ("latent", latent)
    others = [k for k in graph.needs_of([c.left, c.right]) if k != key and k[0] not in ("data", "key")]
    if others:
        return f"a threshold of '{latent}' depends on '{others[0][1]}'"
    for side in (c.left, c.right):
        if key in graph.needs_of([side]) and (why := affine_atom(graph, side, [key])):
            return f"it compares no affine function of '{latent}': {why}"
    return ""

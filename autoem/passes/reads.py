"""Tell apart the reads of one latent at several cells, as by `B[z[source], z[target]]`: one input for each.

In: a graph at full shape, a site, and one of its latents. Out: for each read the cell that every row of the site finds,
and the graph with an input of its own for each read after the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from autoem.graph.cells import NONE, walk
from autoem.graph.jaxpr import Graph, Variable


def alias(name: str, number: int) -> str:
    """The name of a latent at its further reads."""
    return f"{name}·{number}"


def reads_of(
    graph: Graph, site: str, latent: str, shape: tuple[int, ...], values: Mapping[Any, Any]
) -> tuple[Graph, list[np.ndarray]] | None:
    """The graph with its reads apart, and for each the cells `(*rows, ...)` of the site's density that it enters by.

    None where the latent enters otherwise than by equations that each pick cells of it.
    """
    source = graph.inputs["latent", latent]
    atoms = [graph.outputs[k] for k in graph.outputs if k[0] == site]
    picking = [i for i in sorted(graph.reach(atoms)[0]) if source in graph.equations[i].inputs]
    if len(picking) < 2 or any(len(graph.equations[i].outputs) > 1 for i in picking):
        return None
    cells = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    start = np.broadcast_to(cells.reshape(shape + (1,) * (len(source.shape) - len(shape))), source.shape)
    groups: list[tuple[np.ndarray, list[int]]] = []
    for i in picking:
        ids: dict[Variable, np.ndarray] = {source: start}
        walk(graph, [graph.equations[i]], ids, values)
        found = ids[graph.equations[i].outputs[0]]
        near = next((g for g in groups if g[0].shape == found.shape and np.array_equal(g[0], found)), None)
        if near is None:
            groups.append((found, [i]))
        else:
            near[1].append(i)
    equations, inputs = list(graph.equations), dict(graph.inputs)
    for number, (_, members) in enumerate(groups[1:], start=2):
        other = Variable(source.aval)
        inputs["latent", alias(latent, number)] = other
        for i in members:
            swapped = tuple(other if a is source else a for a in equations[i].inputs)
            equations[i] = dataclasses.replace(equations[i], inputs=swapped)
    apart = Graph(inputs, dict(graph.outputs), tuple(equations))
    atom = graph.outputs[site, "elem"]
    rows = []
    for number in range(1, len(groups) + 1):
        name = latent if number == 1 else alias(latent, number)
        ids = {inputs["latent", name]: start}
        walk(apart, apart.slice([atom]), ids, values)
        rows.append(ids.get(atom, np.full(np.shape(atom), NONE)) if isinstance(atom, Variable) else np.full((), NONE))
    return apart, rows

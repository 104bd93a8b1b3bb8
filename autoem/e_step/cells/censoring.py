"""Find the comparisons that cut a latent, and which cell each of their elements belongs to.

In: the factors of one latent. Out: a `Pieces` method with index arrays that stand among the data's cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autoem._errors import PlanError
from autoem.e_step.cells.pieces import BASES, Pieces
from autoem.e_step.tables.tabulate import Factor
from autoem.graph.cells import cells_read
from autoem.ir import Continuous, Program
from autoem.passes.thresholds import Comparison, comparisons


def find_pieces(
    program: Program, members: Sequence[Continuous], factors: Sequence[Factor], values: Mapping[Any, Any]
) -> tuple[Pieces | None, dict[str, np.ndarray]]:
    """The method, where sites read the one latent through comparisons alone; None where none does.

    Raises:
        PlanError: some do, but the integral between thresholds has no formula here.
    """
    if len(members) > 1 or members[0].event:
        return None, {}
    (member,) = members
    asked = {f.name: comparisons(program, f.site, member.name) for f in factors if f.name != member.name}
    found = [c for read in asked.values() if isinstance(read, tuple) for c in read]
    for name, why in asked.items():
        if isinstance(why, str) and not why.startswith("it reads"):
            raise PlanError(name, problem=why, mend="compare the latent itself with data: z > threshold")
    if not found:
        return None, {}
    own = next(f for f in factors if f.name == member.name).site
    if own.distribution not in BASES:
        known = ", ".join(BASES)
        raise PlanError(
            own.name,
            problem=f"'{found[0].site}' cuts it at thresholds, and {own.distribution} has no formula between them",
            mend=f"priors that have one are {known}; or put the log probability of the interval into a numpyro.factor",
        )
    order = {f"{c.site}·threshold{i}": by_cell(program, c, member, values) for i, c in enumerate(found)}
    return Pieces(BASES[own.distribution], tuple(found), tuple(order)), order


def by_cell(program: Program, c: Comparison, member: Continuous, values: Mapping[Any, Any]) -> np.ndarray:
    """Flat numbers of the comparison's elements, `(cells, elements a cell)`."""
    graph = program.full
    states = {("latent", n): np.zeros(v.shape, v.aval.dtype) for (k, n), v in graph.inputs.items() if k == "latent"}
    ids = cells_read(graph, c.output, ("latent", member.name), member.shape, {**states, **values}).ravel()
    cells = int(np.prod(member.shape, dtype=int))
    counts = np.bincount(ids[ids >= 0], minlength=cells)
    if (ids < 0).any() or len(set(counts.tolist())) > 1:
        raise PlanError(
            c.site,
            problem=f"its comparisons with '{member.name}' are not equally many for every cell",
            mend=f"compare every cell of '{member.name}' with its own thresholds",
        )
    return np.argsort(ids, kind="stable").reshape(cells, -1)

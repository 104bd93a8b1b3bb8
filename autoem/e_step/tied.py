"""Gaussian latents of several plates, all of whose cells are tied: in which order they are eliminated.

In: the latents, the sites that read them, and the cells that every row reads. Out: a block with its index arrays, or
None where one small vector is as good.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autoem._errors import Intractable
from autoem.e_step.gaussian.block import index_name
from autoem.e_step.gaussian.crossed import CrossedBlock
from autoem.e_step.gaussian.crossing import MAX_TABLE, find_entries, find_family, table_size
from autoem.e_step.gaussian.levels import cells_of, find_levels
from autoem.e_step.gaussian.nested import NestedBlock
from autoem.e_step.joined import read_by
from autoem.e_step.tables.tabulate import Factor
from autoem.ir import Continuous, Program

MAX_DENSE = 4096  # coordinates of crossed latents, all in one vector
LEVELS_FROM = 64  # coordinates from which levels are eliminated in turn: below, one small matrix is as quick


def nested_block(
    program: Program,
    members: tuple[Continuous, ...],
    parts: tuple[Factor, ...],
    index: Mapping[tuple[str, str], np.ndarray],
) -> tuple[NestedBlock | CrossedBlock | None, dict[str, np.ndarray]]:
    """The latents as levels, eliminated in turn, and the cells of each level's own; None where one vector is as good.

    They nest; or where some cross others, the largest goes with those in which it nests, and the others are one vector.
    """
    read = {f.name: {m.name: index[f.name, m.name] for m in read_by(f)} for f in parts}
    levels, core, found = find_levels(members, read)
    size = sum(m.dim * cells_of(m) for m in members if m.name in core)
    by_name = {f.name: f for f in parts}
    latents = {m.name: m for m in members}
    kept = {index_name(by_name[s], latents[n]): v for (s, n), v in index.items()}
    sizes = {p.name: p.size for p in program.plates.values()}
    if size >= LEVELS_FROM:
        crossing, over = find_family(members, read)
        entries = find_entries(crossing, members, read, over) if crossing.size < size else {}
        if entries and crossing.size <= MAX_DENSE and table_size(crossing, members, entries) <= MAX_TABLE:
            return CrossedBlock(members, parts, sizes, crossing), {**kept, **over, **entries}
    if size > MAX_DENSE:
        raise Intractable(
            core[0],
            latents=tuple(m.name for m in members),
            problem=f"{', '.join(core)} are crossed, so all their cells are tied: one vector of {size:,} coordinates",
            mend="nest the groups, or read them by one index",
        )
    return (NestedBlock(members, parts, sizes, levels, core), {**kept, **found}) if levels else (None, {})

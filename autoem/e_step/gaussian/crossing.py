"""Crossed latents: which are eliminated cell by cell, which are left, and where their cells meet.

In: latents, and for each site the cell of each of them that its rows read. Out: the largest latent with all those in
which it nests, level by level; the core, which is all others; and by level the *entries*: its cells with the
coordinates of the core that they meet, once each, as many as rows at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from autoem.e_step.gaussian.levels import Level, cells_of, one_each
from autoem.ir import Continuous

MAX_PAIRS = 20_000_000  # pairs of entries of a cell that are listed; beyond, a level is a table of cells and core
MAX_TABLE = 1 << 27  # numbers of such a table
PAIR = 30  # products of a table's matrix product that take as long as one pair of a list


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Levels in the order in which they are eliminated, and the latents that are left, with where each begins."""

    levels: tuple[Level, ...]
    core: tuple[str, ...]
    starts: Mapping[str, int]
    size: int


def find_family(members: Sequence[Continuous], read: Mapping[str, Mapping[str, np.ndarray]]):
    """The crossing, and for every level the cells over each of its own."""
    terms: dict[str, Mapping[str, np.ndarray]] = dict(read)
    left = {m.name: m for m in members}
    levels, cells = [], {}
    while left:
        m = max(left.values(), key=lambda m: cells_of(m) * m.dim)
        mine = {t: index for t, index in terms.items() if m.name in index}
        over: dict[str, np.ndarray] = {}
        for n in [n for n in left if n != m.name]:
            met = [{m.name: index[m.name], n: index[n]} for index in mine.values() if n in index]
            found = one_each(m, met)
            if found is None:
                del left[n]
            else:
                over |= found
        order = tuple(n for n in left if n in over)
        level = Level(m.name, order, tuple(mine))
        cells |= {f"{level.key}·{n}": over[n] for n in order}
        levels.append(level)
        terms = {t: index for t, index in terms.items() if t not in mine} | {level.key: {n: over[n] for n in order}}
        del left[m.name]
    core = tuple(m.name for m in members if m.name not in {v.leaf for v in levels})
    sizes = [cells_of(m) * m.dim for m in members if m.name in core]
    starts = dict(zip(core, np.cumsum([0, *sizes])[:-1].tolist(), strict=True))
    return Crossing(tuple(levels), core, starts, sum(sizes)), cells


def positions(m: Continuous, start: int, index: np.ndarray) -> np.ndarray:
    """Coordinates in the core of a latent's cells, `(rows, dim)`."""
    return start + np.ravel(index)[:, None] * m.dim + np.arange(m.dim)


def find_entries(
    crossing: Crossing,
    members: Sequence[Continuous],
    read: Mapping[str, Mapping[str, np.ndarray]],
    over: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Where cells meet: for each level its entries, their place among those of the next, and pairs of them.

    For each of its sites the entries of every row, one for each coordinate of the core that it reads.
    """
    by_name, out = {m.name: m for m in members}, {}
    met: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for level in crossing.levels:
        sources: dict[str, np.ndarray] = {}
        for term in level.absorbed:
            if term in met:
                cell, core = met[term]
                sources[f"{term}·up"] = over[f"{term}·{level.leaf}"][cell] * crossing.size + core
            elif beside := [n for n in read[term] if n in crossing.core]:
                at = [positions(by_name[n], crossing.starts[n], read[term][n]) for n in beside]
                own = np.ravel(read[term][level.leaf])[:, None]
                sources[f"{term}·entry"] = own * crossing.size + np.concatenate(at, 1)
        codes = np.concatenate([np.ravel(s) for s in sources.values()]) if sources else np.zeros(0, int)
        known, inverse = np.unique(codes, return_inverse=True)
        cell, core = known // max(crossing.size, 1), known % max(crossing.size, 1)
        met[level.key] = cell, core
        start = 0
        for name, s in sources.items():
            out[name] = inverse[start : start + s.size].reshape(s.shape).astype(np.int32)
            start += s.size
        out |= {f"{level.key}·cell": cell.astype(np.int32), f"{level.key}·core": core.astype(np.int32)}
        if (found := pairs_of(cell, cells_of(by_name[level.leaf]), crossing.size)) is not None:
            out[f"{level.key}·pairs"] = found
    return out


def pairs_of(cell: np.ndarray, cells: int, core: int) -> np.ndarray | None:
    """All pairs `(2, pairs)` of entries of one cell, each pair once; None where a table is the quicker."""
    counts = np.bincount(cell, minlength=cells)
    total = int((counts * (counts + 1) // 2).sum())
    if total > MAX_PAIRS or total * PAIR > cells * core**2:
        return None
    ends = np.repeat(np.cumsum(counts), counts)
    first = np.arange(len(cell))
    follow = ends - first
    a = np.repeat(first, follow)
    b = a + np.arange(total) - np.repeat(np.cumsum(follow) - follow, follow)
    return np.stack([a, b]).astype(np.int32)


def table_size(crossing: Crossing, members: Sequence[Continuous], entries: Mapping[str, np.ndarray]) -> int:
    """Numbers of the largest table that a level without a list of pairs makes."""
    by_name = {m.name: m for m in members}
    wide = [v for v in crossing.levels if f"{v.key}·pairs" not in entries]
    sizes = [cells_of(by_name[v.leaf]) * crossing.size * sum(by_name[n].dim for n in v.members) for v in wide]
    return max(sizes, default=0)

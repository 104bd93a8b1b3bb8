"""Which continuous latents nest in which: the order in which they are eliminated, level by level.

In: latents, and for each site the cell of each of them that its rows read. Out: the levels, each a latent whose cells
meet one cell of every other latent that is still there; and what is left when there is no such latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from autoem.ir import Continuous


def cells_of(m: Continuous) -> int:
    """Number of cells of a latent."""
    return int(np.prod(m.shape, dtype=int))


@dataclasses.dataclass(frozen=True)
class Level:
    """A latent whose cells each meet one cell of the latents `over`; `absorbed` names the terms that it takes up."""

    leaf: str
    over: tuple[str, ...]
    absorbed: tuple[str, ...]

    @property
    def key(self) -> str:
        """Under what the cells of `over` stand among the data's cells, as far as its latents are named."""
        return f"{self.leaf}·under"

    @property
    def members(self) -> tuple[str, ...]:
        return (self.leaf, *self.over)


def find_levels(
    members: Sequence[Continuous], read: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[tuple[Level, ...], tuple[str, ...], dict[str, np.ndarray]]:
    """The levels, the core, and for every level the cells over each of its own.

    `read` holds for each site the cell of each latent that its rows read. The latent of most coordinates goes first of
    all whose cells meet one cell of each other latent.
    """
    left = {m.name: m for m in members}
    terms: dict[str, Mapping[str, np.ndarray]] = dict(read)
    levels, cells = [], {}
    while left:
        for m in sorted(left.values(), key=lambda m: -cells_of(m) * m.dim):
            mine = {t: index for t, index in terms.items() if m.name in index}
            over = one_each(m, mine.values())
            if over is not None:
                break
        else:
            break
        order = tuple(n for n in left if n in over)
        level = Level(m.name, order, tuple(mine))
        cells.update({f"{level.key}·{n}": over[n] for n in order})
        levels.append(level)
        terms = {t: index for t, index in terms.items() if t not in mine} | {level.key: {n: over[n] for n in order}}
        del left[m.name]
    return tuple(levels), tuple(left), cells


def one_each(m: Continuous, terms: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray] | None:
    """The cell of each other latent that every cell of a latent meets; None where one meets several."""
    over: dict[str, np.ndarray] = {}
    for index in terms:
        own = np.ravel(index[m.name])
        for n, other in index.items():
            if n == m.name:
                continue
            flat = np.broadcast_to(other, np.shape(index[m.name])).ravel()
            known = over.setdefault(n, np.full(cells_of(m), -1))
            fresh = known.copy()
            fresh[own] = flat
            if (fresh[own] != flat).any() or ((known >= 0) & (known != fresh)).any():
                return None
            over[n] = fresh
    return {n: np.where(v < 0, 0, v) for n, v in over.items()}

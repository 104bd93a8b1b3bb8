"""Which cells of a continuous latent do rows read? Where a row reads several, those are to be one cell's coordinates.

In: a factor, one of its latents and the data. Out: for every row the number of a cell, or `Joined`, which names the
axes of the latent along which the cells lie that a row reads; the model is then read again, with those in its event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autoem._errors import Intractable, ModelError
from autoem.e_step.tables.factors import row_cells
from autoem.e_step.tables.tabulate import Factor
from autoem.ir import Continuous, Program


class Joined(Exception):
    """A row reads several cells of a latent at once: the axes along which they lie are to be coordinates of a cell."""

    def __init__(self, name: str, axes: frozenset[str]):
        super().__init__(name)
        self.name, self.axes = name, axes


def join_companions(program: Program, members: Sequence[Continuous], factors: Sequence[Factor]) -> None:
    """Raise `Joined` where a plate is among one latent's coordinates, and one beside it has a cell for each of it.

    A mean for each coordinate is then one vector as well, and the latent's cells nest in it.
    """
    every = program.every_continuous
    own = [(every[f.name], f.site.plates) for f in factors if f.name in every]
    inner = {p for m, plates in own if m.plates for p in plates if p not in m.axes}
    for m in members:
        if axes := inner & set(m.axes):
            raise Joined(m.name, frozenset(axes))


def read_by(f: Factor) -> tuple[Continuous, ...]:
    assert f.completions is not None
    return f.completions.members


def fits(member: Continuous, f: Factor) -> bool:
    """Whether a factor has all plates of a latent, in its order."""
    return [p for p in f.site.plates if p in member.plates] == list(member.plates)


def agree(index: Mapping[tuple[str, str], np.ndarray], f: Factor) -> bool:
    """Whether the rows of a factor read all its latents in the same cell."""
    found = [v for (s, _), v in index.items() if s == f.name]
    return all(np.array_equal(found[0], v) for v in found[1:])


def mixed_axes(
    program: Program, f: Factor, member: Continuous, values: Mapping[Any, Any], field: str, events: int
) -> frozenset[str]:
    """The axes of a latent along which some row reads several of its cells; all of them where none can be told."""
    found = set()
    for i, axis in enumerate(member.axes):
        try:
            row_cells(program, f.site, member, values, field, events, along=i)
        except ModelError:
            found.add(axis)
    return frozenset(found or member.axes)


def joined_at(program: Program, f: Factor, member: Continuous, axes: frozenset[str]) -> Joined | Intractable:
    """What to raise where a row reads several cells: a scan's steps cannot be coordinates of one."""
    base = program.base_of(member.name)
    if program.chain_of(base) is None:
        return Joined(member.name, axes)
    return Intractable(
        f.name,
        latents=(base,),
        problem=f"a row reads several steps of '{base}' at once, or its cells at them by index",
        mend=f"let the step read '{base}' as it runs, or carry what is to be read of it and read the last step's",
    )


def cells_of_rows(
    program: Program, f: Factor, member: Continuous, values: Mapping[Any, Any], by_mean: bool = False
) -> np.ndarray:
    """For each row of the factor's plates, the flat number of the latent's cell that it reads.

    With `by_mean` it reads it in its mean alone, which tells rows apart where a multivariate density mixes them.
    """
    sizes = dict(zip(f.site.axes, f.site.shape, strict=True))
    if f.name == member.name or (program.chain_of(program.base_of(member.name)) and fits(member, f)):
        ids = np.arange(int(np.prod(member.shape, dtype=int)))
        ids = ids.reshape([s for a, s in zip(member.axes, member.shape, strict=True) if not a.startswith("#")])
        ids = ids[tuple(slice(None) if p in member.plates else None for p in f.site.plates)]
        return np.broadcast_to(ids, [sizes[p] for p in f.site.plates])
    how = ("arg:loc", f._family.event_dim) if by_mean else ("elem", 0)
    try:
        ids = row_cells(program, f.site, member, values, *how)
    except ModelError:
        raise joined_at(program, f, member, mixed_axes(program, f, member, values, *how)) from None
    first = [0 if a.startswith("#") else slice(None) for a in f.site.axes]
    return ids[tuple(first)]

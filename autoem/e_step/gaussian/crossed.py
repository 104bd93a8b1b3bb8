r"""Gaussian latents that are crossed: students and items, eliminated cell by cell where they do not touch each other.

The cells of a leaf are tied through others alone: each meets one cell of the latents over it, with coordinates `v`, and
any number of coordinates `w` of the core. Where `u` are its own, with precision `A`, shift `g` and the terms `B` that
tie them to `w`, its elimination leaves to the core

.. math:: -\tfrac12 w^\top \bigl(C - B^\top A^{-1} B\bigr) w + \bigl(h - B^\top A^{-1} g\bigr)^\top w,

and in the same way a term of the next level. `B` has an entry for each coordinate that the cell meets, so cost and
memory are linear in rows and in pairs of entries of a cell, with the cube of the core. Backwards, the covariance of the
core gives that of each cell with what it meets, and with it that of the cell.

In: the factors of such a group, the cells that every row reads, and where they meet. Out: as for `gaussian`.

References:
    Bates, Maechler, Bolker and Walker 2015, "Fitting linear mixed-effects models using lme4", section 3; Harville 1977.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.elimination.layout import Table
from autoem.e_step.gaussian import kalman
from autoem.e_step.gaussian.block import index_name
from autoem.e_step.gaussian.crossing import Crossing
from autoem.e_step.gaussian.levels import Level, cells_of
from autoem.e_step.gaussian.quadratic import LOG_2PI, described, residuals
from autoem.e_step.gaussian.whole import AbstractWhole, Term, at_home, from_law, solved
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named
from autoem.ir import Continuous

NOTHING = Crossing((), (), {}, 0)


class Eliminated(NamedTuple):
    """A level: the law of its cells given those over them, and by entry how the core moves a cell's mean."""

    law: kalman.Given
    pull: Array


class Met(NamedTuple):
    """Moments of a level: of a cell with those over it, and by entry its covariance with the core's coordinate."""

    mean: Array
    covariance: Array
    cross: Array


class CrossedMoments(NamedTuple):
    """By level what was eliminated and its moments; mean and covariance of the core, and where levels meet."""

    levels: tuple[Eliminated, ...]
    met: tuple[Met, ...]
    core: kalman.Given
    cells: Mapping[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class CrossedBlock(AbstractWhole):
    """Continuous latents of several plates that cross: levels, and the core that is left."""

    crossing: Crossing = NOTHING

    source = "Bates et al. 2015, section 3; Harville 1977 (Gaussian posteriors of crossed effects)"

    def level_of(self, term: str) -> Level | None:
        """The level that takes a term up; None where the core does."""
        return next((v for v in self.crossing.levels if term in v.absorbed), None)

    def places(self, names: Sequence[str], whole: Sequence[str]) -> dict[str, np.ndarray]:
        """Coordinates of one cell of each of the latents `names` among those of `whole`."""
        dims = {n: self.by_name[n].dim for n in whole}
        start = dict(zip(whole, np.cumsum([0, *dims.values()])[:-1].tolist(), strict=True))
        return {n: start[n] + np.arange(dims[n]) for n in names}

    def split(self, names: Sequence[str], level: Level | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of what a term reads: coordinates held by a level, where they stand there, and coordinates of the core."""
        every, beside = self.places(names, names), self.beside(names)
        held = [n for n in names if level and n not in beside]
        there = self.places(held, level.members) if level else {}
        return joined(every, held), joined(there, held), joined(every, beside)

    def beside(self, names: Sequence[str]) -> list[str]:
        """Those of the latents that are of the core."""
        return [n for n in names if n in self.crossing.core]

    def coordinates(self, f: Factor, cells: Mapping[str, Array]) -> Array:
        """Coordinates of the core that every row of a factor reads, `(rows, count)`."""
        parts = []
        for n in self.beside(self.read(f)):
            m = self.by_name[n]
            index = cells[index_name(f, m)].ravel()
            parts.append(self.crossing.starts[n] + index[:, None] * m.dim + np.arange(m.dim))
        return jnp.concatenate(parts, 1) if parts else jnp.zeros((1, 0), int)

    def integrate(self, values: Mapping[Any, Any], rows: Mapping[str, Rows], cells: Mapping[str, Array]):
        """`(table, moments)`: the integral over the latents, and their posterior."""
        real = jnp.result_type(float)
        core = jnp.zeros((self.crossing.size + 1,) * 2, real)
        home = {v.key: self.empty(v, cells) for v in self.crossing.levels}
        value = jnp.zeros((), real)
        for f, r in residuals(self.factors, values, rows):
            term, constant = self.term(f, r, cells)
            level, value = self.level_of(f.name), value + constant
            core = self.to_core(core, f, term, cells)
            if level:
                home[level.key] = self.to_level(home[level.key], f, term, level, cells)
        done = []
        for level in self.crossing.levels:
            matrix, ties = home[level.key]
            law, left, log_det = kalman.sweep(matrix, self.by_name[level.leaf].dim)
            count = cells_of(self.by_name[level.leaf]) * self.by_name[level.leaf].dim
            value = value - 0.5 * (left[:, -1, -1] + log_det).sum() + 0.5 * count * LOG_2PI
            pull, ties = pulled(law, ties, cells[f"{level.key}·cell"])
            core = self.less(core, level, law, pull, ties[0], cells)
            done.append(Eliminated(law, pull))
            if (onto := self.level_of(level.key)) is not None:
                home[onto.key] = self.passed_on(home[onto.key], level, onto, left, ties[1], cells)
        known, more = solved(core[:-1, :-1], core[:-1, -1])
        met = self.backwards(done, known, cells)
        return Table(Named(value + more, ()), frozenset(), frozenset()), CrossedMoments(tuple(done), met, known, cells)

    def empty(self, level: Level, cells: Mapping[str, Array]) -> tuple[Array, Array]:
        """Augmented quadratics of a level's cells, and of its entries the terms that tie both: all zero."""
        size, real = sum(self.by_name[n].dim for n in level.members), jnp.result_type(float)
        entries = len(cells[f"{level.key}·cell"])
        return jnp.zeros((cells_of(self.by_name[level.leaf]), size + 1, size + 1), real), jnp.zeros(
            (entries, size), real
        )

    def to_core(self, core: Array, f: Factor, term: Term, cells: Mapping[str, Array]) -> Array:
        """The core's augmented quadratic with what a factor's rows add to it."""
        _, _, beside = self.split(self.read(f), None)
        if not len(beside):
            return core
        at, last = self.coordinates(f, cells), len(core) - 1
        core = core.at[at[:, :, None], at[:, None, :]].add(term.precision[:, beside[:, None], beside])
        shift = term.shift[:, beside]
        return core.at[at, last].add(shift).at[last, at].add(shift)

    def to_level(self, home: tuple[Array, Array], f: Factor, term: Term, level: Level, cells: Mapping[str, Array]):
        """A level's quadratics and ties with what a factor's rows add to them."""
        matrix, ties = home
        mine, where, beside = self.split(self.read(f), level)
        size, count = matrix.shape[-1] - 1, len(matrix)
        own = term.precision[:, mine[:, None], mine], term.shift[:, mine]
        p, s = (at_home(v, term.cells[level.leaf], count) for v in own)
        rows = kalman.augmented(p, s, jnp.zeros(count, matrix.dtype))
        place = np.append(where, size)
        matrix = matrix.at[:, place[:, None], place[None, :]].add(rows)
        if len(beside):
            entry = cells[f"{f.name}·entry"]
            across = term.precision[:, beside[:, None], mine]  # (rows or 1, core, level)
            across = jnp.broadcast_to(across, (*entry.shape, len(mine)))
            ties = ties.at[entry[:, :, None], where].add(across)
        return matrix, ties

    def less(self, core: Array, level: Level, law: kalman.Given, pull: Array, ties: Array, cells) -> Array:
        """The core's quadratic without what a level's elimination takes from it; `ties` are those of the cells' own."""
        cell, at, last = cells[f"{level.key}·cell"], cells[f"{level.key}·core"], len(core) - 1
        moved = -(ties * law.shift[cell]).sum(-1)
        core = core.at[at, last].add(moved).at[last, at].add(moved)
        if (pairs := cells.get(f"{level.key}·pairs")) is not None:
            a, b = pairs
            upper = jnp.zeros_like(core).at[at[a], at[b]].add((ties[a] * pull[b]).sum(-1))
            return core - upper - upper.T + jnp.diag(jnp.diagonal(upper))
        one, two = (self.table(level, v, cells) for v in (ties, pull))
        return core.at[:last, :last].add(-jnp.tensordot(one, two, ((0, 2), (0, 2))))

    def table(self, level: Level, entries: Array, cells: Mapping[str, Array]) -> Array:
        """Entries as a table of cells and coordinates of the core."""
        shape = (cells_of(self.by_name[level.leaf]), self.crossing.size, entries.shape[-1])
        return jnp.zeros(shape, entries.dtype).at[cells[f"{level.key}·cell"], cells[f"{level.key}·core"]].set(entries)

    def passed_on(self, home: tuple[Array, Array], level: Level, onto: Level, left: Array, ties: Array, cells):
        """The next level's quadratics and ties with what is left of a level."""
        matrix, known = home
        place = joined(self.places(level.over, onto.members), level.over)
        up = cells[f"{level.key}·{onto.leaf}"]
        where = np.append(place, matrix.shape[-1] - 1)
        clear = left.at[:, -1, -1].set(0.0)
        rows = jax.ops.segment_sum(clear, up, len(matrix))
        matrix = matrix.at[:, where[:, None], where[None, :]].add(rows)
        return matrix, known.at[cells[f"{level.key}·up"][:, None], place].add(ties)

    def backwards(self, done: Sequence[Eliminated], core: kalman.Given, cells: Mapping[str, Array]) -> tuple[Met, ...]:
        """Moments of every level, the last that was eliminated first."""
        met: dict[str, Met] = {}
        for level, one in reversed(list(zip(self.crossing.levels, done, strict=True))):
            cell, at = cells[f"{level.key}·cell"], cells[f"{level.key}·core"]
            mean, covariance, cross = self.over(level, met, cells)
            slope, count = one.law.slope, len(one.law.shift)
            touched = jax.ops.segment_sum(one.pull * core.shift[at][:, None], cell, count)
            own = one.law.shift - kalman.times(slope, mean) - touched
            through = self.through(level, one.pull, core.spread, cells)
            tied = -jnp.einsum("eij,ej->ei", slope[cell], cross) - through
            beside = -slope @ covariance - jax.ops.segment_sum(one.pull[:, :, None] * cross[:, None, :], cell, count)
            itself = one.law.spread - beside @ jnp.swapaxes(slope, -1, -2)
            itself = itself - jax.ops.segment_sum(tied[:, :, None] * one.pull[:, None, :], cell, count)
            top = jnp.concatenate([itself, beside], -1)
            bottom = jnp.concatenate([jnp.swapaxes(beside, -1, -2), covariance], -1)
            whole = jnp.concatenate([own, mean], -1), jnp.concatenate([top, bottom], -2)
            met[level.key] = Met(*whole, jnp.concatenate([tied, cross], -1))
        return tuple(met[v.key] for v in self.crossing.levels)

    def through(self, level: Level, pull: Array, spread: Array, cells: Mapping[str, Array]) -> Array:
        """By entry, the sum over the entries of its cell of their pull, times the core's covariance of the two."""
        at = cells[f"{level.key}·core"]
        if (pairs := cells.get(f"{level.key}·pairs")) is not None:
            a, b = pairs
            both = spread[at[a], at[b]][:, None]
            out = jnp.zeros_like(pull).at[b].add(pull[a] * both)
            return out.at[a].add(jnp.where((a == b)[:, None], 0, pull[b] * both))
        whole = jnp.einsum("ncd,ck->nkd", self.table(level, pull, cells), spread)
        return whole[cells[f"{level.key}·cell"], at]

    def over(self, level: Level, met: Mapping[str, Met], cells: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        """Mean and covariance of what stands over a level's cells, and by entry its covariance with the core."""
        onto, count = self.level_of(level.key), cells_of(self.by_name[level.leaf])
        real, entries = jnp.result_type(float), len(cells[f"{level.key}·cell"])
        if onto is None:
            return jnp.zeros((count, 0), real), jnp.zeros((count, 0, 0), real), jnp.zeros((entries, 0), real)
        place = joined(self.places(level.over, onto.members), level.over)
        known, up = met[onto.key], cells[f"{level.key}·{onto.leaf}"]
        cross = known.cross[cells[f"{level.key}·up"]] if entries else jnp.zeros((0, known.cross.shape[-1]), real)
        return known.mean[up][:, place], known.covariance[up][:, place[:, None], place], cross[:, place]

    def gathered(self, f: Factor, moments: CrossedMoments, cells: Mapping[str, Array]) -> tuple[Array, Array]:
        """Mean `(rows, d)` and covariance of the latents that the rows of a factor read."""
        level = self.level_of(f.name)
        mine, where, beside = self.split(self.read(f), level)
        core, at = moments.core, self.coordinates(f, cells)
        order = np.argsort(np.concatenate([mine, beside]))
        if level is None:
            mean, covariance = core.shift[at], core.spread[at[:, :, None], at[:, None, :]]
            return mean[:, order], covariance[:, order[:, None], order]
        known, index = moments.met[self.crossing.levels.index(level)], cells[index_name(f, self.by_name[level.leaf])]
        index = index.ravel()
        mean, covariance = known.mean[index][:, where], known.covariance[index][:, where[:, None], where]
        if len(beside):
            tied = known.cross[cells[f"{f.name}·entry"]][:, :, where]
            mean = jnp.concatenate([mean, core.shift[at]], -1)
            top = jnp.concatenate([covariance, jnp.swapaxes(tied, -1, -2)], -1)
            bottom = jnp.concatenate([tied, core.spread[at[:, :, None], at[:, None, :]]], -1)
            covariance = jnp.concatenate([top, bottom], -2)
        return mean[:, order], covariance[:, order[:, None], order]

    def marginal(self, m: Continuous, moments: CrossedMoments) -> tuple[Array, Array]:
        """Mean `(*shape, *event)` and covariance `(*shape, dim, dim)` of one latent in every of its cells."""
        i = next((i for i, v in enumerate(self.crossing.levels) if v.leaf == m.name), None)
        if i is None:
            at = self.crossing.starts[m.name] + np.arange(cells_of(m) * m.dim).reshape(-1, m.dim)
            mean, covariance = moments.core.shift[at], moments.core.spread[at[:, :, None], at[:, None, :]]
        else:
            mean, covariance = moments.met[i].mean[:, : m.dim], moments.met[i].covariance[:, : m.dim, : m.dim]
        return mean.reshape(*m.shape, *m.event), covariance.reshape(*m.shape, m.dim, m.dim)

    def draw(self, moments: CrossedMoments, chosen: Mapping[str, Array], key: Array | None) -> dict[str, Array]:
        """Values of the latents: drawn with `key`, or their mean without."""
        del chosen
        if key is None:
            return {m.name: self.marginal(m, moments)[0] for m in self.members}
        keys, cells, found = jax.random.split(key, len(moments.levels) + 1), moments.cells, {}
        core = from_law(moments.core, jnp.zeros(0), keys[-1])
        for n, start in self.crossing.starts.items():
            m = self.by_name[n]
            found[n] = core[start : start + cells_of(m) * m.dim].reshape(-1, m.dim)
        for i, level in reversed(list(enumerate(self.crossing.levels))):
            law, pull = moments.levels[i]
            touched = pull * core[cells[f"{level.key}·core"]][:, None]
            moved = jax.ops.segment_sum(touched, cells[f"{level.key}·cell"], len(law.shift))
            over = [found[n][cells[f"{level.key}·{n}"]] for n in level.over]
            rest = jnp.concatenate(over, -1) if over else jnp.zeros((len(law.shift), 0), law.shift.dtype)
            found[level.leaf] = from_law(law._replace(shift=law.shift - moved), rest, keys[i])
        return {m.name: found[m.name].reshape(*m.shape, *m.event) for m in self.members}

    def reason(self, m: Continuous) -> str:
        """How the latent is treated, in words."""
        reason = f"{described(m)}; {cells_of(m):,} cells of {m.dim} dimension{'s' * (m.dim > 1)}"
        level, core = next((v for v in self.crossing.levels if v.leaf == m.name), None), ", ".join(self.crossing.core)
        if level is None:
            largest = self.crossing.levels[0].leaf
            return f"{reason}; crossed with {largest}: the cells of {core} are one vector of {self.crossing.size:,}"
        over = f", each under one of {', '.join(level.over)}" if level.over else ""
        return f"{reason}; crossed with {core}, and eliminated cell by cell{over}"


def joined(places: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Positions of several latents' coordinates, in order."""
    return np.concatenate([np.zeros(0, int), *(places[n] for n in names)])


def pulled(law: kalman.Given, ties: Array, cell: Array) -> tuple[Array, tuple[Array, Array]]:
    """By entry how far the core moves a cell's mean; and its ties with the cell, and with what is over it then."""
    d = law.shift.shape[-1]
    own, over = ties[:, :d], ties[:, d:]
    pull = jnp.einsum("eij,ej->ei", law.spread[cell], own)
    return pull, (own, over - jnp.einsum("eij,ei->ej", law.slope[cell], own))

r"""Gaussian latents of several plates that nest: pupils in classes in schools, eliminated level by level.

All cells are tied, but the cells of a leaf are tied through others alone. Where each of them meets one cell of every
other latent, with coordinates `u` and those others' `v`, its terms

.. math:: -\tfrac12 \begin{pmatrix} u \\ v \end{pmatrix}^\top
   \begin{pmatrix} A & B \\ B^\top & C \end{pmatrix} \begin{pmatrix} u \\ v \end{pmatrix}
   + \begin{pmatrix} g \\ h \end{pmatrix}^\top \begin{pmatrix} u \\ v \end{pmatrix}

leave to `v` the precision :math:`C - B^\top A^{-1} B` and the shift :math:`h - B^\top A^{-1} g`: a term of the next
level. So cost and memory are linear in rows and in cells. What is left when no latent is such a leaf (crossed effects)
is one vector with a dense matrix. Backwards, moments of `v` give those of `u` and `v` together.

In: the factors of such a group, and for every row the cells that it reads. Out: as for `gaussian`.

References:
    Lauritzen 1992, "Propagation of probabilities, means and variances in mixed graphical association models"; Pinheiro
    and Bates 2000, "Mixed-effects models in S and S-PLUS", section 2.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.elimination.layout import Table
from autoem.e_step.gaussian import kalman
from autoem.e_step.gaussian.block import SOURCE
from autoem.e_step.gaussian.levels import Level, cells_of
from autoem.e_step.gaussian.quadratic import LOG_2PI, described, residuals
from autoem.e_step.gaussian.whole import AbstractWhole, Term, at_home, from_law, solved
from autoem.e_step.tables.completions import rows_of, square_of
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named
from autoem.ir import Continuous

CORE = -1  # the level that is one vector


class NestedMoments(NamedTuple):
    """By level the law given what is over it, mean and covariance of both; of the core; and where levels meet."""

    laws: tuple[kalman.Given, ...]
    means: tuple[Array, ...]
    covariances: tuple[Array, ...]
    parents: tuple[Mapping[str, Array], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class NestedBlock(AbstractWhole):
    """Continuous latents of several plates, some of them nested.

    Attributes:
        levels: in the order in which they are eliminated.
        core: latents that are left then: one vector.
    """

    levels: tuple[Level, ...] = ()
    core: tuple[str, ...] = ()

    source = SOURCE

    @property
    def starts(self) -> dict[str, int]:
        """Where each latent of the core begins in its vector."""
        sizes = [cells_of(self.by_name[n]) * self.by_name[n].dim for n in self.core]
        return dict(zip(self.core, np.cumsum([0, *sizes])[:-1].tolist(), strict=True))

    def holder(self, term: str) -> int:
        """Number of the level that takes a term up."""
        return next((i for i, level in enumerate(self.levels) if term in level.absorbed), CORE)

    def within(self, names: Sequence[str], whole: Sequence[str]) -> np.ndarray:
        """Coordinates of one cell of the latents `names` among those of `whole`."""
        dims = {n: self.by_name[n].dim for n in whole}
        start = dict(zip(whole, np.cumsum([0, *dims.values()])[:-1].tolist(), strict=True))
        return np.concatenate([start[n] + np.arange(dims[n]) for n in names])

    def parents(self, cells: Mapping[str, Array]) -> tuple[dict[str, Array], ...]:
        return tuple({n: cells[f"{level.key}·{n}"] for n in level.over} for level in self.levels)

    def integrate(self, values: Mapping[Any, Any], rows: Mapping[str, Rows], cells: Mapping[str, Array]):
        """`(table, moments)`: the integral over the latents, and their posterior."""
        terms: dict[str, list[Term]] = {}
        value = jnp.zeros(())
        for f, r in residuals(self.factors, values, rows):
            term, constant = self.term(f, r, cells)
            terms.setdefault(f.name, []).append(term)
            value = value + constant
        parents, laws = self.parents(cells), []
        for level, over in zip(self.levels, parents, strict=True):
            taken = [(self.names_of(n), t) for n in level.absorbed for t in terms.pop(n)]
            law, left, more = self.eliminated(level, taken)
            laws.append(law)
            value = value + more
            terms[level.key] = [Term(over, left[:, :-1, :-1], left[:, :-1, -1])]
        core, more = self.dense([(self.names_of(n), t) for n, found in terms.items() for t in found])
        means, covariances = self.backwards(laws, parents, core)
        moments = NestedMoments((*laws, core), means, covariances, parents)
        return Table(Named(value + more, ()), frozenset(), frozenset()), moments

    def names_of(self, term: str) -> tuple[str, ...]:
        """The latents that a term reads."""
        level = next((v for v in self.levels if v.key == term), None)
        return level.over if level else self.read(next(f for f in self.factors if f.name == term))

    def eliminated(self, level: Level, terms: Sequence[tuple[tuple[str, ...], Term]]):
        """The law of a level's cells given those over them, what is left to these, and the integral's constant."""
        leaf = self.by_name[level.leaf]
        size = sum(self.by_name[n].dim for n in level.members)
        matrix = jnp.zeros((cells_of(leaf), size + 1, size + 1), jnp.result_type(float))
        for names, term in terms:
            where = np.append(self.within(names, level.members), size)
            precision, shift = (at_home(v, term.cells[level.leaf], cells_of(leaf)) for v in term[1:])
            home = kalman.augmented(precision, shift, jnp.zeros(len(shift), shift.dtype))
            matrix = matrix.at[:, where[:, None], where[None, :]].add(home)
        law, left, log_det = kalman.sweep(matrix, leaf.dim)
        constant = -0.5 * (left[:, -1, -1] + log_det).sum() + 0.5 * cells_of(leaf) * leaf.dim * LOG_2PI
        return law, left, constant

    def dense(self, terms: Sequence[tuple[tuple[str, ...], Term]]) -> tuple[kalman.Given, Array]:
        """The law of the core, and its integral's constant."""
        size = sum(cells_of(self.by_name[n]) * self.by_name[n].dim for n in self.core)
        real = jnp.result_type(float)
        matrix, vector = jnp.zeros((size, size), real), jnp.zeros(size, real)
        for names, term in (t for t in terms if t[0]):
            at = self.positions(names, term.cells)
            matrix = matrix.at[at[:, :, None], at[:, None, :]].add(term.precision)
            vector = vector.at[at].add(term.shift)
        return solved(matrix, vector)

    def positions(self, names: Sequence[str], cells: Mapping[str, Array]) -> Array:
        """Where the coordinates of the latents of every row stand in the core's vector."""
        parts = [
            self.starts[n] + cells[n][:, None] * self.by_name[n].dim + np.arange(self.by_name[n].dim) for n in names
        ]
        return jnp.concatenate(parts, 1)

    def backwards(self, laws: Sequence[kalman.Given], parents, core: kalman.Given):
        """Means and covariances by level, of a cell with those over it, and of the core last."""
        means: list[Array] = [core.shift]
        covariances: list[Array] = [core.spread]
        for i in reversed(range(len(self.levels))):
            level = self.levels[i]
            count = cells_of(self.by_name[level.leaf])
            mean, covariance = self.held_by(level.key, level.over, parents[i], means, covariances, count)
            mean, covariance = kalman.before(laws[i], mean, covariance)
            means.insert(0, mean)
            covariances.insert(0, covariance)
        return tuple(means), tuple(covariances)

    def held_by(self, term: str, names: tuple[str, ...], index: Mapping[str, Array], means, covariances, count: int):
        """Mean and covariance of what each of the rows of a term reads; lists of moments end with the core's."""
        if not names:
            return jnp.zeros((count, 0), means[-1].dtype), jnp.zeros((count, 0, 0), means[-1].dtype)
        held = self.holder(term)
        if held == CORE:
            at = self.positions(names, index)
            return means[-1][at], covariances[-1][at[:, :, None], at[:, None, :]]
        level, place = self.levels[held], held - len(self.levels) - 1
        where = self.within(names, level.members)
        rows = index[level.leaf]
        return means[place][rows][:, rows_of(where)], square_of(covariances[place][rows], where)

    def gathered(self, f: Factor, moments: NestedMoments, cells: Mapping[str, Array]) -> tuple[Array, Array]:
        """Mean `(rows, d)` and covariance of the latents that the rows of a factor read."""
        count = math.prod(self.layout_of(f)[1])
        index = self.index(f, cells)
        return self.held_by(f.name, self.read(f), index, moments.means, moments.covariances, count)

    def mean_covariance(self, f: Factor, moments: NestedMoments, cells: Mapping[str, Array]) -> Array | None:
        """The covariance of what a row of a factor reads, in the mean of its rows: by cells, which are fewer."""
        held = self.holder(f.name)
        if held == CORE:
            return None
        level = self.levels[held]
        index = self.index(f, cells)[level.leaf]
        times = at_home(jnp.ones((1,)), index, cells_of(self.by_name[level.leaf])) / len(index)
        where = self.within(self.read(f), level.members)
        return jnp.einsum("c,cij->ij", times, square_of(moments.covariances[held], where))

    def marginal(self, m: Continuous, moments: NestedMoments) -> tuple[Array, Array]:
        """Mean `(*shape, *event)` and covariance `(*shape, dim, dim)` of one latent in every of its cells."""
        i = next((i for i, level in enumerate(self.levels) if level.leaf == m.name), CORE)
        if i == CORE:
            at = self.positions((m.name,), {m.name: jnp.arange(cells_of(m))})
            mean, covariance = moments.means[-1][at], moments.covariances[-1][at[:, :, None], at[:, None, :]]
        else:
            mean, covariance = moments.means[i][:, : m.dim], moments.covariances[i][:, : m.dim, : m.dim]
        return mean.reshape(*m.shape, *m.event), covariance.reshape(*m.shape, m.dim, m.dim)

    def draw(self, moments: NestedMoments, chosen: Mapping[str, Array], key: Array | None) -> dict[str, Array]:
        """Values of the latents: drawn with `key`, or their mean without."""
        del chosen
        if key is None:
            return {m.name: self.marginal(m, moments)[0] for m in self.members}
        keys, found = jax.random.split(key, len(moments.laws)), {}
        core = from_law(moments.laws[-1], jnp.zeros(0), keys[-1])
        for n, start in self.starts.items():
            m = self.by_name[n]
            found[n] = core[start : start + cells_of(m) * m.dim].reshape(-1, m.dim)
        for i in reversed(range(len(self.levels))):
            level, index, law = self.levels[i], moments.parents[i], moments.laws[i]
            over = [found[n][index[n]] for n in level.over]
            rest = jnp.concatenate(over, -1) if over else jnp.zeros((law.shift.shape[0], 0), law.shift.dtype)
            found[level.leaf] = from_law(law, rest, keys[i])
        return {m.name: found[m.name].reshape(*m.shape, *m.event) for m in self.members}

    def reason(self, m: Continuous) -> str:
        """How the latent is treated, in words."""
        size = f"{cells_of(m):,} cells of {m.dim} dimension{'s' * (m.dim > 1)}"
        reason = f"{described(m)}; {size}"
        level = next((v for v in self.levels if v.leaf == m.name), None)
        if level is None:
            size = sum(cells_of(self.by_name[n]) * self.by_name[n].dim for n in self.core)
            return f"{reason}; crossed: with {', '.join(self.core)} one vector of {size:,}"
        over = f", each under one of {', '.join(level.over)}" if level.over else ""
        return f"{reason}; eliminated cell by cell{over}"

r"""Sweeps over each row's own simplex and the classes that look it up, held as the simplex's law alone.

Where the rows of a class `z` find their probabilities in a cell of a simplex, `z ~ Categorical(theta[doc])`, and all
else that `z` reads stands still, two laws alternate. With :math:`t_c = \exp \mathrm{E}[\log \theta_c]` and `w_r` the
exponential of the other factors' expected tables, the law of a row is :math:`q_r \propto t_{c(r)} w_r`, so that a cell
needs of all its rows only the counts

.. math:: \sum_{r \in c} n_r q_r = t_c \sum_{r \in c} \frac{n_r}{t_c \cdot w_r} w_r,

two products of matrices a sweep, and no exponential of a row. In: the table of the rows, and how often each counts.
Out: the counts by cell, and what the rows' laws are worth in the bound.

References:
    Blei, Ng and Jordan 2003, section 5.2; Hoffman, Blei and Bach 2010, algorithm 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.cells.conjugate import DirichletNatural, gap
from autoem.e_step.elimination.layout import Layout, Route
from autoem.e_step.tables.tabulate import Factor
from autoem.mean_field.groups import Block, Group

WASTE = 2.0  # padded rows to rows, beyond which cells of few rows are laid out apart from those of many
IN_CACHE = 1 << 17  # numbers of a block of cells that are swept together
ROWS, CELLS = "·rows", "·cells"


def padded(cells: np.ndarray, number: int) -> dict[str, np.ndarray]:
    """Rows of every cell side by side: by bucket the row numbers `(cells, length)`, and the cells' own numbers.

    A place without a row has the number of rows. Cells without rows are in no bucket.
    """
    flat = np.asarray(cells).ravel()
    order, count = np.argsort(flat, kind="stable"), np.bincount(flat, minlength=number)
    first = np.cumsum(count) - count
    ranked = np.argsort(-count, kind="stable")
    ranked, out, start = ranked[: int((count > 0).sum())], {}, 0
    share = 0.0 if count.max(initial=0) * len(ranked) <= WASTE * flat.size else 1 / WASTE
    while start < len(ranked):
        length = int(count[ranked[start]])
        end = start + int(
            np.searchsorted(-count[ranked[start:]], -share * length, side="right" if share == 0 else "left")
        )
        mine = ranked[start : max(end, start + 1)]
        at = np.arange(length)
        rows = order[np.minimum(first[mine, None] + at, flat.size - 1)]
        name = str(len(out) // 2)
        out[ROWS + name] = np.where(at < count[mine, None], rows, flat.size).astype(np.int32)
        out[CELLS + name] = mine.astype(np.int32)
        start += len(mine)
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Own:
    """A simplex of each row's own, `block`, that only its prior and the classes of the last group read, by `factor`."""

    block: Block
    factor: Factor

    @property
    def route(self) -> Route:
        return self.factor.routes[self.block.name]

    @property
    def others(self) -> tuple[str, ...]:
        """Factors of the block besides."""
        return tuple(n for n in self.block.factors if n != self.factor.name)

    def laid_out(self, cells: Mapping[str, Array]) -> bool:
        """Whether the data's index arrays hold the rows side by side."""
        return self.route.site + ROWS + "0" in cells


def own_of(groups: tuple[Group, ...], blocks: tuple[Block, ...], factors: Mapping[str, Factor]) -> Own | None:
    """The simplex that is swept with the only group, where nothing else is each row's own."""
    mine = [b for b in blocks if not b.shared]
    if len(groups) != 1 or len(mine) != 1 or groups[0].cellwise or not groups[0].simple:
        return None
    (block,), (group,) = mine, groups
    readers = [factors[n] for n in block.factors if n != block.name]
    if len(readers) != 1 or [z.name for z in readers[0].latents] != list(group.latents):
        return None
    factor = readers[0]
    plain = block.name in factor.routes and factor.completions is not None and len(factor.completions.members) == 1
    alike = plain and set(factor.routes[block.name].source) == set(group.pieces[0].axes)
    return Own(block, factor) if alike else None


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """What stands still while the rows are swept: their table `(rows, states)`, their counts and cells.

    `buckets` holds the numbers of the rows of each cell side by side, and the cells' own.
    """

    own: Own
    table: Array
    count: Array
    cells: Array
    buckets: tuple[tuple[Array, Array], ...]

    def block(self, rows: Array) -> tuple[Array, Array]:
        """Of rows side by side `(cells, length)`: likelihoods `(.., states)`, each row's up to a factor, and counts."""
        table = jnp.take(self.table, rows, 0, mode="fill", fill_value=0.0)
        count = jnp.take(self.count, rows, mode="fill", fill_value=0.0)
        return jnp.exp(table - table.max(-1, keepdims=True)), count

    def in_logs(self, scores: Array) -> Array:
        """Expected counts by cell and state, where a product of probabilities would underflow."""
        law = self.count[:, None] * jax.nn.softmax(scores[self.cells] + self.table, axis=-1)
        return jax.ops.segment_sum(law, self.cells, len(scores))


def held(own: Own, table: Array, group: Group, layout: Layout) -> Held:
    """The record for a table `(*source, states)` of the rows."""
    route, cells = own.route, layout.cells
    sizes, states = table.shape[:-1], table.shape[-1]
    (name,) = group.latents
    scale = layout.scales.get(name)
    count = jnp.ones(sizes, table.dtype) if scale is None else jnp.broadcast_to(scale.to(route.source), sizes)
    buckets, i = [], 0
    while (key := f"{route.site}{ROWS}{i}") in cells:
        buckets.append((cells[key], cells[f"{route.site}{CELLS}{i}"]))
        i += 1
    return Held(own, table.reshape(-1, states), count.reshape(-1), cells[route.site].ravel(), tuple(buckets))


def settled(rows: Held, natural: Any, prior: Callable[[Array], Array], most: int, tol: float) -> Any:
    """The law of the simplex after at most so many sweeps of each cell, or once one moves few of its counts.

    `prior` is the expected log density of the block's other factors at nodes of it. Cells are swept in blocks whose
    rows fit the cache, from the first sweep to the last; to second order the bound's rise is the square of the share
    of counts that moves, whose limit is therefore the root of `tol`.
    """
    law, shape = rows.own.block.law, natural.concentration.shape
    points = law.points(natural)
    base = law.solve(points, tuple(jax.grad(lambda u: prior(u[None]))(u) for u in points))
    base = base.concentration.reshape(-1, shape[-1])  # of a cell without rows
    start, least = natural.concentration.reshape(base.shape), jnp.asarray(jnp.inf, base.dtype)
    found = base
    for numbers, cells in rows.buckets:
        new, lowest = swept(rows, numbers, cells, base, start, most, tol)
        found, least = found.at[cells].set(new, unique_indices=True), jnp.minimum(least, lowest)
    lost = jnp.finfo(base.dtype).tiny ** 0.5
    found = jax.lax.cond(least > lost, lambda: found, lambda: swept_in_logs(rows, base, start, most))
    return law.solve(points, ((found.reshape(shape) - 1) / points[0],))


def swept(
    rows: Held, numbers: Array, cells: Array, base: Array, start: Array, most: int, tol: float
) -> tuple[Array, Array]:
    """The concentrations of some cells, whose rows lie side by side, and the least norm of a row."""
    law = rows.own.block.law
    length, states = numbers.shape[1], base.shape[1]
    size = int(np.clip(IN_CACHE // (length * states), 1, len(cells)))

    def one(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, least = carry
        at = jnp.minimum(i * size, len(cells) - size)  # the last block overlaps the one before
        mine = jax.lax.dynamic_slice_in_dim(cells, at, size)
        weight, count = rows.block(jax.lax.dynamic_slice_in_dim(numbers, at, size))
        prior, enough = base[mine], tol**0.5 * count.sum()

        def again(carry):
            sweeps, concentration, least, _ = carry
            share = law.nodes(DirichletNatural(concentration, jnp.zeros(size)))[0]
            norm = jnp.einsum("dlk,dk->dl", weight, share)
            new = prior + share * jnp.einsum("dlk,dl->dk", weight, count / norm)
            going = jnp.abs(new - concentration).sum() > enough
            return sweeps + 1, new, jnp.minimum(least, norm.min()), going

        begun = (jnp.zeros((), int), start[mine], least, jnp.asarray(True))
        _, new, least, _ = jax.lax.while_loop(lambda c: c[3] & (c[0] < most), again, begun)
        return jax.lax.dynamic_update_slice_in_dim(out, new, at, 0), least

    blocks = -(-len(cells) // size)
    return jax.lax.fori_loop(0, blocks, one, (start[cells], jnp.asarray(jnp.inf, base.dtype)))


def swept_in_logs(rows: Held, base: Array, start: Array, most: int) -> Array:
    """The concentrations of all cells after so many sweeps."""

    def once(_, concentration: Array) -> Array:
        total = concentration.sum(-1, keepdims=True)
        scores = gap(concentration) + jnp.log(concentration) - gap(total) - jnp.log(total)
        return base + rows.in_logs(scores)

    return jax.lax.fori_loop(0, most, once, start)

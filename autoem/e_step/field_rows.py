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

from autoem._named import made_once
from autoem.e_step.field import Block, Group, log_probabilities
from autoem.e_step.layout import Layout, Route
from autoem.e_step.tables import Factor

WASTE = 2.0  # padded rows to rows, beyond which cells of few rows are laid out apart from those of many
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
    """What stands still while the rows are swept: their table `(rows, states)` and counts, flat and side by side."""

    own: Own
    table: Array
    count: Array
    top: Array
    buckets: tuple[tuple[Array, Array, Array], ...]
    cells: Array

    def counts(self, nodes: Array) -> tuple[Array, Array]:
        """Expected counts by cell and state under a law with such nodes, and the sum of the rows' `log Z`, in nats."""
        scores = log_probabilities(self.own.factor, nodes)
        top = scores.max(-1)
        weights = jnp.exp(scores - top[:, None])
        lost = jnp.finfo(scores.dtype).tiny ** 0.5
        counts, total, least = jnp.zeros_like(weights), jnp.zeros(()), jnp.asarray(jnp.inf)
        for cell, weight, count in self.buckets:
            mine = weights[cell]
            norm = jnp.einsum("dlk,dk->dl", weight, mine)
            found = jnp.einsum("dlk,dl->dk", weight, count / norm)
            counts = counts.at[cell].set(mine * found, unique_indices=True)
            total = total + (count * jnp.log(norm)).sum() + (count.sum(1) * top[cell]).sum()
            least = jnp.minimum(least, norm.min())
        return jax.lax.cond(least > lost, lambda: (counts, total + self.top), lambda: self.in_logs(scores))

    def in_logs(self, scores: Array) -> tuple[Array, Array]:
        """The same, where a product of probabilities would have underflowed."""
        joint = scores[self.cells] + self.table
        log_norm = jax.nn.logsumexp(joint, axis=-1, keepdims=True)
        law = self.count[:, None] * jnp.exp(joint - log_norm)
        return jax.ops.segment_sum(law, self.cells, len(scores)), (self.count * log_norm[:, 0]).sum()


def held(own: Own, table: Array, group: Group, layout: Layout) -> Held:
    """The record for a table `(*source, states)` of the rows."""
    route, cells = own.route, layout.cells
    sizes, states = table.shape[:-1], table.shape[-1]
    (name,) = group.latents
    scale = layout.scales.get(name)
    count = jnp.ones(sizes, table.dtype) if scale is None else jnp.broadcast_to(scale.to(route.source), sizes)
    table, count = table.reshape(-1, states), count.reshape(-1)
    top = table.max(-1)
    weights, buckets, i = jnp.exp(table - top[:, None]), [], 0
    while (key := f"{route.site}{ROWS}{i}") in cells:
        rows = cells[key]
        there = jnp.take(weights, rows, 0, mode="fill", fill_value=1.0)
        buckets.append((cells[f"{route.site}{CELLS}{i}"], there, jnp.take(count, rows, mode="fill", fill_value=0.0)))
        i += 1
    return Held(own, table, count, (count * top).sum(), tuple(buckets), cells[route.site].ravel())


def settled(rows: Held, natural: Any, prior: Callable[[Array], Array], most: int, tol: float) -> Any:
    """The law of the simplex after at most so many sweeps, or once one raises the bound by less than `tol` of itself.

    `prior` is the expected log density of the block's other factors at nodes of it.
    """
    law, factor = rows.own.block.law, rows.own.factor

    def again(carry):
        count, last, natural, _ = carry
        nodes = made_once(law.nodes(natural))
        seen, log_z = rows.counts(nodes)
        new = log_z + prior(nodes) + law.entropy(natural)

        def joint(u: Array) -> Array:
            return prior(u[None]) + (seen * log_probabilities(factor, u[None])).sum()

        points = law.points(natural)
        found = law.solve(points, tuple(jax.grad(joint)(u) for u in points))
        return count + 1, new, found, new - last > tol * jnp.maximum(jnp.abs(new), 1)

    start = (jnp.zeros((), int), jnp.asarray(-jnp.inf), natural, jnp.asarray(True))
    return jax.lax.while_loop(lambda c: c[3] & (c[0] < most), again, start)[2]

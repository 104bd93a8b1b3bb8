r"""Mean field: the E-step under a product of laws, one for each group of latents, improved in turn.

In: a kernel whose factors were built for it, parameters, data and the laws of the last E-step. Out: `Expectation`,
whose likelihood is the bound

.. math:: \mathrm{ELBO} = \sum_f \mathrm{E}_q[\log f] + \sum_g H(q_g) \le \log p(x)

and whose statistics are its derivative by the factors' cells at fixed `q`, so that the M-step sees nothing new.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from autoem.e_step.elimination.eliminate import Step, eliminate
from autoem.e_step.elimination.layout import Layout, Table
from autoem.e_step.strategies import MeanField
from autoem.e_step.tables.completions import NODES
from autoem.e_step.treatment import Expectation
from autoem.graph.named import Named
from autoem.lowering.kernel import Kernel, with_nodes
from autoem.m_step.problem import Bundle, Params, make_layout
from autoem.mean_field.groups import (
    Block,
    Group,
    Piece,
    as_read,
    cell_law,
    damped,
    solved,
    used_by,
)
from autoem.mean_field.rows import Own, held, own_of, settled
from autoem.mean_field.tables import AbstractTables, Laws

FIRST = 10  # sweeps over each row's own latents, at the start, before anything that all rows share is updated
ROUNDS = 5  # of them, each of which begins those latents afresh
AFRESH, MANY_ROUNDS = 10, 20  # the same where sweeps are cheap; and so many rounds, at most,
RISE = 3e-4  # each of which raises the bound by so much of itself


def level(x: Array) -> Array:
    """The same number, their mean, in place of all."""
    return jnp.full_like(x, x.mean())


@dataclasses.dataclass(frozen=True, eq=False)
class Field(AbstractTables):
    """Mean field over `groups` of discrete latents and `blocks` of continuous ones; the last group is updated last."""

    wish: MeanField
    why: str

    objective_name = "ELBO"
    source = "Jordan et al. 1999; Ghahramani and Jordan 1997 (structured); Blei, Ng and Jordan 2003; Daudin et al. 2008"

    @property
    def last(self) -> Group | None:
        """The group whose last update yields the bound; None where the last goes by cells."""
        return self.groups[-1] if self.groups and not self.groups[-1].cellwise else None

    @functools.cached_property
    def own(self) -> Own | None:
        """The simplex of each row's own that is swept with the rows that look it up, where there is only that."""
        return own_of(self.groups, self.blocks, self.by_name)

    def init(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> Laws:
        """Laws that differ a little from cell to cell, settled at the start parameters."""
        laws = self._close(kernel, params, bundle, self.begin(kernel, bundle, key))
        return self._settled(kernel, params, bundle, laws)

    def begin(self, kernel: Kernel, bundle: Bundle, key: Array) -> Laws:
        """Laws that know nothing of the data: nearly flat, or at random where cells of one latent read one another."""
        keys = jax.random.split(key, len(self.blocks) + len(self.groups))
        natural = {b.name: b.law.start(k, b.size) for b, k in zip(self.blocks, keys, strict=False)}
        laws, layout = Laws({}, {}, {}, natural), make_layout(kernel.layout, bundle)
        for group, k in zip(self.groups, keys[len(self.blocks) :], strict=True):
            if group.cellwise:
                axes, sizes = self._cell_axes(kernel, group)
                scores = Named(jax.random.normal(k, sizes), axes)
                shares, entropy = cell_law(group, scores, layout)
                laws.scores[group.name] = scores
            else:
                tables = [self._random_table(group, p, jax.random.fold_in(k, i)) for i, p in enumerate(group.pieces)]
                shares, entropy = self._law(group, tables, layout)
            laws.shares.update(shares)
            if group is not self.last:
                laws.entropy[group.name] = entropy
        return laws

    def _settled(self, kernel: Kernel, params: Params, bundle: Bundle, laws: Laws) -> Laws:
        """Start laws, settled at the start parameters; of what all rows share, after rounds that begin afresh.

        In every round each row's own latents start anew, all alike, under what is shared by then. Without that they
        would stay where the first, shapeless law of what is shared has put them, or their own noise.
        """
        shared = [b for b in self.blocks if b.shared]
        if not shared and not any(g.cellwise for g in self.groups):
            return laws
        own = {b.name: jax.tree.map(level, laws.natural[b.name]) for b in self.blocks if not b.shared}
        layout, fast = make_layout(kernel.layout, bundle), self._fast(bundle)

        def once(_, laws: Laws) -> Laws:
            return self._close(kernel, params, bundle, self.sweep(kernel, params, bundle, laws))

        def many(laws: Laws) -> tuple[Laws, Array]:
            if fast:
                laws = self._settle_rows(kernel, params, bundle, laws, AFRESH)
                laws, total = self._closed(kernel, params, bundle, laws)
                return laws, total + self.value(kernel, params, bundle, laws)
            return jax.lax.fori_loop(0, FIRST, once, laws), jnp.asarray(jnp.inf)

        def again(carry):
            count, last, laws, _ = carry
            laws = self._close(kernel, params, bundle, laws._replace(natural={**laws.natural, **own}))
            laws, bound = many(laws)
            for block in shared:
                laws = self._with_block(block, params, bundle, laws, layout)
            going = (count < ROUNDS) | (bound - last > RISE * jnp.abs(bound))
            return count + 1, bound, laws, going

        if shared:
            start = (jnp.ones((), int), jnp.asarray(-jnp.inf), laws, jnp.asarray(True))
            most = MANY_ROUNDS if fast else ROUNDS
            laws = jax.lax.while_loop(lambda c: c[3] & (c[0] <= most), again, start)[2]
            if fast:
                return laws  # the first E-step goes on from here
        return many(laws)[0]

    def _law(self, group: Group, tables: Sequence[Table], layout: Layout) -> tuple[dict[str, Named], Array]:
        """The law of a group from its expected tables: by piece its marginals, and the entropy in nats."""
        total, counts = solved(group, tables, self._within(group, layout))
        shares = {p.key: as_read(p, c) for p, c in zip(group.pieces, counts, strict=True)}
        return shares, total - used_by(tables, counts)

    def _random_table(self, group: Group, piece: Piece, key: Array) -> Table:
        value, axes = 0.1 * jax.random.normal(key, piece.shape), (*piece.own, *piece.axes)
        if not (piece.crossing or group.simple):  # as the factor's own: the same along plates it need not vary on
            value, axes = jnp.zeros(piece.shape[: len(piece.own)]), piece.own
        return self._as_table(piece, Named(value, axes))

    def _cell_axes(self, kernel: Kernel, group: Group) -> tuple[tuple[str, ...], tuple[int, ...]]:
        latent = kernel.program.every_latent[group.latents[0]]
        kept = [(a, s) for a, s in zip(latent.axes, latent.shape, strict=True) if not a.startswith("#")]
        return (latent.name, *(a for a, _ in kept)), (latent.num_states, *(s for _, s in kept))

    @staticmethod
    def _within(group: Group, layout: Layout) -> Layout:
        return dataclasses.replace(layout, chains=group.chains, proof=True)

    def expect(self, kernel: Kernel, params: Params, bundle: Bundle, state: Laws) -> Expectation:
        """Sweeps of updates; the last group's last update yields the bound and its statistics in one pass."""
        laws = self.improved(kernel, params, bundle, state)
        nodes = self.nodes(laws)
        filled = with_nodes(bundle, nodes)
        layout = make_layout(kernel.layout, bundle)
        cells = self.cells(kernel, params, filled, [n for n, f in self.by_name.items() if not f.is_prior])
        last = self.last
        ends = {p.factor for p in last.pieces} if last else set()
        total, statistics = jnp.zeros(()), {}
        if last is not None:

            def tables_of(cells: Mapping[str, Any]) -> list[Named]:
                tables = {n: self.table(self.by_name[n], c, filled) for n, c in cells.items()}
                return [t.value for t in self._expected(last, tables, laws, layout)]

            values, pull = jax.vjp(tables_of, {n: cells[n] for n in cells if n in ends})
            tables = [self._as_table(p, v) for p, v in zip(last.pieces, values, strict=True)]
            total, counts = solved(last, tables, self._within(last, layout))
            shares = {p.key: as_read(p, c) for p, c in zip(last.pieces, counts, strict=True)}
            counts = [Named(c.to(v.axes), v.axes) for c, v in zip(counts, values, strict=True)]
            (statistics,) = pull(counts)
            laws = laws._replace(shares={**laws.shares, **shares})
        others = {n: c for n, c in cells.items() if n not in ends}
        rest, more = jax.value_and_grad(lambda c: self.bound(c, laws, filled, kernel, last))(others)
        priors = kernel.problem.cells(params, bundle, [n for n, f in self.by_name.items() if f.is_prior])
        prior, from_prior = jax.value_and_grad(kernel.log_prior)(priors, bundle)
        found = {**statistics, **more, **from_prior, **({NODES: nodes} if nodes else {})}
        return Expectation(total + rest + bundle.constant, prior, found, laws)

    @staticmethod
    def _as_table(piece: Piece, value: Named) -> Table:
        return Table(value, frozenset(piece.own), frozenset(piece.axes), piece.route)

    def improved(self, kernel: Kernel, params: Params, bundle: Bundle, laws: Laws) -> Laws:
        """The laws after an E-step's updates, but for the last one of the last group.

        What all rows share is updated once, as a parameter would be, then each row's own latents in so many sweeps, or
        fewer where they have settled.
        """
        layout = make_layout(kernel.layout, bundle)
        for block in (b for b in self.blocks if b.shared):
            laws = self._with_block(block, params, bundle, laws, layout)
        if self._fast(bundle):
            return self._settle_rows(kernel, params, bundle, laws, self.wish.sweeps or AFRESH)
        laws = self.sweep(kernel, params, bundle, laws)
        most = self.wish.sweeps or 1
        if most == 1:
            return laws

        def again(carry):
            count, last, laws, _ = carry
            laws, total = self._closed(kernel, params, bundle, laws)
            new = total + self.value(kernel, params, bundle, laws)
            going = new - last > self.wish.tol * jnp.maximum(jnp.abs(new), 1)
            return count + 1, new, self.sweep(kernel, params, bundle, laws), going

        start = (jnp.ones((), int), jnp.asarray(-jnp.inf), laws, jnp.asarray(True))
        return jax.lax.while_loop(lambda c: c[3] & (c[0] < most), again, start)[2]

    def _fast(self, bundle: Bundle) -> bool:
        return self.own is not None and self.own.laid_out(bundle.cells)

    def _settle_rows(self, kernel: Kernel, params: Params, bundle: Bundle, laws: Laws, most: int) -> Laws:
        """At most so many sweeps over each row's own simplex and the rows; the law of the simplex after them."""
        own, last, layout = self.own, self.last, make_layout(kernel.layout, bundle)
        assert own is not None and last is not None
        tables = self._tables(kernel, params, bundle, laws, last, [own.factor.name])
        axes = (*own.route.source, *last.latents)
        parts = [t.value.to(axes) for t in self._expected(last, tables, laws, layout)]
        sizes = tuple(own.factor.sizes[a] for a in own.route.source)
        zero = jnp.zeros((*sizes, kernel.program.every_latent[last.latents[0]].num_states))
        rows = held(own, sum(parts, start=zero), last, layout)
        name = own.block.name

        def prior(u: Array) -> Array:
            return self.joint(own.block, u, params, bundle, laws, layout, own.others)

        natural = settled(rows, laws.natural[name], prior, most, self.wish.tol)
        return laws._replace(natural={**laws.natural, name: natural})

    def value(self, kernel: Kernel, params: Params, bundle: Bundle, laws: Laws) -> Array:
        """The bound under given laws, but for constants of the data."""
        filled = with_nodes(bundle, self.nodes(laws))
        likely = [n for n, f in self.by_name.items() if not f.is_prior]
        return self.bound(self.cells(kernel, params, filled, likely), laws, filled, kernel, self.last)

    def sweep(self, kernel: Kernel, params: Params, bundle: Bundle, laws: Laws) -> Laws:
        """Every group and every row's own block once, but for the last group, unless that is by cells."""
        layout = make_layout(kernel.layout, bundle)
        for group in self.groups[:-1]:
            laws = self._update_group(group, self._tables(kernel, params, bundle, laws, group), laws, layout)
        for block in (b for b in self.blocks if not b.shared):
            laws = self._with_block(block, params, bundle, laws, layout)
        return self._close(kernel, params, bundle, laws) if self.groups and self.groups[-1].cellwise else laws

    def _close(self, kernel: Kernel, params: Params, bundle: Bundle, laws: Laws) -> Laws:
        """The last group's update."""
        return self._closed(kernel, params, bundle, laws)[0]

    def _closed(self, kernel: Kernel, params: Params, bundle: Bundle, laws: Laws) -> tuple[Laws, Array]:
        """The same, and what it is worth in the bound where the rest is counted without it."""
        if not self.groups:
            return laws, jnp.zeros(())
        group, layout = self.groups[-1], make_layout(kernel.layout, bundle)
        tables = self._tables(kernel, params, bundle, laws, group)
        if group.cellwise:
            return self._update_cells(group, tables, laws, layout), jnp.zeros(())
        expected = self._expected(group, tables, laws, layout)
        total, counts = solved(group, expected, self._within(group, layout))
        shares = {p.key: as_read(p, c) for p, c in zip(group.pieces, counts, strict=True)}
        return laws._replace(shares={**laws.shares, **shares}), total

    def _with_block(self, block: Block, params: Params, bundle: Bundle, laws: Laws, layout: Layout) -> Laws:
        law = self.update_block(block, params, bundle, laws, layout)
        return laws._replace(natural={**laws.natural, block.name: law})

    def _update_group(self, group: Group, tables: Mapping[str, Named], laws: Laws, layout: Layout) -> Laws:
        if group.cellwise:
            return self._update_cells(group, tables, laws, layout)
        shares, entropy = self._law(group, self._expected(group, tables, laws, layout), layout)
        return laws._replace(shares={**laws.shares, **shares}, entropy={**laws.entropy, group.name: entropy})

    def _update_cells(self, group: Group, tables: Mapping[str, Named], laws: Laws, layout: Layout) -> Laws:
        """Towards the laws that each cell would have given all others: as far as the bound does not fall."""
        steps: list[Any] = []
        eliminate(self._expected(group, tables, laws, layout), self._within(group, layout), steps=steps)
        step = next(s for s in steps if isinstance(s, Step) and s.latent == group.latents[0])
        old = laws.scores[group.name]
        wanted = jnp.broadcast_to(step.joint.to(old.axes), old.array.shape)

        def worth(shares: Mapping[str, Named]) -> Array:
            names = dict.fromkeys(p.factor for p in group.pieces)
            parts = (self._expectation(n, tables[n], {**laws.shares, **shares}, layout) for n in names)
            return sum(parts, start=jnp.zeros(()))

        scores, shares, entropy = damped(group, old, wanted, worth, layout)
        return laws._replace(
            shares={**laws.shares, **shares},
            entropy={**laws.entropy, group.name: entropy},
            scores={**laws.scores, group.name: scores},
        )

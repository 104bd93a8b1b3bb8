r"""Mean field: the E-step under a product of laws, one for each group of latents, improved in turn.

In: a kernel whose factors were built for it, parameters, data and the laws of the last E-step. Out: `Expectation`,
whose likelihood is the bound

.. math:: \mathrm{ELBO} = \sum_f \mathrm{E}_q[\log f] + \sum_g H(q_g) \le \log p(x)

and whose statistics are its derivative by the factors' cells at fixed `q`, so that the M-step sees nothing new.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from autoem._lower import Kernel, with_nodes
from autoem._named import Named, made_once
from autoem.e_step.completions import NODES
from autoem.e_step.elimination import Step, eliminate
from autoem.e_step.field import (
    Block,
    Group,
    Piece,
    as_read,
    cell_law,
    expectation,
    expected_table,
    finite,
    log_probabilities,
    nodes_of,
    over_nodes,
    picked_table,
    solved,
    used_by,
    weight_of,
)
from autoem.e_step.field_rows import Own, held, own_of
from autoem.e_step.layout import Layout, Table
from autoem.e_step.strategies import MeanField
from autoem.e_step.tables import Factor
from autoem.e_step.treatment import AbstractTreatment, Expectation
from autoem.m_step.problem import Bundle, Params, graph_values, make_layout

FIRST = 10  # sweeps over each row's own latents, at the start, before anything that all rows share is updated
ROUNDS = 5  # of them, each of which begins those latents afresh
AFRESH, MANY_ROUNDS, RISE = 20, 20, 3e-4  # the same where sweeps are cheap, for as long as a round raises the bound so much
HALVINGS = 12  # of a step towards the new laws of cells that read one another, before the old ones are kept


class Laws(NamedTuple):
    """The state: marginals by piece, entropies by group, log probabilities of groups by cell, laws of blocks."""

    shares: dict[str, Named]
    entropy: dict[str, Array]
    scores: dict[str, Named]
    natural: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Field(AbstractTreatment):
    """Mean field over `groups` of discrete latents and `blocks` of continuous ones; the last group is updated last."""

    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    by_name: Mapping[str, Factor]
    wish: MeanField
    why: str

    objective_name = "ELBO"
    source = "Jordan et al. 1999; Ghahramani and Jordan 1997 (structured); Blei, Ng and Jordan 2003; Daudin et al. 2008"

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Those that read continuous latents."""
        return tuple(f for f in self.by_name.values() if f.completions is not None)

    def pieces_of(self, factor: str) -> tuple[Piece, ...]:
        return self._pieces.get(factor, ())

    @property
    def last(self) -> Group | None:
        """The group whose last update yields the bound; None where the last goes by cells."""
        return self.groups[-1] if self.groups and not self.groups[-1].cellwise else None

    @functools.cached_property
    def own(self) -> Own | None:
        """The simplex of each row's own that is swept with the rows that look it up, where there is no more than that."""
        return own_of(self.groups, self.blocks, self.by_name)

    @functools.cached_property
    def _pieces(self) -> dict[str, tuple[Piece, ...]]:
        out: dict[str, tuple[Piece, ...]] = {}
        for g in self.groups:
            for p in g.pieces:
                out[p.factor] = (*out.get(p.factor, ()), p)
        return out

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

        In every round each row's own latents start anew under what is shared by then. Without that they would stay
        where the first, shapeless law of what is shared has put them.
        """
        shared = [b for b in self.blocks if b.shared]
        if not shared and not any(g.cellwise for g in self.groups):
            return laws
        own = {b.name: laws.natural[b.name] for b in self.blocks if not b.shared}
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
        law, name = own.block.law, own.block.name

        def prior(u: Array) -> Array:
            return self.joint(own.block, u, params, bundle, laws, layout, own.others)

        def again(carry):
            count, last, natural, _ = carry
            nodes = jax.tree.map(made_once, law.nodes(natural))
            seen, log_z = rows.counts(nodes)
            new = log_z + prior(nodes) + law.entropy(natural)

            def joint(u: Array) -> Array:
                return prior(u[None]) + (seen * log_probabilities(own.factor, u[None])).sum()

            points = law.points(natural)
            found = law.solve(points, tuple(jax.grad(joint)(u) for u in points))
            return count + 1, new, found, new - last > self.wish.tol * jnp.maximum(jnp.abs(new), 1)

        start = (jnp.zeros((), int), jnp.asarray(-jnp.inf), laws.natural[name], jnp.asarray(True))
        natural = jax.lax.while_loop(lambda c: c[3] & (c[0] < most), again, start)[2]
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

    def _tables(
        self, kernel: Kernel, params: Params, bundle: Bundle, laws: Laws, group: Group, without: Sequence[str] = ()
    ) -> dict[str, Named]:
        """Tables of the factors that a group reads at the nodes of the blocks, but for those `without`."""
        filled = with_nodes(bundle, self.nodes(laws))
        names = [n for n in dict.fromkeys(p.factor for p in group.pieces) if n not in without]
        cells = self.cells(kernel, params, filled, names)
        return {n: self.table(self.by_name[n], cells[n], filled) for n in names}

    def table(self, factor: Factor, cells: Any, bundle: Bundle) -> Named:
        """A factor's expected log densities over the blocks' laws, for every state of its discrete latents."""
        if self.picked(factor):
            return picked_table(factor, bundle.nodes[factor.name], bundle.cells)
        rows = bundle.rows[factor.name]
        value = factor.table(jax.tree.map(made_once, cells) if factor.completions else cells, rows).value
        if factor.is_hidden and factor.family is not None and rows.value is not None:
            axes = rows.value.axes[factor.family.event_dim :]
            fixed = {k: f.to(axes) for k, f in (rows.fixed or {}).items()}
            base = Named(factor.family.base(rows.value.array, fixed), axes)
            whole = tuple(dict.fromkeys((*value.axes, *axes)))
            value = Named(value.to(whole) + base.to(whole), whole)
        return finite(over_nodes(value))

    @staticmethod
    def picked(factor: Factor) -> bool:
        """Whether a discrete latent's probabilities are a cell of a continuous one, so that logs precede the lookup."""
        return factor.completions is not None and factor.completions.members[0].name in factor.routes

    def cells(self, kernel: Kernel, params: Params, filled: Bundle, names: Iterable[str]) -> dict[str, Any]:
        """The cells of factors, but for those that are looked up without."""
        found = kernel.problem.cells(params, filled, [n for n in names if not self.picked(self.by_name[n])])
        return {n: found.get(n, ()) for n in names}

    def _update_group(self, group: Group, tables: Mapping[str, Named], laws: Laws, layout: Layout) -> Laws:
        if group.cellwise:
            return self._update_cells(group, tables, laws, layout)
        shares, entropy = self._law(group, self._expected(group, tables, laws, layout), layout)
        return laws._replace(shares={**laws.shares, **shares}, entropy={**laws.entropy, group.name: entropy})

    def _expected(self, group: Group, tables: Mapping[str, Named], laws: Laws, layout: Layout) -> list[Table]:
        """The tables of a group's pieces, of the factors whose tables are given; all other laws as they are."""
        out = []
        for p in (p for p in group.pieces if p.factor in tables):
            others = [laws.shares[o.key] for o in self.pieces_of(p.factor) if o.key != p.key]
            out.append(expected_table(self.by_name[p.factor], p, tables[p.factor], others, layout, group.simple))
        return out

    def _update_cells(self, group: Group, tables: Mapping[str, Named], laws: Laws, layout: Layout) -> Laws:
        """Towards the laws that each cell would have given all others: as far as the bound does not fall."""
        steps: list[Any] = []
        eliminate(self._expected(group, tables, laws, layout), self._within(group, layout), steps=steps)
        step = next(s for s in steps if isinstance(s, Step) and s.latent == group.latents[0])
        old = laws.scores[group.name]
        wanted = jnp.broadcast_to(step.joint.to(old.axes), old.array.shape)

        def value(shares: Mapping[str, Named], entropy: Array) -> Array:
            total = entropy
            for name in dict.fromkeys(p.factor for p in group.pieces):
                total = total + self._expectation(name, tables[name], {**laws.shares, **shares}, layout)
            return total

        def at(share: Array) -> tuple[Named, dict[str, Named], Array]:
            log_old, log_new = (jax.nn.log_softmax(x, axis=0) for x in (old.array, wanted))
            scores = Named((1 - share) * log_old + share * log_new, old.axes)
            return scores, *cell_law(group, scores, layout)

        before = value(*cell_law(group, old, layout))
        slack = 8 * jnp.finfo(before.dtype).eps * jnp.abs(before)

        def halve(carry):
            share, _, count = carry
            return share / 2, value(*at(share / 2)[1:]), count + 1

        start = (jnp.ones(()), value(*at(jnp.ones(()))[1:]), 0)
        share, after, _ = jax.lax.while_loop(lambda c: ~(c[1] >= before - slack) & (c[2] < HALVINGS), halve, start)
        scores, shares, entropy = at(jnp.where(after >= before - slack, share, 0.0))
        return laws._replace(
            shares={**laws.shares, **shares},
            entropy={**laws.entropy, group.name: entropy},
            scores={**laws.scores, group.name: scores},
        )

    def _expectation(self, name: str, table: Named, shares: Mapping[str, Named], layout: Layout) -> Array:
        factor, pieces = self.by_name[name], self.pieces_of(name)
        counted = bool(pieces) and not pieces[0].crossing
        if counted and next(g for g in self.groups if g.name == pieces[0].group).cellwise:
            counted = False
        return expectation(factor, table, weight_of(factor, pieces, shares, layout), counted)

    def bound(
        self, cells: Mapping[str, Any], laws: Laws, filled: Bundle, kernel: Kernel, without: Group | None = None
    ) -> Array:
        """The ELBO, but for constants of the data, in nats; `filled` are the data with nodes for the blocks.

        The part of the group `without`, and of the factors that read it, is left out.
        """
        layout = make_layout(kernel.layout, filled)
        total = sum(laws.entropy.values(), start=jnp.zeros(()))
        for block in self.blocks:
            total = total + block.law.entropy(laws.natural[block.name])
        left_out = {p.factor for p in without.pieces} if without else set()
        for name, c in cells.items():
            if name in left_out:
                continue
            total = total + self._expectation(name, self.table(self.by_name[name], c, filled), laws.shares, layout)
        return total

    def update_block(self, block: Block, params: Params, bundle: Bundle, laws: Laws, layout: Layout) -> Any:
        """The law of a continuous latent under all others, from slopes of its expected log joint."""
        slope = jax.grad(lambda u: self.joint(block, u[None], params, bundle, laws, layout))
        points = block.law.points(laws.natural[block.name])
        return block.law.solve(points, tuple(slope(u) for u in points))

    def joint(
        self, block: Block, u: Array, params: Params, bundle: Bundle, laws: Laws, layout: Layout, names: Sequence[str] = ()
    ) -> Array:
        """The expected log joint of a block's factors, or of some, where its latent has the values `u`, by node."""
        points = {**self.node_values(laws), block.name: u}
        names = names or block.factors
        nodes = {n: nodes_of(self.by_name[n], points) for n in names}
        filled = with_nodes(bundle, nodes)
        values, total = graph_values(filled, params), jnp.zeros(())
        for name in names:
            factor = self.by_name[name]
            table = self.table(factor, () if self.picked(factor) else factor.cells(values, filled.rows[name]), filled)
            total = total + self._expectation(name, table, laws.shares, layout)
        return total

    def node_values(self, laws: Laws) -> dict[str, Array]:
        """Equally weighted values of every block, `(nodes, *shape, *event)`."""
        nodes = {b.name: b.law.nodes(laws.natural[b.name]) for b in self.blocks}
        return jax.tree.map(made_once, nodes)  # rows gather them

    def nodes(self, laws: Laws) -> dict[str, Any]:
        """For each factor that reads blocks, its nodes and its own latent's values there."""
        points = self.node_values(laws)
        return {f.name: nodes_of(f, points) for f in self.factors}

    def nodes_at(self, latents: Mapping[str, Array], bundle: Bundle) -> dict[str, Any]:
        """One node for each factor, where the continuous latents have given values."""
        del bundle
        points = {b.name: jnp.reshape(latents[b.name], (1, *b.size)) for b in self.blocks}
        return {f.name: nodes_of(f, points) for f in self.factors}

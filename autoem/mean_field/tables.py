"""What a mean field's updates and its bound are made of: expected tables, joints and nodes under given laws.

In: factors that were built for it, parameters, data and laws. Out: tables with named axes and sums over them; nothing
is updated here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from autoem.e_step.elimination.layout import Layout, Table
from autoem.e_step.tables.tabulate import Factor
from autoem.e_step.treatment import AbstractTreatment
from autoem.graph.named import Named, made_once
from autoem.lowering.kernel import Kernel, with_nodes
from autoem.m_step.problem import Bundle, Params, graph_values, make_layout
from autoem.mean_field.groups import (
    Block,
    Group,
    Piece,
    expectation,
    expected_table,
    finite,
    nodes_of,
    over_nodes,
    picked_table,
    weight_of,
    with_base,
)


class Laws(NamedTuple):
    """The state: marginals by piece, entropies by group, log probabilities of groups by cell, laws of blocks."""

    shares: dict[str, Named]
    entropy: dict[str, Array]
    scores: dict[str, Named]
    natural: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class AbstractTables(AbstractTreatment):
    """The factors of a mean field over `groups` of discrete latents and `blocks` of continuous ones."""

    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    by_name: Mapping[str, Factor]

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Those that read continuous latents."""
        return tuple(f for f in self.by_name.values() if f.completions is not None)

    def pieces_of(self, factor: str) -> tuple[Piece, ...]:
        return self._pieces.get(factor, ())

    @functools.cached_property
    def _pieces(self) -> dict[str, tuple[Piece, ...]]:
        out: dict[str, tuple[Piece, ...]] = {}
        for g in self.groups:
            for p in g.pieces:
                out[p.factor] = (*out.get(p.factor, ()), p)
        return out

    def table(self, factor: Factor, cells: Any, bundle: Bundle) -> Named:
        """A factor's expected log densities over the blocks' laws, for every state of its discrete latents."""
        if self.picked(factor):
            return picked_table(factor, bundle.nodes[factor.name], bundle.cells)
        rows = bundle.rows[factor.name]
        value = factor.table(jax.tree.map(made_once, cells) if factor.completions else cells, rows).value
        value = with_base(factor, rows, value)
        return finite(over_nodes(value))

    @staticmethod
    def picked(factor: Factor) -> bool:
        """Whether a discrete latent's probabilities are a cell of a continuous one, so that logs precede the lookup."""
        return factor.completions is not None and factor.completions.members[0].name in factor.routes

    def cells(self, kernel: Kernel, params: Params, filled: Bundle, names: Iterable[str]) -> dict[str, Any]:
        """The cells of factors, but for those that are looked up without."""
        found = kernel.problem.cells(params, filled, [n for n in names if not self.picked(self.by_name[n])])
        return {n: found.get(n, ()) for n in names}

    def _tables(
        self, kernel: Kernel, params: Params, bundle: Bundle, laws: Laws, group: Group, without: Sequence[str] = ()
    ) -> dict[str, Named]:
        """Tables of the factors that a group reads at the nodes of the blocks, but for those `without`."""
        filled = with_nodes(bundle, self.nodes(laws))
        names = [n for n in dict.fromkeys(p.factor for p in group.pieces) if n not in without]
        cells = self.cells(kernel, params, filled, names)
        return {n: self.table(self.by_name[n], cells[n], filled) for n in names}

    def _expected(self, group: Group, tables: Mapping[str, Named], laws: Laws, layout: Layout) -> list[Table]:
        """The tables of a group's pieces, of the factors whose tables are given; all other laws as they are."""
        out = []
        for p in (p for p in group.pieces if p.factor in tables):
            others = [laws.shares[o.key] for o in self.pieces_of(p.factor) if o.key != p.key]
            out.append(expected_table(self.by_name[p.factor], p, tables[p.factor], others, layout, group.simple))
        return out

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
        self,
        block: Block,
        u: Array,
        params: Params,
        bundle: Bundle,
        laws: Laws,
        layout: Layout,
        names: Sequence[str] = (),
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

"""Blocks of continuous latents as the kernel sees them: integrate, then say where and how heavy the nodes are.

In: a block of `e_step`, parameters and a `Bundle`. Out: its table, its moments, its nodes by factor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.elimination.eliminate import Table
from autoem.e_step.gaussian.block import GaussianBlock
from autoem.e_step.gaussian.chain import GaussianChain
from autoem.e_step.gaussian.crossed import CrossedBlock
from autoem.e_step.gaussian.missing import MissingEntries
from autoem.e_step.gaussian.nested import NestedBlock
from autoem.e_step.gaussian.patterns import Completed
from autoem.e_step.gaussian.pooled import is_pooled
from autoem.e_step.tables.completions import NODES
from autoem.e_step.tables.regression import POOLED, on_vectors
from autoem.e_step.tables.tabulate import Factor
from autoem.e_step.treatment import TreatedRow
from autoem.graph.named import Named, multiply, named
from autoem.m_step.problem import Bundle, Params, graph_values


@dataclasses.dataclass(frozen=True, eq=False)
class Integral:
    """One block, with what the kernel asks of it."""

    block: Any

    @property
    def factors(self) -> tuple[Factor, ...]:
        return self.block.factors

    def rows(self) -> list[TreatedRow]:
        """How each latent is treated, in words."""
        strategy = self.block.strategy
        return [
            TreatedRow(m.name, int(np.prod(m.shape, dtype=int)), self.block.reason(m), strategy, m.plates)
            for m in self.block.members
        ]

    @property
    def source(self) -> str:
        """Where the integral is derived."""
        return self.block.source

    @property
    def is_gaussian(self) -> bool:
        """Whether its posterior is Gaussian given the discrete latents beside it."""
        return isinstance(self.block, GaussianBlock | GaussianChain | MissingEntries | NestedBlock | CrossedBlock)

    @functools.cached_property
    def pooled(self) -> frozenset[str]:
        """Sites whose statistics are sums over all rows, so that no nodes are needed for them."""
        if not self.is_gaussian or not self.has_nodes:
            return frozenset()
        return frozenset(f.name for f in self.factors if is_pooled(f))

    def as_solved(self) -> dict[str, Factor]:
        """The factors that the M-step sees in another form than the E-step."""
        pooled = [f for f in self.factors if f.name in self.pooled]
        families = {f.name: on_vectors(f._family) if f._family.event_dim else POOLED for f in pooled}
        return {f.name: dataclasses.replace(f, family=families[f.name], pooled=True) for f in pooled}

    @property
    def has_nodes(self) -> bool:
        """Whether nodes stand for its latents; missing entries of a site's own vectors need none."""
        return not isinstance(self.block, MissingEntries)

    def integrate(self, params: Params, bundle: Bundle) -> tuple[Table, Any]:
        """The integral over the latents as a table, and the moments of their posterior."""
        return self.block.integrate(graph_values(bundle, params), bundle.rows, bundle.cells)

    def nodes_of_factors(self, moments: Any, bundle: Bundle) -> dict[str, tuple[Any, Named | None]]:
        """For each factor its nodes, and the values of its own latent there (None where it has none)."""
        if not self.has_nodes:
            return {}
        return {f.name: with_value(f, bundle, *self.block.complete(f, moments, bundle.cells)) for f in self.factors}

    def nodes_at(self, latents: Mapping[str, Array], bundle: Bundle) -> dict[str, tuple[Any, Named | None]]:
        """One node for each factor, where the latents have given values."""
        if not self.has_nodes:
            return {}
        return {f.name: with_value(f, bundle, *self.block.at(f, latents, bundle.cells)) for f in self.factors}

    def density_at(self, latents: Mapping[str, Array], params: Params, bundle: Bundle) -> Named:
        """The log density of all its sites by the quadratic form that is integrated."""
        return self.block.density_at(latents, graph_values(bundle, params), bundle.rows, bundle.cells)

    def weights(self, slope: Named) -> Named:
        """Posterior probabilities of the discrete latents of each cell, from the gradient by the block's table."""
        if not self.block.discrete:
            return Named(jnp.ones(()), ())
        absent = [s for p, s in zip(self.block.plates, self.block.shape, strict=True) if p not in slope.axes]
        return Named(slope.array / float(np.prod(absent, dtype=float)), slope.axes)

    def expected(self, factor: Factor, params: Params, bundle: Bundle, weight: Named, moments: Any) -> Any:
        """Expected statistics of a factor, in data that hold the nodes."""
        if factor.name in self.pooled:
            return self.block.pooled(factor, bundle.rows[factor.name], moments, weight, bundle.cells)
        if self.has_nodes:
            return pulled_back(factor, params, bundle, self.node_weights(factor, weight, moments, bundle))
        if isinstance(moments, Completed):
            shapes = jax.eval_shape(lambda p, b: pulled_back(factor, p, b, weight), dict(params), bundle)
            return self.block.summed_statistics(shapes, moments)
        own = bundle.rows[factor.name]
        rows = {**bundle.rows, factor.name: self.block.filled(moments, own)}
        t, n = pulled_back(factor, params, dataclasses.replace(bundle, rows=rows), weight)
        return t + self.block.spread_statistics(t.shape, weight, moments, own), n

    def node_weights(self, factor: Factor, weight: Named, moments: Any, bundle: Bundle) -> Named:
        """How often every node of a factor's rows counts."""
        assert factor.completions is not None
        if not factor.completions.affine:
            return self.block.node_weights(factor, weight, moments, bundle.cells)
        count = factor.completions.dim + 1
        here = self.block.by_row(factor, weight, bundle.cells)
        return multiply(here, Named(jnp.full(count, 1 / count), (NODES,)))


def with_value(f: Factor, bundle: Bundle, points: Any, own: Named | None) -> tuple[Any, Named | None]:
    """Nodes of a factor with its values there, where latents stand in what it observes."""
    if not f.value_hidden:
        return points, own
    events = f.family.event_dim if f.family else 0
    array = f.argument("value", {**graph_values(bundle, {}), ("nodes", f.name): points}, events)
    names = tuple(f"event{i}" for i in range(events))
    value = named(array, (*(z.name for z in f.parents), NODES, *f.site.axes, *names))
    order = (*names, *(a for a in value.axes if a not in names))
    return points, Named(value.to(order), order)


def pulled_back(factor: Factor, params: Params, bundle: Bundle, weight: Named) -> Any:
    """Expected statistics of a factor whose table counts with `weight`."""
    rows = bundle.rows[factor.name]

    def table(cells) -> Named:
        return factor.table(cells, rows).value

    value, pull = jax.vjp(table, factor.cells(graph_values(bundle, params), rows))
    absent = [p for p in factor.kept if p not in weight.axes and p not in value.axes]
    repeats = float(np.prod([factor.sizes[p] for p in absent], dtype=float))
    cotangent = weight.sum(a for a in weight.axes if a not in value.axes).to(value.axes) * repeats
    return pull(Named(jnp.broadcast_to(cotangent, value.array.shape).astype(value.array.dtype), value.axes))[0]

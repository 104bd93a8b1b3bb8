"""Blocks of continuous latents as the kernel sees them: integrate, then say where and how heavy the nodes are.

In: a block of `e_step`, parameters and a `Bundle`. Out: its table, its moments, its nodes by factor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._named import Named, add, contract, multiply
from autoem.e_step.completions import NODES
from autoem.e_step.elimination import Table
from autoem.e_step.gaussian import DIM, OTHER, GaussianBlock, Moments
from autoem.e_step.tables import Factor
from autoem.m_step.problem import Bundle, Params, graph_values


@dataclasses.dataclass(frozen=True)
class Row:
    """What the plan says of one latent."""

    name: str
    cells: int
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Integral:
    """One block, with what the kernel asks of it."""

    block: GaussianBlock

    @property
    def factors(self) -> tuple[Factor, ...]:
        return self.block.factors

    def rows(self) -> list[Row]:
        """How each latent is treated, in words."""
        block, out = self.block, []
        for m in block.members:
            cells = int(np.prod(m.shape, dtype=int))
            reason = "Gaussian: every site that reads it is Normal with a mean affine in it"
            reason += f"; {cells:,} cells of {m.dim} dimensions" if cells > 1 else f"; {m.dim} dimensions"
            if len(block.members) > 1:
                reason += f", together with {', '.join(n for n in block.names if n != m.name)}"
            if block.discrete:
                reason += f"; a Gaussian for each state of {', '.join(block.states)}"
            if block.dense:
                reason += f"; all cells are one vector of {block.dim:,}, since rows read them by different indices"
            elif block.routed:
                reason += "; rows find their cell by index"
            out.append(Row(m.name, cells, reason))
        return out

    def integrate(self, params: Params, bundle: Bundle) -> tuple[Table, Moments]:
        """The integral over the latents as a table, and the moments of their posterior."""
        return self.block.integrate(graph_values(bundle, params), bundle.rows, bundle.cells)

    def nodes_of_factors(self, moments: Moments, bundle: Bundle) -> dict[str, tuple[Any, Named | None]]:
        """For each factor its nodes, and the values of its own latent there (None where it has none)."""
        return {f.name: self.block.complete(f, moments, bundle.cells) for f in self.factors}

    def nodes_at(self, latents: Mapping[str, Array], bundle: Bundle) -> dict[str, tuple[Any, Named | None]]:
        """One node for each factor, where the latents have given values."""
        return {f.name: self.block.at(f, latents, bundle.cells) for f in self.factors}

    def density_at(self, latents: Mapping[str, Array], params: Params, bundle: Bundle) -> Named:
        """The log density of all its sites by the quadratic form that is integrated."""
        block = self.block
        precision, shift, constant = block.quadratic(graph_values(bundle, params), bundle.rows, bundle.cells)
        w = block.coordinates(latents)
        other = Named(w.array, tuple(OTHER if a == DIM else a for a in w.axes))
        keep = (*block.states, *block.plates)
        linear, square = contract(keep, shift, w), contract(keep, precision, w, other)
        return add(constant, linear, Named(-0.5 * square.array, square.axes))

    def weights(self, slope: Named) -> Named:
        """Posterior probabilities of the discrete latents of each cell, from the gradient by the block's table."""
        if not self.block.discrete:
            return Named(jnp.ones(()), ())
        absent = [s for p, s in zip(self.block.plates, self.block.shape, strict=True) if p not in slope.axes]
        return Named(slope.array / float(np.prod(absent, dtype=float)), slope.axes)

    def node_weights(self, factor: Factor, weight: Named, bundle: Bundle) -> Named:
        """How often every node of a factor's rows counts."""
        assert factor.completions is not None
        count = factor.completions.dim + 1
        here = self.block.by_row(factor, weight, bundle.cells)
        return multiply(here, Named(jnp.full(count, 1 / count), (NODES,)))

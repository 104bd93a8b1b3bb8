r"""Laplace's approximation, cell by cell: a Gaussian about the mode of each cell's log joint.

In: the cells of a block of continuous latents, of any dimension. Out: the approximate integral of every cell,

.. math:: \log \int e^{J(u)} du \approx J(\hat u) + \tfrac d2 \log 2\pi - \tfrac12 \log \det H,

and nodes that have the mean and the covariance of the Gaussian.

References:
    Tierney and Kadane 1986, "Accurate approximations for posterior moments and marginal densities".
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from autoem.e_step.completions import simplex
from autoem.e_step.local import CellPosterior, Cells, LocalBlock
from autoem.e_step.quadrature import Gauss


@dataclasses.dataclass(frozen=True, eq=False)
class LaplaceCells(Gauss):
    """The Gaussian about every cell's mode; the search for the mode is that of quadrature."""

    strategy = "Laplace"
    source = "Tierney and Kadane 1986; Breslow and Clayton 1993 (Laplace's approximation)"

    def integrate(self, cells: Cells) -> CellPosterior:
        at = cells.count
        mode, root, log_det = self.place(cells)
        d = mode.shape[-1]
        integral = jnp.squeeze(self.joint(cells, jnp.expand_dims(mode, at)), at) + log_det
        integral = integral + 0.5 * d * math.log(2 * math.pi)
        if (present := cells.present) is not None:
            flat = jnp.squeeze(cells.joint(self.from_free(cells, jnp.expand_dims(mode, at))[0]), at)
            integral = jnp.where(jnp.squeeze(present, at), integral, flat)
        corners = jnp.asarray(simplex(d), mode.dtype)
        x = jnp.stack([mode + root @ z for z in corners], at)
        nodes, _ = self.from_free(cells, x)
        weights = jnp.full((*(1,) * at, d + 1, *(1,) * len(cells.block.shape)), 1 / (d + 1), mode.dtype)
        return CellPosterior(integral, nodes, weights, (mode, root, cells), at)

    def reason(self, block: LocalBlock) -> str:
        d = sum(m.dim for m in block.members)
        return (
            f"approximate: Laplace's approximation in {d} dimension{'s' * (d > 1)}, since {block.refusal}, and "
            f"{self.why}; the objective is that of the log-likelihood"
        )

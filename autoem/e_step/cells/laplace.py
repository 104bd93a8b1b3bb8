r"""Laplace's approximation, cell by cell: a Gaussian about the mode of each cell's log joint.

In: the cells of a block of continuous latents, of any dimension. Out: the approximate integral of every cell,

.. math:: \log \int e^{J(u)} du \approx J(\hat u) + \tfrac d2 \log 2\pi - \tfrac12 \log \det H,

and nodes that have the covariance of the Gaussian, about the mean :math:`\hat u - \tfrac12 H^{-1} \nabla \log \det H`:
with it the M-step follows the gradient of the approximate integral, in which the mode moves with the parameters.

References:
    Tierney and Kadane 1986, "Accurate approximations for posterior moments and marginal densities"; Tierney, Kass and
    Kadane 1989 (the mean).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.cells.local import CellPosterior, Cells, LocalBlock
from autoem.e_step.cells.quadrature import MAX_DIMENSIONS, Gauss, held, over, slope_and_curvature
from autoem.e_step.tables.completions import standard_nodes

PAIRS = 4  # of nodes for each dimension, beyond three


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
        integral = with_slope_of(integral, self.moving(cells, mode, root))
        if (present := cells.present) is not None:
            flat = jnp.squeeze(cells.joint(self.from_free(cells, jnp.expand_dims(mode, at))[0]), at)
            integral = jnp.where(jnp.squeeze(present, at), integral, flat)
        standard, share = self.standard(d)
        centre = mode + self.shift(cells, mode, root)
        x = over(lambda z: centre + root @ z, jnp.asarray(standard, mode.dtype), at)
        nodes, _ = self.from_free(cells, x)
        weights = jnp.asarray(share, mode.dtype).reshape(*(1,) * at, -1, *(1,) * len(cells.block.shape))
        return CellPosterior(integral, nodes, weights, (mode, root, cells), at)

    def moving(self, cells: Cells, mode: Array, root: Array) -> Array:
        """The approximate integral up to a constant, with the derivatives in the parameters that it has.

        The search for the mode is held. Two chord steps from where it ended move as the mode does, up to second order.
        """

        def density(x: Array) -> Array:
            return jnp.squeeze(self.joint(cells, jnp.expand_dims(x, cells.count)), cells.count)

        slope = jax.grad(lambda x: density(x).sum())
        x, root = jax.lax.stop_gradient(mode), jax.lax.stop_gradient(root)
        for _ in range(2):
            x = x + jnp.einsum("...ij,...kj,...k->...i", root, root, slope(x))
        return density(x) - 0.5 * jnp.linalg.slogdet(slope_and_curvature(slope, x)[1])[1]

    def standard(self, d: int) -> tuple[np.ndarray, np.ndarray]:
        """Nodes `(nodes, d)` of a standard normal law, and their weights."""
        if d > MAX_DIMENSIONS:
            nodes = standard_nodes(d, PAIRS * d)
            return nodes, np.full(len(nodes), 1 / len(nodes))
        z, w = np.polynomial.hermite_e.hermegauss(5)
        grid = np.stack(np.meshgrid(*[z] * d, indexing="ij"), -1).reshape(-1, d)
        share = np.stack(np.meshgrid(*[w / w.sum()] * d, indexing="ij"), -1).reshape(-1, d).prod(-1)
        return grid, share

    def shift(self, cells: Cells, mode: Array, root: Array) -> Array:
        """From every mode to the mean, by the third derivatives there; at most one standard deviation a coordinate."""
        still = dataclasses.replace(cells, values=held(cells.values), rows=held(cells.rows))

        def density(x: Array) -> Array:
            return self.joint(still, jnp.expand_dims(x, cells.count))

        def bend(x: Array) -> Array:
            """`tr(H(x) H^{-1})` of all cells together, whose gradient at the mode is that of `log det H`."""

            def along(r: Array) -> Array:
                slope = lambda y: jax.jvp(density, (y,), (r,))[1]  # noqa: E731
                return -jax.jvp(slope, (x,), (r,))[1].sum()

            return over(along, jnp.moveaxis(root, -1, 0), 0).sum()

        steps = -0.5 * jnp.einsum("...ij,...i->...j", root, jax.grad(bend)(mode))  # in standard deviations
        far = jnp.sqrt((steps**2).mean(-1, keepdims=True))
        return jnp.einsum("...ij,...j->...i", root, steps / jnp.maximum(far, 1))

    def reason(self, block: LocalBlock) -> str:
        d = sum(m.dim for m in block.members)
        return (
            f"approximate: Laplace's approximation in {d} dimension{'s' * (d > 1)}, since {block.refusal}, and "
            f"{self.why}; the objective is that of the log-likelihood"
        )


def with_slope_of(value: Array, other: Array) -> Array:
    """A value with the derivatives of another."""

    @jax.custom_jvp
    def first(value: Array, other: Array) -> Array:
        return value

    first.defjvp(lambda primals, tangents: (first(*primals), tangents[1]))
    return first(value, other)

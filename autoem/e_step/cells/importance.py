r"""Importance sampling about the mode, cell by cell: weighted draws in place of the nodes of a rule.

In: the cells of a block of continuous latents, of any dimension. Out: an unbiased estimate of every cell's integral,

.. math:: \int e^{J(u)} du \approx \frac1S \sum_s w_s, \qquad w_s = \frac{e^{J(u_s)}}{q(u_s)}, \quad
   u_s = \hat u + L t_s,

with :math:`t_s` draws of a spherical t law, `L` a root of the inverse curvature at the mode, and the draws with their
weights as nodes. The draws `t` are the same at every step, so that the steps of EM are a map with a fixed point; every
cell has its own, so that the errors of the cells do not add up.

References:
    Geweke 1989, "Bayesian inference in econometric models using Monte Carlo integration"; Durbin and Koopman 1997;
    Quintana, Liu and del Pino 1999, "Monte Carlo EM with importance reweighting" (fixed draws).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import gammaln

from autoem.e_step.cells.local import Cells, LocalBlock
from autoem.e_step.cells.quadrature import Gauss
from autoem.e_step.strategies import Importance

SOURCE = "Geweke 1989; Quintana, Liu and del Pino 1999 (importance sampling)"
OBJECTIVE = "log-likelihood by importance sampling"


def t_draws(key: Array, shape: tuple[int, ...], freedom: float) -> Array:
    """Draws `shape`, whose last axis is one spherical t law's (a Normal's where `freedom` is infinite)."""
    normal, wide = jax.random.split(key)
    z = jax.random.normal(normal, shape)
    if math.isinf(freedom):
        return z
    return z * jnp.sqrt(freedom / (2 * jax.random.gamma(wide, 0.5 * freedom, (*shape[:-1], 1))))


def t_density(z: Array, freedom: float) -> Array:
    """Log density of that law at `z`, summed over the last axis."""
    dim, square = z.shape[-1], (z**2).sum(-1)
    if math.isinf(freedom):
        return -0.5 * (square + dim * math.log(2 * math.pi))
    half = 0.5 * (freedom + dim)
    level = gammaln(half) - gammaln(0.5 * freedom) - 0.5 * dim * math.log(freedom * math.pi)
    return level - half * jnp.log1p(square / freedom)


@dataclasses.dataclass(frozen=True, eq=False)
class ImportanceCells(Gauss):
    """Draws of a t law about every cell's mode, weighted; the search for the mode is that of quadrature."""

    wish: Importance

    strategy = "importance"
    smooth = False
    source = SOURCE

    def centre(self, cells: Cells) -> tuple[Array, Array, Array]:
        return self.place(cells)

    def nodes(self, mode: Array, root: Array, at: int) -> tuple[Array, Array]:
        shape = (*mode.shape[:at], self.wish.num_samples, *mode.shape[at:])
        t = t_draws(jax.random.key(61), shape, self.wish.freedom)
        d = mode.shape[-1]
        x = jnp.expand_dims(mode, at) + (jnp.expand_dims(root, at) @ t[..., None])[..., 0]
        # a rule's nodes are sqrt(2) of a unit apart, which `integrate` puts back
        return x, -t_density(t, self.wish.freedom) - math.log(self.wish.num_samples) - 0.5 * d * math.log(2)

    def reason(self, block: LocalBlock) -> str:
        d = sum(m.dim for m in block.members)
        return (
            f"approximate: importance sampling, {self.wish.num_samples:,} draws about the mode in {d} "
            f"dimension{'s' * (d > 1)}, since {block.refusal}, and {self.why}; the objective is the {OBJECTIVE}"
        )

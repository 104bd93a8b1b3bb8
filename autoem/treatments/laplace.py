r"""Laplace's approximation over all cells of continuous latents at once.

In: the latents and the factors that read them. Out: the mode of their joint density in free coordinates, by Newton's
method from where the last step left it; the Gaussian about it; and nodes for the M-step, of that Gaussian moved from
the mode :math:`\hat u` to the mean,

.. math:: E[u] \approx \hat u - \tfrac12 H^{-1} \nabla \log \det H(\hat u),

without which the M-step would not follow the gradient of the approximate log-likelihood, in which the mode moves too.

References:
    Tierney and Kadane 1986; Tierney, Kass and Kadane 1989, "Fully exponential Laplace approximations".
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.cells.quadrature import principal
from autoem.e_step.tables.completions import standard_nodes
from autoem.e_step.treatment import Expectation
from autoem.lowering.kernel import LAPLACE
from autoem.treatments.drawn import AbstractDrawn, Draws

if TYPE_CHECKING:
    from autoem.lowering.kernel import Kernel
    from autoem.m_step.problem import Bundle, Params

ROUNDS, CLOSE, HALVINGS = 50, 1e-8, 12
PAIRS = 64, 512  # of nodes: one for each coordinate, within these limits
MAX_COORDINATES = 2000


class Climb(NamedTuple):
    """The search for the mode: where it is, the log density there, and how far the last step went."""

    at: Array
    value: Array
    far: Array
    step: Array


@dataclasses.dataclass(frozen=True, eq=False)
class JointLaplace(AbstractDrawn):
    """A Gaussian about the joint mode."""

    objective_name = LAPLACE
    strategy = "Laplace"
    smooth = True
    comparable = True
    slow = True
    falls = True  # its maximum is not quite that of the M-step's Q
    source = "Tierney and Kadane 1986; Breslow and Clayton 1993 (Laplace's approximation)"

    @property
    def num_draws(self) -> int:
        return len(self.spread)

    @property
    def spread(self) -> np.ndarray:
        """Points with mean zero and unit variance along every coordinate, `(points, dim)`."""
        return standard_nodes(self.hidden.dim, int(np.clip(self.hidden.dim, *PAIRS)))

    def init(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> Any:
        return jnp.zeros(self.hidden.dim)

    def expect(self, kernel: Kernel, params: Params, bundle: Bundle, state: Any) -> Expectation:
        mode, value, root, log_det = self.place(kernel, params, bundle, state)
        draws = self.about(kernel, params, bundle, mode, root, jnp.asarray(self.spread, mode.dtype))
        weights = jnp.full(self.num_draws, 1 / self.num_draws)
        _, found = self.hidden.expectation(kernel, params, bundle, draws, weights)
        likelihood = value + log_det + 0.5 * self.hidden.dim * math.log(2 * math.pi)
        return found._replace(likelihood=likelihood, state=mode)

    def about(self, kernel: Kernel, params: Params, bundle: Bundle, mode: Array, root: Array, z: Array) -> Draws:
        """Values of the latents that standard coordinates `z`, `(draws, dim)`, stand for."""
        centre = mode + self.shift(kernel, params, bundle, mode, root)
        return self.hidden.constrain(centre + z @ root.T)[0]

    def place(self, kernel: Kernel, params: Params, bundle: Bundle, start: Array) -> tuple[Array, ...]:
        """The mode, the log density there, a root of the inverse curvature, and the log of its determinant."""

        def density(x: Array) -> Array:
            return self.log_density(kernel, params, bundle, x[None])[0]

        def step(s: Climb) -> Climb:
            slope = jax.grad(density)(s.at)
            root, _ = inverse_root(-jax.hessian(density)(s.at))
            along = root.T @ slope  # in standard deviations of the Gaussian there
            jump = root @ along

            def shorter(carry):
                share, _, tries = carry
                share = 0.5 * share
                return share, density(s.at + share * jump), tries + 1

            first = (jnp.ones(()), density(s.at + jump), 0)
            share, value, _ = jax.lax.while_loop(
                lambda c: ~(c[1] >= s.value - 1e-12 * (1 + jnp.abs(s.value))) & (c[2] < HALVINGS), shorter, first
            )
            better = value >= s.value - 1e-12 * (1 + jnp.abs(s.value))
            at = jnp.where(better, s.at + share * jump, s.at)
            far = jnp.where(better, share * jnp.sqrt((along**2).sum()), 0.0)
            return Climb(at, jnp.where(better, value, s.value), far, s.step + 1)

        begin = Climb(start, density(start), jnp.asarray(jnp.inf), jnp.zeros((), int))
        end = jax.lax.while_loop(lambda s: (s.far > CLOSE) & (s.step < ROUNDS), step, begin)
        return end.at, end.value, *inverse_root(-jax.hessian(density)(end.at))

    def shift(self, kernel: Kernel, params: Params, bundle: Bundle, mode: Array, root: Array) -> Array:
        """From the mode to the mean, by the third derivatives there."""

        def density(x: Array) -> Array:
            return self.log_density(kernel, params, bundle, x[None])[0]

        def bend(x: Array) -> Array:
            """`tr(H(x) H^{-1})`, whose gradient at the mode is that of `log det H`."""

            def along(r: Array) -> Array:
                slope = lambda y: jax.jvp(density, (y,), (r,))[1]  # noqa: E731
                return -jax.jvp(slope, (x,), (r,))[1]

            return jax.vmap(along, 1)(root).sum()

        move = -0.5 * root @ (root.T @ jax.grad(bend)(mode))
        far = jnp.sqrt((jnp.linalg.solve(root, move) ** 2).sum() / len(mode))
        return move / jnp.maximum(far, 1)  # where the expansion fails, at most one standard deviation a coordinate

    def posterior_draws(self, kernel: Kernel, params: Params, bundle: Bundle, state: Any, key: Array, num: int):
        mode, _, root, _ = self.place(kernel, params, bundle, state)
        return self.about(kernel, params, bundle, mode, root, jax.random.normal(key, (num, self.hidden.dim)))

    def reason(self) -> str:
        return (
            f"approximate: Laplace's approximation over all {self.hidden.dim:,} coordinates at once, since "
            f"{self.hidden.why}; the objective is that of the log-likelihood"
        )


def inverse_root(curvature: Array) -> tuple[Array, Array]:
    """A root `R` of the inverse, `R R' = H^{-1}`, and its log determinant; `H` is made positive where it is not."""
    curvature = 0.5 * (curvature + curvature.T)
    lower = jnp.linalg.cholesky(curvature)

    def plain() -> tuple[Array, Array]:
        eye = jnp.eye(len(lower), dtype=lower.dtype)
        root = jax.scipy.linalg.solve_triangular(lower, eye, lower=True).T
        return root, -jnp.log(jnp.diagonal(lower)).sum()

    def mended() -> tuple[Array, Array]:
        length, axes = principal(curvature)
        return axes / jnp.sqrt(length), -0.5 * jnp.log(length).sum()

    return jax.lax.cond(jnp.isfinite(lower).all(), plain, mended)

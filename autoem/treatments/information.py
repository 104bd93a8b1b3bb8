r"""The observed information where latents are drawn: the curvature of the log-likelihood, by weighted draws.

In: a kernel whose latents are drawn, and a function from free coordinates of the parameters to parameters. Out: minus
the Hessian of the log posterior, by Louis' identity,

.. math:: I = -E[\nabla^2 J] - \mathrm{Cov}[\nabla J],

with `J` the log joint density of data and drawn latents, the others summed out, under importance weights about the
mode.

References:
    Louis 1982, "Finding the observed information matrix when using the EM algorithm".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import PlanError
from autoem.treatments.drawn import AbstractDrawn
from autoem.treatments.laplace import MAX_COORDINATES, JointLaplace
from autoem.treatments.sampling import BATCHES, proposals

if TYPE_CHECKING:
    from autoem.lowering.kernel import Kernel
    from autoem.m_step.problem import Bundle, Params

ENOUGH = 100.0  # draws of equal weight that the weighted ones have to be worth


def drawn_information(kernel: Kernel, moved: Callable[[Array], Params], size: int, bundle: Bundle, state) -> np.ndarray:
    """The information `(size, size)` about `moved(0)`; `state` is what the E-step remembers there.

    Raises:
        PlanError: there are too many coordinates, or the posterior is too far from a Gaussian, for draws about a mode.
    """
    treatment = kernel.treatment
    assert isinstance(treatment, AbstractDrawn)
    hidden, method = treatment.hidden, JointLaplace(treatment.hidden)
    if hidden.dim > MAX_COORDINATES:
        raise refused(hidden.names[0], f"there are {hidden.dim:,} coordinates")
    zero = jnp.zeros(size)

    def draw(params: Params, bundle: Bundle) -> tuple[Array, Array]:
        key = jax.random.key(73)
        one = hidden.free(treatment.posterior_draws(kernel, params, bundle, state, key, 1))[0]
        return proposals(method, kernel, params, bundle, key, one)[:2]

    x, log_weights = jax.jit(draw)(moved(zero), bundle)
    weights = jax.nn.softmax(log_weights)
    worth = float(1 / (weights**2).sum())
    if not worth >= ENOUGH:
        raise refused(hidden.names[0], f"{len(x):,} draws about the mode are worth {worth:.0f} of the posterior")

    def batch(pair: tuple[Array, Array], bundle: Bundle) -> tuple[Array, Array, Array]:
        draws, share = hidden.constrain(pair[0])[0], pair[1]

        def each(shift: Array) -> Array:
            return hidden.log_joint(kernel, moved(shift), bundle, draws)

        slopes = jax.jacfwd(each)(zero)
        bend = jax.hessian(lambda v: share @ each(v))(zero)
        return bend, jnp.einsum("s,si,sj->ij", share, slopes, slopes), share @ slopes

    def prior(shift: Array) -> Array:
        return kernel.log_prior(kernel.problem.cells(moved(shift), bundle), bundle)

    batches = x.reshape(BATCHES, -1, hidden.dim), weights.reshape(BATCHES, -1)
    parts = jax.jit(lambda pairs, b: jax.lax.map(lambda pair: batch(pair, b), pairs))(batches, bundle)
    bend, square, slope = (p.sum(0) for p in parts)
    return np.asarray(-(bend + square - jnp.outer(slope, slope) + jax.jit(jax.hessian(prior))(zero)), float)


def refused(name: str, why: str) -> PlanError:
    return PlanError(
        name,
        problem=f"the curvature of the log-likelihood is not known well enough for standard errors: {why}",
        mend="refit data drawn by result.predictive(key, *args), and take the spread of their parameters",
    )

r"""Importance sampling over all cells of continuous latents at once, about the mode of their joint density.

In: the latents and the factors that read them. Out: draws with weights for the M-step, the same draws at every step in
units of the Gaussian about the mode; the log-likelihood that they estimate,

.. math:: \log p(x) \approx \log \frac1S \sum_s w_s, \qquad w_s = e^{J(u_s)} / q(u_s),

with its standard error by the delta method; and how many draws of equal weight they are worth.

References:
    Geweke 1989; Kong 1992, "A note on importance sampling using standardized weights" (the effective sample size).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from autoem.e_step.cells.importance import OBJECTIVE, SOURCE, t_density, t_draws
from autoem.e_step.treatment import Expectation
from autoem.treatments.laplace import JointLaplace
from autoem.treatments.sampling import estimated

if TYPE_CHECKING:
    from autoem.e_step.strategies import Importance
    from autoem.lowering.kernel import Kernel
    from autoem.m_step.problem import Bundle, Params


class Weighted(NamedTuple):
    """What is remembered: the mode, the standard error of the last estimate, and the worth of its draws."""

    mode: Array
    error: Array
    worth: Array


@dataclasses.dataclass(frozen=True, eq=False)
class JointImportance(JointLaplace):
    """Weighted draws of a t law about the joint mode."""

    wish: Importance

    objective_name = OBJECTIVE
    strategy = "importance"
    smooth = False
    source = SOURCE

    @property
    def num_draws(self) -> int:
        return self.wish.num_samples

    def init(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> Weighted:
        return Weighted(jnp.zeros(self.hidden.dim), jnp.zeros(()), jnp.zeros(()))

    def draws(
        self, kernel: Kernel, params: Params, bundle: Bundle, start: Array, key: Array
    ) -> tuple[Array, Array, Array]:
        """The mode, draws `(num_samples, dim)` in free coordinates, and their log importance weights."""
        mode, _, root, log_det = self.place(kernel, params, bundle, start)
        t = t_draws(key, (self.num_draws, self.hidden.dim), self.wish.freedom)
        x = mode + t @ root.T
        density = t_density(t, self.wish.freedom) - log_det
        return mode, x, self.log_density(kernel, params, bundle, x) - density

    def expect(self, kernel: Kernel, params: Params, bundle: Bundle, state: Weighted) -> Expectation:
        mode, x, log_weights = self.draws(kernel, params, bundle, state.mode, jax.random.key(61))
        likelihood, error = estimated(log_weights)
        weights = jax.nn.softmax(log_weights)
        _, found = self.hidden.expectation(kernel, params, bundle, self.hidden.constrain(x)[0], weights)
        return found._replace(likelihood=likelihood, state=Weighted(mode, error, 1 / (weights**2).sum()))

    def posterior_draws(self, kernel: Kernel, params: Params, bundle: Bundle, state: Weighted, key: Array, num: int):
        fresh, pick = jax.random.split(key)
        _, x, log_weights = self.draws(kernel, params, bundle, state.mode, fresh)
        return self.hidden.constrain(x[jax.random.categorical(pick, log_weights, shape=(num,))])[0]

    def reason(self) -> str:
        return (
            f"approximate: importance sampling, {self.num_draws:,} draws about the mode over all "
            f"{self.hidden.dim:,} coordinates at once, since {self.hidden.why}; the objective is the {OBJECTIVE}"
        )

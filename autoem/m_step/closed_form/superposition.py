r"""Poisson rates that are non-negative sums: EM by superposition, the counts split over their sources.

A Poisson count whose rate is :math:`\lambda_i = b_i + \sum_j a_{ij} \theta_j` is a sum of Poisson counts, one for each
term. Given the total they are multinomial, so the expected counts of source `j` come from a weighted sum over the data,
and the M-step divides them by the exposure:

.. math:: \theta_j \leftarrow \theta_j \, \frac{\sum_i a_{ij} \, y_i / \lambda_i}{\sum_i a_{ij}}

Both sums are the transpose of the link from the parameter to the rate, so no count is ever divided and the operator may
be a matrix, sparse, or a JAX function. With discrete latents beside, `y` and the ones below it are expected counts. A
Gamma prior adds `concentration - 1` above and `rate` below. Several parameters in one rate are taken in turn,
each with the rate that its predecessors left.

Where a coefficient or the rest of the rate may be negative, there is no such split: see `mixed_signs`.

References:
    Shepp and Vardi 1982, "Maximum likelihood reconstruction for emission tomography"; Lange and Carson 1984, "EM
    reconstruction algorithms for emission and transmission tomography".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.counting import fit, latex_name
from autoem.m_step.closed_form.priors import POWERS, arguments_of, prior_of
from autoem.m_step.problem import Bundle, Params, Statistics, Use, graph_values
from autoem.passes.link import Declined
from autoem.passes.signs import refuse_curved


@dataclasses.dataclass(frozen=True, eq=False)
class Superposition(AbstractBlock):
    """The multiplicative update of a non-negative parameter of which Poisson rates are sums."""

    uses: tuple[Use, ...] = ()

    order = 2
    maximises = False
    source = "Shepp and Vardi 1982; Lange and Carson 1984"

    @property
    def augmentation(self) -> str:
        sites = ", ".join(dict.fromkeys(f"'{u.factor.name}'" for u in self.uses))
        return f"the counts of {sites} are split over their sources (superposition), inside the M-step"

    @property
    def update(self) -> str:
        (name,) = self.names
        return f"{name} * A'(E[count] / rate) / A'1, where A is d rate / d {name}"

    @property
    def latex(self) -> str:
        name = latex_name(self.names[0])
        return rf"{name}_j \leftarrow {name}_j \frac{{\sum_i a_{{ij}}\, y_i / \lambda_i}}{{\sum_i a_{{ij}}}}"

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state: Any):
        (name,) = self.names
        old = params[name]
        seen, exposure = jnp.zeros_like(old), jnp.zeros_like(old)
        for use in self.uses:
            s, e = self.sums(use, params, statistics, bundle)
            seen, exposure = seen + s, exposure + e
        prior = prior_of(name, self.problem.factors)
        lowest = 0.0
        if prior is not None:
            names, _, terms = POWERS[prior.site.distribution]
            more, rate = terms(arguments_of(prior, names, graph_values(bundle, params)))
            seen, exposure = seen + more, exposure + rate
            lowest = jnp.finfo(old.dtype).tiny  # a prior's own density is infinite, or 0 times log 0, at zero
        told = exposure > 0  # no datum tells anything of the others, which stay
        new = jnp.maximum(jnp.maximum(seen, 0) / jnp.where(told, exposure, 1), lowest)
        return {name: jnp.where(told, new, old).astype(old.dtype)}, state

    def sums(self, use: Use, params: Params, statistics: Statistics, bundle: Bundle) -> tuple[Array, Array]:
        """Expected counts from every entry of the parameter in one place, and the entry's exposure."""
        name = self.names[0]
        rate, pull = jax.vjp(lambda v: self.rate(use, v, params, bundle), params[name])
        t, n = self.problem.statistics(use, statistics)
        counts, times = fit(t[..., 0], rate.shape), fit(n, rate.shape)
        # a count of zero asks for nothing, and one that no source may bring must not make the others infinite
        possible = (counts > 0) & (rate > 4 * jnp.finfo(rate.dtype).tiny * counts)
        share = jnp.where(possible, counts / jnp.where(possible, rate, 1), 0)
        return params[name] * pull(share)[0], pull(jnp.broadcast_to(times, rate.shape))[0]

    def rate(self, use: Use, value: Array, params: Params, bundle: Bundle) -> Array:
        return self.problem.arguments(use, {**params, self.names[0]: value}, bundle)[use.argument or ""]


def accept(problem, use: Use, name: str, params: Params, bundle: Bundle) -> None:
    """Check that the place is a Poisson rate that is affine in the parameter, by any JAX code.

    Raises:
        Declined: it is not.
    """
    if use.argument is None:
        raise Declined(f"it enters the density of {use} as a whole")
    if use.factor._family.name != "Poisson":
        raise Declined(f"it enters {use}, which is no rate of a Poisson count")
    if use.factor.completions is not None:
        raise Declined(f"it enters {use} beside a continuous latent")
    refuse_curved(
        lambda v: problem.arguments(use, {**params, name: v}, bundle)[use.argument], jnp.asarray(params[name])
    )

r"""Rates that are non-negative sums: EM by superposition, the counts split over their sources.

A Poisson count whose rate is :math:`\lambda_i = b_i + \sum_j a_{ij} \theta_j` is a sum of Poisson counts, one for each
term. Given the total they are multinomial, so the expected counts of source `j` come from a weighted sum over the data,
and the M-step divides them by the exposure:

.. math:: \theta_j \leftarrow \theta_j \, \frac{\sum_i a_{ij} \, y_i / \lambda_i}{\sum_i a_{ij}}

Both sums are the transpose of the link from the parameter to the rate, so no count is ever divided and the operator may
be a matrix, sparse, or a JAX function. With discrete latents beside, `y` and the ones below it are expected counts. A
negative binomial count is a Poisson one whose rate a Gamma variable multiplies: the ones below are the expectations of
that variable, see `rates`. A Gamma prior adds `concentration - 1` above and `rate` below. Several parameters in one
rate are taken in turn, each with the rate that its predecessors left.

Where a coefficient or the rest of the rate may be negative, there is no such split: see `mixed_signs`.

References:
    Shepp and Vardi 1982, "Maximum likelihood reconstruction for emission tomography"; Lange and Carson 1984, "EM
    reconstruction algorithms for emission and transmission tomography".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.counting import latex_name
from autoem.m_step.closed_form.priors import POWERS, arguments_of, prior_of
from autoem.m_step.closed_form.rates import AbstractRate, MixedRate
from autoem.m_step.problem import Bundle, Params, Statistics, graph_values


@dataclasses.dataclass(frozen=True, eq=False)
class Superposition(AbstractBlock):
    """The multiplicative update of a non-negative parameter of which rates of counts are sums."""

    rates: tuple[AbstractRate, ...] = ()

    order = 2
    maximises = False
    reads_cells = True
    source = "Shepp and Vardi 1982; Lange and Carson 1984"

    @property
    def mixed(self) -> bool:
        """Whether a Gamma variable multiplies a rate."""
        return any(isinstance(r, MixedRate) for r in self.rates)

    @property
    def augmentation(self) -> str:
        sites = ", ".join(dict.fromkeys(f"'{r.use.factor.name}'" for r in self.rates))
        given = ", Poisson given a Gamma variable," if self.mixed else ""
        return f"the counts of {sites}{given} are split over their sources (superposition), inside the M-step"

    @property
    def update(self) -> str:
        (name,) = self.names
        exposure = "E[multiplier]" if self.mixed else "1"
        return f"{name} * A'(E[count] / rate) / A'{exposure}, where A is d rate / d {name}"

    @property
    def latex(self) -> str:
        name = latex_name(self.names[0])
        exposure = r"a_{ij}\, \frac{r_i + y_i}{c_i + \lambda_i}" if self.mixed else "a_{ij}"
        return rf"{name}_j \leftarrow {name}_j \frac{{\sum_i a_{{ij}}\, y_i / \lambda_i}}{{\sum_i {exposure}}}"

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state: Any):
        (name,) = self.names
        values = graph_values(bundle, params)
        sums = [self.sums(r, statistics[r.use.factor.name], values, r.known(params, statistics)) for r in self.rates]
        seen, exposure = (sum(s[i] for s in sums) for i in (0, 1))
        return {name: self.moved(params[name], seen, exposure, params, bundle)}, state

    def moved(
        self, old: Array, seen: Array | int, exposure: Array | int, params: Params, bundle: Bundle, share: Any = 1.0
    ) -> Array:
        """Expected counts by exposure, with a `share` of the prior's pseudo-counts."""
        prior = prior_of(self.names[0], self.problem.factors)
        lowest = 0.0
        if prior is not None:
            names, _, terms = POWERS[prior.site.distribution]
            more, rate = terms(arguments_of(prior, names, graph_values(bundle, params)))
            seen, exposure = seen + share * more, exposure + share * rate
            lowest = jnp.finfo(old.dtype).tiny  # a prior's own density is infinite, or 0 times log 0, at zero
        told = jnp.asarray(exposure) > 0  # no datum tells anything of the others, which stay
        new = jnp.maximum(jnp.maximum(seen, 0) / jnp.where(told, exposure, 1), lowest)
        return jnp.where(told, new, old).astype(old.dtype)

    def sums(
        self, rate: AbstractRate, statistics: Any, values: Mapping[Any, Any], known: Array | None = None
    ) -> tuple[Array, Array]:
        """Expected counts from every entry of the parameter in one place, and the entry's exposure.

        The rate is linear in the parameter, so that its transpose needs no rate; that may be `known`.
        """
        key = ("param", self.names[0])
        found = rate.value(values) if known is None else known
        share, times = rate.split(found, statistics, values)
        _, pull = jax.vjp(lambda v: rate.value({**values, key: v}), values[key])
        return values[key] * pull(share)[0], pull(times)[0]


__all__ = ["Superposition"]

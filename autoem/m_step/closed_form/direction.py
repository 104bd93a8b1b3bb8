r"""Angles: the direction of the weighted resultant.

Where `Q` is :math:`C_c \cos\alpha_c + S_c \sin\alpha_c` in the angle of every cell and each cell's angle is one entry
of the parameter (plus data, at most), turning the entry by :math:`\delta` gives :math:`X \cos\delta + Y \sin\delta`
with

.. math:: X_j = \sum_{c \to j} C_c \cos\alpha_c + S_c \sin\alpha_c, \quad
    Y_j = \sum_{c \to j} S_c \cos\alpha_c - C_c \sin\alpha_c

whose maximum is at :math:`\delta_j = \mathrm{atan2}(Y_j, X_j)`. A von Mises prior adds its own resultant.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from autoem.families import Direction
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.counting import fit, latex_name
from autoem.m_step.closed_form.priors import arguments_of, prior_of
from autoem.m_step.problem import Bundle, Params, Statistics, Use, graph_values
from autoem.passes.link import Declined, Linear


@dataclasses.dataclass(frozen=True, eq=False)
class Turn(AbstractBlock):
    """The direction that the weighted sum of unit vectors points to, in `[-pi, pi)`."""

    uses: tuple[Use, ...] = ()

    order = 1
    source = "Mardia and Jupp 2000, Directional Statistics, section 5.3; Banerjee et al. 2005"

    @property
    def update(self) -> str:
        return "atan2(E[sum of sines], E[sum of cosines])"

    @property
    def latex(self) -> str:
        sums = (rf"\sum_n E[w_{{nj}} \mid x] \kappa_j \{f} x_n" for f in ("sin", "cos"))
        return rf"\hat{{{latex_name(self.names[0])}}}_j = \mathrm{{atan2}}\left({', '.join(sums)}\right)"

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state):
        (name,) = self.names
        old = params[name]
        along, across = jnp.zeros_like(old), jnp.zeros_like(old)
        for use in self.uses:
            x, y = self.terms(use, params, statistics, bundle)
            along, across = along + x, across + y
        prior = prior_of(name, self.problem.factors)
        if prior is not None and prior.site.distribution == "VonMises":
            a = arguments_of(prior, ("loc", "concentration"), graph_values(bundle, params))
            along = along + a["concentration"] * jnp.cos(old - a["loc"])
            across = across - a["concentration"] * jnp.sin(old - a["loc"])
        new = old + jnp.arctan2(across, along)
        return {name: (jnp.mod(new + jnp.pi, 2 * jnp.pi) - jnp.pi).astype(old.dtype)}, state

    def terms(self, use: Use, params: Params, statistics: Statistics, bundle: Bundle) -> tuple[Array, Array]:
        """What every entry's cells add up to along its old value and across it."""
        name, arg = self.names[0], use.argument or ""
        args = self.problem.arguments(use, params, bundle)
        rule = use.factor._family.rules[arg]
        assert isinstance(rule, Direction)
        cosine, sine = rule.resultant(*self.problem.statistics(use, statistics), args)
        angle = args[arg]
        _, pull = jax.vjp(lambda v: self.problem.arguments(use, {**params, name: v}, bundle)[arg], params[name])
        along = cosine * jnp.cos(angle) + sine * jnp.sin(angle)
        across = sine * jnp.cos(angle) - cosine * jnp.sin(angle)
        return pull(fit(along, angle.shape))[0], pull(fit(across, angle.shape))[0]


def accept(problem, use: Use, name: str, params: Params, bundle: Bundle) -> None:
    """Check that the place is an angle that is one entry of the parameter, turned by data at most.

    Raises:
        Declined: it is not.
    """
    if use.argument is None:
        raise Declined(f"it enters the density of {use} as a whole")
    if not isinstance(use.factor._family.rules[use.argument], Direction):
        raise Declined(f"it enters {use}, which is no angle")
    start = {("param", name): Linear(jnp.asarray(params[name], float))}
    form = problem.link(use, lambda: start, params, bundle).form
    if not (isinstance(form, Linear) and form.simple and form.power == 1):
        raise Declined(f"the angle in {use} is computed from it, not copied")

r"""Scales and rates: the closed form of every positive parameter whose objective is :math:`a \log s - b\, s^m`.

A standard deviation (`m = -2`), a rate (`m = 1`), a variance behind a square root, a rate times an exposure, a
log-scale behind an exponential, what multiplies a covariance: each place is :math:`s = c\,\theta^e` with one power
`e`, and

.. math:: \theta \leftarrow \theta \left( \frac{\sum a e}{\sum m e\, b\, s^m} \right)^{1 / (m e)}

where the sums run over the cells that the parameter reaches (the transpose of the link). Gamma, inverse Gamma and
half-normal priors of fitting degree add to both sums.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from autoem.families import Power
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.bounded import REAL, Domain, in_order, part_way
from autoem.m_step.closed_form.counting import fit, latex_name
from autoem.m_step.closed_form.priors import POWERS, arguments_of, prior_of
from autoem.m_step.closed_form.structured import accept_direct, coefficients, needs_curvature, power_of, start
from autoem.m_step.problem import Bundle, Params, Statistics, Use, graph_values
from autoem.passes.link import Declined


@dataclasses.dataclass(frozen=True, eq=False)
class Scale(AbstractBlock):
    """Closed form of a positive parameter; `degree` is `m e`, `real` says that the parameter is a logarithm.

    `domain` is what its constraint asks beyond being positive: `Q` is concave in the logarithm.
    """

    uses: tuple[Use, ...] = ()
    degree: float = 1.0
    real: bool = False
    domain: Domain = REAL

    order = 2
    source = "Dempster, Laird and Rubin 1977"

    @property
    def update(self) -> str:
        if self.degree == 1:
            ratio = "E[statistic] / E[exposure]"
        elif self.degree in (-2, -1):
            rules = [use.factor._family.rules[use.argument] for use in self.uses if use.argument]
            squares = all(isinstance(rule, Power) and rule.degree == -2 for rule in rules) and rules
            total = "E[squared residual]" if squares or self.degree == -2 else "E[statistic]"
            ratio = f"sqrt({total} / E[count])" if self.degree == -2 else f"{total} / E[count]"
        else:
            ratio = f"(a / b)^(1/{self.degree:g})"
        return f"log {ratio}" if self.real else f"{ratio}{self.domain}"

    @property
    def maximises(self) -> bool:
        return self.domain.whole

    @property
    def latex(self) -> str:
        name = latex_name(self.names[0])
        if self.degree == -2:
            return rf"\hat{{{name}}} = \sqrt{{E[\sum (x - \mu)^2 \mid x] / E[n \mid x]}}"
        return rf"\hat{{{name}}} = \left(\frac{{a}}{{m\,b}}\right)^{{1/m}},\quad m = {self.degree:g}"

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state):
        (name,) = self.names
        old = params[name]
        a, d = self.sums(params, statistics, bundle)
        # with `d` of the other sign than the degree there is a minimum
        fine = (a * d > 0) & (d * self.degree > 0) & jnp.isfinite(a) & jnp.isfinite(d)
        ratio = jnp.where(fine, a / jnp.where(fine, d, 1), 1)
        new = old + jnp.log(ratio) / self.degree if self.real else old * ratio ** (1 / self.degree)
        # b = 0 with a below zero is a scale that collapses; with nothing expected at all the old value stands
        collapsed = (d == 0) & (a < 0)
        if self.degree > 0:  # a rate of which nothing was seen: its maximum is at zero
            collapsed = collapsed | ((a == 0) & (d > 0))
        floor = jnp.log(jnp.finfo(old.dtype).tiny) if self.real else 0.0
        new = jnp.where(fine, new, jnp.where(collapsed, floor, old))
        if not self.domain.whole:
            new = self.kept(old, new, jnp.where(fine, a, 0), jnp.where(fine, d, 0))
        return {name: new.astype(old.dtype)}, state

    def kept(self, old: Array, best: Array, a: Array, d: Array) -> Array:
        """The new value, inside the parameter's domain."""
        before, after = jnp.log(old), jnp.log(jnp.maximum(best, jnp.finfo(old.dtype).tiny))
        if not self.domain.ordered:
            low, high = self.domain.low, self.domain.high
            return jnp.exp(part_way(before, jnp.log(jnp.clip(best, low, high)), (best > low) & (best < high)))
        none = jnp.sign(self.degree) * 1e-9 * jnp.abs(a).max(-1, keepdims=True)  # what is not seen stays, if it can
        a, d = jnp.where(a == 0, none, a), jnp.where(a == 0, none, d)
        exposure = d * jnp.exp(-self.degree * before)
        pooled = in_order(before, after, a, exposure, lambda a, d: jnp.log(a / d) / self.degree, -jnp.inf)
        return jnp.exp(pooled)

    def sums(self, params: Params, statistics: Statistics, bundle: Bundle) -> tuple[Array, Array]:
        """The two pooled sums, at the current value of the parameter."""
        name = self.names[0]
        zero = jnp.zeros_like(params[name])
        a, d = zero, zero
        for use in self.uses:
            if needs_curvature(use):
                more = coefficients(self.problem, use, name, self.real, self.degree, params, statistics, bundle)
            else:
                more = self.pulled(use, params, statistics, bundle)
            a, d = a + more[0], d + more[1]
        prior = prior_of(name, self.problem.factors)
        if prior is not None:
            names, degree, terms = POWERS[prior.site.distribution]
            pa, pb = terms(arguments_of(prior, names, graph_values(bundle, params)))
            m = self.degree if degree is None else degree
            a, d = a + pa, d + m * pb * params[name] ** m
        return a, d

    def pulled(self, use: Use, params: Params, statistics: Statistics, bundle: Bundle) -> tuple[Array, Array]:
        """The two sums of one place, from the family table's coefficients."""
        zero = jnp.zeros_like(params[self.names[0]])
        args = self.problem.arguments(use, params, bundle)
        t, n = self.problem.statistics(use, statistics)
        rule = use.factor._family.rules[use.argument or ""]
        assert isinstance(rule, Power)
        log_coef, coef = rule.coefficients(t, n, args)
        s = args[use.argument or ""]
        logs, pull = jax.vjp(lambda u: self.logs(use, u, params, bundle), zero)
        log_coef = jnp.broadcast_to(log_coef, jnp.broadcast_shapes(log_coef.shape, s.shape))
        return pull(fit(log_coef, logs.shape))[0], pull(fit(rule.degree * coef * s**rule.degree, logs.shape))[0]

    def logs(self, use: Use, u: Array, params: Params, bundle: Bundle) -> Array:
        """Logarithm of the argument at every cell as a function of the parameter's logarithm."""
        return self.problem.link(use, lambda: start(self.names[0], self.real, u), params, bundle).arrays[0]


def accept(problem, use: Use, name: str, real: bool, params: Params, bundle: Bundle) -> float | None:
    """The degree `m e` of the place; None where any goes.

    Raises:
        Declined: it is not a power of the parameter times something that does not depend on it.
    """
    if use.argument is None:
        return accept_direct(problem, use, name, real, params, bundle)
    rule = use.factor._family.rules[use.argument]
    if not isinstance(rule, Power):
        raise Declined(f"it enters {use}, whose update is no power")
    form = problem.link(use, lambda: start(name, real, jnp.zeros(params[name].shape)), params, bundle).form
    return rule.degree * power_of(form, use)

r"""Locations inside an absolute value: the weighted median, or quantile.

Where `Q` is :math:`-\sum_r w_r |x_r - s_r|` and each `s` is one entry of the parameter (plus data, at most), the
maximum is the median of the shifted data that read the entry, weighted by :math:`w`: the rows' posterior weights, which
the E-step gives for a site that is evaluated row by row, over the scale. With slopes `a` above and `b` below, it is the
first datum at which the sum of :math:`w (a + b)` reaches that of :math:`w a` over all. Where a datum just reaches it,
every value up to the next one is a maximum, and the middle is taken.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from autoem.families import Family, Median
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.counting import latex_name
from autoem.m_step.problem import Bundle, Params, Statistics, Use, graph_values
from autoem.passes.link import Declined, Linear


@dataclasses.dataclass(frozen=True, eq=False)
class Middle(AbstractBlock):
    """The weighted median (or quantile) of the observations of every entry."""

    uses: tuple[Use, ...] = ()

    order = 1
    source = "Johnson, Kotz and Balakrishnan 1995, Continuous Univariate Distributions, volume 2, chapter 24"

    @property
    def update(self) -> str:
        return "median of observations, weighted by E[count] / scale"

    @property
    def latex(self) -> str:
        name = latex_name(self.names[0])
        return rf"\hat{{{name}}}_j = \mathrm{{median}}\left\{{x_n : \text{{weight }} E[w_{{nj}} \mid x] / b_j\right\}}"

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state):
        (name,) = self.names
        old = params[name]
        parts = [self.weighted(use, params, statistics, bundle) for use in self.uses]
        entry, value, above, below = (jnp.concatenate([p[i] for p in parts]) for i in range(4))
        found, total = weighted_quantiles(entry, value, above, below, old.size)
        new = jnp.where(total.reshape(old.shape) > 0, found.reshape(old.shape), old)
        return {name: new.astype(old.dtype)}, state

    def weighted(self, use: Use, params: Params, statistics: Statistics, bundle: Bundle) -> tuple[Array, ...]:
        """The entry that every row reads at every state, what it would have it be, and the slopes above and below."""
        name, factor, values = self.names[0], use.factor, graph_values(bundle, params)
        family = factor.site.family
        assert isinstance(family, Family)
        arg, rule = entered(use, name)
        old, tags = params[name], jnp.arange(params[name].size, dtype=params[name].dtype).reshape(params[name].shape)

        def link(v: Array) -> Array:
            return factor.argument(f"arg:{arg}", {**values, ("param", name): v})

        location, entry = jax.jvp(link, (old,), (tags,))
        x = jnp.asarray(factor.graph.evaluate([(factor.name, "value")], values)[0])
        posterior = statistics[factor.name]
        above, below = rule.slopes({a: factor.argument(f"arg:{a}", values) for a in (*family.args, *family.fixed)})
        entry = jnp.rint(entry).astype(int)
        wanted = x - location + jnp.ravel(old)[entry]
        parts = (entry, wanted, posterior * above, posterior * below)
        return tuple(jnp.broadcast_to(v, posterior.shape).ravel() for v in parts)


def weighted_quantiles(entry: Array, value: Array, above: Array, below: Array, count: int) -> tuple[Array, Array]:
    """For each of `count` entries where its rows' falling lines add up to the most, and their total slope."""
    value = jnp.where(above + below > 0, value, jnp.inf)  # a hidden value may be anything
    order = jnp.lexsort((value, entry))
    value, jump = value[order], (above + below)[order]
    total = jax.ops.segment_sum(jump, entry[order], count)
    running, end = jnp.cumsum(jump), jnp.cumsum(total)
    level = end - jax.ops.segment_sum(below, entry, count)
    slack = 1e3 * jnp.finfo(total.dtype).eps * end[-1]
    last = jnp.cumsum(jnp.bincount(entry, length=count)) - 1
    low = jnp.minimum(jnp.searchsorted(running, level - slack, side="left"), last)
    high = jnp.minimum(jnp.searchsorted(running, level + slack, side="right"), last)
    low, high = value[low], value[high]
    return jnp.where(jnp.isfinite(high), 0.5 * (low + high), low), total


def entered(use: Use, name: str) -> tuple[str, Median]:
    """The one argument of a site evaluated row by row that a parameter enters, if a median solves for it.

    Raises:
        Declined: it does not.
    """
    factor, entry = use.factor, use.factor.site.family
    if use.argument is not None or not isinstance(entry, Family) or factor.is_prior:
        raise Declined(f"it enters {use}, whose density has no absolute value")
    fields = ["value", *(f"arg:{a}" for a in (*entry.args, *entry.fixed))]
    found = [f for f in fields if ("param", name) in factor.graph.needs((factor.name, f))]
    rule = entry.fixed_rules.get(found[0][4:]) if len(found) == 1 else None
    if not isinstance(rule, Median):
        raise Declined(f"it enters the density of {use} as a whole")
    return found[0][4:], rule


def accept(problem, use: Use, name: str, params: Params, bundle: Bundle) -> None:
    """Check that the place is a location that is one entry of the parameter, shifted by data at most.

    Raises:
        Declined: it is not.
    """
    arg, _ = entered(use, name)
    start = {("param", name): Linear(jnp.asarray(params[name], float))}
    form = problem.link(Use(use.factor, arg), lambda: start, params, bundle).form
    if not (isinstance(form, Linear) and form.simple and form.power == 1):
        raise Declined(f"the location in {use} is computed from it, not copied")

r"""Probabilities are counted: the closed form of every parameter that enters through its logarithm.

Where every place of a probability :math:`\theta` is a product of powers of :math:`\theta` and :math:`1-\theta` (a
selection `p[z]`, gene counting's `2 * p * q`, linkage's `(1 - psi) / 4`) or linear in their logarithms, `Q` is

.. math:: Q = \sum_j a_j \log \theta_j + b_j \log(1 - \theta_j)

and the maximum is :math:`a_j / \sum a` on a simplex, :math:`a_j / (a_j + b_j)` in the unit interval. The counts `a`,
`b` are the expected statistics pulled back through the transpose of the linear map from log-parameters to
log-arguments.

References:
    Ceppellini, Siniscalco and Smith 1955 (gene counting); Dempster, Laird and Rubin 1977, sections 1 and 4.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from autoem.families import Counting
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.priors import COUNTS, arguments_of, prior_of
from autoem.m_step.problem import Bundle, Linked, Params, Statistics, Use, graph_values
from autoem.passes.link import Declined, Linear, Monomial


@dataclasses.dataclass(frozen=True, eq=False)
class Count(AbstractBlock):
    """Normalised expected counts.

    `kind` is 'simplex', 'unit' (the parameter is a probability), 'log-odds' or 'log-weights' (it is real). A
    probability kept between `limits` goes to the nearer one where its share lies beyond, since `Q` is concave in it.
    """

    uses: tuple[Use, ...] = ()
    kind: str = "simplex"
    limits: tuple[float, float] | None = None

    source = "Dempster, Laird and Rubin 1977"

    @property
    def update(self) -> str:
        a, b = "E[count]", "E[count of the complement]"
        kept = f", kept within {self.limits[0]:g} ... {self.limits[1]:g}" if self.limits else ""
        return {
            "simplex": f"{a} / sum {a}",
            "unit": f"{a} / ({a} + {b}){kept}",
            "log-odds": f"log {a} - log {b}",
            "log-weights": f"log({a} / sum {a})",
        }[self.kind]

    @property
    def latex(self) -> str:
        name = latex_name(self.names[0])
        return {
            "simplex": rf"\hat{{{name}}}_j = \frac{{a_j}}{{\sum_i a_i}},\quad a_j = E[\#\,{name}_j \mid x]",
            "unit": rf"\hat{{{name}}} = \frac{{a}}{{a + b}}",
            "log-odds": rf"\hat{{{name}}} = \log\frac{{a}}{{b}}",
            "log-weights": rf"\hat{{{name}}}_j = \log\frac{{a_j}}{{\sum_i a_i}}",
        }[self.kind]

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state):
        (name,) = self.names
        old = params[name]
        a, b = self.counts(params, statistics, bundle)
        a, b = jnp.maximum(a, 0), jnp.maximum(b, 0)  # a prior below one pulls to the boundary, not beyond
        if self.kind in ("simplex", "log-weights"):
            total = a.sum(-1, keepdims=True)
            share = a / jnp.where(total > 0, total, 1)
            tiny = jnp.finfo(old.dtype).tiny
            new = share if self.kind == "simplex" else jnp.log(jnp.maximum(share, tiny))
        else:
            total = a + b
            new = a / jnp.where(total > 0, total, 1)
            if self.limits:
                low, high = self.limits
                edge = 16 * jnp.finfo(old.dtype).eps * (high - low)  # inside, where free coordinates are finite
                new = jnp.clip(new, low + edge, high - edge)
            if self.kind == "log-odds":
                tiny = jnp.finfo(old.dtype).tiny
                new = jnp.log(jnp.maximum(a, tiny)) - jnp.log(jnp.maximum(b, tiny))
        return {name: jnp.where(total > 0, new, old).astype(old.dtype)}, state

    def counts(self, params: Params, statistics: Statistics, bundle: Bundle) -> tuple[Array, Array]:
        """Expected counts of the parameter and of its complement, pseudo-counts of the prior included."""
        zero = jnp.zeros_like(params[self.names[0]])
        places: list[Linked] = []

        def parts(u: Array, v: Array) -> list[tuple[Array, ...]]:
            places[:] = [linked(self.problem, use, self.names[0], self.kind, u, v, params, bundle) for use in self.uses]
            return [place.arrays for place in places]

        arrays, pull = jax.vjp(parts, zero, zero)  # of all places at once: each pull is a program of its own to JAX
        counts = zip(self.uses, places, arrays, strict=True)
        a, b = pull([self.cotangents(use, Linked(place.form, x), statistics) for use, place, x in counts])
        prior = prior_of(self.names[0], self.problem.factors)
        if prior is not None:
            names, terms = COUNTS[prior.site.distribution]
            pa, pb = terms(arguments_of(prior, names, graph_values(bundle, params)))
            a, b = a + pa, b + pb
        return a, b

    def cotangents(self, use: Use, out: Linked, statistics: Statistics) -> tuple[Array, ...]:
        """Expected counts in the shape of the place's logarithms."""
        if use.argument is None:
            return (jnp.broadcast_to(statistics[use.factor.name], out.arrays[0].shape),)
        t, n = self.problem.statistics(use, statistics)
        rule = use.factor._family.rules[use.argument]
        assert isinstance(rule, Counting)
        a, b = rule.counts(t, n)
        cots = [a] if b is None else [a, b]
        shaped = [fit(c, x.shape) for c, x in zip(cots, log_arrays(out, rule), strict=False)]
        if isinstance(out.form, Linear) and rule.logits:
            if self.kind == "log-odds":  # logits of a Bernoulli: the pair holds the two logarithms
                return (jnp.zeros_like(out.arrays[0]), *shaped)
            return (shaped[0], *(jnp.zeros_like(x) for x in out.arrays[1:]))
        return (*shaped, *(jnp.zeros_like(x) for x in out.arrays[len(shaped) :]))


def log_arrays(out: Linked, rule: Counting) -> tuple[Array, ...]:
    if isinstance(out.form, Linear) and rule.logits and len(out.arrays) == 3:
        return out.arrays[1:]
    return out.arrays


def fit(cotangent: Array, shape: tuple[int, ...]) -> Array:
    """Sum `cotangent` over the axes along which the place does not vary."""
    if cotangent.shape == shape:
        return cotangent
    full = jnp.broadcast_shapes(cotangent.shape, shape)
    axes = tuple(i for i, (s, f) in enumerate(zip(shape, full, strict=True)) if s == 1 and f != 1)
    return jnp.broadcast_to(cotangent, full).sum(axes, keepdims=True)


def linked(problem, use: Use, name: str, kind: str, u: Array, v: Array, params: Params, bundle: Bundle) -> Linked:
    """The place `use` as a function of `u = log theta` and `v = log(1 - theta)`."""

    def start():
        if kind in ("simplex", "unit"):
            return {("param", name): Monomial(u, v)}
        return {("param", name): Linear(u, pair=(u, v) if kind == "log-odds" else None)}

    return problem.link(use, start, params, bundle)


def accept(problem, use: Use, name: str, kind: str, params: Params, bundle: Bundle) -> None:
    """Check that the place has a counting form.

    Raises:
        Declined: it has none.
    """
    if use.argument is not None and not isinstance(use.factor._family.rules[use.argument], Counting):
        raise Declined(f"it enters {use}, which is no probability")
    zero = jnp.zeros(params[name].shape)
    out = linked(problem, use, name, kind, zero, zero, params, bundle)
    form = out.form
    if use.argument is None:
        if not isinstance(form, Linear) or (kind in ("log-odds", "log-weights")):
            raise Declined("it does not enter through its logarithm alone")
        return
    rule = use.factor._family.rules[use.argument]
    assert isinstance(rule, Counting)
    two_sided = rule.counts(*shapes(use, problem, params, bundle))[1] is not None
    if kind in ("simplex", "unit"):
        if rule.logits and not isinstance(form, Linear):
            raise Declined("it enters as a logit without being a logarithm")
        if rule.logits and two_sided:
            raise Declined("it enters the logit of a probability")
        if not rule.logits and not isinstance(form, Monomial):
            raise Declined("it enters a sum")
        if isinstance(form, Monomial) and two_sided and form.co is None:
            raise Declined("one minus the probability that it enters is not a product")
        if rule.logits:
            raise Declined("the logits that it enters are normalised")
    elif kind == "log-odds":
        fine = (isinstance(form, Linear) and rule.logits and form.pair is not None and two_sided) or (
            isinstance(form, Monomial) and not rule.logits and form.co is not None and two_sided
        )
        if not fine:
            raise Declined("it is not a log-odds that is only copied")
    elif not (isinstance(form, Linear) and form.pure and rule.logits and not two_sided):
        raise Declined("it is not a vector of logits that is only copied")


def shapes(use: Use, problem, params: Params, bundle: Bundle) -> tuple[Array, Array]:
    """Placeholder statistics of the factor, to ask a rule for its shape."""
    cells = problem.cells(params, bundle, [use.factor.name])[use.factor.name]
    return jnp.zeros(cells[0].shape), jnp.zeros(cells[1].shape)


def latex_name(name: str) -> str:
    return name if len(name) == 1 else rf"\mathrm{{{name.replace('_', chr(92) + '_')}}}"

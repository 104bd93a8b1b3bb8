"""The rules of closed forms: each tries the link of every place of a parameter, and answers with a block or declines.

In: `Asked`, a parameter with its places. Out: the block of the first rule that accepts, or `Declined` with the reason
of the one that came nearest.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax

from autoem.families import Covariance, Family, Location, NoClosedForm, Opaque, Rule
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form import (
    counting,
    covariance,
    direction,
    location,
    median,
    power,
    structured,
)
from autoem.m_step.closed_form.bounded import REAL, Domain, domain_of
from autoem.m_step.closed_form.counting import Count
from autoem.m_step.closed_form.covariance import Scatter
from autoem.m_step.closed_form.direction import Turn
from autoem.m_step.closed_form.location import LeastSquares, Mean
from autoem.m_step.closed_form.median import Middle
from autoem.m_step.closed_form.power import Scale
from autoem.m_step.closed_form.priors import COUNTS, MATRICES, POWERS, QUADRATIC, prior_of, readable
from autoem.m_step.closed_form.rates import MixedRate, rate_of
from autoem.m_step.closed_form.superposition import Superposition
from autoem.m_step.problem import Bundle, Params, Problem, Use, graph_values, listed
from autoem.passes.link import Declined

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """The question that every rule answers: a parameter, its places, and the point at which links are read.

    `mixed` says, where it is known, what of the rates that are sums in the parameter may be negative; `limits` are the
    bounds of a probability that is kept to a part of the unit interval.
    """

    name: str
    kind: str
    uses: tuple[Use, ...]
    problem: Problem
    params: Params
    bundle: Bundle
    mixed: str = ""
    limits: tuple[float, float] | None = None

    @property
    def constraint(self):
        return self.problem.params[self.name].constraint

    def read(self, question: Callable[[Params, Bundle], T]) -> T:
        """Ask about a link under abstract evaluation: nothing is computed, only what JAX traces."""
        return abstractly(question, self.params, self.bundle)

    def at_each(self, question: Callable[[Use, Params, Bundle], T], uses: Sequence[Use] | None = None) -> list[T]:
        """Ask the same about every place, in one evaluation."""
        uses = self.uses if uses is None else uses
        return self.read(lambda p, b: [question(use, p, b) for use in uses])


def abstractly(question: Callable[[Params, Bundle], T], params: Params, bundle: Bundle) -> T:
    answer: list[T] = []

    def traced(p, b):
        answer[:] = [question(p, b)]
        return ()

    jax.eval_shape(traced, dict(params), bundle)
    return answer[0]


def count_rule(asked: Asked) -> AbstractBlock:
    """Normalised expected counts."""
    kinds = {"simplex": ["simplex"], "unit": ["unit"], "real": ["log-odds", "log-weights"]}.get(asked.kind)
    kinds = ["unit"] if asked.limits else kinds
    if kinds is None:
        raise Declined("it is not a probability")
    prior = prior_of(asked.name, asked.problem.factors)
    if prior and (
        asked.kind == "real"
        or prior.site.distribution not in COUNTS
        or not readable(prior, COUNTS[prior.site.distribution][0])
    ):
        raise Declined(f"its prior {prior.site.distribution} is not conjugate")
    reasons = []
    for kind in kinds:
        try:
            asked.at_each(lambda use, p, b, kind=kind: accept_count(asked, use, kind, p, b))
            return Count((asked.name,), asked.problem, why(asked, "counted"), asked.uses, kind, asked.limits)
        except Declined as declined:
            reasons.append(str(declined))
    raise Declined(reasons[0])


def accept_count(asked: Asked, use: Use, kind: str, params: Params, bundle: Bundle) -> None:
    """Decline unless the parameter is counted at this place; the text names the place."""
    try:
        counting.accept(asked.problem, use, asked.name, kind, params, bundle)
    except Declined as declined:
        text = str(declined)
        if str(use) not in text:
            text = f"{text} in {in_words(use)}, so its expected counts do not give it"
        raise Declined(text) from None


def in_words(use: Use) -> str:
    """A place as the model's author knows it: of a scan's site, the steps in place of its piece's name."""
    name = use.factor.name
    whole, step = name.removesuffix("@0"), re.fullmatch(r"(.*)\[(\d+)\]", name)
    where = f"'{name}'"
    if step:
        where = f"'{step[1]}' at " + ("the first step" if step[2] == "0" else f"step {int(step[2]) + 1}")
    elif whole != name:
        where = f"'{whole}' at the later steps"
    return f"the {use.argument} of {where}" if use.argument else where


def power_rule(asked: Asked) -> AbstractBlock:
    """Pooled power updates: scales and rates."""
    domain, real = domain_of(asked.constraint), asked.kind == "real"
    if domain is None or not (real or domain.low >= 0):
        raise Declined("it is not positive")
    plain = [use for use in asked.uses if not in_matrix(use)]
    found = asked.at_each(lambda use, p, b: power.accept(asked.problem, use, asked.name, real, p, b), plain)
    degrees = {d for d in found if d is not None}
    degrees |= {matrix_power_at(asked, use, real) for use in asked.uses if in_matrix(use)}
    prior = prior_of(asked.name, asked.problem.factors)
    entry = POWERS.get(prior.site.distribution) if prior else None
    if not degrees and entry and entry[1]:
        degrees = {entry[1]}
    if not degrees:
        raise Declined("it enters through its logarithm alone")
    if len(degrees) != 1:
        raise Declined(f"its places want different powers ({', '.join(f'{d:g}' for d in sorted(degrees))})")
    (degree,) = degrees
    if prior and (real or entry is None or not readable(prior, entry[0]) or entry[1] not in (None, degree)):
        raise Declined(f"its prior {prior.site.distribution} is not conjugate to it")
    kept = REAL if domain == Domain(0.0) else domain
    return Scale((asked.name,), asked.problem, why(asked, "a power of it scales"), asked.uses, degree, real, kept)


def in_matrix(use: Use) -> bool:
    """Whether a place is in a covariance or the like."""
    family = use.factor.family
    return bool(use.argument and family and isinstance(family.rules[use.argument], Covariance))


def matrix_power_at(asked: Asked, use: Use, real: bool) -> float:
    """The degree of a place in a matrix whose entries are powers of the parameter."""
    if sum(u.factor is use.factor for u in asked.uses) > 1:
        raise Declined(f"it enters {use} and another argument of it")
    return structured.accept_matrix(asked.problem, use, asked.name, real, asked.params, asked.bundle)


def location_rule(asked: Asked) -> AbstractBlock:
    """Weighted means, or least squares where a place is affine in several entries."""
    domain = domain_of(asked.constraint)
    if domain is None:
        raise Declined("it is constrained, so least squares may leave its domain")
    prior = prior_of(asked.name, asked.problem.factors)
    law = prior.site.distribution if prior else "Uniform"
    if prior and law != "Uniform" and (law not in QUADRATIC or not readable(prior, QUADRATIC[law])):
        raise Declined(f"its prior {prior.site.distribution} is not Normal")
    forms = asked.at_each(lambda use, p, b: location.accept_linear(asked.problem, use, (asked.name,), p, b))
    only = asked.uses[0] if len(asked.uses) == 1 else None  # two places weigh a vector by a matrix each
    if all(f.simple for f in forms) and (
        all(u.event_dim == 0 for u in asked.uses)
        or (
            only
            and prior is None
            and domain.whole
            and location.vector_mean_applies(asked.problem, only, asked.name, forms[0], asked.params, asked.bundle)
        )
    ):
        return Mean((asked.name,), asked.problem, why(asked, "the location of"), asked.uses, domain)
    if domain.ordered:
        if not all(f.simple for f in forms) or not all(u.event_dim == 0 or u.factor.coefficients for u in asked.uses):
            raise Declined("its order is kept where each entry is a mean of its own, and least squares may break it")
        return Mean((asked.name,), asked.problem, why(asked, "the location of"), asked.uses, domain)
    how = "quadratic in the density of" if any(u.argument is None for u in asked.uses) else "affine in the location of"
    return LeastSquares((asked.name,), asked.problem, why(asked, how))


def covariance_rule(asked: Asked) -> AbstractBlock:
    """Pooled scatter matrices."""
    if asked.kind != "matrix":
        raise Declined("it is not a matrix")
    places = asked.at_each(lambda use, p, b: covariance.accept(asked.problem, use, asked.name, p, b))
    forms, scaled = {f for f, _ in places}, [use for use, (_, s) in zip(asked.uses, places, strict=True) if s]
    for use in scaled:
        covariance.refuse_mixed(asked.problem, use, asked.name, asked.params, asked.bundle)
    if len(forms) != 1:
        raise Declined("its places want different forms of the matrix")
    prior = prior_of(asked.name, asked.problem.factors)
    (form,) = forms
    if prior and MATRICES.get(prior.site.distribution) != form:
        raise Declined(f"its prior {prior.site.distribution} is not conjugate to it")
    how = "copied, times a number, into" if scaled else "copied into"
    return Scatter((asked.name,), asked.problem, why(asked, how), asked.uses, form, bool(scaled))


def direction_rule(asked: Asked) -> AbstractBlock:
    """Directions of resultants."""
    if asked.kind not in ("real", "angle"):
        raise Declined("it is constrained, but not to the circle")
    prior = prior_of(asked.name, asked.problem.factors)
    if prior and not (
        (prior.site.distribution == "VonMises" and readable(prior, ("loc", "concentration")))
        or (prior.site.distribution == "Uniform" and asked.kind == "angle")
    ):
        raise Declined(f"its prior {prior.site.distribution} is not conjugate to it")
    asked.at_each(lambda use, p, b: direction.accept(asked.problem, use, asked.name, p, b))
    return Turn((asked.name,), asked.problem, why(asked, "the direction of"), asked.uses)


def median_rule(asked: Asked) -> AbstractBlock:
    """Weighted medians."""
    prior = prior_of(asked.name, asked.problem.factors)
    if asked.kind != "real" or prior or not asked.uses:
        raise Declined("it is constrained, or has a prior, so a median may not be its maximum")
    asked.at_each(lambda use, p, b: median.accept(asked.problem, use, asked.name, p, b))
    return Middle((asked.name,), asked.problem, why(asked, "the location of"), asked.uses)


def superposition_rule(asked: Asked, mixed: bool = False) -> Superposition:
    """Poisson rates that are non-negative sums; where `mixed`, means of negative binomials as well."""
    if asked.kind != "positive" or not asked.uses:
        raise Declined("it is not positive")
    prior = prior_of(asked.name, asked.problem.factors)
    entry = POWERS.get(prior.site.distribution) if prior else None
    if prior and (entry is None or entry[1] not in (None, 1.0) or not readable(prior, entry[0])):
        raise Declined(f"its prior {prior.site.distribution} is not conjugate to it")
    rates = asked.at_each(lambda use, p, b: rate_of(use, asked.name, graph_values(b, p)))
    if not mixed and (other := next((r for r in rates if isinstance(r, MixedRate)), None)):
        raise Declined(f"it enters {other.use}, which is no rate of a Poisson count")
    if asked.mixed:
        raise Declined(asked.mixed)
    how = "EM by superposition, each count split over the terms of its rate, a non-negative sum"
    return Superposition((asked.name,), asked.problem, why(asked, how), tuple(rates))


RULES: tuple[Callable[[Asked], AbstractBlock], ...] = (
    count_rule, power_rule, location_rule, covariance_rule, direction_rule, median_rule, superposition_rule,
)  # fmt: skip
PREFERRED = {
    "simplex": count_rule,
    "unit": count_rule,
    "positive": power_rule,
    "real": location_rule,
    "matrix": covariance_rule,
    "angle": direction_rule,
}


def why(asked: Asked, how: str) -> str:
    prior = prior_of(asked.name, asked.problem.factors)
    if prior and not asked.uses:
        return f"nothing observed depends on it: the mode of its {prior.site.distribution} prior"
    extra = f"; its {prior.site.distribution} prior adds pseudo-statistics" if prior else ""
    return f"{how}: {listed(asked.uses)}{extra}"


def closed_form(asked: Asked) -> AbstractBlock:
    """The first rule that accepts.

    Raises:
        Declined: none does; the text is the nearest rule's reason.
    """
    reasons: dict[Callable, str] = {}
    for rule in RULES:
        try:
            return rule(asked)
        except Declined as declined:
            reasons[rule] = str(declined)
    raise Declined(nearest_reason(asked, reasons))


def rule_of(use: Use) -> Rule | None:
    """How the family solves for the argument of a place; None where a density is not in natural form."""
    return use.factor._family.rules[use.argument] if use.argument else None


def nearest_reason(asked: Asked, reasons: Mapping[Callable, str]) -> str:
    """Why the rule that came nearest declined, in the family's own words where it has none."""
    if asked.mixed:
        return asked.mixed
    for use in asked.uses:
        family = use.factor.family
        if use.argument and family:
            rule = family.rules[use.argument]
            if isinstance(rule, NoClosedForm):
                return f"it enters {use}: {rule.reason}"
        elif isinstance(use.factor.site.family, Opaque):
            entry = use.factor.site.family
            return f"it enters {use.factor.site.distribution} of '{use.factor.name}': {entry.reason}" + (
                f" ({entry.nearest})" if entry.nearest else ""
            )
        elif isinstance(use.factor.site.family, Family) and not use.argument:
            return f"it enters {use.factor.site.distribution} of '{use.factor.name}': {use.factor.direct}"
    if not asked.uses:
        return "nothing observed depends on it: the mode of its prior"
    domain = domain_of(asked.constraint)
    if asked.kind == "other" and not asked.limits and domain is None:
        return f"no closed form keeps it within its constraint, {asked.problem.params[asked.name].constraint}"
    preferred = PREFERRED.get(asked.kind)
    if domain and any(isinstance(rule_of(u), Location) for u in asked.uses):
        preferred = location_rule
    reason = reasons.get(preferred, "") if preferred else ""
    if not reason:
        reason = next(iter(reasons.values()))
    places = ", ".join(dict.fromkeys(str(u) for u in asked.uses))
    return reason if any(str(u) in reason or in_words(u) in reason for u in asked.uses) else f"{reason} in {places}"

"""Choose how each parameter is maximised, and say why. The one resolver that both the plan prints and the run executes.

In: the factors, the parameters and what the user asked for. Out: blocks in the order of their updates. Each rule tries
the link of every place of a parameter and may decline; the reasons of those that declined are what the plan tells of a
parameter without closed form. One parameter's refusal never moves another off its closed form: only those that refused
are joined.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpyro.distributions import constraints

from autoem._errors import ModelError, PlanError
from autoem.e_step.tables import Factor
from autoem.families import Counting, Covariance, NoClosedForm, Opaque, Power
from autoem.m_step import counting, covariance, location, power
from autoem.m_step._base import AbstractBlock
from autoem.m_step.counting import Count
from autoem.m_step.covariance import Scatter
from autoem.m_step.gradient import GradientBlock
from autoem.m_step.location import LeastSquares, Mean
from autoem.m_step.newton import NewtonBlock
from autoem.m_step.power import Scale
from autoem.m_step.priors import COUNTS, NORMAL, POWERS, prior_of, readable
from autoem.m_step.problem import Bundle, Params, Problem, Use, uses_of
from autoem.m_step.strategies import AbstractMStep, ClosedForm, Fixed, Gradient, Newton
from autoem.passes.link import Declined, Linear

MAX_NEWTON = 256
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """The question that every rule answers: a parameter, its places, and the point at which links are read."""

    name: str
    kind: str
    uses: tuple[Use, ...]
    problem: Problem
    params: Params
    bundle: Bundle

    def read(self, question: Callable[[Params, Bundle], T]) -> T:
        """Ask about a link under abstract evaluation: nothing is computed, only what JAX traces."""
        return abstractly(question, self.params, self.bundle)


def abstractly(question: Callable[[Params, Bundle], T], params: Params, bundle: Bundle) -> T:
    answer: list[T] = []

    def traced(p, b):
        answer[:] = [question(p, b)]
        return ()

    jax.eval_shape(traced, dict(params), bundle)
    return answer[0]


def kind_of(constraint) -> str:
    """'simplex', 'unit', 'positive', 'real', 'matrix' or 'other'."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    if constraint is constraints.simplex:
        return "simplex"
    if constraint in (constraints.unit_interval, constraints.open_interval(0.0, 1.0)) or _bounds(constraint) == (0, 1):
        return "unit"
    if constraint in (constraints.positive, constraints.nonnegative, constraints.softplus_positive) or _bounds(
        constraint
    ) == (0, None):
        return "positive"
    if constraint in (constraints.real, constraints.real_vector, constraints.real_matrix):
        return "real"
    matrix = (constraints.positive_definite, constraints.lower_cholesky, constraints.softplus_lower_cholesky)
    return "matrix" if constraint in matrix else "other"


def _bounds(constraint) -> tuple:
    low, high = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    if any(isinstance(b, Tracer) or np.ndim(b) for b in (low, high) if b is not None):
        return ("array", "array")
    return low, high


def count_rule(asked: Asked) -> AbstractBlock:
    """Normalised expected counts."""
    kinds = {"simplex": ["simplex"], "unit": ["unit"], "real": ["log-odds", "log-weights"]}.get(asked.kind)
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
            for use in asked.uses:
                asked.read(lambda p, b, use=use, kind=kind: counting.accept(asked.problem, use, asked.name, kind, p, b))
            return Count((asked.name,), asked.problem, why(asked, "counted"), asked.uses, kind)
        except Declined as declined:
            reasons.append(str(declined))
    raise Declined(reasons[0])


def power_rule(asked: Asked) -> AbstractBlock:
    """Pooled power updates: scales and rates."""
    if asked.kind not in ("positive", "real"):
        raise Declined("it is not positive")
    real = asked.kind == "real"
    degrees = {asked.read(lambda p, b, u=u: power.accept(asked.problem, u, asked.name, real, p, b)) for u in asked.uses}
    if len(degrees) != 1:
        raise Declined(f"its places want different powers ({', '.join(f'{d:g}' for d in sorted(degrees))})")
    (degree,) = degrees
    prior = prior_of(asked.name, asked.problem.factors)
    if prior:
        entry = POWERS.get(prior.site.distribution)
        if real or entry is None or not readable(prior, entry[0]) or entry[1] not in (None, degree):
            raise Declined(f"its prior {prior.site.distribution} is not conjugate to it")
    return Scale((asked.name,), asked.problem, why(asked, "a power of it scales"), asked.uses, degree, real)


def location_rule(asked: Asked) -> AbstractBlock:
    """Weighted means, or least squares where a place is affine in several entries."""
    if asked.kind != "real":
        raise Declined("it is constrained, so least squares may leave its domain")
    prior = prior_of(asked.name, asked.problem.factors)
    if prior and (prior.site.distribution != "Normal" or not readable(prior, NORMAL)):
        raise Declined(f"its prior {prior.site.distribution} is not Normal")
    forms = [
        asked.read(lambda p, b, u=u: location.accept_linear(asked.problem, u, (asked.name,), p, b)) for u in asked.uses
    ]
    if all(f.simple for f in forms) and all(
        u.event_dim == 0
        or (prior is None and location.vector_mean_applies(asked.problem, u, asked.name, f, asked.params, asked.bundle))
        for u, f in zip(asked.uses, forms, strict=True)
    ):
        return Mean((asked.name,), asked.problem, why(asked, "the location of"), asked.uses)
    return LeastSquares((asked.name,), asked.problem, why(asked, "affine in the location of"))


def covariance_rule(asked: Asked) -> AbstractBlock:
    """Pooled scatter matrices."""
    if asked.kind != "matrix":
        raise Declined("it is not a matrix")
    forms = {asked.read(lambda p, b, u=u: covariance.accept(asked.problem, u, asked.name, p, b)) for u in asked.uses}
    if len(forms) != 1:
        raise Declined("its places want different forms of the matrix")
    prior = prior_of(asked.name, asked.problem.factors)
    (form,) = forms
    if prior and not (prior.site.distribution == "Wishart" and form == "precision"):
        raise Declined(f"its prior {prior.site.distribution} is not conjugate to it")
    return Scatter((asked.name,), asked.problem, why(asked, "copied into"), asked.uses, form)


RULES: tuple[Callable[[Asked], AbstractBlock], ...] = (count_rule, power_rule, location_rule, covariance_rule)
PREFERRED = {
    "simplex": count_rule,
    "unit": count_rule,
    "positive": power_rule,
    "real": location_rule,
    "matrix": covariance_rule,
}


def why(asked: Asked, how: str) -> str:
    prior = prior_of(asked.name, asked.problem.factors)
    places = ", ".join(str(u) for u in asked.uses)
    extra = f"; its {prior.site.distribution} prior adds pseudo-statistics" if prior else ""
    return f"{how}: {places}{extra}"


def closed_form(asked: Asked) -> AbstractBlock:
    """The first rule that accepts.

    Raises:
        Declined: none does; the text is the nearest rule's reason.
    """
    if not asked.uses:
        raise Declined("nothing but its own prior depends on it")
    reasons: dict[Callable, str] = {}
    for rule in RULES:
        try:
            return rule(asked)
        except Declined as declined:
            reasons[rule] = str(declined)
    raise Declined(nearest_reason(asked, reasons))


def nearest_reason(asked: Asked, reasons: Mapping[Callable, str]) -> str:
    """Why the rule that came nearest declined, in the family's own words where it has none."""
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
    preferred = PREFERRED.get(asked.kind)
    reason = reasons.get(preferred, "") if preferred else ""
    if not reason:
        reason = next(iter(reasons.values()))
    places = ", ".join(dict.fromkeys(str(u) for u in asked.uses))
    return reason if any(str(u) in reason for u in asked.uses) else f"{reason} in {places}"


def choose(
    problem: Problem, params: Params, bundle: Bundle, asked_for: Mapping[str, AbstractMStep | None]
) -> tuple[AbstractBlock, ...]:
    """A block for every parameter that is not fixed, in the order of their updates.

    Raises:
        PlanError: a closed form was asked for where there is none.
    """
    factors = list(problem.factors.values())
    blocks: list[AbstractBlock] = []
    declined: dict[str, str] = {}
    for name, param in problem.params.items():
        wish = asked_for.get(name)
        if isinstance(wish, Fixed):
            continue
        asked = Asked(name, kind_of(param.constraint), tuple(uses_of(name, factors)), problem, params, bundle)
        refuse_unconstrained(asked)
        if isinstance(wish, Newton | Gradient):
            declined[name] = "asked for"
            continue
        try:
            blocks.append(closed_form(asked))
        except Declined as reason:
            if isinstance(wish, ClosedForm):
                mend = f'EM(model, m_step={{"{name}": autoem.m_step.Newton()}})'
                raise PlanError(name, problem=f"has no closed form: {reason}", mend=mend) from None
            declined[name] = str(reason)
    blocks = join_least_squares(blocks, problem, params, bundle)
    blocks += [with_profile(b, blocks, factors) for b in numerical(problem, declined, asked_for)]
    return tuple(sorted(blocks, key=lambda b: b.order))


def with_profile(block: AbstractBlock, closed: Sequence[AbstractBlock], factors: Sequence[Factor]) -> AbstractBlock:
    """Tie to a Newton block the scales whose closed form moves with its parameters: a Gamma's rate with its shape."""
    if not isinstance(block, NewtonBlock):
        return block
    shapes = {
        u.factor.name
        for n in block.names
        for u in uses_of(n, factors)
        if u.argument and isinstance(u.factor._family.rules[u.argument], NoClosedForm)
    }
    tied = [b for b in closed if isinstance(b, Scale) and shapes & {u.factor.name for u in b.uses}]
    return dataclasses.replace(block, profile=tuple(tied))


def refuse_unconstrained(asked: Asked) -> None:
    """Raise where a parameter that may take any value stands, unchanged, where only some values have a meaning."""
    for use in asked.uses if asked.kind == "real" else ():
        rule = use.factor._family.rules[use.argument] if use.argument else None
        if not isinstance(rule, Counting | Power | Covariance) or (isinstance(rule, Counting) and rule.logits):
            continue

        def form(p, b, use=use):
            return asked.problem.link(
                use, lambda: {("param", asked.name): Linear(jnp.asarray(p[asked.name]))}, p, b
            ).form

        try:
            copied = asked.read(form)
        except Declined:
            continue
        if isinstance(copied, Linear) and copied.pure:
            needed = needed_constraint(rule, use)
            raise ModelError(
                asked.name,
                problem=f"it is unconstrained, but it is the {use.argument} of '{use.factor.name}', which is not",
                mend=f'numpyro.param("{asked.name}", ..., constraint=constraints.{needed})',
            )


def needed_constraint(rule: Counting | Power | Covariance, use: Use) -> str:
    """Name of the constraint that an argument's rule is for."""
    if isinstance(rule, Power):
        return "positive"
    if isinstance(rule, Covariance):
        return "lower_cholesky" if rule.form == "tril" else "positive_definite"
    return "simplex" if use.event_dim else "unit_interval"


def join_least_squares(
    blocks: Sequence[AbstractBlock], problem: Problem, params: Params, bundle: Bundle
) -> list[AbstractBlock]:
    """Solve parameters together that stand in one location and are jointly affine in it (`x @ beta + b`)."""
    joined: list[AbstractBlock] = []
    pending = [b for b in blocks if isinstance(b, LeastSquares | Mean)]
    rest = [b for b in blocks if not isinstance(b, LeastSquares | Mean)]
    while pending:
        block = pending.pop(0)
        for other in list(pending):
            if (
                isinstance(block, LeastSquares) or isinstance(other, LeastSquares) or share(problem, block, other)
            ) and jointly_affine(problem, block, other, params, bundle):
                pending.remove(other)
                reason = f"{block.reason}; solved together with {', '.join(other.names)}"
                block = LeastSquares((*block.names, *other.names), problem, reason)
        joined.append(block)
    return joined + rest


def share(problem: Problem, a: AbstractBlock, b: AbstractBlock) -> bool:
    keys = [{u.key for n in block.names for u in uses_of(n, list(problem.factors.values()))} for block in (a, b)]
    return bool(keys[0] & keys[1])


def jointly_affine(problem: Problem, a: AbstractBlock, b: AbstractBlock, params: Params, bundle: Bundle) -> bool:
    names = (*a.names, *b.names)
    uses = {u.key: u for n in names for u in uses_of(n, list(problem.factors.values()))}
    if not share(problem, a, b):
        return False
    try:
        for use in uses.values():
            abstractly(lambda p, b, use=use: location.accept_linear(problem, use, names, p, b), params, bundle)
    except Declined:
        return False
    return True


def numerical(
    problem: Problem, declined: Mapping[str, str], asked_for: Mapping[str, AbstractMStep | None]
) -> list[AbstractBlock]:
    """Blocks for the parameters without closed form: those that share a factor are maximised together."""
    groups: list[list[str]] = []
    for name in declined:
        touched = set(problem.touched([name]))
        wish = asked_for.get(name)
        near = [g for g in groups if set(problem.touched(g)) & touched and asked_for.get(g[0]) == wish]
        groups = [g for g in groups if g not in near] + [[*(n for g in near for n in g), name]]
    blocks: list[AbstractBlock] = []
    for group in groups:
        wish = asked_for.get(group[0])
        names = tuple(group)
        size = sum(int(np.prod(problem.params[n].shape)) for n in names)
        reason = "; ".join(dict.fromkeys(f"{n}: {declined[n]}" if len(names) > 1 else declined[n] for n in names))
        if isinstance(wish, Gradient):
            blocks.append(GradientBlock(names, problem, reason, wish.optimizer, wish.steps))
        elif isinstance(wish, Newton) or size <= MAX_NEWTON:
            steps = wish.max_steps if isinstance(wish, Newton) else NewtonBlock.max_steps
            blocks.append(NewtonBlock(names, problem, reason, max_steps=steps))
        else:
            blocks.append(GradientBlock(names, problem, f"{reason}; {size} entries are too many for Newton's method"))
    return blocks

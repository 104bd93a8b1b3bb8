"""Choose how each parameter is maximised, and say why. The one resolver that both the plan prints and the run executes.

In: the factors, the parameters and what the user asked for. Out: blocks in the order of their updates. The rules
of `rules` may all decline; their reasons are what the plan tells of a parameter without closed form. One parameter's
refusal never moves another off its closed form: only those that refused are joined.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpyro.distributions import constraints

from autoem._errors import PlanError
from autoem.e_step.tables.tabulate import Factor
from autoem.families import NoClosedForm
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form import augmented, location
from autoem.m_step.closed_form.augmented import Reweighted
from autoem.m_step.closed_form.domain import Domain
from autoem.m_step.closed_form.location import LeastSquares, Mean, untied
from autoem.m_step.closed_form.power import Scale
from autoem.m_step.closed_form.rules import Asked, abstractly, closed_form
from autoem.m_step.gradient import GradientBlock
from autoem.m_step.newton import NewtonBlock
from autoem.m_step.problem import Bundle, Params, Problem, uses_of
from autoem.m_step.refuse import refuse_bounds, refuse_unconstrained
from autoem.m_step.strategies import AbstractMStep, ClosedForm, Fixed, Gradient, Newton
from autoem.m_step.strategies import Augmented as AugmentedStep
from autoem.passes.link import Declined

MAX_NEWTON = 256
INCOMPLETE = {"igamma", "igammac", "regularized_incomplete_beta"}  # JAX cannot differentiate them in every argument


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


def part_of_unit(constraint) -> tuple[float, float] | None:
    """The bounds of a constraint to a part of the unit interval, as of a recombination fraction; None of any other."""
    low, high = _bounds(getattr(constraint, "base_constraint", constraint))
    if (
        isinstance(low, int | float)
        and isinstance(high, int | float)
        and 0 <= low < high <= 1
        and (low, high) != (0, 1)
    ):
        return float(low), float(high)
    return None


def on_circle(constraint) -> bool:
    """Whether the constraint is that of an angle."""
    return _bounds(getattr(constraint, "base_constraint", constraint)) == (-math.pi, math.pi)


def choose(
    problem: Problem,
    params: Params,
    bundle: Bundle,
    asked_for: Mapping[str, AbstractMStep | None],
    mixed: Mapping[str, str] | None = None,
) -> tuple[AbstractBlock, ...]:
    """A block for every parameter that is not fixed, in the order of their updates.

    `mixed` tells of parameters what the data's signs forbid; see `mixed_signs`.

    Raises:
        PlanError: a closed form was asked for where there is none.
    """
    factors = list(problem.factors.values())
    blocks: list[AbstractBlock] = []
    declined: dict[str, str] = {}
    weighed: list[str] = []
    for name, param in problem.params.items():
        wish = asked_for.get(name)
        if isinstance(wish, Fixed):
            continue
        kind = "angle" if on_circle(param.constraint) else kind_of(param.constraint)
        uses, told = tuple(uses_of(name, factors)), (mixed or {}).get(name, "")
        asked = Asked(name, kind, uses, problem, params, bundle, told, part_of_unit(param.constraint))
        if not asked.uses and param.prior is None:
            continue  # nothing observed depends on it: it stays where it is
        refuse_unconstrained(asked)
        refuse_bounds(asked)
        if isinstance(wish, Newton | Gradient):
            declined[name] = "asked for"
            continue
        if isinstance(wish, AugmentedStep):
            weighed.append(accept_augmented(asked))
            continue
        try:
            blocks.append(closed_form(asked))
        except Declined as reason:
            if isinstance(wish, ClosedForm):
                mend = f'EM(model, m_step={{"{name}": autoem.m_step.Newton()}})'
                raise PlanError(name, problem=f"has no closed form: {reason}", mend=mend) from None
            declined[name] = str(reason)
    blocks = join_least_squares(blocks, problem, params, bundle)
    blocks = [apart(b, params) for b in blocks]
    blocks += [Reweighted(names, problem, "asked for") for names in sharing(problem, weighed)]
    numeric = numerical(problem, declined, asked_for, lambda names: derivatives(problem, names, params, bundle))
    blocks += [with_profile(b, blocks, factors) for b in numeric]
    return tuple(sorted(blocks, key=lambda b: b.order))


def accept_augmented(asked: Asked) -> str:
    """The parameter's name, where an augmentation makes every place of it a location.

    Raises:
        PlanError: it does not.
    """
    try:
        if asked.kind != "real":
            raise Declined("it is constrained, so least squares may leave its domain")
        asked.at_each(lambda use, p, b: augmented.accept(asked.problem, use, asked.name, p, b))
    except Declined as reason:
        mend = f'leave "{asked.name}" out of m_step=, or m_step={{"{asked.name}": autoem.m_step.Newton()}}'
        raise PlanError(asked.name, problem=f"no augmentation serves it: {reason}", mend=mend) from None
    return asked.name


def sharing(problem: Problem, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Parameters in groups that share a site."""
    groups: list[tuple[str, ...]] = []
    for name in names:
        near = [g for g in groups if set(problem.touched(g)) & set(problem.touched([name]))]
        groups = [g for g in groups if g not in near] + [(*(n for g in near for n in g), name)]
    return groups


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


def join_least_squares(
    blocks: Sequence[AbstractBlock], problem: Problem, params: Params, bundle: Bundle
) -> list[AbstractBlock]:
    """Solve parameters together that stand in one location and are jointly affine in it (`x @ beta + b`)."""
    joined: list[AbstractBlock] = []
    pending = [b for b in blocks if isinstance(b, LeastSquares | Mean) and not is_ordered(b)]
    rest = [b for b in blocks if not any(b is p for p in pending)]
    while pending:
        block = pending.pop(0)
        for other in list(pending):
            if (
                isinstance(block, LeastSquares) or isinstance(other, LeastSquares) or share(problem, block, other)
            ) and jointly_affine(problem, block, other, params, bundle):
                pending.remove(other)
                reason = f"{block.reason}; solved together with {', '.join(other.names)}"
                domains = (*domains_of(block), *domains_of(other))
                block = LeastSquares((*block.names, *other.names), problem, reason, domains=domains)
        joined.append(block)
    return joined + rest


def apart(block: AbstractBlock, params: Params) -> AbstractBlock:
    """Least squares that may go anywhere, with the groups of entries that no site ties together."""
    if not isinstance(block, LeastSquares) or not all(d.free for d in block.domains):
        return block
    return dataclasses.replace(block, groups=untied(block, params))


def domains_of(block: LeastSquares | Mean) -> tuple[Domain, ...]:
    return (block.domain,) if isinstance(block, Mean) else block.domains


def is_ordered(block: LeastSquares | Mean) -> bool:
    """Whether entries must rise, which is solved for entries that are means apart."""
    return isinstance(block, Mean) and block.domain.ordered


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


def derivatives(problem: Problem, names: Sequence[str], params: Params, bundle: Bundle) -> int:
    """How often JAX can differentiate `Q` in the parameters `names`: 0, 1 or 2 times."""
    touched = problem.touched(names)
    graphs = [(problem.factors[n].graph, problem.factors[n].graph.outputs[n, "elem"]) for n in touched]
    if not any(e.primitive.name in INCOMPLETE for graph, atom in graphs for e in graph.slice([atom])):
        return 2

    def differentiated(by: Callable) -> Callable:
        def at(p: Params, b: Bundle):
            ones = jax.tree.map(jnp.ones_like, problem.cells(p, b, touched))
            return by(lambda new: problem.q({**p, **new}, ones, b, touched))({n: p[n] for n in names})

        return at

    for times, by in ((2, jax.hessian), (1, jax.grad)):
        try:
            jax.eval_shape(differentiated(by), dict(params), bundle)
            return times
        except (NotImplementedError, ValueError):
            continue
    return 0


def numerical(
    problem: Problem,
    declined: Mapping[str, str],
    asked_for: Mapping[str, AbstractMStep | None],
    order: Callable[[Sequence[str]], int],
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
        if (times := order(names)) == 0 or (times == 1 and isinstance(wish, Newton)):
            step = "Gradient" if times else "Fixed"
            missing = f"JAX has no {'second ' * times}derivative of the density in it"
            raise PlanError(group[0], problem=missing, mend=f'm_step={{"{group[0]}": autoem.m_step.{step}()}}')
        if times == 1:
            reason = f"{reason}; JAX has no second derivative of the density, which Newton's method needs"
        if isinstance(wish, Gradient):
            blocks.append(GradientBlock(names, problem, reason, wish.optimizer, wish.steps))
        elif times == 1:
            blocks.append(GradientBlock(names, problem, reason))
        elif isinstance(wish, Newton) or size <= MAX_NEWTON:
            steps = wish.max_steps if isinstance(wish, Newton) else NewtonBlock.max_steps
            blocks.append(NewtonBlock(names, problem, reason, max_steps=steps))
        else:
            blocks.append(GradientBlock(names, problem, f"{reason}; {size} entries are too many for Newton's method"))
    return blocks

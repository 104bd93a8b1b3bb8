"""Choose how each parameter is maximised, and say why. The one resolver that both the plan prints and the run executes.

In: the factors, the parameters and what the user asked for. Out: blocks in the order of their updates. The rules
of `rules` may all decline; their reasons are what the plan tells of a parameter without closed form. One parameter's
refusal never moves another off its closed form: only those that refused are joined.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from autoem._errors import PlanError
from autoem.e_step.tables.tabulate import Factor
from autoem.families import NoClosedForm
from autoem.m_step.augment import as_asked, offer
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form import location
from autoem.m_step.closed_form.augmented import served
from autoem.m_step.closed_form.bounded import base_of, bounds_of
from autoem.m_step.closed_form.decomposed import decomposed
from autoem.m_step.closed_form.location import LeastSquares, Mean
from autoem.m_step.closed_form.places import Place
from autoem.m_step.closed_form.power import Scale
from autoem.m_step.closed_form.regress import specialised
from autoem.m_step.closed_form.rules import Asked, abstractly, closed_form, rule_of, superposition_rule
from autoem.m_step.gradient import GradientBlock
from autoem.m_step.newton import NewtonBlock
from autoem.m_step.problem import Bundle, Params, Problem, uses_of
from autoem.m_step.refuse import refuse_bounds, refuse_unconstrained
from autoem.m_step.strategies import AbstractMStep, Augmented, ClosedForm, Fixed, Gradient, Newton, OrderedSubsets
from autoem.passes.link import Declined

MAX_NEWTON = 256
INCOMPLETE = {"igamma", "igammac", "regularized_incomplete_beta"}  # JAX cannot differentiate them in every argument


def kind_of(constraint) -> str:
    """'simplex', 'unit', 'positive', 'real', 'matrix' or 'other'."""
    constraint = base_of(constraint)
    bounds = bounds_of(constraint)
    if constraint is constraints.simplex:
        return "simplex"
    if constraint in (constraints.unit_interval, constraints.open_interval(0.0, 1.0)) or bounds == (0, 1):
        return "unit"
    if constraint in (constraints.positive, constraints.nonnegative, constraints.softplus_positive):
        return "positive"
    if bounds == (0, None):
        return "positive"
    if constraint in (constraints.real, constraints.real_vector, constraints.real_matrix):
        return "real"
    matrix = (constraints.positive_definite, constraints.lower_cholesky, constraints.softplus_lower_cholesky)
    return "matrix" if constraint in matrix else "other"


def part_of_unit(constraint) -> tuple[float, float] | None:
    """The bounds of a constraint to a part of the unit interval, as of a recombination fraction; None of any other."""
    low, high = bounds_of(getattr(constraint, "base_constraint", constraint))
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
    return bounds_of(getattr(constraint, "base_constraint", constraint)) == (-math.pi, math.pi)


def is_convex(constraint) -> bool:
    """Whether a mean of values that meet the constraint is known to meet it."""
    known = kind_of(constraint) != "other" or bounds_of(base_of(constraint)) != (None, None)
    return known and not on_circle(constraint)


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
    declined: dict[str, str] = {}
    weighed: dict[str, tuple[Place, ...]] = {}
    offers: dict[str, str] = {}
    free = {n: p for n, p in problem.params.items() if isinstance(asked_for.get(n), ClosedForm | None)}
    blocks: list[AbstractBlock] = [*decomposed(problem, params, bundle, free)]
    paired = {n for b in blocks for n in b.names}
    for name, param in problem.params.items():
        wish = asked_for.get(name)
        if isinstance(wish, Fixed) or name in paired:
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
        if isinstance(wish, Augmented | OrderedSubsets):
            found = as_asked(asked, wish)
            blocks += [found] if isinstance(found, AbstractBlock) else []
            weighed |= {name: found} if isinstance(found, tuple) else {}
            continue
        try:
            blocks.append(by_default(asked, wish))
        except Declined as reason:
            if isinstance(wish, ClosedForm):
                mend = f'EM(model, m_step={{"{name}": autoem.m_step.Newton()}})'
                raise PlanError(name, problem=f"has no closed form: {reason}", mend=mend) from None
            declined[name], offers[name] = str(reason), offer(asked)
    blocks = join_least_squares(blocks, problem, params, bundle)
    blocks = [specialised(b, params) for b in blocks]
    blocks += served(problem, weighed)
    numeric = numerical(problem, declined, asked_for, lambda names: derivatives(problem, names, params, bundle))
    numeric = [with_offers(b, offers) for b in numeric]
    blocks += [with_profile(b, blocks, factors) for b in numeric]
    return tuple(sorted(blocks, key=lambda b: b.order))


def by_default(asked: Asked, wish: AbstractMStep | None) -> AbstractBlock:
    """The closed form; or a superposition, where there is none and entries are too many for Newton's method.

    Raises:
        Declined: it has neither.
    """
    try:
        return closed_form(asked)
    except Declined as reason:
        if wish is None and np.prod(asked.problem.params[asked.name].shape, dtype=int) > MAX_NEWTON:
            with contextlib.suppress(Declined):
                return superposition_rule(asked, mixed=True)
        raise reason from None


def with_offers(block: AbstractBlock, offers: Mapping[str, str]) -> AbstractBlock:
    """The block, with what else would serve its parameters in its reason."""
    told = [offers[n] for n in block.names if offers.get(n)]
    return dataclasses.replace(block, reason="; ".join([block.reason, *told]))


def with_profile(block: AbstractBlock, closed: Sequence[AbstractBlock], factors: Sequence[Factor]) -> AbstractBlock:
    """Tie to a Newton block the scales whose closed form moves with its parameters.

    Those are a Gamma's rate, with its shape, and a rate's level, with the slopes that stand in the same rate: the
    regression is then solved as a whole.
    """
    if not isinstance(block, NewtonBlock):
        return block
    uses = [u for n in block.names for u in uses_of(n, factors) if u.argument]
    shapes = {u.factor.name for u in uses if isinstance(rule_of(u), NoClosedForm)}
    places = {u.key for u in uses}
    scales = [b for b in closed if isinstance(b, Scale)]
    tied = [b for b in scales if shapes & {u.factor.name for u in b.uses} or places & {u.key for u in b.uses}]
    return dataclasses.replace(block, profile=tuple(tied))


def join_least_squares(
    blocks: Sequence[AbstractBlock], problem: Problem, params: Params, bundle: Bundle
) -> list[AbstractBlock]:
    """Solve parameters together that stand in one location and are jointly affine in it (`x @ beta + b`)."""
    joined: list[AbstractBlock] = []
    pending = [b for b in blocks if isinstance(b, LeastSquares) or (isinstance(b, Mean) and not b.domain.ordered)]
    rest = [b for b in blocks if b not in pending]
    while pending:
        block, others = pending.pop(0), []
        for other in list(pending):
            if (
                isinstance(block, LeastSquares) or isinstance(other, LeastSquares) or share(problem, block, other)
            ) and jointly_affine(problem, block, other, params, bundle):
                pending.remove(other)
                others += other.names
                block = LeastSquares((*block.names, *other.names), problem, block.reason)
        together = f"; solved together with {', '.join(others)}" if others else ""
        joined.append(dataclasses.replace(block, reason=block.reason + together))
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
            many = f"{size} entries are too many for Newton's method"
            blocks.append(GradientBlock(names, problem, f"{reason}; {many}", in_place_of_newton=many))
    return blocks

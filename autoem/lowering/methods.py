"""Choose how latents are integrated whose cells stand apart.

In: a block whose method is still open, with the data. Out: the same with a method whose form the log joint of every
cell was seen to have, or a refusal that says what was tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import Intractable, PlanError
from autoem.e_step.cells.conjugate import FORMS, AbstractForm, Conjugate, anchor_of
from autoem.e_step.cells.importance import ImportanceCells
from autoem.e_step.cells.laplace import LaplaceCells
from autoem.e_step.cells.local import Cells, LocalBlock, Points
from autoem.e_step.cells.pieces import Pieces, anchors
from autoem.e_step.cells.quadrature import DEFAULT, MAX_DIMENSIONS, Gauss, dimensions
from autoem.e_step.strategies import Exact, Importance, Laplace, Quadrature
from autoem.graph.programs import jit_once
from autoem.ir import Continuous, Program
from autoem.m_step.choose import kind_of
from autoem.m_step.problem import Bundle, Params, graph_values
from autoem.m_step.unconstrained import to_constrained, to_unconstrained


def settled(block: LocalBlock, program: Program, params: Params, bundle: Bundle) -> LocalBlock:
    """The block with a method.

    Raises:
        Intractable: none applies.
    """
    (member, *others) = block.members
    moved = moved_start(program, params)
    if isinstance(block.method, Pieces):
        if isinstance(member.wish, Quadrature):
            raise refused(block, "its density has steps, which quadrature does not see: leave the choice open")
        if fits(block, lambda c: {member.name: cut_points(c, member)}, moved, bundle):
            return block
        why = f"between the thresholds of {', '.join(sorted(block.method.stepped))} its log joint is not that of "
        raise refused(block, f"{why}{block.method.base.name}")
    kind = kind_of(member.support)
    tried = [f for f in FORMS if f.support == kind and not others and len(member.event) == (kind == "simplex")]
    for form in tried if not getattr(member.wish, "approximate", False) else ():
        known = dataclasses.replace(block, method=Conjugate(form))
        if fits(known, lambda c, form=form: {member.name: others_than(form, c, member)}, moved, bundle):
            return known
    why = f"it has no conjugate form ({', '.join(f.name for f in tried) or 'none on its support'})"
    if member.event and kind != "simplex":
        why = f"its {member.dim} entries are one event; each in a cell of a plate would be integrated apart"
    rule = quadrature(block, why)
    known = dataclasses.replace(block, method=rule)
    if not fits(known, rule.scattered, moved, bundle):
        found = refused(block, "a mask takes out cells of it that other sites read")
        raise PlanError(found.where, problem=found.problem, mend=found.mend)  # no approximation either has a law there
    return known


def quadrature(block: LocalBlock, why: str) -> Gauss:
    """The rule for a block whose integral has no formula, which is `why`; Laplace's in more dimensions than three.

    Raises:
        Intractable: it has too many dimensions, or an exact E-step was asked for, or cells are no intervals.
    """
    member, size = block.members[0], dimensions(block.members)
    if {f.name for f in block.factors} <= set(block.names):
        raise PlanError(
            member.name,
            problem="it is unobserved and no observed site reads it: it integrates to one, whatever the parameters",
            mend=f'numpyro.sample("{member.name}", ..., obs=...) if it is observed, or leave the site out of the model',
        )
    kinds = tuple(kind_of(m.support) for m in block.members)
    if any(isinstance(m.wish, Exact) for m in block.members):
        raise refused(block, f"{block.refusal}; {why}")
    wishes = [m.wish for m in block.members]
    if size > MAX_DIMENSIONS and any(isinstance(w, Quadrature) for w in wishes):
        raise refused(block, f"{block.refusal}; {why}; quadrature is for {MAX_DIMENSIONS} dimensions, not {size}")
    if not set(kinds) <= {"real", "positive", "unit"}:
        raise refused(block, f"{block.refusal}; {why}; quadrature is for intervals, not {member.support}")
    if any(isinstance(w, Laplace) for w in wishes):
        return LaplaceCells(1, kinds, "it was asked for")
    if asked := next((w for w in wishes if isinstance(w, Importance)), None):
        return ImportanceCells(1, kinds, "it was asked for", asked)
    if size > MAX_DIMENSIONS:
        return LaplaceCells(1, kinds, f"{why}; quadrature is for {MAX_DIMENSIONS} dimensions at most")
    wish = next((m.wish for m in block.members if isinstance(m.wish, Quadrature)), Quadrature())
    if wish.points == 1:  # the mode alone, whose own moves with the parameters a rule does not follow
        return LaplaceCells(1, kinds, "a rule of one point was asked for")
    return Gauss(wish.points or DEFAULT[size], kinds, why)


def refused(block: LocalBlock, why: str) -> Intractable:
    name = block.names[0]
    mend = f'EM(model, maximize=["{name}"]) to maximise over it, or leave e_step out for an approximation'
    return Intractable(name, problem=f"its posterior is not Gaussian, and {why}", mend=mend, latents=block.names)


def moved_start(program: Program, params: Params) -> dict[str, Array]:
    """Parameters away from the start, so that no zero of it hides a dependence."""
    rng, out = np.random.default_rng(40), {}
    for name, value in params.items():
        free = to_unconstrained(program.params[name], value)
        new = to_constrained(program.params[name], free + 0.2 * jnp.asarray(rng.normal(size=free.shape)))
        out[name] = jnp.where(jnp.isfinite(new).all(), new, value)
    return out


def fits(block: LocalBlock, choose: Callable[[Cells], Points], params: Params, bundle: Bundle) -> bool:
    """Whether the log joint of every cell has the method's form, at points that it has not seen, and an integral."""

    def compare(params: Params, bundle: Bundle) -> tuple[Array, Array]:
        cells = Cells(block, graph_values(bundle, params), bundle.rows, bundle.cells)
        points = choose(cells)
        ours, theirs = block.how.value(cells, points), cells.joint(points)
        same = (ours == theirs) | ~jnp.isfinite(theirs)  # where it is impossible, both say so
        size = jnp.where(jnp.isfinite(theirs), jnp.abs(theirs), 0).max(cells.count, keepdims=True)
        error = jnp.where(same & (jnp.isfinite(ours) == jnp.isfinite(theirs)), 0, jnp.abs(ours - theirs) / (1 + size))
        if (present := cells.present) is not None:  # what a mask takes out must be read by nothing
            level = theirs - jnp.take(theirs, jnp.arange(1), cells.count)
            error = jnp.maximum(error, jnp.where(present, 0, jnp.abs(level)))
        return error.max(), block.how.integrate(cells).log_integral

    error, integral = jit_once(compare)(params, bundle)
    tolerance = max(1e5 * float(jnp.finfo(jnp.result_type(float)).eps), 1e-7)
    return bool(float(error) <= tolerance) and not bool(np.isnan(np.asarray(integral)).any())


def cut_points(cells: Cells, member: Continuous) -> Array:
    """Points on all sides of the thresholds, and far out."""
    anchor, scale = anchors(cells, member)
    spread = [anchor + scale * s for s in (0.37, 1.9, 6.0)]
    assert isinstance(cells.block.method, Pieces)
    edges = cells.block.method.edges(cells)
    near = [jnp.clip(e, -1e6, 1e6) + scale * s for e in edges for s in (-1.3, 0.21)]
    if kind_of(member.support) == "positive":
        near = [jnp.maximum(x, scale * 0.1) for x in near]
    lead = jnp.broadcast_shapes(*(x.shape for x in [*spread, *near]))
    return jnp.concatenate([jnp.broadcast_to(x, lead) for x in [*spread, *near]], cells.count)


def others_than(form: AbstractForm, cells: Cells, member: Continuous) -> Array:
    """Points at which the form's coefficients were not read."""
    anchor, axis = anchor_of(cells, member), cells.count
    if form.support == "positive":
        return jnp.concatenate([anchor * s for s in (0.31, 1.37, 3.9)], axis)
    if form.support == "unit":
        return jnp.concatenate([jnp.full_like(anchor, s) for s in (0.11, 0.43, 0.93)], axis)
    shares = jax.random.dirichlet(jax.random.key(41), jnp.ones(member.event[0]), (3,))
    shape = (*anchor.shape[:axis], 3, *anchor.shape[axis + 1 :], *member.event)
    return jnp.broadcast_to(shares.reshape(*(1,) * axis, 3, *(1,) * (anchor.ndim - axis - 1), -1), shape)

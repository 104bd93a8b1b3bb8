"""Approximate E-steps: how the loop treats latents that no exact sum or integral removes.

In: a classified program, its factors and what the user asked for. Out: the one treatment that the kernel takes, or
None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal

from autoem._errors import PlanError
from autoem.accelerate import AbstractAcceleration
from autoem.e_step.groups import refuse_scaled
from autoem.e_step.strategies import SAEM, AbstractEStep, Importance, Laplace, MonteCarlo, Variational
from autoem.e_step.tables.tabulate import Factor
from autoem.e_step.treatment import AbstractTreatment
from autoem.ir import Program
from autoem.lowering.kernel import Kernel
from autoem.m_step.problem import Bundle, Params
from autoem.passes.gaussian import latent_groups
from autoem.treatments.discrete import discrete_treatment
from autoem.treatments.drawn import AbstractDrawn, Hidden
from autoem.treatments.importance import JointImportance
from autoem.treatments.laplace import MAX_COORDINATES, JointLaplace
from autoem.treatments.normal_guide import DENSE, NormalGuide
from autoem.treatments.sampling import Averaged, Sampled
from autoem.treatments.variational import Guide

__all__ = ["AbstractDrawn", "drawn_treatment", "treatment_of", "try_out"]


def drawn_treatment(
    program: Program, factors: Sequence[Factor], call: Callable[[Any], tuple[tuple, dict]], reasons: Sequence[str]
) -> AbstractTreatment | None:
    """The treatment of the latents that are drawn; None where there are none.

    Raises:
        PlanError: two strategies are asked for at once; a latent that is drawn is scaled.
    """
    groups = [g for g in latent_groups(program) if g.drawn]
    if not groups:
        return None
    names, sites = {n for g in groups for n in g.members}, {s for g in groups for s in g.sites}
    members = tuple(z for n, z in program.continuous.items() if n in names)
    refuse_scaled(program, [f for f in factors if f.name in sites])
    wishes = list(dict.fromkeys(z.wish for z in members if isinstance(z.wish, AbstractEStep)))
    if len(wishes) > 1:
        raise PlanError(
            members[0].name,
            problem=f"{', '.join(sorted(names))} are to be drawn by {' and '.join(map(repr, wishes))}",
            mend="give all of them one strategy",
        )
    why = "; ".join(dict.fromkeys([*reasons, *(g.refusal for g in groups if g.refusal and not reasons)]))
    hidden = Hidden(program, members, tuple(f for f in factors if f.name in sites), why or "it was asked for")
    return make(hidden, wishes[0] if wishes else None, call)


def make(hidden: Hidden, wish: AbstractEStep | None, call: Callable) -> AbstractDrawn:
    """The treatment for a wish, or the default: Laplace's up to so many coordinates, a guide beyond."""
    if isinstance(wish, SAEM):
        return Averaged(hidden, wish)
    if isinstance(wish, MonteCarlo):
        return Sampled(hidden, wish)
    if isinstance(wish, Variational):
        return guided(hidden, wish, call)
    if hidden.dim > MAX_COORDINATES and isinstance(wish, Laplace | Importance):
        raise PlanError(
            hidden.names[0],
            problem=f"{type(wish).__name__}() over {hidden.dim:,} coordinates at once needs their dense curvature",
            mend=f'EM(model, e_step={{"{hidden.names[0]}": autoem.e_step.Variational()}})',
        )
    if isinstance(wish, Importance):
        return JointImportance(hidden, wish)
    if hidden.dim <= DENSE or isinstance(wish, Laplace):
        return JointLaplace(hidden)
    return guided(hidden, Variational(), call)


def guided(hidden: Hidden, wish: Variational, call: Callable) -> AbstractDrawn:
    """A normal guide at fixed draws, or any guide by an optimiser with random ones."""
    full = wish.guide is AutoMultivariateNormal
    known = wish.guide in (None, AutoNormal, AutoDiagonalNormal) or (full and hidden.dim <= DENSE)
    return NormalGuide(hidden, wish, full) if known and wish.optimizer is None else Guide(hidden, wish, call)


def treatment_of(
    program: Program, wish: Any, accelerate: AbstractAcceleration | None, drawn: AbstractTreatment | None
) -> AbstractTreatment | None:
    """The one treatment of a kernel: that of the `drawn` continuous latents, or of the discrete ones that is asked for.

    Raises:
        PlanError: both are asked for; what is asked for does not fit the model. Names the latent and a mend.
    """
    discrete = discrete_treatment(wish, program, accelerate)
    if discrete is not None and drawn is not None:
        raise PlanError(
            "e_step",
            kind="option",
            problem="Hard(), Sparse(), Stochastic() and Annealed() do not go with continuous latents of no formula",
            mend="leave the discrete latents to the exact sum, or integrate the continuous ones by Quadrature()",
        )
    return discrete or drawn


def try_out(kernel: Kernel, params: Params, bundle: Bundle) -> None:
    """Run one E-step on shapes alone, so that what cannot be done is refused with the plan and not in the fit.

    Raises:
        PlanError: the E-step itself refuses; names the latent.
    """
    whole = dataclasses.replace(kernel, chunks=None)

    def step(params, bundle, key):
        return whole.expect(params, bundle, whole.init_e_step(params, bundle, key))

    jax.eval_shape(step, dict(params), bundle, jax.random.key(0))

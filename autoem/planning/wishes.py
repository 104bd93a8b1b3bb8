"""What was asked for by name, held against what the model has.

In: a classified program and the options. Out: nothing, or a refusal that names the site and what there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autoem._errors import PlanError
from autoem.e_step.strategies import (
    AbstractEStep,
    Importance,
    Laplace,
    MonteCarlo,
    Quadrature,
    Truncated,
    Variational,
)
from autoem.ir import Program
from autoem.m_step.strategies import AbstractMStep
from autoem.passes.classify import nearest
from autoem.treatments.discrete import STRATEGIES as DISCRETE

if TYPE_CHECKING:
    from autoem.planning.options import Options


def refuse_unknown_sites(program: Program, options: Options) -> None:
    """Raise where a strategy is given for something that the model does not have."""
    for option, wish, names in (
        ("e_step", options.e_step, {**program.latents, **program.continuous}),
        ("m_step", options.m_step, program.params),
    ):
        for name in wish if isinstance(wish, Mapping) else ():
            if name not in names:
                kind = "latent" if option == "e_step" else "parameter"
                problem = f"{option}= names it, but the model has no such {kind}"
                raise PlanError(name, problem=problem, mend=nearest(name, names))
    steps = options.e_step.values() if isinstance(options.e_step, Mapping) else [options.e_step]
    for step in steps:
        if step is not None and not isinstance(step, AbstractEStep):
            mend = "use autoem.e_step.Exact(), Quadrature(...), Laplace() or another of that module"
            raise PlanError("e_step", problem=f"{step!r} is no E-step strategy", mend=mend)
    wide = Quadrature | Laplace | Importance | Variational | MonteCarlo
    if isinstance(options.e_step, wide) and not program.continuous:
        problem = f"{options.e_step} is for continuous latents, and the model has none"
        raise PlanError("e_step", problem=problem, mend="leave e_step= out", kind="option")
    for name, step in options.e_step.items() if isinstance(options.e_step, Mapping) else ():
        if isinstance(step, (Truncated, *DISCRETE)) and name in program.continuous:
            mend = f'EM(model, e_step={{"{name}": autoem.e_step.Quadrature()}}), or leave e_step out'
            what = "a range of whole numbers" if isinstance(step, Truncated) else str(step)
            raise PlanError(name, problem=f"{what} is for discrete latents; this one is not", mend=mend)
        if isinstance(step, wide) and name not in program.continuous:
            mend = f'EM(model, e_step={{"{name}": autoem.e_step.Exact()}})'
            what = type(step).__name__
            raise PlanError(name, problem=f"{what} is for continuous latents; this one is summed", mend=mend)
    steps = options.m_step.values() if isinstance(options.m_step, Mapping) else [options.m_step]
    for step in steps:
        if step is not None and not isinstance(step, AbstractMStep):
            mend = "use autoem.m_step.ClosedForm(), Augmented(), OrderedSubsets(), Newton(), Gradient(...) or Fixed()"
            raise PlanError("m_step", problem=f"{step!r} is no M-step strategy", mend=mend)

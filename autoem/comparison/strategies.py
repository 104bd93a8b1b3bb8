"""What stands for a strategy, made into what runs it: an EM, or a baseline.

An EM is made anew, so that the user's own keeps nothing of the comparison and begins where the others begin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autoem._em import EM
from autoem._errors import PlanError
from autoem.accelerate import AbstractAcceleration
from autoem.baselines import AbstractBaseline
from autoem.e_step.strategies import AbstractEStep
from autoem.m_step.strategies import AbstractMStep

SHARED = ("init", "restarts")  # what all strategies have in common, so that none may set it


def options_of(em: EM) -> dict[str, Any]:
    """The options that an EM was made with."""
    options, stop = em.options, em.stop
    return {
        "e_step": options.e_step, "m_step": options.m_step, "latent": options.latent, "maximize": options.maximize,
        "missing": options.missing, "accelerate": options.accelerate, "init": em.init, "restarts": em.restarts,
        "max_steps": stop.max_steps, "tol": stop.tol, "patience": stop.patience, "progress": False,
    }  # fmt: skip


def base_of(model: Callable | EM) -> EM:
    """The plain EM of a comparison: of a model, or the one given."""
    return EM(model.model, **options_of(model)) if isinstance(model, EM) else EM(model, progress=False)


def resolved(label: str, strategy: Any, base: EM) -> EM | AbstractBaseline:
    """What runs a strategy.

    Raises:
        PlanError: it is none, or sets what all have in common.
        TypeError, ValueError: as `EM`.
    """
    if isinstance(strategy, AbstractBaseline):
        return strategy
    if isinstance(strategy, EM):
        if strategy.model is not base.model:
            mend = f"compare(model, {{{label!r}: autoem.EM(model, ...)}}, ...), with the very model that is compared"
            raise PlanError(label, problem="this EM is of another model", mend=mend, kind="strategy")
        shared = {n: getattr(base, n) for n in SHARED}
        return EM(base.model, **{**options_of(strategy), **shared})
    if isinstance(strategy, Mapping):
        if taken := [n for n in SHARED if n in strategy]:
            mend = f"compare(autoem.EM(model, {taken[0]}=...), ...) for all, or starts= for their number"
            problem = f"{taken[0]}= would give it a start of its own, and all have the same"
            raise PlanError(label, problem=problem, mend=mend, kind="strategy")
        return EM(base.model, **{**options_of(base), **strategy, "progress": False})
    for kind, option in ((AbstractEStep, "e_step"), (AbstractMStep, "m_step"), (AbstractAcceleration, "accelerate")):
        if isinstance(strategy, kind):
            return EM(base.model, **{**options_of(base), option: strategy})
    if strategy is None:
        return EM(base.model, **options_of(base))
    mend = "None, an E-step strategy, a dict of EM's options, an autoem.EM, or one of autoem.baselines"
    raise PlanError(label, problem=f"{strategy!r} is no strategy", mend=f"give {mend}", kind="strategy")

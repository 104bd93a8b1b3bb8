"""E-steps other than the exact one: what was asked for in, the treatment that a kernel carries out of it."""

from __future__ import annotations

from typing import Any

from autoem.accelerate import AbstractAcceleration
from autoem.e_step.treatment import AbstractTreatment
from autoem.ir import Program
from autoem.treatments.discrete import discrete_treatment


def treatment_of(program: Program, wish: Any, accelerate: AbstractAcceleration | None) -> AbstractTreatment | None:
    """The treatment that `e_step=` asks for; None for the exact E-step.

    Raises:
        PlanError: what is asked for does not fit the model; names the latent and a mend.
    """
    return discrete_treatment(wish, program, accelerate)

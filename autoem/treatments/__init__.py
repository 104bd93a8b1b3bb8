"""E-steps other than the exact one: what was asked for in, the treatment that a kernel carries out of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from autoem._lower import Kernel
from autoem.accelerate import AbstractAcceleration
from autoem.e_step.treatment import AbstractTreatment
from autoem.ir import Program
from autoem.m_step.problem import Bundle, Params
from autoem.treatments.discrete import discrete_treatment


def try_out(kernel: Kernel, params: Params, bundle: Bundle) -> None:
    """Run one E-step on shapes alone, so that what cannot be done is refused with the plan and not in the fit.

    Raises:
        PlanError: the E-step itself refuses; names the latent.
    """
    whole = dataclasses.replace(kernel, chunks=None)

    def step(params, bundle, key):
        return whole.expect(params, bundle, whole.init_e_step(params, bundle, key))

    jax.eval_shape(step, dict(params), bundle, jax.random.key(0))


def treatment_of(program: Program, wish: Any, accelerate: AbstractAcceleration | None) -> AbstractTreatment | None:
    """The treatment that `e_step=` asks for; None for the exact E-step.

    Raises:
        PlanError: what is asked for does not fit the model; names the latent and a mend.
    """
    return discrete_treatment(wish, program, accelerate)

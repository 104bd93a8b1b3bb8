"""autoem: expectation maximisation, derived automatically from ordinary NumPyro models."""

from autoem import accelerate, e_step, m_step
from autoem._components import Components
from autoem._em import EM
from autoem._errors import DataError, ModelError, PlanError
from autoem._plan import Plan
from autoem._posterior import Posterior
from autoem._ragged import padded
from autoem._result import EMResult
from autoem.families import Family, register_family

__version__ = "0.1.0"

__all__ = [
    "EM",
    "Components",
    "DataError",
    "EMResult",
    "Family",
    "ModelError",
    "Plan",
    "PlanError",
    "Posterior",
    "accelerate",
    "e_step",
    "m_step",
    "padded",
    "register_family",
]

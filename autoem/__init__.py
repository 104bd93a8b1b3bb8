"""autoem: expectation maximisation, derived automatically from ordinary NumPyro models."""

from autoem import accelerate, baselines, e_step, m_step
from autoem._em import EM
from autoem._errors import DataError, ModelError, PlanError
from autoem.answers.posterior import Posterior
from autoem.answers.result import EMResult
from autoem.comparison import Comparison, compare
from autoem.families import Family, register_family
from autoem.planning.plan import Plan
from autoem.reading.components import Components
from autoem.reading.ragged import padded
from autoem.selection import BootstrapTest, Selection, bootstrap_test, select, split_merge

__version__ = "0.1.0"

__all__ = [
    "EM",
    "BootstrapTest",
    "Comparison",
    "Components",
    "DataError",
    "EMResult",
    "Family",
    "ModelError",
    "Plan",
    "PlanError",
    "Posterior",
    "Selection",
    "accelerate",
    "baselines",
    "bootstrap_test",
    "compare",
    "e_step",
    "m_step",
    "padded",
    "register_family",
    "select",
    "split_merge",
]

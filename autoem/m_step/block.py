"""What every M-step block is: parameters that are maximised together, and how.

`solve(params, statistics, bundle, state)` returns new values of the block's parameters that do not lower `Q`, the other
parameters held where they are, and the optimiser's new state. Blocks run one after the other on the same statistics,
each seeing its predecessors' new values: expectation conditional maximisation, which keeps EM's monotone rise.

References:
    Meng and Rubin 1993, "Maximum likelihood estimation via the ECM algorithm".
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

from jax import Array

from autoem.m_step.problem import Bundle, Params, Problem, Statistics

CLOSED_FORM, NEWTON, GRADIENT = "closed form", "Newton", "gradient"


@dataclasses.dataclass(frozen=True, eq=False)
class AbstractBlock(abc.ABC):
    """One step of the M-step.

    Attributes:
        names: the parameters that it updates.
        problem: the factors.
        reason: why this strategy, as one sentence for the plan.
        maximises: whether one solution leaves no slope of `Q` in the parameters; otherwise it raises `Q`.
        remembers: whether its optimiser's state lasts from one M-step to the next.
        reads_cells: whether it asks for the E-step's own cells, see `problem.cells_of`.
        augmentation: the latent that is not in the model's text but in the update, as a clause for the plan; or empty.
    """

    names: tuple[str, ...]
    problem: Problem
    reason: str

    strategy = CLOSED_FORM
    order = 0
    maximises = True
    remembers = False
    reads_cells = False
    source = "Dempster, Laird and Rubin 1977"

    @abc.abstractmethod
    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state: Any) -> tuple[dict[str, Array], Any]:
        """New values of the block's parameters, and the optimiser's new state."""

    @property
    def augmentation(self) -> str:
        return ""

    def init(self, params: Params) -> Any:
        """The optimiser's first state; None where there is none."""
        del params
        return None

    def rest(self, state: Any) -> tuple[Any, Any]:
        """Asked where the objective rests: whether the fit may end there, and the state to go on with if not."""
        return True, state

    @property
    @abc.abstractmethod
    def update(self) -> str:
        """The update as a short text formula."""

    @property
    @abc.abstractmethod
    def latex(self) -> str:
        """The update as LaTeX."""

"""What a baseline is, and what it gives back."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array

if TYPE_CHECKING:
    from autoem.baselines._target import Target

INTERRUPTED = "interrupted"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Fit:
    """Where a baseline ended.

    Attributes:
        params: value of every parameter, by site name, on its constrained scale.
        objective: what the baseline climbs, or of NUTS the log density at `params`, in nats.
        objective_name: what that is: "log-likelihood", "ELBO", ...
        history: objective along the run, evenly spread over its steps; noisy where it is estimated.
        num_steps: steps of the optimiser, or draws of the sampler, those of its warm-up too.
        status: one sentence on how it ended.
        converged: whether nothing speaks against the end point; a baseline that only ran out of steps is not converged.
        notes: what is to be said of it.
        latents: by continuous latent, mean and standard deviation of its posterior, where the baseline has its own.
        draws: by parameter, draws from its posterior, `(chains, draws, *shape)`, where there are any.
        details: figures of its own, by name.
    """

    params: dict[str, Array]
    objective: float
    objective_name: str
    history: np.ndarray
    num_steps: int
    status: str
    converged: bool = False
    notes: tuple[str, ...] = ()
    latents: Mapping[str, tuple[Array, Array]] = dataclasses.field(default_factory=dict)
    draws: Mapping[str, Array] | None = None
    details: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Fit({self.objective_name} {self.objective:.6f} after {self.num_steps} steps, status={self.status!r})"


class AbstractBaseline(abc.ABC):
    """A way to fit a model beside EM, as an entry of `autoem.compare`'s strategies."""

    @abc.abstractmethod
    def prepare(self, target: Target) -> Callable[[Array], Fit]:
        """What runs it, given a random key: compiled at its first call, and only run at later ones.

        Raises:
            PlanError: it cannot fit this model.
        """


def require(call: str, holds: bool, problem: str) -> None:
    """Refuse an option out of its range, with the call as the user typed it."""
    if not holds:
        raise ValueError(f"{call}: {problem}")


def whole(call: str, option: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{call}({option}={value!r}): {option} must be a whole number")
    require(f"{call}({option}={value})", bool(value >= least), f"{option} must be at least {least}")


def optimiser(call: str, value: Any) -> None:
    """Refuse what is no optax optimiser."""
    if value is not None and not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(f"{call}(optimizer={value!r}): use an optax optimiser, optax.adam(0.01) for example")

"""What one strategy came to: a line of the comparison, and what it knows of the latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from autoem.answers.result import EMResult
from autoem.baselines import Fit

NAN = float("nan")


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """A strategy's posterior: `marginals` of discrete latents, `moments` (mean, standard deviation) of continuous."""

    marginals: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    moments: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Row:
    """One strategy of a comparison. What could not be had is NaN.

    Attributes:
        label: the strategy's name in the comparison.
        kind: "EM" or "baseline"; empty where it is no strategy at all.
        result: the `EMResult`, or the baseline's `Fit`; None where it failed.
        error: what it failed of; None where it did not.
        params: the parameters at its end, components matched to those of the reference.
        objective: what the strategy itself climbed, in nats, and `objective_name` what that is.
        log_likelihood: of its end point by the comparison's yardstick, the same for all, in nats.
        log_joint: the same with the log density of the parameters' priors.
        gap: `log_joint` minus `objective`: how far a bound lies below, or a rule is off.
        held_out: log density of the held-out data, in nats.
        seconds: of a second, identical run, for which everything was compiled; the best of three short ones.
        compilation: seconds that the first run took more.
        num_steps: EM maps, gradient steps or draws.
        history: objective along the run, and `comparable` whether it is the yardstick's.
        distance: of the parameters from the reference's, relative: see `Comparison`.
        variation: of the discrete posteriors from the reference's, between 0 and 1.
        shift: of the continuous posteriors' means from the reference's, in standard deviations.
        status: how it ended.
        notes: what is to be said of it.
        latents: its posterior, labels matched.
    """

    label: str
    kind: str
    result: EMResult | Fit | None = None
    error: BaseException | None = None
    params: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    objective: float = NAN
    objective_name: str = ""
    log_likelihood: float = NAN
    log_joint: float = NAN
    held_out: float = NAN
    seconds: float = NAN
    compilation: float = NAN
    num_steps: int = 0
    history: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    comparable: bool = False
    distance: float = NAN
    variation: float = NAN
    shift: float = NAN
    status: str = ""
    notes: tuple[str, ...] = ()
    latents: Latents = dataclasses.field(default_factory=Latents)

    def __repr__(self) -> str:
        return f"Row({self.label!r}, {self.objective_name or 'no objective'} {self.objective:.6f}, {self.status!r})"

    @property
    def ended(self) -> bool:
        """Whether there is an end point."""
        return self.result is not None

    @property
    def gap(self) -> float:
        return self.log_joint - self.objective

    def seconds_to(self, level: float) -> float:
        """Seconds until the end point, or the first step on the way, reached `level` nats; infinite if never.

        Steps are taken to be of equal length. On the way only an objective that is the yardstick's is asked.
        """
        if self.comparable and len(self.history):
            reached = np.flatnonzero(np.nan_to_num(self.history, nan=-np.inf) >= level)
            if len(reached):
                return self.seconds * reached[0] / max(len(self.history) - 1, 1)
        return self.seconds if self.log_joint >= level else float("inf")


def replaced(row: Row, **fields: Any) -> Row:
    return dataclasses.replace(row, **fields)

"""When the loop ends, and what it says of its end."""

from __future__ import annotations

import dataclasses

RUNNING, CONVERGED, LIMIT, FELL, DIVERGED, INTERRUPTED, ROUNDED, SETTLED = range(8)

SENTENCES = {
    RUNNING: "still running",
    CONVERGED: "converged: the objective moved by less than the tolerance",
    ROUNDED: "converged as far as the precision can tell: the objective moved by less than its rounding error "
    "(jax.config.update('jax_enable_x64', True) tells more)",
    SETTLED: "settled: over the last steps the objective moved by no more than its random error",
    LIMIT: "stopped at max_steps before converging",
    FELL: "stopped because the objective fell; the parameters before the fall are kept",
    DIVERGED: "stopped because the objective was no longer finite; the parameters before that are kept",
    INTERRUPTED: "interrupted; the parameters of the last completed step are kept",
}


@dataclasses.dataclass(frozen=True)
class Stop:
    """Stop once the objective has moved by at most `tol` of itself for `patience` steps on end, or at `max_steps`.

    A fall by more than `fall` times the machine precision, relative to the objective, stops the fit at once.
    """

    tol: float = 1e-9
    patience: int = 2
    max_steps: int = 1000
    fall: float = 1e3

    def __post_init__(self):
        if self.tol < 0:
            raise ValueError(f"EM(tol={self.tol}): tol must not be negative")
        if self.patience < 1:
            raise ValueError(f"EM(patience={self.patience}): patience must be at least 1")
        if self.max_steps < 0:
            raise ValueError(f"EM(max_steps={self.max_steps}): max_steps must not be negative")

"""Measures one contender on one workload in this very process, and prints one line of JSON.

Run by `__main__`, which sets the environment first: `python -m tests.benchmarks.child W1a jax-best`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ._contender import Contender, Outcome
from .registry import contender_of
from .workloads import Workload
from .workloads_all import WORKLOADS

_BUDGET = 10.0  # seconds of warm fits
_REPEATS = 11


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one contender took for one workload.

    `step` is the median of the warm fits' seconds divided by the number of steps, `first` the seconds from data in
    memory to the first result, compilation included and imports excluded; `peak_mib` the peak of memory in use above
    what the process held with its imports done and the data in memory once.
    """

    workload: str
    contender: str
    role: str
    step: float
    fastest: float
    slowest: float
    repeats: int
    first: float
    peak_mib: float
    log_likelihood: float


def resident_mib(field: str = "VmRSS") -> float:
    """Memory now (`VmRSS`) or at its peak (`VmHWM`) in MiB; where /proc is missing, the peak since the start."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def forget_peak() -> None:
    """Hand freed memory back and start the count of the peak anew, where Linux lets us."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass  # the peak then includes the making of the data: an upper bound


def _timed(fit: Callable[[], Outcome]) -> tuple[Outcome, float]:
    begin = time.perf_counter()
    outcome = fit()
    wall = time.perf_counter() - begin
    return outcome, wall if outcome.seconds is None else outcome.seconds


def _warm(fit: Callable[[], Outcome], outcome: Outcome, first: float) -> tuple[Outcome, list[float]]:
    """Fits until the budget is spent: at least one more, unless the first alone was far too long."""
    spent: list[float] = []
    end = time.perf_counter() + _BUDGET
    while len(spent) < _REPEATS and (not spent or time.perf_counter() < end) and first < 6 * _BUDGET:
        outcome, seconds = _timed(fit)
        spent.append(seconds)
    return outcome, spent or [first]


def measure(workload: str, contender: Contender, w: Workload) -> Measurement:
    """One first fit from scratch, then warm fits of the same."""
    for module in contender.imports:
        importlib.import_module(module)
    forget_peak()
    base = resident_mib()
    begin = time.perf_counter()
    fit = contender.prepare(w)
    outcome, own = _timed(fit)
    first = time.perf_counter() - begin if outcome.seconds is None else own
    outcome, spent = _warm(fit, outcome, first)
    peak = resident_mib("VmHWM") - base if outcome.peak_mib is None else outcome.peak_mib
    steps = [s / w.num_steps for s in spent]
    return Measurement(
        workload,
        contender.name,
        contender.role,
        statistics.median(steps),
        min(steps),
        max(steps),
        len(steps),
        first,
        peak,
        w.score(outcome.params),
    )


def main(workload: str, contender: str) -> None:
    """Measure, and print the measurement as the last line."""
    w = WORKLOADS[workload].make()
    print(json.dumps(dataclasses.asdict(measure(workload, contender_of(w.family, contender), w))))


if __name__ == "__main__":
    main(*sys.argv[1:])

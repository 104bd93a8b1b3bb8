"""What a contender is: a name, where it can run, and a function that prepares a fit of one workload."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import numpy as np

from .workloads import Arrays, Workload

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one whole fit gave.

    `seconds` and `peak_mib` are set by a contender that runs in yet another process (R) and so measures itself;
    otherwise they are None and the benchmark's own clock and memory count.
    """

    params: Arrays
    seconds: float | None = None
    peak_mib: float | None = None


def stepped(w: Workload, step: Callable[[Arrays], Arrays]) -> Callable[[], Outcome]:
    """A fit of `num_steps` calls of `step`, one after the other."""

    def run() -> Outcome:
        params = w.start
        for _ in range(w.num_steps):
            params = step(params)
        return Outcome({name: np.asarray(value) for name, value in params.items()})

    return run


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to fit a workload.

    Attributes:
        name: how the command and the table name it.
        family: the kind of workload it fits (`Workload.family`).
        prepare: workload to a function that makes one whole fit. What it does once (moving data, building an object)
            counts towards the first result and the memory, not towards an iteration.
        imports: modules to import before any clock starts.
        devices: virtual CPU devices that JAX is started with; 0 for a contender that does not use JAX.
        role: `best`, `plain` and `textbook` (JAX by hand), `autoem`, or `peer`: the table forms its ratios by it.
        note: a word on how it was made comparable, printed under the table.
    """

    name: str
    family: str
    prepare: Callable[[Workload], Callable[[], Outcome]]
    imports: tuple[str, ...]
    devices: int = 0
    role: str = "peer"
    note: str = ""


def jax_environment(devices: int) -> dict[str, str]:
    """Variables to set before a process starts, for JAX reads them once: float64 and so many virtual CPU devices."""
    if not devices:
        return {}
    own = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {own}".strip()
    return {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}

"""Runs contenders beside each other and prints a table for each workload.

    python -m tests.benchmarks W1a                  every contender of W1a, each in a process of its own
    python -m tests.benchmarks W1a autoem jax-best  those whose name contains one of the words
    python -m tests.benchmarks all --rounds 3       every workload; three rounds in turn, medians over the rounds
    python -m tests.benchmarks cold                 first fit of a small problem, and a second of the same shapes
    python -m tests.benchmarks crossover            forms of a chain's messages, by its length and states: two minutes
    python -m tests.benchmarks memory               peak memory of a mixture with ten million rows
    python -m tests.benchmarks --list

Needs the extra `benchmarks`; a contender whose library is missing is named and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from ._contender import CORES, Contender, jax_environment
from .child import Measurement
from .cold import CASES
from .crossover import LENGTHS
from .registry import contenders_of
from .report import table
from .workloads_all import WORKLOADS

_ROOT = Path(__file__).resolve().parents[2]
_LIMIT = 900.0  # seconds for one contender
_CROSSOVER_LIMIT = 120.0  # seconds for all lengths


def _process(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=_ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=_LIMIT
    )


def _measure(workload: str, contender: Contender) -> Measurement | str:
    """A measurement, or the sentence that says why there is none."""
    try:
        done = _process(["tests.benchmarks.child", workload, contender.name], jax_environment(contender.devices))
    except subprocess.TimeoutExpired:
        return f"not finished within {_LIMIT:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _over_rounds(rounds: list[Measurement]) -> Measurement:
    """Medians over the rounds for the times and the memory; the extremes for the spread."""
    return dataclasses.replace(
        rounds[-1],
        step=statistics.median(r.step for r in rounds),
        fastest=min(r.fastest for r in rounds),
        slowest=max(r.slowest for r in rounds),
        repeats=sum(r.repeats for r in rounds),
        first=statistics.median(r.first for r in rounds),
        peak_mib=max(r.peak_mib for r in rounds),
    )


def compare(workload: str, wanted: tuple[str, ...], num_rounds: int) -> None:
    """Measure the contenders of one workload in turn, `num_rounds` times over, and print the table."""
    recipe = WORKLOADS[workload]
    contenders = contenders_of(recipe.family, wanted or recipe.contenders)
    found: dict[str, list[Measurement]] = {c.name: [] for c in contenders}
    missing: dict[str, str] = {}
    for _ in range(num_rounds):
        for contender in (c for c in contenders if c.name not in missing):
            result = _measure(workload, contender)
            if isinstance(result, str):
                missing[contender.name] = result
            else:
                found[contender.name].append(result)
    rows = [_over_rounds(rounds) for rounds in found.values() if rounds]
    if rows:
        print(table(f"{workload}: {recipe.title} ({CORES} cores, load {_load()} at the end)", rows))
    for name, why in missing.items():
        print(f"  {name:14s} left out: {why}")
    print(flush=True)


def _load() -> str:
    """Processes that want to run, over the last minutes: well above the cores, the ratios wobble."""
    return f"{os.getloadavg()[1]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def cold() -> None:
    """Small fits in a fresh process, with one device and with all."""
    for devices in (1, CORES):
        print(f"cold: 2,000 rows, {devices} device(s)")
        for case in CASES:
            done = _process(["tests.benchmarks.cold", case], jax_environment(devices))
            print(done.stdout or done.stderr, end="", flush=True)


def crossover() -> None:
    """Forms of a chain's messages beside autoem's: a process a length, with every device."""
    print(f"crossover: ms of a chain's log-likelihood and its derivatives ({CORES} cores)", flush=True)
    environment = {**os.environ, **jax_environment(CORES)}
    for steps in LENGTHS:
        command = [sys.executable, "-m", "tests.benchmarks.crossover", str(steps)]
        try:  # row by row as they come, and no longer than promised
            subprocess.run(command, cwd=_ROOT, env=environment, timeout=_CROSSOVER_LIMIT / len(LENGTHS))
        except subprocess.TimeoutExpired:
            print(f"  {steps:8,d} the rest not finished in time", flush=True)


def _list() -> None:
    for name, recipe in WORKLOADS.items():
        print(f"{name:7s} {recipe.title}\n        {' '.join(c.name for c in contenders_of(recipe.family))}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", nargs="?", choices=[*WORKLOADS, "all", "cold", "crossover"])
    parser.add_argument("contender", nargs="*")
    parser.add_argument("--list", action="store_true", help="name the workloads and their contenders")
    parser.add_argument("--rounds", type=int, default=1, help="measure everybody so often, in turn; print medians")
    options = parser.parse_args()
    if options.list or options.workload is None:
        _list()
    elif options.workload == "cold":
        cold()
    elif options.workload == "crossover":
        crossover()
    else:
        names = [n for n in WORKLOADS if n != "memory"] if options.workload == "all" else [options.workload]
        for name in names:
            compare(name, tuple(options.contender), options.rounds)


if __name__ == "__main__":
    main()

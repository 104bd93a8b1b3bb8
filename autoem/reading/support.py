"""The values that a discrete distribution can take: bounds, and the list of every state.

In: an unwrapped NumPyro distribution. Out: the smallest and the largest value of its support; and, given these as
numbers, all values of one cell, or an error that says why they cannot be enumerated. A support that reads other latents
(survivors of a number that nobody counted) is the range over all of their states.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpyro.distributions as dist

from autoem._errors import DataError, PlanError
from autoem.graph.jaxpr import Atom, Graph, Key
from autoem.graph.on_host import on_host
from autoem.ir import Chain, Latent, Program, at_lag, at_step

if TYPE_CHECKING:
    from autoem.reading.source import Source

MAX_STATES = 1 << 16
EVERY = "*"  # among names of latents with a range: all whose support has no end


def bounds(name: str, base: Any, truncated: Mapping[str, tuple[int, int]]) -> tuple[Any, Any]:
    """Smallest and largest value of a discrete distribution; arrays where they differ between cells.

    Raises:
        PlanError: the support has no end, or is not an interval of the integers.
    """
    if name in truncated:
        return truncated[name]
    support = base.support
    if support is dist.constraints.boolean:
        return 0, 1
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if low is not None and high is not None and base.event_dim == 0:
        return low, high
    if EVERY in truncated and base.event_dim == 0:
        return truncated[EVERY]
    what = (
        f"{type(base).__name__} has no finite support"
        if base.event_dim == 0
        else "a vector of counts is not enumerated"
    )
    mend = f'EM(model, e_step={{"{name}": autoem.e_step.Truncated(low=0, high=50)}})'
    if base.event_dim:
        mend = "write it as one Categorical site for each trial, in a plate"
    raise PlanError(name, problem=f"{what}, so it cannot be summed out exactly", mend=mend)


def enumerate_states(name: str, low: int, high: int, event: tuple[int, ...]) -> np.ndarray:
    """Every value of one cell: a scalar, or all combinations of the elements of an event of shape `event`."""
    count = high - low + 1
    total = count ** int(np.prod(event, dtype=int))
    if count < 1:
        raise DataError(
            name, problem=f"its support is empty (from {low} to {high})", mend="check the data it is made of"
        )
    if total > MAX_STATES:
        raise PlanError(
            name,
            problem=f"{total:,} states a cell are too many to enumerate",
            mend=f'EM(model, e_step={{"{name}": autoem.e_step.Truncated(low=..., high=...)}}), '
            "or independent sites in a plate",
        )
    values = range(low, high + 1)
    if not event:
        return np.arange(low, high + 1)
    grid = list(itertools.product(values, repeat=int(np.prod(event))))
    return np.asarray(grid).reshape(total, *event)


def moving_supports(
    graph: Graph, latents: Mapping[str, Latent], chains: Sequence[Chain], data: Mapping[Any, Any]
) -> dict[str, tuple[int, int]]:
    """The range of every latent whose support reads latents, over all states of those, by the names of its sites.

    Of a latent that a scan carries, sites at the first steps and at the later ones have one range together.

    Raises:
        PlanError: it reads a parameter or a continuous latent; or too many states.
    """
    out = {}
    for name in latents:
        lag = next((c.lag for c in chains if name in c.lags), 0)
        sites = [
            n for n in (name, at_lag(name, 0), *(at_step(name, h) for h in range(lag))) if (n, "low") in graph.outputs
        ]
        ends = {n: [graph.outputs[n, "low"], graph.outputs[n, "high"]] for n in sites}
        read = {n: [k for k in graph.needs_of(ends[n]) if k[0] not in ("data", "key")] for n in sites}
        if not any(read.values()):
            continue
        found = [over_states(graph, name, ends[n], read[n], latents, data) for n in sites]
        out.update(dict.fromkeys(sites, (min(low for low, _ in found), max(high for _, high in found))))
    return out


def over_states(
    graph: Graph, name: str, ends: Sequence[Atom], read: Sequence[Key], latents: Mapping[str, Latent], data: Mapping
) -> tuple[int, int]:
    """The least and the greatest of two ends, over all states of the latents that they read."""
    states = [latents[k[1]].states if k[1] in latents and k[0] == "latent" else np.empty((0, 0)) for k in read]
    if any(s.ndim > 1 for s in states) or np.prod([len(s) for s in states]) > MAX_STATES:
        raise PlanError(
            name,
            problem=f"its support moves with {', '.join(repr(k[1]) for k in read)}",
            mend=f'numpyro.sample("{name}", dist.Categorical(logits=...)) over all numbers that may occur, with '
            "logits of -jnp.inf for those that may not",
        )
    lows, highs = [], []
    for values in itertools.product(*states):
        given = {k: np.full(graph.inputs[k].shape, v) for k, v in zip(read, values, strict=True)}
        low, high = (on_host(graph, end, {**data, **given}, {}, {}) for end in ends)
        lows.append(int(np.min(low)))
        highs.append(int(np.max(high)))
    return min(lows), max(highs)


def binary_data(program: Program, source: Source) -> frozenset[int]:
    """Numbers of the data that arguments of sites read, and that hold nothing but 0 and 1."""
    if source.concrete:
        return frozenset()
    read = program.full.needs(*(k for k in program.full.outputs if k[1].startswith("arg:")))
    arrays = {k[1]: np.asarray(source.data[k[1]]) for k in read if k[0] == "data"}
    return frozenset(i for i, x in arrays.items() if x.dtype != bool and bool(((x == 0) | (x == 1)).all()))

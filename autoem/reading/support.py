"""The values that a discrete distribution can take: bounds, and the list of every state.

In: an unwrapped NumPyro distribution. Out: the smallest and the largest value of its support; and, given these as
numbers, all values of one cell, or an error that says why they cannot be enumerated. A support that reads other latents
(survivors of a number that nobody counted) is the range over all of their states.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpyro.distributions as dist

from autoem._errors import DataError, PlanError
from autoem.graph.jaxpr import Graph
from autoem.graph.on_host import on_host
from autoem.ir import Latent

MAX_STATES = 1 << 16


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


def moving_supports(graph: Graph, latents: Mapping[str, Latent], data: Mapping[Any, Any]) -> dict[str, tuple[int, int]]:
    """The range of every latent whose support reads other latents, over all states of those.

    Raises:
        PlanError: it reads a parameter, a continuous latent or the step before; or too many states.
    """
    out = {}
    for name in sorted({k[0] for k in graph.outputs if k[1] == "low"}):
        ends = [graph.outputs[name, "low"], graph.outputs[name, "high"]]
        read = [k for k in graph.needs_of(ends) if k[0] not in ("data", "key")]
        if not read:
            continue
        states = [latents[k[1]].states if k[1] in latents and k[0] == "latent" else np.empty((0, 0)) for k in read]
        if any(s.ndim > 1 for s in states) or name not in latents or np.prod([len(s) for s in states]) > MAX_STATES:
            raise PlanError(
                name,
                problem=f"its support moves with {', '.join(repr(k[1]) for k in read)}",
                mend=f'numpyro.sample("{name}", dist.Categorical(logits=...)) over all numbers that may occur, with '
                "logits of -jnp.inf for those that may not",
            )
        found = []
        for values in itertools.product(*states):
            given = {k: np.full(graph.inputs[k].shape, v) for k, v in zip(read, values, strict=True)}
            found.append([on_host(graph, end, {**data, **given}, {}, {}) for end in ends])
        out[name] = min(int(np.min(low)) for low, _ in found), max(int(np.max(high)) for _, high in found)
    return out

"""A latent that is one law of a whole path, read as the scan that it is.

In: a site of such a law. Out: the same path, as a scan's step samples it, so that it is integrated at a cost linear in
its steps. What stands around it has to leave it whole: a mask and a scale keep it one vector.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpyro

from autoem.reading.paths import path_of
from autoem.reading.reader import Reader, Record, unwrap
from autoem.reading.steps import read_scan


def walks_among(records: Mapping[str, Record], names: Collection[str]) -> frozenset[str]:
    """Those of the sites `names` that are such paths, and may be read step by step."""
    found = {n: records[n] for n in names if n in records and not hasattr(records[n], "ready")}
    plain = {n: r for n, r in found.items() if r.mask is None and r.scale is None and not r.num_event}
    return frozenset(n for n, r in plain.items() if (path := path_of(r.base)) is not None and path.steps > 1)


def read_walk(reader: Reader, msg: dict) -> None:
    """Answer the message of such a site by the path of a scan."""
    path = path_of(unwrap(msg["fn"])[0])
    assert path is not None
    frames, batch = tuple(msg["cond_indep_stack"]), tuple(msg["fn"].batch_shape)

    def step(earlier: Any, _: None) -> tuple[Any, Any]:
        with contextlib.ExitStack() as stack:
            for frame in frames:
                stack.enter_context(numpyro.plate(frame.name, frame.size, dim=frame.dim))
            now = numpyro.sample(msg["name"], path.law(earlier, False))
        return now, now

    step.__name__ = msg["name"]
    start = jnp.broadcast_to(path.start(), (*batch, *path.event))
    inner: dict = {"args": (step, start, None, path.steps, False), "kwargs": {}}  # NumPyro has no scan in a plate
    read_scan(reader, inner)
    _, (_, value) = inner["value"]
    msg["value"], msg["type"] = jnp.moveaxis(value, 0, len(batch)), "deterministic"

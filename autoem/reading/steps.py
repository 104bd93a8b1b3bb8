"""Enter the sites of a `scan` in the reader that met it, each with a time axis.

In: a `Scan`. Out: records of the body's sites at all steps (`y`), or where they read latents of earlier steps, at each
of the first steps (`z[0]`) and at all later ones (`z@0`); a `Chain`; and what the scan returns to the model.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from autoem._errors import ModelError
from autoem.families import Family, family_of
from autoem.ir import Chain, at_lag, at_step
from autoem.reading.reader import Reader, Record
from autoem.reading.scan import Scan


@dataclasses.dataclass
class StepRecord(Record):
    """A site of the body at all steps of one stretch: the body's record with a time axis in front."""

    time: str = ""
    steps: int = 1
    ready: dict = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return ((self.steps,) if self.time else ()) + super().shape

    @property
    def axes(self) -> tuple[str, ...]:
        return ((self.time,) if self.time else ()) + super().axes

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return ((self.steps,) if self.time else ()) + tuple(self.fn.batch_shape)


def read(scan: Scan) -> tuple[Any, Any]:
    """Enter the body's sites in the reader; return what the scan returns.

    Raises:
        ModelError: the body is of a kind that is not read; names the place and a rewrite.
    """
    reader, lag = scan.reader, scan.lag
    chain = Chain(scan.time, f"{scan.time}>", scan.length, lag, dict(scan.lags), oldest(scan), scan.reverse)
    reader.chains.append(chain)
    reader.frames[scan.time] = (scan.length, scan.length)
    if scan.length > lag > 0:
        reader.frames[chain.bulk] = (scan.length - lag, scan.length - lag)
    reader.frames.update(scan.body.frames)
    refuse_params(scan)
    for name, record in scan.body.records.items():
        if name not in scan.split:
            enter(scan, name, record, scan.time, scan.length, *whole(scan))
            continue
        for h, (body, values) in enumerate(scan.heads):
            fields = body.fields(name)
            arrays = body.graph.evaluate(fields, values)
            ready = {k[1]: v for k, v in zip(fields, arrays, strict=True)}
            add(scan, at_step(name, h), body.records[name], "", 1, ready)
        if scan.length > lag:
            enter(scan, name, record, chain.bulk, scan.length - lag, *scan.values(0), piece=at_lag(name, 0))
    return scan.last_carry(), returned(scan)


def oldest(scan: Scan) -> int:
    """How many of the last steps what the scan returns may read."""
    return max(scan.states.values(), default=0)


def refuse_params(scan: Scan) -> None:
    """Raise where a parameter is declared in the body: NumPyro itself would hold it at its start value."""
    for name in scan.body.params:
        if name not in scan.reader.params:
            raise ModelError(
                name,
                problem="a parameter declared inside a scan, where NumPyro lets nothing replace its start value",
                mend="declare it before the scan; the step may use it all the same",
            )


def whole(scan: Scan) -> tuple[dict, dict]:
    """What the body reads at all steps, what latents of earlier steps decide excepted."""
    varying: dict = {("·x", i): v for i, v in enumerate(scan.xs)}
    varying |= {("·carry", i): v for i, v in enumerate(scan.entering) if v is not None}
    fixed: dict = {}
    for n in scan.shapes:
        compact = scan.is_compact(n)
        (fixed if compact else varying)["latent", n] = scan.reader.inputs["latent", n] if compact else scan.path(n)
    return fixed, varying


def enter(
    scan: Scan, name: str, record: Record, time: str, steps: int, fixed: dict, varying: dict, piece: str = ""
) -> None:
    fields = scan.body.fields(name)
    arrays = scan.evaluate(fields, fixed, varying, scan.lag if piece else 0)
    ready = {}
    for (_, field), array in zip(fields, arrays, strict=True):
        batch, event = room(record, field)
        body = array.shape[1 : array.ndim - event]
        padding = (1,) * (batch - len(body))
        ready[field] = array.reshape(array.shape[0], *padding, *body, *array.shape[array.ndim - event :])
    add(scan, piece or name, record, time, steps, ready)


def room(record: Record, field: str) -> tuple[int, int]:
    """Batch axes that a field of a site has room for, and event axes behind them."""
    batch = len(record.shape)
    if record.auxiliary:
        return batch, 0
    if field in ("value", "given"):
        return batch, record.event_dim
    if field == "scale":
        return len(record.fn.batch_shape), 0
    family = record.law.family if record.law else family_of(record.base)
    if field.startswith("arg:") and isinstance(family, Family) and field[4:] in family.args:
        return batch, family.arg_dims[family.args.index(field[4:])]
    return batch, 0


def add(scan: Scan, name: str, record: Record, time: str, steps: int, ready: dict) -> None:
    plain = {f.name: getattr(record, f.name) for f in dataclasses.fields(Record)}
    scan.reader.add(StepRecord(**{**plain, "name": name}, time=time, steps=steps, ready=ready))


def returned(scan: Scan) -> Any:
    """The outputs of all steps, stacked along time."""
    graph = scan.body.graph
    keys = [k for k in graph.outputs if k[0] == "·y"]
    states = {("·carry", i) for i in scan.states}
    out = []
    for key in keys:
        if not graph.needs(key) & states:
            value = scan.evaluate([key], *whole(scan))[0]
            out.append(jnp.broadcast_to(value, (scan.length, *value.shape[1:])))
            continue
        parts = [body.graph.evaluate([key], values)[0][None] for body, values in scan.heads]
        if scan.length > scan.lag:
            value = scan.evaluate([key], *scan.values(0), scan.lag)[0]
            parts.append(jnp.broadcast_to(value, (scan.length - scan.lag, *value.shape[1:])))
        shape = jnp.broadcast_shapes(*(p.shape[1:] for p in parts))
        out.append(jnp.concatenate([jnp.broadcast_to(p, (p.shape[0], *shape)) for p in parts]))
    return jax.tree.unflatten(scan.body.ys, [v[::-1] for v in out] if scan.reverse else out)


def read_scan(reader: Reader, msg: dict) -> None:
    """Answer the message of a scan in place of running it."""
    scan = Scan(reader, msg)
    carry, ys = read(scan)
    msg["value"] = ((scan.length, msg["kwargs"].get("rng_key"), carry), (SimpleNamespace(trace={}), ys))
    msg["stop"] = True

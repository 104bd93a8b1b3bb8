"""Read a NumPyro model: `trace(model, args, kwargs) -> Program`.

The model runs three times under JAX tracing, never on numbers: to discover its sites, with every latent at full shape,
and with every latent at its compact shape (1 along its plates), which is what tabulation uses. Every fact about the
model that later stages use is in the Program's data flow graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoem._errors import DataError, ModelError, PlanError
from autoem._jaxpr import Constant, Graph
from autoem._reader import NOT_CONCRETE, Reader, Record, outputs_of
from autoem._source import Discovery, Source
from autoem._support import enumerate_states
from autoem.families import family_of
from autoem.ir import Latent, Param, Plate, Program, Site, check


def trace(
    model: Callable,
    args: tuple = (),
    kwargs: dict | None = None,
    *,
    truncated: Mapping[str, tuple[int, int]] | None = None,
    drop_nan: bool = False,
) -> tuple[Program, Discovery, Source]:
    """Read `model` called with `args` and `kwargs`.

    Returns:
        The Program, with roles still undecided for continuous sites ('parameter'); the discovery, whose graph computes
        start values; and the source, which holds the data.

    Raises:
        ModelError: the model cannot be read; names the site. PlanError: a support cannot be enumerated. DataError: a
        plate is empty.
    """
    source = Source(model, args, kwargs or {}, dict(truncated or {}), drop_nan)
    try:
        return _trace(model, source)
    except NOT_CONCRETE as error:
        raise ModelError(
            getattr(model, "__name__", "model"),
            problem=f"Python code in the model branches on the value of a latent or parameter ({type(error).__name__})",
            mend="use jnp.where, or index a table by the latent, instead of `if`, `int(...)` or a Python loop over it",
        ) from error


def _trace(model: Callable, source: Source) -> tuple[Program, Discovery, Source]:
    found = source.discover()
    plates = read_plates(found)
    latents = read_latents(found, source)

    def outputs(reader: Reader) -> dict:
        return outputs_of(reader.records, latents, source.truncated)

    reader, full = source.read(full_inputs(found, latents, compact=False), outputs)
    graph, compact = full, dict.fromkeys(latents, False)
    if latents:
        try:
            _, graph = source.read(full_inputs(found, latents, compact=True), outputs)
            compact = dict.fromkeys(latents, True)
        except (*NOT_CONCRETE, ModelError, ValueError, TypeError):
            graph = full
    sites = {n: read_site(r, latents) for n, r in reader.records.items()}
    params = {n: Param(n, full.inputs["param", n].shape, None, c) for n, (_, c) in found.params.items()}
    name = getattr(model, "__name__", type(model).__name__)
    subsampled = any(size != sub for size, sub in found.frames.values())
    notes = ("the model reads the data's values in Python: new data compile anew",) if source.concrete else ()
    if subsampled:
        notes += ("a plate is subsampled: its rows are drawn once a run, each weighted by size / subsample_size",)
    program = Program(name, sites, plates, latents, params, graph, full, compact, source.tree, notes, subsampled)
    return check(program), found, source


def full_inputs(found: Discovery, latents: Mapping[str, Latent], compact: bool) -> dict:
    """Shapes of every parameter and latent as inputs of the model."""
    inputs: dict = {}
    for key in found.graph.outputs:
        if key[0] == "init":
            shape = found.graph.shape(key)
            inputs["param", key[1]] = jax.ShapeDtypeStruct(shape, _dtype(found.graph, key))
    for name, latent in latents.items():
        batch = (1,) * len(latent.shape) if compact else latent.shape
        inputs["latent", name] = jax.ShapeDtypeStruct(batch + latent.states.shape[1:], jnp.result_type(int))
    return inputs


def _dtype(graph: Graph, key) -> Any:
    atom = graph.outputs[key]
    return jnp.result_type(atom.value) if isinstance(atom, Constant) else atom.aval.dtype


def read_plates(found: Discovery) -> dict[str, Plate]:
    plates = {n: Plate(n, sub) for n, (_, sub) in found.frames.items()}
    for r in found.records.values():
        for label, size in zip(r.axes, r.shape, strict=True):
            if not label.startswith("#"):
                plates.setdefault(label, Plate(label, size, implicit=True))
    for plate in plates.values():
        if plate.size == 0:
            raise DataError(plate.name, problem="this plate is empty", mend="pass at least one row of data")
    return plates


def read_latents(found: Discovery, source: Source) -> dict[str, Latent]:
    """Discrete latents with their supports, whose bounds are computed from the data."""
    latents = {}
    for name, r in found.records.items():
        if r.observed or not r.base.support.is_discrete:
            continue
        needs = found.graph.needs((name, "low"), (name, "high"))
        if bad := [k[1] for k in needs if k[0] == "init"]:
            raise PlanError(
                name, problem=f"its support depends on the parameter {bad}", mend="fix the support in the model's text"
            )
        values = {("data", i): jnp.asarray(x) for i, x in enumerate(source.data) if ("data", i) in needs}
        low, high = (np.asarray(v) for v in found.graph.evaluate([(name, "low"), (name, "high")], values))
        states = enumerate_states(name, int(low.min()), int(high.max()), tuple(r.fn.event_shape))
        batch = tuple(r.fn.batch_shape)
        axes = r.axes[: len(batch)]
        bounded = bool(low.min() < low.max() or high.min() < high.max())
        latents[name] = Latent(name, states, axes, batch, bounded, r.mask is not None)
    return latents


def read_site(r: Record, latents: Mapping[str, Latent]) -> Site:
    role = "factor" if r.auxiliary else "observed" if r.observed else "latent" if r.name in latents else "parameter"
    family = None if r.auxiliary else family_of(r.base)
    event_dim = 0 if r.auxiliary else r.base.event_dim
    kind = "factor" if r.auxiliary else type(r.base).__name__
    support = "" if r.auxiliary else str(r.base.support)
    return Site(
        r.name, role, kind, family, r.axes, r.shape, event_dim, r.mask is not None, r.scale is not None, support=support
    )


__all__ = ["Discovery", "Record", "Source", "trace"]

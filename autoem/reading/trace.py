"""Read a NumPyro model: `trace(model, args, kwargs) -> Program`.

The model runs three times under JAX tracing, never on numbers: to discover its sites, with every latent at full shape,
and with every latent at its compact shape (1 along its plates), which is what tabulation uses. Every fact about the
model that later stages use is in the Program's data flow graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from autoem._errors import DataError, ModelError, PlanError
from autoem.families import family_of
from autoem.families.laws import is_flat
from autoem.graph.cells import SEVERAL, cells_read, merge, merge_axes
from autoem.graph.jaxpr import Constant, Graph
from autoem.graph.on_host import on_host
from autoem.ir import Continuous, Latent, Param, Plate, Program, Site, at_lag, at_step, check
from autoem.reading.reader import NOT_CONCRETE, Reader, Record, outputs_of
from autoem.reading.scan import is_discrete
from autoem.reading.source import Discovery, Source, line_in, model_name
from autoem.reading.support import enumerate_states, moving_supports


def trace(
    model: Callable,
    args: tuple = (),
    kwargs: dict | None = None,
    *,
    truncated: Mapping[str, tuple[int, int]] | None = None,
    drop_nan: bool = False,
    continuous: Mapping[str, str] | None = None,
    joined: Mapping[str, Collection[str]] | None = None,
    walks: Collection[str] = (),
) -> tuple[Program, Discovery, Source]:
    """Read `model` called with `args` and `kwargs`.

    Args:
        continuous: the continuous sites that are latents, each with the reason.
        joined: of some of them the axes along which rows read several cells, which are then coordinates of one.
        walks: those of them that are laws of whole paths, and are read step by step.

    Returns:
        The Program, with roles still undecided for continuous sites ('parameter'); the discovery, whose graph computes
        start values; and the source, which holds the data.

    Raises:
        ModelError: the model cannot be read; names the site. PlanError: a support cannot be enumerated. DataError: a
        plate is empty.
    """
    source = Source(model, args, kwargs or {}, dict(truncated or {}), drop_nan)
    source.walks = frozenset(walks)
    given = {n: why for n, why in (continuous or {}).items() if n not in walks}
    try:
        return _trace(model, source, given, joined or {})
    except PlanError as error:  # a site without support to sum over, named as the data are: more likely forgotten
        if error.where not in map(source.argument, range(len(source.data))):
            raise
        mend = f'numpyro.sample("{error.where}", ..., obs={error.where})'
        problem = f"{error.problem}; an argument has its name, but the site is not observed"
        raise ModelError(error.where, problem=problem, mend=mend) from None
    except NOT_CONCRETE as error:
        line = line_in(model, error.__traceback__)
        mend = "use jnp.where, or index a table by the latent, instead of `if`, `int(...)` or a Python loop over it"
        if isinstance(error, jax.errors.TracerArrayConversionError):
            mend = "use jnp in place of np there, and jnp.asarray(table)[z] for a NumPy table indexed by a latent"
        raise ModelError(
            model_name(model),
            problem="Python code in the model reads the value of a latent or parameter as a number, in "
            f"{line or type(error).__name__}",
            mend=mend,
        ) from error


def _trace(
    model: Callable,
    source: Source,
    continuous: Mapping[str, str],
    joined: Mapping[str, Collection[str]],
    moving: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[Program, Discovery, Source]:
    found = source.discover()
    plates = read_plates(found)
    found_latents = read_latents(found, source, moving or {})
    latents, pieces = with_paths(found, found_latents)
    hidden, strands = continuous_paths(found, read_continuous(found, continuous, joined), source.walks)
    every = {**latents, **pieces, **hidden, **strands}

    def outputs(reader: Reader) -> dict:
        return outputs_of(reader.records, {**latents, **pieces}, source.truncated)

    inputs = full_inputs(found, {**latents, **hidden}, compact=False)
    reader, full = source.read(inputs, outputs, hidden=hidden)
    if mixed := mixed_in_chains(source, found, reader, full, hidden):
        return _trace(
            model, source, continuous, {n: {*joined.get(n, ()), *mixed.get(n, ())} for n in {*joined, *mixed}}
        )
    if (ranges := moving_supports(full, latents, found.chains, source.values)) != (moving or {}):
        refuse_growing(moving or {}, ranges, found)
        return _trace(model, source, continuous, joined, ranges)
    unused = unused_arguments(found, full, source)
    refuse_unobserved(model, reader, unused)
    refuse_point_masses(reader, full, hidden)
    graph, compact = full, dict.fromkeys({**latents, **hidden, **strands}, False)
    if latents or hidden:
        try:
            _, graph = source.read(full_inputs(found, every, compact=True), outputs, True, {**hidden, **strands})
            compact = dict.fromkeys(every, True)
        except (*NOT_CONCRETE, ModelError, ValueError, TypeError):
            if found.chains:
                raise
            graph = full
    half = (
        half_compact(source, found, {**latents, **pieces}, hidden, outputs) if compact and graph is not full else None
    )
    sites = {n: read_site(r, every) for n, r in reader.records.items()}
    params = {n: Param(n, full.inputs["param", n].shape, None, c) for n, (_, c) in found.params.items()}
    shown = {k: v for k, v in found.graph.outputs.items() if not (k[0] == "init" and k[1] in hidden)}
    found = dataclasses.replace(found, graph=dataclasses.replace(found.graph, outputs=shown))
    subsampled = any(size != sub for size, sub in found.frames.values())
    notes = ("the model reads the data's values in Python: new data compile anew",) if source.concrete else ()
    if subsampled:
        notes += ("a plate is subsampled: its rows are drawn once a run, each weighted by size / subsample_size",)
    notes += tuple(f"argument '{n}' reaches no site: is obs={n} forgotten?" for n in unused)
    program = Program(
        model_name(model), sites, plates, latents, params, graph, full, compact, source.tree, notes, subsampled,
        found.chains, pieces, hidden, strands, half,
    )  # fmt: skip
    return check(program), found, source


def mixed_in_chains(
    source: Source, found: Discovery, reader: Reader, full: Graph, hidden: Mapping[str, Continuous]
) -> dict[str, set[str]]:
    """By continuous latent of a scan, the plates along which some row of a step reads several of its cells."""
    values = {("data", i): jnp.asarray(x) for i, x in enumerate(source.data)} if not source.concrete else {}
    values |= {k: np.zeros(v.shape, v.aval.dtype) for k, v in full.inputs.items() if k[0] == "latent"}
    out: dict[str, set[str]] = {}
    for name in (n for c in found.chains for n in c.lags if n in hidden):
        z, key = hidden[name], ("latent", name)

        def several(r: Record, i: int, z=z, key=key) -> bool:
            """Whether a row of a site reads cells of several numbers along an axis."""
            events = 0 if r.auxiliary else r.event_dim
            fields = ("arg:loc", "value") if events and (r.name, "arg:loc") in full.outputs else ("elem",)
            events = r.num_event + events * (len(fields) > 1)
            found = [cells_read(full, full.outputs[r.name, f], key, z.shape, values, i) for f in fields]
            rows = [merge_axes(x, tuple(range(-min(events, x.ndim), 0))) if events and x.ndim else x for x in found]
            whole = rows[0]
            for other in rows[1:]:
                whole = merge(*np.broadcast_arrays(whole, other))
            return bool((whole == SEVERAL).any())

        for i, axis in list(enumerate(z.axes))[1:]:
            if z.shape[i] > 1 and any(several(r, i) for r in reader.records.values()):
                out.setdefault(name, set()).add(axis)
    return out


def refuse_point_masses(reader: Reader, full: Graph, hidden: Mapping[str, Continuous]) -> None:
    """Refuse a value that was seen exactly of a continuous latent: a point has no density that could be integrated."""
    for name, r in reader.records.items():
        if r.observed and (name, "arg:v") in full.outputs and isinstance(r.base, dist.Delta):
            of = [k[1] for k in full.needs((name, "arg:v")) if k[0] == "latent" and k[1] in hidden]
            if of:
                raise ModelError(
                    name,
                    problem=f"it is a Delta of the continuous latent '{of[0]}', and a point has no density",
                    mend="observe the law itself where the value is seen, numpyro.sample(..., obs=y), and elsewhere "
                    f"what is known: Bernoulli(({of[0]} < limit) * 1.0) seen as 1, or LeftCensoredDistribution",
                )


def half_compact(source: Source, found: Discovery, discrete: Mapping, hidden: Mapping, outputs: Any) -> Graph | None:
    """The model with its discrete latents compact and its continuous ones at full shape; None where that fails."""
    if not discrete or not hidden:
        return None
    inputs = {**full_inputs(found, discrete, compact=True), **full_inputs(found, hidden, compact=False)}
    inputs = {k: v for k, v in inputs.items() if k[0] == "latent" or k[1] not in hidden}
    try:
        return source.read(inputs, outputs, True, hidden)[1]
    except (*NOT_CONCRETE, ModelError, ValueError, TypeError):
        return None


def unused_arguments(found: Discovery, full: Graph, source: Source) -> list[str]:
    """Names of the call's arguments that hold data, and of which nothing in the model depends on any."""
    if source.concrete:
        return []
    read = full.needs(*full.outputs) | found.graph.needs(*found.graph.outputs)
    used: dict[str, bool] = {}
    for i in range(len(source.data)):
        name = source.argument(i)
        used[name] = used.get(name, False) or ("data", i) in read
    return [name for name, some in used.items() if not some]


def refuse_unobserved(model: Callable, reader: Reader, unused: list[str]) -> None:
    """Raise where nothing is observed, or where an argument that nothing reads has the name of an unobserved site."""
    hidden = [r.name for r in reader.records.values() if not r.observed]
    for name in unused:
        if name in hidden:
            raise ModelError(
                name,
                problem=f"argument '{name}' reaches no observed site, and this site is not observed",
                mend=f'numpyro.sample("{name}", ..., obs={name})',
            )
    if len(hidden) == len(reader.records):
        sites = ", ".join(f"'{n}'" for n in hidden)
        data = unused[0] if unused else "x"
        raise ModelError(
            model_name(model),
            problem="the model observes nothing: " + (f"no site of {sites} has obs=" if hidden else "it has no site"),
            mend=f'numpyro.sample("{hidden[-1] if hidden else data}", ..., obs={data})',
        )


def read_continuous(
    found: Discovery, names: Mapping[str, str], joined: Mapping[str, Collection[str]]
) -> dict[str, Continuous]:
    """The continuous latents among the sites that were found."""
    bases = [n for c in found.chains for n in c.lags]
    out, steps = {}, [n for n, r in found.records.items() if hasattr(r, "ready") and not r.observed]
    steps = [n for n in steps if not is_discrete(found.records[n])]
    for name, reason in {**names, **dict.fromkeys(steps, "at every step of a scan")}.items():
        r = found.records[name]
        batch = tuple(getattr(r, "batch_shape", r.fn.batch_shape))
        event = tuple(r.fn.event_shape)
        axes, whole = r.axes[: len(batch)], batch + event
        base = next((n for n in bases if name.startswith((f"{n}@", f"{n}["))), name)
        kept = [i for i, a in enumerate(axes) if a not in joined.get(base, ())]
        ours = [*kept, *(i for i in range(len(whole)) if i not in kept)]
        order = tuple(ours.index(i) for i in range(len(ours))) if ours != sorted(ours) else ()
        cells, rest = tuple(whole[i] for i in kept), tuple(whole[i] for i in ours[len(kept) :])
        kept_axes = tuple(axes[i] for i in kept)
        flat = is_flat(r.base)
        out[name] = Continuous(name, kept_axes, cells, rest, reason, r.fn.support, order=order, flat=flat)
    return out


def continuous_paths(
    found: Discovery, read: dict[str, Continuous], walks: Collection[str]
) -> tuple[dict[str, Continuous], dict[str, Continuous]]:
    """The model's continuous latents, those of a chain as paths; and the pieces that the sites of a chain read."""
    whole, strands = dict(read), {}
    for chain in found.chains:
        for name, lag in chain.lags.items():
            known = next((read[n] for n in (at_lag(name, 0), at_step(name, 0), name) if n in read), None)
            if known is None:
                continue
            plates = known.axes if known.name == at_step(name, 0) else known.axes[1:]
            shape = known.shape[len(known.axes) - len(plates) :]
            timed = len(known.axes) - len(plates)
            order = tuple(i - timed for i in known.order[timed:])
            for n in (at_lag(name, 0), *(at_step(name, h) for h in range(chain.lag))):
                whole.pop(n, None)

            def piece(
                n: str, time: str, steps: int, known=known, plates=plates, shape=shape, order=order
            ) -> Continuous:
                axes, sizes = ((time, *plates), (steps, *shape)) if time else (plates, shape)
                return dataclasses.replace(known, name=n, axes=axes, shape=sizes, order=order)

            whole[name] = piece(name, chain.time, chain.length)
            if name in walks:
                whole[name] = dataclasses.replace(whole[name], steps=len(shape))
            bulk = [at_lag(name, i) for i in range(max(chain.lag, lag) + 1)]
            ends = [at_step(name, h) for h in (*range(chain.lag), *range(-chain.ending, 0))]
            strands |= {n: piece(n, chain.bulk, chain.length - chain.lag) for n in bulk}
            strands |= {n: piece(n, "", 1) for n in ends}
    return whole, strands


def full_inputs(found: Discovery, latents: Mapping[str, Latent | Continuous], compact: bool) -> dict:
    """Shapes of every parameter and latent as inputs of the model."""
    inputs: dict = {}
    for key in found.graph.outputs:
        if key[0] == "init" and key[1] not in latents:
            shape = found.graph.shape(key)
            inputs["param", key[1]] = jax.ShapeDtypeStruct(shape, _dtype(found.graph, key))
    times = {p for c in found.chains for p in (c.time, c.bulk)}
    for name, latent in latents.items():
        batch = latent.shape
        if compact:  # a step of a scan sees its latents without the time axis
            batch = (1,) * (len(batch) - (bool(batch) and latent.axes[0] in times))
        if isinstance(latent, Continuous):
            inputs["latent", name] = jax.ShapeDtypeStruct(batch + latent.event, jnp.result_type(float))
            continue
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
            mend = "pass at least one row, and one column"
            raise DataError(plate.name, problem="this plate is empty", mend=mend, kind="plate")
    return plates


def read_latents(found: Discovery, source: Source, moving: Mapping[str, tuple[int, int]]) -> dict[str, Latent]:
    """Discrete latents with their supports, whose bounds are computed from the data; of some the ranges are known."""
    latents = {}
    for name, r in found.records.items():
        if r.observed or not is_discrete(r):
            continue
        needs = found.graph.needs((name, "low"), (name, "high"))
        if bad := [k[1] for k in needs if k[0] == "init"]:
            raise PlanError(
                name, problem=f"its support depends on the parameter {bad}", mend="fix the support in the model's text"
            )
        values = {("data", i): x for i, x in enumerate(source.data) if ("data", i) in needs}
        low, high = (on_host(found.graph, found.graph.outputs[name, end], values, {}, {}) for end in ("low", "high"))
        least, most = moving.get(name, (int(low.min()), int(high.max())))
        states = enumerate_states(name, least, most, tuple(r.fn.event_shape))
        batch = tuple(getattr(r, "batch_shape", r.fn.batch_shape))
        axes = r.axes[: len(batch)]
        bounded = bool(low.min() < low.max() or high.min() < high.max()) or name in moving
        latents[name] = Latent(name, states, axes, batch, bounded, r.mask is not None)
    return latents


def with_paths(found: Discovery, latents: Mapping[str, Latent]) -> tuple[dict[str, Latent], dict[str, Latent]]:
    """The model's latents, those of a chain as their paths along time; and the pieces that the chain's tables read."""
    whole, pieces = dict(latents), {}
    for chain in found.chains:
        for name, lag in chain.lags.items():
            known = next((latents[n] for n in (at_lag(name, 0), at_step(name, 0), name) if n in latents), None)
            if known is None:
                continue
            plates = known.axes if known.name == at_step(name, 0) else known.axes[1:]
            shape = known.shape[len(known.axes) - len(plates) :]
            for n in (at_lag(name, 0), *(at_step(name, h) for h in range(chain.lag))):
                whole.pop(n, None)

            def piece(n: str, time: str, steps: int, known=known, plates=plates, shape=shape) -> Latent:
                axes, sizes = ((time, *plates), (steps, *shape)) if time else (plates, shape)
                return Latent(n, known.states, axes, sizes, known.bounded, known.masked)

            whole[name] = piece(name, chain.time, chain.length)
            bulk = [at_lag(name, i) for i in range(max(chain.lag, lag) + 1)]
            ends = [at_step(name, h) for h in (*range(chain.lag), *range(-chain.ending, 0))]
            pieces |= {n: piece(n, chain.bulk, chain.length - chain.lag) for n in bulk}
            pieces |= {n: piece(n, "", 1) for n in ends}
    return whole, pieces


def refuse_growing(before: Mapping, ranges: Mapping, found: Discovery) -> None:
    """Raise where the range of what a scan carries has grown again, once all of its steps had one range."""
    for chain in found.chains:
        for name in chain.variables:
            known = next((n for n in ranges if n.startswith((f"{name}@", f"{name}["))), None)
            if known in before and before[known] != ranges[known]:
                raise PlanError(
                    name,
                    problem="its support grows with every step of the scan",
                    mend=f'numpyro.sample("{name}", dist.Categorical(logits=...)) over all numbers that may occur',
                )


def read_site(r: Record, latents: Mapping[str, Latent | Continuous]) -> Site:
    role = "factor" if r.auxiliary else "observed" if r.observed else "latent" if r.name in latents else "parameter"
    role = "continuous" if isinstance(latents.get(r.name), Continuous) else role
    family = None if r.auxiliary else family_of(r.base)
    event_dim = 0 if r.auxiliary else r.event_dim
    kind = "factor" if r.auxiliary else type(r.base).__name__
    support = "" if r.auxiliary else str(r.base.support)
    return Site(
        r.name, role, kind, family, r.axes, r.shape, event_dim, r.mask is not None, r.scale is not None,
        support=support, law=r.law and r.law.family,
    )  # fmt: skip


__all__ = ["Discovery", "Record", "Source", "trace"]

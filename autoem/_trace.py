"""Read a NumPyro model: `trace(model, args, kwargs) -> Program`. The only module that touches `numpyro.handlers`.

The model runs three times under JAX tracing, never on numbers: to discover its sites, with every latent at full shape, and
with every latent at its compact shape (1 along its plates), which is what tabulation uses. Every fact about the model
that later stages use is in the Program's data flow graphs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger

from autoem._errors import DataError, ModelError, PlanError
from autoem._jaxpr import Constant, Graph, trace_graph
from autoem.families import Family, family_of
from autoem.ir import Latent, Param, Plate, Program, Site, check

NOT_CONCRETE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
MAX_STATES = 1 << 16


@dataclasses.dataclass
class Record:
    """What one `sample` message said, before anything is decided."""

    name: str
    fn: Any
    base: Any
    mask: Any
    num_event: int
    value: Any
    observed: bool
    auxiliary: bool
    scale: Any
    frames: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes of the unwrapped distribution."""
        return tuple(self.fn.batch_shape) + tuple(self.fn.event_shape[: self.num_event])

    @property
    def axes(self) -> tuple[str, ...]:
        batch = self.fn.batch_shape
        by_dim = {f.dim: f.name for f in self.frames}
        labels = [by_dim.get(i - len(batch)) or implicit(i - len(batch), s) for i, s in enumerate(batch)]
        return tuple(labels) + tuple(f"#{i}" for i in range(self.num_event))


def implicit(dim: int, size: int) -> str:
    """Label of a batch axis that no plate covers."""
    return f"dim{dim}:{size}" if size > 1 else f"#unit{dim}"


def unwrap(fn: Any) -> tuple[Any, Any, int]:
    """The distribution under `expand`, `mask` and `to_event`; its mask (or None), and how many axes `to_event` took."""
    masks, taken = [], 0
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, taken))
        elif isinstance(fn, dist.Independent):
            taken += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    mask = None
    for m, before in masks:
        m = jnp.reshape(m, jnp.shape(m) + (1,) * (taken - before))
        mask = m if mask is None else mask & m
    return fn, mask, taken


class Reader(Messenger):
    """Records every site, giving parameters and latents the values in `inputs`, or placeholders."""

    def __init__(self, inputs: Mapping, truncated: Mapping[str, tuple[int, int]], drop_nan: bool):
        self.inputs, self.truncated, self.drop_nan = inputs, truncated, drop_nan
        self.records: dict[str, Record] = {}
        self.params: dict[str, tuple[Any, Any]] = {}
        self.frames: dict[str, tuple[int, int]] = {}
        self.last = "(before the first site)"
        super().__init__(None)

    def process_message(self, msg):
        kind, name = msg["type"], msg.get("name")
        self.last = name or self.last
        if kind == "control_flow":
            body = getattr(msg["args"][0], "__name__", "scan")
            raise ModelError(
                body,
                problem="sites inside control flow (scan, cond) are not read yet",
                mend="write the steps as separate sites in a Python loop, or as a plate where they are independent",
            )
        if kind == "param" and ("param", name) in self.inputs:
            msg["value"] = self.inputs["param", name]
        if kind == "sample" and msg["value"] is None and not msg["is_observed"]:
            for key in (("latent", name), ("param", name)):
                if key in self.inputs:
                    msg["value"] = self.inputs[key]
                    return
            msg["value"] = placeholder(name, msg["fn"], self.truncated)

    def postprocess_message(self, msg):
        kind, name = msg["type"], msg.get("name")
        if kind == "param":
            constraint = msg["kwargs"].get("constraint", dist.constraints.real)
            self.params[name] = (msg["value"], constraint)
        elif kind == "plate":
            self.frames[name] = (msg["args"][0], msg["args"][1] or msg["args"][0])
        elif kind == "sample":
            if name in self.records:
                raise ModelError(name, problem="two sample sites have this name", mend="give each site its own name")
            self.records[name] = self.record(msg)

    def record(self, msg) -> Record:
        base, mask, taken = unwrap(msg["fn"])
        auxiliary = bool(msg["infer"].get("is_auxiliary")) and isinstance(base, dist.Unit)
        value, observed = msg["value"], bool(msg["is_observed"])
        if self.drop_nan and observed and not auxiliary and jnp.issubdtype(jnp.result_type(value), jnp.floating):
            missing = jnp.isnan(value)
            seen = ~missing.all(tuple(range(-base.event_dim, 0))) if base.event_dim else ~missing
            mask = seen if mask is None else mask & seen
            value = jnp.where(missing, base.support.feasible_like(value), value)
        frames = tuple(msg["cond_indep_stack"])
        return Record(msg["name"], msg["fn"], base, mask, taken, value, observed, auxiliary, msg["scale"], frames)


def placeholder(name: str, fn: Any, truncated) -> Any:
    """A value that the site could take, of its shape."""
    base = unwrap(fn)[0]
    if base.support.is_discrete:
        low, _ = bounds(name, base, truncated)
        return jnp.broadcast_to(jnp.asarray(low, int), fn.shape())
    try:
        return fn.support.feasible_like(jnp.zeros(fn.shape()))
    except NotImplementedError:
        return fn.sample(jax.random.key(0))


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


def run_model(model: Callable, call: Callable, reader: Reader, inputs: Mapping) -> Reader:
    """Run the model under the reader, turning its own failures into errors that name the site."""
    args, kwargs = call([inputs[k] for k in inputs if k[0] == "data"])
    try:
        # what NumPyro would validate is checked on the host, where it compiles nothing
        with numpyro.validation_enabled(False), handlers.seed(rng_seed=inputs["key", 0]), reader:
            model(*args, **kwargs)
    except (*NOT_CONCRETE, ModelError, PlanError, DataError):
        raise
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise _explain(error, reader.last, args, kwargs) from error
    return reader


def _explain(error: Exception, where: str, args, kwargs) -> ValueError:
    listed = [i for i, a in enumerate(args) if isinstance(a, list)] + [
        k for k, a in kwargs.items() if isinstance(a, list)
    ]
    if listed:
        which = ", ".join(map(str, listed))
        return DataError(
            where,
            problem=f"the model fails here: {error}; argument {which} is a Python list",
            mend="pass jnp.asarray(...)",
        )
    return ModelError(
        where,
        problem=f"the model itself fails at or after this site: {type(error).__name__}: {error}",
        mend="check that the arguments' shapes fit the plates; the model must also run as model(*args, **kwargs) alone",
    )


def outputs_of(records: Mapping[str, Record], latents: Mapping[str, Any]) -> dict:
    """Everything that later stages ask of a site, as arrays."""
    out = {}
    for name, r in records.items():
        if r.auxiliary:
            out[name, "elem"] = jnp.asarray(r.base.log_factor)
        else:
            out[name, "elem"] = r.base.log_prob(r.value)
            out[name, "value"] = jnp.asarray(r.value)
        family = family_of(r.base)
        if isinstance(family, Family):
            for arg in (*family.args, *family.fixed):
                out[name, f"arg:{arg}"] = jnp.asarray(getattr(r.base, arg))
        if name in latents:
            out[name, "low"], out[name, "high"] = (jnp.asarray(b) for b in latents[name])
        if r.mask is not None:
            out[name, "mask"] = jnp.asarray(r.mask)
        if r.scale is not None:
            out[name, "scale"] = jnp.asarray(r.scale)
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Discovery:
    """First reading: which sites there are, and the model's own start values as functions of the data."""

    records: Mapping[str, Record]
    params: Mapping[str, Any]
    frames: Mapping[str, tuple[int, int]]
    graph: Graph


class Source:
    """A model with its arguments split into arrays, which are traced, and the rest, which are part of the program."""

    def __init__(self, model: Callable, args: tuple, kwargs: dict, truncated, drop_nan: bool):
        self.model, self.truncated, self.drop_nan = model, truncated, drop_nan
        leaves, self.tree = jax.tree.flatten((args, kwargs))
        self.static = [None if is_array(x) else x for x in leaves]
        self.where = [i for i, x in enumerate(leaves) if is_array(x)]
        self.data = [leaves[i] for i in self.where]
        self.concrete = False

    def signature(self) -> tuple:
        """Equal for calls that may share one compiled program (given the same support sizes)."""
        shapes = tuple((np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype)) for x in self.data)
        static = tuple(x if isinstance(x, int | float | str | bool | type(None)) else id(x) for x in self.static)
        values = tuple(np.asarray(x).tobytes() for x in self.data) if self.concrete else ()
        return (self.tree, shapes, static, values, self.drop_nan, tuple(sorted(self.truncated.items())))

    def call(self, data: list) -> tuple[tuple, dict]:
        leaves = list(self.static)
        for i, x in zip(self.where, data, strict=True):
            leaves[i] = x
        return jax.tree.unflatten(self.tree, leaves)

    def data_inputs(self) -> dict:
        return {} if self.concrete else {("data", i): x for i, x in enumerate(self.data)}

    def read(self, extra: Mapping, outputs: Callable[[Reader], dict]) -> tuple[Reader, Graph]:
        """Trace the model with `extra` inputs given; `outputs` says what of the reader the graph returns."""
        kept: list[Reader] = []

        def run(inputs):
            reader = Reader(inputs, self.truncated, self.drop_nan)
            call = (lambda _: self.call([jnp.asarray(x) for x in self.data])) if self.concrete else self.call
            kept.append(run_model(self.model, call, reader, inputs))
            return outputs(reader)

        graph = trace_graph(run, {**self.data_inputs(), ("key", 0): jax.random.key(0), **extra})
        return kept[-1], graph

    def discover(self) -> Discovery:
        """Run once with placeholders; falls back to the data's own values where the model reads them in Python."""

        def outputs(reader: Reader) -> dict:
            out = {("init", n): jnp.asarray(numeric(n, v)) for n, (v, _) in reader.params.items()}
            for name, r in reader.records.items():
                if not r.observed and r.base.support.is_discrete:
                    low, high = bounds(name, r.base, self.truncated)
                    out[name, "low"], out[name, "high"] = jnp.asarray(low), jnp.asarray(high)
                if not r.observed and not r.base.support.is_discrete:
                    out["init", name] = jnp.asarray(r.value)
            return out

        try:
            reader, graph = self.read({}, outputs)
        except NOT_CONCRETE:
            self.concrete = True
            reader, graph = self.read({}, outputs)
        return Discovery(reader.records, reader.params, reader.frames, graph)


def numeric(name: str, value: Any) -> Any:
    """The start value of a parameter, refused unless it is one array."""
    if len(jax.tree.leaves(value)) != 1 or isinstance(value, dict | list | tuple):
        raise ModelError(
            name, problem="this parameter is a tree of arrays", mend="declare one numpyro.param for each array"
        )
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)


def is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray | jax.Array | np.generic) and np.dtype(x.dtype).kind in "biuf"


def read_latents(found: Discovery, source: Source) -> tuple[dict[str, Latent], dict[str, tuple[Any, Any]]]:
    """Discrete latents with their supports, whose bounds are computed from the data."""
    latents, limits = {}, {}
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
        limits[name] = (low, high)
        states = enumerate_states(name, int(low.min()), int(high.max()), r)
        batch = tuple(r.fn.batch_shape)
        axes = r.axes[: len(batch)]
        bounded = bool(low.min() < low.max() or high.min() < high.max())
        latents[name] = Latent(name, states, axes, batch, bounded, r.mask is not None)
    return latents, limits


def enumerate_states(name: str, low: int, high: int, r: Record) -> np.ndarray:
    """Every value of one cell: a scalar, or all combinations of the event's elements."""
    count = high - low + 1
    event = tuple(r.fn.event_shape)
    total = count ** int(np.prod(event, dtype=int))
    if count < 1:
        raise DataError(
            name, problem=f"its support is empty (from {low} to {high})", mend="check the data it is made of"
        )
    if total > MAX_STATES:
        raise PlanError(
            name,
            problem=f"{total:,} states a cell are too many to enumerate",
            mend=f'EM(model, e_step={{"{name}": autoem.e_step.Truncated(low=..., high=...)}}), or independent sites in a plate',
        )
    values = range(low, high + 1)
    if not event:
        return np.arange(low, high + 1)
    grid = list(itertools.product(values, repeat=int(np.prod(event))))
    return np.asarray(grid).reshape(total, *event)


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
    latents, limits = read_latents(found, source)

    def outputs(reader: Reader) -> dict:
        return outputs_of(reader.records, limits)

    reader, full = source.read(full_inputs(found, latents, compact=False), outputs)
    graph, compact = full, dict.fromkeys(latents, False)
    if latents:
        try:
            _, graph = source.read(full_inputs(found, latents, compact=True), outputs)
            compact = dict.fromkeys(latents, True)
        except NOT_CONCRETE + (ModelError, ValueError, TypeError):
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


def read_site(r: Record, latents: Mapping[str, Latent]) -> Site:
    role = "factor" if r.auxiliary else "observed" if r.observed else "latent" if r.name in latents else "parameter"
    family = None if r.auxiliary else family_of(r.base)
    event_dim = 0 if r.auxiliary else r.base.event_dim
    kind = "factor" if r.auxiliary else type(r.base).__name__
    support = "" if r.auxiliary else str(r.base.support)
    return Site(
        r.name, role, kind, family, r.axes, r.shape, event_dim, r.mask is not None, r.scale is not None, support=support
    )

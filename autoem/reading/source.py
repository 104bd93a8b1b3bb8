"""A model together with its arguments, and the first reading of it: which sites are there?

In: a model, its arguments, and the options that change how it is read. Out: `Source`, which holds the data and traces
the model to a data flow graph; and its `Discovery`, whose graph computes start values and supports from the data.
A model that fails is answered with its line, its last site and the arguments that it was called with.
"""

from __future__ import annotations

import dataclasses
import inspect
import linecache
import os
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers

from autoem._errors import AutoEMBug, DataError, ModelError, PlanError
from autoem.graph.jaxpr import Graph, trace_graph
from autoem.ir import Chain, Continuous
from autoem.reading.reader import NOT_CONCRETE, Reader, Record, described
from autoem.reading.steps import read_scan
from autoem.reading.support import bounds
from autoem.reading.walks import read_walk


@dataclasses.dataclass(frozen=True, eq=False)
class Discovery:
    """First reading: which sites there are, and the model's own start values as functions of the data."""

    records: Mapping[str, Record]
    params: Mapping[str, Any]
    frames: Mapping[str, tuple[int, int]]
    graph: Graph
    chains: tuple[Chain, ...] = ()


class Source:
    """A model with its arguments split into arrays, which are traced, and the rest, which are part of the program."""

    def __init__(self, model: Callable, args: tuple, kwargs: dict, truncated, drop_nan: bool):
        self.model, self.truncated, self.drop_nan = model, truncated, drop_nan
        with_paths, self.tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
        self.paths = [path for path, _ in with_paths]
        leaves = [plain(x, lambda path=path: path_name(model, path)) for path, x in with_paths]
        self.static = [None if is_array(x) else x for x in leaves]
        self.where = [i for i, x in enumerate(leaves) if is_array(x)]
        self.data = [leaves[i] for i in self.where]
        self.concrete = False
        self.walks: frozenset[str] = frozenset()  # sites over whole paths that are read step by step
        self.numbers: dict[tuple[str, str, int], np.ndarray] = {}

    def signature(self) -> tuple:
        """Equal for calls that may share one compiled program (given the same support sizes)."""
        shapes = tuple((np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype)) for x in self.data)
        static = tuple(map(identity, self.static))
        values = tuple(np.asarray(x).tobytes() for x in self.data) if self.concrete else ()
        return (self.tree, shapes, static, values, self.drop_nan, tuple(sorted(self.truncated.items())))

    def call(self, data: list) -> tuple[tuple, dict]:
        leaves = list(self.static)
        for i, x in zip(self.where, data, strict=True):
            leaves[i] = x
        return jax.tree.unflatten(self.tree, leaves)

    def argument(self, i: int) -> str:
        """What the model calls the argument that holds the data's array `i`."""
        return path_name(self.model, self.paths[self.where[i]][:2])

    @property
    def values(self) -> dict:
        """The data as inputs of a graph."""
        return {("data", i): x for i, x in enumerate(self.data)}

    def data_inputs(self) -> dict:
        return {} if self.concrete else {("data", i): x for i, x in enumerate(self.data)}

    def read(
        self,
        extra: Mapping,
        outputs: Callable[[Reader], dict],
        compact: bool = False,
        hidden: Mapping[str, Continuous] | None = None,
    ) -> tuple[Reader, Graph]:
        """Trace the model with `extra` inputs given; `outputs` says what of the reader the graph returns.

        Inputs that are continuous latents, `hidden`, have their own order of axes, and the model sees its own.
        """
        turned = {("latent", n): z for n, z in (hidden or {}).items() if z.order}
        kept: list[Reader] = []
        numbers = [jnp.asarray(x) for x in self.data] if self.concrete else []

        def run(inputs):
            inputs = {k: turned[k].as_model(v) if k in turned else v for k, v in inputs.items()}
            reader = Reader(inputs, self.truncated, self.drop_nan, self.concrete, compact, read_scan)
            reader.numbers, reader.walks, reader.read_walk = self.numbers, self.walks, read_walk
            call = (lambda _: self.call(numbers)) if self.concrete else self.call
            kept.append(reader)
            return run_model(self.model, call, reader, inputs, outputs)

        graph = trace_graph(run, {**self.data_inputs(), ("key", 0): jax.random.key(0), **extra})
        return kept[-1], graph

    def discover(self) -> Discovery:
        """Run once with placeholders; falls back to the data's own values where the model reads them in Python."""

        def outputs(reader: Reader) -> dict:
            out: dict = {("init", n): jnp.asarray(numeric(n, v)) for n, (v, _) in reader.params.items()}
            out.update({("·given", k): v for k, v in reader.given.items()})
            for name, r in reader.records.items():
                if r.observed or r.auxiliary:
                    continue
                if (ready := getattr(r, "ready", None)) is not None:
                    if "low" not in ready:  # a continuous latent
                        continue
                    out[name, "low"], out[name, "high"] = ready["low"], ready["high"]
                    continue
                if r.base.support.is_discrete:
                    low, high = bounds(name, r.base, self.truncated)
                    out[name, "low"], out[name, "high"] = jnp.asarray(low), jnp.asarray(high)
                else:
                    out["init", name] = jnp.asarray(r.value)
            return out

        try:
            reader, graph = self.read({}, outputs)
        except NOT_CONCRETE:
            self.concrete = True
            reader, graph = self.read({}, outputs)
        self.numbers = numbers_given(graph)
        return Discovery(reader.records, reader.params, reader.frames, graph, tuple(reader.chains))


def numbers_given(graph: Graph) -> dict[tuple[str, str, int], np.ndarray]:
    """What scans are given that depends on no data: `jnp.zeros(n, int)` to start from, `jnp.arange(t)` to run over."""
    keys = [k for k in graph.outputs if k[0] == "·given" and not graph.needs(k)]
    return {k[1]: np.asarray(v) for k, v in zip(keys, graph.evaluate(keys, {}), strict=True)}


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


def identity(x: Any) -> Any:
    """Equal for values of which a compiled program may hold either."""
    if isinstance(x, np.ndarray):  # of labels: its owner may change it in place
        return (x.shape, x.dtype.str, tuple(x.ravel().tolist()) if x.dtype.kind in "USMmc" else id(x))
    return x if isinstance(x, int | float | str | bool | type(None)) else id(x)


def path_name(model: Callable, path: tuple) -> str:
    """What the model calls a leaf of its arguments: `x`, or `data['y'][0]`."""
    which, key = path[0].idx, path[1]
    name = str(key.key) if which else argument_name(model, key.idx)
    return name + jax.tree_util.keystr(path[2:])


def plain(x: Any, name: Callable[[], str]) -> Any:
    """Series and the like as NumPy arrays; frames, whose columns a model would read in ways of their own, are refused.

    Raises:
        DataError: a frame, a series of anything but numbers, or an array with a mask, which JAX would drop.
    """
    if isinstance(x, np.ma.MaskedArray):
        mend = f'{name()}.astype(float).filled(np.nan), and EM(model, missing="marginalize")'
        raise DataError(name(), problem="this argument is a masked array, and JAX knows no mask", mend=mend)
    if isinstance(x, np.ndarray | np.generic | jax.Array) or not hasattr(x, "__array__"):
        return x
    kind = f"{type(x).__module__.partition('.')[0]} {type(x).__name__}"
    if hasattr(x, "columns"):
        n = name()
        mend = f"pass {n}.to_numpy(), or a dict of columns: {{c: {n}[c].to_numpy() for c in {n}.columns}}"
        raise DataError(n, problem=f"this argument is a {kind}, and JAX computes with arrays", mend=mend)
    array = np.asarray(x)
    if array.dtype.kind in "biuf":
        return array
    if all(isinstance(v, str) for v in array.ravel()[:5]):
        mend = f"np.unique({name()}, return_inverse=True)[1] for labels"
    else:
        mend = f'{name()}.to_numpy(float), with NaN for what is missing, and EM(model, missing="marginalize")'
    raise DataError(name(), problem=f"this argument is a {kind} of {array.dtype}, not of numbers", mend=mend)


def run_model(
    model: Callable, call: Callable, reader: Reader, inputs: Mapping, outputs: Callable[[Reader], dict]
) -> dict:
    """Run the model under the reader and return its `outputs`; the model's failures become errors naming the site."""
    args, kwargs = call([inputs[k] for k in inputs if k[0] == "data"])
    try:
        # what NumPyro would validate is checked on the host, where it compiles nothing
        with numpyro.validation_enabled(False), handlers.seed(rng_seed=inputs["key", 0]), reader, reader.context():
            model(*args, **kwargs)
            return outputs(reader)
    except (*NOT_CONCRETE, ModelError, PlanError, DataError, AutoEMBug):
        raise
    except Exception as error:
        raise explained(error, model, reader.last, args, kwargs) from error


def explained(error: Exception, model: Callable, last: str, args: tuple, kwargs: Mapping) -> ValueError:
    """The model's own failure, with its place and the arguments that led to it."""
    name = model_name(model)
    if (empty := empty_plate(error)) is not None:
        no_rows = [f"'{n}' has shape {np.shape(x)}" for n, x in named_arguments(model, args, kwargs) if is_empty(x)]
        problem = "; ".join(["this plate is empty", *(f"argument {a}" for a in no_rows)])
        return DataError(empty, problem=problem, mend="pass at least one row of data")
    if (call := wrong_call(model, args, kwargs)) and isinstance(error, TypeError):
        return ModelError(
            name, problem=f"the model cannot be called so: {call[0]}", mend=f"pass what it takes: {call[1]}"
        )
    text = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
    at = f"after site '{last}'" if last else "before its first site"
    if line := line_in(model, error.__traceback__):
        at += f", in {line}"
    if "truth value" in text.lower():
        return ModelError(
            last or name,
            problem=f"Python code {at} branches on an array ({text})",
            mend="use jnp.where, or index a table by the latent, instead of `if` on its value",
        )
    given = [(n, x) for n, x in named_arguments(model, args, kwargs)]
    passed = ", ".join(f"{n}: {described(x)}" for n, x in given)
    problem = f"the model itself fails {at}: {text}" + (f"\n  called with {passed}" if passed else "")
    if lists := [n for n, x in given if isinstance(x, list | tuple)]:
        return DataError(last or name, problem=problem, mend=f"pass jnp.asarray({lists[0]}): JAX computes with arrays")
    mend = "correct that line of the model; it must also run alone, as model(*args, **kwargs)"
    if any(word in text for word in ("shape", "broadcast", "dimension", "index", "axis")):
        mend = "check the shapes on that line against each other; a site whose rows are vectors ends in .to_event(1)"
    elif "len()" in text or "unsized" in text or "no attribute 'shape'" in text:
        mend = "pass an array, with a row for each datum, where that line asks for its length or shape"
    return ModelError(last or name, problem=problem, mend=mend)


def model_name(model: Callable) -> str:
    return getattr(model, "__name__", type(model).__name__)


def frames_of(trace: TracebackType | None) -> Iterator[tuple[Any, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def empty_plate(error: Exception) -> str | None:
    """Name of the plate that could not be made, where that is the failure."""
    if "size of plate" not in str(error):
        return None
    *_, (frame, _) = frames_of(error.__traceback__)
    return str(frame.f_locals.get("name", "plate"))


def line_in(model: Callable, trace: TracebackType | None) -> str:
    """The innermost line of the model's own file on the way to the failure."""
    code = getattr(inspect.unwrap(model), "__code__", None)
    file = code.co_filename if code else None
    lines = [n for frame, n in frames_of(trace) if frame.f_code.co_filename == file]
    if not lines or file is None:
        return ""
    text = linecache.getline(file, lines[-1]).strip()
    return f"line {lines[-1]} of {os.path.basename(file)}" + (f", `{text}`" if text else "")


def wrong_call(model: Callable, args: tuple, kwargs: Mapping) -> tuple[str, str] | None:
    """What is wrong with the arguments by the model's signature, and that signature."""
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error), f"{model_name(model)}{signature}"
    return None


def argument_name(model: Callable, position: int) -> str:
    """What the model calls its argument at this position."""
    try:
        parameters = list(inspect.signature(model).parameters.values())
    except (TypeError, ValueError):
        return f"argument {position}"
    for i, p in enumerate(parameters):
        if p.kind == p.VAR_POSITIONAL:
            return f"{p.name}[{position - i}]"
        if i == position:
            return p.name
    return f"argument {position}"


def named_arguments(model: Callable, args: tuple, kwargs: Mapping) -> list[tuple[str, Any]]:
    return [*((argument_name(model, i), x) for i, x in enumerate(args)), *kwargs.items()]


def is_empty(x: Any) -> bool:
    return (hasattr(x, "shape") and 0 in np.shape(x)) or (isinstance(x, list | tuple) and not x)

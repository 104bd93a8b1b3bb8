"""A model together with its arguments, and the first reading of it: which sites are there?

In: a model, its arguments, and the options that change how it is read. Out: `Source`, which holds the data and traces
the model to a data flow graph; and its `Discovery`, whose graph computes start values and supports from the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoem._errors import ModelError
from autoem._jaxpr import Graph, trace_graph
from autoem._reader import NOT_CONCRETE, Reader, Record, run_model
from autoem._support import bounds


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
        numbers = [jnp.asarray(x) for x in self.data] if self.concrete else []

        def run(inputs):
            reader = Reader(inputs, self.truncated, self.drop_nan, self.concrete)
            call = (lambda _: self.call(numbers)) if self.concrete else self.call
            kept.append(reader)
            return run_model(self.model, call, reader, inputs, outputs)

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

"""What a `scan` is made of: its body, read once, and what it carries from step to step.

In: the message that `numpyro.contrib.control_flow.scan` sends, and the reader that met it. Out: `Scan`, which evaluates
anything that the body computes at all steps of a stretch at once. The body is traced alone, with what it carries as
inputs, and so never run over time with its latents: what it carries that no latent decides (a counter, the previous
observation) is computed by a scan of its own; what latents decide is written as their values so many steps back (`z@1`,
`z@2`), which are latents of their own to the tables of a step. The first steps, which read the start, are sites of
their own (`z[0]`).

Names of the pieces of a latent `z`: `z@0` its value at a step after the first ones, `z@1` at the step before, `z[0]` at
the first step, `z[-1]` at the last; `z` itself is its path, read by sites that read nothing carried.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpyro import handlers
from numpyro.primitives import _PYRO_STACK

from autoem._errors import DataError, ModelError
from autoem.graph.folding import dtype_of, folded, only_of, reads, shape_of
from autoem.graph.jaxpr import Graph, trace_graph
from autoem.ir import at_lag, at_step
from autoem.reading.reader import Reader, Record, outputs_of
from autoem.reading.scan_checks import REGISTER, RUNNING, conditioned, refuse_around, refuse_lists
from autoem.reading.support import bounds

MAX_LAG = 8
COUNT_UP_TO = 1 << 20  # steps whose counters are computed as the model is read


@dataclasses.dataclass
class Body:
    """The body of a scan at one place: its graph, and what was recorded as it was traced."""

    graph: Graph
    records: Mapping[str, Record]
    params: Mapping[str, tuple[Any, Any]]
    frames: Mapping[str, Any]
    carry: Any
    ys: Any

    def fields(self, name: str) -> list[tuple]:
        return [k for k in self.graph.outputs if k[0] == name]


def is_discrete(record: Record) -> bool:
    return record.auxiliary or bool(record.base.support.is_discrete)


class Scan:
    """One scan, with its start and its inputs, being read by `reader`."""

    def __init__(self, reader: Reader, msg: Mapping[str, Any]):
        self.reader = reader
        self.function, init, xs, length, reverse = msg["args"][:5]
        self.label = getattr(self.function, "__name__", "scan")
        self.outer = [h for h in _PYRO_STACK if isinstance(h, handlers.reparam)]
        self.reverse = bool(reverse)
        refuse_around(self.label)
        self.init, self.tree = jax.tree.flatten(init)
        with jax.ensure_compile_time_eval():  # numbers in the model's text stay numbers
            self.init = [x if isinstance(x, Tracer) else jnp.asarray(x) for x in self.init]
        self.xs, self.xs_tree = jax.tree.flatten(xs)
        refuse_lists(self.label, self.xs)
        self.length = int(length if length is not None else jnp.shape(self.xs[0])[0])
        self.num_inputs, given = len(self.xs), conditioned(self.label, self.length, msg)
        self.observed = tuple(given)
        self.xs = [jnp.asarray(x)[::-1] if reverse else jnp.asarray(x) for x in (*self.xs, *given.values())]
        self.time = reader.new_label("time")
        if self.length < 1:
            raise DataError(self.label, problem="the sequence is empty", mend="pass at least one step", kind="scan")
        self.compact = reader.compact
        self.found: dict[int, tuple[dict, dict]] = {}
        self.traced: dict[tuple, Body] = {}
        reader.given.update({(self.time, "carry", i): v for i, v in enumerate(self.init)})
        reader.given.update({(self.time, "x", i): v for i, v in enumerate(self.xs)})

    def trace(self, carry: Sequence[Any], latents: Mapping[str, Any]) -> Body:
        """The body as a graph of what it carries, its inputs and the latents, whose shapes are given."""
        known = (len(latents), *((v.shape, v.dtype) for v in map(shape_of, carry)))
        if known not in self.traced:  # the first steps of a register are many, and mostly of the same shapes
            self.traced[known] = self._trace(carry, latents)
        return self.traced[known]

    def _trace(self, carry: Sequence[Any], latents: Mapping[str, Any]) -> Body:
        kept: list[Any] = []

        def run(inputs: dict) -> dict:
            inner = Reader(self.inner_inputs(inputs), self.reader.truncated, self.reader.drop_nan)
            leaves = [inputs["·carry", i] for i in range(len(carry))]
            xs = [inputs["·x", i] for i in range(len(self.xs))]
            x = jax.tree.unflatten(self.xs_tree, xs[: self.num_inputs])
            given = handlers.condition(data=dict(zip(self.observed, xs[self.num_inputs :], strict=True)))
            with contextlib.ExitStack() as stack:
                for handler in (handlers.block(), handlers.seed(rng_seed=inputs["key", 0]), inner, given, *self.outer):
                    stack.enter_context(handler)
                new, ys = self.function(jax.tree.unflatten(self.tree, leaves), x)
            out = self.outputs(inner)
            new_leaves, new_tree = jax.tree.flatten(new)
            if new_tree != self.tree:
                problem = f"the step returns a carry of another structure ({new_tree}) than its start ({self.tree})"
                raise ModelError(self.label, problem=problem, mend="return what the step was given, renewed")
            y_leaves, y_tree = jax.tree.flatten(ys)
            kept[:] = [inner, y_tree]
            out.update({("·carry", i): jnp.asarray(v) for i, v in enumerate(new_leaves)})
            out.update({("·y", i): jnp.asarray(v) for i, v in enumerate(y_leaves)})
            return out

        inputs: dict = {("·carry", i): shape_of(v) for i, v in enumerate(carry)}
        inputs |= {("·x", i): shape_of(v[0]) for i, v in enumerate(self.xs)}
        inputs |= {("latent", n): v for n, v in latents.items()}
        inputs["key", 0] = jax.random.key(0)
        graph = trace_graph(run, inputs)
        inner, y_tree = kept
        return Body(graph, inner.records, inner.params, inner.frames, self.tree, y_tree)

    def inner_inputs(self, inputs: Mapping) -> dict:
        """Values of the body's sites: its own latents by their names, parameters those of the whole model."""
        params = {k: v for k, v in self.reader.inputs.items() if k[0] == "param"}
        return {**params, **inputs}

    def outputs(self, inner: Reader) -> dict:
        """Everything that later stages ask of the body's sites."""
        latents = {n for n, r in inner.records.items() if not r.observed and is_discrete(r)}
        return outputs_of(inner.records, latents, self.reader.truncated)

    @functools.cached_property
    def shapes(self) -> dict[str, Any]:
        """Shape of each latent of the body: full, or as its pieces are given, 1 along its plates."""
        out = {}
        for name, r in self.trace(self.init, {}).records.items():
            if not r.observed and not r.auxiliary:
                if is_discrete(r):
                    bounds(name, r.base, self.reader.truncated)
                shape = tuple(r.fn.batch_shape) + tuple(r.fn.event_shape)
                shape = jnp.shape(self.latent(name, 0)) if self.is_compact(name) else shape
                out[name] = jax.ShapeDtypeStruct(shape, jnp.result_type(int if is_discrete(r) else float))
        return out

    @functools.cached_property
    def body(self) -> Body:
        """The body at a step whose carry comes from a step before it."""
        carry = [shape_of(v) for v in self.init]
        for _ in range(MAX_LAG + 1):
            body = self.trace(carry, self.shapes)
            new = [jax.ShapeDtypeStruct(body.graph.shape(("·carry", i)), dtype_of(body.graph, ("·carry", i))) for i in
                   range(len(carry))]  # fmt: skip
            if [v.shape for v in new] == [v.shape for v in carry]:
                return body
            carry = new
        raise ModelError(
            self.label,
            problem="what the step carries changes its shape from step to step",
            mend="carry arrays of one shape",
        )

    @functools.cached_property
    def states(self) -> dict[int, int]:
        """Leaves of the carry that latents decide, and how many steps back the oldest such latent lies."""
        graph, leaves = self.body.graph, range(len(self.init))
        needs = {i: graph.needs(("·carry", i)) for i in leaves}
        decided = {i for i in leaves if any(k[0] == "latent" for k in needs[i])}
        while more := {i for i in leaves if any(k[0] == "·carry" and k[1] in decided for k in needs[i])} - decided:
            decided |= more
        lags: dict[int, int] = {}

        def lag(i: int, path: tuple[int, ...]) -> int:
            if i in path:
                raise ModelError(
                    self.label,
                    problem="what the step carries is computed from what it carried, and so from latents of any number "
                    "of steps back",
                    mend="carry sampled values alone: sample a running quantity, as Normal(phi * x, q) in place of "
                    f"phi * x + q * e; {RUNNING}; and of {REGISTER}",
                )
            if i not in lags:
                older = [lag(k[1], (*path, i)) for k in needs[i] if k[0] == "·carry" and k[1] in decided]
                lags[i] = 1 + max(older, default=0)
            return lags[i]

        return {i: lag(i, ()) for i in decided}

    @functools.cached_property
    def reading(self) -> set[str]:
        """Sites whose density reads what latents of earlier steps decide."""
        states = {("·carry", i) for i in self.states}
        return {n for n in self.body.records if self.body.graph.needs(*self.body.fields(n)) & states}

    @functools.cached_property
    def split(self) -> set[str]:
        """Sites that are read in pieces: those, and all that share a discrete latent with them which is not carried.

        A path is one latent to the tables, its pieces are others: what is carried is told apart where the chain is
        opened, and any other latent has to be the one or the other to all that read it.
        """
        graph, own = self.body.graph, {n for n, lag in self.lags.items() if not lag and self.discrete(n)}
        read = {n: {k[1] for k in graph.needs(*self.body.fields(n)) if k[0] == "latent"} | {n} for n in
                self.body.records}  # fmt: skip
        out = set(self.reading)
        while more := {n for n in read if read[n] & own & set().union(*(read[m] for m in out))} - out:
            out |= more
        return out

    def discrete(self, name: str) -> bool:
        return bool(jnp.issubdtype(self.shapes[name].dtype, jnp.integer))

    @functools.cached_property
    def lags(self) -> dict[str, int]:
        """How many steps back each latent of the body is read by any site; zero for those that are not."""
        out = dict.fromkeys(self.shapes, 0)
        graph = self.body.graph

        def follow(i: int, lag: int) -> None:
            for kind, name in graph.needs(("·carry", i)):
                if kind == "latent":
                    out[name] = max(out[name], lag)
                elif kind == "·carry" and name in self.states:
                    follow(name, lag + 1)

        for n in self.reading:
            for kind, i in graph.needs(*self.body.fields(n)):
                if kind == "·carry" and i in self.states:
                    follow(i, 1)
        return out

    @property
    def lag(self) -> int:
        return max(self.lags.values(), default=0)

    @functools.cached_property
    def entering(self) -> list[Any]:
        """Leaves that no latent decides, as they enter every step `(length, ...)`; None for the others."""
        free = [i for i in range(len(self.init)) if i not in self.states]
        graph = self.body.graph

        def step(carry, x):
            values = {("·carry", i): v for i, v in zip(free, carry, strict=True)}
            values |= {("·x", i): v for i, v in enumerate(x) if v is not None} | {("key", 0): jax.random.key(0)}
            new = graph.evaluate([("·carry", i) for i in free], values)
            return [jnp.asarray(n, v.dtype).reshape(v.shape) for n, v in zip(new, carry, strict=True)], carry

        read = {k[1] for i in free for k in graph.needs(("·carry", i)) if k[0] == "·x"}
        inputs = [x if i in read else None for i, x in enumerate(self.xs)]
        start = [jnp.asarray(self.init[i], dtype_of(graph, ("·carry", i))) for i in free]
        self.last, seen = jax.lax.scan(step, start, inputs, self.length) if free else ([], [])
        out: list[Any] = [None] * len(self.init)
        for i, v in zip(free, seen, strict=True):
            out[i] = v
        return out

    @functools.cached_property
    def counted(self) -> dict[tuple, Any]:
        """Inputs that the model's text tells, and leaves of the carry that only count: their values at every step."""
        numbers = self.reader.numbers
        inputs = {("·x", i): numbers[self.time, "x", i] for i in range(len(self.xs)) if (self.time, "x", i) in numbers}
        graph, start = self.body.graph, {i: v for i, v in enumerate(self.init) if not isinstance(v, Tracer)}
        counts = {i for i in start if i not in self.states}
        while fewer := {i for i in counts if not only_of(graph, ("·carry", i), {("·carry", j) for j in counts})}:
            counts -= fewer
        keys = [("·carry", i) for i in sorted(counts)]
        if not keys or self.length > COUNT_UP_TO:
            return inputs

        def step(now, _):
            new = graph.evaluate(keys, dict(zip(keys, now, strict=True)))
            return [jnp.asarray(n, v.dtype).reshape(v.shape) for n, v in zip(new, now, strict=True)], now

        with jax.ensure_compile_time_eval():
            first = [jnp.asarray(start[k[1]], dtype_of(graph, k)) for k in keys]
            rows = jax.lax.scan(step, first, None, self.length)[1]
            return inputs | {k: np.asarray(v) for k, v in zip(keys, rows, strict=True)}

    def is_compact(self, name: str) -> bool:
        """Whether a latent is read in compact pieces, and not as its path at full shape."""
        return self.compact and ("latent", at_lag(name, 0)) in self.reader.inputs

    def latent(self, name: str, lag: int) -> Any:
        """A latent `lag` steps before each of the steps after the first ones."""
        if self.is_compact(name):
            return self.reader.inputs["latent", at_lag(name, lag)]
        return self.path(name)[self.lag - lag : self.length - lag]

    def path(self, name: str) -> Any:
        """A latent at all steps; a placeholder while the model is first looked at."""
        if ("latent", name) in self.reader.inputs:
            return self.reader.inputs["latent", name]
        shape = self.shapes[name]
        return jnp.zeros((self.length, *shape.shape), shape.dtype)

    def at(self, name: str, step: int) -> Any:
        """A latent at one of the first steps, or counted from the end."""
        if self.is_compact(name):
            return self.reader.inputs["latent", at_step(name, step)]
        return self.path(name)[step]

    def evaluate(self, keys: list[tuple], fixed: Mapping, varying: Mapping, start: int = 0) -> list[Any]:
        """Outputs of the body over time, with a leading axis: of size one where nothing that varies is read.

        `start` is the first step that `varying` holds. What only counts steps is computed here and now, so that
        `jnp.where(t == 0, ...)` at the later steps is one branch of it and varies no more.
        """
        graph, fixed = self.body.graph, {**fixed, ("key", 0): jax.random.key(0)}
        steps = next((v.shape[0] for v in varying.values()), 1)
        counted = {k: v[start : start + steps] for k, v in self.counted.items() if k in varying}
        same, moving = folded(graph, [graph.outputs[k] for k in keys], counted)
        out: dict[tuple, Any] = {}
        groups: dict[tuple, list[tuple]] = {}
        for key in keys:
            inputs, variables = reads(graph, graph.outputs[key], {*same, *moving})
            groups.setdefault((inputs & set(varying), frozenset(variables & set(moving))), []).append(key)
        for (inputs, variables), members in groups.items():
            atoms = [graph.outputs[k] for k in members]

            def at(inputs: Mapping, variables: Mapping, atoms=atoms) -> list[Any]:
                return graph.evaluate_atoms(atoms, {**fixed, **inputs}, {**same, **variables})

            part = {k: varying[k] for k in inputs}, {v: moving[v] for v in variables}
            if any(part):
                names = list(part[1])
                values = jax.vmap(lambda i, v, n=names, f=at: f(i, dict(zip(n, v, strict=True))))(
                    part[0], [part[1][n] for n in names]
                )
            else:
                values = [jnp.asarray(v)[None] for v in at({}, {})]
            out.update(zip(members, values, strict=True))
        return [out[k] for k in keys]

    def values(self, lag: int) -> tuple[dict, dict]:
        """What the body reads at the steps `lag` before each later step: fixed values, and values along time."""
        if lag in self.found:  # each leaf of a register asks for all those before it
            return self.found[lag]
        start, stop = self.lag - lag, self.length - lag
        fixed: dict = {}
        varying: dict = {("·x", i): v[start:stop] for i, v in enumerate(self.xs)}
        varying |= {("·carry", i): v[start:stop] for i, v in enumerate(self.entering) if v is not None}
        for name in self.shapes:
            (fixed if self.is_compact(name) else varying)["latent", name] = self.latent(name, lag)
        keys = [("·carry", i) for i, oldest in self.states.items() if lag + oldest <= self.lag]
        left = self.evaluate(keys, *self.values(lag + 1), self.lag - lag - 1) if keys else []
        for key, value in zip(keys, left, strict=True):  # with a leading axis, of size one where all steps are alike
            same = value.shape[0] == 1 and self.compact
            (fixed if same else varying)[key] = value[0] if same else value
        self.found[lag] = fixed, varying
        return fixed, varying

    @functools.cached_property
    def heads(self) -> list[tuple[Body, dict]]:
        """The body at each of the first steps, with the values that it reads there."""
        out: list[tuple[Body, dict]] = []
        carry = list(self.init)
        for i in self.states if self.compact else ():  # the same for all plates: as good as the state of one cell
            number = self.reader.numbers.get((self.time, "carry", i))
            if number is not None and number.size and (number == number.flat[0]).all():
                later = self.body.graph.shape(("·carry", i))  # of a state that is a vector, its own axis stays
                same = len(later) == carry[i].ndim
                ones = [s == 1 or not same for s in (later if same else carry[i].shape)]
                carry[i] = carry[i][tuple(slice(0, 1) if one else slice(None) for one in ones)]
        for h in range(min(self.lag, self.length)):
            body = self.trace(carry, self.shapes)
            values: dict = {("·carry", i): v for i, v in enumerate(carry)}
            values |= {("·x", i): v[h] for i, v in enumerate(self.xs)} | {("key", 0): jax.random.key(0)}
            values |= {("latent", n): self.at(n, h) for n in self.shapes}
            out.append((body, values))
            carry = body.graph.evaluate([("·carry", i) for i in range(len(carry))], values)
        return out

    def last_carry(self) -> Any:
        """The carry that the scan returns, latents at the last steps being latents of their own."""
        _ = self.entering
        free = iter(self.last)
        leaves = [self.ending(i, 1) if i in self.states else next(free) for i in range(len(self.init))]
        return jax.tree.unflatten(self.tree, leaves)

    def ending(self, i: int, back: int) -> Any:
        """Leaf `i` as it left the step `back` from the end."""
        if self.length < back:
            return self.init[i]
        step = self.length - back
        values: dict = {("·x", j): v[step] for j, v in enumerate(self.xs)} | {("key", 0): jax.random.key(0)}
        values |= {("·carry", j): v[step] for j, v in enumerate(self.entering) if v is not None}
        values |= {("latent", n): self.at(n, -back) for n in self.shapes}
        graph = self.body.graph
        for j in self.states:
            if ("·carry", j) in graph.needs(("·carry", i)):
                values["·carry", j] = self.ending(j, back + 1)
        return graph.evaluate([("·carry", i)], values)[0]

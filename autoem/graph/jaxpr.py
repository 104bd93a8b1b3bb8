"""A model's data flow: traced once by JAX, then sliced, evaluated and asked what depends on what.

In: a function of named inputs. Out: a `Graph`, whose equations are in order and free of nested `jit`. Invariant: every
variable is written once, before it is read. Nothing here knows of models or of EM.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex
from jax.lax import GatherScatterMode

from autoem.graph.derivatives import safe

Key = tuple[str, Any]  # what kind of input or output, or whose; and its own name


NESTED = ("jit", "pjit", "closed_call")
WITH_RULES = (*NESTED, "custom_jvp_call", "custom_vjp_call")  # of which derivatives are known: gone, if opened
# what `x log y` with a guard for zero is made of: its own derivative is infinite there, that of its parts is not
GUARDED_LOG = {"ne", "or", "mul", "log", "log1p", "select_n", "convert_element_type", "broadcast_in_dim", *NESTED}


class Variable:
    """One value of the graph; compared by identity."""

    __slots__ = ("aval",)

    def __init__(self, aval):
        self.aval = aval

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aval.shape


@dataclasses.dataclass(frozen=True)
class Constant:
    """A literal or closed-over array."""

    value: Any


Atom = Variable | Constant


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """`outputs = primitive(*inputs, **params)`."""

    primitive: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[Variable, ...]
    params: Mapping[str, Any]

    def apply(self, values: Sequence[Any]) -> list[Any]:
        """Run the equation on `values`, which may be tracers of any transformation."""
        bound = self.primitive.get_bind_params(clamped(self.primitive.name, self.params))
        subfuns, params = bound if isinstance(bound, tuple) else ((), bound)  # JAX before 0.10 splits them
        out = self.primitive.bind(*subfuns, *values, **params)
        return list(out) if self.primitive.multiple_results else [out]


def clamped(name: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """A lookup's parameters, with its indices clamped, in the derivative too, where nothing else was asked for.

    Where latents have length 1 along their plates, indices of their cells point past the end: the value must be that of
    the one cell, and the derivative must not leave out what such an index has read.
    """
    if name != "gather" or params["mode"] == GatherScatterMode.CLIP or fills(params):
        return params
    return {**params, "mode": GatherScatterMode.CLIP, "fill_value": None, "unique_indices": False}


def fills(params: Mapping[str, Any]) -> bool:
    """Whether a lookup says by a number of its own what an index past the end should read."""
    if params["mode"] != GatherScatterMode.FILL_OR_DROP:
        return False
    fill = params["fill_value"]
    ends = {-(2 ** (bits - 1)) for bits in (32, 64)} | {2**bits - 1 for bits in (31, 32, 63, 64)}
    whole = fill is not None and not isinstance(fill, bool) and fill in ends
    return not (fill is None or whole or (isinstance(fill, float) and math.isnan(fill)))


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Equations from named inputs to named outputs."""

    inputs: dict[Key, Variable]
    outputs: dict[Key, Atom]
    equations: tuple[Equation, ...]

    @functools.cached_property
    def makers(self) -> dict[Variable, int]:
        """Number of the equation that writes a variable; inputs are written by none."""
        return {v: i for i, eqn in enumerate(self.equations) for v in eqn.outputs}

    @functools.cached_property
    def known(self) -> dict[Any, Any]:
        """What was found out about the graph, kept for the next who asks."""
        return {}

    @functools.cached_property
    def keys(self) -> dict[Variable, Key]:
        """Names of the inputs."""
        return {v: k for k, v in self.inputs.items()}

    @functools.cached_property
    def kinds(self) -> dict[Variable, frozenset[Any]]:
        """First part of the names of all inputs that a variable depends on: the kinds of input."""
        out = {v: frozenset([k[0]]) for k, v in self.inputs.items()}
        for eqn in self.equations:
            read = frozenset().union(*(out.get(a, frozenset()) for a in eqn.inputs if isinstance(a, Variable)))
            out.update(dict.fromkeys(eqn.outputs, read))
        return out

    def slice(self, atoms: Iterable[Atom], given: Iterable[Variable] = ()) -> list[Equation]:
        """The equations that `atoms` need, in order, the variables `given` being known."""
        return [self.equations[i] for i in sorted(self.reach(atoms, given)[0])]

    def reach(self, atoms: Iterable[Atom], given: Iterable[Variable] = ()) -> tuple[set[int], set[Variable]]:
        """Numbers of the equations that `atoms` need, and all variables that these read; only they are visited."""
        makers, given = self.makers, set(given)
        found: set[int] = set()
        pending = [a for a in atoms if isinstance(a, Variable)]
        seen = set(pending)
        while pending:
            variable = pending.pop()
            maker = None if variable in given else makers.get(variable)
            if maker is None or maker in found:
                continue
            found.add(maker)
            new = {a for a in self.equations[maker].inputs if isinstance(a, Variable)} - seen
            seen |= new
            pending += new
        return found, seen

    def needs(self, *keys: Key) -> frozenset[Key]:
        """Names of the inputs on which the outputs `keys` depend."""
        return self.needs_of([self.outputs[k] for k in keys])

    def needs_of(self, atoms: Iterable[Atom]) -> frozenset[Key]:
        read = self.reach(atoms)[1]
        return frozenset(self.keys[v] for v in read if v in self.keys)

    def shape(self, key: Key) -> tuple[int, ...]:
        atom = self.outputs[key]
        return np.shape(atom.value) if isinstance(atom, Constant) else atom.shape

    def evaluate(self, keys: Sequence[Key], values: Mapping[Key, Any]) -> list[Any]:
        """Outputs `keys` given the inputs they need; traceable, so it may stand under `vmap`, `vjp` or `jit`."""
        return self.evaluate_atoms([self.outputs[k] for k in keys], values)

    def evaluate_atoms(self, atoms: Sequence[Atom], values: Mapping[Any, Any], env=None) -> list[Any]:
        """The same of any values of the graph; some may be given, in `env` or among the inputs."""
        given = {**{v: x for v, x in values.items() if isinstance(v, Variable)}, **(env or {})}
        env = dict(given)

        def read(atom):
            if isinstance(atom, Constant):
                return atom.value
            return env[atom] if atom in env else values[self.keys[atom]]

        for eqn in self.slice(atoms, given):
            inputs = [read(a) for a in eqn.inputs]
            function = safe(eqn.primitive.name, inputs)
            outputs = eqn.apply(inputs) if function is None else [function(*inputs)]
            env.update(zip(eqn.outputs, outputs, strict=True))
        return [read(a) for a in atoms]


def trace_graph(function: Callable[[dict], dict], inputs: Mapping[Key, Any]) -> Graph:
    """Trace `function`, from a dict of arrays to a dict of arrays, at the shapes of `inputs`."""
    keys = list(inputs)
    out_keys: list[Key] = []

    def flat(*values):
        outputs = function(dict(zip(keys, values, strict=True)))
        out_keys.extend(outputs)
        return list(outputs.values())

    graph = graph_of(jax.make_jaxpr(flat)(*inputs.values()))
    named_inputs = dict(zip(keys, graph.inputs.values(), strict=True))
    return Graph(named_inputs, dict(zip(out_keys, graph.outputs.values(), strict=True)), graph.equations)


def graph_of(closed, opened: tuple[str, ...] = NESTED) -> Graph:
    """A closed jaxpr as a graph with inputs ("in", i) and outputs ("out", i), in order; calls are `opened`."""
    equations: list[Equation] = []
    names = [Variable(v.aval) for v in closed.jaxpr.invars]
    atoms = inline(closed, dict(zip(closed.jaxpr.invars, names, strict=True)), equations, opened)
    inputs = {("in", i): v for i, v in enumerate(names)}
    return Graph(inputs, {("out", i): a for i, a in enumerate(atoms)}, tuple(equations))


def is_guarded_log(closed) -> bool:
    """Whether a call computes `x log y` or `x log(1 + y)`, and zero where `x` is."""
    names = {eqn.primitive.name for eqn in closed.jaxpr.eqns}
    return names <= GUARDED_LOG and bool(names & {"log", "log1p"})


def inline(closed, env: dict[Any, Atom], equations: list[Equation], opened: tuple[str, ...]) -> list[Atom]:
    """Append the equations of `closed`, those of the calls `opened` in their place; return its outputs."""
    env.update(zip(closed.jaxpr.constvars, map(Constant, closed.consts), strict=True))

    def read(v) -> Atom:
        return Constant(v.val) if isinstance(v, jex.Literal) else env[v]

    for eqn in closed.jaxpr.eqns:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in opened or (eqn.primitive.name == "custom_jvp_call" and is_guarded_log(inner)):
            inner_env = dict(zip(inner.jaxpr.invars, map(read, eqn.invars), strict=True))
            outs = inline(inner, inner_env, equations, opened)
        else:
            outs = [Variable(v.aval) for v in eqn.outvars]
            equations.append(Equation(eqn.primitive, tuple(map(read, eqn.invars)), tuple(outs), eqn.params))
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in closed.jaxpr.outvars]

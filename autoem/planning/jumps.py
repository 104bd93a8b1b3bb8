"""Refuse jumps: arguments of a site that a continuous latent moves in steps, where its integral takes them as smooth.

In: a classified program, and the latents whose integral rests on derivatives or on a rule for smooth functions. Out:
nothing, or a refusal. Comparisons, roundings and the like tell where to look; whether the value jumps is then tried:
along a line through the latents' space an interval is cut in parts again and again, and the change over it stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import biject_to

from autoem._errors import PlanError
from autoem.graph.jaxpr import Graph, Key, Variable
from autoem.graph.programs import jit_once
from autoem.ir import Program

STEPS = {
    "lt", "le", "gt", "ge", "eq", "ne", "sign", "floor", "ceil", "round", "argmax", "argmin", "sort", "is_finite",
    "convert_element_type", "cond", "while", "scan",
}  # fmt: skip
PARTS, TIMES, TRIED = 64, 2, 8  # parts of an interval, how often it is cut again, and elements that are looked at


def refuse_jumps(program: Program, names: Collection[str], params: Mapping[str, Array], values: Mapping) -> None:
    """Raise where an argument of a site jumps as latents `names` move.

    Raises:
        PlanError: names the site, the latents and the mend.
    """
    graph = program.full
    for site in program.sites.values() if names and not program.chains else ():
        keys = [k for k in graph.outputs if k[0] == site.name and str(k[1]).startswith("arg:")]
        read = sorted(n for n in names if ("latent", n) in graph.needs(*keys))
        if not read or not steps(graph, keys, read):
            continue
        if jumps(line(program, keys, read, params, values)):
            one = " - ".join(read[:2])
            raise PlanError(
                site.name,
                problem=f"an argument of its distribution jumps as {' and '.join(read)} move (a comparison, a rounding "
                "or a sign of them), and their integral is approximated as that of a smooth function",
                mend=f"write the probability of the comparison without {' and '.join(read)}, such as "
                "jax.scipy.stats.norm.cdf(mean / sd) of a normal difference; smooth it, as jax.nn.sigmoid("
                f"({one}) / 0.1); or draw them: e_step=autoem.e_step.MonteCarlo()",
            )


def steps(graph: Graph, keys: list[Key], names: Collection[str]) -> bool:
    """Whether what may jump stands between the latents and some outputs."""
    moved = {graph.inputs["latent", n] for n in names}
    for eqn in graph.slice([graph.outputs[k] for k in keys]):
        if any(isinstance(a, Variable) and a in moved for a in eqn.inputs):
            whole = all(not jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outputs)
            if eqn.primitive.name in STEPS and (eqn.primitive.name != "convert_element_type" or whole):
                return True
            moved.update(eqn.outputs)
    return False


def line(
    program: Program, keys: list[Key], names: Collection[str], params: Mapping[str, Array], values: Mapping
) -> Callable[[float], np.ndarray]:
    """The outputs as one vector, as a function of the place on a line through the latents' space."""
    rng, ends = np.random.default_rng(51), {}
    for m in program.continuous.values():
        shape = biject_to(m.support).inverse_shape(m.shape + m.event)
        ends[m.name] = rng.normal(size=(2, *shape)) * np.array([0.3, 1.0]).reshape(2, *(1,) * len(shape))
    states = {}
    for z in program.latents.values():
        key = "latent", z.name
        states[key] = np.asarray(z.states)[rng.integers(z.num_states, size=program.full.inputs[key].shape)]

    @jit_once
    def at(place, ends, params, values) -> Array:
        given: dict[Any, Any] = {**values, **states, **{("param", n): p for n, p in params.items()}}
        for m in program.continuous.values():
            start, way = ends[m.name]
            value = biject_to(m.support)(start + place * way if m.name in names else start)
            given["latent", m.name] = value
        return jnp.concatenate([jnp.ravel(jnp.asarray(o, float)) for o in program.full.evaluate(keys, given)])

    return lambda place: np.asarray(at(place, ends, dict(params), dict(values)))


def jumps(value: Callable[[float], np.ndarray]) -> bool:
    """Whether an element of a function of a number jumps between -3 and 3."""
    size = value(0.0).size
    total, most, where = np.zeros(size), np.zeros(size), np.zeros((size, 2))
    for left, right, change in changes(value, -3.0, 3.0):
        larger = change > most
        most[larger], where[larger] = change[larger], (left, right)
        total += change
    share = most / np.where(total > 0, total, 1)
    tried = {*np.argsort(-share)[:TRIED].tolist(), *np.argsort(-most)[:TRIED].tolist()}
    return any(stays(value, i, where[i, 0], where[i, 1], float(most[i])) for i in tried if most[i] > 0)


def stays(value: Callable[[float], np.ndarray], i: int, left: float, right: float, change: float) -> bool:
    """Whether the change of one element over an interval is that over a part of it, and of that part again."""
    for _ in range(TIMES):
        parts = [(c[i], a, b) for a, b, c in changes(value, left, right)]
        found, left, right = max(parts)
        if found < 0.5 * change:
            return False
        change = found
    return True


def changes(
    value: Callable[[float], np.ndarray], left: float, right: float
) -> Iterator[tuple[float, float, np.ndarray]]:
    """The parts of an interval, and how much every element changes over each."""
    places = np.linspace(left, right, PARTS + 1)
    before = value(places[0])
    for a, b in itertools.pairwise(places):
        after = value(b)
        change = np.abs(after - before)
        yield a, b, np.where(np.isfinite(change), change, 0)
        before = after

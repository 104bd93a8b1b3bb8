"""What is to be said of an end point because of how its latents were treated.

In: a build and the parameters at the end. Out: sentences, each naming a latent: states that annealing has merged, prior
mass that a truncated sum leaves out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from autoem._build import Build
from autoem._init import state_spreads, tables_at
from autoem._named import Named
from autoem._programs import jit_once
from autoem._trace import Source

ALIKE = 1e-6  # relative difference of two states' densities below which nothing will tell them apart
LEFT_OUT = 1e-6  # prior mass beyond a truncated sum that is worth a word


def remarks(
    built: Build, source: Source, params: Mapping[str, Array], truncated: Mapping[str, object], steps: int
) -> tuple[str, ...]:
    """What a user should know of the end point; `truncated` names the latents that are summed over a range only."""
    warmup = built.kernel.warmup
    if warmup > steps:
        return (f"the posterior was still flattened, for it sharpens until step {warmup}: give a larger max_steps",)
    if not warmup and not truncated:
        return ()
    bundle = built.plain_bundle(source, jax.random.key(0))
    out = merged(built, params, bundle) if warmup else ()
    return (*out, *(left_out(built, params, bundle, truncated) if truncated else ()))


def merged(built: Build, params, bundle) -> tuple[str, ...]:
    """Latents whose states have become one under a flat posterior, and have stayed so."""
    spreads = jit_once(lambda p, b: state_spreads(built, tables_at(built, p, b)))(dict(params), bundle)
    names = sorted(n for n, v in spreads.items() if float(v) < ALIKE)
    mend = (
        "anneal from nearer to one, as Annealed(start=0.8, steps=10), or with the spreads held, m_step={...: Fixed()}, "
        "and fit all from there by init=result.params"
    )
    return tuple(f"the states of '{n}' have merged, a saddle point that no step leaves: {mend}" for n in names)


def left_out(built: Build, params, bundle, truncated: Mapping[str, object]) -> tuple[str, ...]:
    """Truncated latents of which some cell's prior holds more outside the range than may be overlooked."""
    masses = jit_once(lambda p, b: prior_masses(built, p, b, frozenset(truncated)))(dict(params), bundle)
    least = max(LEFT_OUT, 50 * float(jnp.finfo(jnp.result_type(float)).eps))
    worst: dict[str, float] = {}
    for piece, mass in masses.items():
        name = built.program.base_of(piece)
        worst[name] = max(worst.get(name, 0.0), 1 - float(mass))
    return tuple(
        f"up to {out:.1e} of the prior mass of a cell of '{n}' lies outside {range_of(truncated[n])}, "
        "and is left out: give Truncated a wider range"
        for n, out in worst.items()
        if out > least
    )


def range_of(limits) -> str:
    return f"{limits[0]} ... {limits[1]}"


def prior_masses(built: Build, params, bundle, names: frozenset[str]) -> dict[str, Array]:
    """By latent, or piece of a path: the least sum of its prior over the range, of all cells and parents' states."""
    problem, out = built.kernel.problem, {}
    cells = problem.cells(params, bundle)
    for f in built.kernel.likelihood_factors:
        if f.own and built.program.base_of(f.name) in names and f.name in cells:
            rows = dataclasses.replace(bundle.rows[f.name], scale=None)
            table: Named = f.table(cells[f.name], rows).value
            out[f.name] = jnp.min(jax.nn.logsumexp(table.array, axis=table.axes.index(f.name)))
    return {n: jnp.exp(jnp.minimum(v, 0.0)) for n, v in out.items()}

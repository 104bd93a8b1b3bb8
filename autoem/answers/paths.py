"""What a posterior says of a chain's paths: neighbouring steps, and each step given what was seen up to it.

In: the tables of a model's factors, and the chain. Out: probabilities with named axes. What concerns the first steps,
which are latents of their own, is a derivative of `log Z` like any marginal; for the later ones the recursion along
time is read as it stands at each step. Latents above the chain are weighed by what the chain tells of them so far.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from autoem._errors import PlanError
from autoem.e_step.elimination.along_time import ChainStep, filtered_path, sums_until
from autoem.e_step.elimination.chains import TIME
from autoem.e_step.elimination.eliminate import Layout, Step, Table, eliminate
from autoem.e_step.tables.tabulate import Factor
from autoem.graph.named import Named, choose, multiply
from autoem.ir import Chain, Program, at_lag, at_step


def neighbours(chain: Chain, name: str) -> list[tuple[str, str]]:
    """The pieces of a latent at each step and the next: of the first steps one by one, of all later ones together."""
    first = [(at_step(name, h - 1), at_step(name, h)) for h in range(1, min(chain.lag, chain.length))]
    return [*first, (at_lag(name, 1), at_lag(name, 0))] if chain.length > chain.lag else first


def filtered(
    program: Program, chain: Chain, name: str, factors: Sequence[Factor], tables: Sequence[Table], layout: Layout
) -> Named:
    """Probabilities of a chain's latent given what was seen up to each step, with the axes of its path.

    Raises:
        PlanError: a site of the step has its rows added up over time before the chain is.
    """
    refuse_summed(chain, factors)
    latent = program.latents[name]
    plates, shape = latent.axes[1:], (*latent.shape[1:], latent.num_states)
    going = chain.length > chain.lag
    out = []
    for h in range(min(chain.lag, chain.length) - going):
        piece = at_step(name, h)
        seen = [seen_until(program, chain, h, f, t) for f, t in zip(factors, tables, strict=True)]
        out.append(at_first(program, piece, seen, layout).to((TIME, *plates, piece)))
    if going:
        out.append(onwards(chain, name, tables, layout).to((TIME, *plates, at_lag(name, 0))))
    array = jnp.concatenate([jnp.broadcast_to(x, (x.shape[0], *shape)) for x in out])
    return Named(array, (chain.time, *plates, name))


def refuse_summed(chain: Chain, factors: Sequence[Factor]) -> None:
    times = {chain.time, chain.bulk}
    for f in factors:
        if f.latents and not f.own and times & set(f.site.plates) and not times & f.plates:
            raise PlanError(
                f.name,
                problem="reads no latent of its own step, so what it tells is not held step by step",
                mend="marginals give the smoothed probabilities",
            )


def seen_until(program: Program, chain: Chain, step: int, factor: Factor, table: Table) -> Table:
    """A factor's table where what the chain's steps observe after one of its first ones is not seen."""
    if factor.own:
        return table
    value = table.value
    if chain.time in table.plates:
        value = choose(Named(jnp.arange(chain.length) <= step, (chain.time,)), value, 0.0)
    elif chain.bulk in table.plates or step_of(program, chain, factor) > step:
        value = Named(jnp.zeros_like(value.array), value.axes)
    return dataclasses.replace(table, value=value)


def step_of(program: Program, chain: Chain, factor: Factor) -> int:
    """Which of a chain's first steps a site stands in; -1 for those of none."""
    found = re.fullmatch(r".*\[(\d+)\]", factor.name)
    own = any(program.base_of(z.name) in chain.lags for z in factor.latents)
    return int(found[1]) if found and own else -1


def at_first(program: Program, piece: str, tables: Sequence[Table], layout: Layout) -> Named:
    """Posterior probabilities of a latent of one of the first steps."""
    latent, plates = program.pieces[piece], layout.plates_of[piece]
    axes = (*(a for a in latent.axes if a in plates), piece)
    sizes = [program.plates[a].size for a in axes[:-1]] + [latent.num_states]

    def log_z(value: Array) -> Array:
        return eliminate([*tables, Table(Named(value, axes), frozenset({piece}), plates)], layout)

    slope = jax.grad(log_z)(jnp.zeros(sizes))
    return Named(slope / slope.sum(-1, keepdims=True), axes)


def onwards(chain: Chain, name: str, tables: Sequence[Table], layout: Layout) -> Named:
    """The same along `TIME` from the last of the first steps on."""
    steps: list[Step | ChainStep] = []
    eliminate(tables, layout, steps=steps)
    step = next(s for s in steps if isinstance(s, ChainStep) and s.chain.time == chain.time)
    path = filtered_path(step, name, layout.logs)
    if not step.latents:
        return path
    return multiply(path, above(step, tables, layout)).sum(step.latents)


def above(step: ChainStep, tables: Sequence[Table], layout: Layout) -> Named:
    """Probabilities of the latents above a chain given what it saw up to each step, and all that they tell besides."""
    sums = sums_until(step)

    def log_z(value: Array) -> Array:
        given = {step.chain.time: Named(value, sums.axes[1:])}
        return eliminate(tables, dataclasses.replace(layout, given=given))

    slope = jax.vmap(jax.grad(log_z))(sums.array)
    states = tuple(i for i, a in enumerate(sums.axes) if a in step.latents)
    return Named(slope / slope.sum(states, keepdims=True), sums.axes)

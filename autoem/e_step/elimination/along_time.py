"""A chain among the other tables: taken apart into its first steps and the rest, and summed out along time.

In: the tables that repeat along a chain's steps, all other latents of a step already removed. Out, while the chain is
open: tables of its first steps, and one that holds the rest. Out, when it is closed: one table over the latents that
the chain shares with the rest of the model. What stands beside the chain's last steps is absorbed by its last message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import PlanError
from autoem.e_step.elimination import chains
from autoem.e_step.elimination.chain_tables import TIME, ChainTables, Frame
from autoem.e_step.elimination.layout import Held, Layout, Table
from autoem.e_step.elimination.reductions import Reduction, log_sum_exp, removing
from autoem.graph.named import Named, add, pick, union
from autoem.ir import Chain, Program, at_lag, at_step


@dataclasses.dataclass(frozen=True)
class ChainStep:
    """One chain summed out; `tables` and `latents` are what reading it backwards needs."""

    chain: Chain
    tables: ChainTables
    latents: frozenset[str]

    @property
    def latent(self) -> str:
        return ", ".join(self.chain.variables)

    @property
    def entries(self) -> int:
        """Numbers in the messages of all steps."""
        parts = (self.tables.head, self.tables.single, *self.tables.pairs)
        sizes = {a: t.size(a) for t in parts for a in t.axes}
        message = int(np.prod([sizes.get(a, 1) for a in self.tables.frame.after], dtype=int))
        return message * self.tables.steps


def renamed_ends(table: Table, layout: Layout) -> Table:
    """A table that reads the last steps of a chain with no later ones reads its first steps."""
    for chain in layout.chains:
        if chain.length <= chain.lag and table.latents & set(chain.end):
            names = {n: at_step(n_, chain.length - i) for n_ in chain.variables for i in range(1, chain.lags[n_] + 1)
                     for n in [at_step(n_, -i)]}  # fmt: skip
            table = renamed(table, names)
    return table


def renamed(table: Table, names: Mapping[str, str]) -> Table:
    axes = tuple(names.get(a, a) for a in table.value.axes)
    latents = frozenset(names.get(z, z) for z in table.latents)
    return dataclasses.replace(table, value=Named(table.value.array, axes), latents=latents)


def opened(chain: Chain, tables: Sequence[Table], layout: Layout) -> list[Table]:
    """The tables of the first steps, each in the chain's plates, and one that holds those of all later steps."""
    out, later = [], []
    times = {chain.time, chain.bulk}
    for table in tables:
        if chain.time in table.plates:
            out += at_first_steps(table, chain, chain.variables)
            names = {n: at_lag(n, 0) for n in chain.variables}
            table = renamed(dataclasses.replace(table, value=since(table.value, chain.time, chain.lag)), names)
        later.append(renamed(table, {chain.time: TIME, chain.bulk: TIME}))
    if chain.length > chain.lag:
        plates = layout.plates_of[chain.start[0]]
        if odd := [t for t in tables if t.plates - times != plates]:
            raise PlanError(
                min(odd[0].latents),
                problem="what a step carries on lives in several plates",
                mend="declare the latents that the next step reads in the same plates",
            )
        latents = frozenset().union(*(t.latents for t in later)) - chain.names
        held = Held(chain, tuple(t.value for t in later))
        latents = latents | set(chain.start) | set(chain.end)
        out.append(Table(Named(jnp.zeros(()), ()), latents, plates, held=held))
    return out


def at_first_steps(table: Table, chain: Chain, names: Sequence[str]) -> list[Table]:
    """A table over the paths `names` at each of the chain's first steps, where they are latents of their own."""
    plates = table.plates - {chain.time}
    steps = range(min(chain.lag, chain.length))
    firsts = [Table(at(table.value, chain.time, step), table.latents, plates) for step in steps]
    return [renamed(t, {n: at_step(n, step) for n in names}) for step, t in zip(steps, firsts, strict=True)]


def at(value: Named, axis: str, index: int) -> Named:
    """One step of a table; the table itself where it is the same at all."""
    if axis not in value.axes:
        return value
    i = value.axes.index(axis)
    return Named(jnp.take(value.array, index, i), (*value.axes[:i], *value.axes[i + 1 :]))


def since(value: Named, axis: str, start: int, stop: int | None = None) -> Named:
    """A table from step `start` on, to the end or before step `stop`."""
    if axis not in value.axes:
        return value
    i = value.axes.index(axis)
    return Named(value.array[(slice(None),) * i + (slice(start, stop),)], value.axes)


def close(
    tables: Sequence[Table], waiting: Table, reduce: Callable[[Array], Array], steps: list | None, layout: Layout
) -> tuple[list[Table], frozenset[str]]:
    """Sum a chain out: the tables that remain, and the latents that are gone."""
    assert waiting.held is not None
    chain = waiting.held.chain
    start, end = frozenset(chain.start), frozenset(chain.end)
    others = [t for t in tables if t is not waiting]
    holding = [t for t in others if t.latents & (start | end)]
    rest = [t for t in others if not t.latents & (start | end)]
    if both := [t for t in holding if t.latents & start and t.latents & end]:
        raise PlanError(
            min(both[0].latents),
            problem="a site reads both the first and the last steps of a chain",
            mend="carry the first step's latent along in the carry, as part of the state",
        )
    firsts = [t.value for t in holding if t.latents & start]
    if isinstance(reduce, Reduction) and reduce.apart:
        plates = tuple(sorted(p for p in waiting.plates if layout.sizes[p] > 1))
        firsts.append(Named(jnp.zeros([layout.sizes[p] for p in plates]), plates))
    parts = chain_tables(
        chain,
        waiting.held.tables,
        firsts,
        [t.value for t in holding if t.latents & end],
    )
    latents = frozenset().union(waiting.latents, *(t.latents for t in holding)) - start - end
    if steps is not None:
        steps.append(ChainStep(chain, parts, latents))
    if chain.time in layout.given:
        value = layout.given[chain.time]
    elif reduce is log_sum_exp and not layout.logs:
        value = chains.proven(parts) if layout.proof else chains.total(parts)
    else:
        value = chains.log_sum(parts, removing(reduce, start | end, latents))
    return [*rest, Table(value, latents, waiting.plates)], start | end


def chain_tables(chain: Chain, later: Sequence[Named], first: Sequence[Named], last: Sequence[Named]) -> ChainTables:
    """The tables of a chain in the form that the messages take."""
    previous, current = chain.previous, chain.current
    gone = set(previous) - set(current)
    head = relabelled(add(*first), dict(zip(chain.start, previous, strict=True)))
    pairs = tuple(arranged_in_time(t) for t in later if set(t.axes) & gone)
    single = [t for t in later if not set(t.axes) & gone] or [Named(jnp.zeros(()), ())]
    steps = chain.length - chain.lag
    if last:
        ends = relabelled(add(*last), dict(zip(chain.end, current, strict=True)))
        single.append(at_the_end(ends, steps))
    states = {*previous, *current, TIME}
    kept = tuple(a for a in union(*(t.axes for t in (head, *single, *pairs))) if a not in states)
    return ChainTables(Frame(kept, previous, current), head, add(*single), pairs, steps)


def relabelled(value: Named, names: Mapping[str, str]) -> Named:
    return Named(value.array, tuple(names.get(a, a) for a in value.axes))


def arranged_in_time(value: Named) -> Named:
    """The time axis first, where there is one."""
    if TIME not in value.axes:
        return value
    axes = (TIME, *(a for a in value.axes if a != TIME))
    return Named(value.to(axes), axes)


def at_the_end(value: Named, steps: int) -> Named:
    """A table that stands at the last step only."""
    none = jnp.zeros((steps - 1, *value.array.shape), value.array.dtype)
    return Named(jnp.concatenate([none, value.array[None]]), (TIME, *value.axes))


def path_of(chain: Chain, name: str, pieces: Mapping[str, Named]) -> Named | None:
    """A latent's path along all steps from its values at the first ones and at the later ones; None where some lack."""
    parts = [pieces.get(at_step(name, h)) for h in range(min(chain.lag, chain.length))]
    if chain.length > chain.lag:
        parts.append(pieces.get(at_lag(name, 0)))
    if any(p is None for p in parts):
        return None
    axes = union(*(tuple(a for a in p.axes if a != chain.bulk) for p in parts if p is not None))
    rows = []
    for h, p in enumerate(parts):
        assert p is not None
        steps = chain.length - chain.lag if h == chain.lag else 1
        array = p.to((chain.bulk, *axes))
        rows.append((array, steps))
    sizes = jnp.broadcast_shapes(*(a.shape[1:] for a, _ in rows))
    return Named(jnp.concatenate([jnp.broadcast_to(a, (n, *sizes)) for a, n in rows]), (chain.time, *axes))


def add_paths(chosen: dict[str, Named], program_chains: Sequence[Chain]) -> None:
    """Put a latent's path, and its values at the last steps and steps back, beside its pieces once all are chosen."""
    for chain in program_chains:
        for name in chain.lags:
            if name not in chosen and (path := path_of(chain, name, chosen)) is not None:
                chosen[name] = path
            if name in chosen:
                ends = range(1, min(chain.ending, chain.length) + 1)
                chosen |= {at_step(name, -i): at(chosen[name], chain.time, chain.length - i) for i in ends}
                for back in range(1, chain.lag + 1) if chain.length > chain.lag else ():
                    path = since(chosen[name], chain.time, chain.lag - back, chain.length - back)
                    chosen[at_lag(name, back)] = relabelled(path, {chain.time: chain.bulk})


def pieces_of_paths(program: Program, paths: Mapping[str, Array]) -> dict[str, Array]:
    """The values along each chain's paths as its sites read them: at the first steps, the last, and steps back."""
    out = {}
    for chain in program.chains:
        for name in (n for n in chain.lags if n in paths):
            path, first = paths[name], chain.lag
            out |= {at_step(name, h): path[h] for h in range(-chain.ending, chain.lag) if -len(path) <= h < len(path)}
            lags = range(chain.lag + 1) if len(path) > first else ()
            out |= {at_lag(name, i): path[first - i : len(path) - i] for i in lags}
    return out


def in_pieces(table: Table, program: Program) -> list[Table]:
    """A table over a path whose own site is in pieces, as tables over the pieces."""
    for chain in program.chains:
        names = [n for n in table.latents if n in chain.lags and n not in program.sites]
        if chain.lag and names and chain.time in table.plates:
            out = at_first_steps(table, chain, names)
            if chain.length > chain.lag:
                plates = table.plates - {chain.time} | {chain.bulk}
                later = dataclasses.replace(table, value=since(table.value, chain.time, chain.lag), plates=plates)
                out.append(renamed(later, {chain.time: chain.bulk, **{n: at_lag(n, 0) for n in names}}))
            return out
    return [table]


def read_chain(
    step: ChainStep,
    chosen: Mapping[str, Named],
    reduce: Callable[[Array], Array],
    choose: Callable[[Any, Array], Array],
) -> dict[str, Named]:
    """The path of a chain, given the latents beside it: its pieces, by name."""
    chain, parts = step.chain, step.tables

    def given(table: Named) -> Named:
        for name in sorted(step.latents):
            table = pick(table, name, chosen[name])
        return arranged_in_time(table)

    kept = union(*(given(t).axes for t in (parts.head, parts.single, *parts.pairs)))
    frame = parts.frame
    states = {*frame.previous, *frame.current, TIME}
    frame = dataclasses.replace(frame, kept=tuple(a for a in kept if a not in states))
    parts = ChainTables(frame, given(parts.head), given(parts.single), tuple(map(given, parts.pairs)), parts.steps)
    path, heads = chains.read_back(parts, reduce, choose)
    out = {n: heads[p] for n, p in zip(chain.start, chain.previous, strict=True)}
    for name in chain.variables:
        out[at_lag(name, 0)] = relabelled(path[at_lag(name, 0)], {TIME: chain.bulk})
    return out


def filtered_path(step: ChainStep, name: str, logs: bool) -> Named:
    """Probabilities of a chain's latent given what was seen up to each step, and given the latents above the chain.

    Along `TIME`, whose first entry is the last of the chain's first steps.
    """
    tables, now = step.tables, at_lag(name, 0)
    later = chains.filtered(tables, logs)
    head = Named(jnp.exp(tables.head.array - log_sum_exp_over(tables.head, tables.frame.previous)), tables.head.axes)
    first = relabelled(head, dict(zip(tables.frame.previous, tables.frame.current, strict=True)))
    others = [a for a in tables.frame.current if a != now]
    first, later = first.sum(others), later.sum(others)
    axes = tuple(a for a in later.axes if a != TIME)
    start = jnp.broadcast_to(first.to(axes), later.array.shape[1:])
    return Named(jnp.concatenate([start[None], later.to((TIME, *axes))]), (TIME, *axes))


def sums_until(step: ChainStep) -> Named:
    """Log of the sum over all paths up to each step, along `TIME` as in `filtered_path`."""
    frame = step.tables.frame
    head, messages, taken = chains.log_messages(step.tables, log_sum_exp)
    states = tuple(range(len(frame.current)))
    sums = jax.nn.logsumexp(messages, axis=tuple(a + 1 for a in states)) + jnp.cumsum(taken, 0)
    return Named(jnp.concatenate([jax.nn.logsumexp(head, axis=states)[None], sums]), (TIME, *frame.kept))


def log_sum_exp_over(table: Named, names: Sequence[str]) -> Array:
    """`log sum exp` over the axes `names`, kept with size one; a finite number where nothing is possible."""
    axes = tuple(i for i, a in enumerate(table.axes) if a in names)
    out = jax.nn.logsumexp(table.array, axis=axes, keepdims=True)
    return jnp.where(jnp.isfinite(out), out, 0.0)

"""Derive EM for a model: exactly where that is known, by mean field where it is asked for or nothing exact exists.

In: a model, its arguments and the options. Out: `Build`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import ModelError, PlanError
from autoem.e_step.elimination.eliminate import eliminate
from autoem.e_step.elimination.places import build_layout
from autoem.e_step.groups import partly_seen
from autoem.e_step.strategies import MeanField
from autoem.graph.programs import jit_once
from autoem.ir import Program
from autoem.lowering.bundle import make_bundle
from autoem.lowering.kernel import Kernel, with_nodes
from autoem.m_step.choose import choose
from autoem.m_step.mixed_signs import mixed_signs, superpositions
from autoem.m_step.problem import Bundle, Params, Problem, make_layout
from autoem.mean_field.build import FieldWish, field_factors, field_of, settled_laws
from autoem.mean_field.field import Field
from autoem.planning.build import (
    Build,
    accelerated,
    asked,
    build,
    read,
    start_data,
    start_values,
    support_limits,
)
from autoem.planning.jumps import refuse_jumps
from autoem.planning.options import Options
from autoem.planning.plan import MEMORY_LIMIT, Cost, LatentRow, Plan, human, notes_of, parameter_rows, unread
from autoem.reading.support import binary_data

BOUND = (
    "the objective is the ELBO, a lower bound of the log-likelihood; what latents of different groups share is left out"
)


def derive(model: Callable, args: tuple, kwargs: dict, options: Options, key: Array) -> Build:
    """Derive EM for `model` called with `args` and `kwargs`; the plan knows how to be derived with other options.

    Raises:
        ModelError, PlanError, DataError: see each stage.
    """

    def again(**changes: Any) -> Plan:
        return derive(model, args, kwargs, dataclasses.replace(options, **changes), key).plan

    built = chosen(model, args, kwargs, options, key)
    built.plan = dataclasses.replace(built.plan, asked=options.given, derive=again)
    return built


def chosen(model: Callable, args: tuple, kwargs: dict, options: Options, key: Array) -> Build:
    """The derivation itself: what was asked for, else the exact one, else a mean field, else what is left."""
    if (wish := field_wish(options)) is not None:
        return build_field(model, args, kwargs, options, key, wish)
    try:
        built, why = build(model, args, kwargs, options, key), ""
    except (ModelError, PlanError) as refusal:
        if options.m_step is not None and stands(model, args, kwargs, dataclasses.replace(options, m_step=None), key):
            raise  # what is refused is the M-step that was asked for, which another E-step does not mend
        built, why = refusal, refusal.problem
    if isinstance(built, Build):
        if built.kernel.treatment is None or options.e_step is not None:
            return built
        said = next((r.reason for r in built.plan.latents if r.strategy != "exact"), "")
        why = (said.partition(", since ")[2] or said).partition("; the objective")[0]
    for apart in ((), None) if options.e_step is None else ():
        reason = "chosen since no exact E-step is known" + (f": {why}" if why else "")
        try:
            return build_field(model, args, kwargs, options, key, FieldWish(MeanField(), apart, reason))
        except (ModelError, PlanError):
            continue
    if isinstance(built, Build):
        return built
    raise built


def stands(model: Callable, args: tuple, kwargs: dict, options: Options, key: Array) -> bool:
    """Whether a derivation with these options is not refused."""
    try:
        build(model, args, kwargs, options, key)
    except (ModelError, PlanError):
        return False
    return True


def field_wish(options: Options) -> FieldWish | None:
    """The mean field that the user asked for, if any."""
    if isinstance(options.e_step, MeanField):
        return FieldWish(options.e_step, None, "asked for")
    if isinstance(options.e_step, Mapping):
        named = {n: s for n, s in options.e_step.items() if isinstance(s, MeanField)}
        if named:
            strategies = set(named.values())
            if len(strategies) > 1:
                name = next(iter(named))
                mend = "give all of them one MeanField(sweeps=..., tol=...)"
                raise PlanError(name, problem="mean fields of one model are swept together, not differently", mend=mend)
            return FieldWish(strategies.pop(), tuple(named), "asked for")
    return None


def build_field(model: Callable, args: tuple, kwargs: dict, options: Options, key: Array, wish: FieldWish) -> Build:
    """The derivation by mean field.

    Raises:
        ModelError, PlanError, DataError: see each stage.
    """
    options = dataclasses.replace(options, latent=(*options.latent, *(wish.apart or ())))
    program, found, source = read(model, args, kwargs, options)
    data = {} if source.concrete else {i: jnp.asarray(x) for i, x in enumerate(source.data)}
    values: dict[Any, Any] = {**{("data", i): x for i, x in data.items()}, ("key", 0): key}
    factors, cells = field_factors(program, values)
    for f in factors:
        if partly_seen(program, f, values) is not None:
            problem = "its vectors are partly NaN, which a mean field does not integrate"
            raise PlanError(f.name, problem=problem, mend="drop those rows, or set them to NaN as a whole")
    field = field_of(program, factors, wish, cells)
    cells = {n: jnp.asarray(c) for n, c in cells.items()}
    problem = Problem({f.name: f for f in factors}, program.params, binary_data(program, source))

    whole = functools.partial(make_bundle, program, factors)
    model_start = jit_once(lambda data, key: start_values(found, data, key))
    params = model_start(start_data(found, source), key)
    layout = build_layout(program, values, cells)
    layout = dataclasses.replace(layout, scales=dict.fromkeys(layout.scales), cells={}, chains=())
    kernel = Kernel(program, problem, layout, (), None, treatment=field)
    shapes = jax.eval_shape(whole, data, key, cells)
    shapes = dataclasses.replace(shapes, data=jax.eval_shape(lambda d: d, data))
    cost = measured(kernel, field, params, shapes)
    if field.blocks:
        refuse_jumps(program, {b.name for b in field.blocks}, params, values)
        field = settled_laws(field, kernel, params, jit_once(whole)(data, key, cells))
        kernel = dataclasses.replace(kernel, treatment=field)

    def completed(bundle: Bundle) -> Bundle:
        return with_nodes(bundle, field.nodes(field.begin(kernel, bundle, key)))

    filled = jax.eval_shape(completed, shapes)
    wishes = asked(program, options)
    blocks = choose(problem, params, filled, wishes)
    sums = superpositions(blocks)
    if mixed := mixed_signs(sums, program.params, params, values):
        blocks = choose(problem, params, filled, wishes, mixed)
    kernel = dataclasses.replace(kernel, blocks=blocks)
    accelerator = accelerated(options.accelerate, program, blocks, field)
    plan = field_plan(kernel, field, notes_of(program, options.truncated()), cost)
    plan = dataclasses.replace(plan, accelerate=accelerator and accelerator.method)
    return Build(
        plan, kernel, found, source, factors, support_limits(found, source), model_start, accelerator=accelerator,
        sums=sums, mixed=frozenset(mixed),
    )  # fmt: skip


def measured(kernel: Kernel, field: Field, params: Params, shapes: Bundle) -> Cost:
    """Size of the tables that the groups' own sums make, on shapes alone.

    Raises:
        PlanError: one would not fit in memory.
    """
    steps: list[Any] = []
    read: dict[str, int] = {}

    def run(params: Params, bundle: Bundle) -> Array:
        steps.clear()
        laws, layout = field.begin(kernel, bundle, jax.random.key(0)), make_layout(kernel.layout, bundle)
        total = jnp.zeros(())
        for group in field.groups:
            whole = field._tables(kernel, params, bundle, laws, group)
            read.update({n: t.array.size for n, t in whole.items()})
            tables = field._expected(group, whole, laws, layout)
            total = total + eliminate(tables, field._within(group, layout), steps=steps)
        return total

    itemsize = jax.eval_shape(run, dict(params), shapes).dtype.itemsize
    sizes = [s.entries for s in steps] or [0]
    widest = max(read, key=lambda n: read[n], default="")
    if read and (needed := read[widest] * itemsize) > MEMORY_LIMIT:
        site = field.by_name[widest]
        states = " x ".join(str(z.num_states) for z in site.latents)
        raise PlanError(
            widest,
            problem=f"mean field takes expectations over a table of every joint state of what it reads, {states}, "
            f"which needs {human(needed)}",
            mend="let the site read fewer latents or states: several sites that each read a few of them, or latents "
            "with fewer states",
        )
    order = (
        *(g.name for g in field.groups[:-1]),
        *(b.name for b in field.blocks),
        *(g.name for g in field.groups[-1:]),
    )
    cost = Cost(sum(sizes), max(sizes), max(sizes) * itemsize, order)
    if cost.bytes > MEMORY_LIMIT:
        problem = f"the sum over one group of the mean field needs a table of {human(cost.bytes)}"
        raise PlanError(order[0], problem=problem, mend="e_step=autoem.e_step.MeanField(), each latent on its own")
    return cost


def field_plan(kernel: Kernel, field: Field, notes: tuple[str, ...], cost: Cost) -> Plan:
    """What the mean field does, in words."""
    program, problem = kernel.program, kernel.problem
    idle = tuple(
        f"nothing observed depends on '{n}': is a use of it forgotten?" for n in problem.params if unread(n, problem)
    )
    said = (f"mean field ({field.why}): {BOUND}",)
    rows = (*discrete_rows(program, field), *continuous_rows(field))
    return Plan(
        program, problem, kernel.layout, kernel.blocks, None, rows,
        tuple(parameter_rows(program, problem, kernel.blocks)), cost, (*program.notes, *said, *notes, *idle),
        treatment=field,
    )  # fmt: skip


def discrete_rows(program: Program, field: Field):
    for name, latent in program.latents.items():
        group = next((g for g in field.groups if name in g.latents), None)
        plates = tuple(a for a in latent.axes if not a.startswith("#"))
        count = int(np.prod(latent.shape, dtype=int))
        reason = f"{latent.num_states} states" + (f" x {count:,} cells" if count > 1 else "")
        if group is not None:
            bases = dict.fromkeys(program.base_of(n) for n in group.latents)
            with_it = ", ".join(b for b in bases if b != name)
            chain = next((c for c in group.chains if name in c.lags), None)
            if group.cellwise:
                reason += (
                    ", a law for each cell, since rows read several of them; damped where all at once went too far"
                )
            elif chain is not None:
                reason += f", the law of its path of {chain.length:,} steps kept whole by forward and backward messages"
            else:
                reason += ", its law exact given those of the others"
            reason += f"; jointly with {with_it}" if with_it else ""
        yield LatentRow(name, "mean field", latent.num_states, plates, count, reason)


def continuous_rows(field: Field):
    for block in field.blocks:
        member, law = block.member, type(block.law).__name__.removesuffix("Law")
        law = "InverseGamma" if getattr(block.law, "inverse", False) else law
        readers = ", ".join(n for n in block.factors if n != block.name)
        count = int(np.prod(member.shape, dtype=int))
        reason = f"given the others' laws, its own with {readers or 'its prior'} is {law}"
        yield LatentRow(member.name, "mean field", 0, member.plates, count, reason + f"; {count:,} cells" * (count > 1))

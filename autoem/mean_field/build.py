"""Find a mean field for a program: its groups, its blocks, and how every factor reads them.

In: a classified program, the data, and which latents are to be apart. Out: factors, index arrays, `Field`; or a refusal
by name where a conditional is in no table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import ModelError, PlanError
from autoem.e_step.elimination.layout import Layout, Route
from autoem.e_step.elimination.places import plates_of
from autoem.e_step.strategies import MeanField
from autoem.e_step.tables.completions import Completions
from autoem.e_step.tables.factors import build_factor, natural_family, read_latents, refuse_random_weights, row_cells
from autoem.e_step.tables.tabulate import Factor
from autoem.e_step.treatment import AbstractTreatment
from autoem.graph.cells import SEVERAL, merge_axes
from autoem.graph.programs import jit_once
from autoem.ir import Continuous, Latent, Program, Site
from autoem.lowering.bundle import route_cells
from autoem.lowering.kernel import Kernel
from autoem.lowering.methods import moved_start
from autoem.m_step.choose import kind_of
from autoem.m_step.problem import Bundle, Params, make_layout
from autoem.mean_field.field import Field
from autoem.mean_field.groups import Block, Group, Piece
from autoem.mean_field.laws import LAWS, AbstractLaw
from autoem.mean_field.rows import padded
from autoem.mean_field.tables import Laws
from autoem.passes.gaussian import continuous_of
from autoem.passes.reads import alias, reads_of


@dataclasses.dataclass(frozen=True)
class FieldWish:
    """A mean field that is to be: over which latents each apart (None: all), and why."""

    strategy: MeanField
    apart: tuple[str, ...] | None
    why: str


def field_factors(program: Program, values: Mapping[Any, Any]) -> tuple[tuple[Factor, ...], dict[str, np.ndarray]]:
    """The factors as a mean field reads them, and for every read of a latent of other plates the cells that rows find.

    Raises:
        ModelError, PlanError: a site reads latents in a way that no mean field here holds.
    """
    factors, cells = [], {}
    for site in program.sites.values():
        refuse_random_weights(program, site)
        factor, found = field_factor(program, site, values)
        factors.append(factor)
        cells.update(found)
    return tuple(factors), cells


def cells_by(treatment: AbstractTreatment | None) -> Callable[..., dict[str, Array]]:
    """What finds the cells of rows in new data: for every read under a mean field, for every route otherwise."""
    return field_cells if isinstance(treatment, Field) else route_cells


def field_cells(program: Program, factors: tuple[Factor, ...], values: Mapping) -> dict[str, Array]:
    """The index arrays of such factors in other data."""
    del factors
    return {n: jnp.asarray(c) for n, c in field_factors(program, values)[1].items()}


def field_factor(program: Program, site: Site, values: Mapping[Any, Any]) -> tuple[Factor, dict[str, np.ndarray]]:
    """One factor, its reads of each latent apart."""
    latents = read_latents(program, site)
    members = tuple(m for n, m in program.every_continuous.items() if n in continuous_of(program, site))
    refuse_continuous(program, site, members)
    factor = build_factor(program, site, latents, None)
    if members:
        family = natural_family(program, site, filled=True)[0]
        usable = program.half is not None and not program.chains and all(program.compact[z.name] for z in latents)
        factor = dataclasses.replace(
            factor, family=family, graph=program.half if usable else program.full, compact=usable, coefficients=(),
            completions=Completions(members, affine=False, fixed=True), moving=(),
        )  # fmt: skip
    cells: dict[str, np.ndarray] = {}
    for z in latents:
        if plates_of(z) <= set(site.plates):
            continue
        factor, found = with_reads(program, factor, z, values)
        cells.update(found)
    if factor.own and len(members) == 1 and len(latents) == 1:
        factor, found = with_pick(program, factor, members[0], values)
        cells.update(found)
    plates = set().union(*(p_axes(factor, z) for z in factor.latents)) if factor.latents else set()
    plates |= set(site.plates) if members else set()
    kept = tuple(a for a in site.axes if a in plates)
    return dataclasses.replace(
        factor, kept=kept, plates=frozenset(plates), times=tuple(a for a in factor.times if a in kept)
    ), cells


def with_pick(
    program: Program, factor: Factor, m: Continuous, values: Mapping[Any, Any]
) -> tuple[Factor, dict[str, np.ndarray]]:
    """A discrete latent's own factor with the way to its probabilities, where they are a cell of a simplex by index."""
    site, family = factor.site, factor.family
    plain = family is not None and family.looks_up and family.args == ("probs",) and not factor.params
    axes = [a for a, s in zip(site.axes, site.shape, strict=True) if s > 1]
    if not plain or site.masked or kind_of(m.support) != "simplex" or not axes or any(a[0] == "#" for a in site.axes):
        return factor, {}
    if set(m.plates) <= set(site.plates) or program.latents[site.name].bounded:
        return factor, {}
    try:
        rows = row_cells(program, site, m, values, "arg:probs", 1)
    except ModelError:
        return factor, {}
    key = f"{site.name}·{m.name}"
    route = Route(frozenset(), tuple(axes), tuple(m.axes), m.shape, key)
    atom = program.full.outputs[site.name, "arg:probs"]
    probe = jnp.arange(float(np.prod(m.shape + m.event))).reshape(m.shape + m.event)
    seen = program.full.evaluate_atoms([atom], {**values, ("latent", m.name): probe})[0]
    expected = probe.reshape(-1, *m.event)[rows.reshape([s for s in site.shape if s > 1])]
    if not np.array_equal(np.broadcast_to(seen, (*site.shape, *m.event)).reshape(expected.shape), expected):
        return factor, {}
    cells = {key: rows.reshape([s for s in site.shape if s > 1])}
    cells |= {key + n: x for n, x in padded(cells[key], int(np.prod(m.shape, dtype=int))).items()}
    return dataclasses.replace(factor, routes={**factor.routes, m.name: route}), cells


def refuse_continuous(program: Program, site: Site, members: Sequence[Continuous]) -> None:
    """Raise where a continuous latent is carried by a scan, scaled or masked, or stands in what is observed."""
    for m in members:
        if program.chain_of(program.base_of(m.name)) is not None:
            raise PlanError(m.name, problem="a scan carries it, and mean field has no law for its path", mend="leave "
                            "e_step out for the exact filter, or give it a grid of values (Categorical)")  # fmt: skip
        own = program.sites[m.name]
        if own.scaled or own.masked or any(a.startswith("#") for a in own.axes):
            raise PlanError(
                m.name,
                problem="it is masked, scaled, or in an event of independent cells, which its mean field law is not",
                mend="scale or mask the observed sites alone, and put its cells in a plate",
            )
    if site.role == "observed" and any(k[0] == "latent" for k in program.full.needs((site.name, "value"))):
        raise PlanError(site.name, problem="latents stand in its observed value", mend="leave e_step out")


def p_axes(factor: Factor, z: Latent) -> set[str]:
    """Plates along which the rows of a factor read other cells of a latent."""
    route = factor.route_to(z.name)
    return set(route.source) if route else set(plates_of(z))


def with_reads(
    program: Program, factor: Factor, z: Latent, values: Mapping[Any, Any]
) -> tuple[Factor, dict[str, np.ndarray]]:
    """A factor with the route to a latent of other plates, or, where its rows read several cells, one for each read."""
    site = factor.site
    try:
        rows = [row_cells(program, site, z, values)]
        graph = factor.graph
    except ModelError:
        states = {k: np.zeros(v.shape, v.aval.dtype) for k, v in program.full.inputs.items() if k[0] == "latent"}
        found = reads_of(program.full, site.name, z.name, z.shape, {**states, **values})
        if found is None or any((r == SEVERAL).any() for r in found[1]) or z.name in program.pieces:
            raise
        graph, rows = found[0], [spread_rows(r, site) for r in found[1]]
        factor = dataclasses.replace(factor, compact=False, coefficients=())
        refuse_same_cell(site, z, rows)
    varying = [i for i, a in enumerate(site.axes) if not a.startswith("#")]
    source = tuple(site.axes[i] for i in varying)
    shape = tuple(s for a, s in zip(z.axes, z.shape, strict=True) if not a.startswith("#"))
    target = tuple(a for a in z.axes if not a.startswith("#"))
    names = [z.name, *(alias(z.name, i) for i in range(2, len(rows) + 1))]
    keys = [f"{site.name}·{n}" for n in names]
    routes = {n: Route(frozenset({z.name}), source, target, shape, k) for n, k in zip(names, keys, strict=True)}
    cells = {k: r.reshape([r.shape[i] for i in varying]) for k, r in zip(keys, rows, strict=True)}
    others = tuple(dataclasses.replace(z, name=n) for n in names[1:])
    at = factor.latents.index(z) + 1
    return dataclasses.replace(
        factor, graph=graph, latents=(*factor.latents[:at], *others, *factor.latents[at:]),
        routes={**factor.routes, **routes}, aliases={**factor.aliases, **dict.fromkeys(names[1:], z.name)},
    ), cells  # fmt: skip


def spread_rows(ids: np.ndarray, site: Site) -> np.ndarray:
    """Cells of a read at the site's full shape."""
    ids = np.broadcast_to(ids.reshape((1,) * (len(site.axes) - ids.ndim) + ids.shape), site.shape)
    for i, axis in enumerate(site.axes):
        if axis.startswith("#"):
            ids = merge_axes(ids, (i,), keepdims=True)
    return np.where(ids < 0, 0, ids)


def refuse_same_cell(site: Site, z: Latent, rows: Sequence[np.ndarray]) -> None:
    """Raise where one row reads the same cell twice: its two states are one, not two with a law each."""
    for i, a in enumerate(rows):
        for b in rows[:i]:
            if (a == b).any():
                row = int(np.argmax((a == b).ravel()))
                raise PlanError(
                    site.name,
                    problem=f"its row {row} reads one cell of '{z.name}' twice, as if it were two",
                    mend="leave the pairs of a cell with itself out of the data",
                )


def field_of(program: Program, factors: Sequence[Factor], wish: FieldWish, cells: Mapping[str, np.ndarray]) -> Field:
    """The groups and blocks of a program whose factors are known.

    Raises:
        PlanError: a continuous latent has no law in the table.
    """
    likely = [f for f in factors if not f.is_prior]
    paired = {f.latent_of(a) for f in likely for a in f.aliases}
    bases: dict[str, list[str]] = {}
    for name in program.every_latent:
        bases.setdefault(program.base_of(name), []).append(name)
    apart = tuple(bases) if wish.apart is None else tuple(n for n in bases if n in wish.apart)
    apart = tuple(dict.fromkeys((*apart, *(b for b in bases if b in paired))))
    together = [b for b in bases if b not in apart]
    sets = [[b] for b in apart] + ([together] if together else [])
    groups = [g for s in sets if (g := group_of(program, likely, s, bases, bool(set(s) & paired))).pieces]
    for g in groups:
        refuse_two_ways(g, {f.name: f for f in likely}, cells)
    weights = {g.name: (not g.cellwise, sum(int(np.prod(p.shape, dtype=int)) for p in g.pieces)) for g in groups}
    groups.sort(key=lambda g: weights[g.name])
    blocks = []
    for m in program.continuous.values():
        readers = [f for f in likely if f.completions and m in f.completions.members]
        shared = int(np.prod(m.shape, dtype=int)) == 1 or chosen_by_latents(program, m)
        blocks.append(Block(m, law_of(m), tuple(f.name for f in readers), shared))
    return Field(tuple(groups), tuple(blocks), {f.name: f for f in factors}, wish.strategy, wish.why)


def chosen_by_latents(program: Program, m: Continuous) -> bool:
    """Whether some rows find their cell of a continuous latent by the value of a discrete one."""
    graph, source = program.full, program.full.inputs["latent", m.name]
    for equation in graph.equations:
        picks = len(equation.inputs) > 1 and equation.inputs[0] is source
        if picks and any(k[0] == "latent" for k in graph.needs_of(equation.inputs[1:])):
            return True
    return False


def refuse_two_ways(group: Group, factors: Mapping[str, Factor], cells: Mapping[str, np.ndarray]) -> None:
    """Raise where one law would tie cells that rows find by different indices.

    Raises:
        PlanError: a factor reads two latents of the group so; or two factors do, beside latents of the same rows.
    """
    found: dict[tuple[str, ...], np.ndarray] = {}
    for p in group.pieces:
        routes = [r for n in p.latents if (r := factors[p.factor].route_to(n)) is not None]
        if not routes:
            continue
        ways = [np.asarray(cells[r.site]) for r in routes]
        alone = len(routes) == len(p.latents)
        first = ways[0] if alone else found.setdefault(p.axes, ways[0])
        if any(not np.array_equal(w, first) for w in ways):
            raise PlanError(
                p.factor,
                problem=f"its rows find cells of '{group.name}' and of what is with it by different indices",
                mend="e_step=autoem.e_step.MeanField(), which keeps each latent apart",
            )


def group_of(
    program: Program, factors: Sequence[Factor], bases: Sequence[str], names: Mapping[str, list[str]], cellwise: bool
) -> Group:
    """One group, with the pieces of all factors that read it."""
    latents = tuple(n for b in bases for n in names[b])
    chains = []
    for c in program.chains:
        lags = {n: lag for n, lag in c.lags.items() if n in bases}
        if lags and not any(n in program.continuous for n in c.variables):
            chains.append(dataclasses.replace(c, lags=lags))
    pieces: list[Piece] = []
    for f in factors:
        mine = [z for z in f.latents if f.latent_of(z.name) in latents]
        parts = [[z] for z in mine] if cellwise else [mine] if mine else []
        crossing = len(mine) < len(f.latents) or len(parts) > 1
        pieces += [piece_of(f, i, part, bases[0], crossing) for i, part in enumerate(parts)]
    group = Group(bases[0], latents, tuple(chains), tuple(pieces), cellwise)
    if (
        pieces and not cellwise and group.simple and not any(p.crossing for p in pieces)
    ):  # one law serves all its pieces
        return dataclasses.replace(group, pieces=tuple(dataclasses.replace(p, key=bases[0]) for p in pieces))
    return group


def piece_of(f: Factor, number: int, latents: Sequence[Latent], group: str, crossing: bool) -> Piece:
    """What a factor reads of some latents of one group.

    Raises:
        PlanError: it finds them by different indices.
    """
    routed = {z.name: r for z in latents if (r := f.route_to(z.name)) is not None}
    if len({r.target for r in routed.values()}) > 1:
        raise PlanError(
            f.name,
            problem=f"it reads {sorted(routed)} of one group in cells of different plates",
            mend="e_step=autoem.e_step.MeanField(), which keeps each latent apart",
        )
    route = next(iter(routed.values()), None)
    if route is not None:
        route = dataclasses.replace(route, latents=frozenset(f.latent_of(n) for n in routed))
    plates = set().union(*(p_axes(f, z) for z in latents))
    axes = tuple(a for a in f.kept if a in plates)
    shape = (*(z.num_states for z in latents), *(f.sizes[a] for a in axes))
    own = tuple(f.latent_of(z.name) for z in latents)
    key = f"{f.name}·{group}·{number}"
    return Piece(key, f.name, group, tuple(z.name for z in latents), own, axes, shape, route, crossing)


def law_of(member: Continuous) -> AbstractLaw:
    """The first law on the latent's support; whether it is the right one is tried on the data by `settled_laws`."""
    fitting = [w for w in LAWS if w.support == kind_of(member.support) and w.event_dim == len(member.event)]
    if not fitting:
        raise PlanError(
            member.name,
            problem=f"mean field has no law on {member.support} with an event of shape {member.event}",
            mend=f'EM(model, maximize=["{member.name}"]) to maximise over it',
        )
    return fitting[0]


def settled_laws(field: Field, kernel: Kernel, params: Params, bundle: Bundle) -> Field:
    """The field, its continuous latents with laws that their expected log joints were seen to have.

    Raises:
        PlanError: one has none of the laws in the table.
    """
    moved, blocks = moved_start(kernel.program, params), []
    first = fits(field, field.blocks, kernel, moved, bundle)
    for block, right in zip(field.blocks, first, strict=True):
        if right:
            blocks.append(block)
            continue
        kind = kind_of(block.member.support)
        tried = [w for w in LAWS if w.support == kind and w.event_dim == block.law.event_dim]
        for law in tried[1:]:
            trial = dataclasses.replace(
                field, blocks=tuple(dataclasses.replace(b, law=law) if b is block else b for b in field.blocks)
            )
            if fits(trial, [dataclasses.replace(block, law=law)], kernel, moved, bundle)[0]:
                blocks.append(dataclasses.replace(block, law=law))
                break
        else:
            names = ", ".join(type(w).__name__.removesuffix("Law") for w in tried)
            readers = ", ".join(n for n in block.factors if n != block.name)
            raise PlanError(
                block.name,
                problem=f"given the others, its log joint with {readers or 'its prior'} is that of no law in the table "
                f"({names})",
                mend=f'EM(model, maximize=["{block.name}"]) to maximise over it; Categorical(probs=...) rather than '
                "logits, if a simplex is read",
            )
    return dataclasses.replace(field, blocks=tuple(blocks))


def fits(field: Field, blocks: Sequence[Block], kernel: Kernel, params: Params, bundle: Bundle) -> list[bool]:
    """For each of some blocks, whether the law found by slopes reproduces the log joint at unseen points."""

    def compare(params: Params, bundle: Bundle) -> list[Array]:
        laws = field._close(kernel, params, bundle, field.begin(kernel, bundle, jax.random.key(43)))
        return [reproduced(field, b, params, bundle, laws, make_layout(kernel.layout, bundle)) for b in blocks]

    return [bool(x) for x in jit_once(compare)(dict(params), bundle)]


def reproduced(field: Field, block: Block, params: Params, bundle: Bundle, laws: Laws, layout: Layout) -> Array:
    """Whether a block's law is proper, and rises between two points by as much as its expected log joint."""
    natural = field.update_block(block, params, bundle, laws, layout)
    a, b = (block.law.nodes(block.law.start(jax.random.key(i), block.size))[-1] for i in (44, 45))
    if kind_of(block.member.support) == "real":  # far enough apart to tell an exponential from a parabola
        a, b = (2 * jax.random.normal(jax.random.key(i), jnp.shape(a)) for i in (44, 45))
    if block.law.event_dim:
        a, b = (x / x.sum(-1, keepdims=True) for x in (a * jnp.exp(a), b))
    theirs = jax.vmap(lambda u: field.joint(block, u[None], params, bundle, laws, layout))(jnp.stack([a, b]))
    ours = [block.law.value(natural, u).sum() for u in (a, b)]
    apart, eps = theirs[0] - theirs[1], jnp.finfo(theirs[0].dtype).eps
    rounding = 64 * eps * (jnp.abs(theirs[0]) + jnp.abs(theirs[1]))
    error = jnp.abs(ours[0] - ours[1] - apart) - rounding
    return (error <= max(1e3 * float(eps), 1e-7) * (1 + jnp.abs(apart))) & block.law.proper(natural)

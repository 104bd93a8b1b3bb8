"""From a Program to its factors: which latents each site reads, in which plates, and in natural form or not.

In: a classified Program and the data. Out: the factors in order, the layout of the latents, and the prepared rows.
Where a factor reads a latent of other plates, the route from rows to cells is followed through the model's data flow.
"""

from __future__ import annotations

import dataclasses
import re
from collections import ChainMap
from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import ModelError
from autoem.e_step.elimination.eliminate import Route, route_to_rows
from autoem.e_step.elimination.places import pad, plates_of, scale_of, scaled_site
from autoem.e_step.tables.completions import Completions
from autoem.e_step.tables.regression import REGRESSION, design, find_coefficients
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.families import Family
from autoem.families._arrays import as_float
from autoem.graph.cells import NONE, SEVERAL, cells_read, merge_axes
from autoem.graph.jaxpr import Constant, Graph
from autoem.graph.named import Named, arranged, named
from autoem.ir import Continuous, Latent, Program, Site
from autoem.passes.gaussian import Group, continuous_of, is_flat, latent_groups

TURN_UP_TO = 256 * 2**20  # bytes: larger data are not copied but turned chunk by chunk, which costs up to a fifth


def build_factors(program: Program, values: Mapping[Any, Any]) -> tuple[tuple[Factor, ...], dict[str, np.ndarray]]:
    """The factors of `program`, and for each that needs one the cell that every row reads.

    Raises:
        ModelError: a site reads several cells of one latent at once.
    """
    factors, cells = [], {}
    groups = latent_groups(program) if program.continuous else ()
    for site in program.sites.values():
        latents = read_latents(program, site)
        group = next((g for g in groups if site.name in g.sites), None)
        routed = [z for z in latents if not plates_of(z) <= set(site.plates)]
        route = None
        if routed and (group is None or group.refusal or group.drawn):
            route, cells[site.name] = find_route(program, site, routed, values)
        if group is not None and group.drawn:
            factors.append(drawn_factor(program, site, latents, route))
            continue
        if group is not None and not group.refusal and is_flat(program, site):
            continue  # it adds nothing to the quadratic of those that read it
        if group is not None:
            every = {z.name: z for s in group.sites for z in read_latents(program, program.sites[s])}
            factors.append(completed_factor(program, site, tuple(every.values()), group, route))
            continue
        refuse_random_weights(program, site)
        factors.append(build_factor(program, site, latents, route))
    refuse_two_indices(factors, cells)
    return tuple(factors), cells


def refuse_two_indices(factors: list[Factor], cells: Mapping[str, np.ndarray]) -> None:
    """Raise where latents of the rows may tie together cells that two sites find by different indices."""
    routed = [f for f in factors if f.route and any(z.name not in f.route.latents for z in f.latents)]
    for a in routed:
        for b in routed:
            same_rows = a.route and b.route and a.route.source == b.route.source
            if same_rows and not np.array_equal(cells[a.name], cells[b.name]):
                raise ModelError(
                    a.name,
                    problem=f"it and '{b.name}' read latents of another plate by different indices",
                    mend="no exact elimination of bounded cost exists for this; index them by the same array",
                )


def refuse_random_weights(program: Program, site: Site) -> None:
    """Raise where a mask or a scale depends on a latent or a parameter."""
    for field in ("mask", "scale"):
        if (site.name, field) in program.full.outputs and not is_data(program, (site.name, field)):
            raise ModelError(
                site.name,
                problem=f"its {field} depends on a latent or a parameter",
                mend="write the choice into the distribution (jnp.where on its arguments) or into a numpyro.factor",
            )


def read_latents(program: Program, site: Site) -> tuple[Latent, ...]:
    """Latents that the site's density reads, its own first.

    Raises:
        ModelError: one of them is of a step of a scan that no site of the step stands for.
    """
    own = (site.name,) if site.role == "latent" else ()
    every = program.every_latent
    read = [n for n in (*own, *(p for p in site.parents if p in every))]
    for name in read:
        base, chain = program.base_of(name), program.chain_of(program.base_of(name))
        if chain is not None and not chain.lags[base] and name not in program.sites:
            raise ModelError(
                site.name,
                problem=f"it reads '{base}' of a scan from outside, which no later step reads",
                mend=f"read '{base}' in the step: put '{site.name}' there, or what it needs into the carry's latent",
            )
    return tuple(every[n] for n in read)


def build_factor(program: Program, site: Site, latents: tuple[Latent, ...], route: Route | None) -> Factor:
    usable = all(program.compact[z.name] for z in latents)
    graph = program.graph if usable else program.full
    routed = route.latents if route else frozenset()
    plates = frozenset().union(*(plates_of(z) for z in latents if z.name not in routed), route.source if route else ())
    kept = tuple(a for a in site.axes if a in plates)
    family, direct = natural_family(program, site, as_normal=site.family is None)
    coefficients = (
        find_coefficients(program, site) if family is not None and usable and site.role == "observed" else None
    )
    family = REGRESSION if coefficients else family
    params = tuple(p for p in site.parents if p in program.params)
    if site.role == "parameter":
        params = (site.name, *params)
    sizes = {p.name: p.size for p in program.plates.values()}
    steps = {t for c in program.chains if c.lag for t in (c.time, c.bulk)}
    times = tuple(a for a in kept if a in steps)
    alone = site.role == "parameter" and not latents  # a prior that reads latents is summed over them with the rest
    return Factor(
        site, latents, site.role == "latent", kept, plates, route, family, params, alone, sizes, graph,
        usable, direct, coefficients or (), times,
    )  # fmt: skip


def completed_factor(
    program: Program, site: Site, latents: tuple[Latent, ...], group: Group, route: Route | None
) -> Factor:
    """The factor of a site that reads continuous latents, with an axis for the nodes that stand for them."""
    factor = build_factor(program, site, latents, route)
    affine = not group.refusal  # where it is not, nodes are values of the latents at full shape
    family = natural_family(program, site, filled=True, as_normal=affine)[0]
    read = continuous_of(program, site)
    members = tuple(z for n, z in program.every_continuous.items() if n in read)
    usable = affine and all(program.compact[m.name] for m in members) and factor.compact
    plates = frozenset(site.plates) if latents or site.scaled or not affine else frozenset()
    return dataclasses.replace(
        factor, own=False, kept=tuple(a for a in site.axes if a in plates), plates=plates, coefficients=(),
        family=family, graph=program.graph if usable else program.full, compact=usable, is_prior=False,
        completions=Completions(members, affine),
    )  # fmt: skip


def drawn_factor(program: Program, site: Site, latents: tuple[Latent, ...], route: Route | None) -> Factor:
    """The factor of a site that reads continuous latents of which all cells are drawn at once."""
    refuse_random_weights(program, site)
    read = {program.base_of(n) for n in continuous_of(program, site)}  # at full shape the graph reads whole paths
    members = tuple(z for n, z in program.continuous.items() if n in read)
    in_pieces = bool(latents) and bool(program.chains)  # of discrete paths, which full shape does not tell apart
    if in_pieces and program.half is None:
        raise ModelError(
            site.name,
            problem="it reads a discrete and a continuous latent of a model with a scan, and fails on one cell of each",
            mend="let the step compute with arrays of any plate size, without z.shape",
        )
    graph = program.half if in_pieces and program.half is not None else program.full
    return dataclasses.replace(
        build_factor(program, site, latents, route), coefficients=(), graph=graph, compact=False, is_prior=False,
        family=natural_family(program, site, filled=True)[0], completions=Completions(members, affine=False),
    )  # fmt: skip


def natural_family(program: Program, site: Site, filled=False, as_normal=False) -> tuple[Family | None, str]:
    """The family entry, `as_normal` that of the normal law it is; None and the reason where no natural form applies."""
    entry = site.normal if as_normal else site.family
    if site.role == "factor":
        return None, "a factor's density is whatever the model computes"
    if site.role == "parameter":
        return None, "the prior of a parameter"
    if not isinstance(entry, Family):
        reason = entry.reason if entry else f"{site.distribution} is not in the family table"
        return None, reason
    if site.role == "latent" and program.every_latent[site.name].bounded:
        return None, "its support differs between cells"
    if site.role not in ("latent", "continuous") and not filled and not is_data(program, (site.name, "value")):
        return None, "its value depends on parameters or latents"
    if any(not is_data(program, (site.name, f"arg:{a}")) for a in entry.fixed):
        return None, entry.otherwise or f"{', '.join(entry.fixed)} depends on parameters or latents"
    return entry, ""


def is_data(program: Program, key: tuple[str, str]) -> bool:
    return all(k[0] in ("data", "key") for k in program.full.needs(key))


def find_route(program: Program, site: Site, routed: list[Latent], values: Mapping) -> tuple[Route, np.ndarray]:
    """How the rows of `site` find the cells of latents that live in other plates."""
    target = routed[0].axes
    found: dict[str, np.ndarray] = {}
    for z in routed:
        if z.axes != target:
            raise ModelError(
                site.name,
                problem=f"reads latents of different plates by index: {[r.name for r in routed]}",
                mend="declare those latents in one plate, or give each its own observed site",
            )
        found[z.name] = row_cells(program, site, z, values)
    first = next(iter(found.values()))
    if any(not np.array_equal(f, first) for f in found.values()):
        raise ModelError(
            site.name,
            problem=f"reads the cells of {sorted(found)} by different indices",
            mend="no exact elimination of bounded cost exists for this; index them by the same array",
        )
    varying = [i for i, a in enumerate(site.axes) if not a.startswith("#")]
    source = tuple(site.axes[i] for i in varying)
    shape = tuple(s for a, s in zip(target, routed[0].shape, strict=True) if not a.startswith("#"))
    names = tuple(a for a in target if not a.startswith("#"))
    route = Route(frozenset(found), source, names, shape, site.name)
    return route, first.reshape([first.shape[i] for i in varying])


def row_cells(
    program: Program,
    site: Site,
    latent: Latent | Continuous,
    values: Mapping,
    field: str = "elem",
    events: int = 0,
    along: int | None = None,
) -> np.ndarray:
    """For each row of the site the flat number of the latent's cell that it reads, or its number `along` one axis.

    Axes have size one where all rows agree. Where the latent enters by one argument alone, `field` names that, and
    `events` counts its event axes: the density itself may mix rows on its way (a triangular solve of them all at once).
    """
    atom = program.full.outputs[site.name, field]
    # an index may read other latents' values (a table picked by the site's own): any of their states will do
    states = {
        ("latent", n): np.zeros(v.shape, v.aval.dtype) for (k, n), v in program.full.inputs.items() if k == "latent"
    }
    known = ChainMap(cast(Any, values), states)
    ids = cells_read(program.full, atom, ("latent", latent.name), latent.shape, known, along)
    ids = merge_axes(ids, tuple(range(-events, 0))) if events else ids
    ids = ids.reshape((1,) * (len(site.axes) - ids.ndim) + ids.shape)
    ids = np.broadcast_to(ids, site.shape)
    for i, axis in enumerate(site.axes):
        if axis.startswith("#"):
            ids = merge_axes(ids, (i,), keepdims=True)
    if (ids == SEVERAL).any():
        raise ModelError(
            site.name,
            problem=f"one row reads several cells of the latent '{latent.name}' at once",
            mend=f"index it by row ({latent.name}[group]), "
            f"or declare '{latent.name}' as separate sites outside a plate",
        )
    return np.where(ids == NONE, 0, ids)


def prepare(factor: Factor, program: Program, values: Mapping, cells: Mapping) -> Rows:
    """Make what `factor` needs of the data."""
    site, graph = factor.site, program.full
    rows = Rows(
        mask=output(factor, graph, "mask", values),
        scale=relative_scale(factor, program, values, cells),
        weight=output(factor, graph, "scale", values),
        inside=bounds_mask(factor, values) if factor.own and factor.latents[0].bounded else None,
    )
    if rows.mask is not None:
        rows = dataclasses.replace(rows, mask=Named(rows.mask.array.astype(jnp.int8), rows.mask.axes))
    if factor.own and rows.mask is not None:
        events = [a for a in rows.mask.axes if a.startswith("#")]
        rows = dataclasses.replace(rows, mask=rows.mask.sum(events))
    if factor.family is None:
        return rows
    keys = [(site.name, f"arg:{a}") for a in factor.family.fixed]
    fixed = {
        k[1][4:]: named(pad(v, len(site.axes)), site.axes)
        for k, v in zip(keys, graph.evaluate(keys, values), strict=True)
    }
    rows = dataclasses.replace(rows, fixed=fixed)
    if factor.is_hidden or factor.value_hidden:
        return rows
    return own_rows(factor, rows) if factor.own else observed_rows(factor, graph, values, rows)


def output(factor: Factor, graph, field: str, values) -> Named | None:
    key = (factor.name, field)
    if key not in graph.outputs:
        return None
    array = graph.evaluate([key], values)[0]
    return (
        scale_of(array, factor.site) if field == "scale" else named(pad(array, len(factor.site.axes)), factor.site.axes)
    )


def relative_scale(factor: Factor, program: Program, values, cells: Mapping) -> Named | None:
    """Multiplicity of the factor relative to its innermost latent; None where they agree."""
    graph, own = program.full, (factor.name, "scale")
    inner = factor.inner
    mine = output(factor, graph, "scale", values)
    if inner is None or (site := scaled_site(program, factor.latent_of(inner.name))) is None:
        return mine
    above = (site, "scale")
    if own in graph.outputs and same(graph.outputs[own], graph.outputs[above]):
        return None
    mine = mine or Named(jnp.ones(()), ())
    theirs = scale_of(graph.evaluate([above], values)[0], program.sites[site])
    theirs = route_to_rows(theirs, factor.route_to(inner.name), cells)
    both = tuple(dict.fromkeys((*mine.axes, *theirs.axes)))
    lower = theirs.to(both)
    return Named(jnp.where(lower == 0, 1.0, mine.to(both) / jnp.where(lower == 0, 1, lower)), both)


def same(a, b) -> bool:
    both = isinstance(a, Constant) and isinstance(b, Constant)
    return a is b or (both and np.array_equal(a.value, b.value))


def bounds_mask(factor: Factor, values) -> Named:
    """Which states of a latent each of its cells may take."""
    low, high = (factor.graph.evaluate([(factor.name, f)], values)[0] for f in ("low", "high"))
    rank = len(factor.site.axes)
    states = jnp.asarray(factor.latents[0].states).reshape((-1,) + (1,) * rank)
    inside = (states >= pad(low, rank)) & (states <= pad(high, rank))
    return named(inside.astype(float), (factor.name, *factor.site.axes))


def own_rows(factor: Factor, rows: Rows) -> Rows:
    """The 'data' of a latent's own site: its states."""
    latent, family = factor.latents[0], factor.family
    assert family is not None
    events = tuple(a for a in factor.site.axes if a.startswith("#") and not a.startswith("#unit"))
    axes = (latent.name, *events)
    value = Named(jnp.asarray(latent.states), axes)
    base = Named(family.base(value.array, {k: f.to(axes) for k, f in (rows.fixed or {}).items()}), axes)
    return dataclasses.replace(rows, value=value, base=base.sum(events))


def observed_rows(factor: Factor, graph: Graph, values: Mapping, rows: Rows) -> Rows:
    """The values as the data hold them, and the moments that `Factor.observations` standardises them by."""
    site, family = factor.site, factor.family
    assert family is not None
    raw, rank = observed_values(factor, graph, values), len(site.shape)
    if rows.mask is not None:
        seen = jnp.broadcast_to(rows.mask.to(site.axes) > 0, site.shape)
        raw = without_hidden(raw, seen.reshape(site.shape + (1,) * family.event_dim), rank)
    if family.standardise is not None and any(
        s > 1 and not a.startswith("#") for a, s in zip(site.axes, site.shape, strict=True)
    ):
        centre, spread = (m.reshape(m.shape[rank:] if family.event_dim else m.shape) for m in moments(raw, site))
        rows = dataclasses.replace(rows, centre=centre, spread=spread)
    kept = [i for i, s in enumerate(site.shape) if s > 1]
    shape = tuple(site.shape[i] for i in kept) + raw.shape[rank:]
    value = raw if raw.shape == shape else raw.reshape(shape)  # what is not touched is passed on without a copy
    axes = (*(site.axes[i] for i in kept), *(f"event{i}" for i in range(raw.ndim - rank)))
    value, small = narrow(value, site.support)
    rows = dataclasses.replace(rows, value=Named(value, axes))
    if value.nbytes > TURN_UP_TO:
        return rows
    turned = factor.observations(rows)
    if small:
        turned = Named(turned.array.astype(jnp.int8), turned.axes)
    mask = None if rows.mask is None else arranged(rows.mask, turned.axes)
    fixed = {k: arranged(f, turned.axes) for k, f in (rows.fixed or {}).items()}
    return dataclasses.replace(rows, value=turned, mask=mask, fixed=fixed, ready=True)


def narrow(values: Array, support: str) -> tuple[Array, bool]:
    """Small whole numbers as bytes: every step reads them all, and memory is what it waits for."""
    bounds = re.fullmatch(r"IntegerInterval\(lower_bound=0, upper_bound=(\d{1,2})\)", support)
    small = support == "Boolean()" or bounds is not None
    return (values.astype(jnp.int8), True) if small else (values, False)


def observed_values(factor: Factor, graph: Graph, values: Mapping) -> Array:
    """The observed value, `(*batch, *event)` at full shape; of a regression, design and residual side by side."""
    site, family = factor.site, factor.family
    assert family is not None
    raw = jnp.asarray(graph.evaluate([(site.name, "value")], values)[0])
    if factor.coefficients:
        columns, offset = design(factor.graph, site, factor.coefficients, values)
        raw = jnp.broadcast_to(raw, site.shape) - offset
        return jnp.moveaxis(jnp.concatenate([columns, raw[None]]), 0, -1)
    shape = site.shape + raw.shape[raw.ndim - family.event_dim :]
    return raw if raw.shape == shape else jnp.broadcast_to(raw, shape)


def without_hidden(raw: Array, seen: Array, rank: int) -> Array:
    """Put a value that is seen where a mask hides one: what is hidden may be NaN or outside the support."""
    first = jnp.argmax(seen.reshape(-1))
    example = jnp.take(raw.reshape(-1, *raw.shape[rank:]), first, 0)
    return jnp.where(seen, raw, example)


def moments(raw: Array, site: Site) -> tuple[Array, Array]:
    """Mean and standard deviation over the plates, element by element of the event; a constant has spread one."""
    over, raw = tuple(i for i, a in enumerate(site.axes) if not a.startswith("#")), as_float(raw)
    centre, variance = raw.mean(over, keepdims=True), raw.var(over, keepdims=True)
    return centre, jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 1.0)

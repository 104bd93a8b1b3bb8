"""From a Program to its factors: which latents each site reads, in which plates, and in natural form or not.

In: a classified Program and the data. Out: the factors in order, the layout of the latents, and the prepared rows.
Where a factor reads a latent of other plates, the route from rows to cells is followed through the model's data flow.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from autoem._errors import ModelError
from autoem.e_step.elimination.eliminate import Route
from autoem.e_step.elimination.places import plates_of
from autoem.e_step.tables.completions import Completions
from autoem.e_step.tables.regression import REGRESSION, find_coefficients
from autoem.e_step.tables.tabulate import Factor
from autoem.families import Family
from autoem.graph.cells import NONE, SEVERAL, cells_read, merge, merge_axes
from autoem.ir import Continuous, Latent, Program, Site
from autoem.passes.gaussian import Group, continuous_of, is_flat, latent_groups


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
        chosen = site.role in ("observed", "factor") and of_states(program, (site.name, "mask"))
        refuse_random_weights(program, site, ("scale",) if chosen else ("mask", "scale"))
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


def refuse_random_weights(program: Program, site: Site, fields: tuple[str, ...] = ("mask", "scale")) -> None:
    """Raise where a mask or a scale depends on a latent or a parameter."""
    for field in fields:
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
    moving = moving_fields(program, site, family)
    regression = family is not None and usable and site.role == "observed" and not moving
    coefficients = find_coefficients(program, site) if regression else None
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
        usable, direct, coefficients or (), times, moving=moving,
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
        completions=Completions(members, affine), moving=(),
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
        moving=(),
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
    seen = site.role not in ("latent", "continuous") and not filled
    if seen and not of_states(program, (site.name, "value")):
        return None, "its value depends on parameters or continuous latents"
    known = is_data if filled else of_states
    if any(not known(program, (site.name, f"arg:{a}")) for a in entry.fixed):
        of = "parameters or latents" if filled else "parameters or continuous latents"
        return None, entry.otherwise or f"{', '.join(entry.fixed)} depends on {of}"
    return entry, ""


def is_data(program: Program, key: tuple[str, str]) -> bool:
    return all(k[0] in ("data", "key") for k in program.full.needs(key))


def of_states(program: Program, key: tuple[str, str]) -> bool:
    """Whether an output depends on no more than the data and discrete latents; one that is not there does."""
    if key not in program.full.outputs:
        return True
    return all(k[0] in ("data", "key") or k[1] in program.latents for k in program.full.needs(key))


def moving_fields(program: Program, site: Site, family: Family | None) -> tuple[str, ...]:
    """What of a site's rows differs with the states of latents, or between the cells of a latent of its own."""
    own, fixed = site.role == "latent", [f"arg:{a}" for a in family.fixed] if family is not None else []
    if own and program.every_latent[site.name].bounded:
        return tuple(fixed)
    keys = [(site.name, f) for f in (*fixed, *(() if own else ("value", "mask")))]
    known = [k for k in keys if k in program.full.outputs]
    return tuple(
        k[1] for k in known if any(n[0] == "latent" and n[1] in program.latents for n in program.full.needs(k))
    )


def tied_to_states(factors: Sequence[Factor]) -> tuple[str, str] | None:
    """The site whose data are no draws of its own, and why; None where there is none."""
    for f in factors:
        if f.site.role == "observed" and "value" in f.moving:
            return f.name, f"what '{f.name}' observes is computed from latents"
        if "mask" in f.moving:
            return f.name, f"latents decide which rows of '{f.name}' count, so that other sites hold its data too"
    return None


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
    fields = [field, "mask"] if field == "elem" and "mask" in moving_fields(program, site, None) else [field]
    # an index may read other latents' values (a table picked by the site's own): any of their states will do
    states = {
        ("latent", n): np.zeros(v.shape, v.aval.dtype) for (k, n), v in program.full.inputs.items() if k == "latent"
    }
    known = ChainMap(cast(Any, values), states)
    ids = np.full(site.shape, NONE)
    for atom in (program.full.outputs[site.name, f] for f in fields):
        found = cells_read(program.full, atom, ("latent", latent.name), latent.shape, known, along)
        found = merge_axes(found, tuple(range(-events, 0))) if events else found
        ids = merge(ids, found.reshape((1,) * (len(site.axes) - found.ndim) + found.shape))
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

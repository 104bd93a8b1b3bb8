"""Which continuous latents have a Gaussian posterior? Those read by Normal sites alone, affinely, and only in the mean.

In: a classified Program with continuous latents. Out: its groups of such latents, joined where one site reads several,
each with the sites that read it; and for every latent that is in no such group the reason. Affinity is read off the
data flow, so it holds whatever the numbers are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from autoem.families import Family
from autoem.graph.jaxpr import Atom, Graph
from autoem.ir import Program, Site
from autoem.passes.link import Declined, Linear, interpret

FAMILIES = ("Normal", "LogNormal", "MultivariateNormal")


@dataclasses.dataclass(frozen=True)
class Group:
    """Continuous latents that some site joins, in the model's order; `refusal` says why they are not Gaussian.

    `drawn` groups are integrated by no formula, but treated by draws of all their cells at once.
    """

    members: tuple[str, ...]
    sites: tuple[str, ...]
    refusal: str = ""
    at: str = ""
    drawn: bool = False


def latent_groups(program: Program) -> tuple[Group, ...]:
    """The continuous latents of `program`, joined where a site reads several."""
    parts: list[tuple[set[str], list[str]]] = []
    for site in program.sites.values():
        read = continuous_of(program, site)
        if not read:
            continue
        base = {program.base_of(n) for n in read}
        touching = [p for p in parts if p[0] & base]
        parts = [p for p in parts if not p[0] & base]
        parts.append((base.union(*(p[0] for p in touching)), [*(s for p in touching for s in p[1]), site.name]))
    groups = []
    for members, sites in parts:
        ordered = tuple(n for n in program.continuous if n in members)
        named = tuple(n for n in program.sites if n in sites)
        at, refusal = next(((s, why) for s in named if (why := why_not(program, program.sites[s]))), ("", ""))
        if wish := next((w for n in ordered if getattr(w := program.continuous[n].wish, "approximate", False)), None):
            at, refusal = ordered[0], f"{type(wish).__name__} was asked for"
        drawn = any(program.continuous[n].drawn for n in ordered)
        groups.append(Group(ordered, named, refusal, at, drawn))
    return tuple(groups)


def continuous_of(program: Program, site: Site) -> set[str]:
    """The continuous latents that a site's density reads, its own among them."""
    every = program.every_continuous
    return {n for n in (site.name, *site.parents) if n in every}


def why_not(program: Program, site: Site) -> str:
    """Why the site's log density is not a quadratic in its continuous latents; an empty string where it is."""
    if is_flat(program, site):
        return ""
    family = site.normal
    if not isinstance(family, Family) or family.name not in FAMILIES:
        return f"it is {site.distribution}, not Normal"
    own = site.name in program.every_continuous
    if family.name == "LogNormal" and own:
        return "it is LogNormal, not Normal"
    graph = program.graph
    read = {("latent", n) for n in continuous_of(program, site)}
    for arg in family.args:
        if arg != "loc" and graph.needs((site.name, f"arg:{arg}")) & read:
            return f"its {arg} depends on {named(read & graph.needs((site.name, f'arg:{arg}')))}"
    if not own and (reason := affine_in(graph, (site.name, "value"), read)):
        return reason.replace("its mean", "its value")
    return affine_in(graph, (site.name, "arg:loc"), read - {("latent", site.name)})


def is_flat(program: Program, site: Site) -> bool:
    """Whether the site is a continuous latent of no density but the same for all numbers."""
    return site.role == "continuous" and program.every_continuous[site.name].flat


def affine_in(graph: Graph, key: tuple, read: Iterable[tuple]) -> str:
    """Why an output is not affine in the inputs `read`, or an empty string."""
    read = [k for k in read if k in graph.needs(key)]
    why = affine_atom(graph, graph.outputs[key], read) if read else ""
    return why and f"its mean is not affine in {named(read)}: {why}"


def affine_atom(graph: Graph, atom: Atom, read: Iterable[tuple]) -> str:
    """Why a value is not affine in the inputs `read`, or an empty string."""

    def interpreted(values: Mapping[Any, Any]):
        form = interpret(graph, atom, {k: Linear(values[k]) for k in read}, values)
        if not isinstance(form, Linear):
            raise Declined("it does not enter affinely")
        return ()

    needs = graph.needs_of([atom])
    try:
        jax.eval_shape(interpreted, {k: v.aval for k, v in graph.inputs.items() if k in needs})
    except Declined as declined:
        return str(declined)
    return ""


def named(keys: Iterable[tuple]) -> str:
    return ", ".join(sorted(f"'{k[1]}'" for k in keys))

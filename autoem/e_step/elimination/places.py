"""Where latents live: the layout that elimination works on, and how often their rows count.

In: a classified Program and the data. Out: `Layout`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from autoem._errors import ModelError
from autoem.e_step.elimination.layout import Layout
from autoem.graph.named import Named, named
from autoem.ir import Chain, Latent, Program, Site, at_lag, at_step


def build_layout(program: Program, values: Mapping, cells: Mapping) -> Layout:
    """Where every latent lives and how often its rows count."""
    scales: dict[str, Named | None] = {}
    for name in program.every_latent:
        site = scaled_site(program, name)
        scales[name] = (
            scale_of(program.full.evaluate([(site, "scale")], values)[0], program.sites[site]) if site else None
        )
    sizes = {p.name: p.size for p in program.plates.values()}
    plates = {n: plates_of(z) for n, z in program.every_latent.items()}
    refuse_scales_in_time(program, scales)
    return Layout(plates, sizes, scales, cells, discrete_chains(program))


def discrete_chains(program: Program) -> tuple[Chain, ...]:
    """The chains whose steps discrete latents tie together, by those alone.

    Continuous ones that the same scan carries are given where this is read: drawn, or they share no site with these.
    """
    out = []
    for chain in program.chains:
        lags = {n: lag for n, lag in chain.lags.items() if n not in program.continuous}
        if any(lags.values()) or not chain.variables:
            out.append(dataclasses.replace(chain, lags=lags))
    return tuple(out)


def scaled_site(program: Program, name: str) -> str | None:
    """The site whose scale is that of the latent `name`: its own, or another piece of the same path."""
    bases = [n for c in program.chains for n in c.variables if name == n or name.startswith((f"{n}@", f"{n}["))]
    names = [name, *(p for n in bases for p in (at_lag(n, 0), at_step(n, 0), n))]
    return next((n for n in names if (n, "scale") in program.full.outputs), None)


def refuse_scales_in_time(program: Program, scales: Mapping[str, Named | None]) -> None:
    """Raise where the steps of a chain count differently often."""
    for chain in program.chains:
        for name in (n for n in chain.variables if n in scales):
            if (scale := scales[name]) is not None and {chain.time, chain.bulk} & set(scale.axes):
                raise ModelError(
                    name,
                    problem="its scale differs from step to step, and a path cannot count differently often at each",
                    mend="scale whole sequences (one number for each), or mask steps",
                )


def scale_of(array, site: Site) -> Named:
    """A scale with its axes named; it stands outside `to_event`, so the event's axes are not among its own."""
    array = jnp.asarray(array)
    inner = sum(1 for a in site.axes if a.startswith("#") and not a.startswith("#unit"))
    return named(pad(array.reshape(array.shape + (1,) * inner), len(site.axes)), site.axes)


def pad(array, rank: int):
    array = jnp.asarray(array)
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def plates_of(latent: Latent) -> frozenset[str]:
    """Plates that a latent has a cell for each combination of."""
    return frozenset(a for a in latent.axes if not a.startswith("#"))

"""The program that is read from a model: sites, plates, latents, parameters. Frozen; prints one line a site.

Invariants, established by `check`: names are unique; every plate that a site names exists; a latent has at least one
state; a parameter's value has the shape that the model gives it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from autoem._errors import AutoEMBug
from autoem._jaxpr import Graph
from autoem.families import Family, Opaque


@dataclasses.dataclass(frozen=True)
class Plate:
    """A dimension of conditional independence. `implicit` ones are batch axes that no `numpyro.plate` covers."""

    name: str
    size: int
    implicit: bool = False


@dataclasses.dataclass(frozen=True)
class Site:
    """One `sample` statement, unwrapped.

    Attributes:
        name: the site's name.
        role: 'observed', 'latent', 'parameter' or 'factor'.
        distribution: name of the unwrapped distribution's class.
        family: its entry in the family table, or None.
        axes: label of each batch axis of the *unwrapped* distribution, outermost first: a plate's name, or `#i` for an
            axis that `to_event` made part of the event.
        shape: size of each of those axes.
        event_dim: event axes of the unwrapped distribution.
        masked, scaled: whether a mask or a scale stands on it.
        reason: for a continuous site, why it was taken as what it is.
    """

    name: str
    role: str
    distribution: str
    family: Family | Opaque | None
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    event_dim: int
    masked: bool
    scaled: bool
    parents: tuple[str, ...] = ()
    reason: str = ""
    support: str = ""

    @property
    def plates(self) -> tuple[str, ...]:
        return tuple(a for a in self.axes if not a.startswith("#"))

    def __str__(self) -> str:
        plates = "".join(f"[{p}]" for p in self.plates)
        marks = "".join(f" {m}" for m, on in (("masked", self.masked), ("scaled", self.scaled)) if on)
        given = f" | {', '.join(self.parents)}" if self.parents else ""
        return f"{self.role:<10}{self.name}{plates} ~ {self.distribution}{given}{marks}"


@dataclasses.dataclass(frozen=True, eq=False)
class Latent:
    """A discrete latent: `states` lists its support, `(k,)` or `(k, *event)`; `axes` its batch axes, outermost first.

    `bounded` is set where the support differs between cells: states outside a cell's own bounds have probability zero.
    """

    name: str
    states: np.ndarray
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    bounded: bool = False
    masked: bool = False

    @property
    def num_states(self) -> int:
        return len(self.states)

    @property
    def plates(self) -> frozenset[str]:
        return frozenset(a for a, s in zip(self.axes, self.shape, strict=True) if s > 1 or not a.startswith("dim"))


@dataclasses.dataclass(frozen=True, eq=False)
class Param:
    """Something that the M-step maximises: a `param` site, or a `sample` site with a prior (`prior` is its name)."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    constraint: Any
    prior: str | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A model as autoem understands it.

    `graph` runs the model with every latent at its *compact* shape (1 along its plates); `full` at its full shape.
    Inputs are keyed ("param", name), ("latent", name), ("data", i), ("key", 0); outputs (site, field) with fields
    "value", "elem" (log density of the unwrapped distribution), "mask", "scale", "low", "high" and "arg:<name>".
    `compact` tells of each latent whether its compact shape may be used.
    """

    name: str
    sites: Mapping[str, Site]
    plates: Mapping[str, Plate]
    latents: Mapping[str, Latent]
    params: Mapping[str, Param]
    graph: Graph
    full: Graph
    compact: Mapping[str, bool]
    data_tree: Any
    notes: tuple[str, ...] = ()
    subsampled: bool = False

    def __str__(self) -> str:
        lines = [f"program {self.name}"]
        lines += [f"  plate     {p.name}: {p.size}" for p in self.plates.values() if not p.implicit]
        shown = {s for s in self.sites if self.sites[s].role == "parameter"}
        lines += [
            f"  parameter {p.name} {list(p.shape)} in {p.constraint}" for p in self.params.values() if not p.prior
        ]
        lines += [f"  {s}" for s in self.sites.values() if s.name in shown]
        lines += [f"  {s}" for s in self.sites.values() if s.name not in shown]
        return "\n".join(lines + [f"  note: {n}" for n in self.notes])


def check(program: Program) -> Program:
    """Return `program` if its invariants hold.

    Raises:
        AutoEMBug: one does not.
    """
    for site in program.sites.values():
        if len(site.axes) != len(site.shape):
            raise AutoEMBug(f"site '{site.name}' has axes {site.axes} of sizes {site.shape}")
        for plate in site.plates:
            if plate not in program.plates:
                raise AutoEMBug(f"site '{site.name}' stands in unknown plate '{plate}'")
    for latent in program.latents.values():
        if latent.num_states < 1:
            raise AutoEMBug(f"latent '{latent.name}' has no states")
    return program

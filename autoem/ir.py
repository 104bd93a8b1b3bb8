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
from autoem.families import Family, Opaque
from autoem.graph.jaxpr import Graph, Key


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
        role: 'observed', 'latent' (discrete), 'continuous' (a latent), 'parameter' or 'factor'.
        distribution: name of the unwrapped distribution's class.
        family: its entry in the family table, or None.
        axes: label of each batch axis of the *unwrapped* distribution, outermost first: a plate's name, or `#i` for an
            axis that `to_event` made part of the event.
        shape: size of each of those axes.
        event_dim: event axes of the unwrapped distribution.
        masked, scaled: whether a mask or a scale stands on it.
        reason: for a continuous site, why it was taken as what it is.
        law: the entry of the normal law that the site has by another name, or None.
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
    law: Family | None = None

    @property
    def normal(self) -> Family | Opaque | None:
        """Its entry as a normal law where it is one, else that of its distribution."""
        return self.law or self.family

    @property
    def plates(self) -> tuple[str, ...]:
        return tuple(a for a in self.axes if not a.startswith("#"))

    def __str__(self) -> str:
        plates = "".join(f"[{p}]" for p in self.plates)
        marks = "".join(f" {m}" for m, on in (("masked", self.masked), ("scaled", self.scaled)) if on)
        given = f" | {', '.join(self.parents)}" if self.parents else ""
        role = "latent" if self.role == "continuous" else self.role
        return f"{role:<10}{self.name}{plates} ~ {self.distribution}{given}{marks}"


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
class Continuous:
    """A continuous latent: `axes` are its batch axes, outermost first, of sizes `shape`; one cell holds an `event`.

    `support` is NumPyro's constraint, `wish` the strategy that the user asked for, or None; `drawn` tells that it is
    treated by draws of all its cells at once. Plates whose cells rows read together are part of the event; where the
    model has such a plate before one that is not, `order` has the model's axes among those of cells and event. The
    steps of one law that is read as a chain come first here, and in the model after `steps` other axes. `flat` tells
    that its density is the same for all numbers (`ImproperUniform`).
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    event: tuple[int, ...]
    reason: str = ""
    support: Any = None
    wish: Any = None
    drawn: bool = False
    order: tuple[int, ...] = ()
    steps: int = 0
    flat: bool = False

    @property
    def dim(self) -> int:
        return int(np.prod(self.event, dtype=int))

    @property
    def plates(self) -> tuple[str, ...]:
        return tuple(a for a in self.axes if not a.startswith("#"))

    def as_model(self, value: Any) -> Any:
        """A value `(..., *shape, *event)` with its axes as the model has them."""
        if not self.order:
            return value
        lead = value.ndim - len(self.order)
        return value.transpose((*range(lead), *(lead + i for i in self.order)))

    def in_model(self, value: Any, events: int | None = None) -> Any:
        """A value for all cells as the model's site has it; of other `events` axes behind the cells than its own."""
        lead = value.ndim - len(self.shape) - (len(self.event) if events is None else events)
        value = self.as_model(value) if events is None else value
        before, others = range(lead), [i for i in range(lead, value.ndim) if i != lead]
        order = (*before, *others[: self.steps], lead, *others[self.steps :])
        return value.transpose(order) if self.steps else value


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A scan: the plate of its steps, and how far back they read its latents.

    Attributes:
        time: the plate of all steps; sites that read no latent of an earlier step stand in it.
        bulk: the plate of the steps from `lag` on; sites that do stand in it, as `at_lag(name, 0)`, and as
            `at_step(name, h)` for each of the first `lag` steps.
        length: number of steps.
        lag: how many steps back a site reads at most; zero where no step reads another.
        lags: the same for each latent of the body.
        ending: how many of the last steps the rest of the model may read.
        reverse: whether the scan runs from the data's last step to its first; steps are counted as it runs.
    """

    time: str
    bulk: str
    length: int
    lag: int
    lags: Mapping[str, int]
    ending: int = 0
    reverse: bool = False

    @property
    def variables(self) -> tuple[str, ...]:
        """The latents that later steps read."""
        return tuple(n for n, lag in self.lags.items() if lag)

    @property
    def names(self) -> frozenset[str]:
        """The names under which tables that repeat along time hold those latents: paths, and values at a step."""
        return frozenset(self.variables) | {at_lag(n, i) for n in self.variables for i in range(self.lags[n] + 1)}

    @property
    def previous(self) -> tuple[str, ...]:
        """States of the steps before, as a step reads them."""
        return tuple(at_lag(n, i) for n in self.variables for i in range(1, self.lags[n] + 1))

    @property
    def current(self) -> tuple[str, ...]:
        """What they are to the next step, in the order of `previous`."""
        return tuple(at_lag(n, i - 1) for n in self.variables for i in range(1, self.lags[n] + 1))

    @property
    def start(self) -> tuple[str, ...]:
        """The states of the first steps that the first step after them reads, in the order of `previous`."""
        return tuple(at_step(n, self.lag - i) for n in self.variables for i in range(1, self.lags[n] + 1))

    @property
    def end(self) -> tuple[str, ...]:
        """The states of the last steps, in the order of `current`."""
        return tuple(at_step(n, -i) for n in self.variables for i in range(1, self.lags[n] + 1))


def at_lag(name: str, lag: int) -> str:
    """A latent so many steps before a step."""
    return f"{name}@{lag}"


def at_step(name: str, step: int) -> str:
    """A latent at one step, counted from the start or (negative) from the end."""
    return f"{name}[{step}]"


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
    `compact` tells of each latent whether its compact shape may be used. `half`, where there is one, has the discrete
    latents compact and the continuous ones at full shape.
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
    chains: tuple[Chain, ...] = ()
    pieces: Mapping[str, Latent] = dataclasses.field(default_factory=dict)
    continuous: Mapping[str, Continuous] = dataclasses.field(default_factory=dict)
    strands: Mapping[str, Continuous] = dataclasses.field(default_factory=dict)
    half: Graph | None = None

    @property
    def every_latent(self) -> dict[str, Latent]:
        """The latents, and the pieces of those that are carried along a chain."""
        return {**self.latents, **self.pieces}

    @property
    def every_continuous(self) -> dict[str, Continuous]:
        """The continuous latents, and the pieces of those that are carried along a chain."""
        return {**self.continuous, **self.strands}

    def base_of(self, piece: str) -> str:
        """The latent that a piece belongs to; a name that is no piece is its own."""
        names = [n for c in self.chains for n in c.lags]
        return next((n for n in names if piece.startswith((f"{n}@", f"{n}["))), piece)

    def chain_of(self, latent: str) -> Chain | None:
        """The scan that a latent is a path of."""
        return next((c for c in self.chains if latent in c.lags), None)

    def outputs_along(self, name: str, field: str) -> list[Key]:
        """The outputs that hold a field of a site: one; or of a site in a scan, one a piece, in the order of its steps.

        Empty where the model has no such site, or the site no such field.
        """
        if name in self.sites:
            return [(name, field)] if (name, field) in self.full.outputs else []
        for chain in self.chains:
            names = [at_step(name, h) for h in range(min(chain.lag, chain.length))]
            names += [at_lag(name, 0)] if chain.length > chain.lag else []
            if names and all((n, field) in self.full.outputs for n in names):
                return [(n, field) for n in names]
        return []

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

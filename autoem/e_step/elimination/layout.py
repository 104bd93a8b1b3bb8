"""What elimination works on: tables with named axes, where their latents live, and how rows find cells.

In: nothing. Out: the records that `factors` makes and `elimination` and `along_time` reduce.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from autoem.graph.named import Named
from autoem.ir import Chain


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """The way from the rows of a factor to the cells of latents in other plates: `z[group]`.

    `cell[row]` is the flat number of the latent's cell; `source` names the plates of the rows, in the order of `cell`'s
    axes, `target` those of the latents, `shape` their sizes.
    """

    latents: frozenset[str]
    source: tuple[str, ...]
    target: tuple[str, ...]
    shape: tuple[int, ...]
    site: str


def route_to_rows(value: Named, route: Route | None, cells: Mapping[str, Array]) -> Named:
    """A quantity of the cells that `route` leads to, as the rows see it."""
    if route is None or not set(value.axes) & set(route.target):
        return value
    rest = tuple(a for a in value.axes if a not in route.target)
    flat = value.to((*route.target, *rest))
    flat = jnp.broadcast_to(flat, (*route.shape, *flat.shape[len(route.shape) :]))
    flat = flat.reshape(-1, *flat.shape[len(route.shape) :])
    return Named(flat[cells[route.site]], (*route.source, *rest))


@dataclasses.dataclass(frozen=True)
class Table:
    """Log densities over `latents` and plates.

    `plates` are the plates that it is repeated over, with an axis or not.
    """

    value: Named
    latents: frozenset[str]
    plates: frozenset[str]
    route: Route | None = None
    held: Held | None = None


@dataclasses.dataclass(frozen=True)
class Held:
    """The tables of the later steps of a chain, waiting to be summed along time all at once."""

    chain: Chain
    tables: tuple[Named, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """One latent summed out: `joint` is the sum of all tables that held it, before the reduction."""

    latent: str
    joint: Named
    latents: frozenset[str]
    plates: frozenset[str]
    route: Route | None

    @property
    def entries(self) -> int:
        return int(self.joint.array.size)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where every latent lives: its plates, the sizes of all plates, and the multiplicity of its rows (None is one).

    `logs` has the messages of chains in logarithms, not in scaled probabilities; `proof` has them so wherever scaled
    ones could have lost something. `given` holds what the sums of some chains, by their time, are to be taken for.
    """

    plates_of: Mapping[str, frozenset[str]]
    sizes: Mapping[str, int]
    scales: Mapping[str, Named | None]
    cells: Mapping[str, Array]
    chains: tuple[Chain, ...] = ()
    logs: bool = False
    proof: bool = False
    given: Mapping[str, Named] = dataclasses.field(default_factory=dict)

    def chain_at(self, plates: frozenset[str]) -> Chain | None:
        """The chain whose steps, which read one another, are among `plates`."""
        return next((c for c in self.chains if c.lag and {c.time, c.bulk} & plates), None)

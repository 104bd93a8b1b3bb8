r"""Gaussian latents of rows of which a fit sees the mean and the covariance alone.

With `x` observed, slopes `M` and a whitening `W` that are the same in every row, the posterior's covariance `C` is that
of every row, and its mean :math:`m + G (x - \bar x)` with :math:`H = M^\top W`, `G = C H` and `m` that of the mean row.
So with `S` the covariance of the rows, their average log-likelihood is

.. math:: \frac1n \sum_i \log p(x_i) = \log p(\bar x) - \tfrac12 \mathrm{tr}\, W S W^\top
   + \tfrac12 \mathrm{tr}\, H S G^\top,

and posterior means spread by :math:`G S G^\top`, and with what is observed by :math:`S G^\top`.

In: the mean row, as the only one, and `S`. Out: the same as for a block of rows, for one that stands for all.

References:
    Rubin and Thayer 1982, "EM algorithms for ML factor analysis", whose E-step reads the data's covariance alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.gaussian.block import GaussianBlock, Moments, widened
from autoem.e_step.gaussian.quadratic import DIM, EVENT, EVENT_TOO, OTHER, Residual, residuals
from autoem.e_step.tables.completions import rows_of
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named, add, contract, multiply, named

COVARIANCE = "·covariance"  # under what it stands among the data's cells: of all that is seen of a row, site by site


@dataclasses.dataclass(frozen=True, eq=False)
class SpreadBlock(GaussianBlock):
    """A block whose one cell is that of the mean row; `entries` are the axes of what a site observes of it."""

    entries: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)

    def integrate(self, values: Mapping[Any, Any], rows: Mapping[str, Rows], cells: Mapping[str, Array]):
        """`(table, moments)`: the average of the integrals of all rows, and the posterior of a row drawn from them."""
        found = residuals(self.factors, values, rows)
        table, moments = self.integrated(*self.quadratic(found, cells))
        seen = [(f, r) for f, r in found if f.name in self.entries]
        parts = [self.seen_through(f, r) for f, r in seen]
        slopes = parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)
        gain = moments.covariance.to((DIM, OTHER)) @ slopes
        cross = cells[COVARIANCE] @ gain.T
        own = {f.name: named(cells[own_name(f)], own_axes(f, self.entries[f.name])) for f, _ in seen}
        lost = sum(spread_of(r, own[f.name]) for f, r in seen)
        value = add(table.value, Named(0.5 * ((slopes.T * cross).sum() - lost), ()))
        covariance = add(moments.covariance, Named(gain @ cross, (DIM, OTHER)))
        by_site = jnp.split(cross, np.cumsum([p.shape[1] for p in parts])[:-1])
        about = {f.name: (self.part(f, c), own[f.name]) for (f, _), c in zip(seen, by_site, strict=True)}
        return dataclasses.replace(table, value=value), Moments(moments.mean, covariance, about)

    def seen_through(self, f: Factor, r: Residual) -> Array:
        """`H` of one site: by how much the posterior's shift grows with every entry, `(coordinates, entries)`."""
        assert f.completions is not None and r.whitening is not None
        if f._family.event_dim:
            keep = (*(a for a in r.slope.axes if a != EVENT), EVENT_TOO)
            slope = contract(keep, r.slope, r.whitening)
            slope = Named(slope.array, tuple(EVENT if a == EVENT_TOO else a for a in slope.axes))
        else:
            slope = multiply(r.slope, r.whitening)
        slope = widened(slope, (DIM,), f.completions.within(self.members), self.dim)
        entries = self.entries[f.name]
        array = jnp.broadcast_to(slope.to((DIM, *entries)), (self.dim, *entries.values()))
        return array.reshape(self.dim, -1)

    def part(self, f: Factor, cross: Array) -> Named:
        """The covariance of a site's observations with the posterior means, with those of its own latents alone."""
        assert f.completions is not None
        entries, own = self.entries[f.name], cross[:, rows_of(f.completions.within(self.members))]
        return named(own.reshape(*entries.values(), -1), (*entries, DIM))


def own_name(f: Factor) -> str:
    """Under what the covariance of a site's own entries stands among the data's cells."""
    return f"{f.name}·spread"


def own_axes(f: Factor, entries: Mapping[str, int]) -> tuple[str, ...]:
    """Its axes: variances of numbers, or a matrix of each vector."""
    return (*entries, EVENT_TOO) if f._family.event_dim else tuple(entries)


def spread_of(r: Residual, own: Named) -> Array:
    """The trace of the covariance of whitened observations."""
    assert r.whitening is not None
    first, second = (
        Named(r.whitening.array, tuple(new.get(a, a) for a in r.whitening.axes))
        for new in ({EVENT: DIM, EVENT_TOO: EVENT}, {EVENT: DIM})
    )
    return contract((), first, second, own).array

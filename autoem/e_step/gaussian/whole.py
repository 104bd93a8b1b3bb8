"""Gaussian latents of several plates whose cells are all tied: what is the same however they are eliminated.

In: the factors of such a group, and for every row the cells that it reads. Out: quadratics by row, nodes and
statistics by what `gathered` tells of the latents that a row reads.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.gaussian import kalman
from autoem.e_step.gaussian.block import index_name
from autoem.e_step.gaussian.pooled import pooled_statistics
from autoem.e_step.gaussian.quadratic import DIM, LOG_2PI, OTHER, Residual, filled, quadratic_terms, residuals
from autoem.e_step.tables.completions import NODES, gaussian_nodes
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named, named
from autoem.ir import Continuous, Latent


class Term(NamedTuple):
    """A quadratic for each of some rows, and the cell of each latent that it reads.

    Precision `(rows, k, k)`, or `(1, k, k)` where it is the same in all of them, and shift `(rows, k)`.
    """

    cells: Mapping[str, Array]
    precision: Array
    shift: Array


@dataclasses.dataclass(frozen=True, eq=False)
class AbstractWhole(abc.ABC):
    """A block whose integral is one number.

    Attributes:
        members: the latents.
        factors: the sites that read them.
        sizes: sizes of all plates.
    """

    members: tuple[Continuous, ...]
    factors: tuple[Factor, ...]
    sizes: Mapping[str, int]

    plates: tuple[str, ...] = dataclasses.field(default=(), init=False)
    shape: tuple[int, ...] = dataclasses.field(default=(), init=False)
    discrete: tuple[Latent, ...] = dataclasses.field(default=(), init=False)
    states: tuple[str, ...] = dataclasses.field(default=(), init=False)

    strategy = "exact"

    @abc.abstractmethod
    def gathered(self, f: Factor, moments: Any, cells: Mapping[str, Array]) -> tuple[Array, Array]:
        """Mean `(rows, d)` and covariance `(rows, d, d)` of the latents that the rows of a factor read."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.members)

    @property
    def by_name(self) -> dict[str, Continuous]:
        return {m.name: m for m in self.members}

    def read(self, f: Factor) -> tuple[str, ...]:
        assert f.completions is not None
        return tuple(m.name for m in f.completions.members)

    def index(self, f: Factor, cells: Mapping[str, Array]) -> dict[str, Array]:
        """The cell of each latent that every row of a factor reads."""
        return {n: cells[index_name(f, self.by_name[n])].ravel() for n in self.read(f)}

    def layout_of(self, f: Factor) -> tuple[tuple[str, ...], list[int]]:
        """The plates of a factor's rows, and their sizes."""
        plates = tuple(a for a in f.site.axes if a in f.site.plates)
        return plates, [self.sizes[p] for p in plates]

    def term(self, f: Factor, r: Residual, cells: Mapping[str, Array]) -> tuple[Term, Array]:
        """The quadratic of a factor in every row, or in one where all are alike, and the sum of its constants."""
        plates, sizes = self.layout_of(f)
        precision, shift, constant = quadratic_terms(f, r, plates)
        count, d = math.prod(sizes), sum(self.by_name[n].dim for n in self.read(f))
        if set(precision.axes) & set(plates):
            p = jnp.broadcast_to(precision.to((*plates, DIM, OTHER)), (*sizes, d, d)).reshape(count, d, d)
        else:
            p = jnp.broadcast_to(precision.to((DIM, OTHER)), (d, d))[None]
        s = jnp.broadcast_to(shift.to((*plates, DIM)), (*sizes, d)).reshape(count, d)
        return Term(self.index(f, cells), p, s), self.constant(f, constant, cells).array

    def of_factor(self, f: Factor, moments: Any, cells: Mapping[str, Array]) -> tuple[Named, Named]:
        """Mean and covariance of the latents that the rows of a factor read, along its plates."""
        plates, sizes = self.layout_of(f)
        mean, covariance = self.gathered(f, moments, cells)
        d = mean.shape[-1]
        whole = named(covariance.reshape(*sizes, d, d), (*plates, DIM, OTHER))
        return named(mean.reshape(*sizes, d), (*plates, DIM)), whole

    def complete(self, f: Factor, moments: Any, cells: Mapping[str, Array]) -> tuple[Array, Named | None]:
        """The factor's nodes as its arguments want them, and its own latent's values there."""
        plates, sizes = self.layout_of(f)
        nodes = gaussian_nodes(*self.gathered(f, moments, cells))
        return filled(f, named(nodes.reshape(nodes.shape[0], *sizes, -1), (NODES, *plates, DIM)))

    def pooled(self, f: Factor, rows: Rows, moments: Any, weight: Named, cells: Mapping[str, Array]):
        """Expected statistics of a site that is one regression on its latents for all rows."""
        mean, covariance = self.of_factor(f, moments, cells)
        if not any(w.axes for w in (weight, rows.mask, rows.scale) if w is not None):
            alike = self.mean_covariance(f, moments, cells)  # rows count alike: their mean will do
            covariance = covariance if alike is None else named(alike, (DIM, OTHER))
        return pooled_statistics(f, rows, mean, covariance, weight)

    def mean_covariance(self, f: Factor, moments: Any, cells: Mapping[str, Array]) -> Array | None:
        """The covariance of what a row of a factor reads, in the mean of its rows; None where none is at hand."""
        del f, moments, cells
        return None

    def given(self, f: Factor, latents: Mapping[str, Array], cells: Mapping[str, Array]) -> Array:
        """Values of the latents as the rows of a factor read them, `(rows, d)`."""
        index = self.index(f, cells)
        parts = [jnp.reshape(latents[n], (-1, self.by_name[n].dim))[index[n]] for n in self.read(f)]
        return jnp.concatenate(parts, -1)

    def at(self, f: Factor, latents: Mapping[str, Array], cells: Mapping[str, Array]) -> tuple[Array, Named | None]:
        """One node for the factor, where the latents have given values."""
        plates, sizes = self.layout_of(f)
        return filled(f, named(self.given(f, latents, cells).reshape(*sizes, -1), (*plates, DIM)))

    def density_at(self, latents: Mapping[str, Array], values, rows, cells) -> Named:
        """Log density of all sites by the quadratics that are integrated."""
        total = jnp.zeros(())
        for f, r in residuals(self.factors, values, rows, proper=False):
            term, constant = self.term(f, r, cells)
            w = self.given(f, latents, cells)
            total = total + constant + (w * term.shift).sum() - 0.5 * jnp.einsum("ri,rij,rj->", w, term.precision, w)
        return Named(total, ())

    def constant(self, f: Factor, value: Named, cells: Mapping[str, Array]) -> Named:
        """A quantity of the rows of a factor, summed over all of them."""
        del cells
        absent = [self.sizes[p] for p in f.site.plates if p not in value.axes]
        return Named(value.array.sum() * float(np.prod(absent, dtype=float)), ())

    def by_row(self, f: Factor, value: Named, cells: Mapping[str, Array]) -> Named:
        """A quantity of the whole group as the rows of a factor see it."""
        del f, cells
        return value

    def mixed(self, moments: Any, weight: Named) -> Any:
        """The same with the discrete latents beside it summed out: there are none."""
        del weight
        return moments


def solved(matrix: Array, vector: Array) -> tuple[kalman.Given, Array]:
    """The law of a vector with this precision and shift, and its integral's constant."""
    size, real = len(vector), vector.dtype
    if not size:
        return kalman.Given(matrix, jnp.zeros((0, 0), real), vector), jnp.zeros((), real)
    unit = 1 / jnp.sqrt(jnp.diagonal(matrix))
    factor = jnp.linalg.cholesky(matrix * unit[:, None] * unit)
    inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(size, dtype=real), lower=True) * unit
    spread = inverse.T @ inverse
    mean = spread @ vector
    log_det = 2 * jnp.log(jnp.diagonal(factor) / unit).sum()
    constant = 0.5 * (mean @ vector - log_det + size * LOG_2PI)
    return kalman.Given(spread, jnp.zeros((size, 0), real), mean), constant


def at_home(value: Array, index: Array, count: int) -> Array:
    """Values of rows summed over those of each cell; what is the same in all rows counts as often as there are some."""
    if len(value) == len(index):
        return jax.ops.segment_sum(value, index, count)
    rows = jax.ops.segment_sum(jnp.ones(len(index), value.dtype), index, count)
    return rows.reshape(-1, *(1,) * (value.ndim - 1)) * value


def from_law(law: kalman.Given, rest: Array, key: Array) -> Array:
    """A draw of what a law is of, given the rest."""
    noise = jax.random.normal(key, law.shift.shape, law.shift.dtype)
    root = jnp.linalg.cholesky(0.5 * (law.spread + jnp.swapaxes(law.spread, -1, -2))) if law.shift.size else law.spread
    return law.shift - kalman.times(law.slope, rest) + kalman.times(root, noise)

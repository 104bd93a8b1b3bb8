r"""Continuous latents with a Gaussian posterior, integrated exactly.

Every site that reads them is Normal, with residual :math:`r = y - M w` after whitening, affine in the latents `w`:

.. math:: \log p = -\tfrac12 w^\top \Lambda w + \eta^\top w + c,
   \qquad \Lambda = \sum M^\top M,\quad \eta = \sum M^\top y,\quad c = -\sum \bigl(\tfrac12 y^\top y + \log\sigma\bigr)

so that the integral is :math:`c + \tfrac12 \eta^\top \Lambda^{-1} \eta - \tfrac12 \log|\Lambda| + \tfrac d2 \log 2\pi`.
In: the factors of one group of such latents and their cells. Out: the integral as a table over the discrete latents
beside them, the posterior's moments, and for each factor the nodes that stand for them in the M-step.

Where all latents of the group live in the same cells (a row, a subject), cells are integrated apart, at a cost linear
in them. Otherwise (crossed effects) all cells are one vector.

References:
    Dempster, Laird and Rubin 1977, section 4.6; Laird and Ware 1982, "Random-effects models for longitudinal data".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.elimination.layout import Table
from autoem.e_step.gaussian.pooled import pooled_statistics
from autoem.e_step.gaussian.quadratic import (
    DIM,
    LOG_2PI,
    OTHER,
    Residual,
    described,
    filled,
    quadratic_terms,
    residuals,
    summed,
)
from autoem.e_step.tables.completions import NODES, Completions, gaussian_nodes, root, rows_of, square_of
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named, add, contract, multiply, named, pick, union
from autoem.ir import Continuous, Latent

SOURCE = "Dempster, Laird and Rubin 1977, section 4.6; Laird and Ware 1982 (Gaussian posteriors)"


@dataclasses.dataclass(frozen=True)
class Moments:
    """Posterior mean and covariance of a group in its cells, given the discrete latents beside it.

    Where a cell stands for several, `about` has by site how observations go with posterior means and with each other.
    """

    mean: Named
    covariance: Named
    about: Mapping[str, tuple[Named, Named]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianBlock:
    """A group of continuous latents that is integrated at once.

    Attributes:
        members: the latents.
        discrete: the discrete latents that tell their posteriors apart.
        factors: the sites that read them, in the model's order.
        plates: plates of the cells, of sizes `shape`; none where all cells are one vector.
        routed: factors whose rows find their cells by index.
        sizes: sizes of all plates.
        base: for every latent that a factor reads, the one that it is a piece of.
    """

    members: tuple[Continuous, ...]
    discrete: tuple[Latent, ...]
    factors: tuple[Factor, ...]
    plates: tuple[str, ...]
    shape: tuple[int, ...]
    dense: bool
    routed: frozenset[str]
    sizes: Mapping[str, int]
    base: Mapping[str, str]

    strategy, source = "exact", SOURCE

    @property
    def dim(self) -> int:
        """Coordinates of one cell."""
        dims = [m.dim * int(np.prod(m.shape, dtype=int)) if self.dense else m.dim for m in self.members]
        return sum(dims)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.members)

    @property
    def states(self) -> tuple[str, ...]:
        return tuple(z.name for z in self.discrete)

    def integrate(self, values: Mapping[Any, Any], rows: Mapping[str, Rows], cells: Mapping[str, Array]):
        """`(table, moments)`: the integral over the latents, and their posterior."""
        return self.integrated(*self.quadratic(residuals(self.factors, values, rows), cells))

    def integrated(self, precision: Named, shift: Named, constant: Named) -> tuple[Table, Moments]:
        """The integral of a quadratic in each cell, and the moments of the posterior there."""
        lead = (*self.states, *self.plates)
        axes = tuple(a for a in lead if a in union(precision.axes, shift.axes))
        matrix = jnp.broadcast_to(
            precision.to((*axes, DIM, OTHER)), (*self._batch(precision, axes), self.dim, self.dim)
        )
        matrix = 0.5 * (matrix + jnp.swapaxes(matrix, -1, -2))
        unit = 1 / jnp.sqrt(jnp.diagonal(matrix, axis1=-2, axis2=-1))
        factor = jnp.linalg.cholesky(matrix * unit[..., :, None] * unit[..., None, :])
        log_det = 2 * jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1) / unit).sum(-1)
        eye = jnp.broadcast_to(jnp.eye(self.dim, dtype=matrix.dtype), matrix.shape)
        inverse = jax.scipy.linalg.solve_triangular(factor, eye, lower=True) * unit[..., None, :]
        covariance = Named(jnp.swapaxes(inverse, -1, -2) @ inverse, (*axes, DIM, OTHER))
        whole = jnp.broadcast_to(shift.to((*axes, DIM)), (*self._batch(shift, axes), self.dim))
        mean = Named(jnp.einsum("...ij,...j->...i", covariance.array, whole), (*axes, DIM))
        fit = Named(0.5 * (mean.array * whole).sum(-1), axes)
        spread = Named(-0.5 * log_det + 0.5 * self.dim * LOG_2PI, axes)
        value = add(constant, named(fit.array, fit.axes), named(spread.array, spread.axes))
        return Table(value, frozenset(self.states), frozenset(self.plates)), Moments(mean, covariance)

    def _batch(self, array: Named, axes: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(array.size(a) if a in array.axes else 1 for a in axes)

    def quadratic(self, found: Sequence[tuple[Factor, Residual]], cells: Mapping) -> tuple[Named, Named, Named]:
        """Precision, precision times mean, and constant of every cell, summed over the rows of all factors."""
        parts = [self.terms(f, r, cells) for f, r in found]
        return tuple(add(*terms) for terms in zip(*parts, strict=True))  # type: ignore[return-value]

    def terms(self, f: Factor, r: Residual, cells: Mapping[str, Array]) -> tuple[Named, Named, Named]:
        """What one factor adds to them."""
        precision, shift, constant = quadratic_terms(f, r, self._kept(f))
        if f.name in self.routed and not self.dense:
            precision = self._by_index(f, precision, (DIM, OTHER), cells)
            shift = self._by_index(f, shift, (DIM,), cells)
        return *self._widened(f, precision, shift, cells), self._home(f, constant, cells)

    def _kept(self, f: Factor) -> tuple[str, ...]:
        """Axes that tell cells apart, or rows where rows find their cells by index."""
        source = f.site.plates if f.name in self.routed or self.dense else self.plates
        return (*self.states, *(a for a in f.site.axes if a in source))

    def constant(self, f: Factor, value: Named, cells: Mapping[str, Array]) -> Named:
        """A quantity of the rows of a factor, summed over those of each cell."""
        return self._home(f, summed(f, self._kept(f), value), cells)

    def _home(self, f: Factor, value: Named, cells: Mapping[str, Array]) -> Named:
        """Rows brought to the cells that they read."""
        if self.dense:
            absent = [self.sizes[p] for p in f.site.plates if p not in value.axes]
            return Named(value.array.sum() * float(np.prod(absent, dtype=float)), ())
        return self._by_index(f, value, (), cells) if f.name in self.routed else value

    def _by_index(self, f: Factor, value: Named, dims: tuple[str, ...], cells: Mapping[str, Array]) -> Named:
        """Add each row to the cell that it reads."""
        source = f.site.plates
        lead = (*(a for a in self.states if a in value.axes), *(d for d in dims if d in value.axes))
        array = value.to((*source, *lead))
        array = jnp.broadcast_to(array, (*(self.sizes[p] for p in source), *array.shape[len(source) :]))
        flat = array.reshape(-1, *array.shape[len(source) :])
        home = jax.ops.segment_sum(flat, cells[self._index(f)].ravel(), int(np.prod(self.shape)))
        return Named(home.reshape(*self.shape, *home.shape[1:]), (*self.plates, *lead))

    def _widened(self, f: Factor, precision: Named, shift: Named, cells) -> tuple[Named, Named]:
        """Coordinates of the factor's latents as coordinates of the group's."""
        group = f.completions
        assert group is not None
        d = group.dim
        if self.dense:
            where = self.positions(f, cells)
            count = len(where)
            source = f.site.plates
            sizes = [self.sizes[p] for p in source]
            p = jnp.broadcast_to(precision.to((*source, DIM, OTHER)), (*sizes, d, d)).reshape(count, d, d)
            s = jnp.broadcast_to(shift.to((*source, DIM)), (*sizes, d)).reshape(count, d)
            matrix = jnp.zeros((self.dim, self.dim), p.dtype).at[where[:, :, None], where[:, None, :]].add(p)
            return Named(matrix, (DIM, OTHER)), Named(jnp.zeros(self.dim, s.dtype).at[where].add(s), (DIM,))
        where = group.within(self.members)
        return widened(precision, (DIM, OTHER), where, self.dim), widened(shift, (DIM,), where, self.dim)

    def _index(self, f: Factor) -> str:
        assert f.completions is not None
        return index_name(f, f.completions.members[0])

    def positions(self, f: Factor, cells: Mapping[str, Array]) -> Array:
        """Of every row of a factor, where its latents' coordinates stand in the one vector of all cells."""
        starts = np.cumsum([0, *(m.dim * int(np.prod(m.shape, dtype=int)) for m in self.members)])
        offset = {m.name: starts[i] for i, m in enumerate(self.members)}
        assert f.completions is not None
        parts = []
        for m in f.completions.members:
            index = cells[index_name(f, m)].ravel()
            parts.append(offset[self.base[m.name]] + index[:, None] * m.dim + np.arange(m.dim))
        return jnp.concatenate(parts, 1)

    def nodes(self, f: Factor, moments: Moments, cells: Mapping[str, Array]) -> Named:
        """The nodes of one factor: coordinates of its latents, with axes `NODES` and `DIM`."""
        assert f.completions is not None
        if self.dense:
            where = self.positions(f, cells)
            mean = moments.mean.array[where]
            covariance = moments.covariance.array[where[:, :, None], where[:, None, :]]
            nodes = gaussian_nodes(mean, covariance)
            sizes = [self.sizes[p] for p in f.site.plates]
            return named(nodes.reshape(nodes.shape[0], *sizes, -1), (NODES, *f.site.plates, DIM))
        where = f.completions.within(self.members)
        axes = moments.mean.axes[:-1]
        mean = moments.mean.array[..., rows_of(where)]
        covariance = square_of(moments.covariance.array, where)
        batch = jnp.broadcast_shapes(mean.shape[:-1], covariance.shape[:-2])
        mean = jnp.broadcast_to(mean, (*batch, mean.shape[-1]))
        return named(gaussian_nodes(mean, covariance), (NODES, *axes, DIM))

    def by_row(self, f: Factor, value: Named, cells: Mapping[str, Array]) -> Named:
        """A quantity of the cells as the rows of a factor see it."""
        if self.dense or f.name not in self.routed or not set(value.axes) & set(self.plates):
            return value
        rest = tuple(a for a in value.axes if a not in self.plates)
        flat = value.to((*self.plates, *rest))
        flat = jnp.broadcast_to(flat, (*self.shape, *flat.shape[len(self.shape) :]))
        flat = flat.reshape(-1, *flat.shape[len(self.shape) :])
        index = cells[self._index(f)].ravel()
        sizes = [self.sizes[p] for p in f.site.plates]
        return named(flat[index].reshape(*sizes, *flat.shape[1:]), (*f.site.plates, *rest))

    def complete(self, f: Factor, moments: Moments, cells: Mapping[str, Array]) -> tuple[Array, Named | None]:
        """The factor's nodes as its arguments want them, and its own latent's values there."""
        return filled(f, self.by_row(f, self.nodes(f, moments, cells), cells))

    def pooled(self, f: Factor, rows: Rows, moments: Moments, weight: Named, cells: Mapping[str, Array]):
        """Expected statistics of a site that is one regression on its latents for all rows."""
        assert f.completions is not None
        if self.dense:
            where = self.positions(f, cells)
            sizes = [self.sizes[p] for p in f.site.plates]
            mean = moments.mean.array[where].reshape(*sizes, -1)
            square = moments.covariance.array[where[:, :, None], where[:, None, :]]
            covariance = named(square.reshape(*sizes, *square.shape[1:]), (*f.site.plates, DIM, OTHER))
            return pooled_statistics(f, rows, named(mean, (*f.site.plates, DIM)), covariance, weight)
        where = f.completions.within(self.members)
        axes = moments.mean.axes[:-1]
        mean = named(moments.mean.array[..., rows_of(where)], (*axes, DIM))
        covariance = named(square_of(moments.covariance.array, where), (*moments.covariance.axes[:-2], DIM, OTHER))
        mean, covariance, weight = (self.by_row(f, v, cells) for v in (mean, covariance, weight))
        return pooled_statistics(f, rows, mean, covariance, weight, moments.about.get(f.name))

    def at(self, f: Factor, latents: Mapping[str, Array], cells: Mapping[str, Array]) -> tuple[Array, Named | None]:
        """The same with one node, where the latents have given values."""
        assert f.completions is not None
        vector = self.coordinates(latents)
        if self.dense:
            rows = vector.array[self.positions(f, cells)]
            sizes = [self.sizes[p] for p in f.site.plates]
            return filled(f, named(rows.reshape(*sizes, -1), (*f.site.plates, DIM)))
        chosen = vector.to((*self.plates, DIM))[..., f.completions.within(self.members)]
        return filled(f, self.by_row(f, named(chosen, (*self.plates, DIM)), cells))

    def coordinates(self, latents: Mapping[str, Array]) -> Named:
        """Values of the latents as coordinates of every cell, or of all cells in one vector."""
        if self.dense:
            return Named(jnp.concatenate([jnp.ravel(latents[n]) for n in self.names]), (DIM,))
        parts = [jnp.reshape(latents[m.name], (*self.shape, m.dim)) for m in self.members]
        return named(jnp.concatenate(parts, -1), (*self.plates, DIM))

    def density_at(self, latents: Mapping[str, Array], values, rows, cells) -> Named:
        """Log density of all sites by the quadratic form that is integrated."""
        precision, shift, constant = self.quadratic(residuals(self.factors, values, rows, proper=False), cells)
        w = self.coordinates(latents)
        other, keep = Named(w.array, tuple(OTHER if a == DIM else a for a in w.axes)), (*self.states, *self.plates)
        linear, square = contract(keep, shift, w), contract(keep, precision, w, other)
        return add(constant, linear, Named(-0.5 * square.array, square.axes))

    def mixed(self, moments: Moments, weight: Named) -> Moments:
        """Moments with the discrete latents beside them summed out, whose probabilities are `weight`."""
        mean = multiply(moments.mean, weight).sum(self.states)
        second = add(moments.covariance, product(moments.mean))
        square = product(mean)
        return Moments(mean, add(multiply(second, weight).sum(self.states), Named(-square.array, square.axes)))

    def marginal(self, m: Continuous, moments: Moments) -> tuple[Array, Array]:
        """Mean `(*shape, *event)` and covariance `(*shape, dim, dim)` of one latent in every of its cells."""
        where = self._place(m)
        if self.dense:
            mean, covariance = moments.mean.array[where], moments.covariance.array[where[:, :, None], where[:, None, :]]
        else:
            mean = jnp.broadcast_to(moments.mean.to((*self.plates, DIM)), (*self.shape, self.dim))[..., where]
            whole = moments.covariance.to((*self.plates, DIM, OTHER))
            whole = jnp.broadcast_to(whole, (*self.shape, self.dim, self.dim))
            covariance = whole[..., where[:, None], where[None, :]]
        return mean.reshape(*m.shape, *m.event), covariance.reshape(*m.shape, m.dim, m.dim)

    def _place(self, m: Continuous) -> np.ndarray:
        """A latent's coordinates in a cell, or (cells, coordinates) in the one vector."""
        if not self.dense:
            return Completions(self.members).span(m.name)
        before = self.members[: self.names.index(m.name)]
        start = sum(o.dim * int(np.prod(o.shape, dtype=int)) for o in before)
        cells = int(np.prod(m.shape, dtype=int))
        return start + np.arange(cells * m.dim).reshape(cells, m.dim)

    def draw(self, moments: Moments, chosen: Mapping[str, Array], key: Array | None) -> dict[str, Array]:
        """Values of the latents given those of the discrete ones: drawn with `key`, or their mean without."""
        mean, covariance = moments.mean, moments.covariance
        for z in self.discrete:
            index = named(jnp.asarray(chosen[z.name]), z.axes)
            mean, covariance = pick(mean, z.name, index), pick(covariance, z.name, index)
        vector = jnp.broadcast_to(mean.to((*self.plates, DIM)), (*self.shape, self.dim))
        if key is not None:
            noise = jax.random.normal(key, vector.shape, vector.dtype)
            vector = vector + jnp.einsum("...ij,...j->...i", root(covariance.to((*self.plates, DIM, OTHER))), noise)
        return {m.name: vector[..., self._place(m)].reshape(*m.shape, *m.event) for m in self.members}

    def reason(self, m: Continuous) -> str:
        """How the latent is treated, in words."""
        cells = int(np.prod(m.shape, dtype=int))
        size = f"{m.dim} dimension{'s' * (m.dim > 1)}"
        reason = described(m)
        reason += f"; {cells:,} cells of {size}" if cells > 1 else f"; {size}"
        if len(self.members) > 1:
            reason += f", together with {', '.join(n for n in self.names if n != m.name)}"
        if self.discrete:
            reason += f"; a Gaussian for each state of {', '.join(self.states)}"
        if self.dense:
            reason += f"; all cells are one vector of {self.dim:,}, since rows read them by different indices"
        elif self.routed:
            reason += "; rows find their cell by index"
        return reason


def widened(value: Named, dims: tuple[str, ...], where: np.ndarray, dim: int) -> Named:
    """Coordinates of a factor's latents, along the axes `dims`, as those at the places `where` among `dim` of them."""
    if set(dims) <= set(value.axes) and np.array_equal(where, np.arange(dim)):
        return value
    axes = (*(a for a in value.axes if a not in dims), *dims)
    array = value.to(axes)
    batch = array.shape[: len(axes) - len(dims)]
    array = jnp.broadcast_to(array, (*batch, *(len(where) for _ in dims)))
    room = jnp.zeros((*batch, *(dim for _ in dims)), array.dtype)
    return Named(room.at[(..., *np.ix_(*(where for _ in dims)))].set(array), axes)


def product(mean: Named) -> Named:
    """A vector times itself, as a matrix."""
    return multiply(mean, Named(mean.array, tuple(OTHER if a == DIM else a for a in mean.axes)))


def index_name(f: Factor, member: Continuous) -> str:
    """Under what the cells of a latent, as a factor's rows read them, stand among the data's cells."""
    return f"{f.name}·{member.name}"

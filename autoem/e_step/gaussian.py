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
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._named import Named, add, contract, named, union
from autoem.e_step.completions import NODES, gaussian_nodes
from autoem.e_step.layout import Table
from autoem.e_step.tables import Factor, Rows
from autoem.ir import Continuous, Latent

SOURCE = "Dempster, Laird and Rubin 1977, section 4.6; Laird and Ware 1982 (Gaussian posteriors)"
DIM, OTHER, EVENT = "·dim", "·dim'", "·event"
LOG_2PI = math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Residual:
    """A Normal site as `y - M w`, whitened: `slope` is `M` along `DIM`, `log_scale` the log of the divisor."""

    y: Named
    slope: Named
    log_scale: Named
    weight: Named | None
    mask: Named | None


@dataclasses.dataclass(frozen=True)
class Moments:
    """Posterior mean and covariance of a group in its cells, given the discrete latents beside it."""

    mean: Named
    covariance: Named


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
        precision, shift, constant = self.quadratic(values, rows, cells)
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
        value = add(constant, _fewer(fit), _fewer(spread))
        return Table(value, frozenset(self.states), frozenset(self.plates)), Moments(mean, covariance)

    def _batch(self, array: Named, axes: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(array.size(a) if a in array.axes else 1 for a in axes)

    def quadratic(self, values, rows, cells) -> tuple[Named, Named, Named]:
        """Precision, precision times mean, and constant of every cell, summed over the rows of all factors."""
        parts = [self.terms(f, residual(f, values, rows[f.name]), rows[f.name], cells) for f in self.factors]
        return tuple(add(*terms) for terms in zip(*parts, strict=True))  # type: ignore[return-value]

    def terms(self, f: Factor, r: Residual, rows: Rows, cells: Mapping[str, Array]) -> tuple[Named, Named, Named]:
        """What one factor adds to them."""
        weights = [w for w in (r.weight, r.mask) if w is not None]
        other = Named(r.slope.array, tuple(OTHER if a == DIM else a for a in r.slope.axes))
        own = -0.5 * LOG_2PI * self._elements(f) if f.is_hidden else 0.0
        inner = self._inner(f)
        square = Named(-0.5 * r.y.array**2, r.y.axes)
        precision = self._home(f, inner, (DIM, OTHER), cells, r.slope, other, *weights)
        shift = self._home(f, inner, (DIM,), cells, r.slope, r.y, *weights)
        constant = self._home(f, inner, (), cells, square, *weights)
        scale = self._home(f, tuple(a for a in inner if a != EVENT), (), cells, minus(r.log_scale, own), *weights)
        whole = self._widened(f, precision, shift, cells)
        return *whole, add(constant, scale)

    def constant(self, f: Factor, value: Named, cells: Mapping[str, Array]) -> Named:
        """A quantity of the rows of a factor, summed over those of each cell."""
        return self._home(f, tuple(a for a in self._inner(f) if a != EVENT), (), cells, value)

    def _elements(self, f: Factor) -> int:
        """Scalars in one event of a latent's own site, `log 2 pi` of each of which the constants leave to be said."""
        return int(np.prod(member_of(f).event[len(self._events(f)) :], dtype=int))

    def _events(self, f: Factor) -> tuple[str, ...]:
        return tuple(a for a in f.site.axes if a.startswith("#") and not a.startswith("#unit"))

    def _inner(self, f: Factor) -> tuple[str, ...]:
        """Axes of the factor that are summed within one cell, or one row where rows find their cells by index."""
        source = f.site.plates if f.name in self.routed or self.dense else self.plates
        return tuple(a for a in (*f.site.axes, EVENT) if a not in source)

    def _home(self, f: Factor, inner, dims: tuple[str, ...], cells: Mapping[str, Array], *terms: Named) -> Named:
        """A product of terms, summed over the rows of each cell."""
        size = {**dict(zip(f.site.axes, f.site.shape, strict=True))}
        present = {a for t in terms for a in t.axes}
        kept = (*self.states, *(a for a in f.site.axes if a not in inner), *dims)
        times = float(np.prod([size[a] for a in inner if a in size and a not in present], dtype=float))
        out = contract(kept, *terms)
        out = out if times == 1 else Named(out.array * times, out.axes)
        if self.dense:
            return out if dims else self._total(f, out)
        return self._by_index(f, out, dims, cells) if f.name in self.routed else out

    def _total(self, f: Factor, value: Named) -> Named:
        absent = [
            s for a, s in zip(f.site.axes, f.site.shape, strict=True) if a in f.site.plates and a not in value.axes
        ]
        return Named(value.array.sum() * float(np.prod(absent, dtype=float)), ())

    def _by_index(self, f: Factor, value: Named, dims: tuple[str, ...], cells: Mapping[str, Array]) -> Named:
        """Add each row to the cell that it reads."""
        source = f.site.plates
        lead = (*(a for a in self.states if a in value.axes), *(d for d in dims if d in value.axes))
        array = value.to((*source, *lead))
        array = jnp.broadcast_to(array, (*(self.sizes[p] for p in source), *array.shape[len(source) :]))
        flat = array.reshape(-1, *array.shape[len(source) :])
        home = jax.ops.segment_sum(flat, cells[index_name(f, self.members[0])].ravel(), int(np.prod(self.shape)))
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
        rest = tuple(a for a in precision.axes if a not in (DIM, OTHER))
        p = precision.to((*rest, DIM, OTHER))
        p = jnp.broadcast_to(p, (*p.shape[:-2], d, d))
        matrix = jnp.zeros((*p.shape[:-2], self.dim, self.dim), p.dtype).at[..., where[:, None], where[None, :]].set(p)
        others = tuple(a for a in shift.axes if a != DIM)
        s = shift.to((*others, DIM))
        s = jnp.broadcast_to(s, (*s.shape[:-1], d))
        vector = jnp.zeros((*s.shape[:-1], self.dim), s.dtype).at[..., where].set(s)
        return Named(matrix, (*rest, DIM, OTHER)), Named(vector, (*others, DIM))

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
        mean = moments.mean.array[..., where]
        covariance = moments.covariance.array[..., where[:, None], where[None, :]]
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
        index = cells[index_name(f, self.members[0])].ravel()
        sizes = [self.sizes[p] for p in f.site.plates]
        return named(flat[index].reshape(*sizes, *flat.shape[1:]), (*f.site.plates, *rest))

    def complete(self, f: Factor, moments: Moments, cells: Mapping[str, Array]) -> tuple[Array, Named | None]:
        """The factor's nodes as its arguments want them, and its own latent's values there."""
        return self._filled(f, self.by_row(f, self.nodes(f, moments, cells), cells))

    def at(self, f: Factor, latents: Mapping[str, Array], cells: Mapping[str, Array]) -> tuple[Array, Named | None]:
        """The same with one node, where the latents have given values."""
        assert f.completions is not None
        vector = self.coordinates(latents)
        if self.dense:
            rows = vector.array[self.positions(f, cells)]
            sizes = [self.sizes[p] for p in f.site.plates]
            return self._filled(f, named(rows.reshape(*sizes, -1), (*f.site.plates, DIM)))
        chosen = vector.to((*self.plates, DIM))[..., f.completions.within(self.members)]
        return self._filled(f, self.by_row(f, named(chosen, (*self.plates, DIM)), cells))

    def coordinates(self, latents: Mapping[str, Array]) -> Named:
        """Values of the latents as coordinates of every cell, or of all cells in one vector."""
        if self.dense:
            return Named(jnp.concatenate([jnp.ravel(latents[n]) for n in self.names]), (DIM,))
        parts = [jnp.reshape(latents[m.name], (*self.shape, m.dim)) for m in self.members]
        return named(jnp.concatenate(parts, -1), (*self.plates, DIM))

    def _filled(self, f: Factor, nodes: Named) -> tuple[Array, Named | None]:
        own = self._own_value(f, nodes) if f.is_hidden else None
        return nodes.to((*(z.name for z in f.parents), NODES, DIM, *f.site.axes)), own

    def _own_value(self, f: Factor, nodes: Named) -> Named:
        """Values of a latent at its nodes, as the data of its own site."""
        assert f.completions is not None and f.family is not None
        member = member_of(f)
        where = f.completions.span(f.name)
        rest = tuple(a for a in nodes.axes if a != DIM)
        array = nodes.to((*rest, DIM))[..., where]
        array = array.reshape(*array.shape[:-1], *member.event)
        events = self._events(f)
        base = tuple(f"event{i}" for i in range(f.family.event_dim))
        axes = (*rest, *events, *base)
        order = (*base, *rest, *events)
        value = Named(array, axes)
        return Named(value.to(order), order)


def member_of(f: Factor) -> Continuous:
    """A latent's own site's latent."""
    assert f.completions is not None
    return next(m for m in f.completions.members if m.name == f.name)


def index_name(f: Factor, member: Continuous) -> str:
    """Under what the cells of a latent, as a factor's rows read them, stand among the data's cells."""
    return f"{f.name}·{member.name}"


def minus(value: Named, own: float) -> Named:
    return Named(own - value.array, value.axes)


def _fewer(value: Named) -> Named:
    return named(value.array, value.axes)


def residual(f: Factor, values: Mapping[Any, Any], rows: Rows) -> Residual:
    """A Normal factor, whitened, as an affine function of its latents' coordinates."""
    family, group = f._family, f.completions
    assert group is not None
    axes = (*(z.name for z in f.parents), DIM, *f.site.axes)
    vector = family.event_dim
    args = {
        a: f.argument(f"arg:{a}", values, d, at_points=True) for a, d in zip(family.args, family.arg_dims, strict=True)
    }
    if family.standardise is not None and rows.centre is not None and rows.spread is not None:
        args = family.standardise(args, rows.centre, rows.spread)
    loc, at = args["loc"], len(f.parents)
    first = jnp.take(loc, jnp.arange(1), at)
    slope = jnp.take(loc, jnp.arange(1, loc.shape[at]), at) - first
    own = next((m for m in group.members if m.name == f.name), None)
    if slope.shape[at] == 0:
        slope = jnp.zeros((*slope.shape[:at], group.dim, *slope.shape[at + 1 :]), loc.dtype)
    if own is not None:
        unit = np.zeros((group.dim, *own.event))
        unit.reshape(group.dim, -1)[group.span(f.name)] = np.eye(own.dim)
        outer = slope.ndim - at - 1 - len(own.event)
        slope = slope - unit.reshape(group.dim, *(1,) * outer, *own.event)
        y = -first
    else:
        x = f.observations(rows)
        y = x.to((*f.site.axes, *x.axes[:vector])) - first
    y, slope, log_scale = whitened(args, y, slope, vector)
    named_axes = (*axes, EVENT) if vector else axes
    mask = None if rows.mask is None else Named(rows.mask.array.astype(log_scale.dtype), rows.mask.axes)
    return Residual(named(y, named_axes), named(slope, named_axes), named(log_scale, axes), rows.scale, mask)


def whitened(args: Mapping[str, Array], y: Array, slope: Array, vector: int) -> tuple[Array, Array, Array]:
    """Residuals and slopes divided by the scale, or by the root of the covariance; and its log determinant."""
    if not vector:
        scale = args["scale"]
        return y / scale, slope / scale, jnp.log(scale)
    form, matrix = next((k, v) for k, v in args.items() if k != "loc")
    if form == "precision_matrix":
        upper = jnp.swapaxes(jnp.linalg.cholesky(matrix), -1, -2)
        log_det = -jnp.log(jnp.diagonal(upper, axis1=-2, axis2=-1)).sum(-1)
        return _times(upper, y), _times(upper, slope), log_det
    lower = jnp.linalg.cholesky(matrix) if form == "covariance_matrix" else matrix
    eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
    log_det = jnp.log(jnp.abs(jnp.diagonal(lower, axis1=-2, axis2=-1))).sum(-1)
    return _times(inverse, y), _times(inverse, slope), log_det


def _times(matrix: Array, vectors: Array) -> Array:
    return jnp.einsum("...ij,...j->...i", matrix, vectors)

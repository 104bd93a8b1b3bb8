r"""A Normal site as a quadratic in its continuous latents.

In: a factor at given parameters, with its rows. Out: the residual `y - M w`, whitened; precision, shift and constant
summed over any of its axes; and nodes in the form that the factor's arguments and rows take.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.tables.completions import NODES
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named, add, contract, multiply, named
from autoem.ir import Continuous

DIM, OTHER, EVENT, EVENT_TOO = "·dim", "·dim'", "·event", "·event'"
LOG_2PI = math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Residual:
    """A Normal site as `y - M w`, whitened: `slope` is `M` along `DIM`, `log_scale` the log of the divisor.

    `whitening` is what observations were multiplied by: a number each, or for vectors a matrix, along `EVENT` of the
    residual and `EVENT_TOO` of what was observed.
    """

    y: Named
    slope: Named
    log_scale: Named
    weight: Named | None
    mask: Named | None
    whitening: Named | None = None


def described(m: Continuous) -> str:
    """Why a latent is integrated so, in words."""
    prior = "flat over all numbers, and " if m.flat else ""
    return f"Gaussian: {prior}every site that reads it is Normal with a mean affine in it"


def quadratic_terms(f: Factor, r: Residual, keep: Sequence[str]) -> tuple[Named, Named, Named]:
    """Precision, precision times mean, and constant, with the axes `keep` and summed over all others."""
    weights = [w for w in (r.weight, r.mask) if w is not None]
    other = Named(r.slope.array, tuple(OTHER if a == DIM else a for a in r.slope.axes))
    own = -0.5 * LOG_2PI * elements(f) if f.is_hidden or f.value_hidden else 0.0
    square = Named(-0.5 * r.y.array**2, r.y.axes)
    log_scale = Named(own - r.log_scale.array, r.log_scale.axes)
    precision = summed(f, (*keep, DIM, OTHER), r.slope, other, *weights)
    shift = summed(f, (*keep, DIM), r.slope, r.y, *weights)
    return precision, shift, add(summed(f, keep, square, *weights), summed(f, keep, log_scale, *weights))


def residuals(
    factors: Sequence[Factor], values: Mapping[Any, Any], rows: Mapping[str, Rows], proper: bool = True
) -> list[tuple[Factor, Residual]]:
    """The residuals of all factors; with `proper` a standard Normal stands in for every latent that a mask takes out.

    Its integral is one, as if the latent were not there, and its moments are finite.
    """
    found = [(f, residual(f, values, rows[f.name])) for f in factors]
    masked = [(f, r.mask) for f, r in found if f.is_hidden and r.mask is not None]
    return found + [(f, stand_in(f, mask)) for f, mask in masked] if proper else found


def stand_in(f: Factor, mask: Named) -> Residual:
    """A standard Normal for a latent's own coordinates, where the mask is zero."""
    assert f.completions is not None and f.family is not None
    zero = Named(jnp.zeros((), mask.array.dtype), ())
    slope = jnp.asarray(unit_slope(f), mask.array.dtype)
    vector = (EVENT,) if f.family.event_dim else ()
    return Residual(zero, named(slope, (DIM, *events_of(f), *vector)), zero, None, Named(1 - mask.array, mask.axes))


def unit_slope(f: Factor) -> np.ndarray:
    """By coordinate of what a latent's own site reads, the latent's value where that coordinate is one."""
    assert f.completions is not None
    unit = np.zeros((f.completions.dim, *event_of(f)))
    unit.reshape(f.completions.dim, -1)[f.completions.span(f.name)] = np.eye(member_of(f).dim)
    return unit


def summed(f: Factor, keep: Sequence[str], *terms: Named) -> Named:
    """A product of terms over the axes of a factor, summed over those that are not kept."""
    present = {a for t in terms for a in t.axes}
    absent = [s for a, s in zip(f.site.axes, f.site.shape, strict=True) if a not in present and a not in keep]
    out = contract(keep, *terms)
    times = float(np.prod(absent, dtype=float))
    return out if times == 1 else Named(out.array * times, out.axes)


def elements(f: Factor) -> int:
    """Scalars in one event of a site, `log 2 pi` of each of which its constants leave to be said where it has none."""
    shape = f.graph.shape((f.name, "value"))
    return int(np.prod(shape[len(shape) - f._family.event_dim :], dtype=int))


def filled(f: Factor, nodes: Named) -> tuple[Array, Named | None]:
    """Nodes as a factor's arguments want them, and its own latent's values there."""
    own = own_value(f, nodes) if f.is_hidden else None
    return nodes.to((*(z.name for z in f.parents), NODES, DIM, *f.site.axes)), own


def own_value(f: Factor, nodes: Named) -> Named:
    """Values of a latent at its nodes, as the data of its own site."""
    assert f.completions is not None and f.family is not None
    base, events = tuple(f"event{i}" for i in range(f.family.event_dim)), events_of(f)
    for axis in (a for a in events if a in nodes.axes):  # every row of joined cells has the whole vector
        nodes = Named(jnp.take(nodes.array, 0, nodes.axes.index(axis)), tuple(a for a in nodes.axes if a != axis))
    rest = tuple(a for a in nodes.axes if a != DIM)
    array = nodes.to((*rest, DIM))[..., f.completions.span(f.name)]
    array = array.reshape(*array.shape[:-1], *event_of(f))
    order = (*base, *rest, *events)
    return Named(Named(array, (*rest, *events, *base)).to(order), order)


def events_of(f: Factor) -> tuple[str, ...]:
    """Axes of a latent's own site that are part of its event: of `to_event`, or of joined cells."""
    return tuple(a for a in f.site.axes if a not in member_of(f).axes)


def event_of(f: Factor) -> tuple[int, ...]:
    """Sizes of the event of a latent's own site, as its family sees them: with one axis for all those of its own."""
    event, joined = member_of(f).event, len(events_of(f))
    return (*event[:joined], math.prod(event[joined:])) if len(event) > joined + 1 else event


def member_of(f: Factor) -> Continuous:
    """A latent's own site's latent."""
    assert f.completions is not None
    return next(m for m in f.completions.members if m.name == f.name)


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
    if slope.shape[at] == 0:
        slope = jnp.zeros((*slope.shape[:at], group.dim, *slope.shape[at + 1 :]), loc.dtype)
    own = next((m for m in group.members if m.name == f.name), None)
    if f.value_hidden:
        value = f.argument("value", values, vector, at_points=True)
        zero = jnp.take(value, jnp.arange(1), at)
        first = first - zero
        slope = slope - (jnp.take(value, jnp.arange(1, value.shape[at]), at) - zero)
    if own is not None:
        unit = unit_slope(f)
        sizes = iter(event_of(f))
        whole = [1 if a in own.axes else next(sizes) for a in f.site.axes]
        slope = slope - unit.reshape(group.dim, *whole, *sizes)
        y = -first
    elif f.value_hidden:
        y = -first
    elif vector:
        x = f.observations(rows)
        y = x.to((*f.site.axes, *x.axes[:vector])) - first
    else:
        y = jnp.zeros_like(first)  # put in below: large data stay in the order in which they lie
    y, slope, log_scale, whitening = whitened(args, y, slope, vector)
    named_axes = (*axes, EVENT) if vector else axes
    mask = None if rows.mask is None else Named(rows.mask.array.astype(log_scale.dtype), rows.mask.axes)
    shown = named(y, named_axes)
    if not vector and own is None and not f.value_hidden:
        x = f.observations(rows)
        x = Named(jnp.log(x.array), x.axes) if family.name == "LogNormal" else x
        away = add(x, named(-first, axes))
        shown = multiply(away, named(whitening, axes))
    by = named(whitening, (*named_axes, EVENT_TOO) if vector else axes)
    return Residual(shown, named(slope, named_axes), named(log_scale, axes), rows.scale, mask, by)


def whitened(args: Mapping[str, Array], y: Array, slope: Array, vector: int) -> tuple[Array, Array, Array, Array]:
    """Residuals and slopes divided by the scale, or by the root of the covariance; its log determinant; the divisor."""
    if not vector:
        scale = args["scale"]
        return y / scale, slope / scale, jnp.log(scale), 1 / scale
    form, matrix = next((k, v) for k, v in args.items() if k != "loc")
    if form == "precision_matrix":
        inverse = jnp.swapaxes(jnp.linalg.cholesky(matrix), -1, -2)
        log_det = -jnp.log(jnp.diagonal(inverse, axis1=-2, axis2=-1)).sum(-1)
    else:
        lower = jnp.linalg.cholesky(matrix) if form == "covariance_matrix" else matrix
        eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
        inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
        log_det = jnp.log(jnp.abs(jnp.diagonal(lower, axis1=-2, axis2=-1))).sum(-1)
    return _times(inverse, y), _times(inverse, slope), log_det, inverse


def _times(matrix: Array, vectors: Array) -> Array:
    return jnp.einsum("...ij,...j->...i", matrix, vectors)

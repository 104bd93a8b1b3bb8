r"""Closed forms within bounds, or in increasing order: where the maximum without them leaves the parameter's domain.

In: a parameter's constraint; the old value, and the maximum that takes no notice of the constraint. Out: that maximum
where it lies inside. Elsewhere the objective, which is concave, is maximised over the closed domain, on a box by
coordinates in turn, over increasing vectors by pooling adjacent violators, and the new value lies nine tenths of the
way there: inside, where free coordinates are finite, and higher than the old one.

References:
    Barlow, Bartholomew, Bremner and Brunk 1972, "Statistical inference under order restrictions" (pooling).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from numpyro.distributions import constraints

WAY = 0.9
SWEEPS = 200


@dataclasses.dataclass(frozen=True)
class Domain:
    """What a constraint lets the numbers of an array be: between two bounds; in order along its last axis or not."""

    low: float = -math.inf
    high: float = math.inf
    ordered: bool = False

    @property
    def whole(self) -> bool:
        return not self.ordered and not self.bounded

    @property
    def bounded(self) -> bool:
        return self.low > -math.inf or self.high < math.inf

    @property
    def size(self) -> float:
        """What is small beside it is no distance from a bound."""
        return self.high - self.low if math.isfinite(self.high - self.low) else 1.0

    def __str__(self) -> str:
        return ", in order" if self.ordered else ", within its bounds" if self.bounded else ""


REAL = Domain()


def bounds_of(constraint: Any) -> tuple:
    """Lower and upper bound of a constraint, None where it has none; ("array", "array") where they are no numbers."""
    low, high = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    if any(isinstance(b, Tracer) or np.ndim(b) for b in (low, high) if b is not None):
        return ("array", "array")
    return low, high


def base_of(constraint: Any) -> Any:
    """A constraint without what makes it one of whole arrays."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return constraint


def domain_of(constraint: Any) -> Domain | None:
    """The domain of a constraint; None where it is of another kind, as a simplex or a circle."""
    constraint = base_of(constraint)
    if constraint in (constraints.real, constraints.real_vector, constraints.real_matrix):
        return REAL
    if constraint is constraints.ordered_vector:
        return Domain(ordered=True)
    if constraint is constraints.positive_ordered_vector:
        return Domain(0.0, ordered=True)
    if constraint is constraints.softplus_positive:
        return Domain(0.0)
    low, high = bounds_of(constraint)
    if constraint.is_discrete or constraint is constraints.circular or "array" in (low, high) or low is high is None:
        return None
    return Domain(-math.inf if low is None else float(low), math.inf if high is None else float(high))


def part_way(old: Array, best: Array, inside: Array) -> Array:
    """`best` where it lies inside, otherwise most of the way to it."""
    return jnp.where(inside, best, old + WAY * (best - old))


def on_box(curvature: Array, slope: Array, free: Array, low: Array, high: Array) -> Array:
    """The step to the maximum of a concave quadratic on a box about zero, all but a tenth of it where a bound is met.

    The quadratic has `slope` at zero and falls by `curvature`, `(*batch, d, d)`; `free` is its maximum without bounds,
    which is what comes out where it lies inside.
    """
    batch = slope.shape[:-1]
    shapes = [jnp.broadcast_to(x, slope.shape).reshape(-1, slope.shape[-1]) for x in (slope, free, low, high)]
    steps = jax.vmap(_on_box)(curvature.reshape(-1, *curvature.shape[-2:]), *shapes)
    return steps.reshape(*batch, -1)


def _on_box(curvature: Array, slope: Array, free: Array, low: Array, high: Array) -> Array:
    diagonal = jnp.diagonal(curvature)

    def coordinate(i: int, y: Array) -> Array:
        left = slope[i] - curvature[i] @ y
        step = jnp.where(diagonal[i] > 0, left / jnp.where(diagonal[i] > 0, diagonal[i], 1), 0)
        return y.at[i].set(jnp.clip(y[i] + step, low[i], high[i]))

    def sweep(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        y, _, count = state
        new = jax.lax.fori_loop(0, len(y), coordinate, y)
        moved = jnp.abs(new - y) > 4 * jnp.finfo(y.dtype).eps * jnp.abs(new)
        return new, moved.any(), count + 1

    def going(state: tuple[Array, Array, Array]) -> Array:
        return state[1] & (state[2] < SWEEPS)

    inside = ((free > low) & (free < high)).all()
    begin = jnp.clip(free, low, high)
    best = jax.lax.while_loop(going, sweep, (begin, ~inside, jnp.zeros((), int)))[0]
    rises = slope @ best - 0.5 * best @ curvature @ best >= 0
    return part_way(jnp.zeros_like(free), jnp.where(inside, free, jnp.where(rises, best, 0)), inside)


def along(step: Array, low: Array, high: Array) -> Array:
    """A step from zero, shortened to stay well within a box."""
    room = jnp.where(step < 0, low, high)
    share = jnp.where(step != 0, room / jnp.where(step != 0, step, 1), jnp.inf).min()
    return jnp.where(share > 1, 1.0, WAY * share) * step


def in_order(old: Array, best: Array, a: Array, b: Array, pooled: Callable[[Array, Array], Array], low: float) -> Array:
    """Values increasing along the last axis, at least `low`, near the `best`, which need not be in order.

    `pooled(sum a, sum b)` is the maximum of the objectives of neighbours that are to be equal.
    """
    inside = ((jnp.diff(best, axis=-1) > 0).all(-1) & (best[..., 0] > low))[..., None]
    size = best.shape[-1]
    sums = [jnp.cumsum(x, -1) for x in jnp.broadcast_arrays(a, b)]
    first, last = np.arange(size)[:, None], np.arange(size)
    # of all runs of neighbours that hold an entry: the largest over their begins of the smallest over their ends
    blocks = [s[..., None, :] - (s - x)[..., :, None] for s, x in zip(sums, (a, b), strict=True)]
    value = jnp.where(last >= first, pooled(*blocks), jnp.inf)
    least = jax.lax.cummin(value, axis=value.ndim - 1, reverse=True)
    greatest = jnp.where(first <= last, least, -jnp.inf).max(-2)
    return part_way(old, jnp.where(inside, best, jnp.maximum(greatest, low)), inside)

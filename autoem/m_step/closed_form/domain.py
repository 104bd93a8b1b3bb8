r"""Where a constraint lets a parameter be, and the nearest place there to a maximum outside.

In: a constraint. Out: its `Domain`, an interval for every entry, and whether entries rise along the last axis. For an
objective that falls away from its maximum on both sides, entry by entry, the maximum in an interval is at the nearer
end; where entries :math:`t_j` of curvature :math:`h_j` must rise, it is their isotonic regression,

.. math:: \hat\mu_j = \max_{a \le j} \min_{b \ge j} \frac{\sum_{a}^{b} h_i t_i}{\sum_{a}^{b} h_i}.

References:
    Barlow, Bartholomew, Bremner and Brunk 1972, "Statistical Inference under Order Restrictions", section 1.4.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from numpyro.distributions import constraints

SWEEPS = 50


@dataclasses.dataclass(frozen=True)
class Domain:
    """Every entry lies between `low` and `high`; with `ordered` they rise along the last axis."""

    low: float = -math.inf
    high: float = math.inf
    ordered: bool = False

    @property
    def free(self) -> bool:
        return not self.ordered and (self.low, self.high) == (-math.inf, math.inf)

    @property
    def size(self) -> float:
        """What is small beside it is no distance from an end."""
        return self.high - self.low if math.isfinite(self.high - self.low) else 1.0

    def __str__(self) -> str:
        ends = f"{self.low:g} ... {self.high:g}"
        kept = f"kept within {ends}" if math.isfinite(self.high) else f"kept above {self.low:g}"
        kept = f"kept below {self.high:g}" if self.low == -math.inf else kept
        return "kept in order" if self.ordered else kept

    def nearest(self, target: Array, weight: Array) -> Array:
        """The maximum in the domain of an objective that has it at `target`, with curvature `weight`, elsewhere."""
        if self.ordered:
            target = isotonic(target, weight)
        return self.clipped(target)

    def clipped(self, value: Array) -> Array:
        """The nearest value between the ends; off them by a hair where free coordinates would be infinite."""
        edge = 16 * float(jnp.finfo(value.dtype).eps) * self.size
        vanishes = self.low == 0 and self.high == math.inf  # a scale or a rate may be zero
        return jnp.clip(value, self.low if vanishes else self.low + edge, self.high - edge)


REAL, POSITIVE = Domain(), Domain(0.0)


def domain_of(constraint) -> Domain | None:
    """The domain of a constraint; None where it is no such thing."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    if constraint is constraints.ordered_vector:
        return Domain(ordered=True)
    if constraint is constraints.positive_ordered_vector:
        return Domain(0.0, ordered=True)
    if constraint in (constraints.real, constraints.real_vector, constraints.real_matrix):
        return Domain()
    low, high = (getattr(constraint, end, None) for end in ("lower_bound", "upper_bound"))
    if (low is None and high is None) or not is_number(low) or not is_number(high):
        return None
    return Domain(-math.inf if low is None else float(low), math.inf if high is None else float(high))


def is_number(end: Any) -> bool:
    """Whether an end of an interval is the same for all entries, and known; None where there is none."""
    return end is None or not (isinstance(end, Tracer) or np.ndim(end))


def isotonic(target: Array, weight: Array) -> Array:
    """The rising sequence nearest to `target` along the last axis, squares weighed by `weight`."""
    count = target.shape[-1]
    weight = jnp.maximum(weight, jnp.finfo(weight.dtype).tiny / jnp.finfo(weight.dtype).eps)
    first, last = np.arange(count)[:, None, None], np.arange(count)[None, :, None]
    inside = (np.arange(count) >= first) & (np.arange(count) <= last)
    size = jnp.where(inside, weight[..., None, None, :], 0).sum(-1)
    total = jnp.where(inside, (weight * target)[..., None, None, :], 0).sum(-1)
    mean = total / jnp.where(size > 0, size, 1)  # of entries `first` to `last`
    least = [jnp.min(mean[..., :, j:], axis=-1) for j in range(count)]  # over ends at or after `j`
    return jnp.stack([jnp.max(least[j][..., : j + 1], axis=-1) for j in range(count)], -1)


def in_box(hessian: Array, slope: Array, start: Array, low: Array, high: Array) -> Array:
    """The maximum of a concave quadratic between `low` and `high`, whose `slope` is that at `start`.

    Entry by entry in turn, which tells what ends up at an end; then all others at once.
    """
    curvature = jnp.maximum(-jnp.diagonal(hessian), jnp.finfo(slope.dtype).tiny)

    def entry(i, carry):
        at, g = carry
        new = jnp.clip(at[i] + g[i] / curvature[i], low[i], high[i])
        return at.at[i].set(new), g + hessian[:, i] * (new - at[i])

    def sweep(_, carry):
        return jax.lax.fori_loop(0, start.size, entry, carry)

    at, g = jax.lax.fori_loop(0, SWEEPS, sweep, (start, slope))
    held = ((at <= low) & (g < 0)) | ((at >= high) & (g > 0))
    tied = held[:, None] | held
    step = jnp.linalg.solve(jnp.where(tied, jnp.eye(start.size), -hessian), jnp.where(held, 0, g))
    new = at + step
    return jnp.where(jnp.isfinite(new).all() & (new >= low).all() & (new <= high).all(), new, at)

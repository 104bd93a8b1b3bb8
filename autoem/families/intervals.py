r"""Log densities of Normal values that are censored or truncated, to all digits far out in the tails too.

In: an unwrapped NumPyro distribution over a Normal or LogNormal base, and a value. Out: its log density. NumPyro takes
the logarithm of a difference of cumulative probabilities, which beyond eight standard deviations is constant, and loses
its digits on the way there: nothing then draws a location back that started too far away. Here

.. math:: \log(\Phi(b) - \Phi(a)) = \log\Phi(b) + \log(1 - e^{\log\Phi(a) - \log\Phi(b)})

on the side of zero where both probabilities are small. Other bases keep NumPyro's own form.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import log_ndtr as asymptotic

FAR = 1e10  # standard deviations that stand for infinity, whose square is a number


def log_ndtr(x: Array) -> Array:
    """The logarithm of the cumulative probability; with more terms in the tail than JAX's own three, to all digits."""
    return asymptotic(x, 8)


def log_ndtrs(*values: Array) -> Array:
    """The same of several values, stacked: the text is long, and is compiled once for all."""
    return log_ndtr(jnp.stack(jnp.broadcast_arrays(*values)))


def base_of(distribution: Any) -> Any:
    """The Normal or LogNormal that is seen in part; None where it is another distribution."""
    base = distribution.base_dist
    while isinstance(base, dist.ExpandedDistribution):
        base = base.base_dist
    return base if type(base) in (dist.Normal, dist.LogNormal) else None


def standardised(base: Any, value: Any) -> Array:
    """Standard deviations of a value from the location, on the scale on which it is Normal."""
    value = jnp.log(value) if isinstance(base, dist.LogNormal) else value
    return jnp.clip((value - base.loc) / base.scale, -FAR, FAR)


def log_between(a: Array, b: Array) -> Array:
    """The logarithm of the probability that a standard Normal value lies between `a` and the larger `b`."""
    turned = a > 0
    low, high = jnp.where(turned, -b, a), jnp.where(turned, -a, b)
    bottom, top = log_ndtrs(low, high)
    gap = jnp.minimum(bottom - top, -jnp.finfo(top.dtype).tiny)
    narrow = gap > -0.7
    close, apart = jnp.where(narrow, gap, -1.0), jnp.where(narrow, -1.0, gap)
    return top + jnp.where(narrow, jnp.log(-jnp.expm1(close)), jnp.log1p(-jnp.exp(apart)))


def left_censored(d: Any, y: Array) -> Array:
    """Of values that are seen, or known not to be above `y`."""
    base = base_of(d)
    if base is None:
        return d.log_prob(y)
    return jnp.where(d.censored, log_ndtr(standardised(base, y)), base.log_prob(y))


def right_censored(d: Any, y: Array) -> Array:
    """Of values that are seen, or known not to be below `y`."""
    base = base_of(d)
    if base is None:
        return d.log_prob(y)
    return jnp.where(d.censored, log_ndtr(-standardised(base, y)), base.log_prob(y))


def interval_censored(d: Any, y: Array) -> Array:
    """Of values known to lie between two bounds, or outside of them where both sides are censored."""
    base = base_of(d)
    if base is None:
        return d.log_prob(y)
    left, right, _, outside, point = d._get_censoring_masks(y)
    low, high = (standardised(base, y[..., i]) for i in (0, 1))
    whole = ~(left | right | outside | point)
    seen = jnp.where(point, y[..., 0], base.support.feasible_like(y[..., 0]))
    out = jnp.where(point, base.log_prob(seen), log_between(jnp.where(whole, low, -1.0), jnp.where(whole, high, 1.0)))
    below, above, before, behind = log_ndtrs(high, -low, low, -high)
    out = jnp.where(right, above, jnp.where(left, below, out))
    return jnp.where(outside, jnp.logaddexp(before, behind), out)


def left_truncated(d: Any, y: Array) -> Array:
    """Of values that were kept for not being below a bound."""
    base = base_of(d)
    return d.log_prob(y) if base is None else base.log_prob(y) - log_ndtr(-standardised(base, d.low))


def right_truncated(d: Any, y: Array) -> Array:
    """Of values that were kept for not being above a bound."""
    base = base_of(d)
    return d.log_prob(y) if base is None else base.log_prob(y) - log_ndtr(standardised(base, d.high))


def truncated(d: Any, y: Array) -> Array:
    """Of values that were kept for lying between two bounds."""
    base = base_of(d)
    if base is None:
        return d.log_prob(y)
    return base.log_prob(y) - log_between(standardised(base, d.low), standardised(base, d.high))


FORMS = {
    dist.LeftCensoredDistribution: left_censored,
    dist.RightCensoredDistribution: right_censored,
    dist.IntervalCensoredDistribution: interval_censored,
    dist.LeftTruncatedDistribution: left_truncated,
    dist.RightTruncatedDistribution: right_truncated,
    dist.TwoSidedTruncatedDistribution: truncated,
}

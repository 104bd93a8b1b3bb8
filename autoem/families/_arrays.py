"""Array helpers of the family files: numbers as a model holds them in, floating arrays in the table's layout out."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from autoem.graph.derivatives import log


def as_float(x: ArrayLike) -> Array:
    """`x` in the default floating dtype at least: single-precision data are squared in double, where that is on."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(float), jnp.result_type(x)))


def rows(*statistics: ArrayLike) -> Array:
    """Statistics `(*batch,)` stacked in front, `(p, *batch)`: the layout of `Family.features`."""
    return jnp.stack(jnp.broadcast_arrays(*map(as_float, statistics)), axis=0)


def columns(*parameters: ArrayLike) -> Array:
    """Natural parameters `(*batch,)` stacked behind, `(*batch, p)`: the layout of `Family.natural`."""
    return jnp.stack(jnp.broadcast_arrays(*map(as_float, parameters)), axis=-1)


def log_clamped(probs: ArrayLike) -> tuple[Array, Array]:
    """`log p` and `log(1 - p)` of probabilities kept off 0 and 1 by as much as NumPyro keeps them: both are finite.

    So are their derivatives of every order, which are 0 where a probability was moved.
    """
    probs = as_float(probs)
    info = jnp.finfo(probs.dtype)
    positive = probs >= info.tiny
    inside = jnp.minimum(jnp.where(positive, probs, 0.5), 1.0 - info.eps)
    success = jnp.where(positive, jnp.log(inside), math.log(info.tiny))
    return success, jnp.where(positive, jnp.log1p(-inside), -float(info.tiny))


def finite(logits: ArrayLike) -> Array:
    """Log-odds, infinite ones as far out as `log_clamped` keeps probabilities off zero: infinity times 0 were NaN."""
    logits = as_float(logits)
    return jnp.where(jnp.isinf(logits), -jnp.sign(logits) * math.log(jnp.finfo(logits.dtype).tiny), logits)


def impossible(dtype: DTypeLike) -> float:
    """A finite stand-in for log 0: far below any log density, yet an absent statistic times it is 0 and not NaN."""
    return -(float(jnp.finfo(dtype).max) ** 0.5)


def safe_log(x: ArrayLike) -> Array:
    """Log of `x >= 0`; zero (anything below the smallest normal number) gives `impossible`, with a gradient of 0."""
    x = as_float(x)
    positive = x >= jnp.finfo(x.dtype).tiny
    return jnp.where(positive, log(jnp.where(positive, x, 1.0)), impossible(x.dtype))

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


def clamp(probs: ArrayLike) -> Array:
    """Probabilities off 0 and 1 by as much as NumPyro keeps them, so that `log p` and `log(1 - p)` are finite."""
    probs = as_float(probs)
    info = jnp.finfo(probs.dtype)
    return jnp.clip(probs, info.tiny, 1.0 - info.eps)


def finite(logits: ArrayLike) -> Array:
    """Log-odds, infinite ones as far out as `clamp` keeps probabilities off zero: infinity times 0 would be NaN."""
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

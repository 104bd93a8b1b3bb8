"""How a latent's axis is removed from a table of logarithms: by sum, or by maximum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def _log_sum_exp(x: Array) -> Array:
    return _log_sum_exp_jvp((x,), (x,))[0]


@_log_sum_exp.defjvp
def _log_sum_exp_jvp(primals, tangents):
    # the derivative is written so that a row without any density has derivative zero rather than NaN, and so that the
    # exponentials of the forward pass serve the backward pass
    (x,), (dx,) = primals, tangents
    top = jnp.max(x, axis=0, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    weight = jnp.exp(x - top)
    total = weight.sum(axis=0, keepdims=True)
    share = weight / jnp.where(total > 0, total, 1)
    out = jnp.log(total) + top
    tangent = jnp.sum(share * jnp.where(weight > 0, dx, 0), axis=0)
    return out[0], tangent


def log_sum_exp(x: Array) -> Array:
    """`log sum exp` along the first axis, in nats; `-inf` entries and all-`-inf` columns are safe."""
    return _log_sum_exp(x)


def maximum(x: Array) -> Array:
    """Largest entry along the first axis."""
    return jnp.max(x, axis=0)

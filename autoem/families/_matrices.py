r"""Inverse and log determinant of positive definite matrices, with derivatives that no factorisation enters.

.. math:: d K^{-1} = -K^{-1}\, dK\, K^{-1}, \qquad d \log |K| = \mathrm{tr}(K^{-1}\, dK)

so that second derivatives, which Newton's method takes in a kernel's parameters, are products of matrices too: those of
a Cholesky factor are a chain of triangular solves, many times as slow.

References:
    Magnus and Neudecker 1999, "Matrix differential calculus", section 8.3; Rasmussen and Williams 2006, section 5.4.1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def inverse(matrix: Array) -> Array:
    """The inverse of positive definite matrices `(*batch, d, d)`."""
    lower = jnp.linalg.cholesky(matrix)
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    half = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
    return jnp.swapaxes(half, -1, -2) @ half


@inverse.defjvp
def _(primals, tangents):
    out = inverse(primals[0])
    return out, -out @ tangents[0] @ out


@jax.custom_jvp
def log_det(matrix: Array) -> Array:
    """The log determinant of positive definite matrices `(*batch, d, d)`."""
    return 2 * jnp.log(jnp.diagonal(jnp.linalg.cholesky(matrix), axis1=-2, axis2=-1)).sum(-1)


@log_det.defjvp
def _(primals, tangents):
    return log_det(primals[0]), (inverse(primals[0]) * jnp.swapaxes(tangents[0], -1, -2)).sum((-1, -2))

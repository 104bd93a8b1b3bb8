r"""Rows of a multivariate normal seen in part, of which a fit sees sums over each pattern of holes alone.

Where all rows have one location and one covariance, the rows `x` of a pattern enter through their number, their sum and
the sum of :math:`x x^\top` over what they show. These are taken once; an iteration then sweeps the covariance on the
entries that each pattern shows,

.. math:: \begin{pmatrix} \Sigma_{oo} & \Sigma_{om} \\ \Sigma_{mo} & \Sigma_{mm} \end{pmatrix} \to
   \begin{pmatrix} -\Sigma_{oo}^{-1} & \Sigma_{oo}^{-1} \Sigma_{om} \\
   \Sigma_{mo} \Sigma_{oo}^{-1} & \Sigma_{mm} - \Sigma_{mo} \Sigma_{oo}^{-1} \Sigma_{om} \end{pmatrix}

for all patterns together, and costs nothing in the rows. In: the sums, a location and a covariance. Out: the
log-likelihood, and the expected sums of the completed rows.

References:
    Goodnight 1979, "A tutorial on the sweep operator"; Little and Rubin 2019, section 11.2.3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

MAX_PATTERNS = 4096  # up to which sums are taken for each: beyond, there are about as many patterns as rows
MAX_WIDTH = 24  # entries up to which the sweep is written out


class Completed(NamedTuple):
    """Expected sums over all completed rows: of the rows `(d,)`, of their products with themselves; their number."""

    first: Array
    second: Array
    rows: Array


def sums_of(x: np.ndarray, seen: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the rows `(n, d)` of every pattern their number `(p,)`, their sum `(d, p)` and that of squares `(d, d, p)`."""
    order = np.argsort(index, kind="stable")
    count = np.bincount(index, minlength=len(seen))
    shown = (x * seen[index])[order]
    ends = np.cumsum(count)
    parts = [shown[end - n : end] for end, n in zip(ends, count, strict=True)]
    total, square = np.stack([p.sum(0) for p in parts], -1), np.stack([p.T @ p for p in parts], -1)
    return count.astype(x.dtype), total, square


def swept(covariance: Array, seen: Array) -> tuple[Array, Array]:
    """The covariance `(d, d)` swept on what each pattern shows `(d, p)`: `(d, d, p)`; and the log determinants."""
    d = len(covariance)
    matrix = jnp.broadcast_to(covariance[:, :, None], (*covariance.shape, seen.shape[-1]))
    log_det = jnp.zeros(seen.shape[-1], covariance.dtype)
    for j in range(d):
        at = (jnp.arange(d) == j)[:, None]
        pivot = jnp.where(seen[j] > 0, matrix[j, j], 1.0)
        log_det = log_det + jnp.log(pivot)
        row = matrix[j] / pivot
        rest = matrix - matrix[:, j][:, None] * row[None]
        rest = jnp.where(at[:, None], row[None], jnp.where(at[None], row[:, None], rest))
        rest = jnp.where(at[:, None] & at[None], -1 / pivot, rest)
        matrix = jnp.where(seen[j] > 0, rest, matrix)
    return matrix, log_det


def completed(
    loc: Array, covariance: Array, seen: Array, count: Array, total: Array, square: Array
) -> tuple[Array, Completed]:
    """The log density of what was seen of all rows, less its powers of 2 pi; and expected sums of the completed rows.

    Args:
        loc, covariance: `(d,)` and `(d, d)`.
        seen: which entries each pattern shows, zero or one, `(d, p)`.
        count, total, square: see `sums_of`.
    """
    matrix, log_det = swept(covariance, seen)
    gone = 1 - seen
    own = loc[:, None] * seen
    off = total - count * own  # sums of residuals, zero where nothing is seen
    cross = own[:, None] * total[None]
    about = square - cross - jnp.swapaxes(cross, 0, 1) + count * own[:, None] * own[None]
    both = seen[:, None] * seen[None]
    eye = jnp.eye(len(loc), dtype=loc.dtype)[:, :, None]
    # what is seen stays; what is not is regressed on it
    gain = eye * seen[None] + matrix * (gone[:, None] * seen[None])
    value = 0.5 * (matrix * both * about).sum() - 0.5 * (count * log_det).sum()
    shift = (gain * off[None]).sum((1, 2))
    half = jnp.einsum("ijp,jkp->ikp", gain, about)
    spread = jnp.einsum("ikp,jkp->ij", half, gain) + (matrix * gone[:, None] * gone[None] * count).sum(-1)
    n = count.sum()
    moved = shift[:, None] * loc
    return value, Completed(n * loc + shift, spread + moved + moved.T + n * loc[:, None] * loc, n)

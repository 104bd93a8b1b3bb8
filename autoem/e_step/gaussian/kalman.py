r"""Gaussian latents carried along a chain: filter and smoother in information form, at a cost linear in time.

Every site adds a quadratic in the states that it reads, at most `p` steps back. Forwards, the state of each step is
eliminated from the sum of the message so far and the step's own terms, by sweeping

.. math:: K = \begin{pmatrix} \Lambda & \eta \\ \eta^\top & -2c \end{pmatrix}

on its coordinates, which leaves the message to the next step and, beside it, the conditional law of what was
eliminated. Backwards, these laws make moments of every window of states, or draws of the path.

In: the sites of one chain as quadratics. Out: the integral, and moments of every window.

References:
    Rauch, Tung and Striebel 1965. Durbin and Koopman 2012, "Time series analysis by state space methods", chapter 4.
    Goodnight 1979, "A tutorial on the sweep operator".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

SOURCE = "Rauch, Tung and Striebel 1965; Durbin and Koopman 2012, chapter 4 (Kalman smoother)"
LOG_2PI = math.log(2 * math.pi)
UNROLLED = 8  # coordinates that are swept one after the other in the program's text; more, in a loop


class Given(NamedTuple):
    """The law of what a step eliminates given what stays: mean `shift - slope @ rest`, covariance `spread`."""

    spread: Array
    slope: Array
    shift: Array


class Smoothed(NamedTuple):
    """Moments of the first states with what stands outside the chain, and of each later window of states.

    `start_mean (*batch, e + p d)`, `mean (steps, *batch, (p + 1) d)`, covariances alike; `total` is the sum over steps
    of `covariance`, which is all that sums over steps need of it.
    """

    start_mean: Array
    start_covariance: Array
    mean: Array
    covariance: Array
    total: Array


class Swept(NamedTuple):
    """What the forward pass leaves: the law of what was eliminated at the start and at each step, and of the end."""

    start: Given
    steps: Given
    end: Given
    value: Array


def moved(law: Given, by: Array) -> Given:
    """The law where all coordinates, those eliminated before those that stay, are larger `by` so much."""
    count = law.shift.shape[-1]
    return law._replace(shift=law.shift + by[..., :count] + times(law.slope, by[..., count:]))


def augmented(precision: Array, shift: Array, constant: Array) -> Array:
    """A quadratic as one symmetric matrix `(*batch, n + 1, n + 1)`."""
    column = shift[..., None]
    top = jnp.concatenate([precision, column], -1)
    corner = jnp.broadcast_to(-2 * constant[..., None, None], (*shift.shape[:-1], 1, 1))
    return jnp.concatenate([top, jnp.concatenate([jnp.swapaxes(column, -1, -2), corner], -1)], -2)


def sweep(matrix: Array, count: int) -> tuple[Given, Array, Array]:
    """Eliminate the first `count` coordinates: their law given the rest, what is left, and the log determinant."""
    size = matrix.shape[-1]

    def one(k, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        matrix, log_det = carry
        pivot = matrix[..., k, k]
        log_det = log_det + jnp.log(pivot)
        column = matrix[..., :, k] / pivot[..., None]
        at = jnp.arange(size) == k
        rest = matrix - column[..., :, None] * matrix[..., k, None, :]
        # the matrix is symmetric and stays so: pivot row and column alike
        rest = jnp.where(at[:, None], column[..., None, :], jnp.where(at, column[..., None], rest))
        return jnp.where(at[:, None] & at, -1 / pivot[..., None, None], rest), log_det

    carry = matrix, jnp.zeros(matrix.shape[:-2], matrix.dtype)
    if count > UNROLLED:
        carry = jax.lax.fori_loop(0, count, one, carry)
    else:
        for k in range(count):
            carry = one(k, carry)
    matrix, log_det = carry
    law = Given(-matrix[..., :count, :count], matrix[..., :count, count:-1], matrix[..., :count, -1])
    return law, matrix[..., count:, count:], log_det


def forward(start: Array, steps: Array, outside: int, dim: int) -> Swept:
    """Eliminate the coordinates outside the chain, then the states in order of time.

    Args:
        start: the terms of the first `p` states and the `outside` coordinates before them, `(*batch, n, n)` augmented.
        steps: of each later step, those of a window of `p + 1` states, `(steps, *batch, m, m)` augmented.
        dim: coordinates of one state.
    """
    first, message, log_det = sweep(start, outside)

    def step(carry, own: Array):
        message, total = carry
        law, left, more = sweep(own + room(message, dim), dim)
        return (left, total + more), law

    (message, total), laws = jax.lax.scan(step, (message, log_det), steps)
    end, left, more = sweep(message, message.shape[-1] - 1)
    count = start.shape[-1] - 1 + steps.shape[0] * dim
    value = -0.5 * left[..., 0, 0] - 0.5 * (total + more) + 0.5 * count * LOG_2PI
    return Swept(first, laws, end, value)


def room(message: Array, dim: int) -> Array:
    """A message on the earlier states of a window, with zeros for its last one; the last row and column stay last."""
    size = message.shape[-1] - 1
    zeros = jnp.zeros((*message.shape[:-1], dim), message.dtype)
    wide = jnp.concatenate([message[..., :size], zeros, message[..., size:]], -1)
    zeros = jnp.zeros((*wide.shape[:-2], dim, wide.shape[-1]), message.dtype)
    return jnp.concatenate([wide[..., :size, :], zeros, wide[..., size:, :]], -2)


def before(law: Given, mean: Array, covariance: Array) -> tuple[Array, Array]:
    """Moments of what was eliminated together with what stayed."""
    cross = -law.slope @ covariance
    own = law.spread - cross @ jnp.swapaxes(law.slope, -1, -2)
    first = law.shift - times(law.slope, mean)
    top = jnp.concatenate([own, cross], -1)
    bottom = jnp.concatenate([jnp.swapaxes(cross, -1, -2), covariance], -1)
    return jnp.concatenate([first, mean], -1), jnp.concatenate([top, bottom], -2)


def backward(swept: Swept, dim: int) -> Smoothed:
    """Moments of every window from the laws that the forward pass left."""
    end_mean, end_covariance = swept.end.shift, swept.end.spread

    def step(carry, law: Given):
        mean, covariance = before(law, *carry)
        size = mean.shape[-1] - dim
        return (mean[..., :size], covariance[..., :size, :size]), (mean, covariance)

    start, (means, covariances) = jax.lax.scan(step, (end_mean, end_covariance), swept.steps, reverse=True)
    return Smoothed(*before(swept.start, *start), means, covariances, covariances.sum(0))


def draw(swept: Swept, dim: int, key: Array) -> tuple[Array, Array]:
    """A draw of the start `(*batch, e + p d)` and of the last state of every later window `(steps, *batch, d)`."""
    keys = jax.random.split(key, 2 + swept.steps.shift.shape[0])

    def from_law(law: Given, rest: Array, key: Array) -> Array:
        noise = jax.random.normal(key, law.shift.shape, law.shift.dtype)
        return law.shift - times(law.slope, rest) + times(_root(law.spread), noise)

    end = from_law(swept.end, jnp.zeros((*swept.end.shift.shape[:-1], 0), swept.end.shift.dtype), keys[0])

    def step(window: Array, given: tuple[Given, Array]):
        law, key = given
        first = from_law(law, window, key)
        last = window[..., window.shape[-1] - dim :]
        return jnp.concatenate([first, window[..., : window.shape[-1] - dim]], -1), last

    start, later = jax.lax.scan(step, end, (swept.steps, keys[2:]), reverse=True)
    return jnp.concatenate([from_law(swept.start, start, keys[1]), start], -1), later


def _root(covariance: Array) -> Array:
    if not covariance.shape[-1]:
        return covariance
    return jnp.linalg.cholesky(0.5 * (covariance + jnp.swapaxes(covariance, -1, -2)))


def times(matrix: Array, vector: Array) -> Array:
    """A matrix times a vector, over their batch."""
    return jnp.einsum("...ij,...j->...i", matrix, vector)

r"""Filter and smoother of a chain whose steps are alike: covariances settle, and then only vectors are carried on.

In information form the terms of a step are a precision, which here is the same at all steps, and a shift, which the
observations enter. What the filter passes on has a precision that obeys a Riccati recursion without data, which is
followed for `HEAD` steps. If it has settled then, to rounding, the law of every later step is one matrix, and the
shifts obey

.. math:: \eta_{t+1} = F \eta_t + u_t,

a recursion of vectors. So with the smoother's covariances, from the end. If it has not, everything is done in full.

In: as for `kalman`, the precision once. Out: the same as from there.

References:
    Anderson and Moore 1979, "Optimal Filtering", sections 4.4 and 7.3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from autoem.e_step.gaussian.kalman import (
    LOG_2PI,
    Given,
    Smoothed,
    Swept,
    augmented,
    backward,
    before,
    room,
    sweep,
    times,
)  # fmt: skip

HEAD = 128  # steps after which covariances must have settled
FROM = 4 * HEAD  # steps of a chain from which it is tried


def settled(new: Array, old: Array) -> Array:
    """Whether a matrix has come to rest, to rounding."""
    return jnp.all(jnp.abs(new - old) <= 16 * jnp.finfo(new.dtype).eps * jnp.abs(new).max())


def forward_alike(start: Array, precision: Array, shift: Array, outside: int, dim: int) -> tuple[Swept, Array]:
    """As `kalman.forward`, for `precision` `(*batch, m, m)` and `shift` `(steps, *batch, m)`; whether it settled."""
    first, message, log_det = sweep(start, outside)
    zero = jnp.zeros(shift.shape[1:-1], shift.dtype)

    def step(carry, h: Array):
        message, total = carry
        law, left, more = sweep(augmented(precision, h, zero) + room(message, dim), dim)
        return (left, total + more), law

    carry, laws = jax.lax.scan(step, (message, log_det), shift[:HEAD])
    law, left, more = sweep(augmented(precision, jnp.zeros_like(shift[0]), zero) + room(carry[0], dim), dim)
    rest = left.shape[-1] - 1
    done = settled(left[..., :rest, :rest], carry[0][..., :rest, :rest])

    def vectors(_):
        message, total = carry
        h = shift[HEAD:]
        push = h[..., dim:] - jnp.einsum("t...i,...ij->t...j", h[..., :dim], law.slope)
        matrix = jnp.zeros_like(left[..., :rest, :rest]).at[..., :dim, :].add(-law.slope)
        matrix = matrix + jnp.eye(rest, k=-dim, dtype=h.dtype)

        def move(eta: Array, u: Array):
            return jnp.einsum("...i,...ij->...j", eta, matrix) + u, eta

        end, etas = jax.lax.scan(move, message[..., :rest, rest], push)
        ahead = etas[..., :dim] + h[..., :dim]
        means = jnp.einsum("t...i,...ij->t...j", ahead, law.spread)
        corner = message[..., rest, rest] - (ahead * means).sum((0, -1))
        spread, slope = (jnp.broadcast_to(v, (len(h), *v.shape)) for v in (law.spread, law.slope))
        out = augmented(left[..., :rest, :rest], end, -0.5 * corner)
        return (out, total + len(h) * more), Given(spread, slope, means)

    def whole(_):
        return jax.lax.scan(step, carry, shift[HEAD:])

    (message, total), later = jax.lax.cond(done, vectors, whole, None)
    steps = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), laws, later)
    end, left, more = sweep(message, rest)
    count = start.shape[-1] - 1 + len(shift) * dim
    value = -0.5 * left[..., 0, 0] - 0.5 * (total + more) + 0.5 * count * LOG_2PI
    return Swept(first, steps, end, value), done


def backward_alike(swept: Swept, done: Array, dim: int) -> Smoothed:
    """As `kalman.backward`, where all laws but the first are the same if it is `done`."""
    laws = swept.steps

    def step(carry, law: Given):
        mean, covariance = before(law, *carry)
        size = mean.shape[-1] - dim
        return (mean[..., :size], covariance[..., :size, :size]), (mean, covariance)

    def part(low: int | None, high: int | None) -> Given:
        return Given(*(v[low:high] for v in laws))

    carry, last = jax.lax.scan(step, (swept.end.shift, swept.end.spread), part(-HEAD, None), reverse=True)
    law = Given(*(v[HEAD] for v in laws))
    size = carry[0].shape[-1]
    fixed = before(law, *carry)[1]
    done = done & settled(fixed[..., :size, :size], carry[1])

    def vectors(_):
        def move(mean: Array, own: Array):
            first = own - times(law.slope, mean)
            return jnp.concatenate([first, mean[..., : size - dim]], -1), jnp.concatenate([first, mean], -1)

        middle = laws.shift[HEAD:-HEAD]
        mean, means = jax.lax.scan(move, carry[0], middle, reverse=True)
        start, head = jax.lax.scan(step, (mean, carry[1]), part(None, HEAD), reverse=True)
        covariances = jnp.broadcast_to(fixed, (len(middle), *fixed.shape))
        parts = (head, (means, covariances), last)
        total = head[1].sum(0) + len(middle) * fixed + last[1].sum(0)
        every = map(jnp.concatenate, zip(*parts, strict=True))
        return Smoothed(*before(swept.start, *start), *every, total=total)

    return jax.lax.cond(done, vectors, lambda _: backward(swept, dim), None)


__all__ = ["FROM", "backward_alike", "forward_alike"]

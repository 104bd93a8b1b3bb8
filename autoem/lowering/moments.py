"""Mean and covariance of rows: what a fit may see of them in their place, see `condense`.

In: arrays with named axes, one of them that of the rows. Out: two arrays, taken block by block without a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from autoem.graph.named import Named
from autoem.graph.programs import Program, jit_well

AT_ONCE = 2048  # rows whose products are taken together: what they are copied to stays in the cache


def entries_of(value: Named, plate: str) -> tuple[str, ...]:
    """The axes of what a site observes of one row, that of its vectors last."""
    return tuple(sorted((a for a in value.axes if a != plate), key="event0".__eq__))


@functools.cache
def moments_along(plate: str) -> Program:
    """`joint_moments`, compiled."""
    return jit_well(functools.partial(joint_moments, plate=plate))


def joint_moments(values: Sequence[Named], plate: str) -> tuple[Array, Array]:
    """The mean of rows that lie along `plate`, `(entries,)`, and their covariance, of all values together."""
    count = values[0].size(plate)
    means = [v.array.mean(v.axes.index(plate), dtype=float, keepdims=True) for v in values]

    def in_line(v: Named, array: Array) -> Array:
        return Named(array, v.axes).to((plate, *entries_of(v, plate))).reshape(array.shape[v.axes.index(plate)], -1)

    def products(start, size: int) -> Array:
        parts = []
        for v, mean in zip(values, means, strict=True):
            rows = jax.lax.dynamic_slice_in_dim(v.array, start, size, v.axes.index(plate))
            parts.append(in_line(v, rows - mean))
        off = parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)
        return off.T @ off

    blocks, rest = divmod(count, AT_ONCE)
    total: Array = products(blocks * AT_ONCE, rest) if rest else jnp.zeros(())
    if blocks:
        total = jnp.broadcast_to(total, jax.eval_shape(lambda: products(0, AT_ONCE)).shape)
        total = jax.lax.fori_loop(0, blocks, lambda i, total: total + products(i * AT_ONCE, AT_ONCE), total)
    return jnp.concatenate([in_line(v, m)[0] for v, m in zip(values, means, strict=True)]), total / count


def by_entry(values: Sequence[Named], plate: str, moments: tuple[Array, Array]) -> list[tuple[Array, Array]]:
    """Mean and variance of every entry of each value, as arrays of its shape with one row."""
    out, start = [], 0
    for v in values:
        entries = entries_of(v, plate)
        sizes = [v.size(a) for a in entries]
        own = slice(start, start := start + functools.reduce(int.__mul__, sizes, 1))
        parts = (moments[0][own], jnp.diagonal(moments[1])[own])
        mean, variance = (Named(x.reshape(sizes), entries).to(v.axes) for x in parts)
        out.append((mean, variance))
    return out

"""Arrays with named axes: what lets a table be built for any latents and plates without counting dimensions.

Axes of size one are dropped on entry (they broadcast), so a missing axis means "the same along it".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Named:
    """An array and the name of each of its axes."""

    array: Array
    axes: tuple[str, ...]

    def size(self, axis: str) -> int:
        return self.array.shape[self.axes.index(axis)]

    def to(self, axes: Sequence[str]) -> Array:
        """The array with exactly `axes`, in order; those that are missing get size one."""
        present = [a for a in axes if a in self.axes]
        moved = jnp.transpose(self.array, [self.axes.index(a) for a in present])
        sizes = iter(moved.shape)
        return moved.reshape([next(sizes) if a in self.axes else 1 for a in axes])

    def sum(self, axes: Iterable[str]) -> Named:
        gone = [a for a in axes if a in self.axes]
        kept = tuple(a for a in self.axes if a not in gone)
        return Named(self.array.sum([self.axes.index(a) for a in gone]), kept) if gone else self


def named(array: Array, axes: Sequence[str]) -> Named:
    """Name the axes of `array`, dropping those of size one."""
    kept = [i for i, s in enumerate(array.shape) if s != 1]
    return Named(array.reshape([array.shape[i] for i in kept]), tuple(axes[i] for i in kept))


def union(*axes: Sequence[str]) -> tuple[str, ...]:
    """All names, in order of first appearance."""
    return tuple(dict.fromkeys(a for group in axes for a in group))


def add(*terms: Named) -> Named:
    """Sum with broadcasting by name."""
    axes = union(*(t.axes for t in terms))
    return Named(functools.reduce(jnp.add, [t.to(axes) for t in terms]), axes)


def multiply(a: Named, b: Named) -> Named:
    axes = union(a.axes, b.axes)
    return Named(a.to(axes) * b.to(axes), axes)


def contract(keep: Sequence[str], *factors: Named) -> Named:
    """Product of `factors`, summed over every axis not in `keep`; of `keep` those axes remain that some factor has."""
    letters = {a: chr(ord("a") + i) for i, a in enumerate(union(*(f.axes for f in factors)))}
    out = tuple(a for a in keep if a in letters)
    spec = ",".join("".join(letters[a] for a in f.axes) for f in factors)
    result = jnp.einsum(f"{spec}->{''.join(letters[a] for a in out)}", *(f.array for f in factors))
    return Named(result, out)

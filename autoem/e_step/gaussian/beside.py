"""Rows beside a chain: sites outside of its steps that read, each row, the path at one step of one sequence.

In: for every row the flat number of the cell that it reads, among those of a path `(steps, *sequences)`. Out:
quantities of the rows summed over those of each step, and quantities of the steps as the rows see them.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.gaussian.block import index_name
from autoem.e_step.tables.tabulate import Factor

EVEN = "·even"  # stands after the name of an index that has every cell equally often


def name_of(f: Factor) -> str:
    """Under what the index of a factor stands among the data's cells."""
    assert f.completions is not None
    return index_name(f, f.completions.members[0])


def named_index(f: Factor, index: np.ndarray, cells: int) -> tuple[str, np.ndarray]:
    """The index of a factor under its name, which tells whether it has every cell equally often."""
    times = np.bincount(index.ravel(), minlength=cells)
    return name_of(f) + EVEN * bool((times == times[0]).all()), index


def index_of(f: Factor, cells: Mapping[str, Array]) -> Array:
    """For each row of a factor the cell that it reads."""
    name = name_of(f)
    return cells[name if name in cells else name + EVEN].ravel()


def is_even(f: Factor, cells: Mapping[str, Array]) -> bool:
    """Whether all cells are read equally often."""
    return name_of(f) + EVEN in cells


def at_steps(f: Factor, value: Array, shape: tuple[int, ...], cells: Mapping[str, Array]) -> Array:
    """A quantity `(rows or 1, ...)` summed over the rows of each cell, `(steps or 1, *sequences or 1s, ...)`."""
    index, count = index_of(f, cells), int(np.prod(shape, dtype=int))
    if len(value) == len(index) > 1:
        return jax.ops.segment_sum(value, index, count).reshape(*shape, *value.shape[1:])
    if is_even(f, cells):
        return (value * (len(index) / count)).reshape(*(1,) * len(shape), *value.shape[1:])
    times = jax.ops.segment_sum(jnp.ones(len(index), value.dtype), index, count)
    return times.reshape(*shape, *(1,) * (value.ndim - 1)) * value


def at_rows(f: Factor, value: Array, axes: int, sizes: list[int], cells: Mapping[str, Array]) -> Array:
    """A quantity `(steps, *sequences, ...)`, of so many leading axes, as the rows see it, `(*plates, ...)`."""
    rest = value.shape[axes:]
    return value.reshape(-1, *rest)[index_of(f, cells)].reshape(*sizes, *rest)

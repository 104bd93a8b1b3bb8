"""Sequences of different lengths as one array with a mask, which is how a model of sequences reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autoem._errors import DataError


def padded(sequences: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Stack sequences of different lengths along time, with a mask of what is there.

    Give both to `scan` and take out the steps that are not there::

        def step(z_prev, at):
            y, present = at
            with numpyro.plate("sequences", y.shape[0]), handlers.mask(mask=present):
                z = numpyro.sample("z", dist.Categorical(transition[z_prev]))
                numpyro.sample("y", dist.Normal(loc[z], scale), obs=y)
            return z, None

        scan(step, jnp.zeros(values.shape[1], int), (values, present))

    Args:
        sequences: arrays `(steps, *event)`, alike but for the number of steps; plain lists of numbers will do.

    Returns:
        `values`, `(longest, number of sequences, *event)`, steps that are not there repeating the sequence's last one
        (so that they stay inside the support); and `present`, `(longest, number of sequences)`, true where a step is.

    Raises:
        DataError: there is no sequence, one is empty, or their events differ in shape.
    """
    arrays = [np.asarray(s) for s in sequences]
    if not arrays:
        raise DataError("sequences", problem="there is none", mend="pass at least one", kind="argument")
    for i, a in enumerate(arrays):
        if a.ndim < 1 or not len(a) or a.dtype.kind not in "biuf":
            problem = f"number {i} is no sequence of numbers, or an empty one (shape {a.shape}, {a.dtype})"
            raise DataError("sequences", problem=problem, mend="leave it out", kind="argument")
        if a.shape[1:] != arrays[0].shape[1:]:
            problem = f"a step of number {i} has shape {a.shape[1:]}, of number 0 {arrays[0].shape[1:]}"
            raise DataError("sequences", problem=problem, mend="give every step the same shape", kind="argument")
    longest = max(map(len, arrays))
    values = np.stack([a[np.minimum(np.arange(longest), len(a) - 1)] for a in arrays], 1)
    present = np.stack([np.arange(longest) < len(a) for a in arrays], 1)
    return values, present

r"""Entries of numerical blocks that no datum ties together, as the parameters of each item of a test.

In: blocks of Newton steps, and of gradient steps that were too large for these; parameters, and data. Out: the same,
with groups of entries whose second derivatives by each other are zero. A Newton step then takes as many products with
the Hessian as a group has entries, and groups may be many.

Groups are tried that share an index along the first or the last axis of all of the block's parameters, at random
parameters: the Hessian times a vector that is zero outside a random half of the groups has to be zero there too. What
a few random halves miss would cost steps, and never the answer: a step is only taken if `Q` rises.

References:
    Curtis, Powell and Reid 1974, "On the estimation of sparse Jacobian matrices".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from autoem.graph.programs import jit_once
from autoem.m_step.block import AbstractBlock
from autoem.m_step.gradient import GradientBlock
from autoem.m_step.newton import NewtonBlock
from autoem.m_step.problem import Bundle, Params

LEAST, LARGEST = 12, 16  # entries of a block from which it is worth a try; entries of a group
HALVES = 6


def in_groups(block: AbstractBlock, params: Params, bundle: Callable[[], Bundle]) -> AbstractBlock:
    """The block by Newton steps in groups, where its entries fall into some that are apart."""
    if isinstance(block, GradientBlock) and block.in_place_of_newton:
        trial = NewtonBlock(block.names, block.problem, block.reason.removesuffix(f"; {block.in_place_of_newton}"))
    elif isinstance(block, NewtonBlock):
        trial = block
    else:
        return block
    free = {n: np.empty(u.shape) for n, u in jax.eval_shape(trial.free, dict(params)).items()}
    if sum(u.size for u in free.values()) < LEAST or trial.kinks:
        return block
    found = [g for axis in (0, -1) if (g := along(free, axis)) is not None and g.shape[1] <= LARGEST]
    for groups in found:
        if are_apart(trial, groups, params, bundle()):
            return dataclasses.replace(trial, groups=groups)
    return block


def along(free: Mapping[str, np.ndarray], axis: int) -> np.ndarray | None:
    """Places of the entries at each index of an axis that all arrays share; None where they share none."""
    if any(u.ndim == 0 for u in free.values()) or len({u.shape[axis] for u in free.values()}) > 1:
        return None
    arrays = [free[n] for n in sorted(free)]  # in the order in which JAX ravels a dict
    ends = np.cumsum([u.size for u in arrays])
    place = [np.arange(end - u.size, end).reshape(u.shape) for u, end in zip(arrays, ends, strict=True)]
    moved = [np.moveaxis(p, axis, 0).reshape(p.shape[axis], -1) for p in place]
    groups = np.concatenate(moved, axis=1)
    return groups if len(groups) > 2 else None


def are_apart(block: NewtonBlock, groups: np.ndarray, params: Params, bundle: Bundle) -> bool:
    """Whether the Hessian keeps random halves of the groups to themselves, at parameters near by."""
    rng = np.random.default_rng(7)
    halves = np.zeros((HALVES, groups.size))
    for half in halves:
        half[groups[rng.permutation(len(groups))[: len(groups) // 2]]] = 1.0
    vectors, noise = halves * rng.normal(size=halves.shape), 0.1 * rng.normal(size=groups.size)

    def others(params: Params, bundle: Bundle, vectors, halves, noise):
        cells = block.problem.cells(params, bundle, block.touched)
        ones = jax.tree.map(jnp.ones_like, cells)
        flat, _, objective = block.climbed(params, ones, bundle)
        product = jax.linearize(jax.grad(objective), flat + noise)[1]
        return jnp.where(halves > 0, 0, jax.lax.map(product, vectors.astype(flat.dtype)))

    return not np.any(np.asarray(jit_once(others)(dict(params), bundle, vectors, halves, noise)))

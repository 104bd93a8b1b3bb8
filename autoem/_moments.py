"""Answers about continuous latents: means, covariances, draws, and what each independent datum contributes.

In: a kernel, parameters, data, and the elimination's tables beside them. Out: arrays by latent, at full shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._integrals import Integral
from autoem._lower import Kernel
from autoem._named import Named, add, multiply, named, pick
from autoem.e_step.completions import root
from autoem.e_step.elimination import Table
from autoem.e_step.gaussian import DIM, OTHER, Moments
from autoem.e_step.tables import log_density_constant
from autoem.ir import Continuous
from autoem.m_step.problem import Bundle, Params


def mixed_moments(
    kernel: Kernel, params: Params, bundle: Bundle, log_z: Callable[[Sequence[Table]], Array]
) -> dict[str, tuple[Array, Array]]:
    """Posterior mean and covariance of every continuous latent, the discrete ones summed out.

    Args:
        log_z: the log-likelihood as a function of the integrals' tables.
    """
    done = [block.integrate(params, bundle) for block in kernel.integrals]

    def value(values: list[Named]) -> Array:
        return log_z([Table(v, t.latents, t.plates) for v, (t, _) in zip(values, done, strict=True)])

    slopes = jax.grad(value)([t.value for t, _ in done])
    out = {}
    for block, (_, moments), slope in zip(kernel.integrals, done, slopes, strict=True):
        states = block.block.states
        weight = block.weights(slope)
        mean = multiply(moments.mean, weight).sum(states)
        other = Named(moments.mean.array, tuple(OTHER if a == DIM else a for a in moments.mean.axes))
        second = multiply(add(moments.covariance, multiply(moments.mean, other)), weight).sum(states)
        centre = Named(mean.array, tuple(OTHER if a == DIM else a for a in mean.axes))
        product = multiply(mean, centre)
        covariance = add(second, Named(-product.array, product.axes))
        for m in block.block.members:
            out[m.name] = of_member(block, m, Moments(mean, covariance))
    return out


def of_member(block: Integral, m: Continuous, moments: Moments) -> tuple[Array, Array]:
    """Mean `(*shape, *event)` and covariance `(*shape, dim, dim)` of one latent in every of its cells."""
    group = block.block
    cells = int(np.prod(m.shape, dtype=int))
    if group.dense:
        where = start_of(block, m) + np.arange(cells * m.dim).reshape(cells, m.dim)
        mean, covariance = moments.mean.array[where], moments.covariance.array[where[:, :, None], where[:, None, :]]
    else:
        where = whole_span(block, m)
        mean = jnp.broadcast_to(moments.mean.to((*group.plates, DIM)), (*group.shape, group.dim))[..., where]
        full = moments.covariance.to((*group.plates, DIM, OTHER))
        full = jnp.broadcast_to(full, (*group.shape, group.dim, group.dim))
        covariance = full[..., where[:, None], where[None, :]]
    return mean.reshape(*m.shape, *m.event), covariance.reshape(*m.shape, m.dim, m.dim)


def start_of(block: Integral, m: Continuous) -> int:
    """Where a latent's cells begin in the one vector of all cells."""
    start = 0
    for other in block.block.members:
        if other.name == m.name:
            return start
        start += other.dim * int(np.prod(other.shape, dtype=int))
    raise KeyError(m.name)


def whole_span(block: Integral, m: Continuous) -> np.ndarray:
    """A latent's coordinates among those of a cell."""
    start = 0
    for other in block.block.members:
        if other.name == m.name:
            return np.arange(start, start + m.dim)
        start += other.dim
    raise KeyError(m.name)


def completed(
    kernel: Kernel, params: Params, bundle: Bundle, chosen: Mapping[str, Array], key: Array | None
) -> dict[str, Array]:
    """Values of the continuous latents given those of the discrete ones: drawn with `key`, or the mean without."""
    out = {}
    for i, block in enumerate(kernel.integrals):
        group = block.block
        mean, covariance = (m for m in vars(block.integrate(params, bundle)[1]).values())
        for z in group.discrete:
            index = named(jnp.asarray(chosen[z.name]), z.axes)
            mean, covariance = pick(mean, z.name, index), pick(covariance, z.name, index)
        vector = jnp.broadcast_to(mean.to((*group.plates, DIM)), (*group.shape, group.dim))
        if key is not None:
            noise = jax.random.normal(jax.random.fold_in(key, i), vector.shape, vector.dtype)
            vector = vector + jnp.einsum("...ij,...j->...i", root(covariance.to((*group.plates, DIM, OTHER))), noise)
        for m in group.members:
            if group.dense:
                start = start_of(block, m)
                part = vector[start : start + m.dim * int(np.prod(m.shape, dtype=int))]
            else:
                part = vector[..., whole_span(block, m)]
            out[m.name] = part.reshape(*m.shape, *m.event)
    return out


def with_constants(block: Integral, table: Table, bundle: Bundle) -> Table:
    """The table of an integral with what its observed sites add that no parameter enters."""
    value = table.value
    for f in block.factors:
        constant = log_density_constant(f, bundle.rows[f.name])
        if constant is not None:
            value = add(value, block.block.constant(f, constant, bundle.cells))
    return Table(value, table.latents, table.plates)

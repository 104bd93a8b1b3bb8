r"""Flat priors: do the data determine what has one? If not, its posterior has no integral, and nothing is fitted.

In: a build, before its first fit. Out: nothing, or a refusal. At the model's start each coordinate of a latent with a
flat prior has a variance and, all other latents held, a conditional variance :math:`1 / \Lambda_{kk}`. Their ratio is
:math:`1 / (1 - R^2)` with `R` the correlation of the coordinate with all others: beyond what rounding leaves of one
minus one, the data do not tell it from them.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import PlanError
from autoem.graph.programs import jit_once
from autoem.ir import Continuous
from autoem.lowering.integrals import Integral
from autoem.m_step.problem import Bundle
from autoem.planning.build import Build

ROUNDING = 1e3  # units of the last place that a pivot which should be zero may differ from it


def refuse_improper(built: Build) -> None:
    """Raise where the data leave a direction of latents with flat priors open.

    Raises:
        PlanError: names the latent and how many of its coordinates are open.
    """
    blocks = [(b, m) for b in built.kernel.integrals for m in b.block.members if m.flat]
    if not blocks:
        return
    source, key = built.source, jax.random.key(20)
    start, bundle = built.start(source, key), built.whole_bundle(built.source, key)
    limit = 1 / (ROUNDING * float(jnp.finfo(jnp.result_type(float)).eps))
    found = jit_once(lambda p, b: {m.name: inflation(block, m, p, b) for block, m in blocks})(start, bundle)
    for _, m in blocks:
        inflated = np.asarray(found[m.name])
        if count := int((~(inflated < limit) | (inflated < 0)).sum()):
            raise PlanError(
                built.program.base_of(m.name),
                problem=f"it has a flat prior, and the data do not determine {count:,} of its {inflated.size:,} "
                "coordinates: its posterior is improper",
                mend="leave out what other latents or parameters already explain (a constant column, a group without "
                f'rows), or give it a law: numpyro.sample("{m.name}", dist.Normal(0.0, 10.0))',
            )


def inflation(block: Integral, m: Continuous, params: Mapping[str, Array], bundle: Bundle) -> Array:
    """Of every coordinate its variance over that given all others, `(cells, d)`."""
    _, moments = block.integrate(params, bundle)
    covariance = block.block.marginal(m, moments)[1].reshape(-1, m.dim, m.dim)
    rest = {n.name: jnp.zeros((*n.shape, *n.event)) for n in block.block.members if n is not m}

    def density(value: Array) -> Array:
        return block.density_at({**rest, m.name: value}, params, bundle).array.sum()

    zero = jnp.zeros((*m.shape, *m.event))

    def curved(j: Array) -> Array:
        unit = jnp.broadcast_to(jax.nn.one_hot(j, m.dim, dtype=zero.dtype).reshape(m.event), zero.shape)
        slope = jax.jvp(jax.grad(density), (zero,), (unit,))[1]  # cells are not tied but through other latents
        return -slope.reshape(-1, m.dim)[:, j]

    precision = jax.lax.map(curved, jnp.arange(m.dim)).T
    return jnp.diagonal(covariance, axis1=-2, axis2=-1) * precision

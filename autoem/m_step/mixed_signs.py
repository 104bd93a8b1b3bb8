"""Sums that are no superposition: coefficients or terms of a Poisson rate that may be negative.

In: blocks and the numbers of the data, since no structure tells their signs. Out: the parameters whose rates cannot be
split over their sources, each with the reason; they are left to Newton's method or to gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.ir import Param
from autoem.m_step.block import AbstractBlock
from autoem.m_step.choose import kind_of
from autoem.m_step.closed_form.subsets import Subsets
from autoem.m_step.closed_form.superposition import Superposition
from autoem.m_step.problem import Params, Use
from autoem.m_step.unconstrained import to_constrained, unconstrained_shape
from autoem.passes.signs import nonnegative

EVERY_ROW_UP_TO = 4_000_000  # coefficients: of more, `TRIED` rows of the operator are looked at
TRIED = 256
PLACES = 3  # values of the other parameters at which coefficients are looked at
NEVER_NEGATIVE = ("positive", "unit", "simplex")


def superpositions(blocks: Sequence[AbstractBlock]) -> tuple[Superposition, ...]:
    """The superpositions among the blocks, those by ordered subsets among them."""
    whole = [b.whole if isinstance(b, Subsets) else b for b in blocks]
    return tuple(b for b in whole if isinstance(b, Superposition))


def mixed_signs(
    blocks: Sequence[Superposition], params: Mapping[str, Param], start: Params, values: Mapping[Any, Any]
) -> dict[str, str]:
    """Parameters that are no superposition with these data, each with the reason; `values` are the graph's inputs."""
    out = {}
    for block in blocks:
        for rate in block.rates:
            reason = negative_part(rate.use, block.names[0], params, start, values)
            if reason:
                out[block.names[0]] = reason
    return out


def negative_part(use: Use, name: str, params: Mapping[str, Param], start: Params, values: Mapping[Any, Any]) -> str:
    """What of a rate may be negative; empty where nothing is.

    First by the signs of what it is computed from. Where these do not tell (a Fourier transform, a difference) the
    operator's rows are computed, at several values of the other parameters.
    """
    factor, key = use.factor, f"arg:{use.argument}"
    signs: dict[Any, bool] = {("param", n): kind_of(p.constraint) in NEVER_NEGATIVE for n, p in params.items()}
    signs |= {("latent", z.name): bool(np.min(z.states) >= 0) for z in factor.parents}
    if nonnegative(factor.graph, factor.graph.outputs[factor.name, key], values, signs):
        return ""
    for seed in range(PLACES):
        others = start if seed == 0 else moved(params, start, jax.random.key(seed))
        given = {**values, **{("param", n): v for n, v in others.items()}}

        def rate(v: Array, given=given) -> Array:
            return factor.argument(key, {**given, ("param", name): v})

        least, constant, largest = extremes(rate, others[name])
        if least < -1e3 * np.finfo(np.result_type(largest)).eps * largest:
            return f"it enters {use} as a sum, but with negative coefficients, so no count can be split over its terms"
        if constant < -1e-6 * largest:
            return f"it enters {use} as a sum, but beside a negative term, so no count can be split over its terms"
    return ""


def moved(params: Mapping[str, Param], start: Params, key: Array) -> dict[str, Array]:
    """Other values of all parameters, within their constraints."""
    out = {}
    for i, (n, v) in enumerate(start.items()):
        noise = jax.random.normal(jax.random.fold_in(key, i), unconstrained_shape(params[n], v))
        out[n] = to_constrained(params[n], noise)
    return out


def extremes(rate: Callable[[Array], Array], at: Array) -> tuple[float, float, float]:
    """The least coefficient, the least constant, and the largest of either in size; of many rows, some."""
    out = rate(jnp.zeros_like(at))
    rows = np.arange(out.size)
    if out.size * at.size > EVERY_ROW_UP_TO and out.size > TRIED:
        rows = np.random.default_rng(0).choice(out.size, TRIED, replace=False)

    def row(i: Array) -> tuple[Array, Array]:
        hot = jnp.zeros(out.size, out.dtype).at[i].set(1).reshape(out.shape)
        entries = jax.vjp(rate, at)[1](hot)[0]
        return entries.min(initial=0), jnp.abs(entries).max(initial=0)

    least, largest = jax.jit(lambda r: jax.lax.map(row, r))(rows)
    size = max(float(largest.max(initial=0)), float(jnp.abs(out).max(initial=0)))
    return float(least.min(initial=0)), float(out.min(initial=0)), size

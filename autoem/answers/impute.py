"""Draws of observations that are missing, each from the fitted model given a draw of the latents.

In: a model with its arguments, parameters, and draws of the latents given what was seen. Out: by observed site, its
data with every NaN drawn. The model runs as its author wrote it, so a step that carries its own site's value on carries
what was drawn: the steps after the last observation are a forecast.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers

from autoem.graph.programs import jit_once
from autoem.ir import Program
from autoem.reading.reader import AtObserved, holds_nan, unwrap
from autoem.reading.trace import Source

PIECE = r"(@0|\[\d+\])$"  # of a scan's site that reads latents of earlier steps: what its name in the program ends in


def draw_missing(msg: dict) -> None:
    """Put a draw in the place of every NaN."""
    if not holds_nan(msg["value"]):
        return
    drawn, hidden = msg["fn"].sample(numpyro.prng_key()), jnp.isnan(msg["value"])
    if isinstance(normal := unwrap(msg["fn"])[0], dist.MultivariateNormal):
        residual = jnp.where(hidden, 0, msg["value"] - drawn)
        drawn = drawn + correction(jnp.asarray(normal.covariance_matrix), residual, hidden)
    msg["value"] = jnp.where(hidden, drawn, msg["value"])


def correction(covariance: Array, residual: Array, hidden: Array) -> Array:
    """What turns a draw of a whole vector into one given its seen entries, which the draw misses by `residual`.

    References:
        Hoffman and Ribak 1991, "Constrained realizations of Gaussian fields".
    """
    seen = (~hidden).astype(residual.dtype)
    both = seen[..., :, None] * seen[..., None, :]
    matrix = covariance * both + jnp.eye(residual.shape[-1]) * (1 - seen)[..., None, :]
    weights = jnp.linalg.solve(matrix, residual[..., None])
    return (covariance @ (weights * seen[..., None]))[..., 0]


def impute(
    program: Program, source: Source, params: Mapping[str, Array], latents: Mapping[str, Array], keys: Array
) -> dict[str, Array]:
    """Data of each observed site that misses some, once for each of `keys` and of the draws of `latents`."""
    args, kwargs = source.call(list(source.data))
    holes = with_holes(program, source)

    def run(key: Array, latents: Mapping[str, Array], params: Mapping[str, Array]) -> dict[str, Array]:
        given = handlers.substitute(source.model, data={**params, **latents})
        with numpyro.validation_enabled(False), AtObserved(draw_missing):
            trace = handlers.trace(handlers.seed(given, key)).get_trace(*args, **kwargs)
        names = dict.fromkeys(n if n in trace else re.sub(PIECE, "", n) for n in holes)
        return {name: trace[name]["value"] for name in names}

    return jit_once(jax.vmap(run, in_axes=(0, 0, None)))(keys, dict(latents), dict(params))


def with_holes(program: Program, source: Source) -> list[str]:
    """The observed sites whose data hold NaN, by the program's names."""
    keys = [k for k in program.full.outputs if k[1] == "given"]
    values = {} if source.concrete else {("data", i): jnp.asarray(x) for i, x in enumerate(source.data)}
    given = program.full.evaluate(keys, values)
    return [k[0] for k, v in zip(keys, given, strict=True) if np.isnan(np.asarray(v, float)).any()]

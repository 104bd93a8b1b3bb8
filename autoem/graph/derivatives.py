r"""Logarithms, quotients and roots whose derivatives are zero where they are infinite.

In: the name of a primitive. Out: a function that gives its value, and zero for its derivative where that is infinite.

Where a model's density is zero its logarithm is minus infinity, and its derivative infinite: the log of a probability
that rounds to nothing. No posterior weighs such a cell, so it should add nothing to a derivative; but JAX would
multiply the weight of zero by infinity, and the NaN would spoil the sums over all cells. Elsewhere the derivatives
are the usual ones, of every order, written so that factors of which one is huge and one tiny meet before they overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.custom_jvp
def reciprocal(x: Array) -> Array:
    """One over `x`; zero where that is infinite."""
    return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, x))


@reciprocal.defjvp
def _reciprocal_jvp(primals, tangents):
    over = reciprocal(primals[0])
    return over, -(tangents[0] * over) * over


@jax.custom_jvp
def log(x: Array) -> Array:
    return lax.log(x)


@log.defjvp
def _log_jvp(primals, tangents):
    return log(primals[0]), tangents[0] * reciprocal(primals[0])


@jax.custom_jvp
def log1p(x: Array) -> Array:
    return lax.log1p(x)


@log1p.defjvp
def _log1p_jvp(primals, tangents):
    return log1p(primals[0]), tangents[0] * reciprocal(1 + primals[0])


@jax.custom_jvp
def sqrt(x: Array) -> Array:
    return lax.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    root = sqrt(primals[0])
    return root, 0.5 * tangents[0] * reciprocal(root)


@jax.custom_jvp
def div(x: Array, y: Array) -> Array:
    return lax.div(x, y)


@div.defjvp
def _div_jvp(primals, tangents):
    quotient, over = div(*primals), reciprocal(primals[1])
    return quotient, tangents[0] * over - quotient * (tangents[1] * over)


SAFE: dict[str, Callable[..., Any]] = {"log": log, "log1p": log1p, "sqrt": sqrt, "div": div}


def safe(name: str, values: Any) -> Callable[..., Any] | None:
    """The function for the primitive `name` where its `values` are real numbers; None where there is none."""
    function = SAFE.get(name)
    real = function and all(jnp.issubdtype(jnp.result_type(v), jnp.floating) for v in values)
    return function if real else None

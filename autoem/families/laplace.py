"""Laplace families: exponential in their scale alone, the location and the balance of the two sides being data.

A free location is the weighted median (or quantile) of the rows, by the `fixed_rules`, where the site is evaluated row
by row.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from autoem.families._arrays import as_float, columns, rows
from autoem.families._family import Args, Family, Median, Power, register_family

_JOHNSON = "Johnson, Kotz and Balakrishnan 1995, Continuous Univariate Distributions, volume 2, chapter 24"
_KOTZ = "Kotz, Kozubowski and Podgorski 2001, The Laplace Distribution and Generalizations, chapter 3"

register_family(
    dist.Laplace,
    Family(
        name="Laplace",
        args=("scale",),
        rules={"scale": Power(lambda t, n, args: (-n, t[..., 0]), degree=-1)},
        features=lambda x, fixed: rows(jnp.abs(as_float(x) - as_float(fixed["loc"]))),
        natural=lambda args: (columns(-1 / as_float(args["scale"])), jnp.log(2 * as_float(args["scale"]))),
        base=lambda x, fixed: jnp.zeros_like(as_float(x)),
        fixed=("loc",),
        fixed_rules={"loc": Median(lambda args: (1 / as_float(args["scale"]), 1 / as_float(args["scale"])))},
        otherwise="the location of a Laplace stands inside an absolute value, so there is no natural form in it",
        source=_JOHNSON,
    ),
)


def _asymmetric_slopes(args: Args) -> tuple[Array, Array]:
    asymmetry, scale = as_float(args["asymmetry"]), as_float(args["scale"])
    return asymmetry / scale, 1 / (asymmetry * scale)


def _quantile_slopes(args: Args) -> tuple[Array, Array]:
    quantile, scale = as_float(args["quantile"]), as_float(args["scale"])
    return quantile / scale, (1 - quantile) / scale


def _register_asymmetric(cls: type, balance: str, slopes: Callable, normaliser: Callable[[Array], Array]) -> None:
    """A Laplace of unequal sides; `normaliser` is the log of what its density at scale one is over the exponential."""

    def distance(x: Array, fixed: Args) -> Array:
        above, below = slopes({**fixed, "scale": 1.0})
        residual = as_float(x) - as_float(fixed["loc"])
        return rows(jnp.where(residual > 0, above, -below) * residual)

    register_family(
        cls,
        Family(
            name=cls.__name__,
            args=("scale",),
            rules={"scale": Power(lambda t, n, args: (-n, t[..., 0]), degree=-1)},
            features=distance,
            natural=lambda args: (columns(-1 / as_float(args["scale"])), jnp.log(as_float(args["scale"]))),
            base=lambda x, fixed: normaliser(as_float(fixed[balance])) + jnp.zeros_like(as_float(x)),
            fixed=("loc", balance),
            fixed_rules={"loc": Median(slopes)},
            otherwise=f"its loc and {balance} stand inside an absolute value, so there is no natural form in them",
            source=_KOTZ,
        ),
    )


_register_asymmetric(dist.AsymmetricLaplace, "asymmetry", _asymmetric_slopes, lambda k: -jnp.log(k + 1 / k))
_register_asymmetric(dist.AsymmetricLaplaceQuantile, "quantile", _quantile_slopes, lambda q: jnp.log(q) + jnp.log1p(-q))

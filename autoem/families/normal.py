"""Normal families: Normal, LogNormal, HalfNormal and the MultivariateNormal in its three parametrisations.

The scalar ones have statistics `x, x^2`; the vector one has `x_i`, then `x_i x_j` for `i <= j`, so that a log density
is one product of `d + d (d + 1) / 2` numbers. Second moments enter un-centred: standardise the data first
(`standardise`) where their mean is large against their spread.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.scipy.linalg import solve_triangular

from autoem.families._arrays import as_float, columns, rows
from autoem.families._family import Args, Covariance, Family, Location, Power, register_family
from autoem.families._matrices import inverse, log_det

_SOURCE = "Brown 1986, Fundamentals of Statistical Exponential Families, chapter 1"
_MVN_SOURCE = "Anderson 2003, An Introduction to Multivariate Statistical Analysis, section 3.2"


def _natural(args: Args) -> tuple[Array, Array]:
    loc, scale = as_float(args["loc"]), as_float(args["scale"])
    precision = scale**-2
    return columns(loc * precision, -0.5 * precision), 0.5 * loc**2 * precision + jnp.log(scale)


def _scale_coefficients(t: Array, n: Array, args: Args) -> tuple[Array, Array]:
    loc = args["loc"]
    squares = t[..., 1] - 2.0 * loc * t[..., 0] + loc**2 * n  # about the location; rounding may take it below zero
    return -n, 0.5 * jnp.maximum(squares, 0.0)


def _standardise(args: Args, centre: Array, scale: Array) -> dict[str, Array]:
    return {"loc": (args["loc"] - centre) / scale, "scale": args["scale"] / scale}


def _log_features(x: Array, fixed: Args) -> Array:
    y = jnp.log(as_float(x))
    return rows(y, y**2)


register_family(
    dist.Normal,
    Family(
        name="Normal",
        args=("loc", "scale"),
        rules={"loc": Location(), "scale": Power(_scale_coefficients, degree=-2)},
        features=lambda x, fixed: rows(x, as_float(x) ** 2),
        natural=_natural,
        base=lambda x, fixed: jnp.full_like(as_float(x), -0.5 * math.log(2 * math.pi)),
        standardise=_standardise,
        source=_SOURCE,
    ),
)

register_family(
    dist.LogNormal,
    Family(
        name="LogNormal",
        args=("loc", "scale"),
        rules={"loc": Location(), "scale": Power(_scale_coefficients, degree=-2)},
        features=_log_features,
        natural=_natural,
        base=lambda x, fixed: -jnp.log(as_float(x)) - 0.5 * math.log(2 * math.pi),
        source=_SOURCE,
    ),
)

register_family(
    dist.HalfNormal,
    Family(
        name="HalfNormal",
        args=("scale",),
        rules={"scale": Power(lambda t, n, args: (-n, 0.5 * t[..., 0]), degree=-2)},
        features=lambda x, fixed: rows(as_float(x) ** 2),
        natural=lambda args: (columns(-0.5 * as_float(args["scale"]) ** -2), jnp.log(as_float(args["scale"]))),
        base=lambda x, fixed: jnp.full_like(as_float(x), 0.5 * math.log(2 / math.pi)),
        source=_SOURCE,
    ),
)


def _moments(x: Array, fixed: Args) -> Array:
    x = as_float(x)
    i, j = np.triu_indices(x.shape[0])
    return jnp.concatenate([x, x[i] * x[j]])


def _vector_base(x: Array, fixed: Args) -> Array:
    return jnp.full_like(as_float(x)[0], -0.5 * x.shape[0] * math.log(2 * math.pi))


def _vector_eta(shift: Array, precision: Array) -> Array:
    """`shift` = precision times location; an off-diagonal product stands once in T(x) for two entries of the matrix."""
    i, j = np.triu_indices(precision.shape[-1])
    quadratic = np.where(i == j, -0.5, -1.0).astype(precision.dtype) * precision[..., i, j]
    batch = jnp.broadcast_shapes(shift.shape[:-1], quadratic.shape[:-1])
    parts = (jnp.broadcast_to(part, (*batch, part.shape[-1])) for part in (shift, quadratic))
    return jnp.concatenate(list(parts), axis=-1)


def _natural_tril(args: Args) -> tuple[Array, Array]:
    loc, tril = as_float(args["loc"]), as_float(args["scale_tril"])
    whiten = solve_triangular(tril, jnp.broadcast_to(jnp.eye(tril.shape[-1], dtype=tril.dtype), tril.shape), lower=True)
    white = jnp.einsum("...ij,...j->...i", whiten, loc)
    shift = jnp.einsum("...ji,...j->...i", whiten, white)
    log_scale = jnp.log(jnp.abs(jnp.diagonal(tril, axis1=-2, axis2=-1))).sum(-1)
    return _vector_eta(shift, jnp.swapaxes(whiten, -1, -2) @ whiten), 0.5 * (white**2).sum(-1) + log_scale


def _natural_covariance(args: Args) -> tuple[Array, Array]:
    loc, covariance = as_float(args["loc"]), as_float(args["covariance_matrix"])
    covariance = 0.5 * (covariance + jnp.swapaxes(covariance, -1, -2))  # both triangles carry the gradient
    precision = inverse(covariance)
    shift = jnp.einsum("...ij,...j->...i", precision, loc)
    return _vector_eta(shift, precision), 0.5 * ((shift * loc).sum(-1) + log_det(covariance))


def _natural_precision(args: Args) -> tuple[Array, Array]:
    loc, precision = as_float(args["loc"]), as_float(args["precision_matrix"])
    precision = 0.5 * (precision + jnp.swapaxes(precision, -1, -2))  # both triangles carry the gradient
    shift = jnp.einsum("...ij,...j->...i", precision, loc)
    return _vector_eta(shift, precision), 0.5 * ((shift * loc).sum(-1) - log_det(precision))


def _scatter(t: Array, n: Array, args: Args) -> Array:
    """The weighted sum of `(x - loc) (x - loc)'`: the covariance that maximises is this over `n`."""
    loc = as_float(args["loc"])
    d = loc.shape[-1]
    i, j = np.triu_indices(d)
    place = np.zeros((d, d), int)
    place[i, j] = place[j, i] = np.arange(len(i))
    cross = t[..., :d, None] * loc[..., None, :]
    second = t[..., d + place]
    return second - cross - jnp.swapaxes(cross, -1, -2) + n[..., None, None] * loc[..., :, None] * loc[..., None, :]


def _vector_standardise(form: str, args: Args, centre: Array, scale: Array) -> dict[str, Array]:
    name, matrix = next((name, value) for name, value in args.items() if name != "loc")
    ratio = {
        "covariance": 1.0 / (scale[:, None] * scale[None, :]),
        "precision": scale[:, None] * scale[None, :],
        "tril": 1.0 / scale[:, None],
    }[form]
    return {"loc": (args["loc"] - centre) / scale, name: matrix * ratio}


def _register_multivariate(matrix: str, form: str, natural, when: str | None) -> None:
    register_family(
        dist.MultivariateNormal,
        Family(
            name="MultivariateNormal",
            args=("loc", matrix),
            rules={"loc": Location(), matrix: Covariance(_scatter, form)},
            features=_moments,
            natural=natural,
            base=_vector_base,
            event_dim=1,
            arg_dims=(1, 2),
            standardise=lambda args, centre, scale: _vector_standardise(form, args, centre, scale),
            when=when,
            source=_MVN_SOURCE,
        ),
    )


# NumPyro always stores `scale_tril`; the other two only where they were given, so it comes last and for the rest.
_register_multivariate("covariance_matrix", "covariance", _natural_covariance, "covariance_matrix")
_register_multivariate("precision_matrix", "precision", _natural_precision, "precision_matrix")
_register_multivariate("scale_tril", "tril", _natural_tril, None)

"""Continuous families off the normal: waiting times, fractions, angles and power laws.

Scales and rates have closed forms; concentrations stand inside gamma or Bessel functions, whose derivative no formula
inverts. Pareto and Levy are exponential families in one argument only, the other being data.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import gammaln, i0e

from autoem.families._arrays import as_float, columns, rows
from autoem.families._family import Args, Direction, Family, NoClosedForm, Power, register_family

_BROWN = "Brown 1986, Fundamentals of Statistical Exponential Families, chapter 1"
_JOHNSON = "Johnson, Kotz and Balakrishnan 1994, Continuous Univariate Distributions, volume 1"
_MINKA = "Minka 2000, Estimating a Dirichlet distribution"
_MARDIA = "Mardia and Jupp 2000, Directional Statistics, section 5.3"


def _digamma_of(name: str) -> NoClosedForm:
    return NoClosedForm(f"{name} stands inside a gamma function, and its derivative has no inverse in closed form")


def _zero(x: Array, fixed: Args) -> Array:
    return jnp.zeros_like(as_float(x))


def _rate_coefficients(t: Array, n: Array, args: Args) -> tuple[Array, Array]:
    return n * args["concentration"], t[..., 1]


def _gamma(args: Args) -> tuple[Array, Array]:
    concentration, rate = as_float(args["concentration"]), as_float(args["rate"])
    return columns(concentration - 1, -rate), gammaln(concentration) - concentration * jnp.log(rate)


def _inverse_gamma(args: Args) -> tuple[Array, Array]:
    concentration, rate = as_float(args["concentration"]), as_float(args["rate"])
    return columns(-concentration - 1, -rate), gammaln(concentration) - concentration * jnp.log(rate)


def _chi2(args: Args) -> tuple[Array, Array]:
    half = 0.5 * as_float(args["df"])
    return columns(half - 1), gammaln(half) + half * math.log(2)


def _log_beta(a: Array, b: Array) -> Array:
    """JAX's own errs by 1e-7 from 8 on, and in its second derivatives where `a` equals `b`."""
    return gammaln(a) + gammaln(b) - gammaln(a + b)


def _beta(args: Args) -> tuple[Array, Array]:
    first, second = as_float(args["concentration1"]), as_float(args["concentration0"])
    return columns(first - 1, second - 1), _log_beta(first, second)


def _beta_proportion(args: Args) -> tuple[Array, Array]:
    mean, concentration = as_float(args["mean"]), as_float(args["concentration"])
    return _beta({"concentration1": mean * concentration, "concentration0": (1 - mean) * concentration})


def _dirichlet(args: Args) -> tuple[Array, Array]:
    concentration = as_float(args["concentration"])
    return concentration - 1, gammaln(concentration).sum(-1) - gammaln(concentration.sum(-1))


def _von_mises(args: Args) -> tuple[Array, Array]:
    loc, concentration = as_float(args["loc"]), as_float(args["concentration"])
    eta = columns(concentration * jnp.cos(loc), concentration * jnp.sin(loc))
    # i0e is exp(-k) I0(k): the plain Bessel function overflows at a concentration of 88 in float32
    return eta, jnp.broadcast_to(jnp.log(i0e(concentration)) + concentration, eta.shape[:-1])


def _levy_base(x: Array, fixed: Args) -> Array:
    return -1.5 * jnp.log(as_float(x) - as_float(fixed["loc"])) - 0.5 * math.log(2 * math.pi)


def _von_mises_resultant(t: Array, n: Array, args: Args) -> tuple[Array, Array]:
    return args["concentration"] * t[..., 0], args["concentration"] * t[..., 1]


register_family(
    dist.Exponential,
    Family(
        name="Exponential",
        args=("rate",),
        rules={"rate": Power(lambda t, n, args: (n, t[..., 0]), degree=1)},
        features=lambda x, fixed: rows(x),
        natural=lambda args: (columns(-as_float(args["rate"])), -jnp.log(as_float(args["rate"]))),
        base=_zero,
        source=_BROWN,
    ),
)

register_family(
    dist.Gamma,
    Family(
        name="Gamma",
        args=("concentration", "rate"),
        rules={"concentration": _digamma_of("the concentration"), "rate": Power(_rate_coefficients, degree=1)},
        features=lambda x, fixed: rows(jnp.log(as_float(x)), x),
        natural=_gamma,
        base=_zero,
        source=_JOHNSON,
    ),
)

register_family(
    dist.Chi2,
    Family(
        name="Chi2",
        args=("df",),
        rules={"df": _digamma_of("df")},
        features=lambda x, fixed: rows(jnp.log(as_float(x))),
        natural=_chi2,
        base=lambda x, fixed: -0.5 * as_float(x),
        source=_JOHNSON,
    ),
)

register_family(
    dist.InverseGamma,
    Family(
        name="InverseGamma",
        args=("concentration", "rate"),
        rules={"concentration": _digamma_of("the concentration"), "rate": Power(_rate_coefficients, degree=1)},
        features=lambda x, fixed: rows(jnp.log(as_float(x)), 1 / as_float(x)),
        natural=_inverse_gamma,
        base=_zero,
        source=_JOHNSON,
    ),
)

register_family(
    dist.Beta,
    Family(
        name="Beta",
        args=("concentration1", "concentration0"),
        rules={name: _digamma_of(name) for name in ("concentration1", "concentration0")},
        features=lambda x, fixed: rows(jnp.log(as_float(x)), jnp.log1p(-as_float(x))),
        natural=_beta,
        base=_zero,
        source=_MINKA,
    ),
)

register_family(
    dist.BetaProportion,
    Family(
        name="BetaProportion",
        args=("mean", "concentration"),
        rules={"mean": _digamma_of("the mean"), "concentration": _digamma_of("the concentration")},
        features=lambda x, fixed: rows(jnp.log(as_float(x)), jnp.log1p(-as_float(x))),
        natural=_beta_proportion,
        base=_zero,
        source=_MINKA,
    ),
)

register_family(
    dist.Dirichlet,
    Family(
        name="Dirichlet",
        args=("concentration",),
        rules={"concentration": _digamma_of("the concentration")},
        features=lambda x, fixed: jnp.log(as_float(x)),
        natural=_dirichlet,
        base=lambda x, fixed: jnp.zeros_like(as_float(x)[0]),
        event_dim=1,
        arg_dims=(1,),
        source=_MINKA,
    ),
)

register_family(
    dist.VonMises,
    Family(
        name="VonMises",
        args=("loc", "concentration"),
        rules={
            "loc": Direction(_von_mises_resultant),
            "concentration": NoClosedForm("the ratio of Bessel functions in it has no inverse in closed form"),
        },
        features=lambda x, fixed: rows(jnp.cos(as_float(x)), jnp.sin(as_float(x))),
        natural=_von_mises,
        base=lambda x, fixed: jnp.full_like(as_float(x), -math.log(2 * math.pi)),
        source=_MARDIA,
    ),
)

register_family(
    dist.Pareto,
    Family(
        name="Pareto",
        args=("alpha",),
        rules={"alpha": Power(lambda t, n, args: (n, t[..., 0]), degree=1)},
        features=lambda x, fixed: rows(jnp.log(as_float(x) / as_float(fixed["scale"]))),
        natural=lambda args: (columns(-as_float(args["alpha"])), -jnp.log(as_float(args["alpha"]))),
        base=lambda x, fixed: -jnp.log(as_float(x)),
        fixed=("scale",),
        bounds=("scale",),
        otherwise="the support of a Pareto starts at its scale, so there is no natural form in the scale",
        source=_JOHNSON,
    ),
)

register_family(
    dist.Levy,
    Family(
        name="Levy",
        args=("scale",),
        rules={"scale": Power(lambda t, n, args: (0.5 * n, 0.5 * t[..., 0]), degree=1)},
        features=lambda x, fixed: rows(1 / (as_float(x) - as_float(fixed["loc"]))),
        natural=lambda args: (columns(-0.5 * as_float(args["scale"])), -0.5 * jnp.log(as_float(args["scale"]))),
        base=_levy_base,
        fixed=("loc",),
        bounds=("loc",),
        otherwise="the support of a Levy starts at its loc, so there is no natural form in the loc",
        source=_JOHNSON,
    ),
)

r"""What a site would be if it held one latent more: the augmentations that make a location's objective quadratic.

In: nothing. Out: a table of `Law`. Each bounds the log density of a row from below by a parabola in one value of it,
the location or the log-odds :math:`\psi`, that touches at the old value; its curvature is

.. math:: \frac{\nu + 1}{\nu s^2 + r^2}, \qquad \frac{1}{b\,|r|}, \qquad \frac{\tanh(\psi / 2)}{2 \psi}, \qquad 1,
   \qquad \frac{1}{s^2}

of a Student t and a Laplace with residual `r`, a logistic and a normal probability, and a Normal value that is known to
lie in an interval or was kept for lying in one. The last two hold since the variance of a Normal within an interval is
less than that of the whole.

References:
    Liu and Rubin 1995, "ML estimation of the t distribution using EM and its extensions, ECM and ECME"; Andrews and
    Mallows 1974, "Scale mixtures of normal distributions"; Polson, Scott and Windle 2013, "Bayesian inference for
    logistic models using Polya-Gamma latent variables"; Albert and Chib 1993, "Bayesian analysis of binary and
    polychotomous response data"; Dempster, Laird and Rubin 1977, section 4.2; Amemiya 1984, "Tobit models: a survey".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax import Array

FLAT = 1e-6  # of the mean residual: those below it would have a Laplace's curvature without bound


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
    """An augmentation.

    Attributes:
        what: the value that it makes a location, as the plan names it.
        latent: what the site is, given the latent.
        source: where it is derived.
        curvature: that of the parabola, from the arguments it `reads`, the observed value and the place.
        reads: arguments of the site.
    """

    what: str
    latent: str
    source: str
    curvature: Callable[[Mapping[str, Array], Array, Array], Array]
    reads: tuple[str, ...] = ()


def _student(args: Mapping[str, Array], x: Array, loc: Array) -> Array:
    df, scale = args.get("df", jnp.ones(())), args["scale"]
    return (df + 1) / (df * scale**2 + (x - loc) ** 2)


def _laplace(args: Mapping[str, Array], x: Array, loc: Array) -> Array:
    distance = jnp.abs(x - loc)
    return 1 / (args["scale"] * jnp.maximum(distance, FLAT * distance.mean() + jnp.finfo(distance.dtype).tiny))


def _logistic(args: Mapping[str, Array], x: Array, logits: Array) -> Array:
    del args, x
    half = 0.5 * jnp.where(jnp.abs(logits) < 1e-4, 1.0, logits)
    return jnp.where(jnp.abs(logits) < 1e-4, 0.25, 0.25 * jnp.tanh(half) / half)


def _normal(args: Mapping[str, Array], x: Array, loc: Array) -> Array:
    del x
    return 1 / args["scale"] ** 2 + jnp.zeros_like(loc)


def _utility(args: Mapping[str, Array], x: Array, utility: Array) -> Array:
    del args, x
    return jnp.ones_like(utility)


_PRECISION, _VARIANCE = "a Normal whose precision is Gamma", "a Normal whose variance is Exponential"
STUDENT = Law("the location", _PRECISION, "Liu and Rubin 1995", _student, ("df", "scale"))
CAUCHY = Law("the location", _PRECISION, "Liu and Rubin 1995", _student, ("scale",))
LAPLACE = Law("the location", _VARIANCE, "Andrews and Mallows 1974", _laplace, ("scale",))
LOGISTIC = Law(
    "the log-odds", "a Normal in its logits given a Polya-Gamma variable", "Polson, Scott and Windle 2013", _logistic
)
PROBIT = Law("the utility", "the sign of a latent Normal utility", "Albert and Chib 1993", _utility)
CENSORED = Law("the location", "a Normal value that is not seen", "Dempster, Laird and Rubin 1977", _normal, ("scale",))
TRUNCATED = Law(
    "the location", "a Normal value that was kept, with the probability of that at its tangent", "Amemiya 1984",
    _normal, ("scale",),
)  # fmt: skip
QUADRATIC = Law("the location", "what it is, a Normal", "Aitken 1935", _normal, ("scale",))

# of distributions that hold the place as an argument
BY_SITE: dict[str, tuple[str, Law]] = {
    "StudentT": ("loc", STUDENT),
    "Cauchy": ("loc", CAUCHY),
    "Laplace": ("loc", LAPLACE),
    "LeftCensoredDistribution": ("loc", CENSORED),
    "RightCensoredDistribution": ("loc", CENSORED),
    "IntervalCensoredDistribution": ("loc", CENSORED),
    "LeftTruncatedDistribution": ("loc", TRUNCATED),
    "RightTruncatedDistribution": ("loc", TRUNCATED),
    "TwoSidedTruncatedDistribution": ("loc", TRUNCATED),
}

"""Models with one continuous latent in every cell, over the registry of forms that are integrated exactly.

A `Pair` is a prior and a reader; `model` makes a NumPyro model of them, in which rows read their own latent or, with
`grouped`, that of their group. A new pair in `PAIRS` is put to every law.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

ROWS, GROUPS = 7, 3
GROUP = np.array([0, 1, 1, 2, 2, 2, 0])
X = np.linspace(-1.0, 1.0, ROWS)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A latent's prior, and the site that reads it; `params` are their start values with their constraints."""

    name: str
    prior: Callable[[Mapping[str, Any]], dist.Distribution]
    reader: Callable[[Any, Mapping[str, Any], Any], dist.Distribution]
    y: np.ndarray
    params: Mapping[str, tuple[Any, Any]]
    form: str

    def model(self, grouped: bool = False, masked: bool = False) -> Callable:
        def model(y, x):
            p = {n: numpyro.param(n, jnp.asarray(v), constraint=c) for n, (v, c) in self.params.items()}
            if grouped:
                with numpyro.plate("groups", GROUPS):
                    u = numpyro.sample("u", self.prior(p))
                u = u[GROUP]
            with numpyro.plate("rows", ROWS):
                if not grouped:
                    u = numpyro.sample("u", self.prior(p))
                law = self.reader(u, p, x)
                numpyro.sample("y", law.mask(np.arange(ROWS) != 2) if masked else law, obs=y)

        return model

    def __repr__(self) -> str:
        return self.name


POSITIVE, REAL = constraints.positive, constraints.real
COUNTS, TIMES = np.array([0, 3, 1, 7, 2, 0, 4]), np.array([0.3, 2.1, 0.9, 0.05, 1.4, 3.3, 0.7])
VALUES = np.array([0.2, -1.3, 0.8, 2.9, -0.4, 0.6, 1.1])
VECTORS = np.stack([VALUES, VALUES[::-1] * 0.7], -1)
GAMMA = {"a": (1.3, POSITIVE), "b": (0.8, POSITIVE)}
BETA = {"a": (0.7, POSITIVE), "b": (1.9, POSITIVE)}


def gamma(p):
    return dist.Gamma(p["a"], p["b"])


def beta(p):
    return dist.Beta(p["a"], p["b"])


def inverse_gamma(p):
    return dist.InverseGamma(p["a"] + 1, p["b"])


def normal_by_precision(u, p, x):
    return dist.Normal(p["m"] * x, p["s"] / jnp.sqrt(u))


def vector_by_precision(u, p, x):
    shape = jnp.array([[1.0, 0.3], [0.3, 2.0]])
    return dist.MultivariateNormal(p["m"] * jnp.ones(2), precision_matrix=u[..., None, None] * shape)


LOC, SCALE = {"m": (0.4, REAL)}, {"s": (1.2, POSITIVE)}

PAIRS = (
    Pair("poisson", gamma, lambda u, p, x: dist.Poisson(u), COUNTS, GAMMA, "Gamma"),
    Pair(
        "poisson_regression", gamma, lambda u, p, x: dist.Poisson(u * jnp.exp(p["m"] * x)), COUNTS, GAMMA | LOC, "Gamma"
    ),
    Pair("exponential", gamma, lambda u, p, x: dist.Exponential(u * jnp.exp(p["m"] * x)), TIMES, GAMMA | LOC, "Gamma"),
    Pair("gamma", gamma, lambda u, p, x: dist.Gamma(p["s"], u), TIMES, GAMMA | SCALE, "Gamma"),
    Pair("precision", gamma, normal_by_precision, VALUES, GAMMA | LOC | SCALE, "Gamma"),
    Pair("vector_precision", gamma, vector_by_precision, VECTORS, GAMMA | LOC, "Gamma"),
    Pair(
        "student",
        lambda p: dist.Chi2(p["a"] + 1),
        normal_by_precision,
        VALUES,
        {"a": (2.0, POSITIVE)} | LOC | SCALE,
        "Gamma",
    ),
    Pair(
        "lomax",
        lambda p: dist.Exponential(p["a"]),
        lambda u, p, x: dist.Exponential(u),
        TIMES,
        {"a": (0.6, POSITIVE)},
        "Gamma",
    ),
    Pair(
        "variance",
        inverse_gamma,
        lambda v, p, x: dist.Normal(p["m"] * x, jnp.sqrt(v)),
        VALUES,
        GAMMA | LOC,
        "InverseGamma",
    ),
    Pair("bernoulli", beta, lambda u, p, x: dist.Bernoulli(u), (COUNTS > 1).astype(int), BETA, "Beta"),
    Pair("binomial", beta, lambda u, p, x: dist.Binomial(9, u), COUNTS, BETA, "Beta"),
    Pair("geometric", beta, lambda u, p, x: dist.Geometric(u), COUNTS, BETA, "Beta"),
    Pair("negative_binomial", beta, lambda u, p, x: dist.NegativeBinomialProbs(3.0, u), COUNTS, BETA, "Beta"),
)


LOGNORMAL = {"a": (0.3, REAL), "b": (0.8, POSITIVE)}


def normal(p):
    return dist.Normal(p["a"], p["b"])


def log_odds(u, p, x):
    return dist.Bernoulli(logits=p["m"] * x + 1.7 * u)


# no conjugate form holds, and quadrature takes over
QUADRATURE = (
    Pair("logit", normal, log_odds, (COUNTS > 1).astype(int), LOGNORMAL | LOC, "real"),
    Pair("log_rate", normal, lambda u, p, x: dist.Poisson(jnp.exp(u + p["m"] * x)), COUNTS, LOGNORMAL | LOC, "real"),
    Pair("scale", normal, lambda u, p, x: dist.Normal(p["m"] * x, jnp.exp(u)), VALUES, LOGNORMAL | LOC, "real"),
    Pair(
        "lognormal_rate",
        lambda p: dist.LogNormal(p["a"], p["b"]),
        lambda u, p, x: dist.Poisson(u),
        COUNTS,
        LOGNORMAL,
        "positive",
    ),
    Pair("added_rate", gamma, lambda u, p, x: dist.Poisson(u + p["s"]), COUNTS, GAMMA | SCALE, "positive"),
    Pair(
        "noisy_coin",
        lambda p: dist.Beta(p["a"] + 2, p["b"] + 2),
        lambda u, p, x: dist.Binomial(9, 0.1 + 0.8 * u),
        COUNTS,
        BETA,
        "unit",
    ),
)


def on_a_grid(pair: Pair, rows: list[int]) -> tuple[float, float, float]:
    """Log integral, mean and variance of one cell that the given rows read, by the trapezoid rule in free coordinates.

    The integrand and all its derivatives vanish at both ends, where the rule converges faster than any power.
    """
    params = {n: jnp.asarray(v) for n, (v, _) in pair.params.items()}
    s = jnp.linspace(-45.0, 45.0, 18_001)
    u, jacobian = jnp.exp(s), s
    if pair.form in ("Beta", "unit"):
        u, jacobian = jax.nn.sigmoid(s), -jax.nn.softplus(s) - jax.nn.softplus(-s)
    elif pair.form == "real":
        u, jacobian = s, jnp.zeros_like(s)
    log_joint = pair.prior(params).log_prob(u) + jacobian
    for i in rows:
        log_joint += jax.vmap(lambda v, i=i: pair.reader(v, params, X[i]).log_prob(pair.y[i]))(u)
    log_joint = jnp.where(jnp.isnan(log_joint), -jnp.inf, log_joint)  # where 1 - u rounds to zero
    weight = jnp.exp(log_joint)
    z = weight.sum()
    mean = (weight * u).sum() / z
    return float(jnp.log(z * (s[1] - s[0]))), float(mean), float((weight * (u - mean) ** 2).sum() / z)

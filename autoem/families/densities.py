r"""Log densities that keep their digits where a distribution nears its limit.

In: an unwrapped NumPyro distribution and a value. Out: its log density. NumPyro writes the negative binomial, the beta
binomial, the Dirichlet multinomial and Student's t as differences of log gamma functions, each of the size of its
concentration or degrees of freedom, times their logarithm. Where data are no more spread than a Poisson, a binomial or
a Normal, the likelihood is greatest at infinity; on the way there such differences lose all their digits, and what is
left (at 1e16, hundreds of nats) looks like a better fit. Here every difference is one ratio,

.. math:: \log \frac{\Gamma(c + y)}{\Gamma(c)} = y \log c + (c + y - \tfrac12) \log(1 + y / c) - y + R(c + y) - R(c)

with Stirling's remainder `R`, whose rounding error is that of `y log c`. For values that are censored or truncated see
`intervals`. Of log-odds that are exactly zero, where fits like to start, NumPyro's derivatives are not those of its
density, which it writes with a clip; here they are.

References:
    Abramowitz and Stegun 1964, Handbook of Mathematical Functions, 6.1.40 to 6.1.42.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import gammaln, xlog1py
from numpyro.distributions.discrete import ZeroInflatedProbs

from autoem.families._arrays import finite
from autoem.families.intervals import FORMS

LARGE = 64.0  # from here on four terms of Stirling's remainder are exact in double precision


def log_density(base: Any, value: Any) -> Array:
    """The log density of `base` at `value`, of the batch shape that NumPyro's own has."""
    if isinstance(base, ZeroInflatedProbs) and held(base.base_dist):
        gate = jnp.asarray(base.gate)
        inside = jnp.log1p(-gate) + log_density(base.base_dist, value)
        return jnp.where(value == 0, jnp.log(gate + jnp.exp(inside)), inside)
    if isinstance(base, dist.MixtureSameFamily) and held(base.component_distribution) and base.event_dim == 0:
        weights: Any = base.mixing_distribution
        each = log_density(base.component_distribution, jnp.expand_dims(value, -1))
        return jax.nn.logsumexp(jax.nn.log_softmax(jnp.asarray(weights.logits)) + each, axis=-1)
    form = held(base)
    return form(base, jnp.asarray(value, jnp.result_type(float))) if form else base.log_prob(value)


def held(base: Any) -> Callable[[Any, Any], Array] | None:
    """The stable form of a distribution; None where it has none, or a `log_prob` of its own."""
    own = getattr(type(base), "log_prob", None)
    return next((form for kind, form in STABLE.items() if isinstance(base, kind) and own is kind.log_prob), None)


def log_rising(c: Array, y: Array) -> Array:
    """The logarithm of `gamma(c + y) / gamma(c)`, for `c` above 0 and `y` not below 0."""
    large = c > LARGE
    c, few = jnp.where(large, c, LARGE), jnp.where(large, 1.0, c)
    stirling = y * jnp.log(c) + (c + y - 0.5) * jnp.log1p(y / c) - y + remainder(c + y) - remainder(c)
    return jnp.where(large, stirling, gammaln(few + y) - gammaln(few))


def remainder(x: Array) -> Array:
    """What Stirling's formula leaves of the logarithm of gamma, to one part in 1e16 from `LARGE` on."""
    r = 1 / x
    return r / 12 - r**3 / 360 + r**5 / 1260 - r**7 / 1680


def _gamma_poisson(d: Any, y: Any) -> Array:
    c, rate = d.concentration, d.rate
    return log_rising(c, y) - gammaln(y + 1.0) - c * jnp.log1p(1 / rate) - xlog1py(y, rate)


def _beta_binomial(d: Any, y: Any) -> Array:
    a, b, n = d.concentration1, d.concentration0, d.total_count
    ways = gammaln(n + 1.0) - gammaln(y + 1.0) - gammaln(n - y + 1.0)
    return ways + log_rising(a, y) + log_rising(b, n - y) - log_rising(a + b, n)


def _binomial_logits(d: Any, y: Any) -> Array:
    n = d.total_count
    ways = gammaln(n + 1.0) - gammaln(y + 1.0) - gammaln(n - y + 1.0)
    logits = finite(d.logits)
    return ways + y * jax.nn.log_sigmoid(logits) + (n - y) * jax.nn.log_sigmoid(-logits)


def _bernoulli_logits(d: Any, y: Any) -> Array:
    logits = finite(d.logits)
    return y * logits - jax.nn.softplus(logits)


def _dirichlet_multinomial(d: Any, y: Any) -> Array:
    c, n = d.concentration, jnp.sum(y, -1)
    ways = gammaln(n + 1.0) - gammaln(y + 1.0).sum(-1)
    return ways + log_rising(c, y).sum(-1) - log_rising(jnp.sum(c, -1), n)


def _student(d: Any, y: Any) -> Array:
    df, z = d.df, (y - d.loc) / d.scale
    half = jnp.asarray(0.5, jnp.result_type(float))
    level = log_rising(df / 2, half) - 0.5 * jnp.log(jnp.pi * df) - jnp.log(d.scale)
    return level - 0.5 * (df + 1) * jnp.log1p(z**2 / df)


STABLE: dict[type, Callable[[Any, Any], Array]] = {
    dist.GammaPoisson: _gamma_poisson,
    dist.BetaBinomial: _beta_binomial,
    dist.DirichletMultinomial: _dirichlet_multinomial,
    dist.StudentT: _student,
    dist.BinomialLogits: _binomial_logits,
    dist.BernoulliLogits: _bernoulli_logits,
    **FORMS,
}

"""Discrete families: Bernoulli, Binomial, Categorical, Multinomial, Geometric, negative binomial and Poisson.

Natural parameters are finite whatever the arguments, so that a statistic that is zero adds zero: probabilities of
Bernoulli-like families are kept off 0 and 1 as NumPyro keeps them, and where NumPyro's log density is minus infinity (a
hard zero of a simplex, a rate of zero) a very large negative number stands for it. Binomial-like families
count successes and failures as two statistics, so that the number of trials may differ from row to row.

What is certain thus has log density 0 at every closed boundary, by 0 log 0 = 0. NumPyro says otherwise there of a
Geometric with probs 1 (minus infinity at 0), and of Binomial, Geometric, NegativeBinomial and Multinomial whose logits
are infinite (NaN).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.nn import log_sigmoid, log_softmax, softplus
from jax.scipy.special import betaln, gammaln

from autoem.families._arrays import as_float, clamp, columns, finite, impossible, rows, safe_log
from autoem.families._family import Args, Counting, Family, Power, register_family
from autoem.graph.derivatives import log, log1p

Counts = Callable[[Array, Array], tuple[Array, Array | None]]
Base = Callable[[Array, Args], Array]

_BROWN = "Brown 1986, Fundamentals of Statistical Exponential Families, chapter 1"
_JOHNSON = "Johnson, Kemp and Kotz 2005, Univariate Discrete Distributions, chapters 3 to 5"


def _pair(t: Array, n: Array) -> tuple[Array, Array]:
    return t[..., 0], t[..., 1]


def _both(args: Args) -> tuple[Array, Array]:
    """Log probabilities of success and of failure: with both counted, no normaliser is left."""
    if "probs" in args:
        probs = clamp(args["probs"])
        eta = columns(log(probs), log1p(-probs))
    else:
        logits = finite(args["logits"])
        eta = columns(log_sigmoid(logits), log_sigmoid(-logits))
    return eta, jnp.zeros_like(eta[..., 0])


def _bernoulli(args: Args) -> tuple[Array, Array]:
    if "logits" in args:
        logits = finite(args["logits"])
        return columns(logits), softplus(logits)
    probs = clamp(args["probs"])
    failure = log1p(-probs)
    return columns(log(probs) - failure), -failure


def _geometric(args: Args) -> tuple[Array, Array]:
    if "logits" in args:
        logits = finite(args["logits"])
        return columns(log_sigmoid(-logits)), -log_sigmoid(logits)
    probs = clamp(args["probs"])
    return columns(log1p(-probs)), -log(probs)


def _simplex(args: Args) -> tuple[Array, Array]:
    if "probs" in args:
        eta = safe_log(args["probs"])
    else:  # logits of minus infinity are how models write a hard zero
        eta = log_softmax(as_float(args["logits"]), axis=-1)
        eta = jnp.maximum(eta, impossible(eta.dtype))
    return eta, jnp.zeros_like(eta[..., 0])


def _binomial_base(x: Array, fixed: Args) -> Array:
    x, total = as_float(x), as_float(fixed["total_count"])
    return gammaln(total + 1) - gammaln(x + 1) - gammaln(total - x + 1)


def _negative_binomial_base(x: Array, fixed: Args) -> Array:
    x, total = as_float(x), as_float(fixed["total_count"])
    return gammaln(total + x) - gammaln(total) - gammaln(x + 1)


def _negative_binomial_base_by_beta(x: Array, fixed: Args) -> Array:
    """As NumPyro has it where it is given probabilities: JAX's `betaln` errs by 1e-7, and densities are to agree."""
    x, total = as_float(x), as_float(fixed["total_count"])
    return -betaln(total, x + 1) - jnp.log(total + x)


def _multinomial_base(x: Array, fixed: Args) -> Array:
    return gammaln(as_float(fixed["total_count"]) + 1) - gammaln(as_float(x) + 1).sum(0)


def _zero(x: Array, fixed: Args) -> Array:
    return jnp.zeros_like(as_float(x))


def _one_hot(x: Array, fixed: Args) -> Array:
    return jax.nn.one_hot(x, fixed["size"], axis=0, dtype=jnp.result_type(float))


def _register(
    probs: type, logits: type, counts: Counts, *, base: Base, probs_base: Base | None = None, arg_dim: int = 0,
    sized: bool = False, **fields,
) -> None:  # fmt: skip
    """One entry for the class that holds probabilities, one for the class that holds log-odds."""
    for cls, arg, h in ((probs, "probs", probs_base or base), (logits, "logits", base)):
        rules = {arg: Counting(counts, logits=arg == "logits")}
        sized_by = arg if sized else ""
        register_family(cls, Family(args=(arg,), rules=rules, base=h, arg_dims=(arg_dim,), sized_by=sized_by, **fields))


_register(
    dist.BernoulliProbs,
    dist.BernoulliLogits,
    lambda t, n: (t[..., 0], n - t[..., 0]),
    name="Bernoulli",
    features=lambda x, fixed: rows(x),
    natural=_bernoulli,
    base=_zero,
    source=_BROWN,
)

_register(
    dist.BinomialProbs,
    dist.BinomialLogits,
    _pair,
    name="Binomial",
    features=lambda x, fixed: rows(x, as_float(fixed["total_count"]) - as_float(x)),
    natural=_both,
    base=_binomial_base,
    fixed=("total_count",),
    otherwise="total_count stands inside a binomial coefficient, so there is no natural form in it",
    source=_BROWN,
)

_register(
    dist.GeometricProbs,
    dist.GeometricLogits,
    lambda t, n: (n, t[..., 0]),
    name="Geometric",
    features=lambda x, fixed: rows(x),
    natural=_geometric,
    base=_zero,
    source=_JOHNSON,
)

_register(
    dist.NegativeBinomialProbs,
    dist.NegativeBinomialLogits,
    _pair,
    name="NegativeBinomial",
    features=lambda x, fixed: rows(x, fixed["total_count"]),
    natural=_both,
    base=_negative_binomial_base,
    probs_base=_negative_binomial_base_by_beta,
    fixed=("total_count",),
    otherwise="total_count stands inside a gamma function of the count, so there is no natural form in it",
    source=_JOHNSON,
)

_register(
    dist.CategoricalProbs,
    dist.CategoricalLogits,
    lambda t, n: (t, None),
    name="Categorical",
    features=_one_hot,
    natural=_simplex,
    base=_zero,
    arg_dim=1,
    sized=True,
    looks_up=True,
    source=_BROWN,
)

_register(
    dist.MultinomialProbs,
    dist.MultinomialLogits,
    lambda t, n: (t, None),
    name="Multinomial",
    features=lambda x, fixed: as_float(x),
    natural=_simplex,
    base=_multinomial_base,
    event_dim=1,
    arg_dim=1,
    fixed=("total_count",),
    otherwise="total_count stands inside a multinomial coefficient, so there is no natural form in it",
    source=_BROWN,
)

register_family(
    dist.Poisson,
    Family(
        name="Poisson",
        args=("rate",),
        rules={"rate": Power(lambda t, n, args: (t[..., 0], n), degree=1)},
        features=lambda x, fixed: rows(x),
        natural=lambda args: (columns(safe_log(args["rate"])), as_float(args["rate"])),
        base=lambda x, fixed: -gammaln(as_float(x) + 1),
        source=_BROWN,
    ),
)

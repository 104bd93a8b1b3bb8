"""Distributions known to have no natural form in all their arguments: each with the reason and the nearest rewrite.

A site of one of these is evaluated by its own `log_prob`; what this table adds is what the plan says about it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpyro.distributions as dist

from autoem.families._family import Opaque, nothing, register_family
from autoem.families.intervals import base_of

_SUPPORT = "its support depends on its arguments"
_HIDDEN = "its density is a sum over a hidden component"
_CENSORED = "a value that is not seen stands inside a cumulative distribution function"
_TRUNCATED = "its location and scale stand in the probability of what truncation leaves"
_LATENT_VALUE = "write the value as a latent, and what is known of it as Bernoulli((value > limit) * 1.0) seen as 1"
_COMPONENTS = "have the component written: handlers.reparam(model, config={site: autoem.Components()})"

_ENTRIES: tuple[tuple[type, str, str], ...] = (
    # heavy tails: a normal whose precision is latent
    (
        dist.StudentT,
        "the logarithm of one plus a squared residual does not split into parameter times statistic",
        "write the latent precision: w ~ Gamma(df / 2, df / 2), then x ~ Normal(loc, scale / sqrt(w))",
    ),
    (
        dist.MultivariateStudentT,
        "the logarithm of one plus a quadratic form does not split into parameter times statistic",
        "write the latent precision: w ~ Gamma(df / 2, df / 2), "
        "then x ~ MultivariateNormal(loc, scale_tril=scale_tril / sqrt(w))",
    ),
    (
        dist.Cauchy,
        "the logarithm of one plus a squared residual does not split into parameter times statistic",
        "write the latent precision: w ~ Gamma(1/2, 1/2), then x ~ Normal(loc, scale / sqrt(w))",
    ),
    (
        dist.HalfCauchy,
        "the logarithm of one plus a squared ratio does not split into parameter times statistic",
        "write the latent precision: w ~ Gamma(1/2, 1/2), then x ~ HalfNormal(scale / sqrt(w))",
    ),
    (
        dist.Logistic,
        "the logarithm of one plus an exponential of the value does not split into parameter times statistic",
        "",
    ),
    (
        dist.Gumbel,
        "the value stands in an exponential with its scale",
        "with a known scale s, write Exponential(rate) on exp(-x / s)",
    ),
    (
        dist.Weibull,
        "the concentration is a power of the value",
        "with a known concentration c, write Exponential(rate) on x**c",
    ),
    (
        dist.Kumaraswamy,
        "one concentration is a power of the value inside a logarithm",
        "Beta(concentration1, concentration0) has nearly the same shapes",
    ),
    (
        dist.LowRankMultivariateNormal,
        "its covariance is a sum, so that neither the factor nor the diagonal is a natural parameter",
        "write the factors as latent: f ~ Normal(0, 1), then x ~ Normal(loc + W @ f, sqrt(cov_diag))",
    ),
    # the support moves
    (
        dist.Uniform,
        _SUPPORT,
        "the likelihood is greatest at the extremes of the data: pass low and high as data",
    ),
    (
        dist.LogUniform,
        _SUPPORT,
        "the likelihood is greatest at the extremes of the data: pass low and high as data",
    ),
    (dist.DiscreteUniform, _SUPPORT, "write Categorical(probs), or pass low and high as data"),
    # counts with more spread: a latent rate or probability
    (
        dist.BetaBinomial,
        "its concentrations stand in a beta function together with the count",
        "write the latent probability: p ~ Beta(concentration1, concentration0), then x ~ Binomial(total_count, p)",
    ),
    (
        dist.BetaNegativeBinomial,
        "its concentrations stand in a beta function together with the count",
        "write the latent probability: p ~ Beta(concentration1, concentration0), then x ~ NegativeBinomial(n, p)",
    ),
    (
        dist.DirichletMultinomial,
        "its concentration stands in a gamma function together with the count",
        "write the latent probabilities: p ~ Dirichlet(concentration), then x ~ Multinomial(total_count, p)",
    ),
    (
        dist.NegativeBinomial2,
        "its concentration stands in a gamma function together with the count",
        "write the latent rate: r ~ Gamma(concentration, concentration / mean), then x ~ Poisson(r); "
        "or, with a known concentration, NegativeBinomial(concentration, probs)",
    ),
    (
        dist.GammaPoisson,
        "its concentration stands in a gamma function together with the count",
        "write the latent rate: r ~ Gamma(concentration, rate), then x ~ Poisson(r); "
        "or, with a known concentration, NegativeBinomial(concentration, probs)",
    ),
    # values known to lie in an interval
    (dist.LeftCensoredDistribution, _CENSORED, _LATENT_VALUE),
    (dist.RightCensoredDistribution, _CENSORED, _LATENT_VALUE),
    (dist.IntervalCensoredDistribution, _CENSORED, _LATENT_VALUE),
    (dist.LeftTruncatedDistribution, _TRUNCATED, ""),
    (dist.RightTruncatedDistribution, _TRUNCATED, ""),
    (dist.TwoSidedTruncatedDistribution, _TRUNCATED, ""),
    # hidden components
    (dist.ZeroInflatedPoisson, f"{_HIDDEN} (a zero by the gate or by the rate)", _COMPONENTS),
    (dist.ZeroInflatedProbs, f"{_HIDDEN} (a zero by the gate or by the base distribution)", _COMPONENTS),
    (dist.ZeroInflatedLogits, f"{_HIDDEN} (a zero by the gate or by the base distribution)", _COMPONENTS),
    (dist.MixtureSameFamily, _HIDDEN, _COMPONENTS),
    (dist.MixtureGeneral, _HIDDEN, _COMPONENTS),
    (
        dist.OrderedLogistic,
        "its probabilities are differences of logistic functions",
        "Categorical(probs) has a closed form where the order of the categories need not be used",
    ),
)


def _of(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda distribution: {name: getattr(distribution, name) for name in names}


def _of_normal(distribution: Any) -> dict[str, Any]:
    """Location and scale of a Normal, or of the logarithm of a LogNormal, that is seen in part."""
    base = base_of(distribution)
    return {} if base is None else {"loc": base.loc, "scale": base.scale}


_PARTS: dict[type, Callable[[Any], dict[str, Any]]] = {
    dist.StudentT: _of("df", "loc", "scale"),
    dist.Cauchy: _of("loc", "scale"),
    dist.NegativeBinomial2: _of("concentration", "rate"),
    dist.GammaPoisson: _of("concentration", "rate"),
    dist.LeftCensoredDistribution: _of_normal,
    dist.RightCensoredDistribution: _of_normal,
    dist.IntervalCensoredDistribution: _of_normal,
    dist.LeftTruncatedDistribution: _of_normal,
    dist.RightTruncatedDistribution: _of_normal,
    dist.TwoSidedTruncatedDistribution: _of_normal,
}

for _cls, _reason, _nearest in _ENTRIES:
    _parts = _PARTS.get(_cls, nothing)
    register_family(_cls, Opaque(_cls.__name__, _reason, _nearest, bounded=_reason == _SUPPORT, parts=_parts))

"""Distributions known to have no natural form in all their arguments: each with the reason and the nearest rewrite.

A site of one of these is evaluated by its own `log_prob`; what this table adds is what the plan says about it.
"""

from __future__ import annotations

import numpyro.distributions as dist

from autoem.families._family import Opaque, register_family

_SUPPORT = "its support depends on its arguments"
_HIDDEN = "its density is a sum over a hidden component"

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
    # hidden components
    (
        dist.ZeroInflatedPoisson,
        f"{_HIDDEN} (a zero by the gate or by the rate)",
        "write the component: z ~ Bernoulli(gate), then x ~ Poisson(rate * (1 - z))",
    ),
    (
        dist.ZeroInflatedProbs,
        f"{_HIDDEN} (a zero by the gate or by the base distribution)",
        "write the component: z ~ Bernoulli(gate), and a base certain of 0 where z is 1, as Poisson(rate * (1 - z))",
    ),
    (
        dist.ZeroInflatedLogits,
        f"{_HIDDEN} (a zero by the gate or by the base distribution)",
        "write the component: z ~ Bernoulli(logits=gate_logits), "
        "and a base certain of 0 where z is 1, as Poisson(rate * (1 - z))",
    ),
    (
        dist.MixtureSameFamily,
        _HIDDEN,
        "write the component: z ~ Categorical(probs), then x from the distribution with arguments indexed by z; "
        "or have it written: handlers.reparam(model, config={site: autoem.Components()})",
    ),
    (
        dist.MixtureGeneral,
        _HIDDEN,
        "write the component: z ~ Categorical(probs), then one masked site for each distribution; "
        "or have it written: handlers.reparam(model, config={site: autoem.Components()})",
    ),
    (
        dist.OrderedLogistic,
        "its probabilities are differences of logistic functions",
        "Categorical(probs) has a closed form where the order of the categories need not be used",
    ),
)

_AUGMENTED = {dist.StudentT: ("df", "loc", "scale"), dist.Cauchy: ("loc", "scale")}

for _cls, _reason, _nearest in _ENTRIES:
    _args = _AUGMENTED.get(_cls, ())
    register_family(_cls, Opaque(_cls.__name__, _reason, _nearest, bounded=_reason == _SUPPORT, args=_args))

"""A NumPyro model and parameter values in, simulated values of its sample sites out, drawn by NumPy.

JAX compiles each of its samplers once for every shape, which would take seconds for a model of a few sites; NumPy's are
ready at once. Distributions that the table lacks fall back to their own sampler.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import discrete
from numpyro.primitives import Messenger

Rng = np.random.Generator
WRAPPERS = dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution


def simulate(
    model: Callable, params: Mapping[str, Any], *args: Any, seed: int = 0, **kwargs: Any
) -> dict[str, np.ndarray]:
    """The value of every sample site when the model is run forwards at `params`."""
    trace = _drawn(handlers.substitute(model, data=dict(params)), seed, args, kwargs)
    return {name: np.asarray(site["value"]) for name, site in trace.items() if site["type"] == "sample"}


def starting_values(model: Callable, *args: Any, seed: int = 0, **kwargs: Any) -> dict[str, np.ndarray]:
    """A value for every parameter: the model's own start of a `param`, a draw of a continuous sample site."""
    trace = _drawn(model, seed, args, kwargs)
    return {name: np.asarray(site["value"]) for name, site in trace.items() if _is_parameter(site)}


def _is_parameter(site: dict) -> bool:
    if site["type"] != "sample":
        return site["type"] == "param"
    return not site["is_observed"] and not site["fn"].support.is_discrete


def _drawn(model: Callable, seed: int, args: tuple, kwargs: dict[str, Any]) -> dict[str, dict]:
    drawn = _DrawWithNumpy(handlers.seed(model, jax.random.key(seed)), np.random.default_rng(seed))
    return handlers.trace(drawn).get_trace(*args, **kwargs)


class _DrawWithNumpy(Messenger):
    def __init__(self, fn: Callable, rng: Rng):
        super().__init__(fn)
        self.rng = rng

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and msg["value"] is None and _sampler(msg["fn"]):
            msg["value"] = _sampler(msg["fn"])(self.rng, *_arguments(msg["fn"]))


def _base(fn: dist.Distribution) -> dist.Distribution:
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def _sampler(fn: dist.Distribution) -> Callable | None:
    return SAMPLERS.get(type(_base(fn)))


def _arguments(fn: dist.Distribution) -> tuple[dist.Distribution, tuple[int, ...]]:
    """The bare distribution, and the batch shape that its draws must have once the wrappers' shape is counted in."""
    base = _base(fn)
    shape = fn.batch_shape + fn.event_shape
    return base, shape[: len(shape) - len(base.event_shape)]


def _categorical(rng: Rng, probs: Any, shape: tuple[int, ...]) -> np.ndarray:
    probs = np.broadcast_to(np.asarray(probs), (*shape, np.shape(probs)[-1]))
    above = rng.random((*shape, 1)) > np.cumsum(probs, axis=-1)
    return np.minimum(above.sum(-1), probs.shape[-1] - 1)


def _multinomial(rng: Rng, d: Any, shape: tuple[int, ...]) -> np.ndarray:
    count, size = int(np.max(d.total_count)), np.shape(d.probs)[-1]
    draws = [_categorical(rng, d.probs, shape) for _ in range(count)]
    return sum((draw[..., None] == np.arange(size)).astype(int) for draw in draws)


def _dirichlet(rng: Rng, d: Any, shape: tuple[int, ...]) -> np.ndarray:
    gamma = rng.gamma(np.broadcast_to(np.asarray(d.concentration), shape + d.event_shape))
    return gamma / gamma.sum(-1, keepdims=True)


def _multivariate_normal(rng: Rng, d: Any, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.normal(size=shape + d.event_shape)
    return np.asarray(d.loc) + np.einsum("...ij,...j->...i", np.asarray(d.scale_tril), noise)


def _zero_inflated(rng: Rng, d: Any, shape: tuple[int, ...]) -> np.ndarray:
    return rng.poisson(np.asarray(d.rate), shape) * (rng.random(shape) >= np.asarray(d.gate))


def _bernoulli(rng: Rng, d: Any, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.random(shape) < np.asarray(d.probs)).astype(int)


def _binomial(rng: Rng, d: Any, shape: tuple[int, ...]) -> np.ndarray:
    return rng.binomial(np.asarray(d.total_count), np.asarray(d.probs), shape)


def _negative_binomial(rng: Rng, d: Any, shape: tuple[int, ...]) -> np.ndarray:
    concentration = np.asarray(d.concentration)
    return rng.poisson(rng.gamma(concentration, np.asarray(d.mean) / concentration, shape))


def _beta_binomial(rng: Rng, d: Any, shape: tuple[int, ...]) -> np.ndarray:
    p = rng.beta(np.asarray(d.concentration1), np.asarray(d.concentration0), shape)
    return rng.binomial(np.asarray(d.total_count), p)


def _of(*names: str) -> Callable:
    """A family whose NumPy sampler takes these attributes as they are."""
    return lambda method: lambda rng, d, shape: getattr(rng, method)(*(np.asarray(getattr(d, n)) for n in names), shape)


SAMPLERS: dict[type, Callable] = {
    dist.Normal: _of("loc", "scale")("normal"),
    dist.LogNormal: _of("loc", "scale")("lognormal"),
    dist.Laplace: _of("loc", "scale")("laplace"),
    dist.VonMises: _of("loc", "concentration")("vonmises"),
    dist.Poisson: _of("rate")("poisson"),
    dist.Beta: _of("concentration1", "concentration0")("beta"),
    dist.HalfNormal: lambda rng, d, shape: abs(rng.normal(0.0, np.asarray(d.scale), shape)),
    dist.StudentT: lambda rng, d, shape: (
        np.asarray(d.loc) + np.asarray(d.scale) * rng.standard_t(np.asarray(d.df), shape)
    ),
    dist.Exponential: lambda rng, d, shape: rng.exponential(1 / np.asarray(d.rate), shape),
    dist.Gamma: lambda rng, d, shape: rng.gamma(np.asarray(d.concentration), 1 / np.asarray(d.rate), shape),
    dist.InverseGamma: lambda rng, d, shape: 1 / rng.gamma(np.asarray(d.concentration), 1 / np.asarray(d.rate), shape),
    dist.Weibull: lambda rng, d, shape: np.asarray(d.scale) * rng.weibull(np.asarray(d.concentration), shape),
    dist.DiscreteUniform: lambda rng, d, shape: rng.integers(np.asarray(d.low), np.asarray(d.high) + 1, shape),
    discrete.GeometricLogits: lambda rng, d, shape: rng.geometric(np.asarray(d.probs), shape) - 1,
    discrete.BernoulliProbs: _bernoulli,
    discrete.BernoulliLogits: _bernoulli,
    discrete.BinomialProbs: _binomial,
    discrete.BinomialLogits: _binomial,
    discrete.CategoricalProbs: lambda rng, d, shape: _categorical(rng, d.probs, shape),
    discrete.CategoricalLogits: lambda rng, d, shape: _categorical(rng, d.probs, shape),
    discrete.OrderedLogistic: lambda rng, d, shape: _categorical(rng, d.probs, shape),
    discrete.MultinomialProbs: _multinomial,
    discrete.MultinomialLogits: _multinomial,
    discrete.ZeroInflatedPoisson: _zero_inflated,
    dist.NegativeBinomial2: _negative_binomial,
    dist.BetaBinomial: _beta_binomial,
    dist.Dirichlet: _dirichlet,
    dist.MultivariateNormal: _multivariate_normal,
}

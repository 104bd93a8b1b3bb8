"""A NumPyro model, parameter values and data in; exact answers out, by adding up every completion of its latents.

This is the independent truth of the tests. It knows nothing of autoem: it runs the model as NumPyro runs it, with every
latent fixed, and reads the joint log density off the trace. It is exponential in the number of cells (a latent in a
plate has one cell an element), so it is for tiny data, and refuses more than `limit` completions.

Two conventions go beyond NumPyro's joint density, which leaves them open:

- A latent cell that a mask takes out is uniform and counts once: it adds nothing to the log-likelihood, not log K.
- A scaled latent stands for repeated rows, which a sum over single completions cannot express: it is refused here, and
  tests compare a scaled model with the same model on repeated rows instead.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Latent:
    """One discrete latent site: the values it may take, the shape of its cells, and which of them a mask takes out.

    `ragged` says that some cells may take only some of the values.
    """

    name: str
    support: np.ndarray
    shape: tuple[int, ...]
    masked_out: np.ndarray
    ragged: bool

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=int))

    @property
    def log_completions(self) -> float:
        return self.size * float(np.log(len(self.support)))

    @property
    def log_masked_completions(self) -> float:
        return int(self.masked_out.sum()) * float(np.log(len(self.support)))


@dataclasses.dataclass(frozen=True)
class Exact:
    """Exact answers at one value of the parameters.

    Attributes:
        log_likelihood: log density of everything observed (factors included), latents summed out, priors left out.
        log_prior: log density of the sample sites whose value the caller gave as a parameter.
        marginals: latent name to posterior probabilities, shape of the site's value plus a last axis over its support;
            a site with `obs_mask` also appears under its own name, with its observed cells certain.
        mode: latent name to value, the most probable completion.
        mode_log_density: joint log density of the mode and the data, priors left out.
        completions: how many were added up.
    """

    log_likelihood: float
    log_prior: float
    marginals: dict[str, np.ndarray]
    mode: dict[str, np.ndarray]
    mode_log_density: float
    completions: int


class Oracle:
    """Every completion of a model's discrete latents, for one set of data and any values of the parameters."""

    def __init__(
        self, model: Callable, params: Values, *args: Any, limit: int = 2**18, block: int = 2**12, **kwargs: Any
    ):
        self._run = lambda values: _trace(model, values, args, kwargs)
        base = self._run(params)
        self.latents = _latents(base, params)
        self._given = [name for name, site in base.items() if _is_given(site, params)]
        self._base = base
        cells = sum(latent.log_completions for latent in self.latents)
        if cells > np.log(limit) + 1e-9:
            raise ValueError(f"{np.exp(cells):.3g} completions are more than the limit of {limit}")
        self._radix = np.array([len(site.support) for site in self.latents for _ in range(site.size)], int)
        self.completions = int(np.prod(self._radix, dtype=np.int64))
        self._block = min(block, self.completions)
        self._log_weights = jax.jit(lambda params, index: jax.vmap(lambda i: self._log_density(params, i))(index))

    def exact(self, params: Values) -> Exact:
        """The answers at `params`: constrained values of every `param` site and of every maximised sample site."""
        log_weight = self._completions(params)
        top = log_weight.max()
        weight = np.exp(log_weight - top) / np.exp(log_weight - top).sum()
        best = int(log_weight.argmax())
        marginals = {site.name: self._marginal(site, weight) for site in self.latents}
        marginals |= self._merged(marginals)
        base = self._run(params)
        return Exact(
            log_likelihood=float(top + np.log(np.exp(log_weight - top).sum())) - self._log_masked,
            log_prior=float(sum(_log_prob(base[name]) for name in self._given)),
            marginals=marginals,
            mode={site.name: values[0] for site, values in self._decode(np.array([best]))},
            mode_log_density=float(log_weight[best]),
            completions=self.completions,
        )

    def pairwise(self, params: Values, first: str, second: str) -> np.ndarray:
        """Joint posterior of each cell of `first` with each of `second`: (cells, cells, K of first, K of second)."""
        log_weight = self._completions(params)
        weight = np.exp(log_weight - log_weight.max())
        hot = [self._one_hot(self._latent(name)).reshape(len(weight), -1, len(self._latent(name).support))
               for name in (first, second)]  # fmt: skip
        return np.einsum("n,nia,njb->ijab", weight / weight.sum(), *hot)

    def log_likelihood(self, params: Values) -> jax.Array:
        """The observed-data log-likelihood as a function that JAX differentiates; for few completions only."""
        log_weight = self._log_weights(params, jnp.arange(self.completions))
        return jax.nn.logsumexp(log_weight) - self._log_masked

    def expected_log_density(self, params: Values, at: Values) -> jax.Array:
        """Q(params | at): joint log density of data and latents averaged over the posterior at `at`; differentiable."""
        index = jnp.arange(self.completions)
        weight = jax.nn.softmax(self._log_weights(at, index))
        log_weight = self._log_weights(params, index)
        return jnp.sum(jnp.where(weight > 0, weight * jnp.where(weight > 0, log_weight, 0.0), 0.0))

    def log_joint(self, params: Values, latents: Values) -> float:
        """Joint log density of the data and one completion of the latents, priors left out."""
        trace = self._run({**params, **latents})
        return float(sum(_log_prob(site) for name, site in trace.items() if name not in self._given))

    @property
    def _log_masked(self) -> float:
        return sum(site.log_masked_completions for site in self.latents)

    def _completions(self, params: Values) -> np.ndarray:
        """Log density of every completion."""
        blocks = []
        for start in range(0, self.completions, self._block):
            index = np.minimum(np.arange(start, start + self._block), self.completions - 1)  # one shape: compiled once
            blocks.append(np.asarray(self._log_weights(params, index)))
        return np.concatenate(blocks)[: self.completions]

    def _log_density(self, params: Values, index: jax.Array) -> jax.Array:
        latents = {site.name: values[0] for site, values in self._decode(index[None])}
        trace = self._run({**params, **latents})
        total = jnp.asarray(sum(_log_prob(site) for name, site in trace.items() if name not in self._given))
        inside = [jnp.all(trace[site.name]["fn"].support(latents[site.name])) for site in self.latents if site.ragged]
        return jnp.where(jnp.all(jnp.array(inside)), total, -jnp.inf) if inside else total

    def _digits(self, index: Any) -> list[tuple[Latent, Any]]:
        """The completion's number written in mixed radix, one digit a cell: (len(index), cells) for each latent."""
        stride = np.concatenate([[1], np.cumprod(self._radix)[:-1]]).astype(int) if len(self._radix) else self._radix
        digits = (index[:, None] // stride) % self._radix
        starts = np.cumsum([0] + [site.size for site in self.latents])
        return [(site, digits[:, a:b]) for site, a, b in zip(self.latents, starts, starts[1:], strict=False)]

    def _decode(self, index: Any) -> list[tuple[Latent, Any]]:
        xp = np if isinstance(index, np.ndarray) else jnp
        return [(site, xp.asarray(site.support)[digit].reshape(-1, *site.shape)) for site, digit in self._digits(index)]

    def _one_hot(self, site: Latent) -> np.ndarray:
        digits = dict((each.name, digit) for each, digit in self._digits(np.arange(self.completions)))[site.name]
        return (digits[..., None] == np.arange(len(site.support))).reshape(-1, *site.shape, len(site.support))

    def _marginal(self, site: Latent, weight: np.ndarray) -> np.ndarray:
        return np.einsum("n,n...->...", weight, self._one_hot(site))

    def _latent(self, name: str) -> Latent:
        return next(site for site in self.latents if site.name == name)

    def _merged(self, marginals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Marginals of the sites that `obs_mask` split in two: certain where they are observed."""
        out = {}
        for site in self.latents:
            whole = site.name.removesuffix("_unobserved")
            observed = self._base.get(f"{whole}_observed")
            if whole != site.name and observed is not None:
                hot = np.asarray(observed["value"])[..., None] == site.support
                seen = np.broadcast_to(_mask(observed["fn"]), site.shape)
                out[whole] = np.where(seen[..., None], hot, marginals[site.name])
        return out


def brute_force(model: Callable, params: Values, *args: Any, limit: int = 2**18, **kwargs: Any) -> Exact:
    """Exact answers for one model, one set of data and one value of the parameters."""
    return Oracle(model, params, *args, limit=limit, **kwargs).exact(params)


def _trace(model: Callable, values: Values, args: tuple, kwargs: Values) -> dict[str, dict]:
    fixed = handlers.substitute(handlers.seed(model, jax.random.key(0)), data=dict(values))
    with numpyro.validation_enabled(False):  # it looks at values, which are traced
        return handlers.trace(_FirstState(fixed)).get_trace(*args, **kwargs)


class _FirstState(Messenger):
    """Sets whatever discrete site nobody has set to the first value of its support: no sampler is run."""

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and msg["value"] is None and msg["fn"].support.is_discrete:
            fn = msg["fn"]
            msg["value"] = np.full(fn.batch_shape + fn.event_shape, _support(fn)[0])


def _log_prob(site: dict) -> Any:
    if site["type"] != "sample":
        return 0.0
    with numpyro.validation_enabled(False):
        log_prob = site["fn"].log_prob(site["value"])
    return jnp.sum(log_prob if site["scale"] is None else site["scale"] * log_prob)


def _is_given(site: dict, params: Values) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and site["name"] in params


def _latents(trace: dict[str, dict], params: Values) -> tuple[Latent, ...]:
    free = [site for name, site in trace.items() if site["type"] == "sample" and name not in params]
    return tuple(_latent(site) for site in free if not site["is_observed"])


def _latent(site: dict) -> Latent:
    name, fn = site["name"], site["fn"]
    if not fn.support.is_discrete:
        raise ValueError(f"site '{name}' is continuous and no value of it was given")
    if site["scale"] is not None and np.any(np.asarray(site["scale"]) != 1):
        raise ValueError(f"site '{name}' is scaled: give the oracle repeated rows instead")
    shape = np.shape(site["value"])
    mask = np.reshape(_mask(fn), np.shape(_mask(fn)) + (1,) * len(fn.event_shape))
    return Latent(name, _support(fn), shape, ~np.broadcast_to(mask, shape), _is_ragged(fn))


def _mask(fn: dist.Distribution) -> np.ndarray:
    """Which batch elements the masks around a site leave in."""
    mask = np.ones(fn.batch_shape, bool)
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            mask = mask & np.asarray(fn._mask)
        if isinstance(fn, dist.Independent):
            break  # masks below an event are NumPyro's own affair: the elements of one event go together
        fn = fn.base_dist
    return mask


def _support(fn: dist.Distribution) -> np.ndarray:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    if _is_ragged(fn):
        return np.arange(np.min(fn.support.lower_bound), np.max(fn.support.upper_bound) + 1)
    values = np.asarray(fn.enumerate_support(expand=False))
    return values.reshape(len(values), -1)[:, 0]


def _is_ragged(fn: dist.Distribution) -> bool:
    """Whether the cells' supports differ."""
    ends = [getattr(fn.support, end, 0) for end in ("lower_bound", "upper_bound")]
    return any(np.ndim(end) > 0 and np.min(end) < np.max(end) for end in ends)


def constraints_of(model: Callable, params: Values, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Where each parameter may lie: the constraint of a `param`, the support of a maximised sample site."""
    trace = _trace(model, params, args, kwargs)
    return {name: _domain(site) for name, site in trace.items() if name in params}


def _domain(site: dict) -> Any:
    return site["fn"].support if site["type"] == "sample" else site["kwargs"].get("constraint", dist.constraints.real)

r"""NUTS over the parameters, the latents summed out: the posterior that maximum likelihood summarises by its peak.

References:
    Hoffman and Gelman 2014, "The No-U-Turn sampler". Vehtari et al. 2021, "Rank-normalization, folding, and
    localization: an improved R-hat" (when chains may be trusted).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import NUTS as Sampler

from autoem.baselines._base import AbstractBaseline, Fit, require, whole
from autoem.baselines._target import Free, Target
from autoem.fitting.starts import inside
from autoem.ir import Param
from autoem.m_step.unconstrained import to_constrained

MIXED = 1.01  # largest split R-hat of chains that agree


@dataclasses.dataclass(frozen=True)
class NUTS(AbstractBaseline):
    r"""Draw parameters from :math:`p(\theta \mid x) \propto p(x \mid \theta)\, p(\theta)`, the latents summed out.

    A parameter without a prior (`numpyro.param`) has a flat one on its constrained scale, which need not be proper;
    the fit says which. `Fit.details` holds the largest split R-hat and the smallest effective sample size of all free
    coordinates, the divergences, and the best log density of all draws.

    Args:
        num_warmup: adaptation draws of each chain, at least 1.
        num_samples: draws that are kept of each chain, at least 4.
        num_chains: chains, run side by side, from the starts in turn; at least 1.
        point: what stands for the posterior in the table: "mean" of the draws on the constrained scale, or "mode", the
            draw of highest density. A mean over draws that switch labels means nothing: see R-hat.
        target_accept: acceptance probability that the step size is adapted to, between 0 and 1.

    Raises:
        TypeError, ValueError: an option is out of its range.
    """

    num_warmup: int = 500
    num_samples: int = 500
    num_chains: int = 2
    point: str = "mean"
    target_accept: float = 0.8

    def __post_init__(self):
        for option, least in (("num_warmup", 1), ("num_samples", 4), ("num_chains", 1)):
            whole("NUTS", option, getattr(self, option), least)
        require(f"NUTS(point={self.point!r})", self.point in ("mean", "mode"), "point must be 'mean' or 'mode'")
        inside = 0 < self.target_accept < 1
        require(f"NUTS(target_accept={self.target_accept})", inside, "target_accept must lie between 0 and 1")

    def prepare(self, target: Target) -> Callable[[Array], Fit]:
        target.require_objective("NUTS")
        others = dict(target.starts[0])
        sampler = Sampler(
            potential_fn=lambda free: -target.log_density(free, others, target.bundle),
            target_accept_prob=self.target_accept,
        )

        @jax.jit
        def draw(keys: Array, begin: Free):
            state = sampler.init(keys, self.num_warmup, begin, (), {})

            def step(state, _):
                state = sampler.sample(state, (), {})
                return state, (state.z, state.diverging)

            _, (draws, diverging) = jax.lax.scan(step, state, None, length=self.num_warmup + self.num_samples)
            draws = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), draws)  # (chains, draws, ...)
            values = jax.lax.map(
                lambda chain: jax.lax.map(lambda u: target.objective(u, others, target.bundle), chain), draws
            )
            return draws, values, diverging[self.num_warmup :].sum()

        at = jax.jit(lambda params, bundle: target.kernel.objective(params, bundle)[0])

        def run(rng_key: Array) -> Fit:
            frees = [target.free(target.starts[i % len(target.starts)]) for i in range(self.num_chains)]
            begin = {n: jnp.stack([f[n] for f in frees]) for n in frees[0]} if frees else {}
            draws, values, diverging = draw(jax.random.split(rng_key, self.num_chains), begin)
            return self._fit(target, draws, np.asarray(values), int(diverging), others, at)

        return run

    def _fit(self, target: Target, draws: Free, values: np.ndarray, diverging: int, others, at: Callable) -> Fit:
        kept, merit = {n: u[:, self.num_warmup :] for n, u in draws.items()}, values[:, self.num_warmup :]
        program = target.built.program
        constrained = {n: to_constrained(program.params[n], u) for n, u in kept.items()}
        best = np.unravel_index(np.argmax(np.where(np.isfinite(merit), merit, -np.inf)), merit.shape)
        if self.point == "mode":
            point = {n: v[best] for n, v in constrained.items()}
        else:
            point = {n: mean_of(program.params[n], v, kept[n]) for n, v in constrained.items()}
        params: dict[str, Any] = {**others, **point}
        mixing = diagnostics(kept)
        details = {**mixing, "divergences": float(diverging), "best": float(merit[best])}
        status = (
            f"{self.num_chains} chain{'s' * (self.num_chains > 1)} of {self.num_samples:,} draws: split R-hat up to "
            f"{mixing['r_hat']:.3f}, effective sample size from {mixing['ess']:.0f}, {diverging} divergences"
        )
        flat = [n for n in target.names if n not in target.with_prior]
        notes = [f"the {self.point} of the draws stands for them; the best draw has {merit[best]:.4f} nats"]
        notes += [f"flat prior on the constrained scale of {', '.join(flat)}"] if flat else []
        converged = bool(mixing["r_hat"] <= MIXED and not diverging)
        history = np.nanmean(np.where(np.isfinite(values), values, np.nan), axis=0)
        num_steps = self.num_warmup + self.num_samples
        return Fit(
            params, float(at(params, target.bundle)), f"{target.name} at the {self.point}", history, num_steps, status,
            converged, tuple(notes), draws=constrained, details=details,
        )  # fmt: skip


def mean_of(param: Param, values: Array, free: Array) -> Array:
    """Mean of draws; where it falls outside the parameter's domain, the image of the mean of the free coordinates."""
    mean = values.mean((0, 1))
    return mean if inside(param.constraint, np.asarray(mean)) else to_constrained(param, free.mean((0, 1)))


def diagnostics(draws: Mapping[str, Array]) -> dict[str, float]:
    """The largest split R-hat and the smallest effective sample size of all free coordinates.

    One that never moved has no effective sample, and its R-hat is infinite.
    """
    r_hat, ess = [1.0], [np.inf]
    for value in draws.values():
        flat = np.asarray(value).reshape(*value.shape[:2], -1)
        moves = np.ptp(flat, axis=(0, 1)) > 0
        if not moves.all():
            return {"r_hat": np.inf, "ess": 0.0}
        r_hat += [float(np.max(split_gelman_rubin(flat)))]
        ess += [float(np.min(effective_sample_size(flat)))]
    return {"r_hat": max(r_hat), "ess": min(ess)}

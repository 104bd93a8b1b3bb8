r"""NumPyro's stochastic variational inference of the same model, from the same start.

Parameters are points, continuous latents have a guide, discrete ones are summed out: by NumPyro's own enumeration where
that gives the model's density, which is tried, else by autoem.

References:
    Kucukelbir et al. 2017, "Automatic differentiation variational inference". Ranganath, Gerrish and Blei 2014, "Black
    box variational inference".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpyro.infer import SVI as Engine
from numpyro.infer import Predictive

from autoem.baselines._ascent import PIECES
from autoem.baselines._base import INTERRUPTED, AbstractBaseline, Fit, optimiser, whole
from autoem.baselines._guided import Guided, guided
from autoem.baselines._target import Target

LAST = 400  # estimates of the ELBO that the figure at the end is the mean of
DRAWS = 2000  # draws of the guide that moments are taken from


@dataclasses.dataclass(frozen=True)
class SVI(AbstractBaseline):
    r"""Climb the evidence lower bound by NumPyro's SVI.

    .. math:: E_q[\log p(x, u \mid \theta) + \log p(\theta) - \log q(u)] \le \log p(x \mid \theta) + \log p(\theta)

    over :math:`\theta`, at which the guide is a point, and the guide `q` of the continuous latents `u`. Where there are
    none, the bound is the log-likelihood itself.

    Args:
        guide: None for NumPyro's `AutoNormal`; another class of `numpyro.infer.autoguide`; or a guide of your own, a
            function of the model's arguments, for every sample site without data that is not discrete.
        optimizer: an optax optimiser that descends; None for `optax.adam(0.02)`.
        steps: gradient steps, at least 1. There is no stopping rule.
        num_particles: draws of the guide that a step's gradient is the mean of, at least 1.

    Raises:
        TypeError, ValueError: an option is out of its range.
    """

    guide: Any = None
    optimizer: Any = None
    steps: int = 2000
    num_particles: int = 1

    def __post_init__(self):
        if self.guide is not None and not callable(self.guide):
            raise TypeError(f"SVI(guide={self.guide!r}): use a class of numpyro.infer.autoguide, or a function")
        optimiser("SVI", self.optimizer)
        whole("SVI", "steps", self.steps, 1)
        whole("SVI", "num_particles", self.num_particles, 1)

    def prepare(self, target: Target) -> Callable[[Array], Fit]:
        pair = guided(target, self.guide, self.num_particles)
        runs = [Run(self, target, pair, start) for start in target.starts[:1]]
        loops: dict[str, Callable] = {}

        def run(rng_key: Array) -> Fit:
            fits = []
            for i, start in enumerate(target.starts):
                if i == len(runs):
                    runs.append(Run(self, target, guided(target, self.guide, self.num_particles, i), start))
                fits.append(runs[i].fit(jax.random.fold_in(rng_key, i), loops))
                if fits[-1].status.startswith(INTERRUPTED):
                    break
            return max(fits, key=lambda f: (np.isfinite(f.objective), f.objective))

        return run


class Run:
    """SVI from one start; the compiled loop is shared by all."""

    def __init__(self, options: SVI, target: Target, pair: Guided, start: Mapping[str, Array]):
        self.options, self.target, self.pair, self.start = options, target, pair, dict(start)
        self.engine = Engine(pair.model, pair.guide, options.optimizer or optax.adam(0.02), pair.loss)

    def fit(self, rng_key: Array, loops: dict[str, Callable]) -> Fit:
        target, steps = self.target, self.options.steps
        to_init, to_end = jax.random.split(rng_key)
        args, kwargs = self.pair.call(target.data)
        moving = [n for n in self.start if self.pair.is_param(n)]
        state = self.engine.init(to_init, *args, init_params={n: self.start[n] for n in moving}, **kwargs)
        losses, done, interrupted = jnp.full(steps, jnp.nan), jnp.zeros((), int), False
        if not loops:
            loops.update(advance=jax.jit(self._advance), evaluate=jax.jit(self._evaluate))
        try:
            for limit in np.linspace(0, steps, PIECES + 1).astype(int)[1:]:
                state, losses, done = jax.block_until_ready(loops["advance"](state, losses, done, limit, target.data))
        except KeyboardInterrupt:
            interrupted = True
        ends = np.asarray(loops["evaluate"](state, jax.random.split(to_end, LAST), target.data))
        return self._result(state, np.asarray(losses)[: int(done)], -ends, interrupted, to_end)

    def _advance(self, state, losses, done, limit, data):
        args, kwargs = self.pair.call(data)

        def step(carry):
            state, losses, i = carry
            state, loss = self.engine.update(state, *args, **kwargs)
            return state, losses.at[i].set(loss), i + 1

        # a first loss that is not finite is written down too
        def going(carry):
            _, losses, i = carry
            return (i < limit) & ((i == 0) | jnp.isfinite(losses[jnp.maximum(i - 1, 0)]))

        return jax.lax.while_loop(going, step, (state, losses, done))

    def _evaluate(self, state, keys, data):
        args, kwargs = self.pair.call(data)
        return jax.lax.map(lambda key: self.engine.evaluate(state._replace(rng_key=key), *args, **kwargs), keys)

    def _result(self, state, losses: np.ndarray, ends: np.ndarray, interrupted: bool, key: Array) -> Fit:
        target, pair = self.target, self.pair
        values = {n: jnp.asarray(v) for n, v in self.engine.get_params(state).items()}
        moments = self._moments(values, key) if pair.sampled else {}
        params: dict[str, Array] = {**self.start, **{n: values[n] for n in target.names if n in values}}
        params |= {n: moments[n][0] for n in target.names if n in moments}
        finite = bool(np.isfinite(ends).all())
        error = 0.0 if pair.tight or not finite else float(ends.std(ddof=1) / np.sqrt(len(ends)))
        steps = len(losses)
        if interrupted:
            status = f"{INTERRUPTED} after {steps:,} steps"
        elif not finite or not np.isfinite(losses).all():
            status = "stopped because the bound was no longer finite"
        else:
            late = losses[-max(1, steps // 10) :].mean(), losses[-max(2, steps // 5) : -max(1, steps // 10)].mean()
            status = f"ran its {steps:,} steps; its mean moved by {abs(late[0] - late[1]):.2g} nats in the last tenth"
        notes = [*pair.notes]
        if not pair.tight and finite:
            notes += [f"the bound is a mean of {LAST} estimates, with a standard error of {error:.2g}"]
        name = target.name if pair.tight else "ELBO" + (" + log prior" if target.with_prior else "")
        latents = {n: m for n, m in moments.items() if n in target.built.program.continuous}
        return Fit(
            params, float(ends.mean()), name, np.append(-losses, ends.mean()), steps, status,
            notes=tuple(notes), latents=latents, details={"standard_error": error},
        )  # fmt: skip

    def _moments(self, values: Mapping[str, Array], key: Array) -> dict[str, tuple[Array, Array]]:
        """Mean and standard deviation of every site of the guide, from its draws."""
        args, kwargs = self.pair.call(self.target.data)
        predictive = Predictive(self.pair.guide, params=dict(values), num_samples=DRAWS)
        draws = predictive(key, *args, **kwargs)
        return {n: (draws[n].mean(0), draws[n].std(0)) for n in self.pair.sampled}

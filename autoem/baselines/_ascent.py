r"""Gradient ascent on the observed-data log-likelihood itself, in free coordinates.

References:
    Salakhutdinov, Roweis and Ghahramani 2003, "Optimization with EM and expectation-conjugate-gradient" (when the
    gradient of the marginal likelihood beats EM, and when it does not).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from autoem.baselines._base import INTERRUPTED, AbstractBaseline, Fit, optimiser, whole
from autoem.baselines._target import Free, Target
from autoem.m_step.problem import Bundle

PIECES = 10  # returns to the host between steps, so that an interrupt gets through


class Climb(NamedTuple):
    """Where the ascent is, and the best point of it."""

    step: Array
    alive: Array
    free: Free
    optimizer: Any
    best: Free
    top: Array
    history: Array


@dataclasses.dataclass(frozen=True)
class GradientAscent(AbstractBaseline):
    r"""Climb :math:`\log p(x \mid \theta) + \log p(\theta)` by its gradient, the latents summed out as EM sums them.

    Steps are in free coordinates (NumPyro's bijections), so constraints hold. The best point on the way is kept.

    Args:
        optimizer: an optax optimiser that descends, `optax.lbfgs()` too; None for `optax.adam(0.05)`.
        steps: gradient steps, at least 1. There is no stopping rule.

    Raises:
        TypeError, ValueError: an option is out of its range.
    """

    optimizer: Any = None
    steps: int = 1000

    def __post_init__(self):
        optimiser("GradientAscent", self.optimizer)
        whole("GradientAscent", "steps", self.steps, 1)

    def prepare(self, target: Target) -> Callable[[Array], Fit]:
        target.require_objective("GradientAscent")
        advance, method = self._loop(target), self._method()

        def climb(start: Mapping[str, Array]) -> tuple[Climb, bool]:
            free, nothing = target.free(start), jnp.asarray(-jnp.inf)
            history = jnp.full(self.steps + 1, jnp.nan)
            state = Climb(jnp.zeros((), int), jnp.ones((), bool), free, method.init(free), free, nothing, history)
            try:
                for limit in np.linspace(0, self.steps + 1, PIECES + 1).astype(int)[1:]:
                    state = jax.block_until_ready(advance(state, dict(start), target.bundle, limit))
            except KeyboardInterrupt:
                return state, True
            return state, False

        def run(rng_key: Array) -> Fit:
            ends = []
            for start in target.starts:
                ends.append((*climb(start), start))
                if ends[-1][1]:
                    break
            state, _, start = max(ends, key=lambda end: float(end[0].top))
            return self._fit(target, state, start, ends[-1][1])

        return run

    def _method(self) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(self.optimizer or optax.adam(0.05))

    def _loop(self, target: Target) -> Callable:
        method = self._method()

        def step(state: Climb, others, bundle: Bundle) -> Climb:
            def loss(free: Free, **_) -> Array:
                return -target.objective(free, others, bundle)

            value, slope = jax.value_and_grad(loss)(state.free)
            updates, inner = method.update(slope, state.optimizer, state.free, value=value, grad=slope, value_fn=loss)
            good, better = jnp.isfinite(value), jnp.isfinite(value) & (-value > state.top)
            best = {n: jnp.where(better, u, state.best[n]) for n, u in state.free.items()}
            top = jnp.where(better, -value, state.top)
            history = state.history.at[state.step].set(-value)
            moved: Any = optax.apply_updates(state.free, updates)
            moved = {n: jnp.asarray(moved[n], u.dtype) for n, u in state.free.items()}
            return Climb(state.step + 1, good, moved, inner, best, top, history)

        def advance(state: Climb, others, bundle: Bundle, limit) -> Climb:
            return jax.lax.while_loop(lambda s: (s.step < limit) & s.alive, lambda s: step(s, others, bundle), state)

        return jax.jit(advance)

    def _fit(self, target: Target, state: Climb, start: Mapping[str, Array], interrupted: bool) -> Fit:
        steps = max(int(state.step) - 1, 0)
        history = np.asarray(state.history)[: steps + 1]
        late = history[-max(1, steps // 10) - 1 :]
        if interrupted:
            status = f"{INTERRUPTED} after {steps:,} steps; the best point so far is kept"
        elif not bool(state.alive):
            status = "stopped because the objective was no longer finite; the best point before that is kept"
        else:
            status = f"ran its {steps:,} steps; the last tenth moved the objective by {np.ptp(late):.2g} nats"
        still = bool(state.alive) and not interrupted and np.ptp(late) <= 1e-6 * max(1.0, abs(float(state.top)))
        params = target.params(dict(state.best), dict(start))
        return Fit(params, float(state.top), target.name, history, steps, status, bool(still))

r"""Continuous latents drawn from their posterior by Hamiltonian Monte Carlo, beside discrete ones summed exactly.

In: the latents and the factors that read them. Out: draws of chains that go on from step to step, for the M-step; with
stochastic approximation the draws of earlier steps too, with falling weights. The log-likelihood is followed from step
to step: where the draws are from the posterior at the new parameters,

.. math:: \log \frac{p(x \mid \theta)}{p(x \mid \theta')} = \log E_{u \sim \theta'}[e^{J_\theta(u) - J_{\theta'}(u)}],

from where it was at the start, by importance sampling about the mode.

References:
    Wei and Tanner 1990; Thompson and Guo 1991, "Evaluation of likelihood ratios for complex genetic models".
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.infer.hmc import hmc

from autoem.e_step.cells.importance import t_density, t_draws
from autoem.e_step.treatment import Expectation
from autoem.m_step.choose import is_convex
from autoem.treatments.drawn import AbstractDrawn
from autoem.treatments.laplace import MAX_COORDINATES, JointLaplace

if TYPE_CHECKING:
    from autoem.e_step.strategies import SAEM, MonteCarlo
    from autoem.lowering.kernel import Kernel
    from autoem.m_step.problem import Bundle, Params

MAX_TREE_DEPTH = 7
PROPOSALS, BATCHES, FREEDOM = 4096, 16, 6.0
AVERAGED = 40  # steps whose parameters are averaged, roughly
ACCEPTED, ADAPTED = 0.8, 0.6  # rate of acceptance that step sizes aim at, and how fast their adaptation ends
LOOKS, MISSED = 64, math.log(100.0)  # draws of the chains held against the proposals; log weight that these missed


class Chains(NamedTuple):
    """The chains' state, draws held and their weights, steps done, the log-likelihood, and the parameters before.

    `mean` is that of the last steps' parameters.
    """

    hmc: Any
    held: Array
    weights: Array
    step: Array
    total: Array
    before: Any
    mean: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled(AbstractDrawn):
    """Chains of NumPyro's kernels over the free coordinates."""

    wish: MonteCarlo

    strategy = "Monte Carlo"
    objective_name = "Monte Carlo estimate of the log-likelihood"
    noisy = True
    source = "Wei and Tanner 1990 (Monte Carlo EM); Hoffman and Gelman 2014"

    @property
    def per_step(self) -> int:
        return self.wish.num_draws * self.wish.num_chains

    @property
    def num_draws(self) -> int:
        return self.per_step

    @functools.cached_property
    def sampler(self) -> tuple:
        """NumPyro's pair of functions: to begin a chain, and to take one transition."""

        def potential_of(kernel, params, bundle):
            return lambda x: -self.log_density(kernel, params, bundle, x[None])[0]

        return hmc(potential_fn_gen=potential_of, algo=self.wish.kernel)

    def init(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> Chains:
        begin, move = self.sampler
        given, dim = (kernel, params, bundle), self.hidden.dim
        centre, root = jnp.zeros(dim), 0.1 * jnp.ones(dim)
        if dim <= MAX_COORDINATES:  # about one mode: chains on several hills would mix what does not belong together
            centre, _, matrix, _ = JointLaplace(self.hidden).place(kernel, params, bundle, centre)
            root = jnp.sqrt((matrix**2).sum(1))

        def chain(key: Array):
            spread, own = jax.random.split(key)
            x = centre + root * jax.random.normal(spread, (dim,))
            state = begin(
                x, self.wish.warmup, model_args=given, rng_key=own, max_tree_depth=MAX_TREE_DEPTH,
                trajectory_length=None if self.wish.kernel == "NUTS" else 1.5,
            )  # fmt: skip
            return jax.lax.fori_loop(0, self.wish.warmup, lambda _, s: move(s, model_args=given), state)

        states = jax.vmap(chain)(jax.random.split(key, self.wish.num_chains))
        held = jnp.zeros((self.num_draws, self.hidden.dim))
        start = self.estimate(kernel, params, bundle, key)[0]
        return Chains(states, held, jnp.zeros(self.num_draws), jnp.zeros((), int), start, dict(params), dict(params))

    @property
    def not_estimated(self) -> str:  # type: ignore[override]
        many = self.hidden.dim > MAX_COORDINATES
        return f"latents have more than {MAX_COORDINATES:,} coordinates" if many else ""

    def estimate(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> tuple[Array, Array]:
        """The log-likelihood by importance sampling about the mode, and its standard error."""
        return importance(JointLaplace(self.hidden), kernel, params, bundle, key)

    def final(self, kernel: Kernel, params: Params, bundle: Bundle, state: Any, key: Array) -> tuple[Array, Array]:
        """As `estimate`, about the mode where the chains are; of infinite error where they are elsewhere too.

        Not a number where there are too many coordinates for a curvature: chains tell of differences alone.
        """
        if self.not_estimated:
            return jnp.asarray(jnp.nan), jnp.asarray(jnp.inf)
        method = JointLaplace(self.hidden)
        _, x, _ = self.go_on(kernel, params, bundle, state.hmc, -(-LOOKS // self.wish.num_chains))
        about = proposals(method, kernel, params, bundle, key, x[-1])
        value, error = estimated(about.log_weights)
        surprise = jax.vmap(about.log_weight)(x) - value - jnp.log1p(PROPOSALS * error**2)
        return value, jnp.where((surprise > MISSED).any(), jnp.inf, error)

    def go_on(self, kernel: Kernel, params: Params, bundle: Bundle, states: Any, num: int) -> tuple[Any, Array, Array]:
        """The chains after `num` transitions each at these parameters, their draws `(num * chains, dim)`, and rates.

        Rates are the mean probability of acceptance of each chain.
        """
        _, move = self.sampler
        given = (kernel, params, bundle)

        def chain(state):
            energy, slope = jax.value_and_grad(lambda x: -self.log_density(kernel, params, bundle, x[None])[0])(state.z)
            state = state._replace(potential_energy=energy, z_grad=slope)  # the parameters have moved

            def transition(s, _):
                s = move(s, model_args=given)
                return s, (s.z, s.accept_prob)

            return jax.lax.scan(transition, state, length=num)

        states, (draws, accepted) = jax.vmap(chain)(states)
        return states, draws.reshape(-1, self.hidden.dim), accepted.mean(1)

    def expect(self, kernel: Kernel, params: Params, bundle: Bundle, state: Chains) -> Expectation:
        states, x, rates = self.go_on(kernel, params, bundle, state.hmc, self.wish.num_draws)
        states = readapted(states, rates, state.step)
        held, weights = self.weighted(state, x)
        each, found = self.hidden.expectation(kernel, params, bundle, self.hidden.constrain(held)[0], weights)
        back = self.hidden.log_joint(kernel, state.before, bundle, self.hidden.constrain(x)[0])
        total = state.total - jax.nn.logsumexp(back - each[-self.per_step :]) + math.log(self.per_step)
        share = 1 / jnp.minimum(state.step + 1.0, AVERAGED)
        mean = {n: old + share * (params[n] - old) for n, old in state.mean.items()}
        after = Chains(states, held, weights, state.step + 1, total, dict(params), mean)
        return found._replace(likelihood=total, state=after)

    def averaged(self, kernel: Kernel, state: Chains) -> Params | None:
        """Where draws are few, parameters wander about the maximum, and their mean is nearer to it than the last."""
        return state.mean if all(is_convex(p.constraint) for p in kernel.program.params.values()) else None

    def weighted(self, state: Chains, x: Array) -> tuple[Array, Array]:
        """The draws that the M-step sees, the newest last, and their weights."""
        return x, jnp.full(len(x), 1 / len(x))

    def posterior_draws(self, kernel: Kernel, params: Params, bundle: Bundle, state: Chains, key: Array, num: int):
        count = -(-num // self.wish.num_chains)
        fresh = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.wish.num_chains))
        _, x, _ = self.go_on(kernel, params, bundle, state.hmc._replace(rng_key=fresh), count)
        return self.hidden.constrain(x[:num])[0]

    def reason(self) -> str:
        chains = f"{self.wish.num_chains} chain" + "s" * (self.wish.num_chains > 1)
        return (
            f"approximate: drawn from the posterior by {self.wish.kernel}, {self.wish.num_draws} draws a step from "
            f"{chains}, since {self.hidden.why}; the objective is the {self.objective_name}"
        )


def readapted(states: Any, rates: Array, step: Array) -> Any:
    r"""Chains whose step size follows the posterior, which moves with the parameters: by a gain that vanishes.

    .. math:: \log \epsilon_{t+1} = \log \epsilon_t + t^{-0.6} (a_t - 0.8)

    References:
        Andrieu and Thoms 2008, "A tutorial on adaptive MCMC", section 5.
    """
    gain = (step + 1.0) ** -ADAPTED
    size = states.adapt_state.step_size * jnp.exp(gain * (rates - ACCEPTED))
    return states._replace(adapt_state=states.adapt_state._replace(step_size=size))


def importance(method: JointLaplace, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> tuple[Array, Array]:
    """The log-likelihood by weighted draws of a t law about the mode, and its standard error by the delta method.

    Zero, of infinite error, where there are too many coordinates for a curvature.

    References:
        Geweke 1989, "Bayesian inference in econometric models using Monte Carlo integration".
    """
    dim = method.hidden.dim
    if dim > MAX_COORDINATES:
        return jnp.zeros(()), jnp.asarray(jnp.inf)
    return estimated(proposals(method, kernel, params, bundle, key, jnp.zeros(dim)).log_weights)


def estimated(log_weights: Array) -> tuple[Array, Array]:
    """The log of the mean of importance weights, and its standard error."""
    count = len(log_weights)
    share = jax.nn.softmax(log_weights) * count
    return jax.nn.logsumexp(log_weights) - math.log(count), jnp.sqrt(jnp.var(share) / count)


class Proposals(NamedTuple):
    """Draws `(draws, dim)` in free coordinates, their log importance weights, and that weight as a function."""

    x: Array
    log_weights: Array
    log_weight: Callable[[Array], Array]


def proposals(
    method: JointLaplace, kernel: Kernel, params: Params, bundle: Bundle, key: Array, near: Array
) -> Proposals:
    """Draws of a t law about the higher of two modes: that nearest to the origin, and that `near` a point."""
    dim = method.hidden.dim
    places = jax.lax.map(lambda x: method.place(kernel, params, bundle, x), jnp.stack([jnp.zeros(dim), near]))
    best = jnp.argmax(places[1] + places[3])
    mode, _, root, log_det = (p[best] for p in places)
    z = t_draws(jax.random.fold_in(key, 1), (PROPOSALS, dim), FREEDOM)

    def log_weight(x: Array) -> Array:
        z = jnp.linalg.solve(root, x - mode)
        return method.log_density(kernel, params, bundle, x[None])[0] - t_density(z, FREEDOM) + log_det

    x = mode + z @ root.T
    return Proposals(x, jax.lax.map(jax.vmap(log_weight), x.reshape(BATCHES, -1, dim)).ravel(), log_weight)


@dataclasses.dataclass(frozen=True, eq=False)
class Averaged(Sampled):
    """The same with the draws of earlier steps, whose weights fall: stochastic approximation."""

    wish: SAEM
    strategy = "SAEM"
    source = "Delyon, Lavielle and Moulines 1999; Kuhn and Lavielle 2004 (SAEM)"

    @property
    def num_draws(self) -> int:
        return self.per_step * self.wish.memory

    @property
    def least(self) -> int:  # type: ignore[override]
        """The average is to have forgotten where it began, twice over."""
        return self.wish.burn_in + 2 * self.wish.memory

    def weighted(self, state: Chains, x: Array) -> tuple[Array, Array]:
        late = jnp.maximum(state.step - self.wish.burn_in, 0) + 1
        gain = jnp.where(state.step <= self.wish.burn_in, 1.0, late.astype(x.dtype) ** -self.wish.decay)
        held = jnp.concatenate([state.held[self.per_step :], x])
        old = state.weights[self.per_step :] * (1 - gain)
        weights = jnp.concatenate([old, jnp.full(self.per_step, gain / self.per_step)])
        return held, weights / weights.sum()

    def reason(self) -> str:
        return super().reason() + f"; expected statistics are averaged over the steps from step {self.wish.burn_in} on"

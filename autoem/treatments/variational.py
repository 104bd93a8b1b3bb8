r"""A variational posterior of continuous latents: a NumPyro guide, fitted to the evidence lower bound.

In: the latents and the factors that read them, and a guide. Out: draws of the guide for the M-step, and the bound
:math:`E_q[J(u) - \log q(u)]`, estimated from those draws.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import optax
from jax import Array
from numpyro import handlers
from numpyro.distributions import ImproperUniform, biject_to
from numpyro.infer import init_to_value
from numpyro.infer.autoguide import AutoGuide, AutoNormal

from autoem._errors import PlanError
from autoem.e_step.treatment import Expectation
from autoem.graph.programs import jit_once
from autoem.treatments.drawn import AbstractDrawn, Draws
from autoem.treatments.laplace import JointLaplace
from autoem.treatments.normal_guide import DENSE

if TYPE_CHECKING:
    from autoem.e_step.strategies import Variational
    from autoem.lowering.kernel import Kernel
    from autoem.m_step.problem import Bundle, Params

DRAWS, STEPS = 32, 20  # of the guide in an M-step, and of its optimiser in an E-step
FINAL = 1000  # draws of the reported bound
FIRST, LATER = 100, 10  # blocks of optimiser steps at most, before the first E-step and in each
RATE, SLOWER = 0.02, 1000  # of the optimiser at first, and the number of its steps that halves it


class Block(NamedTuple):
    """A block of optimiser steps: where it ended, its mean bound with the variance of that, and whether it rose."""

    state: Guided
    mean: Array
    error: Array
    number: Array
    higher: Array


class Guided(NamedTuple):
    """What is remembered: the guide's free parameters, its optimiser's state, and a random key."""

    free: Any
    optimizer: Any
    key: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Guide(AbstractDrawn):
    """Draws of a guide; `call` gives the model's own arguments from the data of a bundle."""

    wish: Variational
    call: Callable[[Any], tuple[tuple, dict]]

    objective_name = "ELBO"
    noisy = True
    strategy = "variational"
    smooth = True
    source = "Neal and Hinton 1998; Kingma and Welling 2014; Kucukelbir et al. 2017 (variational EM)"

    @property
    def num_draws(self) -> int:
        return self.wish.num_draws or DRAWS

    @functools.cached_property
    def guide(self) -> Callable:
        given = self.wish.guide or AutoNormal
        if isinstance(given, type) and issubclass(given, AutoGuide):
            return given(self.surrogate, init_loc_fn=init_to_value(values=self.centre))
        return given

    @functools.cached_property
    def centre(self) -> dict[str, Array]:
        """Where a guide of NumPyro's begins, by latent."""
        return {}

    @property
    def needs_data(self) -> bool:
        return self.is_own

    @property
    def is_own(self) -> bool:
        """Whether the user wrote the guide."""
        return not isinstance(self.guide, AutoGuide)

    def surrogate(self, log_joint: Callable[[Draws], Array]) -> None:
        """The latents alone, as a NumPyro model whose density is the joint one with everything else summed out."""
        values: Any = {
            m.name: numpyro.sample(m.name, ImproperUniform(m.support, (), m.shape + m.event))
            for m in self.hidden.members
        }
        numpyro.factor("·joint", log_joint(values))

    def joint(self, kernel: Kernel, params: Params, bundle: Bundle) -> Callable[[Draws], Array]:
        """`J` of one completion."""
        return lambda values: self.hidden.log_joint(kernel, params, bundle, {n: v[None] for n, v in values.items()})[0]

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return self.wish.optimizer or optax.adam(lambda count: RATE / (1 + count / SLOWER))

    def prepare(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> None:
        """Set the guide up, which no traced function may do, and refuse one that does not match the model."""
        if not self.is_own:
            x = jnp.zeros(self.hidden.dim)
            if len(x) <= DENSE:
                x = jit_once(lambda p, b: JointLaplace(self.hidden).place(kernel, p, b, x)[0])(dict(params), bundle)
            self.centre.update({n: v[0] for n, v in self.hidden.constrain(x[None])[0].items()})
        with handlers.block(), handlers.seed(rng_seed=key), handlers.trace() as sites:
            self.run_guide(self.joint(kernel, params, bundle), bundle)
        names = {n for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
        if self.is_own and (missing := [n for n in self.hidden.names if n not in names]):
            raise PlanError(
                missing[0],
                problem=f"the guide has no sample site for it (it has {', '.join(sorted(names)) or 'none'})",
                mend=f'give the guide numpyro.sample("{missing[0]}", ...), or leave guide= out for AutoNormal',
            )
        self.constraints.update({n: s["kwargs"].get("constraint") for n, s in sites.items() if s["type"] == "param"})
        self.begin.update({n: s["value"] for n, s in sites.items() if s["type"] == "param"})

    @functools.cached_property
    def constraints(self) -> dict[str, Any]:
        """Constraint of each of the guide's parameters."""
        return {}

    @functools.cached_property
    def begin(self) -> dict[str, Any]:
        """Start value of each of them."""
        return {}

    def run_guide(self, log_joint: Callable, bundle: Bundle) -> None:
        if not self.is_own:
            self.guide(log_joint)
            return
        args, kwargs = self.call(bundle.data)
        self.guide(*args, **kwargs)

    def constrained(self, free: Any) -> dict[str, Any]:
        return {n: v if (c := self.constraints.get(n)) is None else biject_to(c)(v) for n, v in free.items()}

    def draw(self, free: Any, bundle: Bundle, key: Array) -> tuple[Draws, Array]:
        """One draw of the guide, and its log density there."""
        substituted = handlers.substitute(self.run_guide, data=self.constrained(free))
        with handlers.block(), handlers.trace() as sites:
            handlers.seed(substituted, key)(lambda values: jnp.zeros(()), bundle)
        density = jnp.zeros(())
        for site in sites.values():
            if site["type"] == "sample" and not site["is_observed"]:
                part = site["fn"].log_prob(site["value"], *([site["intermediates"]] if site["intermediates"] else []))
                density = density + part.sum()
        out = {}
        for m in self.hidden.members:
            out[m.name] = jnp.broadcast_to(sites[m.name]["value"], m.shape + m.event)
        return out, density

    def many(self, free: Any, bundle: Bundle, key: Array, num: int) -> tuple[Draws, Array]:
        return jax.vmap(lambda k: self.draw(free, bundle, k))(jax.random.split(key, num))

    def init(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> Guided:
        start = {n: v if (c := self.constraints.get(n)) is None else biject_to(c).inv(v) for n, v in self.begin.items()}
        start = jax.tree.map(jnp.asarray, start)
        first = Guided(start, self.optimizer.init(start), key)
        return self.improve(kernel, params, bundle, first, STEPS, FIRST)

    def improve(self, kernel: Kernel, params: Params, bundle: Bundle, state: Guided, steps: int, most: int) -> Guided:
        """Blocks of so many optimiser steps of the guide on the bound, until it rests, and at `most` so many blocks.

        It rests once the mean bound of a block is no higher than that of the one before, up to twice the error of their
        difference.
        """

        def loss(free: Any, key: Array) -> Array:
            draws, density = self.many(free, bundle, key, self.wish.num_particles)
            return (density - self.hidden.log_joint(kernel, params, bundle, draws)).mean()

        def step(s: Guided, _) -> tuple[Guided, Array]:
            key, now = jax.random.split(s.key)
            value, slope = jax.value_and_grad(loss)(s.free, now)
            fine = jnp.all(jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(slope)]))
            change, after = self.optimizer.update(slope, s.optimizer, s.free)
            new = optax.apply_updates(s.free, change)
            # a draw too far out to have a density tells nothing
            free, optimizer = jax.tree.map(lambda a, b: jnp.where(fine, a, b), (new, after), (s.free, s.optimizer))
            return Guided(free, optimizer, key), jnp.where(fine, -value, jnp.nan)

        def block(s: Block) -> Block:
            state, bounds = jax.lax.scan(step, s.state, length=steps)
            mean, error = jnp.nanmean(bounds), jnp.nanvar(bounds) / len(bounds)
            higher = mean - s.mean > 2 * jnp.sqrt(error + s.error)
            return Block(state, mean, error, s.number + 1, higher)

        low = jnp.asarray(-jnp.inf, jnp.result_type(float))
        begin = Block(state, low, jnp.zeros_like(low), jnp.zeros((), int), jnp.array(True))
        return jax.lax.while_loop(lambda s: s.higher & (s.number < most), block, begin).state

    def expect(self, kernel: Kernel, params: Params, bundle: Bundle, state: Guided) -> Expectation:
        steps, most = (STEPS, LATER) if self.wish.steps is None else (self.wish.steps, 1)
        state = self.improve(kernel, params, bundle, state, steps, most)
        key, now = jax.random.split(state.key)
        draws, density = self.many(state.free, bundle, now, self.num_draws)
        weights = jnp.full(self.num_draws, 1 / self.num_draws)
        each, found = self.hidden.expectation(kernel, params, bundle, draws, weights)
        return found._replace(likelihood=(each - density).mean(), state=state._replace(key=key))

    def final(self, kernel: Kernel, params: Params, bundle: Bundle, state: Guided, key: Array) -> tuple[Array, Array]:
        def one(key: Array) -> Array:
            draws, density = self.many(state.free, bundle, key, 1)
            return self.hidden.log_joint(kernel, params, bundle, draws)[0] - density[0]

        each = jax.lax.map(one, jax.random.split(key, FINAL))
        return each.mean(), each.std() / math.sqrt(FINAL)

    def posterior_draws(self, kernel: Kernel, params: Params, bundle: Bundle, state: Guided, key: Array, num: int):
        return self.many(state.free, bundle, key, num)[0]

    def reason(self) -> str:
        name = type(self.guide).__name__ if isinstance(self.guide, AutoGuide) else "a guide of the user's"
        return (
            f"approximate: variational posterior by {name}, {self.num_draws} draws a step, since {self.hidden.why}; "
            "the objective is a lower bound of the log-likelihood, the ELBO"
        )

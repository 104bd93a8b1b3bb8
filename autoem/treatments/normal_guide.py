r"""A variational posterior that is a normal law in free coordinates, fitted at draws that are the same at every step.

In: the latents and the factors that read them. Out: draws for the M-step, and the bound at them,

.. math:: F(m, C, \theta) = \frac1S \sum_s J_\theta(m + C z_s) + \log |C| + \tfrac d2 \log 2 \pi e ,

with standard draws :math:`z_s` held fixed, of mean zero and variances one. Both steps climb the same function, which
therefore never falls, and the fit comes to rest; at the end the bound is estimated by draws of its own.

The mean moves in units of the curvature of `J` there, without which a law of independent coordinates would follow tied
ones at a crawl; a whole covariance moves in units of itself.

References:
    Giordano, Ingram and Broderick 2024, "Black box variational inference with a deterministic objective"; Opper and
    Archambeau 2009, "The variational Gaussian approximation revisited".
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from autoem.e_step.tables.completions import standard_nodes
from autoem.e_step.treatment import Expectation
from autoem.treatments.drawn import AbstractDrawn
from autoem.treatments.laplace import JointLaplace, inverse_root

if TYPE_CHECKING:
    from autoem.e_step.strategies import Variational
    from autoem.lowering.kernel import Kernel
    from autoem.m_step.problem import Bundle, Params

DENSE = 400  # coordinates up to which the curvature over all of them at once is taken
FEWEST, BEYOND = 64, 16  # draws, beside their mirror images: at least, and where there are more coordinates than that
STEPS, FIRST = 50, 500  # optimiser steps at most in an E-step, and before the first
REST = 1e-8  # gain of an optimiser step, relative to the bound, below which the guide is at rest
NARROW, ASIDE = 0.1, 0.1  # standard deviations at first without a curvature; share of them that a start is put aside
FINAL = 1000  # draws of the reported bound


class Normal(NamedTuple):
    """The law: its mean `(dim,)`, and standard deviations `(dim,)` or a root `(dim, dim)` of its covariance."""

    mean: Array
    root: Array

    def at(self, z: Array) -> Array:
        """The points that standard draws `(draws, dim)` stand for."""
        return self.mean + (z * self.root if self.root.ndim == 1 else z @ self.root.T)

    @property
    def entropy(self) -> Array:
        """In nats."""
        log_det = jnp.log(self.root).sum() if self.root.ndim == 1 else jnp.linalg.slogdet(self.root)[1]
        return log_det + 0.5 * len(self.mean) * math.log(2 * math.pi * math.e)

    def moved(self, frame: Array, far: Array, wider: Array) -> Normal:
        """The law with its mean `far` off in units of a frame, and scaled or, as a whole covariance, turned."""
        step = frame * far if frame.ndim == 1 else frame @ far
        if self.root.ndim == 1:
            return Normal(self.mean + step, self.root * jnp.exp(wider))
        turn = jnp.tril(wider, -1) + jnp.diag(jnp.exp(jnp.diagonal(wider)))
        return Normal(self.mean + step, self.root @ turn)


@dataclasses.dataclass(frozen=True, eq=False)
class NormalGuide(AbstractDrawn):
    """The guide `AutoNormal`, or with `full` `AutoMultivariateNormal`, at fixed draws."""

    wish: Variational
    full: bool

    objective_name = "ELBO"
    strategy = "variational"
    smooth = True
    slow = True
    estimated = True
    source = "Kucukelbir et al. 2017; Giordano, Ingram and Broderick 2024 (variational EM at fixed draws)"

    @property
    def num_draws(self) -> int:
        return len(self.standard)

    @functools.cached_property
    def standard(self) -> np.ndarray:
        """The standard draws `(draws, dim)`; a whole covariance is not told by fewer pairs than coordinates."""
        dim = self.hidden.dim
        pairs = max(FEWEST, dim) if dim <= DENSE else BEYOND
        if self.wish.num_draws is not None:
            pairs = -(-self.wish.num_draws // 2)
        return standard_nodes(dim, max(pairs, dim * self.full))

    def init(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> Normal:
        """The guide at rest for the parameters at the start, begun about the mode of the joint density."""
        dim = self.hidden.dim
        mean, root = jnp.zeros(dim), jnp.full(dim, NARROW)
        if dim <= DENSE:
            mean, _, matrix, _ = JointLaplace(self.hidden).place(kernel, params, bundle, mean)
            root = matrix if self.full else 1 / jnp.sqrt((jnp.linalg.inv(matrix) ** 2).sum(0))
        start = Normal(mean, root)
        aside = start.at(ASIDE * jax.random.normal(key, (1, dim)))[0]
        return self.improved(kernel, params, bundle, Normal(aside, root), FIRST)

    def improved(self, kernel: Kernel, params: Params, bundle: Bundle, law: Normal, steps: int) -> Normal:
        """The law after optimiser steps on the bound at these parameters, until it is at rest."""
        frame = self.frame(kernel, params, bundle, law)
        z = jnp.asarray(self.standard, law.mean.dtype)

        def loss(change: tuple[Array, Array]) -> Array:
            new = law.moved(frame, *change)
            return -self.log_density(kernel, params, bundle, new.at(z)).mean() - new.entropy

        optimizer = optax.lbfgs()
        look = optax.value_and_grad_from_state(loss)
        start = jnp.zeros_like(law.mean), jnp.zeros_like(law.root)
        rest = max(REST, 4 * float(jnp.finfo(law.mean.dtype).eps))

        def step(s: Climb) -> Climb:
            value, slope = look(s.change, state=s.memory)
            update, memory = optimizer.update(slope, s.memory, s.change, value=value, grad=slope, value_fn=loss)
            gain = value - optax.tree.get(memory, "value")
            change: Any = optax.apply_updates(s.change, update)
            return Climb(change, memory, gain > rest * (1 + jnp.abs(value)), s.step + 1)

        begin = Climb(start, optimizer.init(start), jnp.array(True), jnp.zeros((), int))
        end = jax.lax.while_loop(lambda s: s.going & (s.step < steps), step, begin)
        return law.moved(frame, *end.change)

    def frame(self, kernel: Kernel, params: Params, bundle: Bundle, law: Normal) -> Array:
        """The units in which the mean moves."""
        if self.full or len(law.mean) > DENSE:
            return law.root
        return inverse_root(-jax.hessian(self.density(kernel, params, bundle))(law.mean))[0]

    def expect(self, kernel: Kernel, params: Params, bundle: Bundle, state: Normal) -> Expectation:
        law = self.improved(kernel, params, bundle, state, self.wish.steps or STEPS)
        x = law.at(jnp.asarray(self.standard, law.mean.dtype))
        draws, jacobian = self.hidden.constrain(x)
        weights = jnp.full(len(x), 1 / len(x))
        each, found = self.hidden.expectation(kernel, params, bundle, draws, weights)
        return found._replace(likelihood=(each + jacobian).mean() + law.entropy, state=law)

    def final(self, kernel: Kernel, params: Params, bundle: Bundle, state: Normal, key: Array) -> tuple[Array, Array]:
        """The bound by draws of its own and their mirror images, of which the parabola about the mean is left out."""
        density = self.density(kernel, params, bundle)
        parabola, known = self.parabola(density, state)

        def one(key: Array) -> Array:
            x = state.at(jax.random.normal(key, (1, self.hidden.dim)))[0]
            mirrored = 2 * state.mean - x
            return 0.5 * (density(x) + density(mirrored)) - parabola(x - state.mean)

        each = jax.lax.map(one, jax.random.split(key, FINAL))
        return each.mean() + known + state.entropy, each.std() / math.sqrt(FINAL)

    def parabola(self, density: Callable[[Array], Array], law: Normal) -> tuple[Callable[[Array], Array], Array]:
        """The second-order part of a density about the mean, and its expectation; none where it would be too large."""
        if self.hidden.dim > DENSE:
            return lambda _: jnp.zeros(()), jnp.zeros(())
        bend = 0.5 * jax.hessian(density)(law.mean)
        root = jnp.diag(law.root) if law.root.ndim == 1 else law.root
        return lambda x: x @ bend @ x, jnp.trace(root.T @ bend @ root)

    def density(self, kernel: Kernel, params: Params, bundle: Bundle) -> Callable[[Array], Array]:
        """The log joint density at one point `(dim,)`."""
        return lambda x: self.log_density(kernel, params, bundle, x[None])[0]

    def posterior_draws(self, kernel: Kernel, params: Params, bundle: Bundle, state: Normal, key: Array, num: int):
        return self.hidden.constrain(state.at(jax.random.normal(key, (num, self.hidden.dim))))[0]

    def reason(self) -> str:
        name = "AutoMultivariateNormal" if self.full else "AutoNormal"
        return (
            f"approximate: variational posterior by {name} at {self.num_draws:,} fixed draws, since {self.hidden.why}; "
            "the objective is a lower bound of the log-likelihood, the ELBO"
        )


class Climb(NamedTuple):
    """The search for the best law: how far it has moved, what the optimiser remembers, and whether it goes on."""

    change: tuple[Array, Array]
    memory: Any
    going: Array
    step: Array

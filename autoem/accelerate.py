r"""Acceleration: fewer EM maps to the same maximum, by extrapolating from those that were made.

In: points :math:`x` in free coordinates with their images :math:`F(x)` under the EM map. Out: where to go next. The
loop evaluates the objective wherever it goes, and takes an extrapolated point only where that is finite and not lower
than at the best point so far; otherwise it goes on from the plain image. So the objective still never falls, and the
worst that an extrapolation can cost is the one map that found it wanting.

Coordinates are square roots of positive numbers and of probabilities (of a simplex, renormalised), the arcsine of the
root in the unit interval, and NumPyro's bijections elsewhere: any vector is a valid point, and an entry that goes to
its boundary moves less and less on its way, where a logarithm would run off to minus infinity.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from autoem.ir import Param
from autoem.m_step.choose import kind_of
from autoem.m_step.unconstrained import to_constrained, to_unconstrained

__all__ = ["AbstractAcceleration", "Anderson", "Squarem"]


class Move(NamedTuple):
    """Where to evaluate next, whether that is an extrapolation, and the accelerator's new state."""

    point: Array
    trial: Array
    state: Any


class AbstractAcceleration(abc.ABC):
    """A way to extrapolate the EM map: `EM(model, accelerate=...)`.

    `init(x)` makes the first state. `propose(state, x, image, weight, trial)` is asked where the map was made at an
    accepted point `x` (`trial`: an extrapolated one), and answers with a `Move`. `refused(state)` is told that the last
    extrapolation was not taken, and the fit goes on from the plain image. `weight` scales coordinates in lengths.
    """

    name = ""
    source = ""

    @abc.abstractmethod
    def init(self, x: Array) -> Any: ...

    @abc.abstractmethod
    def propose(self, state: Any, x: Array, image: Array, weight: Array, trial: Array) -> Move: ...

    @abc.abstractmethod
    def refused(self, state: Any) -> Any: ...


LEAST = 1e-8  # damping of a first Anderson step


class SquaremState(NamedTuple):
    """`first` is the point of the last pair; `second` says that its image comes next. `cap` limits the step."""

    first: Array
    second: Array
    cap: Array
    capped: Array


@dataclasses.dataclass(frozen=True)
class Squarem(AbstractAcceleration):
    r"""Squared extrapolation along the last two moves, with the steplength S3.

    From :math:`x_1 = F(x_0)` and :math:`x_2 = F(x_1)`, with :math:`r = x_1 - x_0` and :math:`v = x_2 - x_1 - r`,

    .. math:: x' = x_0 + 2 \alpha r + \alpha^2 v, \qquad \alpha = \min(\lVert r \rVert / \lVert v \rVert, c)

    where the cap `c` starts at 1 (which is :math:`x_2` itself) and is multiplied by `growth` whenever it held a step
    back that then was good. The next pair begins at :math:`x'`, whose image the loop makes to judge it.

    Args:
        growth: factor of the cap, above 1.

    References:
        Varadhan and Roland 2008, "Simple and globally convergent methods for accelerating the convergence of any EM
        algorithm".
    """

    growth: float = 4.0

    name = "SQUAREM"
    source = "Varadhan and Roland 2008"

    def __post_init__(self):
        if self.growth <= 1:
            raise ValueError(f"Squarem(growth={self.growth}): growth must be above 1")

    def init(self, x: Array) -> SquaremState:
        no = jnp.zeros((), bool)
        return SquaremState(x, no, jnp.ones((), x.dtype), no)

    def propose(self, state: SquaremState, x: Array, image: Array, weight: Array, trial: Array) -> Move:
        r, step = difference(x, state.first), difference(image, x)
        v = step - r
        bend = jnp.linalg.norm(weight * v)
        alpha = jnp.linalg.norm(weight * r) / jnp.where(bend > 0, bend, 1)
        capped = (alpha >= state.cap) | (bend == 0)
        alpha = jnp.clip(jnp.where(bend > 0, alpha, state.cap), 1, state.cap)
        go = state.second & (alpha > 1.01)
        # the cap grows where a step at the cap was taken; a step of 1 is the plain image, so it is taken at once
        grows = (trial & state.capped) | (state.second & ~go & capped)
        cap = jnp.where(grows, self.growth * state.cap, state.cap)
        point = image + jnp.where(go, 2 * (alpha - 1) * r + (alpha**2 - 1) * v, 0)
        return Move(point, go, SquaremState(x, ~state.second, cap, capped & go))

    def refused(self, state: SquaremState) -> SquaremState:
        lower = jnp.where(state.capped, jnp.maximum(state.cap / self.growth, 1), state.cap)
        no = jnp.zeros_like(state.second)
        return SquaremState(state.first, no, lower, no)


class AndersonState(NamedTuple):
    """The last point and its residual; the last differences of residuals and of images, in turn overwritten.

    `cap` limits how far an extrapolation goes, in lengths of the residual; `capped` says that it did.
    """

    point: Array
    residual: Array
    residuals: Array
    images: Array
    kept: Array
    begun: Array
    damping: Array
    cap: Array
    capped: Array


@dataclasses.dataclass(frozen=True)
class Anderson(AbstractAcceleration):
    r"""Anderson mixing, damped and guarded: the combination of the last points whose residual is least.

    With residuals :math:`f_k = F(x_k) - x_k` and the last differences :math:`\Delta f`, :math:`\Delta F` in columns,

    .. math:: x_{k+1} = F(x_k) - \Delta F \gamma, \qquad
        \gamma = \arg\min \lVert f_k - \Delta f \gamma \rVert^2 + \lambda \lVert \gamma \rVert^2

    with columns of unit length. The damping :math:`\lambda` grows whenever a point is refused and shrinks whenever one
    is taken; the length of an extrapolation is held to a multiple of :math:`\lVert f_k \rVert`, which begins at 1 and
    follows the same signs.

    Args:
        order: differences that are kept, at least 1.

    References:
        Henderson and Varadhan 2019, "Damped Anderson acceleration with restarts and monotonicity control for
        accelerating EM and EM-like algorithms"; Walker and Ni 2011, "Anderson acceleration for fixed-point iterations".
    """

    order: int = 5

    name = "Anderson mixing"
    source = "Henderson and Varadhan 2019; Walker and Ni 2011"

    def __post_init__(self):
        if self.order < 1:
            raise ValueError(f"Anderson(order={self.order}): order must be at least 1")

    def init(self, x: Array) -> AndersonState:
        none, no = jnp.zeros((self.order, x.size), x.dtype), jnp.zeros((), bool)
        one = jnp.ones((), x.dtype)
        return AndersonState(x, jnp.zeros_like(x), none, none, jnp.zeros((), int), no, LEAST * one, one, no)

    def propose(self, state: AndersonState, x: Array, image: Array, weight: Array, trial: Array) -> Move:
        state = self.learned(state, x, image, trial)
        target = weight * state.residual
        columns = weight * state.residuals
        norms = jnp.linalg.norm(columns, axis=1)
        norms = jnp.where(norms > 0, norms, 1)
        unit = columns / norms[:, None]
        damping = jnp.maximum(state.damping, 10 * self.order * jnp.finfo(x.dtype).eps)
        gamma = jnp.linalg.solve(unit @ unit.T + damping * jnp.eye(self.order, dtype=x.dtype), unit @ target) / norms
        ahead = -gamma @ state.images
        longest, length = state.cap * jnp.linalg.norm(target), jnp.linalg.norm(weight * ahead)
        capped = length > longest
        ahead = jnp.where(capped, longest / jnp.where(capped, length, 1), 1) * ahead
        return Move(image + ahead, state.kept > 0, state._replace(capped=capped))

    def learned(self, state: AndersonState, x: Array, image: Array, trial: Array) -> AndersonState:
        """The state with what a point and its image tell."""
        residual = difference(image, x)
        change, slot = residual - state.residual, state.kept % self.order
        return AndersonState(
            point=x,
            residual=residual,
            residuals=jnp.where(state.begun, state.residuals.at[slot].set(change), state.residuals),
            images=jnp.where(state.begun, state.images.at[slot].set(change + difference(x, state.point)), state.images),
            kept=state.kept + state.begun,
            begun=jnp.ones_like(state.begun),
            damping=jnp.where(trial, 0.1 * state.damping, state.damping),
            cap=jnp.where(trial & state.capped, 4 * state.cap, state.cap),
            capped=state.capped,
        )

    def refused(self, state: AndersonState) -> AndersonState:
        cap = jnp.where(state.capped, jnp.maximum(state.cap / 4, 0.25), state.cap)
        return state._replace(damping=jnp.clip(100 * state.damping, 100 * LEAST, 100), cap=cap)


def difference(a: Array, b: Array) -> Array:
    """`a - b`, zero where either is infinite: what stands on its boundary does not move."""
    moved = jnp.isfinite(a) & jnp.isfinite(b)
    return jnp.where(moved, a, 0) - jnp.where(moved, b, 0)


def free(param: Param, value: Array) -> Array:
    """Coordinates in which a parameter may be extrapolated."""
    kind = kind_of(param.constraint)
    if kind in ("positive", "simplex"):
        return jnp.sqrt(value)
    if kind == "unit":
        return jnp.arcsin(jnp.sqrt(value))
    return value if kind == "real" else to_unconstrained(param, value)


def constrained(param: Param, coordinates: Array) -> Array:
    """The parameter at these coordinates."""
    kind = kind_of(param.constraint)
    if kind == "positive":
        return coordinates**2
    if kind == "simplex":
        return coordinates**2 / (coordinates**2).sum(-1, keepdims=True)
    if kind == "unit":
        return jnp.sin(coordinates) ** 2
    return coordinates if kind == "real" else to_constrained(param, coordinates)


def weights(param: Param, value: Array) -> Array:
    """How much the coordinates weigh in lengths, so that the units of a parameter do not matter."""
    kind = kind_of(param.constraint)
    one = jnp.ones_like(free(param, value))
    if kind == "positive":
        return one / jnp.sqrt(jnp.maximum(value.max(), jnp.finfo(value.dtype).tiny))
    return one


@dataclasses.dataclass(frozen=True, eq=False)
class Accelerator:
    """An acceleration of the EM map on the parameters `names`, as one vector of coordinates."""

    method: AbstractAcceleration
    params: Mapping[str, Param]
    names: tuple[str, ...]

    def flat(self, function: Callable[[Param, Array], Array], params: Mapping[str, Array]) -> Array:
        return ravel_pytree({n: function(self.params[n], params[n]) for n in self.names})[0]

    def init(self, params: Mapping[str, Array]) -> Any:
        return self.method.init(self.flat(free, params))

    def propose(
        self, state: Any, at: Mapping[str, Array], image: Mapping[str, Array], trial: Array
    ) -> tuple[dict[str, Array], Array, Any]:
        """Where to evaluate next, given a point and its image; whether it is an extrapolation; the new state."""
        there, unravel = ravel_pytree({n: free(self.params[n], image[n]) for n in self.names})
        move = self.method.propose(state, self.flat(free, at), there, self.flat(weights, at), trial)
        new = {n: constrained(self.params[n], u) for n, u in unravel(move.point).items()}
        fine = jnp.stack([jnp.isfinite(v).all() for v in new.values()]).all() & move.trial
        return {n: jnp.where(fine, new[n], v) if n in new else v for n, v in image.items()}, fine, move.state

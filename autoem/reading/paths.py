"""Normal laws of a whole path as their steps: a random walk, and a linear state space.

In: an unwrapped distribution. Out: `Path`, which knows where the path starts and the law of a step given the one
before; and of a path that is observed the laws of all its steps at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

FORMS = ("covariance_matrix", "precision_matrix", "scale_tril")


class Path(NamedTuple):
    """How many steps there are, axes of one, where they start, and the law of a step given the one before.

    With a second argument the law is that of many steps, along the last axis before a step's own.
    """

    steps: int
    event: tuple[int, ...]
    start: Callable[[], Any]
    law: Callable[[Any, bool], Any]


def path_of(base: Any) -> Path | None:
    """The steps of a distribution over paths; None of any other."""
    if isinstance(base, dist.GaussianRandomWalk):

        def walk(x: Any, along: bool) -> Any:
            return dist.Normal(x, jnp.expand_dims(base.scale, -1) if along else base.scale)

        return Path(base.num_steps, (), lambda: jnp.zeros(()), walk)
    if isinstance(base, dist.GaussianStateSpace):

        def state(x: Any, along: bool) -> Any:
            loc = jnp.einsum("ij,...j->...i", jnp.asarray(base.transition_matrix), x)
            form, matrix = noise_of(base)
            return dist.MultivariateNormal(loc, **{form: jnp.expand_dims(matrix, -3) if along else matrix})

        return Path(base.num_steps, tuple(base.event_shape[-1:]), lambda: base.initial_value, state)
    return None


def noise_of(base: Any) -> tuple[str, Array]:
    """The noise of a step of a state space, in the form in which the model gives it."""
    every = base.base_dist
    while isinstance(every, dist.Independent | dist.ExpandedDistribution):
        every = every.base_dist
    form = next(f for f in FORMS if f in vars(every))
    return form, getattr(every, form)[..., 0, :, :]


def laws_of_steps(path: Path, value: Any) -> Any:
    """The laws of all steps of a path `(*batch, steps, *event)` given the steps before them."""
    axis = jnp.ndim(value) - len(path.event) - 1
    now = jnp.moveaxis(jnp.asarray(value), axis, 0)
    start = jnp.broadcast_to(path.start(), now.shape[1:])
    return path.law(jnp.moveaxis(jnp.concatenate([start[None], now[:-1]]), 0, axis), True)

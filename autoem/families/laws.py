r"""Normal laws by other names: distributions whose log density is a quadratic, whatever class they are of.

In: an unwrapped NumPyro distribution that the table of families does not hold. Out: `Law`, the entry of the normal law
that it is, and its arguments; or None. Nothing is known here of any class: the gradient of the log density is traced,
and where every equation of it is linear in the value, the density is

.. math:: \log p(x) = \log p(0) + g^\top x - \tfrac12 x^\top P x

with the gradient `g` at zero and the negative Hessian `P`, and as it integrates to one it is the normal law of
precision `P`. An event of more than one axis is one vector of all its entries.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from autoem.families._family import Family, family_of, registered_families
from autoem.graph.affine import is_affine
from autoem.graph.jaxpr import Graph, trace_graph

SCALAR = next(f for f in registered_families()[dist.Normal] if isinstance(f, Family))
MATRICES = [f for f in registered_families()[dist.MultivariateNormal] if isinstance(f, Family)]
VECTOR = next(f for f in MATRICES if f.when == "precision_matrix")
LARGEST = 4096  # entries of an event that is taken as one vector
SLOPE, VALUE = ("law", "slope"), ("law", "value")
WITHOUT = (dist.Delta, dist.Unit, dist.ImproperUniform)  # flat or a point: no quadratic to integrate


def of_walk(base: Any) -> Array:
    """The precision of a random walk: that of its steps."""
    steps = np.eye(base.num_steps) - np.eye(base.num_steps, k=-1)
    return jnp.asarray(steps.T @ steps) / jnp.expand_dims(base.scale, (-2, -1)) ** 2


WRITTEN = {dist.GaussianRandomWalk: of_walk}  # as it tells how parameters enter, where the class itself does not


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
    """A normal law: its entry in the table of families, the distribution's own event, and what computes arguments."""

    family: Family
    event: tuple[int, ...]
    of: Callable[[], Mapping[str, Any]]

    @functools.cached_property
    def args(self) -> Mapping[str, Any]:
        """The arguments, by the names of the family's; computed where they are asked for."""
        return self.of()

    def flat(self, value: Any) -> Any:
        """A value of the distribution, `(*batch, *event)`, with its event as one axis."""
        lead = jnp.ndim(value) - len(self.event)
        return value if len(self.event) < 2 else jnp.reshape(value, (*jnp.shape(value)[:lead], -1))


def law_of(base: Any) -> Law | None:
    """The normal law that `base` is, or None where it is in the table already or is none."""
    if isinstance(family_of(base), Family) or isinstance(base, WITHOUT) or not is_real(base.support):
        return None
    if math.prod(base.event_shape) > LARGEST:
        return None
    try:
        graph = slope_of(base)
    except (NotImplementedError, TypeError, ValueError, ZeroDivisionError):
        return None  # a density that JAX does not differentiate
    if VALUE not in graph.needs(SLOPE) or not is_affine(graph, SLOPE, VALUE):
        return None
    event = tuple(base.event_shape)
    return Law(VECTOR if event else SCALAR, event, lambda: arguments(base, graph))


def arguments(base: Any, graph: Graph) -> dict[str, Array]:
    """Mean and precision of a vector, mean and deviation of a number."""
    precision = precision_of(base, graph)
    mean = mean_of(base, graph, precision)
    if base.event_shape:
        return {"loc": mean, "precision_matrix": precision}
    return {"loc": mean[..., 0], "scale": 1 / jnp.sqrt(precision[..., 0, 0])}


def is_flat(base: Any) -> bool:
    """Whether a distribution has no density but the same everywhere, over all numbers."""
    return isinstance(base, dist.ImproperUniform) and is_real(base.support)


def is_real(support: Any) -> bool:
    """Whether a support is all numbers, or all vectors or arrays of them."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real


def slope_of(base: Any) -> Graph:
    """The gradient of the log density in the value, as a graph."""

    def slope(inputs: dict) -> dict:
        return {SLOPE: jax.grad(lambda x: jnp.sum(base.log_prob(x)))(inputs[VALUE])}

    return trace_graph(slope, {VALUE: jax.ShapeDtypeStruct(base.shape(), jnp.result_type(float))})


def at(graph: Graph, value: Array) -> Array:
    """The gradient at a value."""
    return graph.evaluate([SLOPE], {VALUE: value})[0]


def precision_of(base: Any, graph: Graph) -> Array:
    """The precision `(*batch, d, d)`: the distribution's own, or the gradient's differences."""
    event, batch = tuple(base.event_shape), tuple(base.batch_shape)
    size = math.prod(event)
    written = WRITTEN.get(type(base))
    own = written(base) if written else said(base, "precision_matrix") if len(event) == 1 else None
    if own is not None and jnp.shape(own)[-2:] == (size, size):
        return own  # as the class writes it, which tells how parameters enter
    zero = jnp.zeros((*batch, *event))
    units = jnp.eye(size).reshape(size, *(1,) * len(batch), *event)
    slopes = jax.vmap(lambda unit: jax.jvp(lambda x: at(graph, x), (zero,), (jnp.broadcast_to(unit, zero.shape),))[1])
    return -jnp.moveaxis(slopes(units).reshape(size, *batch, size), 0, -1)


def mean_of(base: Any, graph: Graph, precision: Array) -> Array:
    """The mean `(*batch, d)`: the distribution's own, or where its gradient is zero."""
    event, batch = tuple(base.event_shape), tuple(base.batch_shape)
    own = said(base, "mean")
    if own is not None and fits(jnp.shape(own), (*batch, *event)):
        return jnp.broadcast_to(own, (*batch, *event)).reshape(*batch, -1)
    slope = at(graph, jnp.zeros((*batch, *event))).reshape(*batch, -1)
    return slope / precision[..., 0] if not event else jnp.linalg.solve(precision, slope[..., None])[..., 0]


def fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether an array of one shape can be broadcast to another."""
    pairs = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(a in (1, b) for a, b in pairs)


def said(base: Any, name: str) -> Array | None:
    """What a distribution itself says of its moments; None where it says nothing, or fails."""
    try:
        return jnp.asarray(getattr(base, name))
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None

"""Coordinates for gradient blocks: NumPyro's bijections between a constraint and the whole space."""

from __future__ import annotations

from jax import Array
from numpyro.distributions import biject_to

from autoem.ir import Param


def to_unconstrained(param: Param, value: Array) -> Array:
    return biject_to(param.constraint).inv(value)


def to_constrained(param: Param, value: Array) -> Array:
    return biject_to(param.constraint)(value)


def unconstrained_shape(param: Param, value: Array) -> tuple[int, ...]:
    return biject_to(param.constraint).inverse_shape(value.shape)

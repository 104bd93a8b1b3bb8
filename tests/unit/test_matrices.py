"""Inverse and log determinant with derivatives of their own, and Newton's method where rounding is all that moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoem.families._matrices import inverse, log_det
from autoem.m_step.newton import derivatives, maximise

RNG = np.random.default_rng(4)
POINTS = RNG.uniform(0, 3, 12)
SCATTER = RNG.normal(size=(12, 12))


def kernel(v):
    away = (POINTS[:, None] - POINTS) ** 2
    return jnp.exp(v[0]) * jnp.exp(-away * jnp.exp(v[1])) + 0.1 * jnp.eye(12)


def plain(v):
    matrix = kernel(v)
    return jnp.linalg.slogdet(matrix)[1] + jnp.sum(jnp.linalg.inv(matrix) * (SCATTER @ SCATTER.T))


def ours(v):
    matrix = kernel(v)
    return log_det(matrix) + jnp.sum(inverse(matrix) * (SCATTER @ SCATTER.T))


@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_derivatives_are_those_of_lapack(times: int) -> None:
    at, one, other = jnp.array([0.3, -0.2]), plain, ours
    for _ in range(times):
        one, other = jax.jacfwd(one), jax.jacfwd(other)
    np.testing.assert_allclose(other(at), one(at), rtol=1e-8)
    np.testing.assert_allclose(jax.hessian(ours)(at), jax.hessian(plain)(at), rtol=1e-8)


def test_of_a_batch() -> None:
    batch = jnp.stack([kernel(jnp.array([a, 0.1])) for a in (0.0, 0.5)])
    np.testing.assert_allclose(inverse(batch), np.linalg.inv(batch), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(log_det(batch), np.linalg.slogdet(batch)[1], rtol=1e-12)


def test_slope_and_curvature_in_one_pass() -> None:
    at = jnp.array([0.3, -0.2])
    slope, hessian = derivatives(ours, at)
    np.testing.assert_allclose(slope, jax.grad(plain)(at), rtol=1e-9)
    np.testing.assert_allclose(hessian, jax.hessian(plain)(at), rtol=1e-8)


def test_newton_rests_where_only_rounding_moves() -> None:
    """A parabola on top of a large number: its value is known to 1e-7, and two steps are all there is to do."""
    seen = []

    def objective(v):
        jax.debug.callback(seen.append, v)
        return 1e9 - ((v - jnp.array([1.0, 3.0])) ** 2).sum()

    found = jax.jit(lambda v: maximise(objective, v, 25, 1e-10))(jnp.zeros(2))
    np.testing.assert_allclose(found, [1.0, 3.0], rtol=1e-8)
    jax.effects_barrier()
    assert len(seen) <= 12

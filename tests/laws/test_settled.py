"""Filters whose covariances settle give what the filter of every step gives, whether they do settle or not."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import autoem
from autoem.e_step.gaussian import kalman
from autoem.e_step.gaussian.settled import FROM, backward_alike, forward_alike

STEPS = FROM + 40


def system(rng, batch, lag, dim, slow):
    """Terms of a chain: a precision that is the same at all steps, shifts that are not."""
    window = (lag + 1) * dim
    root = rng.normal(size=(*batch, window, window)) * 0.4
    precision = root @ np.swapaxes(root, -1, -2) + np.eye(window) * (1e-9 if slow else 0.5)
    if slow:  # a random walk that is hardly observed
        move = np.eye(dim)
        own = np.concatenate([np.concatenate([move, -move], 1), np.concatenate([-move, move], 1)], 0)
        precision = np.broadcast_to(own + 1e-7 * np.eye(window), (*batch, window, window))
    start = np.eye(lag * dim + 1) * np.ones((*batch, 1, 1))
    start[..., -1, -1] = 0.0
    return jnp.asarray(start), jnp.asarray(precision), jnp.asarray(rng.normal(size=(STEPS, *batch, window)))


@pytest.mark.parametrize(
    ("batch", "lag", "dim", "slow"), [((), 1, 2, False), ((3,), 1, 1, False), ((), 2, 2, False), ((), 1, 2, True)]
)
def test_the_same_moments_as_step_by_step(batch, lag, dim, slow):
    start, precision, shift = system(np.random.default_rng(5), batch, lag, dim, slow)
    zero = jnp.zeros((STEPS, *batch))
    full = jnp.broadcast_to(precision, (STEPS, *precision.shape))
    swept = jax.jit(lambda s, p: kalman.forward(s, p, 0, dim))(start, kalman.augmented(full, shift, zero))
    expected = jax.jit(lambda s: kalman.backward(s, dim))(swept)
    quick, done = jax.jit(lambda *a: forward_alike(*a, 0, dim))(start, precision, shift)
    found = jax.jit(lambda s, d: backward_alike(s, d, dim))(quick, done)
    assert bool(done) is not slow
    np.testing.assert_allclose(quick.value, swept.value, rtol=1e-10)
    for ours, theirs in zip((*quick.steps, *found), (*swept.steps, *expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-9 * np.abs(theirs).max())


def local_level(y):
    move, noise = (numpyro.param(n, 0.5, constraint=dist.constraints.positive) for n in ("move", "noise"))

    def step(x, seen):
        x = numpyro.sample("x", dist.Normal(x, move))
        numpyro.sample("y", dist.Normal(x, noise), obs=seen)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 3.0)), y)


def test_the_likelihood_of_a_long_series_and_its_gradient():
    """Against the textbook's filter of a local level, in a Python loop, differentiated by differences."""
    y = np.cumsum(np.random.default_rng(2).normal(size=STEPS)) * 0.3 + np.random.default_rng(3).normal(size=STEPS)

    def by_hand(move, noise):
        mean, variance, total = 0.0, 9.0, 0.0
        for seen in y:
            variance += move**2
            own = variance + noise**2
            total += -0.5 * (np.log(2 * np.pi * own) + (seen - mean) ** 2 / own)
            mean, variance = mean + variance / own * (seen - mean), variance * noise**2 / own
        return total

    result = autoem.EM(local_level, init="model", max_steps=400, tol=1e-12, progress=False).run(jax.random.key(0), y)
    move, noise = float(result.params["move"]), float(result.params["noise"])
    assert result.log_likelihood == pytest.approx(by_hand(move, noise), rel=1e-10)
    step = 1e-4
    slopes = [(by_hand(move + step, noise) - by_hand(move - step, noise)) / (2 * step),
              (by_hand(move, noise + step) - by_hand(move, noise - step)) / (2 * step)]  # fmt: skip
    np.testing.assert_allclose(slopes, 0.0, atol=0.02)
    errors = result.standard_errors()
    second = (by_hand(move, noise + 1e-3) - 2 * by_hand(move, noise) + by_hand(move, noise - 1e-3)) / 1e-6
    assert float(errors["noise"]) == pytest.approx(1 / np.sqrt(-second), rel=0.2)

"""Small linear-Gaussian state space models, as users write them with `scan`; `tests/gaussian_models.py` lists them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

POSITIVE, COVARIANCE = constraints.positive, constraints.positive_definite
LOADINGS = np.array([[0.9, 0.2], [-0.4, 0.7], [0.3, 0.5]])
MOVES = np.array([[0.8, 0.15], [-0.1, 0.6]])
SCATTER = np.array([[0.9, 0.2], [0.2, 0.5]])


def param(name: str, value: Any, constraint: Any = constraints.real) -> Any:
    return numpyro.param(name, jnp.asarray(value, float), constraint=constraint)


def normal(name: str, loc: Any, scale: Any, obs: Any = None) -> Any:
    return numpyro.sample(name, dist.Normal(loc, scale), obs=obs)


def vector(name: str, loc: Any, scale: Any, obs: Any = None) -> Any:
    return numpyro.sample(name, dist.Normal(loc, scale).to_event(1), obs=obs)


def local_level(y):
    move, sd = param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    first = normal("first", 0.0, 3.0)

    def step(level, seen):
        level = normal("level", level, move)
        normal("y", level, sd, seen)
        return level, None

    scan(step, first, y)


def trend(y):
    move, bend, sd = param("move", 0.8, POSITIVE), param("bend", 0.4, POSITIVE), param("sd", 0.6, POSITIVE)
    start = normal("level0", 0.0, 3.0), normal("slope0", 0.0, 1.0)

    def step(carry, seen):
        level, slope = carry
        level, slope = normal("level", level + slope, move), normal("slope", slope, bend)
        normal("y", level, sd, seen)
        return (level, slope), None

    scan(step, start, y)


def second_order(y):
    phi, move, sd = param("phi", [0.5, 0.2]), param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(carry, seen):
        one, two = carry
        now = normal("x", phi[0] * one + phi[1] * two, move)
        normal("y", now, sd, seen)
        return (now, one), None

    scan(step, (0.0, 0.0), y)


def vector_state(y):
    a, c, q = param("a", MOVES), param("c", LOADINGS), param("q", SCATTER, COVARIANCE)
    r, m0 = param("r", [0.5, 0.8, 0.6], POSITIVE), param("m0", np.zeros(2))
    start = numpyro.sample("start", dist.MultivariateNormal(m0, jnp.eye(2)))

    def step(x, seen):
        x = numpyro.sample("x", dist.MultivariateNormal(a @ x, q))
        vector("y", c @ x, r, seen)
        return x, None

    scan(step, start, y)


def full_noise(y):
    a, q, r = param("a", MOVES), param("q", [0.7, 0.5], POSITIVE), param("r", np.eye(3) * 0.5 + 0.1, COVARIANCE)

    def step(x, seen):
        x = vector("x", a @ x, q)
        numpyro.sample("y", dist.MultivariateNormal(LOADINGS @ x, r), obs=seen)
        return x, None

    scan(step, jnp.zeros(2), y)


def dynamic_regression(y, x):
    move, sd, alpha = param("move", 0.5, POSITIVE), param("sd", 0.6, POSITIVE), param("alpha", 0.1)
    first = normal("first", 0.0, 2.0)

    def step(beta, now):
        seen, x = now
        beta = normal("beta", beta, move)
        normal("y", alpha + beta * x, sd, seen)
        return beta, None

    scan(step, first, (y, x))


def driven(y, x):
    """An input moves the state; the observation before enters the next."""
    phi, gain, rho = param("phi", 0.7), param("gain", 0.4), param("rho", 0.2)
    move, sd = param("move", 0.5, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(carry, now):
        level, last = carry
        seen, x = now
        level = normal("level", phi * level + gain * x, move)
        last = normal("y", level + rho * last, sd, seen)
        return (level, last), None

    scan(step, (0.0, 0.0), (y, x))


def series(y):
    phi, move, sd = param("phi", 0.7), param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(x, seen):
        with numpyro.plate("series", y.shape[1]):
            x = normal("x", phi * x, move)
            normal("y", x, sd, seen)
        return x, None

    scan(step, jnp.zeros(y.shape[1]), y)


def padded_series(y, present):
    phi, move, sd = param("phi", 0.7), param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(x, now):
        seen, is_there = now
        with numpyro.plate("series", y.shape[1]), handlers.mask(mask=is_there):
            x = normal("x", phi * x, move)
            normal("y", x, sd, seen)
        return x, None

    scan(step, jnp.zeros(y.shape[1]), (y, present))


def series_with_own_start(y):
    mu, move, sd = param("mu", 0.2), param("move", 0.8, POSITIVE), param("sd", [0.6, 0.9, 0.7], POSITIVE)
    with numpyro.plate("series", y.shape[1]):
        first = normal("first", mu, 1.2)

    def step(x, seen):
        with numpyro.plate("series", y.shape[1]):
            x = normal("x", x, move)
            normal("y", x, sd, seen)
        return x, None

    scan(step, first, y)


def backwards(y):
    phi, move, sd = param("phi", 0.7), param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(x, seen):
        x = normal("x", phi * x, move)
        normal("y", x, sd, seen)
        return x, None

    scan(step, 0.0, y, reverse=True)


def loop(y):
    move, sd = param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    x = normal("x0", 0.0, 2.0)
    for t in range(len(y)):
        x = normal(f"x{t}", x, move) if t else x
        normal(f"y{t}", x, sd, y[t])

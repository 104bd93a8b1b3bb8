"""Latents cut at thresholds: censored, rounded, seen through their sign; each with its log joint a cell in NumPy."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from scipy import stats

Y = np.array([0.3, 1.9, -0.8, 2.4, 0.1, 1.2])
X = np.linspace(-1, 1.4, 6)
SEEN = np.array([True, False, False, True, False, False])
NEVER = -jnp.inf


@dataclasses.dataclass(frozen=True)
class Cut:
    """`log_joint(u, i)` is the log density of cell `i` at the values `u`, with breaks at `breaks(i)`."""

    name: str
    model: Callable[[], None]
    log_joint: Callable[[np.ndarray, int], Any]
    breaks: Callable[[int], Sequence[float]]
    cells: int = 6
    observed: Callable[[], float] = lambda: 0.0
    low: float = -40.0

    def __repr__(self) -> str:
        return self.name


def line():
    b = numpyro.param("b", 0.7)
    s = numpyro.param("s", 1.3, constraint=constraints.positive)
    return b * X, s


def prior(u, i):
    return stats.norm(0.7 * X[i], 1.3).logpdf(u)


def hard(allowed):
    return np.where(allowed, 0.0, -np.inf)


def right():
    m, s = line()
    with numpyro.plate("rows", 6):
        with numpyro.handlers.mask(mask=~SEEN):
            u = numpyro.sample("u", dist.Normal(m, s))
        numpyro.factor("cut", jnp.where(SEEN | (u > Y), 0.0, NEVER))
        with numpyro.handlers.mask(mask=SEEN):
            numpyro.sample("y", dist.Normal(m, s), obs=Y)


def left():
    m, s = line()
    with numpyro.plate("rows", 6):
        u = numpyro.sample("u", dist.Normal(m, s))
        numpyro.factor("cut", jnp.where(2 * u - 1 <= Y, 0.0, NEVER))


def interval():
    m, s = line()
    with numpyro.plate("rows", 6):
        u = numpyro.sample("u", dist.Normal(m, s))
        numpyro.factor("cut", jnp.where((u > Y) & (u <= Y + 0.3), 0.0, NEVER))


def probit():
    m, _ = line()
    with numpyro.plate("rows", 6):
        u = numpyro.sample("u", dist.Normal(m, 1.0))
        numpyro.factor("cut", jnp.where((u > 0) == (Y > 0.5), 0.0, NEVER))


def misread():
    """A sign that is read wrong one time in ten, beside a smooth reading."""
    m, s = line()
    wrong = numpyro.param("wrong", 0.1, constraint=constraints.unit_interval)
    with numpyro.plate("rows", 6):
        u = numpyro.sample("u", dist.Normal(m, s))
        numpyro.sample("sign", dist.Bernoulli(jnp.where(u > 0, 1 - wrong, wrong)), obs=(Y > 0.5).astype(int))
        numpyro.sample("y", dist.Normal(u, 0.9), obs=Y)


CUTS = np.array([-0.5, 0.4, 1.5])


def ordered():
    m, s = line()
    level = np.digitize(Y, CUTS)
    with numpyro.plate("rows", 6):
        u = numpyro.sample("u", dist.Normal(m, s))
        numpyro.factor("cut", jnp.where((u[:, None] > CUTS).sum(1) == level, 0.0, NEVER))


GROUP = np.array([0, 1, 0, 1, 1, 0])


def grouped():
    """Every group has one value, of which three rows each say whether it lies above their own mark."""
    b = numpyro.param("b", 0.7)
    with numpyro.plate("groups", 2):
        u = numpyro.sample("u", dist.Normal(b, 1.0))
    with numpyro.plate("rows", 6):
        numpyro.sample("cut", dist.Bernoulli(jnp.where(u[GROUP] > X, 0.8, 0.1)), obs=SEEN.astype(int))


def waiting():
    rate = numpyro.param("b", jnp.array([0.6, 1.4]), constraint=constraints.positive)
    with numpyro.plate("rows", 6):
        u = numpyro.sample("u", dist.Exponential(rate[GROUP]))
        numpyro.factor("cut", jnp.where((u > np.abs(Y)) & (u < np.abs(Y) + 2 + X), 0.0, NEVER))


MODELS = (
    Cut("right", right, lambda u, i: prior(u, i) + hard(u > Y[i]), lambda i: [Y[i]]),
    Cut("left", left, lambda u, i: prior(u, i) + hard(2 * u - 1 <= Y[i]), lambda i: [(Y[i] + 1) / 2]),
    Cut(
        "interval",
        interval,
        lambda u, i: prior(u, i) + hard((u > Y[i]) & (u <= Y[i] + 0.3)),
        lambda i: [Y[i], Y[i] + 0.3],
    ),
    Cut(
        "probit",
        probit,
        lambda u, i: stats.norm(0.7 * X[i], 1.0).logpdf(u) + hard((u > 0) == (Y[i] > 0.5)),
        lambda i: [0.0],
    ),
    Cut(
        "misread",
        misread,
        lambda u, i: (
            prior(u, i) + stats.norm(u, 0.9).logpdf(Y[i]) + np.log(np.where((u > 0) == (Y[i] > 0.5), 0.9, 0.1))
        ),
        lambda i: [0.0],
    ),
    Cut(
        "ordered",
        ordered,
        lambda u, i: prior(u, i) + hard(np.digitize(u, CUTS) == np.digitize(Y[i], CUTS)),
        lambda i: CUTS,
    ),
    Cut(
        "grouped",
        grouped,
        lambda u, i: (
            stats.norm(0.7, 1.0).logpdf(u)
            + sum(stats.bernoulli(np.where(u > X[r], 0.8, 0.1)).logpmf(int(SEEN[r])) for r in range(6) if GROUP[r] == i)
        ),
        lambda i: sorted(X[i == GROUP]),
        cells=2,
    ),
    Cut(
        "waiting",
        waiting,
        lambda u, i: (
            stats.expon(scale=1 / [0.6, 1.4][GROUP[i]]).logpdf(u) + hard((u > abs(Y[i])) & (u < abs(Y[i]) + 2 + X[i]))
        ),
        lambda i: [abs(Y[i]), abs(Y[i]) + 2 + X[i]],
        low=0.0,
    ),
)

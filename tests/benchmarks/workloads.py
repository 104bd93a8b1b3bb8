"""A name in, a workload out: deterministic data, a start that every contender shares, and the scorer that judges all.

Every contender makes exactly `num_steps` EM steps from `start` and hands back parameters under the names of `start`.
The scorer then evaluates the observed-data log-likelihood of those parameters in float64 NumPy, outside the timed
region, so that a contender which stops early, drops a datum or solves another problem is seen, whatever it reports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

Arrays = dict[str, np.ndarray]

_LOG_2PI = float(np.log(2 * np.pi))
NUM_SYMBOLS = 50  # of the categorical hidden Markov model
_ROWS = 50_000  # rows at a time in the generators and the scorers, so that neither sets the peak of memory


@dataclasses.dataclass(frozen=True)
class Workload:
    """One fitting problem.

    Attributes:
        family: `full` or `diagonal` (Gaussian mixtures), `classes` (latent classes), `regressions` (a mixture of them);
            `chain`, `chains` or `symbols` (hidden Markov models: Gaussian, the same of many sequences, categorical).
        num_steps: EM steps that every contender makes.
        data: observed arrays, rows first.
        start: the parameters at step zero; their names are the names of what a contender returns; the first of them
            has an entry for each latent state.
        score: parameters to the log-likelihood of `data`, in nats.
    """

    family: str
    num_steps: int
    data: Arrays
    start: Arrays
    score: Callable[[Arrays], float]

    @property
    def num_states(self) -> int:
        return len(next(iter(self.start.values())))

    @property
    def num_sequences(self) -> int:
        """Sequences of a hidden Markov model."""
        return len(self.data["x"]) if self.family == "chains" else 1


def _blocks(n: int):
    return (slice(i, min(i + _ROWS, n)) for i in range(0, n, _ROWS))


def _mixture_log_likelihood(n: int, log_joint: Callable[[slice], np.ndarray]) -> float:
    return float(sum(logsumexp(log_joint(rows), axis=1).sum() for rows in _blocks(n)))


def _gaussian_log_likelihood(x: np.ndarray, weights: np.ndarray, loc: np.ndarray, cov: np.ndarray) -> float:
    d = x.shape[1]
    factors = np.linalg.cholesky(cov)
    whiteners = np.linalg.inv(factors)
    constants = np.log(weights) - np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1) - 0.5 * d * _LOG_2PI

    def log_joint(rows: slice) -> np.ndarray:
        squares = [(((x[rows] - m) @ a.T) ** 2).sum(1) for m, a in zip(loc, whiteners, strict=True)]
        return constants - 0.5 * np.stack(squares, axis=1)

    return _mixture_log_likelihood(len(x), log_joint)


def gaussian_full(n: int, d: int, k: int, num_steps: int) -> Workload:
    """A mixture of `k` Gaussians with full covariances; starts at `k` data rows and half the data's covariance."""
    rng = np.random.default_rng(0)
    loc = rng.normal(size=(k, d)) * 3.0
    factors = np.tril(rng.normal(size=(k, d, d)) * 0.3)
    factors[:, np.arange(d), np.arange(d)] = rng.uniform(0.6, 1.4, size=(k, d))
    z = rng.choice(k, size=n, p=rng.dirichlet(np.full(k, 5.0)))
    x = rng.normal(size=(n, d))
    for rows in _blocks(n):
        x[rows] = loc[z[rows]] + np.einsum("nij,nj->ni", factors[z[rows]], x[rows])
    start = {
        "weights": np.full(k, 1.0 / k),
        "loc": x[rng.choice(n, k, replace=False)].copy(),
        "cov": np.repeat(np.cov(x[:_ROWS].T)[None] * 0.5, k, 0),
    }
    return Workload("full", num_steps, {"x": x}, start, lambda p: _gaussian_log_likelihood(x, **p))


def gaussian_diagonal(n: int, d: int, k: int, num_steps: int) -> Workload:
    """A mixture of `k` Gaussians with diagonal covariances; starts at `k` data rows and the data's own scales."""
    rng = np.random.default_rng(1)
    loc = rng.normal(size=(k, d)) * 1.2
    scale = rng.uniform(0.5, 1.5, size=(k, d))
    z = rng.choice(k, size=n, p=rng.dirichlet(np.full(k, 5.0)))
    x = rng.normal(size=(n, d))
    for rows in _blocks(n):
        x[rows] = x[rows] * scale[z[rows]] + loc[z[rows]]
    start = {
        "weights": np.full(k, 1.0 / k),
        "loc": x[rng.choice(n, k, replace=False)].copy(),
        "scale": np.repeat(x[:_ROWS].std(0)[None], k, 0),
    }

    def score(p: Arrays) -> float:
        covariances = np.stack([np.diag(s**2) for s in p["scale"]])
        return _gaussian_log_likelihood(x, p["weights"], p["loc"], covariances)

    return Workload("diagonal", num_steps, {"x": x}, start, score)


def latent_classes(n: int, items: int, k: int, missing: float, num_steps: int) -> Workload:
    """Yes/no answers with a share `missing` of them NaN, and `k` latent classes; starts near the truth."""
    rng = np.random.default_rng(4)
    theta = rng.uniform(0.1, 0.9, (k, items))
    z = rng.choice(k, size=n, p=rng.dirichlet(np.full(k, 8.0)))
    x = (rng.random((n, items)) < theta[z]).astype(np.float64)
    x[rng.random((n, items)) < missing] = np.nan
    start = {
        "weights": np.full(k, 1.0 / k),
        "theta": np.clip(theta + rng.normal(size=theta.shape) * 0.15, 0.05, 0.95),
    }

    def score(p: Arrays) -> float:
        yes, no = (x == 1.0).astype(float), (x == 0.0).astype(float)  # a NaN is neither
        log_yes, log_no, log_weights = np.log(p["theta"]).T, np.log1p(-p["theta"]).T, np.log(p["weights"])
        return _mixture_log_likelihood(n, lambda rows: yes[rows] @ log_yes + no[rows] @ log_no + log_weights)

    return Workload("classes", num_steps, {"x": x}, start, score)


def regressions(n: int, p: int, k: int, num_steps: int) -> Workload:
    """A mixture of `k` linear regressions on `p` columns, the first of them one; starts near the truth."""
    rng = np.random.default_rng(10)
    x = rng.normal(size=(n, p))
    x[:, 0] = 1.0
    beta = rng.normal(size=(k, p))
    z = rng.integers(k, size=n)
    scale = rng.uniform(0.3, 1.0, k)
    y = (x * beta[z]).sum(1) + scale[z] * rng.normal(size=n)
    start = {
        "weights": np.full(k, 1.0 / k),
        "beta": beta + 0.5 * rng.normal(size=(k, p)),
        "scale": np.full(k, y.std()),
    }

    def score(q: Arrays) -> float:
        constants = np.log(q["weights"]) - np.log(q["scale"]) - 0.5 * _LOG_2PI

        def log_joint(rows: slice) -> np.ndarray:
            return constants - 0.5 * ((y[rows, None] - x[rows] @ q["beta"].T) / q["scale"]) ** 2

        return _mixture_log_likelihood(n, log_joint)

    return Workload("regressions", num_steps, {"x": x, "y": y}, start, score)


def _paths(rng: np.random.Generator, num_sequences: int, steps: int, trans: np.ndarray) -> np.ndarray:
    """States of every sequence `(num_sequences, steps)`, the first of them uniform."""
    upto = trans.cumsum(1)
    z = np.empty((num_sequences, steps), np.int32)
    z[:, 0] = rng.integers(len(trans), size=num_sequences)
    uniform = rng.random((num_sequences, steps))
    for t in range(1, steps):
        z[:, t] = np.minimum((uniform[:, t, None] > upto[z[:, t - 1]]).sum(1), len(trans) - 1)
    return z


def _start_of_chain(rng: np.random.Generator, k: int) -> Arrays:
    trans = np.full((k, k), 0.3 / (k - 1))
    np.fill_diagonal(trans, 0.7)
    trans += rng.uniform(0, 0.01, (k, k))
    return {"start": np.full(k, 1.0 / k), "trans": trans / trans.sum(1, keepdims=True)}


def _chain_log_likelihood(start: np.ndarray, trans: np.ndarray, log_density: np.ndarray) -> float:
    """Of sequences `(num_sequences, steps, k)`, by the scaled forward recursion."""
    top = log_density.max(-1)
    b = np.exp(log_density - top[..., None])
    total, arrived = top.sum(), np.broadcast_to(start, b[:, 0].shape)
    for t in range(b.shape[1]):
        weight = arrived * b[:, t]
        norm = weight.sum(1, keepdims=True)
        total += np.log(norm).sum()
        arrived = weight / norm @ trans
    return float(total)


def gaussian_chains(num_sequences: int, steps: int, k: int, d: int, num_steps: int) -> Workload:
    """A Gaussian hidden Markov model with states that last; starts near the truth with the data's own scales."""
    rng = np.random.default_rng(2)
    trans = rng.dirichlet(np.ones(k), size=k) * 0.2 + 0.8 * np.eye(k)
    loc = rng.normal(size=(k, d)) * 1.5
    scale = rng.uniform(0.6, 1.4, (k, d))
    z = _paths(rng, num_sequences, steps, trans)
    x = loc[z] + scale[z] * rng.normal(size=(num_sequences, steps, d))
    start = _start_of_chain(rng, k)
    start["loc"] = loc + 0.5 * rng.normal(size=(k, d))
    start["scale"] = np.repeat(x.reshape(-1, d).std(0)[None], k, 0)

    def score(p: Arrays) -> float:
        squares = [(((x - m) / s) ** 2).sum(-1) for m, s in zip(p["loc"], p["scale"], strict=True)]
        constants = -np.log(p["scale"]).sum(1) - 0.5 * d * _LOG_2PI
        return _chain_log_likelihood(p["start"], p["trans"], constants - 0.5 * np.stack(squares, -1))

    if num_sequences == 1:
        return Workload("chain", num_steps, {"x": x[0]}, start, score)
    return Workload("chains", num_steps, {"x": x}, start, score)


def symbol_chain(steps: int, k: int, num_steps: int) -> Workload:
    """A categorical hidden Markov model; starts near the truth."""
    rng = np.random.default_rng(3)
    trans = rng.dirichlet(np.ones(k), size=k) * 0.2 + 0.8 * np.eye(k)
    emit = rng.dirichlet(np.full(NUM_SYMBOLS, 0.15), size=k)
    z = _paths(rng, 1, steps, trans)[0]
    x = np.minimum((rng.random((steps, 1)) > emit.cumsum(1)[z]).sum(-1), NUM_SYMBOLS - 1).astype(np.int32)
    start = _start_of_chain(rng, k)
    start["emit"] = 0.5 * emit + 0.5 * rng.dirichlet(np.full(NUM_SYMBOLS, 2.0), size=k)

    def score(p: Arrays) -> float:
        log_density = np.log(np.maximum(p["emit"], 1e-300)).T[x]
        return _chain_log_likelihood(p["start"], p["trans"], log_density[None])

    return Workload("symbols", num_steps, {"x": x}, start, score)


class Recipe(NamedTuple):
    """How to make a workload, and what to say of it before it is made.

    `contenders` are the words that choose who runs when the command names nobody: all, where it is empty.
    """

    family: str
    title: str
    make: Callable[[], Workload]
    contenders: tuple[str, ...] = ()


def _full(n: int, d: int, k: int, num_steps: int, contenders: tuple[str, ...] = ()) -> Recipe:
    title = f"Gaussian mixture, full covariances: n={n:,} d={d} k={k}"
    return Recipe("full", title, lambda: gaussian_full(n, d, k, num_steps), contenders)


def _diagonal(n: int, d: int, k: int, num_steps: int) -> Recipe:
    title = f"Gaussian mixture, diagonal covariances: n={n:,} d={d} k={k}"
    return Recipe("diagonal", title, lambda: gaussian_diagonal(n, d, k, num_steps))


def _classes(n: int, items: int, k: int, missing: float, num_steps: int) -> Recipe:
    title = f"latent classes: n={n:,}, {items} items, k={k}, {missing:.0%} missing"
    return Recipe("classes", title, lambda: latent_classes(n, items, k, missing, num_steps))


def _regressions(n: int, p: int, k: int, num_steps: int) -> Recipe:
    title = f"mixture of linear regressions: n={n:,} p={p} k={k}"
    return Recipe("regressions", title, lambda: regressions(n, p, k, num_steps))


def _chains(num_sequences: int, steps: int, k: int, d: int, num_steps: int) -> Recipe:
    family, many = ("chain", "") if num_sequences == 1 else ("chains", f"{num_sequences:,} sequences, ")
    title = f"Gaussian hidden Markov model: {many}T={steps:,} k={k} d={d}"
    return Recipe(family, title, lambda: gaussian_chains(num_sequences, steps, k, d, num_steps))


def _symbols(steps: int, k: int, num_steps: int) -> Recipe:
    title = f"categorical hidden Markov model: T={steps:,} k={k} v={NUM_SYMBOLS}"
    return Recipe("symbols", title, lambda: symbol_chain(steps, k, num_steps))


WORKLOADS: dict[str, Recipe] = {
    "W1a": _full(100_000, 16, 32, num_steps=10),
    "W1b": _full(1_000_000, 4, 8, num_steps=10),
    "W1c": _full(2_000, 2, 3, num_steps=100),
    "W2": _diagonal(1_000_000, 16, 16, num_steps=10),
    "W3a": _chains(1, 100_000, 8, 4, num_steps=10),
    "W3b": _chains(1_000, 200, 8, 4, num_steps=10),
    "W3c": _chains(1, 20_000, 64, 4, num_steps=10),
    "W4": _symbols(100_000, 8, num_steps=10),
    "W5": _classes(50_000, 20, 5, missing=0.1, num_steps=50),
    "W10": _regressions(200_000, 10, 4, num_steps=20),
    "memory": _full(10_000_000, 4, 8, num_steps=3, contenders=("autoem", "jax-best", "jax-plain", "sklearn")),
}

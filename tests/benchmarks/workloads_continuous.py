"""Workloads with continuous latents, or with none: factors, vectors seen in part, a state space, tomography.

The same promise as in `workloads`: deterministic data, a start that all share, and a scorer in NumPy.
"""

from __future__ import annotations

import numpy as np

from .workloads import Arrays, Recipe, Workload

_LOG_2PI = float(np.log(2 * np.pi))


def factors(n: int, d: int, k: int, num_steps: int) -> Workload:
    """Factor analysis; starts at the data's own means and variances, and random loadings."""
    rng = np.random.default_rng(5)
    loadings, variance = rng.normal(size=(d, k)), rng.uniform(0.3, 1.5, d)
    x = rng.normal(size=(n, k)) @ loadings.T + np.sqrt(variance) * rng.normal(size=(n, d)) + rng.normal(size=d)
    covariance = np.cov(x.T, bias=True)
    start = {
        "loadings": rng.normal(size=(d, k)) * 0.5,
        "centre": x.mean(0),
        "variance": np.diag(covariance).copy(),
    }

    def score(p: Arrays) -> float:
        own = p["loadings"] @ p["loadings"].T + np.diag(p["variance"])
        off = x.mean(0) - p["centre"]
        moment = covariance + np.outer(off, off)
        return float(-0.5 * n * (d * _LOG_2PI + np.linalg.slogdet(own)[1] + np.trace(np.linalg.solve(own, moment))))

    return Workload("factors", num_steps, {"x": x}, start, score)


def holes(n: int, d: int, missing: float, num_steps: int) -> Workload:
    """A multivariate normal with a share `missing` of its entries NaN; starts at what is seen of each column."""
    rng = np.random.default_rng(6)
    root = rng.normal(size=(d, d))
    x = rng.multivariate_normal(rng.normal(size=d), root @ root.T / d + 0.3 * np.eye(d), size=n)
    x[rng.random((n, d)) < missing] = np.nan
    x = x[~np.isnan(x).all(1)]
    start = {"centre": np.nanmean(x, 0), "scatter": np.diag(np.nanvar(x, 0))}
    patterns, which = np.unique(~np.isnan(x), axis=0, return_inverse=True)

    def score(p: Arrays) -> float:
        total = 0.0
        for i, seen in enumerate(patterns):
            off = x[which.ravel() == i][:, seen] - p["centre"][seen]
            own = p["scatter"][np.ix_(seen, seen)]
            squares = (off * np.linalg.solve(own, off.T).T).sum()
            total -= 0.5 * (squares + len(off) * (np.linalg.slogdet(own)[1] + seen.sum() * _LOG_2PI))
        return float(total)

    return Workload("holes", num_steps, {"x": x}, start, score)


def states(steps: int, n: int, m: int, num_steps: int) -> Workload:
    """A linear-Gaussian state space with every matrix free; starts near the truth."""
    rng = np.random.default_rng(7)
    move = 0.97 * np.linalg.qr(rng.normal(size=(n, n)))[0]
    read, jolt, noise = rng.normal(size=(m, n)), 0.1 * np.eye(n) + 0.02, np.diag(rng.uniform(0.3, 1.0, m))
    jolts = rng.normal(size=(steps, n)) @ np.linalg.cholesky(jolt).T
    z = np.zeros((steps, n))
    for t in range(steps):
        z[t] = move @ z[t - 1] + jolts[t] if t else rng.normal(size=n)
    x = z @ read.T + rng.normal(size=(steps, m)) @ np.sqrt(noise)
    start = {
        "first_mean": np.zeros(n),
        "first_cov": np.eye(n),
        "move": move + 0.05 * rng.normal(size=(n, n)),
        "jolt": 0.3 * np.eye(n),
        "read": read + 0.2 * rng.normal(size=(m, n)),
        "noise": np.eye(m),
    }

    def score(p: Arrays) -> float:
        mean, cov, total = p["first_mean"], p["first_cov"], 0.0
        for t in range(steps):
            own = p["read"] @ cov @ p["read"].T + p["noise"]
            off = x[t] - p["read"] @ mean
            total -= 0.5 * (off @ np.linalg.solve(own, off) + np.linalg.slogdet(own)[1] + m * _LOG_2PI)
            gain = np.linalg.solve(own, p["read"] @ cov).T
            mean, cov = mean + gain @ off, cov - gain @ own @ gain.T
            mean, cov = p["move"] @ mean, p["move"] @ cov @ p["move"].T + p["jolt"]
        return float(total)

    return Workload("states", num_steps, {"x": x}, start, score)


def tomography(rows: int, columns: int, entries: int, num_steps: int) -> Workload:
    """Poisson counts whose rates are sums over `entries` of the columns a row; as many columns as rows read at most."""
    rng = np.random.default_rng(9)
    near = rng.integers(0, columns, (rows, 1)) + rng.integers(0, columns // 8, (rows, entries))
    index, weight = np.sort(near % columns, 1).astype(np.int32), rng.uniform(0.1, 1.0, (rows, entries))
    activity = rng.gamma(1.0, 1.0, columns)
    y = rng.poisson((weight * activity[index]).sum(1)).astype(float)

    def score(p: Arrays) -> float:
        rate = (weight * p["activity"][index]).sum(1)
        return float((y * np.log(rate) - rate).sum())

    data = {"y": y, "index": index, "weight": weight}
    return Workload("tomography", num_steps, data, {"activity": np.ones(columns)}, score)


WORKLOADS: dict[str, Recipe] = {
    "W6a": Recipe("factors", "factor analysis: n=20,000 d=64 k=8", lambda: factors(20_000, 64, 8, 100)),
    "W6b": Recipe("holes", "multivariate normal, 20% missing: n=5,000 d=10", lambda: holes(5_000, 10, 0.2, 50)),
    "W7": Recipe("states", "state space: T=10,000, 4 states, 8 outputs", lambda: states(10_000, 4, 8, 10)),
    "W9": Recipe("tomography", "tomography: 20,000 x 10,000, 100 a row", lambda: tomography(20_000, 10_000, 100, 20)),
}

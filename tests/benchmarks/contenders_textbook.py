"""EM in JAX as a book writes it: densities by their formulae, all rows and components at once, one device, one loop.

This is what a translation that only calls log densities would give; `contenders_jax` holds the faster forms.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._contender import Contender, Outcome
from .workloads import Workload

_LOG_2PI = float(np.log(2 * np.pi))


def gaussian_full(w: Workload) -> Callable:
    """A Cholesky factor and a triangular solve a component; residuals (n, k, d) in the M-step."""
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(w.data["x"])
    n, d = x.shape

    def log_density(loc, cov):
        factor = jnp.linalg.cholesky(cov)
        white = jax.scipy.linalg.solve_triangular(factor, (x - loc).T, lower=True)
        return -0.5 * (white**2).sum(0) - jnp.log(jnp.diagonal(factor)).sum() - 0.5 * d * _LOG_2PI

    def step(_, p):
        log_joint = jax.vmap(log_density)(p["loc"], p["cov"]).T + jnp.log(p["weights"])
        r = jax.nn.softmax(log_joint, axis=1)
        counts = r.sum(0)
        loc = r.T @ x / counts[:, None]
        residual = x[:, None, :] - loc
        cov = jnp.einsum("nk,nki,nkj->kij", r, residual, residual) / counts[:, None, None]
        return {"weights": counts / n, "loc": loc, "cov": cov}

    return step


def gaussian_diagonal(w: Workload) -> Callable:
    """Standardised residuals (n, k, d) in both steps."""
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(w.data["x"])
    n = len(x)

    def log_density(loc, scale):
        return (-0.5 * ((x - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * _LOG_2PI).sum(1)

    def step(_, p):
        log_joint = jax.vmap(log_density)(p["loc"], p["scale"]).T + jnp.log(p["weights"])
        r = jax.nn.softmax(log_joint, axis=1)
        counts = r.sum(0)
        loc = r.T @ x / counts[:, None]
        variance = jax.vmap(lambda weight, m: weight @ (x - m) ** 2)(r.T, loc) / counts[:, None]
        return {"weights": counts / n, "loc": loc, "scale": jnp.sqrt(variance)}

    return step


def latent_classes(w: Workload) -> Callable:
    """The answers as 0 and 1 with a mask beside them."""
    import jax
    import jax.numpy as jnp

    seen = jnp.asarray(~np.isnan(w.data["x"]))
    x = jnp.asarray(np.nan_to_num(w.data["x"]))

    def log_density(theta):
        return jnp.where(seen, x * jnp.log(theta) + (1 - x) * jnp.log1p(-theta), 0.0).sum(1)

    def step(_, p):
        log_joint = jax.vmap(log_density)(p["theta"]).T + jnp.log(p["weights"])
        r = jax.nn.softmax(log_joint, axis=1)
        return {"weights": r.mean(0), "theta": r.T @ (x * seen) / (r.T @ seen)}

    return step


def regressions(w: Workload) -> Callable:
    """Residuals (n, k), then weighted normal equations a component."""
    import jax
    import jax.numpy as jnp

    x, y = jnp.asarray(w.data["x"]), jnp.asarray(w.data["y"])

    def solve(weight):
        weighted = x * weight[:, None]
        return jnp.linalg.solve(weighted.T @ x, weighted.T @ y)

    def step(_, p):
        residual = y[:, None] - x @ p["beta"].T
        log_joint = -0.5 * (residual / p["scale"]) ** 2 - jnp.log(p["scale"]) - 0.5 * _LOG_2PI + jnp.log(p["weights"])
        r = jax.nn.softmax(log_joint, axis=1)
        counts = r.sum(0)
        beta = jax.vmap(solve)(r.T)
        variance = (r * (y[:, None] - x @ beta.T) ** 2).sum(0) / counts
        return {"weights": counts / len(y), "beta": beta, "scale": jnp.sqrt(variance)}

    return step


def prepare(make: Callable[[Workload], Callable], w: Workload) -> Callable[[], Outcome]:
    """All steps as one compiled loop."""
    import jax
    import jax.numpy as jnp

    step = make(w)
    start = {name: jnp.asarray(value) for name, value in w.start.items()}
    fit = jax.jit(lambda p: jax.lax.fori_loop(0, w.num_steps, step, p))
    return lambda: Outcome({name: np.asarray(value) for name, value in fit(start).items()})


def _contender(family: str, make: Callable[[Workload], Callable]) -> Contender:
    return Contender("jax-textbook", family, lambda w: prepare(make, w), ("jax.numpy", "jax.scipy"), 1, "textbook")


_FAMILIES = {
    "full": gaussian_full,
    "diagonal": gaussian_diagonal,
    "classes": latent_classes,
    "regressions": regressions,
}
CONTENDERS = tuple(_contender(*item) for item in _FAMILIES.items())

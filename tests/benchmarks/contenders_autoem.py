"""autoem on plain NumPyro models, written as a user writes them and tuned for nothing; with one device and with all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._contender import CORES, Contender, Outcome
from .workloads import Arrays, Workload


def full_mixture(k: int) -> Callable:
    """A Gaussian mixture with full covariances."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    def model(x):
        n, d = x.shape
        weights = numpyro.param("weights", jnp.ones(k) / k, constraint=constraints.simplex)
        with numpyro.plate("components", k):
            loc = numpyro.param("loc", jnp.zeros((k, d)))
            cov = numpyro.param("cov", jnp.tile(jnp.eye(d), (k, 1, 1)), constraint=constraints.positive_definite)
        with numpyro.plate("data", n):
            z = numpyro.sample("z", dist.Categorical(weights))
            numpyro.sample("x", dist.MultivariateNormal(loc[z], cov[z]), obs=x)

    return model


def diagonal_mixture(k: int) -> Callable:
    """A Gaussian mixture with diagonal covariances."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    def model(x):
        n, d = x.shape
        weights = numpyro.param("weights", jnp.ones(k) / k, constraint=constraints.simplex)
        loc = numpyro.param("loc", jnp.zeros((k, d)))
        scale = numpyro.param("scale", jnp.ones((k, d)), constraint=constraints.positive)
        with numpyro.plate("data", n):
            z = numpyro.sample("z", dist.Categorical(weights))
            numpyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)

    return model


def latent_classes(k: int) -> Callable:
    """Latent classes with missing answers masked out."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    def model(x, seen):
        n, items = x.shape
        weights = numpyro.param("weights", jnp.ones(k) / k, constraint=constraints.simplex)
        theta = numpyro.param("theta", jnp.full((k, items), 0.5), constraint=constraints.unit_interval)
        with numpyro.plate("people", n):
            z = numpyro.sample("z", dist.Categorical(weights))
            numpyro.sample("x", dist.Bernoulli(theta[z]).mask(seen).to_event(1), obs=x)

    return model


def regression_mixture(k: int) -> Callable:
    """A mixture of linear regressions."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    def model(x, y):
        n, p = x.shape
        weights = numpyro.param("weights", jnp.ones(k) / k, constraint=constraints.simplex)
        beta = numpyro.param("beta", jnp.zeros((k, p)))
        scale = numpyro.param("scale", jnp.ones(k), constraint=constraints.positive)
        with numpyro.plate("data", n):
            z = numpyro.sample("z", dist.Categorical(weights))
            mean = jnp.einsum("np,np->n", x, beta[z])
            numpyro.sample("y", dist.Normal(mean, scale[z]), obs=y)

    return model


MODELS = {
    "full": full_mixture,
    "diagonal": diagonal_mixture,
    "classes": latent_classes,
    "regressions": regression_mixture,
}


def model_data(w: Workload) -> Arrays:
    """The model's arguments: the workload's arrays, and for latent classes the NaN filled with a mask beside them."""
    if w.family != "classes":
        return w.data
    seen = ~np.isnan(w.data["x"])
    return {"x": np.where(seen, w.data["x"], 0.0), "seen": seen}


_ON_DEVICE = 256 * 2**20  # bytes: larger arrays go in as they lie in memory, so that they are not there twice


def prepare(w: Workload) -> Callable[[], Outcome]:
    """One `EM` object; every fit is a whole `run` of exactly `num_steps` steps from the common start."""
    import jax
    import jax.numpy as jnp

    import autoem

    data = {name: jnp.asarray(x) if x.nbytes < _ON_DEVICE else x for name, x in model_data(w).items()}
    start = {name: jnp.asarray(value) for name, value in w.start.items()}
    model = MODELS[w.family](len(w.start["weights"]))
    em = autoem.EM(model, init=start, max_steps=w.num_steps, tol=0.0, progress=False)

    def run() -> Outcome:
        result = em.run(jax.random.key(0), **data)
        if result.num_steps != w.num_steps:
            raise RuntimeError(f"autoem made {result.num_steps} steps in place of {w.num_steps}: {result.status}")
        return Outcome({name: np.asarray(result.params[name]) for name in w.start})

    return run


_IMPORTS = ("jax.numpy", "numpyro", "autoem")
CONTENDERS = tuple(
    Contender(name, family, prepare, _IMPORTS, devices, "autoem")
    for family in MODELS
    for name, devices in (("autoem-1", 1), ("autoem-all", CORES))
)

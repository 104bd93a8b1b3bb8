"""autoem on plain NumPyro models, written as a user writes them and tuned for nothing; with one device and with all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._contender import CORES, Contender, Outcome
from .workloads import NUM_SYMBOLS, Arrays, Workload


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


def _chain_parameters(k: int, d: int):
    """Start, transitions, locations and scales, as every Gaussian chain below declares them."""
    import jax.numpy as jnp
    import numpyro
    from numpyro.distributions import constraints

    start = numpyro.param("start", jnp.ones(k) / k, constraint=constraints.simplex)
    trans = numpyro.param("trans", jnp.ones((k, k)) / k, constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.zeros((k, d)))
    scale = numpyro.param("scale", jnp.ones((k, d)), constraint=constraints.positive)
    return start, trans, loc, scale


def gaussian_chain(k: int) -> Callable:
    """A hidden Markov model with Gaussian emissions."""
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.control_flow import scan

    def model(x):
        start, trans, loc, scale = _chain_parameters(k, x.shape[1])

        def emit(name, z, x):
            numpyro.sample(name, dist.Normal(loc[z], scale[z]).to_event(1), obs=x)

        def step(z, x):
            z = numpyro.sample("z", dist.Categorical(trans[z]))
            emit("x", z, x)
            return z, None

        first = numpyro.sample("first", dist.Categorical(start))
        emit("x_first", first, x[0])
        scan(step, first, x[1:])

    return model


def gaussian_chains(k: int) -> Callable:
    """The same for many sequences of one length, in a plate inside the step."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.control_flow import scan

    def model(x):
        start, trans, loc, scale = _chain_parameters(k, x.shape[2])
        sequences = numpyro.plate("sequences", len(x))

        def step(z, x):
            with sequences:
                z = numpyro.sample("z", dist.Categorical(trans[z]))
                numpyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)
            return z, None

        with sequences:
            first = numpyro.sample("first", dist.Categorical(start))
            numpyro.sample("x_first", dist.Normal(loc[first], scale[first]).to_event(1), obs=x[:, 0])
        scan(step, first, jnp.swapaxes(x[:, 1:], 0, 1))

    return model


def symbol_chain(k: int) -> Callable:
    """A hidden Markov model with categorical emissions."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.control_flow import scan
    from numpyro.distributions import constraints

    def model(x):
        start = numpyro.param("start", jnp.ones(k) / k, constraint=constraints.simplex)
        trans = numpyro.param("trans", jnp.ones((k, k)) / k, constraint=constraints.simplex)
        flat = jnp.ones((k, NUM_SYMBOLS)) / NUM_SYMBOLS
        emit = numpyro.param("emit", flat, constraint=constraints.simplex)

        def step(z, x):
            z = numpyro.sample("z", dist.Categorical(trans[z]))
            numpyro.sample("x", dist.Categorical(emit[z]), obs=x)
            return z, None

        first = numpyro.sample("first", dist.Categorical(start))
        numpyro.sample("x_first", dist.Categorical(emit[first]), obs=x[0])
        scan(step, first, x[1:])

    return model


MODELS = {
    "full": full_mixture,
    "diagonal": diagonal_mixture,
    "classes": latent_classes,
    "regressions": regression_mixture,
    "chain": gaussian_chain,
    "chains": gaussian_chains,
    "symbols": symbol_chain,
}


def model_data(w: Workload) -> Arrays:
    """The workload's arrays, and for latent classes the NaN filled with a mask beside them."""
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
    model = MODELS[w.family](w.num_states)
    em = autoem.EM(model, init=start, max_steps=w.num_steps, tol=0.0, progress=False)
    key = jax.random.key(0)

    def run() -> Outcome:
        result = em.run(key, **data)
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

"""A fit's maximum, checked by a search that knows nothing of EM.

In: a NumPyro model and a fit of it. `assert_maximal` adds up the latent `z` of the rows, if there is one, by itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.optimize
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions import biject_to, constraints

import autoem


def fitted(model: Callable, *args, **options) -> autoem.EMResult:
    em = autoem.EM(model, progress=False, max_steps=3000, tol=1e-13, **options)
    return em.run(jax.random.key(1), *args)


def constraints_of(model: Callable, *args) -> dict:
    trace = handlers.trace(handlers.seed(model, 0)).get_trace(*args)
    return {
        n: s["kwargs"].get("constraint", constraints.real) if s["type"] == "param" else s["fn"].support
        for n, s in trace.items()
        if s["type"] == "param" or (s["type"] == "sample" and not s["is_observed"] and n != "z")
    }


def log_joint(model: Callable, params: dict, *args) -> jax.Array:
    """Log density of the data and priors: a latent `z` of rows, if any, is summed out state by state."""

    def at(z) -> jax.Array:
        given = handlers.substitute(handlers.seed(model, 0), data={**params, "z": z})
        trace = handlers.trace(given).get_trace(*args)
        parts = [(n, density(s["fn"], s["value"])) for n, s in trace.items() if s["type"] == "sample"]
        priors = sum(p.sum() for n, p in parts if n in params)
        rows = sum(p.reshape((*p.shape[:1], -1)).sum(-1) for n, p in parts if n not in params)
        return priors, rows

    trace = handlers.trace(handlers.seed(model, 0)).get_trace(*args)
    states = trace["z"]["fn"].enumerate_support(expand=False).ravel() if "z" in trace else [0]
    both = [at(jnp.full(len(args[0]), k)) for k in states]
    return both[0][0] + jax.nn.logsumexp(jnp.stack([rows for _, rows in both]), axis=0).sum()


def density(fn, value) -> jax.Array:
    """NumPyro's log density; of a beta binomial by log gammas, since JAX's `betaln` is good to seven digits or so."""
    base = fn.base_dist if isinstance(fn, dist.ExpandedDistribution) else fn
    if not isinstance(base, dist.BetaBinomial):
        return fn.log_prob(value)
    a, b, n, log_gamma = base.concentration1, base.concentration0, base.total_count, jax.scipy.special.gammaln

    def beta(a, b):
        return log_gamma(a) + log_gamma(b) - log_gamma(a + b)

    return beta(a + value, b + n - value) - beta(a, b) - jnp.log(n + 1.0) - beta(value + 1.0, n - value + 1.0)


def assert_maximal(model: Callable, result: autoem.EMResult, *args) -> None:
    """A quasi-Newton search from the fitted parameters gains nothing, and the fit's own objective is right."""
    spaces = constraints_of(model, *args)
    free = {n: biject_to(spaces[n]).inv(jnp.asarray(result.params[n])) for n in spaces}
    flat, unravel = ravel_pytree(free)

    @jax.jit
    @jax.value_and_grad
    def loss(v):
        return -log_joint(model, {n: biject_to(spaces[n])(u) for n, u in unravel(v).items()}, *args)

    found = scipy.optimize.minimize(lambda v: tuple(map(np.asarray, loss(v))), flat, jac=True, method="BFGS")
    start = -float(loss(flat)[0])
    np.testing.assert_allclose(result.objective, start, rtol=1e-9)
    assert -found.fun - start < 1e-6, (result.params, unravel(found.x))


def positive(name: str, shape: tuple = ()) -> jax.Array:
    return numpyro.param(
        name, 1.3 + jnp.arange(np.prod(shape, dtype=int)).reshape(shape) / 7, constraint=constraints.positive
    )

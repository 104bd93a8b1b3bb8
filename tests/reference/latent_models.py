"""The models of the reference cases with continuous latents: dictionaries of columns in, plain NumPyro text.

As in `case_models`, each is written as its author would write it for NumPyro alone.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from .case_models import covariance, positive


def sleepstudy(d):
    """An intercept and a slope of each subject, tied by a free covariance."""
    beta = numpyro.param("beta", jnp.array([250.0, 10.0]))
    scatter = covariance("G", jnp.diag(jnp.array([600.0, 30.0])))
    sigma = positive("sigma", 30.0)
    with numpyro.plate("subjects", 18):
        own = numpyro.sample("b", dist.MultivariateNormal(jnp.zeros(2), scatter))
    with numpyro.plate("rows", len(d["reaction"])):
        line = beta + own[d["subject"]]
        numpyro.sample("y", dist.Normal(line[:, 0] + line[:, 1] * d["days"], sigma), obs=d["reaction"])


def dyestuff(d):
    y = d["yield"]
    mu = numpyro.param("mu", y.mean())
    between, within = positive("sd_group", y.std()), positive("sigma", y.std())
    with numpyro.plate("batches", 6):
        b = numpyro.sample("b", dist.Normal(0.0, between))
    with numpyro.plate("samples", len(y)):
        numpyro.sample("y", dist.Normal(mu + b[d["batch"]], within), obs=y)


def _loadings(shape):
    return numpyro.param("W", lambda key: jax.random.normal(key, shape))


def ability(d):
    """Factor analysis: a variance of its own for each test."""
    x, factors = d["x"], 2
    mu, w = numpyro.param("mu", x.mean(0)), _loadings((x.shape[1], factors))
    psi = positive("psi", 0.5 * x.var(0))
    with numpyro.plate("people", len(x)):
        f = numpyro.sample("f", dist.Normal(jnp.zeros(factors), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(mu + f @ w.T, jnp.sqrt(psi)).to_event(1), obs=x)


def iris_ppca(d):
    """Principal components: one variance for all columns."""
    x, components = d["x"], 2
    mu, w, sigma = numpyro.param("mu", x.mean(0)), _loadings((x.shape[1], components)), positive("sigma", x.std())
    with numpyro.plate("flowers", len(x)):
        f = numpyro.sample("f", dist.Normal(jnp.zeros(components), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(mu + f @ w.T, sigma).to_event(1), obs=x)


def nile_level(d):
    x = d["x"]
    moves, noise = positive("sd_level", 167.0), positive("sd_obs", 168.0)
    first = numpyro.sample("first", dist.Normal(1000.0, 1000.0))
    numpyro.sample("x_first", dist.Normal(first, noise), obs=x[0])

    def step(level, flow):
        level = numpyro.sample("level", dist.Normal(level, moves))
        numpyro.sample("x", dist.Normal(level, noise), obs=flow)
        return level, None

    scan(step, first, x[1:])

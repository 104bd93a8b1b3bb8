"""The models of the chained reference cases: dictionaries of columns in, plain NumPyro text with `scan`.

As in `case_models`, each is written as its author would write it for NumPyro alone.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from .case_models import positive, probability, simplex


def ice_cream(d):
    """Two kinds of weather and a STOP, which is seen once, at the end."""
    start = simplex("start", jnp.array([0.5, 0.5]))
    trans = simplex("trans", jnp.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]))
    emit = simplex("emit", jnp.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]))
    seen = jnp.block([[emit, jnp.zeros((2, 1))], [jnp.zeros((1, 3)), jnp.ones((1, 1))]])
    stop, first = jnp.array([[0.0, 0.0, 1.0]]), jnp.concatenate([start, jnp.zeros(1)])
    law = jnp.concatenate([trans, stop, first[None]])  # the last row is read before the first day

    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(law[z]))
        numpyro.sample("y", dist.Categorical(seen[z]), obs=y)
        return z, None

    scan(step, jnp.array(3), d["symbol"])


def _poisson_chain(start, trans, rate, counts):
    z0 = numpyro.sample("z0", dist.Categorical(start))
    numpyro.sample("y0", dist.Poisson(rate[z0]), obs=counts[0])

    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(trans[z]))
        numpyro.sample("y", dist.Poisson(rate[z]), obs=y)
        return z, None

    scan(step, z0, counts[1:])


def _parameters(d, k):
    trans = simplex("trans", 0.8 * jnp.eye(k) + 0.2 / k)
    return trans, positive("rate", jnp.linspace(0.7, 1.4, k) * d["count"].mean())


def earthquakes(k):
    """The first year's state has a law of its own."""

    def model(d):
        trans, rate = _parameters(d, k)
        _poisson_chain(simplex("start", jnp.full(k, 1 / k)), trans, rate, d["count"])

    return model


def stationary_earthquakes(k):
    """The first year's state has the stationary law of the transitions."""

    def model(d):
        trans, rate = _parameters(d, k)
        start = jnp.linalg.solve((jnp.eye(k) - trans + 1.0).T, jnp.ones(k))
        _poisson_chain(start, trans, rate, d["count"])

    return model


def nile(d):
    x, k = d["x"], 2
    start = simplex("start", jnp.full(k, 1 / k))
    trans = simplex("trans", 0.7 * jnp.eye(k) + 0.3 / k)
    mu = numpyro.param("mu", jnp.quantile(x, (jnp.arange(k) + 0.5) / k))
    sd = positive("sd", jnp.full(k, x.std()))
    z0 = numpyro.sample("z0", dist.Categorical(start))
    numpyro.sample("y0", dist.Normal(mu[z0], sd[z0]), obs=x[0])

    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(trans[z]))
        numpyro.sample("y", dist.Normal(mu[z], sd[z]), obs=y)
        return z, None

    scan(step, z0, x[1:])


def knowledge_tracing(d):
    """A skill once known stays known; tries marked -1 were not made."""
    correct = d["correct"]
    n = len(correct)
    init, learn = probability("init", 0.4), probability("learn", 0.2)
    guess, slip = probability("guess", 0.25), probability("slip", 0.15)
    p_next = jnp.stack([learn, jnp.ones_like(learn), init])  # the last is read before the first try
    p_right = jnp.stack([guess, 1 - slip])

    def step(known, y):
        with numpyro.plate("students", n):
            known = numpyro.sample("known", dist.Bernoulli(p_next[known]))
            numpyro.sample("y", dist.Bernoulli(p_right[known]).mask(y >= 0), obs=jnp.maximum(y, 0))
        return known, None

    scan(step, jnp.full(n, 2), correct.T)

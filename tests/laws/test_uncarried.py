"""A discrete latent of each step that the chain reads and nothing carries: against every completion, enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer.util import log_density

import autoem
from autoem.m_step import Fixed

Y = jnp.array([0.3, -0.2, 1.0, 2.8])
W = np.array([0.7, 0.3])
P = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.1, 0.9]]])
M = np.array([[0.0, 2.0], [1.0, -1.0]])


def parameters():
    shares = numpyro.param("w", jnp.asarray(W), constraint=constraints.simplex)
    trans = numpyro.param("p", jnp.asarray(P), constraint=constraints.simplex)
    return shares, trans, numpyro.param("m", jnp.asarray(M))


def chooses_transition(y):
    shares, trans, m = parameters()

    def step(c, y):
        z = numpyro.sample("z", dist.Categorical(shares))
        c = numpyro.sample("c", dist.Categorical(trans[z, c]))
        numpyro.sample("y", dist.Normal(m[z, c], 1.0), obs=y)
        return c, None

    scan(step, 0, y)


def chain_of_two_latents(y):
    """One of the step's own below another; the emission reads the last step's state."""
    shares, trans, m = parameters()

    def step(c, y):
        z = numpyro.sample("z", dist.Categorical(shares))
        v = numpyro.sample("v", dist.Categorical(trans[0, z]))
        new = numpyro.sample("c", dist.Categorical(trans[v, c]))
        numpyro.sample("y", dist.Normal(m[c, new] + m[1, z], 1.0), obs=y)
        return new, None

    scan(step, 0, y)


def read_outside(y):
    shares, trans, m = parameters()

    def step(c, y):
        z = numpyro.sample("z", dist.Categorical(shares))
        c = numpyro.sample("c", dist.Categorical(trans[z, c]))
        return c, z

    _, path = scan(step, 0, y)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(m[0, path], 1.0), obs=y)


@pytest.mark.parametrize(("model", "names"), [(chooses_transition, "zc"), (chain_of_two_latents, "zvc")])
def test_likelihood_and_posterior_are_those_of_all_completions(model, names):
    result = autoem.EM(model, m_step=Fixed(), init="model", progress=False).run(jax.random.key(0), Y)
    t = len(Y)
    every = np.array(list(itertools.product(range(2), repeat=t * len(names)))).reshape(-1, len(names), t)

    def one(z):
        chosen = {n: z[i] for i, n in enumerate(names)}
        return log_density(model, (Y,), {}, {**chosen, "w": jnp.asarray(W), "p": jnp.asarray(P), "m": jnp.asarray(M)})[
            0
        ]

    each = jax.jit(lambda z: jax.lax.map(one, z))(jnp.asarray(every))
    total = jax.nn.logsumexp(each)
    np.testing.assert_allclose(result.log_likelihood, total, rtol=1e-10)
    share = np.exp(np.asarray(each - total))
    posterior, mode = result.posterior(), every[int(jnp.argmax(each))]
    draws = posterior.sample(jax.random.key(1), 4000)
    for i, n in enumerate(names):
        exact = share @ every[:, i]
        np.testing.assert_allclose(posterior.marginals[n][:, 1], exact, rtol=1e-8)
        np.testing.assert_allclose(draws[n].mean(0), exact, atol=4 * 0.5 / np.sqrt(4000))
        np.testing.assert_array_equal(posterior.mode()[n], mode[i])


def test_path_of_such_a_latent_is_not_read_from_outside():
    with pytest.raises(autoem.ModelError, match=r"reads 'z' of a scan from outside, which no later step reads"):
        autoem.EM(read_outside, progress=False).plan(Y)

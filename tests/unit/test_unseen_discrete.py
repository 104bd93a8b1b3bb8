"""Models of discrete latents and chains that nobody tuned for, each against an answer worked out by other means."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import gammaln, logsumexp
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem

KEY = jax.random.key(4)
COUNTS = np.random.default_rng(8).poisson(np.repeat([1.0, 6.0, 2.0], 20))


def forward(start, trans, log_density):
    """Log-likelihood of a chain, by the recursion in logarithms."""

    def step(alpha, now):
        return logsumexp(alpha[:, None] + jnp.log(trans), axis=0) + now, None

    return logsumexp(jax.lax.scan(step, jnp.log(start) + log_density[0], log_density[1:])[0])


def chain_of(emission):
    def model(y):
        trans = numpyro.param("trans", jnp.array([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
        given = emission()

        def step(z, y):
            z = numpyro.sample("z", dist.Categorical(trans[z]))
            numpyro.sample("y", given(z), obs=y)
            return z, None

        scan(step, 0, y)

    return model


def poisson():
    rate = numpyro.param("rate", jnp.array([1.0, 6.0]), constraint=constraints.positive)
    return lambda z: dist.Poisson(rate[z])


def category():
    table = numpyro.param("table", jnp.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]), constraint=constraints.simplex)
    return lambda z: dist.Categorical(table[z])


def inflated():
    gate = numpyro.param("gate", jnp.array([0.3, 0.2]), constraint=constraints.unit_interval)
    rate = numpyro.param("rate", jnp.array([1.0, 6.0]), constraint=constraints.positive)
    return lambda z: dist.ZeroInflatedPoisson(gate[z], rate=rate[z])


@pytest.mark.parametrize("emission, data", [(poisson, COUNTS), (category, np.minimum(COUNTS, 2))])
def test_standard_errors_of_a_chain_are_those_of_the_curvature_of_the_forward_recursion(emission, data):
    """The Hessian of a recursion written here, in log-odds and logarithms, by the delta method."""
    em = autoem.EM(chain_of(emission), init="model", tol=1e-13, max_steps=5000, progress=False)
    result = em.run(KEY, data)
    errors, params = result.standard_errors(), result.params

    def log_likelihood(v):
        odds = v[:2] + jnp.log(params["trans"][:, 0] / params["trans"][:, 1])
        trans = jnp.stack([jax.nn.sigmoid(odds), jax.nn.sigmoid(-odds)], 1)
        if emission is poisson:
            log_density = dist.Poisson(params["rate"] * jnp.exp(v[2:])).log_prob(data[:, None])
        else:
            logits = jnp.log(params["table"]).at[:, :2].add(v[2:].reshape(2, 2))
            log_density = jax.nn.log_softmax(logits, -1).T[data]
        return forward(trans[0], trans, log_density)

    size = 4 if emission is poisson else 6
    covariance = jnp.linalg.inv(-jax.hessian(log_likelihood)(jnp.zeros(size)))
    sd = jnp.sqrt(jnp.diagonal(covariance))
    np.testing.assert_allclose(errors["trans"][:, 0], sd[:2] * params["trans"].prod(1), rtol=1e-5)
    if emission is poisson:
        np.testing.assert_allclose(errors["rate"], sd[2:] * params["rate"], rtol=1e-5)


def test_components_are_written_out_inside_a_scan():
    """The likelihood is that of the forward recursion with the component summed inside; updates are closed forms."""
    model = handlers.reparam(chain_of(inflated), config={"y": autoem.Components()})
    em = autoem.EM(model, init="model", tol=1e-13, max_steps=5000, progress=False)
    result = em.run(KEY, COUNTS)
    assert all(em.plan(COUNTS).m_step(n).startswith("closed form") for n in ("trans", "gate", "rate"))
    gate, rate = result.params["gate"], result.params["rate"]
    y = COUNTS[:, None]
    log_density = jnp.log(jnp.where(y == 0, gate, 0) + (1 - gate) * jnp.exp(y * jnp.log(rate) - rate - gammaln(y + 1.0)))
    own = forward(result.params["trans"][0], result.params["trans"], log_density)
    np.testing.assert_allclose(result.log_likelihood, own, rtol=1e-12)
    assert result.posterior(COUNTS).marginals["y_component"].shape == (60, 2)

"""Draws of missing data: exact in the mean, equal to the data where these were seen, a forecast past their end."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import autoem
from tests.chain_models import POSITIVE, SIMPLEX, normal, param, state

KEY = jax.random.key(0)
DRAWS = 4000
RNG = np.random.default_rng(0)
NAN = np.nan


def fitted(model, *args):
    em = autoem.EM(model, init="model", max_steps=2, missing="marginalize", progress=False)
    return em.run(KEY, *args)


def check_mean(draws, expected):
    error = draws.std(0) / np.sqrt(DRAWS)
    np.testing.assert_array_less(np.abs(draws.mean(0) - expected), 5 * error + 1e-9)


def chain(y, reverse=False):
    trans = numpyro.param("trans", jnp.array([[0.9, 0.1], [0.3, 0.7]]), constraint=SIMPLEX)
    loc = numpyro.param("loc", jnp.array([-2.0, 3.0]))

    def step(z, x):
        with numpyro.plate("sequences", y.shape[1]):
            z = state(trans[z])
            normal(loc[z], x)
        return z, None

    scan(step, jnp.zeros(y.shape[1], int), y, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_chain_with_holes_and_a_future(reverse):
    y = RNG.normal(size=(8, 2))
    y[2, 0] = y[-3:] = NAN
    result = fitted(chain, y, reverse)
    posterior = result.posterior()
    draws = np.asarray(posterior.impute(KEY, DRAWS)["y"])
    hidden = np.isnan(y)
    np.testing.assert_array_equal(draws[:, ~hidden], np.broadcast_to(y[~hidden], (DRAWS, (~hidden).sum())))
    check_mean(draws, np.where(hidden, posterior.marginals["z"] @ result.params["loc"], y))
    # of one path: neighbours in time go together as the chain's pairs do
    loc = np.asarray(result.params["loc"])
    together = np.einsum("tnij,i,j->tn", np.asarray(posterior.pairs("z")), loc, loc)
    check_mean(draws[:, -3] * draws[:, -2], together[-2])


def test_data_beyond_those_of_the_fit():
    y = RNG.normal(size=(8, 1))
    result = fitted(chain, y)
    longer = np.concatenate([y, np.full((2, 1), NAN)])
    draws = np.asarray(result.posterior(longer).impute(KEY, DRAWS)["y"])
    state_then = np.asarray(result.posterior(y).filtered("z")[-1])
    for ahead in (8, 9):
        state_then = state_then @ np.asarray(result.params["trans"])
        check_mean(draws[:, ahead], state_then @ np.asarray(result.params["loc"]))


def test_counts_and_vectors_in_plates():
    def model(x, y):
        shares, rate = param("shares", SIMPLEX), param("rate", POSITIVE)
        locs = numpyro.param("locs", jnp.array([[-2.0, 0.0], [2.0, 5.0]]))
        with numpyro.plate("rows", len(x)):
            z = state(shares)
            numpyro.sample("x", dist.Poisson(rate[z]), obs=x)
            numpyro.sample("y", dist.Normal(locs[z], 1.0).to_event(1), obs=y)

    x, y = RNG.poisson(2.0, 6).astype(float), RNG.normal(size=(6, 2))
    x[[0, 3]], y[[0, 1]], y[4, 1] = NAN, NAN, NAN
    result = fitted(model, x, y)
    draws, marginals = result.posterior().impute(KEY, DRAWS), result.posterior().marginals["z"]
    check_mean(np.asarray(draws["x"]), np.where(np.isnan(x), marginals @ result.params["rate"], x))
    check_mean(np.asarray(draws["y"]), np.where(np.isnan(y), marginals @ result.params["locs"], y))


def autoregression(y):
    trans, loc = param("trans", SIMPLEX), numpyro.param("loc", jnp.array([-2.0, 3.0]))

    def step(carry, x):
        old, before = carry
        z = state(trans[old])
        x = numpyro.sample("y", dist.Normal(loc[old] + 0.5 * before, 0.1), obs=x)
        return (z, x), None

    scan(step, (0, 0.0), y)


def test_a_site_whose_value_is_carried_on():
    """What was drawn is what the next step reads; its density reads an earlier state, so the site is in pieces."""
    y = np.append(RNG.normal(size=5), [NAN, NAN])
    result = fitted(autoregression, y)
    posterior, loc = result.posterior(), np.asarray(result.params["loc"])
    mean = [y[4]]
    for t in (5, 6):
        mean.append(posterior.marginals["z"][t - 1] @ loc + 0.5 * mean[-1])
    check_mean(np.asarray(posterior.impute(KEY, DRAWS)["y"])[:, 5:], np.array(mean[1:]))


def test_nothing_is_missing():
    assert fitted(chain, np.zeros((3, 1))).posterior().impute(KEY, 2) == {}


def test_a_hole_that_the_next_step_reads_is_refused():
    with pytest.raises(autoem.DataError, match="reads an observation of another step that is missing"):
        fitted(autoregression, np.array([0.1, NAN, 0.4, 0.2]))


def test_codes_among_floats_in_a_scan():
    """A table with holes has only floats; codes that are whole numbers are read as such."""

    def model(y):
        trans, emit = param("trans", SIMPLEX), param("emit", SIMPLEX)

        def step(z, x):
            z = state(trans[z])
            numpyro.sample("y", dist.Categorical(emit[z]), obs=x)
            return z, None

        scan(step, 0, y)

    y = np.array([0, 2, 1, 2, 0, 1])
    whole, floats = fitted(model, y), fitted(model, y.astype(float))
    np.testing.assert_allclose(floats.log_likelihood, whole.log_likelihood, rtol=1e-12)
    draws = np.asarray(floats.posterior(np.append(y[:5], NAN)).impute(KEY, DRAWS)["y"])
    filtered = floats.posterior(y[:5]).filtered("z")[-1] @ floats.params["trans"]
    np.testing.assert_allclose((draws[:, 5, None] == np.arange(3)).mean(0), filtered @ floats.params["emit"], atol=0.04)

"""Held-out scores and bootstrap tests where the likelihood is approximated, and their refusal where it is not one."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy.special import gammaln

import autoem
from autoem.e_step import Laplace, MonteCarlo, Quadrature
from autoem.selection._rows import deal, held_out, row_plate

KEY = jax.random.key(0)
Y = np.random.default_rng(2).poisson(np.exp(0.6 + 0.8 * np.random.default_rng(1).normal(size=(12, 1))), (12, 3))
ROW, COLUMN = np.repeat(np.arange(4), 3), np.tile(np.arange(3), 4)


def groups(y):
    mu, s = numpyro.param("mu", 0.5), numpyro.param("s", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", len(y)):
        u = numpyro.sample("u", dist.Normal(mu, s))
        numpyro.sample("y", dist.Poisson(jnp.exp(u)[:, None] * jnp.ones(3)).to_event(1), obs=y)


def crossed(y, tilted=False):
    mu = numpyro.param("mu", 0.5)
    slope = numpyro.param("slope", 0.1) if tilted else 0.0
    with numpyro.plate("rows", 4):
        u = numpyro.sample("u", dist.Normal(mu, 0.5))
    with numpyro.plate("columns", 3):
        v = numpyro.sample("v", dist.Normal(0, 0.5))
    with numpyro.plate("cells", 12):
        numpyro.sample("y", dist.Poisson(jnp.exp(u[ROW] + v[COLUMN] + slope * jnp.arange(12.0) / 12)), obs=y)


def log_density(y, params):
    """Of each row, by a sum over a fine grid."""
    u = np.linspace(-6, 7, 4001)
    mu, s = float(params["mu"]), float(params["s"])
    prior = -0.5 * ((u - mu) / s) ** 2 - np.log(s * np.sqrt(2 * np.pi))
    each = (y[:, :, None] * u - np.exp(u) - gammaln(y[:, :, None] + 1)).sum(1)
    return np.log(np.exp(prior + each).sum(1) * (u[1] - u[0]))


def test_folds_under_quadrature_are_scored_by_fits_without_them():
    em = autoem.EM(groups, e_step=Quadrature(21), tol=1e-11, progress=False)
    result = em.run(KEY, Y)
    fold, training = deal(12, 3, KEY)
    scores = held_out(result, KEY, fold, training, None)
    params = em.run(KEY, Y[training[1]]).params
    np.testing.assert_allclose(scores[fold == 1], log_density(Y[fold == 1], params), atol=1e-4)


def test_bootstrap_under_laplace():
    """Twice the rise of the approximation, on the data and on draws."""
    y = Y.ravel()[:12]
    options = {"e_step": Laplace(), "latent": ("v",), "init": "model", "progress": False}
    fits = [autoem.EM(model, **options).run(KEY, y) for model in (crossed, lambda y: crossed(y, True))]
    test = autoem.bootstrap_test(*fits, jax.random.key(1), num=2, restarts=1)
    np.testing.assert_allclose(test.statistic, 2 * (fits[1].log_likelihood - fits[0].log_likelihood), atol=1e-3)
    assert test.null.shape == (2,) and np.all(test.null > -1e-3) and test.p_value == (1 + test.num_exceeding) / 3
    with pytest.raises(autoem.PlanError, match="'u': its latents are integrated all at once"):
        row_plate(fits[0])


def test_what_wavers_with_its_draws_is_refused():
    e_step = {"u": MonteCarlo(num_draws=1, num_chains=1, warmup=1)}
    em = autoem.EM(crossed, e_step=e_step, max_steps=1, progress=False)
    result = em.run(KEY, Y.ravel()[:12])
    with pytest.raises(autoem.PlanError, match="compare likelihoods, and this fit maximised its Monte Carlo estimate"):
        autoem.bootstrap_test(result, result, KEY, num=1)

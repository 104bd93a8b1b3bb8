"""A sum over part of an infinite support: the likelihood of an N-mixture, and what is said of the mass left out."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy.stats import binom, poisson

import autoem
from autoem.e_step import Truncated
from autoem.m_step import Fixed

KEY = jax.random.key(0)
Y = np.random.default_rng(0).binomial(np.random.default_rng(1).poisson(6, (20, 1)), 0.5, (20, 3))


def visits(y):
    """Animals at a site, of which each visit sees some (Royle 2004)."""
    rate = numpyro.param("rate", 5.0, constraint=constraints.positive)
    seen = numpyro.param("seen", 0.4, constraint=constraints.unit_interval)
    with numpyro.plate("sites", len(y)):
        n = numpyro.sample("n", dist.Poisson(rate))
        numpyro.sample("y", dist.Binomial(n[..., None], seen * jnp.ones(3)).to_event(1), obs=y)


def log_likelihood(params, upper):
    n = np.arange(upper + 1)
    each = poisson.pmf(n, float(params["rate"])) * binom.pmf(Y[..., None], n, float(params["seen"])).prod(1)
    return np.log(each.sum(1)).sum()


def test_mixture_of_binomials_is_the_sum_by_hand_and_its_maximum():
    options = {"accelerate": autoem.accelerate.Anderson(), "tol": 1e-12, "progress": False}
    result = autoem.EM(visits, e_step={"n": Truncated(0, 60)}, **options).run(KEY, Y)
    assert result.converged
    np.testing.assert_allclose(result.log_likelihood, log_likelihood(result.params, 60), rtol=1e-9)
    for name, factor in (("rate", 1.02), ("rate", 0.98), ("seen", 1.02), ("seen", 0.98)):
        near = {**result.params, name: result.params[name] * factor}
        assert log_likelihood(near, 60) < result.log_likelihood
    assert not any("mass" in w for w in result.warnings)


def caught(y):
    rate = numpyro.param("rate", 4.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(y)):
        n = numpyro.sample("n", dist.Poisson(rate))
        numpyro.sample("y", dist.Binomial(n, 0.5), obs=y)


@pytest.mark.parametrize("high", [20, 40])
def test_what_the_posterior_of_an_outlier_leaves_out_is_told(high):
    """Of one outlier the prior's tail tells nothing; its posterior is the datum and a Poisson number more."""
    y = jnp.array([2, 1, 3, 2, 0, 4, 2, 15])
    em = autoem.EM(caught, e_step={"n": Truncated(0, high)}, m_step=Fixed(), init="model", progress=False)
    result = em.run(KEY, y)
    beyond = poisson.sf(high - 15, 2.0)
    told = [w for w in result.warnings if f"of the posterior mass of a cell of 'n' lies above {high}" in w]
    assert not any("prior mass" in w for w in result.warnings)
    if beyond < 1e-7:
        assert not told
    else:
        most = float(told[0].split("up to ")[1].split(" ")[0])
        assert beyond <= most <= 2 * beyond

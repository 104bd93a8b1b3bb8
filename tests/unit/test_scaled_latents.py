"""Weights around a latent whose cells are integrated apart: copies of whole cells, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import autoem
from autoem.e_step import Quadrature
from autoem.m_step import Fixed

GROUP = np.repeat(np.arange(3), 2)
Y = np.array([2, 3, 0, 1, 5, 4])


def effects(y, group, of_group, of_row):
    mu = numpyro.param("mu", 0.5)
    with numpyro.plate("groups", len(of_group)), handlers.scale(scale=of_group):
        u = numpyro.sample("u", dist.Normal(mu, 1.0))
    with numpyro.plate("rows", len(y)), handlers.scale(scale=of_row):
        numpyro.sample("y", dist.Poisson(jnp.exp(u[group])), obs=y)


def fit(*args):
    options = {"e_step": Quadrature(11), "m_step": Fixed(), "init": "model", "progress": False}
    return autoem.EM(effects, **options).run(jax.random.key(0), *args).log_likelihood


def test_weight_of_whole_cells_is_that_of_copies():
    weight = np.array([1.0, 2.0, 1.0])
    again = np.concatenate([np.arange(6), [2, 3]])
    copies = fit(Y[again], np.array([0, 0, 1, 1, 2, 2, 3, 3]), np.ones(4), np.ones(8))
    np.testing.assert_allclose(fit(Y, GROUP, weight, weight[GROUP]), copies, rtol=1e-10)


@pytest.mark.parametrize("of_row", [1.0, 1.5])
def test_weight_of_a_cell_above_that_of_its_rows_is_refused(of_row):
    em = autoem.EM(effects, e_step=Quadrature(5), progress=False)
    with pytest.raises(autoem.PlanError, match=r"'u': handlers.scale stands around a continuous latent"):
        em.plan(Y, GROUP, np.array([1.0, 2.0, 1.0]), np.full(6, of_row))

"""Weights and masks around a latent: copies of whole cells or refused, and cells that are left out."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints

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


@pytest.mark.parametrize("vector", [False, True])
def test_a_masked_latent_may_be_an_event(vector):
    seen = np.arange(12) < 9
    y = (np.random.default_rng(0).random((12, 5)) < 0.6).astype(int)

    def model(y):
        spread = numpyro.param("spread", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", len(y)), handlers.mask(mask=seen):
            law = dist.Normal(0.3, spread)
            z = numpyro.sample("z", law.expand([1]).to_event(1) if vector else law)
            z = z[..., 0] if vector else z
            numpyro.sample("y", dist.Bernoulli(logits=z[:, None] * jnp.ones(5)).to_event(1), obs=y)

    em = autoem.EM(model, e_step=autoem.e_step.Laplace(), max_steps=0, progress=False)
    value = em.run(jax.random.key(0), y).log_likelihood

    def log_joint(z, count):  # of one row that is seen, and its second derivative
        p = 1 / (1 + np.exp(-z))
        density = count * np.log(p) + (5 - count) * np.log1p(-p) - (z - 0.3) ** 2 / 2
        return density, -5 * p * (1 - p) - 1

    expected = 0.0
    for count in y[seen].sum(1):
        grid = np.linspace(-4, 4, 400_001)
        density, curvature = log_joint(grid, count)
        best = density.argmax()
        expected += density[best] - 0.5 * np.log(-curvature[best])
    assert value == pytest.approx(expected, abs=1e-6)

"""Levels that rows pick by an index of the data, without a latent or beside one: means by group, worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem

GROUP = np.array([0, 1, 2, 3, 0, 1, 2, 3, 3, 0])
Y = np.array([0.1, -0.4, 1.2, 4.0, 5.5, 3.9, 0.3, 4.4, -1.0, 2.0])
MEANS = np.array([Y[j == GROUP].mean() for j in range(4)])
KEY = jax.random.key(0)


def by_index(y, group):
    level = numpyro.param("level", jnp.zeros(4))
    noise = numpyro.param("noise", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(level[group], noise), obs=y)


def by_take(y, group):
    level = numpyro.param("level", jnp.zeros(4))
    noise = numpyro.param("noise", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(jnp.take(level, group), noise), obs=y)


def columns_by_index(y, group):
    level = numpyro.param("level", jnp.zeros((4, 2)))
    noise = numpyro.param("noise", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(level[group], noise).to_event(1), obs=jnp.stack([y, 2 * y], 1))


def beside_a_class(y, group):
    level = numpyro.param("level", jnp.zeros((2, 4)))
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        numpyro.sample("hint", dist.Normal(10.0 * z, 1.0), obs=jnp.where(jnp.arange(len(y)) < 5, 0.0, 10.0))
        numpyro.sample("y", dist.Normal(level[z, group], 1.0), obs=y)


@pytest.mark.parametrize("model", [by_index, by_take])
def test_levels_are_means_by_group(model):
    result = autoem.EM(model, init="model", progress=False).run(KEY, Y, GROUP)
    np.testing.assert_allclose(result.params["level"], MEANS, rtol=1e-9)
    noise = np.sqrt(np.mean((Y - MEANS[GROUP]) ** 2))
    np.testing.assert_allclose(result.params["noise"], noise, rtol=1e-9)
    expected = float(dist.Normal(MEANS[GROUP], noise).log_prob(Y).sum())
    assert result.log_likelihood == pytest.approx(expected, rel=1e-10)


def test_vectors_by_group():
    result = autoem.EM(columns_by_index, init="model", progress=False).run(KEY, Y, GROUP)
    np.testing.assert_allclose(result.params["level"], np.stack([MEANS, 2 * MEANS], 1), rtol=1e-9)


def test_levels_by_class_and_group():
    """With classes all but known: the first five rows are of class 0, the others of class 1."""
    result = autoem.EM(beside_a_class, init="model", progress=False).run(KEY, Y, GROUP)
    first = np.arange(len(Y)) < 5
    expected = [[Y[rows & (j == GROUP)].mean() for j in range(4)] for rows in (first, ~first)]
    np.testing.assert_allclose(result.params["level"], expected, atol=1e-8)

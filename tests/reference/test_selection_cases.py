"""Published tables of model selection, each with its source, from the models of the reference cases."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem

from . import chain_models
from .cases import columns, matrix

KEY = jax.random.key(0)


def earthquakes(data, k):
    chain_models.stationary_earthquakes(k)(data)


def latent_classes(x, k):
    weights = numpyro.param("weights", jnp.full(k, 1 / k), constraint=constraints.simplex)
    start = lambda key: jax.random.uniform(key, (k, x.shape[1]), minval=0.2, maxval=0.8)  # noqa: E731
    positive = numpyro.param("positive", start, constraint=constraints.unit_interval)
    with numpyro.plate("slides", len(x)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.Bernoulli(positive[z]).to_event(1), obs=x)


def test_states_of_the_earthquake_series():
    """The figures that are quoted of Zucchini and MacDonald 2009 for stationary Poisson chains; three states it is."""
    options = {"init": "model", "restarts": 1}
    selection = autoem.select(earthquakes, {"k": [1, 2, 3]}, KEY, columns("earthquakes.csv"), em=options)
    numbers = [e.numbers for e in selection.entries]
    np.testing.assert_allclose([n["log_likelihood"] for n in numbers], [-391.9189, -342.3183, -329.4603], atol=1e-4)
    np.testing.assert_allclose([n["aic"] for n in numbers], [785.8, 692.6, 676.9], atol=0.051)
    np.testing.assert_allclose([n["bic"] for n in numbers], [788.5, 703.3, 701.0], atol=0.051)
    assert selection.chosen == {"k": 3} and selection.best.num_data == 107


def test_classes_of_the_carcinoma_slides():
    """The figures that are quoted of R's poLCA for these slides: BIC 706.0739 for two classes, 697.1357 for three."""
    x = np.asarray(matrix("carcinoma.csv"), int)
    selection = autoem.select(latent_classes, {"k": [2, 3, 4]}, KEY, x - x.min(), em={"restarts": 12})
    np.testing.assert_allclose([e.numbers["bic"] for e in selection.entries[:2]], [706.0739, 697.1357], atol=1e-3)
    assert selection.chosen == {"k": 3}
    assert selection.remarks == []


@pytest.mark.slow
def test_the_bootstrap_chooses_three_classes_too():
    """Two classes are rejected for three; three are not for four."""
    x = np.asarray(matrix("carcinoma.csv"), int)
    selection = autoem.select(latent_classes, {"k": [2, 3, 4]}, KEY, x - x.min(), em={"restarts": 12})
    two, three, four = selection.results.values()
    assert autoem.bootstrap_test(two, three, KEY, num=99).p_value <= 0.05
    assert autoem.bootstrap_test(three, four, KEY, num=99).p_value > 0.05

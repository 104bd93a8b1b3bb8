"""The oracle itself, against sums written out by hand."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints

from tests.brute_force import Oracle, brute_force

PARAMS = {"weights": np.array([0.2, 0.3, 0.5]), "loc": np.array([-1.0, 0.0, 2.0])}
X = np.array([-0.7, 0.1, 1.9, 0.6])


def mixture(x, kept=True, scale=1.0, label=None, known=None):
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    loc = numpyro.param("loc", jnp.zeros(3), constraint=constraints.real)
    with numpyro.plate("n", len(x)), handlers.mask(mask=kept), handlers.scale(scale=scale):
        z = numpyro.sample("z", dist.Categorical(weights), obs=label, obs_mask=known)
        numpyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def _joint() -> np.ndarray:
    """Density of each row with each component: (rows, components)."""
    return PARAMS["weights"] * np.exp(-0.5 * (X[:, None] - PARAMS["loc"]) ** 2) / np.sqrt(2 * np.pi)


def test_a_mixture_row_by_row() -> None:
    joint = _joint()
    exact = brute_force(mixture, PARAMS, X)
    assert exact.completions == 81
    np.testing.assert_allclose(exact.log_likelihood, np.log(joint.sum(1)).sum(), rtol=1e-12)
    np.testing.assert_allclose(exact.log_prior, np.log(2.0), rtol=1e-12)  # a flat density on the simplex
    np.testing.assert_allclose(exact.marginals["z"], joint / joint.sum(1, keepdims=True), rtol=1e-12)
    np.testing.assert_array_equal(exact.mode["z"], joint.argmax(1))
    np.testing.assert_allclose(exact.mode_log_density, np.log(joint.max(1)).sum(), rtol=1e-12)


def test_a_masked_row_counts_once() -> None:
    joint, kept = _joint(), np.array([True, False, True, True])
    exact = brute_force(mixture, PARAMS, X, kept)
    np.testing.assert_allclose(exact.log_likelihood, np.log(joint.sum(1))[kept].sum(), rtol=1e-12)
    np.testing.assert_allclose(exact.marginals["z"][1], 1 / 3, rtol=1e-12)


def test_a_known_label_is_certain() -> None:
    joint, label, known = _joint(), np.array([2, 0, 1, 0]), np.array([True, False, False, True])
    exact = brute_force(mixture, PARAMS, X, label=label, known=known)
    rows = np.where(known, joint[np.arange(4), label], joint.sum(1))
    np.testing.assert_allclose(exact.log_likelihood, np.log(rows).sum(), rtol=1e-12)
    np.testing.assert_allclose(exact.marginals["z"][known], np.eye(3)[label[known]], rtol=1e-12)


def test_pairs_of_cells() -> None:
    posterior = _joint() / _joint().sum(1, keepdims=True)
    pairs = Oracle(mixture, PARAMS, X).pairwise(PARAMS, "z", "z")
    np.testing.assert_allclose(pairs[0, 1], np.outer(posterior[0], posterior[1]), rtol=1e-12)
    np.testing.assert_allclose(pairs[2, 2], np.diag(posterior[2]), rtol=1e-12, atol=1e-300)


def test_it_refuses_what_it_cannot_add_up() -> None:
    with pytest.raises(ValueError, match="completions are more than the limit of 80"):
        Oracle(mixture, PARAMS, X, limit=80)
    with pytest.raises(ValueError, match="site 'z' is scaled"):
        Oracle(mixture, PARAMS, X, scale=2.0)
    with pytest.raises(ValueError, match="site 'weights' is continuous"):
        Oracle(mixture, {"loc": PARAMS["loc"]}, X)

"""A Laplace location has a corner at every datum: its maximum is a median, which plain Newton steps would miss."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

import autoem


def centre(y):
    loc = numpyro.param("loc", 0.3)
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Laplace(loc, scale), obs=y)


def test_location_is_the_median_and_scale_the_mean_deviation():
    y = np.random.default_rng(0).laplace(4.0, 0.5, 200)
    result = autoem.EM(centre, progress=False).run(jax.random.key(0), y)
    deviation = np.abs(y - np.median(y)).mean()
    best = -len(y) * (np.log(2 * deviation) + 1)
    np.testing.assert_allclose(result.log_likelihood, best, rtol=1e-7)
    assert np.sort(y)[98] <= float(result.params["loc"]) <= np.sort(y)[101]
    np.testing.assert_allclose(jnp.asarray(result.params["scale"]), deviation, rtol=1e-5)

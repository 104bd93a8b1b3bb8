"""What the plan says of a first state whose law is fixed, and that what it says works."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem

Y = np.array([0.3, -0.5, 1.1, 0.8])


def walk(y):
    move, noise = (numpyro.param(n, 1.0, constraint=constraints.positive) for n in ("move", "noise"))
    x = numpyro.sample("x0", dist.Normal(0.0, 2.0))
    for t in range(len(y)):
        x = numpyro.sample(f"x{t + 1}", dist.Normal(x, move))
        numpyro.sample(f"y{t}", dist.Normal(x, noise), obs=y[t])


def test_the_plan_says_how_to_integrate_a_first_state():
    assert 'latent=["x0"] would integrate it' in str(autoem.EM(walk, progress=False).plan(Y)).replace("\n      ", " ")


def test_integrated_it_is_one_gaussian():
    em = autoem.EM(walk, latent=["x0"], init="model", max_steps=5, progress=False)
    result = em.run(jax.random.key(0), Y)
    move, noise = float(result.params["move"]), float(result.params["noise"])
    steps = np.minimum.outer(np.arange(1, 5), np.arange(1, 5))
    dense = dist.MultivariateNormal(np.zeros(4), 4.0 + move**2 * steps + noise**2 * np.eye(4))
    assert result.log_likelihood == pytest.approx(float(dense.log_prob(Y)), rel=1e-9)


def test_a_parameter_that_no_latent_reads_has_no_such_hint():
    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    assert "would integrate it" not in str(autoem.EM(model, progress=False).plan(Y))

"""Arguments that jump as a continuous latent moves: refused where the integral takes them as smooth, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem

WON = np.array([1, 0, 1, 1, 0, 1, 1, 0])
A, B = np.array([0, 1, 2, 0, 1, 2, 0, 1]), np.array([1, 2, 3, 3, 3, 0, 2, 0])


def race(won):
    """Two times of each row, of which the smaller one mostly wins."""
    gap, sure = numpyro.param("gap", 0.5), numpyro.param("sure", 0.9, constraint=constraints.unit_interval)
    with numpyro.plate("rows", len(won)):
        ta = numpyro.sample("ta", dist.Normal(0.0, 1.0))
        tb = numpyro.sample("tb", dist.Normal(gap, 1.0))
        numpyro.sample("won", dist.Bernoulli(jnp.where(ta < tb, sure, 1 - sure)), obs=won)


def players(won):
    """Skills that matches share: one integral over all of them."""
    spread = numpyro.param("spread", 1.0, constraint=constraints.positive)
    with numpyro.plate("players", 4):
        skill = numpyro.sample("skill", dist.Normal(0.0, spread))
    with numpyro.plate("rows", len(won)):
        numpyro.sample("won", dist.Bernoulli(0.5 + 0.4 * jnp.sign(skill[A] - skill[B])), obs=won)


@pytest.mark.parametrize(("model", "read"), [(race, "ta and tb"), (players, "skill")])
def test_a_jump_is_refused_with_its_cause(model, read):
    with pytest.raises(autoem.PlanError, match=f"(?s)'won'.*jumps as {read} move.*norm.cdf"):
        autoem.EM(model, progress=False).plan(WON)


def test_draws_weigh_a_jump_as_it_is():
    """The mend that is named stands: importance sampling knows only values of the density."""
    plan = autoem.EM(race, e_step=autoem.e_step.Importance(), progress=False).plan(WON)
    assert "importance" in str(plan)


def bent(won):
    """Comparisons without a jump: a leaky slope, a clipped one, and one of a parameter."""
    slope = numpyro.param("slope", 0.7)
    with numpyro.plate("rows", len(won)):
        u = numpyro.sample("u", dist.Normal(0.0, 1.0))
        v = numpyro.sample("v", dist.Normal(0.0, 1.0))
        steep = jax.nn.sigmoid(200 * (u - 0.1))
        x = jnp.where(u > 0, u, 0.1 * u) * slope + jnp.clip(v, -1, 1) + jnp.where(slope > 0.5, 1.0, 0.0) * v + steep
        numpyro.sample("won", dist.Bernoulli(logits=x), obs=won)


def test_a_bend_is_no_jump():
    assert "quadrature" in str(autoem.EM(bent, progress=False).plan(WON))

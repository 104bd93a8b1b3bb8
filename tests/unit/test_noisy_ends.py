"""How a fit by draws ends: when it is broken off, and when it has settled."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem
from autoem._em import Progress
from autoem.e_step import MonteCarlo

KEY = jax.random.key(0)
Y = np.array([0.3, -0.4, 1.1, 2.0, 0.2, -1.0])
FEW = {"e_step": MonteCarlo(num_draws=1, num_chains=1, warmup=5), "init": "model", "progress": False}


def effects(y):
    between = numpyro.param("between", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", 3):
        u = numpyro.sample("u", dist.Normal(0, between))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(u[jnp.arange(6) // 2], 0.7), obs=y)


@pytest.fixture
def broken_off(monkeypatch):
    """An interrupt at the first look at a fit that runs."""
    looks = []

    def report(self, state):
        looks.append(int(state.step))
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "report", report)
    return looks


def test_an_interrupt_keeps_the_last_completed_step(broken_off):
    result = autoem.EM(effects, tol=0.0, **FEW).run(KEY, Y)  # with no tolerance nothing settles
    assert result.status.startswith("interrupted") and not result.converged
    assert len(broken_off) == 1 and result.num_steps == broken_off[0] == len(result.history) - 1
    assert np.isfinite(result.log_likelihood) and result.standard_error > 0
    assert float(result.params["between"]) != 1.0


def test_an_interrupt_while_going_on_keeps_what_had_settled(broken_off):
    result = autoem.EM(effects, **FEW).run(KEY, Y)
    assert result.status.startswith("settled") and result.converged and len(broken_off) == 1
    assert result.num_steps == len(result.history) - 1 < broken_off[0]
    assert np.all(np.isfinite(result.history))

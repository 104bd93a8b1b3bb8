"""BIC counts independent data; with random effects that is groups, and lme4's figure is had from the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem

# Davies and Goldsmith 1972, table 6.1: yield of dyestuff, six batches of five samples
YIELD = np.array([
    1545, 1440, 1440, 1520, 1580, 1540, 1555, 1490, 1560, 1495, 1595, 1550, 1605, 1510, 1560,
    1445, 1440, 1595, 1465, 1545, 1595, 1630, 1515, 1635, 1625, 1520, 1455, 1450, 1480, 1445.0,
])  # fmt: skip
BATCH = np.repeat(np.arange(6), 5)


def dyestuff(y, batch):
    mean = numpyro.param("mean", 1500.0)
    spread, noise = (numpyro.param(n, 40.0, constraint=constraints.positive) for n in ("spread", "noise"))
    with numpyro.plate("batches", 6):
        u = numpyro.sample("u", dist.Normal(mean, spread))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(u[batch], noise), obs=y)


def test_bic_by_groups_and_by_rows():
    """lme4, `lmer(Yield ~ 1 + (1 | Batch), Dyestuff, REML = FALSE)`: log-likelihood -163.6635, BIC 337.5307."""
    em = autoem.EM(dyestuff, init="model", max_steps=3000, tol=1e-13, progress=False)
    result = em.run(jax.random.key(0), jnp.asarray(YIELD), jnp.asarray(BATCH))
    assert result.log_likelihood == pytest.approx(-163.6635, abs=1e-3)
    assert (result.num_params, result.num_data, result.num_values) == (3, 6, 30)
    assert result.bic == pytest.approx(3 * np.log(6) + 2 * 163.6635, abs=2e-3)
    by_rows = result.num_params * np.log(result.num_values) - 2 * result.log_likelihood
    assert by_rows == pytest.approx(337.5307, abs=2e-3)

"""Rows spread over several devices give what one device gives; a process of its own, since JAX counts devices once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem

ROOT = Path(__file__).resolve().parents[2]


def mixture(x, seen):
    weights = numpyro.param("weights", jnp.ones(3) / 3, constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.array([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]))
    scale = numpyro.param("scale", jnp.ones((3, 2)), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.Normal(loc[z], scale[z]).mask(seen).to_event(1), obs=x)


def sequences(x):
    trans = numpyro.param("trans", jnp.array([[0.8, 0.2], [0.2, 0.8]]), constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.array([0.0, 2.0]))

    def step(z, y):
        with numpyro.plate("sequences", x.shape[1]):
            z = numpyro.sample("z", dist.Categorical(trans[z]))
            numpyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)
        return z, None

    scan(step, jnp.zeros(x.shape[1], int), x)


def fits() -> dict[str, dict]:
    """Each fit's log-likelihood and parameters, and over how many devices its rows were spread."""
    rng, out = np.random.default_rng(0), {}
    for n in (40_000, 40_002):
        x = rng.normal(size=(n, 2)) + np.repeat([[0, 0], [3, 1]], n // 2, 0)
        out[f"mixture of {n}"] = fit(mixture, x, rng.random((n, 2)) < 0.9)
    out["sequences"] = fit(sequences, rng.normal(size=(20, 4_000)) + 2.0 * (rng.random((20, 4_000)) < 0.5))
    return out


def fit(model, *data) -> dict:
    em = autoem.EM(model, progress=False, max_steps=10, tol=0.0)
    result = em.run(jax.random.key(0), *data)
    (built,) = em._builds.values()
    chunks = built.plan.chunks
    params = {n: np.asarray(v).tolist() for n, v in result.params.items()}
    return {"value": result.log_likelihood, "params": params, "devices": chunks.devices if chunks else 1}


@pytest.fixture(scope="module")
def spread() -> dict[str, dict]:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-m", "tests.unit.test_devices"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_several_devices_give_what_one_gives(spread):
    for name, alone in fits().items():
        assert (spread[name]["devices"], alone["devices"]) == (4, 1)
        assert spread[name]["value"] == pytest.approx(alone["value"], rel=1e-11)
        for site, value in alone["params"].items():
            np.testing.assert_allclose(spread[name]["params"][site], value, rtol=1e-7, atol=1e-9)


if __name__ == "__main__":
    print(json.dumps(fits()))

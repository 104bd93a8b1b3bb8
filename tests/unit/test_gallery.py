"""Models written by nobody's plan, from `tests/gallery_models.py` and `tests/odd_models.py`, fitted unchanged.

Each is fitted as it stands, and agrees with adding up every completion on a small copy of its data.
"""

from typing import Any

import jax
import numpy as np
import pytest

import autoem
from tests import gallery_models, odd_models
from tests.brute_force import Oracle
from tests.gallery_models import Case
from tests.simulate import starting_values

CASES = gallery_models.CASES | odd_models.CASES
TOLERANCE = {"rtol": 1e-8, "atol": 1e-8}


def _data(case: Case, rows: int) -> tuple[tuple, dict[str, Any]]:
    return case.data(np.random.default_rng(20), rows)


@pytest.mark.parametrize("name", CASES)
def test_fits_as_it_stands(name: str) -> None:
    case = CASES[name]
    args, kwargs = _data(case, case.rows)
    em = autoem.EM(case.model, maximize=case.maximize, max_steps=400, tol=1e-7, progress=False)
    result = em.run(jax.random.key(1), *args, **kwargs)
    history = np.asarray(result.history)
    assert np.isfinite(history).all()
    assert (np.diff(history) >= -1e-9 * np.abs(history[:-1])).all(), history
    assert result.converged or result.num_steps == 400, result.status
    assert result.objective >= history[0]


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_adding_up_every_completion(name: str) -> None:
    case = CASES[name]
    args, kwargs = _data(case, case.few)
    params = starting_values(case.model, *args, **kwargs)
    oracle = Oracle(case.model, params, *args, **kwargs)
    exact = oracle.exact(params)
    em = autoem.EM(case.model, maximize=case.maximize, init=params, max_steps=0, progress=False)
    result = em.run(jax.random.key(0), *args, **kwargs)
    np.testing.assert_allclose(result.log_likelihood, exact.log_likelihood, **TOLERANCE)
    np.testing.assert_allclose(result.objective, exact.log_likelihood + exact.log_prior, **TOLERANCE)
    posterior = result.posterior(*args, **kwargs)
    for latent in {site.name.removesuffix("_unobserved") for site in oracle.latents}:
        found = np.asarray(posterior.marginals[latent])
        np.testing.assert_allclose(found, exact.marginals[latent].reshape(found.shape), **TOLERANCE, err_msg=latent)
    mode = posterior.mode()
    values = {site.name: np.reshape(mode[site.name.removesuffix("_unobserved")], site.shape) for site in oracle.latents}
    np.testing.assert_allclose(oracle.log_joint(params, values), exact.mode_log_density, **TOLERANCE)

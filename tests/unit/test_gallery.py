"""Models written by nobody's plan, from `tests/gallery_models.py` and `tests/odd_models.py`, fitted unchanged.

Each is fitted as it stands; the fitted model then agrees with adding up every completion on a small copy of its data.
"""

from typing import Any

import jax
import numpy as np
import pytest

import autoem
from tests import gallery_models, odd_models
from tests.brute_force import Oracle
from tests.gallery_models import Case

CASES = gallery_models.CASES | odd_models.CASES
TOLERANCE = {"rtol": 1e-8, "atol": 1e-8}
MOST_STEPS = 400


@pytest.mark.parametrize("name", CASES)
def test_fits_as_it_stands(name: str) -> None:
    case = CASES[name]
    args, kwargs = _data(case, case.rows)
    em = autoem.EM(case.model, maximize=case.maximize, max_steps=MOST_STEPS, tol=1e-7, progress=False)
    result = em.run(jax.random.key(1), *args, **kwargs)
    history = np.asarray(result.history)
    assert np.isfinite(history).all()
    assert (np.diff(history) >= -1e-9 * np.abs(history[:-1])).all(), history
    assert result.converged or result.num_steps == MOST_STEPS, result.status
    assert history[-1] == pytest.approx(result.objective, rel=1e-9)
    _check_on_few_rows(case, result)


def _data(case: Case, rows: int) -> tuple[tuple, dict[str, Any]]:
    return case.data(np.random.default_rng(20), rows)


def _check_on_few_rows(case: Case, result: autoem.EMResult) -> None:
    """Likelihood, marginals and mode of new, fewer rows under the fitted parameters."""
    args, kwargs = _data(case, case.few)
    oracle = Oracle(case.model, result.params, *args, **kwargs)
    exact = oracle.exact(result.params)
    posterior = result.posterior(*args, **kwargs)
    np.testing.assert_allclose(posterior.total, exact.log_likelihood, **TOLERANCE)
    np.testing.assert_allclose(np.sum(posterior.log_likelihood), exact.log_likelihood, **TOLERANCE)
    if not oracle.latents:
        return
    mode = posterior.mode()
    names = [site.name.removesuffix("_unobserved") for site in oracle.latents]
    for name in names:
        found = np.asarray(posterior.marginals[name])
        np.testing.assert_allclose(found, exact.marginals[name].reshape(found.shape), **TOLERANCE, err_msg=name)
    values = {site.name: np.reshape(mode[name], site.shape) for site, name in zip(oracle.latents, names, strict=True)}
    np.testing.assert_allclose(oracle.log_joint(result.params, values), exact.mode_log_density, **TOLERANCE)

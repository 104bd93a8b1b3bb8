"""Hidden Markov models on real sequences: published and independently computed answers, each from the plain text.

Sources and checks stand in `tests/data/reference/<name>.json`, as those of the other cases do.
"""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import autoem

from . import chain_models as models
from . import checks
from .cases import CLOSED, Case, columns, matrix

KEY = jax.random.key(0)
SLOPED = ("Newton", "gradient")  # a start that follows from the transitions leaves them no closed form


def _case(name: str, model: Any, file: str, closed: tuple[str, ...], start: Any = "model", **m_step: Any) -> Case:
    return Case(name, model, lambda: columns(file), dict.fromkeys(closed, CLOSED) | m_step, start, {"max_steps": 5000})


CASES = (
    _case("ice_cream", models.ice_cream, "ice_cream.csv", ("start", "trans", "emit"), None),
    _case("earthquakes_2", models.earthquakes(2), "earthquakes.csv", ("start", "trans", "rate")),
    _case("earthquakes_2_stationary", models.stationary_earthquakes(2), "earthquakes.csv", ("rate",), trans=SLOPED),
    _case("earthquakes_3_stationary", models.stationary_earthquakes(3), "earthquakes.csv", ("rate",), trans=SLOPED),
    _case("nile", models.nile, "nile.csv", ("start", "trans", "mu", "sd")),
    Case(
        "knowledge_tracing",
        models.knowledge_tracing,
        lambda: {"correct": matrix("knowledge_tracing.csv")},
        dict.fromkeys(("init", "learn", "guess", "slip"), CLOSED),
    ),
)
BY_NAME = {case.name: case for case in CASES}
EVERY_CASE = pytest.mark.parametrize("name", BY_NAME)


@functools.cache
def fit(name: str, **options: Any) -> autoem.EMResult:
    return checks.fit(BY_NAME[name], **options)[0]


@EVERY_CASE
@pytest.mark.parametrize("law", checks.EVERY)
def test_case(name, law):
    law(BY_NAME[name], fit(name))


@pytest.mark.parametrize("method", checks.ACCELERATED)
@EVERY_CASE
def test_acceleration(name, method):
    accelerated = fit(name, accelerate=checks.ACCELERATED[method])
    checks.accelerated_is_no_worse(BY_NAME[name], fit(name), accelerated)


@pytest.mark.parametrize("steps", ["1", "10"])
def test_the_path_of_the_spreadsheet(steps):
    """Baum-Welch from the published start lands where it should after one step and after ten."""
    case = BY_NAME["ice_cream"]
    data, expected = case.data(), case.reference["after"][steps]
    em = autoem.EM(case.model, init=case.init(data), max_steps=int(steps), tol=0.0, progress=False)
    result = em.run(KEY, data)
    np.testing.assert_allclose(result.history[int(steps) - 1], expected["log_likelihood_before"], rtol=0, atol=1e-8)
    for name, value in expected["params"].items():
        np.testing.assert_allclose(result.params[name], value, rtol=0, atol=1e-9)  # ten digits are kept


def test_the_level_of_the_nile_falls_once():
    """The most probable path has one change, between 1898 and 1899, when the dam at Aswan was begun."""
    z = np.asarray(fit("nile").posterior().mode()["z"])
    assert (np.diff(z) != 0).sum() == 1
    assert 1871 + 1 + int(np.flatnonzero(np.diff(z))[0]) == 1898

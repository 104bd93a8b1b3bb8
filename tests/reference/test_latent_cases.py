"""Continuous latents on real data: published and independently computed answers, each from the plain text.

Sources and checks stand in `tests/data/reference/<name>.json`, as those of the other cases do. Loadings are known up to
a rotation only, so what they imply is compared.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import autoem

from . import checks
from . import latent_models as models
from .cases import CLOSED, Case, columns, matrix

STEPS = {"max_steps": 5000}


def uniqueness(params: dict[str, Any]) -> dict[str, Any]:
    covariance = params["W"] @ params["W"].T + jnp.diag(params["psi"])
    return {
        "mu": params["mu"],
        "psi": params["psi"],
        "uniqueness": params["psi"] / jnp.diagonal(covariance),
        "covariance": covariance,
    }


def signal(params: dict[str, Any]) -> dict[str, Any]:
    return {"mu": params["mu"], "sigma": params["sigma"], "signal": params["W"] @ params["W"].T}


CASES = (
    Case(
        "sleepstudy",
        models.sleepstudy,
        lambda: columns("sleepstudy.csv"),
        dict.fromkeys(("beta", "G", "sigma"), CLOSED),
        "model",
        STEPS,
    ),
    Case(
        "dyestuff",
        models.dyestuff,
        lambda: columns("dyestuff.csv"),
        dict.fromkeys(("mu", "sd_group", "sigma"), CLOSED),
        "model",
        STEPS,
    ),
    Case(
        "ability",
        models.ability,
        lambda: {"x": matrix("ability.csv")},
        dict.fromkeys(("mu", "W", "psi"), CLOSED),
        "model",
        STEPS,
        uniqueness,
    ),
    Case(
        "iris_ppca",
        models.iris_ppca,
        lambda: {"x": matrix("iris.csv")},
        dict.fromkeys(("mu", "W", "sigma"), CLOSED),
        "model",
        STEPS,
        signal,
    ),
    Case(
        "nile_level",
        models.nile_level,
        lambda: columns("nile.csv"),
        dict.fromkeys(("sd_level", "sd_obs"), CLOSED),
        "model",
        STEPS,
    ),
)
BY_NAME = {case.name: case for case in CASES}


@functools.cache
def fit(name: str) -> autoem.EMResult:
    return checks.fit(BY_NAME[name])[0]


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("law", checks.EVERY)
def test_case(name, law):
    law(BY_NAME[name], fit(name))


@pytest.mark.parametrize(
    ("name", "most"), [("sleepstudy", 30), ("dyestuff", 10), ("iris_ppca", 50), ("nile_level", 40)]
)
def test_acceleration(name, most):
    """Plain EM takes from ten to some hundred maps to a relative change of 1e-8."""
    accelerated, _ = checks.fit(BY_NAME[name], tol=1e-8, accelerate=autoem.accelerate.Anderson())
    assert accelerated.num_steps < most
    assert accelerated.objective >= fit(name).objective - 1e-6 * abs(fit(name).objective)


def test_principal_components_are_those_of_the_covariance():
    """Tipping and Bishop 1999: the noise is the mean of the eigenvalues left out."""
    x, params = np.asarray(matrix("iris.csv")), fit("iris_ppca").params
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    noise = values[:2].mean()
    np.testing.assert_allclose(params["sigma"] ** 2, noise, rtol=1e-4)
    expected = vectors[:, 2:] @ np.diag(values[2:] - noise) @ vectors[:, 2:].T
    np.testing.assert_allclose(params["W"] @ params["W"].T, expected, atol=1e-3)


def test_subjects_are_shrunken_towards_the_common_line():
    """The posterior means by the formula of Laird and Ware 1982, subject by subject."""
    data, result = columns("sleepstudy.csv"), fit("sleepstudy")
    beta, scatter, sigma = (np.asarray(result.params[n]) for n in ("beta", "G", "sigma"))
    x = np.stack([np.ones(10), np.arange(10)], 1)
    gain = scatter @ x.T @ np.linalg.inv(x @ scatter @ x.T + sigma**2 * np.eye(10))
    y = np.asarray(data["reaction"]).reshape(18, 10)
    np.testing.assert_allclose(result.posterior().mean["b"], (y - x @ beta) @ gain.T, rtol=1e-8, atol=1e-8)

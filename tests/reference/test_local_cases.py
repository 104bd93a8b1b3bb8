"""Models with continuous latents that are integrated cell by cell, on real data, each from its plain NumPyro text.

Sources and checks stand in `tests/data/reference/<name>.json`, as those of the other cases do.
"""

import functools
from typing import Any

import numpy as np
import pytest
from jax.scipy.special import digamma

import autoem

from . import checks
from . import local_models as models
from .cases import CLOSED, Case, columns

SLOPED = ("Newton", "gradient")


def _case(name: str, model: Any, file: str, closed: tuple[str, ...] = (), sloped: tuple[str, ...] = ()) -> Case:
    words = dict.fromkeys(closed, CLOSED) | dict.fromkeys(sloped, SLOPED)
    return Case(name, model, lambda: columns(file), words, "model", {"max_steps": 5000})


CASES = (
    _case("stackloss", models.robust_regression, "stackloss.csv", ("beta", "sigma")),
    _case("articles", models.negative_binomial, "biochemists.csv", ("mean",), ("shape",)),
    _case("lirat", models.beta_binomial, "lirat.csv", (), ("a", "b")),
    _case("leukaemia", models.censored_waiting, "leukaemia.csv", ("rate",)),
    _case("motorettes", models.censored_regression, "motorettes.csv", ("beta", "sigma")),
    _case("lsat6_rasch", models.item_response(common=True), "lsat6.csv", (), ("easiness", "slope")),
    _case("lsat6_2pl", models.item_response(common=False), "lsat6.csv", (), ("easiness", "slope")),
)
BY_NAME = {case.name: case for case in CASES}
METHODS = {"lsat6_rasch": "quadrature", "lsat6_2pl": "quadrature"}


@functools.cache
def fit(name: str) -> autoem.EMResult:
    return checks.fit(BY_NAME[name])[0]


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("law", checks.EVERY)
def test_case(name, law):
    law(BY_NAME[name], fit(name))


@pytest.mark.parametrize("name", BY_NAME)
def test_the_plan_says_how_and_cites(name):
    plan = fit(name).plan
    assert {row.strategy for row in plan.latents} == {METHODS.get(name, "exact")}
    assert plan.integrals[0].source in plan.citations()


def test_the_weights_of_the_stack_loss_are_those_of_the_t_distribution():
    """The posterior mean of a row's precision is (4 + 1) / (4 + squared residual)."""
    result, d = fit("stackloss"), columns("stackloss.csv")
    x = np.stack([np.ones(21), d["air_flow"], d["water_temp"], d["acid_conc"]], -1)
    residual = (np.asarray(d["y"]) - x @ result.params["beta"]) / result.params["sigma"]
    np.testing.assert_allclose(result.posterior().mean["u"], 5 / (4 + residual**2), rtol=1e-10)


def test_the_articles_solve_the_equations_of_the_negative_binomial():
    result, y = fit("articles"), np.asarray(columns("biochemists.csv")["y"])
    shape, mean = (float(result.params[n]) for n in ("shape", "mean"))
    np.testing.assert_allclose(mean, y.mean(), rtol=1e-6)
    slope = (digamma(y + shape) - digamma(shape) + np.log(shape / (shape + mean))).sum()
    np.testing.assert_allclose(slope, 0, atol=2e-3)

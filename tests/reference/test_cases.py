"""Published and independently computed answers on real data, each reached from the model's plain NumPyro text.

Every case names its source and what its answer was checked by (other programs, hand-written EM, direct maximisation) in
`tests/data/reference/<name>.json`; tolerances are the digits that those sources give.
"""

import functools

import jax
import numpy as np
import pytest
from numpyro.primitives import Messenger

import autoem

from . import checks
from .cases import BY_NAME, Case, columns

KEY = jax.random.key(0)
EVERY_CASE = pytest.mark.parametrize("name", BY_NAME)


@functools.cache
def fit(name: str, **options) -> tuple[autoem.EMResult, dict]:
    """The case fitted from its start; the plan that was carried out comes with the result."""
    return checks.fit(BY_NAME[name], **options)


@EVERY_CASE
@pytest.mark.parametrize("law", checks.EVERY)
def test_case(name, law):
    law(BY_NAME[name], fit(name)[0])


@pytest.mark.parametrize("method", checks.ACCELERATED)
@EVERY_CASE
def test_acceleration(name, method):
    accelerated, _ = fit(name, accelerate=checks.ACCELERATED[method])
    checks.accelerated_is_no_worse(BY_NAME[name], fit(name)[0], accelerated)


@pytest.mark.parametrize(("name", "most"), [("times_deaths", 60), ("pet_phantom", 300)])
def test_maps_that_acceleration_saves(name, most):
    """The mixture of Hasselblad 1969, and tomography: plain EM takes thousands of maps, SQUAREM hundreds at most."""
    plain, squarem, anderson = (
        fit(name, **options)[0].num_steps for options in ({}, *({"accelerate": a} for a in checks.ACCELERATED.values()))
    )
    assert anderson < most and squarem < plain / 5


class StartAt(Messenger):
    """Gives parameters of the model inside it other start values."""

    def __init__(self, values: dict):
        super().__init__()
        self.values = values

    def process_message(self, msg):
        if msg["type"] == "param" and msg["name"] in self.values:
            msg["args"] = (self.values[msg["name"]],)


def one_step(case: Case, data: dict):
    """One iteration of EM as a function of the parameters: compiled once, for the start is an argument of the model."""

    def model(d, start):
        with StartAt(start):
            case.model(d)

    em = autoem.EM(model, init="model", max_steps=1, progress=False)
    return lambda params: em.run(KEY, data, params).params


@pytest.mark.parametrize("name", ["two_coins", "linkage", "abo", "das_haus"])
def test_every_iterate_of_the_path(name):
    """From the stated start each step lands where the textbook's does: both steps are tested, not the end alone."""
    case = BY_NAME[name]
    data = case.data()
    step, params = one_step(case, data), case.init(data)
    ((parameter, iterates),) = case.reference["path"].items()
    for expected in iterates[1:]:
        params = step(params)
        np.testing.assert_allclose(params[parameter], expected, rtol=0, atol=1e-9)  # ten digits are kept


def test_log_likelihood_along_the_path_of_word_alignment():
    """Koehn 2010, section 4.2: the values before each of the first three steps."""
    result, _ = fit("das_haus", max_steps=3, tol=0.0)
    expected = BY_NAME["das_haus"].reference["path_log_likelihood"]
    np.testing.assert_allclose(result.history[:3], expected, rtol=0, atol=1e-8)


def test_log_likelihood_along_the_path_of_tomography():
    """After 1, 10 and 100 steps from the uniform image, as computed in NumPy; and every photon is accounted for."""
    result, data = fit("pet_phantom")
    reference = BY_NAME["pet_phantom"].reference
    for step, expected in reference["path_log_likelihood"].items():
        np.testing.assert_allclose(result.history[int(step)], expected, rtol=0, atol=1e-6)
    fitted = (data["system"] @ result.params["activity"]).sum()
    np.testing.assert_allclose(fitted, reference["fitted_total"], rtol=1e-6)
    assert int((result.params["activity"] < 1e-6).sum()) == 23
    assert any("on its boundary" in warning for warning in result.warnings)
    assert "superposition" in str(result.plan)


def test_posterior_finds_the_parties_of_unlabelled_members():
    result, data = fit("house_votes")
    unlabelled = data["label"] < 0
    guess = result.posterior(data).marginals["z"].argmax(-1)
    accuracy = (guess == data["party"])[unlabelled].mean()
    np.testing.assert_allclose(accuracy, BY_NAME["house_votes"].reference["accuracy_on_unlabelled"], atol=1e-9)


def test_posterior_finds_the_duplicate_records():
    result, data = fit("record_linkage")
    same, truth = result.posterior(data).marginals["same"][:, 1] > 0.5, data["true_match"] == 1
    found = {"true_pos": same & truth, "false_pos": same & ~truth, "false_neg": ~same & truth}
    assert {k: int(v.sum()) for k, v in found.items()} == BY_NAME["record_linkage"].reference["confusion_at_half"]


def test_posterior_separates_the_leukaemias():
    result, data = fit("golub")
    cluster = np.asarray(result.posterior(data).marginals["z"].argmax(-1))
    known = np.asarray(columns("golub.csv")["all0_aml1"])  # kept from the model
    table = [[int(((known == row) & (cluster == column)).sum()) for column in range(3)] for row in range(2)]
    assert table == BY_NAME["golub"].reference["clusters_by_class"]

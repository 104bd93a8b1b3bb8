"""Law: whatever the model, autoem's answers are those of adding up every completion, and its steps never go down.

The models come from a generator (`tests/random_models.py`), the truth from `tests/brute_force.py`, which shares no code
with autoem. Two dozen small models run with the tests, a thousand larger ones under `-m slow`.
"""

import jax
import numpy as np
import pytest

import autoem
from tests.brute_force import Exact, Latent, Oracle
from tests.random_models import Instance, RandomModel, random_model

TOLERANCE = {"rtol": 1e-8, "atol": 1e-8}
MOST_REFUSED = 0.05  # the share of models that may be refused, each for the reason that its generator states
MOST_RUN_AWAY = 0.1  # the share whose step, on a handful of rows, leads to where the likelihood has no bound
tally = {"run": 0, "refused": 0, "ran away": 0}


@pytest.mark.parametrize("seed", range(16))
def test_agrees_with_adding_up_every_completion(seed: int) -> None:
    model = random_model(seed, most_latents=2, most_observed=2)
    _check(model)
    if seed % 8 == 0:
        _check_rise(model)


@pytest.mark.parametrize("seed", [389])
def test_what_once_disagreed(seed: int) -> None:
    """389: weighted rows that read a latent of their own beside one of their group, declared before it."""
    before = dict(tally)
    model = random_model(seed)
    _check(model)
    _check_rise(model)
    tally.update(before)  # chosen, not drawn: it says nothing of how many are left out


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16, 1024))
def test_a_thousand_more(seed: int) -> None:
    model = random_model(seed)
    _check(model)
    if model.refusal is None:
        _check_rise(model)


def test_few_are_left_out() -> None:
    """Runs after the models above, and counts those of this process."""
    print(tally)
    assert tally["refused"] <= MOST_REFUSED * max(tally["run"], 16)
    assert tally["ran away"] <= MOST_RUN_AWAY * max(tally["run"], 16)


def _check(model: RandomModel) -> None:
    """One step on a few rows against adding up: where it starts, where it leads, and what is said of the latents."""
    print(model.description)  # shown when the test fails
    tally["run"] += 1
    oracle = Oracle(model.small.repeated[0], model.params, *model.small.repeated[1])
    try:
        result = _run(model.small, model.params, max_steps=1)
    except (autoem.ModelError, autoem.PlanError) as refusal:
        if model.refusal is None:
            raise
        print(refusal)
        tally["refused"] += 1
        return
    before = oracle.exact(model.params)
    np.testing.assert_allclose(result.history[0], before.log_likelihood + before.log_prior, **TOLERANCE)
    if _ran_away(result):
        tally["ran away"] += 1
        return
    after = oracle.exact(result.params)
    np.testing.assert_allclose(result.log_likelihood, after.log_likelihood, **TOLERANCE)
    np.testing.assert_allclose(result.objective, after.log_likelihood + after.log_prior, **TOLERANCE)
    _check_posterior(result, model, oracle, after)
    _check_step(result.params, model.params, oracle)


def _ran_away(result: autoem.EMResult) -> bool:
    """Whether a scale went to nothing or a shape to infinity: there all digits of the density are lost."""
    params = result.plan.program.params
    positive = [v for n, v in result.params.items() if str(params[n].constraint).startswith("Positive(")]
    vanished = any((v < 1e-8).any() for v in positive)
    return "collapsed" in result.status or vanished or any(np.abs(v).max() > 1e5 for v in result.params.values())


def _run(instance: Instance, params: dict, max_steps: int) -> autoem.EMResult:
    em = autoem.EM(instance.model, init=params, max_steps=max_steps, progress=False)
    return em.run(jax.random.key(0), *instance.args)


def _check_posterior(result: autoem.EMResult, model: RandomModel, oracle: Oracle, exact: Exact) -> None:
    posterior = result.posterior(*model.small.args)
    for name in model.latents:
        truth = _one_of_each(exact.marginals[name], posterior.marginals[name], model.small.row_of)
        np.testing.assert_allclose(posterior.marginals[name], truth, **TOLERANCE, err_msg=name)
    mode = {site.name: _repeat(posterior.mode(), site, model.small.row_of) for site in oracle.latents}
    np.testing.assert_allclose(oracle.log_joint(result.params, mode), exact.mode_log_density, **TOLERANCE)


def _one_of_each(truth: np.ndarray, like: np.ndarray, row_of: np.ndarray | None) -> np.ndarray:
    """The oracle's answer on repeated rows, one of each row, in the shape of autoem's answer."""
    if row_of is not None and truth.ndim > 1 and len(truth) == len(row_of):
        truth = truth[np.unique(row_of, return_index=True)[1]]
    assert np.squeeze(truth).shape == np.squeeze(like).shape
    return truth.reshape(np.shape(like))


def _repeat(mode: dict, site: Latent, row_of: np.ndarray | None) -> np.ndarray:
    value = np.asarray(mode[site.name.removesuffix("_unobserved")])
    if row_of is not None and site.shape == row_of.shape:
        value = value[row_of]
    return value.reshape(site.shape)


def _check_step(after: dict, before: dict, oracle: Oracle) -> None:
    """The M-step raises the expected log density, priors included: a rise of the likelihood could hide a poor one."""
    start = oracle.expected_log_density(before, before) + oracle.exact(before).log_prior
    end = oracle.expected_log_density(after, before) + oracle.exact(after).log_prior
    assert end - start >= -1e-8 * max(1.0, abs(float(start)))


def _check_rise(model: RandomModel) -> None:
    """A short fit on more rows."""
    history = np.asarray(_run(model.large, model.params, max_steps=5).history)
    assert np.isfinite(history).all()
    assert (np.diff(history) >= -1e-9 * np.abs(history[:-1])).all(), history

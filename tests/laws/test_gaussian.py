"""Law: what is said of Gaussian latents is what one dense Gaussian over all of them says, in plates and along time.

Models come from `tests/gaussian_models.py`, the truth from `tests/dense_gaussian.py`, which knows nothing of autoem.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.distributions import biject_to

import autoem
from tests import gaussian_models as models
from tests import state_space_models as chains
from tests.dense_gaussian import Dense, Moments, of_flat
from tests.gaussian_models import CASES, DROP, Case

KEY = jax.random.key(0)
TOLERANCE = {"rtol": 1e-8, "atol": 1e-8}
DRAWS = 4000
BOUND = 6.0  # standard errors: a sound moment is beyond once in 5e8, and some 10,000 are looked at
SLOW = (  # what they hold stands in other cases as well
    "random intercept",
    "mean of effects",
    "two sites",
    "nested",
    "nested by rows",
    "by plates",
    "rows not seen",
    "factor analysis",
    "principal components",
    "factors with holes",
    "one latent",
    "local level",
    "trend",
    "second order",
    "full noise",
    "dynamic regression",
    "driven",
    "series",
    "series with own start",
    "series with holes",
    "loop",
)
CHECKED = ("random slopes", "series")


@functools.cache
def start_of(name: str) -> tuple[Dense, dict[str, Any], dict[str, Any]]:
    """The truth, the parameters in the model's text, and the maps from free coordinates to them."""
    case = CASES[name]
    dense = Dense(case.model, case.args, case.reverse)
    seeded = handlers.trace(handlers.substitute(handlers.seed(case.model, KEY), substitute_fn=of_flat))
    sites = seeded.get_trace(*dense.filled(jnp.zeros(dense.num_missing)))
    params = {n: s for n, s in sites.items() if s["type"] == "param"}
    maps = {n: biject_to(s["kwargs"]["constraint"]) for n, s in params.items()}
    return dense, {n: jnp.asarray(s["value"]) for n, s in params.items()}, maps


@functools.lru_cache(maxsize=1)
def solved(name: str) -> tuple[autoem.EMResult, Moments]:
    """One step, and the truth where it leads."""
    result = fit(CASES[name], max_steps=1)
    return result, start_of(name)[0].moments(dict(result.params))


def fit(case: Case, max_steps: int) -> autoem.EMResult:
    em = autoem.EM(case.model, init="model", max_steps=max_steps, tol=0.0, progress=False, **case.options)
    return em.run(KEY, *case.args)


def marked(names: Any, quick: Any) -> list:
    return [pytest.param(n, marks=[] if n in quick else [pytest.mark.slow]) for n in names]


@pytest.fixture(scope="module", params=marked(CASES, CASES.keys() - set(SLOW)))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_log_likelihood_and_moments(name: str) -> None:
    (result, truth), case = solved(name), CASES[name]
    posterior = result.posterior(*case.args)
    np.testing.assert_allclose(result.log_likelihood, truth.log_likelihood, **TOLERANCE)
    np.testing.assert_allclose(posterior.total, truth.log_likelihood, **TOLERANCE)
    np.testing.assert_allclose(np.sum(posterior.log_likelihood), truth.log_likelihood, **TOLERANCE)
    assert set(posterior.mean) == set(truth.mean)
    for latent, expected in truth.mean.items():
        assert posterior.mean[latent].shape == posterior.sd[latent].shape == expected.shape
        np.testing.assert_allclose(posterior.mean[latent], expected, **TOLERANCE, err_msg=latent)
        found = posterior.covariance[latent]
        cells = truth.of_cells(latent, found.shape[-1])
        np.testing.assert_allclose(found, cells.reshape(found.shape), **TOLERANCE, err_msg=latent)
        variances = np.diag(truth.covariance)[truth.places[latent]].reshape(expected.shape)
        np.testing.assert_allclose(posterior.sd[latent] ** 2, variances, **TOLERANCE)


def test_draws_have_the_moments(name: str) -> None:
    """Of all cells together, so that a whole path, or the tie between two groups, is right and not each cell alone."""
    (result, truth), case = solved(name), CASES[name]
    draws = result.posterior(*case.args).sample(KEY, DRAWS)
    size = len(truth.covariance)
    flat, mean = np.zeros((DRAWS, size)), np.zeros(size)
    for latent, where in truth.places.items():
        assert np.shape(draws[latent]) == (DRAWS, *truth.mean[latent].shape)
        flat[:, where], mean[where] = np.reshape(draws[latent], (DRAWS, -1)), truth.mean[latent].ravel()
    seen = np.concatenate(list(truth.places.values()))  # what is missing is no latent
    covariance = truth.covariance[np.ix_(seen, seen)]
    away = flat[:, seen] - mean[seen]
    variance = np.diag(covariance)
    np.testing.assert_array_less(np.abs(away.mean(0)), BOUND * np.sqrt(variance / DRAWS))
    products = away[:, :, None] * away[:, None, :]
    # beside discrete latents the fourth moments are not a Gaussian's: the draws tell their own error
    error = np.maximum(products.std(0), np.sqrt(np.outer(variance, variance))) / np.sqrt(DRAWS)
    np.testing.assert_array_less(np.abs(products.mean(0) - covariance), BOUND * error)


def test_one_step(name: str) -> None:
    """It starts where it should, raises the likelihood and `Q`, whose gradient is zero where the forms are closed."""
    case, (dense, params, maps), after = CASES[name], start_of(name), solved(name)[0]
    np.testing.assert_allclose(after.history[0], dense.moments(params).log_likelihood, **TOLERANCE)
    assert after.num_steps == 1 and after.history[1] > after.history[0]
    free = {n: maps[n].inv(v) for n, v in after.params.items()}

    @jax.jit
    def expected(free: dict) -> jax.Array:
        return dense.expected_log_joint({n: maps[n](v) for n, v in free.items()}, params)

    now, slope = jax.value_and_grad(expected)(free)
    if not case.options.get("missing"):  # with the missing values among the unseen this is another `Q`
        assert now >= expected({n: maps[n].inv(v) for n, v in params.items()}) - 1e-8
    for parameter in case.settled:
        assert after.plan.m_step(parameter) in ("closed form", "Newton")
        np.testing.assert_allclose(slope[parameter], 0, atol=1e-7 * (1 + abs(float(now))), err_msg=parameter)


@pytest.mark.parametrize("name", marked(CASES, CHECKED), scope="function")
def test_check_finds_no_fault(name: str) -> None:
    case = CASES[name]
    em = autoem.EM(case.model, init="model", max_steps=50, progress=False, **case.options)
    report = em.check(KEY, *case.args)
    assert report.ok, str(report)


SINGLE = ("random slopes", "backwards")


@pytest.mark.parametrize("name", SINGLE)
def test_float32_agrees(name: str) -> None:
    """Single precision carries seven digits; sums of squares and a Cholesky factor cost some of them."""
    case, exact = CASES[name], fit(CASES[name], max_steps=3)
    with jax.enable_x64(False):
        result = fit(case, max_steps=3)
        assert result.params["sd"].dtype == jnp.float32
        mean = result.posterior(*case.args).mean
    np.testing.assert_allclose(result.log_likelihood, exact.log_likelihood, rtol=1e-4)
    for parameter, value in exact.params.items():
        np.testing.assert_allclose(result.params[parameter], value, rtol=2e-3, atol=2e-3, err_msg=parameter)
    for latent, value in exact.posterior().mean.items():
        np.testing.assert_allclose(mean[latent], value, rtol=2e-3, atol=2e-3)


def test_a_row_that_a_mask_takes_out_is_as_if_it_were_not_there() -> None:
    seen = np.array([True, True, False, True, False, True])
    result = autoem.EM(models.masked_factors, init="model", max_steps=3, progress=False).run(KEY, models.ROWS, seen)
    fewer = autoem.EM(models.principal_components, init="model", max_steps=3, progress=False).run(
        KEY, models.ROWS[seen]
    )
    np.testing.assert_allclose(result.history, fewer.history, **TOLERANCE)
    np.testing.assert_allclose(result.posterior().mean["f"][seen], fewer.posterior().mean["f"], **TOLERANCE)


def test_series_of_different_lengths() -> None:
    """Steps past a series' end are masked: the likelihood is the sum of those of the series apart."""
    lengths = (6, 4, 2)
    padded, present = autoem.padded([models.PATHS[:n, i] for i, n in enumerate(lengths)])
    result = autoem.EM(chains.padded_series, init="model", max_steps=3, progress=False).run(KEY, padded, present)
    apart = [(n, models.PATHS[:n, i : i + 1]) for i, n in enumerate(lengths)]
    truths = [Dense(chains.series, (y,)).moments(dict(result.params)) for _, y in apart]
    np.testing.assert_allclose(result.posterior().log_likelihood, [t.log_likelihood for t in truths], **TOLERANCE)
    for i, ((n, _), truth) in enumerate(zip(apart, truths, strict=True)):
        np.testing.assert_allclose(result.posterior().mean["x"][:n, i], truth.mean["x"][:, 0], **TOLERANCE)


def test_what_is_missing_is_drawn_given_what_was_seen() -> None:
    case = CASES["steps not seen"]
    result, truth = fit(case, max_steps=3), start_of("steps not seen")[0]
    draws = np.asarray(result.posterior(*case.args).impute(KEY, DRAWS)["y"])
    moments = truth.moments(dict(result.params))
    holes = np.flatnonzero(np.isnan(case.args[0]))
    missing = np.setdiff1d(np.arange(len(moments.covariance)), np.concatenate(list(moments.places.values())))
    spread = np.sqrt(np.diag(moments.covariance)[missing])
    level = moments.mean["level"][holes]  # an observation's mean is its level's
    np.testing.assert_array_less(np.abs(draws[:, holes].mean(0) - level), BOUND * spread / np.sqrt(DRAWS))
    np.testing.assert_allclose(draws[:, holes].std(0), spread, rtol=BOUND / np.sqrt(2 * DRAWS))
    seen = ~np.isnan(case.args[0])
    np.testing.assert_array_equal(draws[:, seen], np.broadcast_to(case.args[0][seen], (DRAWS, seen.sum())))


def test_effects_of_missing_vectors_are_those_of_the_prior() -> None:
    case = Case(models.factor_analysis, (models.with_holes(models.ROWS, 4),), (), DROP)
    posterior = fit(case, max_steps=1).posterior(*case.args)
    np.testing.assert_allclose(posterior.mean["f"][4], np.zeros(2), atol=1e-12)
    np.testing.assert_allclose(posterior.covariance["f"][4], np.eye(2), **TOLERANCE)
    low, high = posterior.interval("f", 0.95)
    np.testing.assert_allclose((low[4], high[4]), ([-1.959964] * 2, [1.959964] * 2), atol=1e-6)

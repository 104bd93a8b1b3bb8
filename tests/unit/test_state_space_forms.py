"""State space models as books write them, each against a Kalman filter and smoother of matrices by NumPy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import autoem
from tests.state_space_models import COVARIANCE, POSITIVE, SCATTER, normal, param, vector

KEY = jax.random.key(0)
RNG = np.random.default_rng(21)
STEPS = 24
Y = np.cumsum(0.4 * RNG.normal(size=STEPS)) + 0.7 * RNG.normal(size=STEPS) + np.sin(np.arange(STEPS))
Y[[0, 6, 7, 20]] = np.nan
INPUTS = RNG.normal(size=(STEPS, 2))
MATRICES = 0.6 * np.eye(2) + 0.2 * RNG.normal(size=(STEPS, 2, 2))
LOADINGS = RNG.normal(size=(STEPS, 2))
SCALES = RNG.uniform(0.3, 0.9, (STEPS, 2))


class Form(NamedTuple):
    """`x = move x + noise`, `y = offset + loading x + error`; matrices of each step, or of all."""

    move: Any
    noise: Any
    loading: Any
    error: Any
    offset: Any = 0.0
    start: Any = None
    spread: Any = None


class Smoothed(NamedTuple):
    log_likelihood: float
    mean: np.ndarray
    covariance: np.ndarray
    forecast: np.ndarray
    variance: np.ndarray


def kalman(y: np.ndarray, form: Form) -> Smoothed:
    """Durbin and Koopman 2012, sections 4.3 and 4.4, in covariance form: nothing is shared with autoem."""
    steps, d = len(y), np.shape(form.move)[-1]
    move, noise = (np.broadcast_to(m, (steps, d, d)) for m in (form.move, form.noise))
    loading, offset = np.broadcast_to(form.loading, (steps, d)), np.broadcast_to(form.offset, steps)
    mean = np.zeros(d) if form.start is None else form.start
    spread = np.zeros((d, d)) if form.spread is None else form.spread
    total, ahead, filtered, forecast, variance = 0.0, [], [], [], []
    for t in range(steps):
        mean, spread = move[t] @ mean, move[t] @ spread @ move[t].T + noise[t]
        ahead.append((mean, spread))
        f = loading[t] @ spread @ loading[t] + form.error
        forecast.append(offset[t] + loading[t] @ mean)
        variance.append(f)
        if not np.isnan(y[t]):
            gain, off = spread @ loading[t] / f, y[t] - forecast[-1]
            total += -0.5 * (np.log(2 * np.pi * f) + off**2 / f)
            mean, spread = mean + gain * off, spread - np.outer(gain, loading[t] @ spread)
        filtered.append((mean, spread))
    means, spreads = [mean], [spread]
    for t in reversed(range(steps - 1)):
        back = filtered[t][1] @ move[t + 1].T @ np.linalg.pinv(ahead[t + 1][1])
        means.insert(0, filtered[t][0] + back @ (means[0] - ahead[t + 1][0]))
        spreads.insert(0, filtered[t][1] + back @ (spreads[0] - ahead[t + 1][1]) @ back.T)
    return Smoothed(total, np.array(means), np.array(spreads), np.array(forecast), np.array(variance))


def turns(k: int, period: int = 6) -> np.ndarray:
    a = 2 * np.pi * k / period
    return np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])


def trigonometric(y):
    """A level and two harmonics of a season of six (Harvey 1989, section 2.3.4)."""
    move, turn, sd = param("move", 0.5, POSITIVE), param("turn", 0.2, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(carry, seen):
        level, one, two = carry
        level = normal("level", level, move)
        one, two = vector("one", turns(1) @ one, turn), vector("two", turns(2) @ two, turn)
        normal("y", level + one[0] + two[0], sd, seen)
        return (level, one, two), None

    scan(step, (0.0, jnp.zeros(2), jnp.zeros(2)), y)


def of_trigonometric(p):
    move = np.zeros((5, 5))
    move[0, 0], move[1:3, 1:3], move[3:, 3:] = 1, turns(1), turns(2)
    noise = np.diag([p["move"] ** 2, *[p["turn"] ** 2] * 4])
    return Form(move, noise, [1, 1, 0, 1, 0], p["sd"] ** 2), {"level": 0, "one": [1, 2], "two": [3, 4]}


def arma(y):
    """ARMA(2, 1) below noise in Hamilton's form: what is seen reads the state and the one before."""
    phi, theta = param("phi", [0.5, 0.2]), param("theta", 0.4)
    q, sd = param("q", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(earlier, seen):
        x = normal("x", phi[0] * earlier[0] + phi[1] * earlier[1], q)
        normal("y", x + theta * earlier[0], sd, seen)
        return (x, earlier[0]), None

    scan(step, (0.0, 0.0), y)


def of_arma(p):
    move = np.array([p["phi"], [1, 0]])
    return Form(move, np.diag([p["q"] ** 2, 0]), [1, p["theta"]], p["sd"] ** 2), {"x": 0}


def smooth_trend(y):
    """An integrated random walk, sampled by its last two values."""
    q, sd = param("q", 0.3, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(carry, seen):
        one, two = carry
        level = normal("level", 2 * one - two, q)
        normal("y", level, sd, seen)
        return (level, one), None

    scan(step, (0.0, 0.0), y)


def of_smooth_trend(p):
    return Form(np.array([[2, -1], [1, 0]]), np.diag([p["q"] ** 2, 0]), [1, 0], p["sd"] ** 2), {"level": 0}


def varying(y, move, loading, scale):
    """System matrices of each step, given as data."""
    q, sd = param("q", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(x, now):
        seen, a, z, s = now
        x = vector("x", a @ x, q * s)
        normal("y", z @ x, sd, seen)
        return x, None

    scan(step, jnp.ones(2), (y, move, loading, scale))


def of_varying(p):
    noise = np.stack([np.diag((p["q"] * s) ** 2) for s in SCALES])
    return Form(MATRICES, noise, LOADINGS, p["sd"] ** 2, start=np.ones(2)), {"x": [0, 1]}


def correlated(y):
    """Level and slope whose noise is correlated."""
    q, sd = param("q", 0.3 * SCATTER, COVARIANCE), param("sd", 0.6, POSITIVE)
    start = numpyro.sample("start", dist.MultivariateNormal(jnp.zeros(2), 2.0 * jnp.eye(2)))

    def step(x, seen):
        x = numpyro.sample("x", dist.MultivariateNormal(jnp.array([[1.0, 1.0], [0.0, 0.9]]) @ x, q))
        normal("y", x[0], sd, seen)
        return x, None

    scan(step, start, y)


def of_correlated(p):
    move = np.array([[1.0, 1.0], [0.0, 0.9]])
    return Form(move, p["q"], [1, 0], p["sd"] ** 2, spread=2 * np.eye(2)), {"x": [0, 1]}


def tied(y):
    """What is seen reads the state's own innovation: noise of both is correlated."""
    rho, q, sd = param("rho", 0.4), param("q", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(before, seen):
        x = normal("x", 0.7 * before, q)
        normal("y", x + rho * (x - 0.7 * before), sd, seen)
        return x, None

    scan(step, 0.5, y)


def of_tied(p):
    move, loading = np.array([[0.7, 0], [1, 0]]), [1 + p["rho"], -0.7 * p["rho"]]
    return Form(move, np.diag([p["q"] ** 2, 0]), loading, p["sd"] ** 2, start=np.array([0.5, 0])), {"x": 0}


def drifting(y, x):
    """Two coefficients that drift, below known inputs, about a fixed intercept."""
    alpha, q, sd = param("alpha", 0.2), param("q", [0.3, 0.5], POSITIVE), param("sd", 0.6, POSITIVE)
    start = numpyro.sample("start", dist.Normal(jnp.zeros(2), 1.5).to_event(1))

    def step(beta, now):
        seen, x = now
        beta = vector("beta", beta, q)
        normal("y", alpha + beta @ x, sd, seen)
        return beta, None

    scan(step, start, (y, x))


def of_drifting(p):
    form = Form(np.eye(2), np.diag(p["q"] ** 2), INPUTS, p["sd"] ** 2, p["alpha"], spread=2.25 * np.eye(2))
    return form, {"beta": [0, 1]}


FORMS = {
    "trigonometric": (trigonometric, (Y,), of_trigonometric),
    "ARMA": (arma, (Y,), of_arma),
    "smooth trend": (smooth_trend, (Y,), of_smooth_trend),
    "varying": (varying, (Y, MATRICES, LOADINGS, SCALES), of_varying),
    "correlated": (correlated, (Y,), of_correlated),
    "tied": (tied, (Y,), of_tied),
    "drifting": (drifting, (Y, INPUTS), of_drifting),
}


def fit(model, *args, **options):
    options = {"init": "model", "missing": "marginalize", "max_steps": 3, "tol": 0.0, "progress": False, **options}
    return autoem.EM(model, **options).run(KEY, *args)


@pytest.mark.parametrize("name", FORMS)
def test_filter_and_smoother(name: str) -> None:
    model, args, form_of = FORMS[name]
    result = fit(model, *args)
    form, places = form_of({n: np.asarray(v) for n, v in result.params.items()})
    truth, posterior = kalman(args[0], form), result.posterior()
    np.testing.assert_allclose(result.log_likelihood, truth.log_likelihood, rtol=1e-9)
    assert (np.diff(result.history) > 0).all()
    for latent, where in places.items():
        np.testing.assert_allclose(posterior.mean[latent], truth.mean[:, where], rtol=1e-6, atol=1e-8)
        variances = np.diagonal(truth.covariance, axis1=1, axis2=2)[:, where]
        np.testing.assert_allclose(posterior.sd[latent] ** 2, variances, rtol=1e-6, atol=1e-9)


def test_forecasts_and_their_intervals() -> None:
    """Steps of NaN after the last: states by interval, observations by draws of whole paths (six standard errors)."""
    result = fit(arma, Y, max_steps=30)
    longer = np.append(Y, np.full(4, np.nan))
    truth = kalman(longer, of_arma({n: np.asarray(v) for n, v in result.params.items()})[0])
    posterior = result.posterior(longer)
    half = 1.6448536 * np.sqrt(truth.covariance[-4:, 0, 0])
    low, high = posterior.interval("x", 0.9)
    np.testing.assert_allclose((low[-4:], high[-4:]), (truth.mean[-4:, 0] - half, truth.mean[-4:, 0] + half), rtol=1e-5)
    drawn = np.asarray(posterior.impute(KEY, 6000)["y"])[:, -4:]
    deviation = np.sqrt(truth.variance[-4:])
    np.testing.assert_array_less(np.abs(drawn.mean(0) - truth.forecast[-4:]), 6 * deviation / np.sqrt(6000))
    np.testing.assert_allclose(drawn.std(0), deviation, rtol=6 / np.sqrt(12000))


def test_draws_of_paths_have_the_smoothers_moments() -> None:
    """Of neighbouring steps together: the covariance of a step and the next is that of two lags of ARMA's state."""
    result = fit(arma, Y)
    truth = kalman(Y, of_arma({n: np.asarray(v) for n, v in result.params.items()})[0])
    draws = np.asarray(result.posterior().sample(KEY, 5000)["x"])
    away = draws - truth.mean[:, 0]
    variance = truth.covariance[:, 0, 0]
    np.testing.assert_array_less(np.abs(away.mean(0)), 6 * np.sqrt(variance / 5000))
    beside = (away[:, 1:] * away[:, :-1]).mean(0)
    error = 6 * np.sqrt((variance[1:] * variance[:-1] + truth.covariance[1:, 0, 1] ** 2) / 5000)
    np.testing.assert_array_less(np.abs(beside - truth.covariance[1:, 0, 1]), error)


def arma_seen(y):
    """ARMA(1, 1) without noise of measurement: the step carries what it saw and by how much it was off."""
    phi, theta, q = param("phi", 0.5), param("theta", 0.2), param("q", 0.8, POSITIVE)

    def step(carry, seen):
        before, off = carry
        mean = phi * before + theta * off
        value = normal("y", mean, q, seen)
        return (value, value - mean), None

    scan(step, (0.0, 0.0), y)


def test_an_arma_seen_without_noise() -> None:
    """Its likelihood given that all was zero before, by the recursion in a Python loop."""
    y = np.cumsum(RNG.normal(size=60)) * 0.5
    result = fit(arma_seen, y, missing="error", max_steps=200, tol=1e-10)
    p, before, off, total = {n: float(v) for n, v in result.params.items()}, 0.0, 0.0, 0.0
    for value in y:
        mean = p["phi"] * before + p["theta"] * off
        before, off = value, value - mean
        total += -0.5 * (np.log(2 * np.pi * p["q"] ** 2) + (off / p["q"]) ** 2)
    np.testing.assert_allclose(result.log_likelihood, total, rtol=1e-9)


def harvey(y):
    """Noise of rank one: a state whose second entry is a multiple of the first's innovation."""
    phi, theta, q, sd = param("phi", 0.5), param("theta", 0.4), param("q", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(x, seen):
        move = jnp.stack([jnp.stack([phi, jnp.ones(())]), jnp.zeros(2)])
        noise = q * jnp.stack([jnp.array([1.0, 0.0]), jnp.stack([theta, jnp.zeros(())])])
        x = numpyro.sample("x", dist.MultivariateNormal(move @ x, scale_tril=noise))
        normal("y", x[0], sd, seen)
        return x, None

    scan(step, jnp.zeros(2), y)


def running(y):
    """A level that is the sum of its slopes, which no noise of its own."""
    q, sd = param("q", 0.3, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(carry, seen):
        level, slope = carry
        level, slope = level + slope, normal("slope", slope, q)
        normal("y", level, sd, seen)
        return (level, slope), None

    scan(step, (0.0, 0.0), y)


def exactly(y):
    phi, q = param("phi", 0.5), param("q", 0.8, POSITIVE)

    def step(x, seen):
        x = normal("x", phi * x, q)
        normal("y", x, 0.0, seen)
        return x, None

    scan(step, 0.0, y)


@pytest.mark.parametrize(
    ("model", "words"),
    [(harvey, r"theta \* earlier"), (running, r"2 \* one - two"), (exactly, "observe the latent itself")],
)
def test_states_without_noise_are_refused_with_a_form_that_works(model, words: str) -> None:
    """The mends are the forms `arma` and `smooth_trend` above."""
    with pytest.raises(autoem.ModelError, match=words):
        autoem.EM(model, init="model", progress=False).plan(np.nan_to_num(Y))


def test_hamiltons_form_is_harveys() -> None:
    """ARMA(1, 1) below noise: the likelihood of the rank-one form that is refused, by NumPy, is that of its mend."""

    def mend(y):
        phi, theta = param("phi", 0.5), param("theta", 0.4)
        q, sd = param("q", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

        def step(earlier, seen):
            x = normal("x", phi * earlier, q)
            normal("y", x + theta * earlier, sd, seen)
            return x, None

        scan(step, 0.0, y)

    result = fit(mend, Y)
    p = {n: float(v) for n, v in result.params.items()}
    pull = np.array([1.0, p["theta"]])
    form = Form([[p["phi"], 1], [0, 0]], p["q"] ** 2 * np.outer(pull, pull), [1, 0], p["sd"] ** 2)
    np.testing.assert_allclose(result.log_likelihood, kalman(Y, form).log_likelihood, rtol=1e-9)

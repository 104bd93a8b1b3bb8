"""State spaces that carry their last states as a tuple: seasons and autoregressions, against dense normal laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from scipy.stats import multivariate_normal

import autoem
from autoem.reading.scan import Scan
from autoem.reading.trace import trace

KEY = jax.random.key(0)
POSITIVE = constraints.positive


def seasonal(y, period):
    """Level, slope and season, as in structural time series (Harvey 1989, section 2.3)."""
    names = ("move", "bend", "turn", "noise")
    move, bend, turn, noise = (numpyro.param(n, v, constraint=POSITIVE) for n, v in zip(names, SPREADS, strict=True))
    level = numpyro.sample("level0", dist.Normal(5.0, 1.0))
    slope = numpyro.sample("slope0", dist.Normal(0.0, 0.1))
    season = tuple(numpyro.sample(f"season0_{i}", dist.Normal(0.0, 0.3)) for i in range(period - 1))

    def step(carry, seen):
        level, slope, season = carry
        level = numpyro.sample("level", dist.Normal(level + slope, move))
        slope = numpyro.sample("slope", dist.Normal(slope, bend))
        new = numpyro.sample("season", dist.Normal(-sum(season), turn))
        numpyro.sample("y", dist.Normal(level + new, noise), obs=seen)
        return (level, slope, (new, *season[:-1])), None

    scan(step, (level, slope, season), y)


SPREADS = (0.1, 0.02, 0.05, 0.15)


def autoregression(y):
    """Four lags, and noise of measurement; the first values are numbers."""
    phi = numpyro.param("phi", jnp.asarray(PHI))
    q, r = numpyro.param("q", 0.7, constraint=POSITIVE), numpyro.param("r", 0.4, constraint=POSITIVE)

    def step(earlier, seen):
        x = numpyro.sample("x", dist.Normal(sum(p * e for p, e in zip(phi, earlier, strict=True)), q))
        numpyro.sample("y", dist.Normal(x, r), obs=seen)
        return (x, *earlier[:-1]), None

    scan(step, FIRST, y)


PHI = (0.5, -0.2, 0.1, 0.3)
FIRST = (0.3, -0.2, 0.1, 0.4)


def dense(matrix, noise, mean, covariance, steps):
    """Mean and covariance of the states at all steps, by products of matrices; `mean` is that of the start."""
    d = len(matrix)
    means, whole = [], np.zeros((steps, d, steps, d))
    for t in range(steps):
        mean, covariance = matrix @ mean, matrix @ covariance @ matrix.T + noise
        means.append(mean)
        cross = covariance
        for s in range(t, steps):
            whole[s, :, t], whole[t, :, s] = cross, cross.T
            cross = matrix @ cross
    return np.array(means), whole


def seasonal_law(params, period, steps):
    d = period + 1
    matrix, noise = np.zeros((d, d)), np.zeros((d, d))
    matrix[0, :2] = matrix[1, 1] = 1
    matrix[2, 2:] = -1
    matrix[3:, 2:-1] = np.eye(period - 2)
    noise[range(3), range(3)] = [params[n] ** 2 for n in ("move", "bend", "turn")]
    start = np.diag([1.0, 0.01] + [0.09] * (period - 1))
    return *dense(matrix, noise, 5 * np.eye(d)[0], start, steps), np.eye(d)[0] + np.eye(d)[2], params["noise"]


def autoregressive_law(params, steps):
    matrix, noise = np.eye(4, k=-1), np.zeros((4, 4))
    matrix[0], noise[0, 0] = params["phi"], params["q"] ** 2
    return *dense(matrix, noise, np.array(FIRST), np.zeros((4, 4)), steps), np.eye(4)[0], params["r"]


def hold_against(law, y, result, names):
    """The log-likelihood, and mean and deviation of the named states, against those of the joint normal law."""
    mean, covariance, reads, noise = law
    seen = ~np.isnan(y)
    own = np.einsum("i,sitj,j->st", reads, covariance, reads)[np.ix_(seen, seen)] + noise**2 * np.eye(seen.sum())
    away = (y - mean @ reads)[seen]
    np.testing.assert_allclose(result.history[-1], multivariate_normal(np.zeros(len(away)), own).logpdf(away), 1e-9)
    posterior = result.posterior()
    for name, i in names.items():
        cross = np.einsum("stj,j->st", covariance[:, i], reads)[:, seen]
        variance = np.diag(covariance[:, i, :, i] - cross @ np.linalg.solve(own, cross.T))
        expected = mean[:, i] + cross @ np.linalg.solve(own, away)
        np.testing.assert_allclose(posterior.mean[name], expected, 1e-7, 1e-9)
        np.testing.assert_allclose(posterior.sd[name], np.sqrt(variance), 1e-7)


def fitted(model, *args):
    em = autoem.EM(model, init="model", max_steps=2, missing="marginalize", progress=False)
    return em.run(KEY, *args)


def test_a_season_of_four_with_holes_has_the_law_of_its_dense_normal():
    y = 5 + np.random.default_rng(3).normal(size=13) * 0.3
    y[[2, 7, 8]] = np.nan
    result = fitted(seasonal, y, 4)
    hold_against(seasonal_law(result.params, 4, len(y)), y, result, {"level": 0, "slope": 1, "season": 2})


def test_single_precision_keeps_what_far_observations_leave():
    small = dict(zip(("move", "bend", "turn", "noise"), (0.03, 0.001, 0.008, 0.01), strict=True))
    y = 5 + np.cumsum(np.random.default_rng(5).normal(size=40)) * 0.03
    mean, covariance, reads, noise = seasonal_law(small, 2, len(y))
    law = np.einsum("i,sitj,j->st", reads, covariance, reads) + noise**2 * np.eye(len(y))
    expected = multivariate_normal(mean @ reads, law).logpdf(y)
    with jax.enable_x64(False):
        em = autoem.EM(seasonal, init={n: jnp.float32(v) for n, v in small.items()}, max_steps=20, progress=False)
        result = em.run(KEY, jnp.asarray(y, jnp.float32), 2)
        paths = result.posterior().sample(jax.random.key(1), 200)
    assert abs(result.history[0] - expected) < 2e-3
    assert np.diff(result.history).min() > -1e-3
    assert np.abs((paths["level"] + paths["season"]).mean(0) - y).max() < 0.02


def test_an_autoregression_of_four_lags_below_noise_has_the_law_of_its_dense_normal():
    y = np.random.default_rng(4).normal(size=12)
    result = fitted(autoregression, y)
    hold_against(autoregressive_law(result.params, len(y)), y, result, {"x": 0})


def test_what_a_register_carries_is_worked_out_once_a_lag(monkeypatch):
    evaluate, count = Scan.evaluate, itertools.count()

    def counted(*args):
        assert next(count) < 300, "each leaf asks anew for all those before it"
        return evaluate(*args)

    monkeypatch.setattr(Scan, "evaluate", counted)
    y = 5 + np.random.default_rng(0).normal(size=14) * 0.1
    for n in (6, 12):
        trace(seasonal, (y, n))
    assert next(count) > 50


def vector(y, law):
    x = numpyro.sample("x0", dist.Normal(0, 1).expand([3]).to_event(1))
    matrix, q = jnp.eye(3, k=-1).at[0].set(-1.0), numpyro.param("q", 0.3, constraint=POSITIVE)

    def step(x, seen):
        x = law(matrix, x, q)
        numpyro.sample("y", dist.Normal(x[0], 0.5), obs=seen)
        return x, None

    scan(step, x, y)


FIRST_ONE = jnp.array([1.0, 0.0, 0.0])
SHIFTS = {
    "normal": lambda a, x, q: numpyro.sample("x", dist.Normal(a @ x, q * FIRST_ONE).to_event(1)),
    "matrix": lambda a, x, q: numpyro.sample("x", dist.MultivariateNormal(a @ x, jnp.diag(q * FIRST_ONE))),
    "sum": lambda a, x, q: a @ x + FIRST_ONE * numpyro.sample("e", dist.Normal(0, q)),
    "concatenate": lambda a, x, q: jnp.concatenate([numpyro.sample("e", dist.Normal(-x.sum(), q))[None], x[:-1]]),
}


@pytest.mark.parametrize("law", SHIFTS)
def test_a_register_in_one_vector_is_refused_with_the_tuple(law):
    with pytest.raises(autoem.ModelError, match=r"return \(x, \*earlier\[:-1\]\)"):
        autoem.EM(vector, init="model", progress=False).plan(jnp.ones(12), SHIFTS[law])

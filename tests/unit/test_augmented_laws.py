"""Every augmentation by the same laws: no update lowers Q, and the end is that of Newton's method and of SciPy.

What SciPy maximises is written with its own distributions, row by row, weighted, masked or mixed over two classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy as js
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from scipy import optimize, special, stats

import autoem
from autoem.m_step import Augmented

KEY = jax.random.key(0)
RNG = np.random.default_rng(3)
N, SCALE, LOW, HIGH, OFFSETS = 90, 1.3, -1.0, 4.0, (-0.8, 0.8)
X = np.column_stack([np.ones(N), RNG.normal(size=(N, 2))])
MEAN = X @ [0.2, 1.0, -1.0]
SIGN = (MEAN + RNG.normal(size=N) > 0).astype(float)
TRIALS = RNG.integers(1, 9, N)
HITS = RNG.binomial(TRIALS, special.expit(MEAN))
COUNTS = RNG.negative_binomial(3, special.expit(-0.4 * MEAN))
LATENT = MEAN + SCALE * RNG.normal(size=N)
OVER = LATENT > 1.0
INSIDE = np.clip(LATENT, LOW + 0.01, HIGH - 0.01)
BOUNDS = np.stack([np.floor(LATENT), np.floor(LATENT) + 1], 1)
LEFT, RIGHT = RNG.uniform(size=(2, N)) < 0.15
LEFT = LEFT & ~RIGHT
POINT = ~(LEFT | RIGHT) & (RNG.uniform(size=N) < 0.2)
BOUNDS[POINT] = LATENT[POINT, None]
Y = MEAN + 0.5 * RNG.standard_t(2, size=N)


@dataclasses.dataclass(frozen=True)
class Case:
    """A law of the rows given a linear predictor, its data, and SciPy's log density of each row."""

    law: Callable[[Any], Any]
    data: np.ndarray
    logpdf: Callable[[np.ndarray], np.ndarray]


def interval(w):
    low, high = (stats.norm.cdf((b - w) / SCALE) for b in BOUNDS.T)
    inside = np.log(np.where(POINT, 1, np.where(RIGHT, 1, high) - np.where(LEFT, 0, low)))
    return np.where(POINT, stats.norm.logpdf(LATENT, w, SCALE), inside)


def signed(cdf):
    return lambda w: np.where(SIGN > 0, np.log(cdf(w)), np.log(cdf(-w)))


def right(w):
    return np.where(OVER, stats.norm.logsf(LATENT, w, SCALE), stats.norm.logpdf(LATENT, w, SCALE))


def left(w):
    return np.where(OVER, stats.norm.logcdf(LATENT, w, SCALE), stats.norm.logpdf(LATENT, w, SCALE))


def kept(low, high):
    def logpdf(w):
        return stats.truncnorm.logpdf(INSIDE, (low - w) / SCALE, (high - w) / SCALE, w, SCALE)

    return logpdf


CASES = {
    "student": Case(lambda w: dist.StudentT(4.0, w, 0.7), Y, lambda w: stats.t.logpdf(Y, 4.0, w, 0.7)),
    "logistic": Case(lambda w: dist.Bernoulli(logits=w), SIGN, signed(special.expit)),
    "logistic by probs": Case(lambda w: dist.Bernoulli(probs=jax.nn.sigmoid(w)), SIGN, signed(special.expit)),
    "probit": Case(lambda w: dist.Bernoulli(probs=js.special.ndtr(w)), SIGN, signed(special.ndtr)),
    "binomial": Case(
        lambda w: dist.Binomial(TRIALS, logits=w), HITS, lambda w: stats.binom.logpmf(HITS, TRIALS, special.expit(w))
    ),
    "binomial probit": Case(
        lambda w: dist.Binomial(TRIALS, probs=dist.Normal(0, 1).cdf(w)),
        HITS,
        lambda w: stats.binom.logpmf(HITS, TRIALS, special.ndtr(w)),
    ),
    "negative binomial": Case(
        lambda w: dist.NegativeBinomialLogits(3.0, w),
        COUNTS,
        lambda w: stats.nbinom.logpmf(COUNTS, 3.0, special.expit(-w)),
    ),
    "geometric": Case(
        lambda w: dist.GeometricLogits(w), COUNTS, lambda w: stats.geom.logpmf(COUNTS + 1, special.expit(w))
    ),
    "right censored": Case(lambda w: dist.RightCensoredDistribution(dist.Normal(w, SCALE), OVER), LATENT, right),
    "left censored": Case(lambda w: dist.LeftCensoredDistribution(dist.Normal(w, SCALE), OVER), LATENT, left),
    "censored lognormal": Case(
        lambda w: dist.RightCensoredDistribution(dist.LogNormal(w, SCALE), OVER),
        np.exp(LATENT),
        lambda w: right(w) - np.where(OVER, 0, LATENT),
    ),
    "interval censored": Case(
        lambda w: dist.IntervalCensoredDistribution(dist.Normal(w, SCALE), LEFT, RIGHT), BOUNDS, interval
    ),
    "truncated below": Case(lambda w: dist.TruncatedNormal(w, SCALE, low=LOW), INSIDE, kept(LOW, np.inf)),
    "truncated above": Case(lambda w: dist.TruncatedNormal(w, SCALE, high=HIGH), INSIDE, kept(-np.inf, HIGH)),
    "truncated": Case(lambda w: dist.TruncatedNormal(w, SCALE, low=LOW, high=HIGH), INSIDE, kept(LOW, HIGH)),
}
WEIGHTS = RNG.integers(1, 4, N).astype(float)
SEEN = RNG.uniform(size=N) < 0.7
HEIGHTS = {  # how rows count, in NumPyro and in the sum that SciPy maximises
    "plain": (lambda: handlers.scale(scale=1.0), np.ones(N)),
    "weighted": (lambda: handlers.scale(scale=WEIGHTS), WEIGHTS),
    "masked": (lambda: handlers.mask(mask=SEEN), SEEN * 1.0),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def regression(case, counted="plain"):
    def model(x, y):
        beta = numpyro.param("beta", jnp.zeros(3))
        with numpyro.plate("rows", N), HEIGHTS[counted][0]():
            numpyro.sample("y", case.law(x @ beta), obs=y)

    return model


def classes(case):
    """Two classes whose rows lie lower or higher, by how much is known."""

    def model(x, y):
        beta = numpyro.param("beta", jnp.zeros(3))
        share = numpyro.param("share", jnp.array([0.4, 0.6]), constraint=constraints.simplex)
        with numpyro.plate("rows", N):
            z = numpyro.sample("z", dist.Categorical(share))
            numpyro.sample("y", case.law(x @ beta + jnp.array(OFFSETS)[z]), obs=y)

    return model


def fitted(model, data, **options):
    options = {"max_steps": 5000, "tol": 1e-14, "m_step": {"beta": Augmented()}, "init": "model", **options}
    return autoem.EM(model, progress=False, **options).run(KEY, X, data)


@every_case
def test_no_update_lowers_the_objective(case):
    """From starts near and far, where a Newton step of full length would fall."""
    start = {"beta": np.zeros(3)}
    em = autoem.EM(regression(case), init=start, max_steps=1, m_step={"beta": Augmented()}, progress=False)
    for beta in np.random.default_rng(1).normal(size=(8, 3)) * np.repeat([0.3, 0.6, 1.0, 1.5], 2)[:, None]:
        start["beta"] = beta
        before, after = em.run(KEY, X, case.data).history[:2]
        assert after >= before - 1e-9 * abs(before)


SOME = ("student", "binomial", "probit", "right censored", "truncated")  # one of each kind
WHOLE = [(name, "plain") for name in CASES] + [(name, how) for name in SOME for how in ("weighted", "masked")]


@pytest.mark.parametrize(("name", "counted"), WHOLE)
def test_the_end_is_that_of_newton_and_of_scipy(name, counted):
    case = CASES[name]
    model, weights = regression(case, counted), HEIGHTS[counted][1]
    result, newton = fitted(model, case.data), fitted(model, case.data, m_step=None)
    best = optimize.minimize(
        lambda b: -(weights * case.logpdf(X @ b)).sum(), np.array([0.2, 1, -1.0]), method="BFGS", options={"gtol": 1e-7}
    )
    assert result.converged and (np.diff(result.history) >= -1e-9).all()
    assert result.log_likelihood == pytest.approx(-best.fun, abs=1e-6)
    assert result.log_likelihood == pytest.approx(newton.log_likelihood, abs=1e-7)
    np.testing.assert_allclose(result.params["beta"], best.x, atol=2e-4)
    assert "least squares with the augmented weights" in str(result.plan)


@every_case
def test_beside_a_discrete_latent(case):
    """Two classes; SciPy maximises the mixture over the coefficients and the share."""
    result = fitted(classes(case), case.data)

    def loss(v):
        share = special.expit(v[3])
        parts = [np.log(s) + case.logpdf(X @ v[:3] + o) for s, o in zip((1 - share, share), OFFSETS, strict=True)]
        return -np.logaddexp(*parts).sum()

    best = optimize.minimize(loss, np.array([0.2, 1, -1.0, 0.4]), method="BFGS", options={"gtol": 1e-7})
    assert (np.diff(result.history) >= -1e-9).all()
    assert result.log_likelihood == pytest.approx(-best.fun, abs=2e-5)

"""Densities of censored and truncated values: NumPyro's own where that has its digits, SciPy's beyond."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import integrate, stats

import autoem
from autoem.families.densities import log_density
from autoem.families.intervals import log_between

KEY = jax.random.key(0)
VALUES = np.array([-2.0, -0.3, 0.4, 1.0, 2.5])
CENSORED = np.array([True, False, True, False, True])
PAIRS = np.stack([VALUES, VALUES + 0.7], 1)
PAIRS[1, 1] = PAIRS[1, 0]  # seen exactly
LEFT, RIGHT = np.eye(5, dtype=bool)[0], np.eye(5, dtype=bool)[4]
BOTH = np.eye(5, dtype=bool)[2]
NORMAL, LOGNORMAL = dist.Normal(0.3, 1.2), dist.LogNormal(0.3, 0.8)
KEPT = np.clip(VALUES, -0.9, 2.9)
LAWS = {
    "left": (dist.LeftCensoredDistribution(NORMAL, CENSORED), VALUES),
    "right": (dist.RightCensoredDistribution(NORMAL, CENSORED), VALUES),
    "left, lognormal": (dist.LeftCensoredDistribution(LOGNORMAL, CENSORED), np.exp(VALUES)),
    "right, lognormal": (dist.RightCensoredDistribution(LOGNORMAL, CENSORED), np.exp(VALUES)),
    "right, exponential": (dist.RightCensoredDistribution(dist.Exponential(0.7), CENSORED), np.exp(VALUES)),
    "interval": (dist.IntervalCensoredDistribution(NORMAL, LEFT | BOTH, RIGHT | BOTH), PAIRS),
    "interval, lognormal": (dist.IntervalCensoredDistribution(LOGNORMAL, LEFT | BOTH, RIGHT | BOTH), np.exp(PAIRS)),
    "above": (dist.TruncatedNormal(0.3, 1.2, low=-1.0), KEPT),
    "below": (dist.TruncatedNormal(0.3, 1.2, high=3.0), KEPT),
    "between": (dist.TruncatedNormal(0.3, 1.2, low=-1.0, high=3.0), KEPT),
    "cauchy": (dist.TruncatedCauchy(0.3, 1.2, low=-1.0, high=3.0), KEPT),
}


@pytest.mark.parametrize("name", LAWS)
def test_near_the_middle_it_is_the_density_of_numpyro(name):
    law, value = LAWS[name]
    np.testing.assert_allclose(log_density(law, jnp.asarray(value)), law.log_prob(value), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("low", "high"), [(-1, 2), (3, 4), (-21, -20), (20, 21), (-30, -29.9), (-50, 50), (9, 40), (0, 1e-6), (7, 7.001)]
)
def test_probabilities_of_intervals(low, high):
    """By quadrature, relative to the density at the end nearer to zero."""
    near, far = sorted((abs(low), abs(high))) if low * high > 0 else (0.0, 0.0)
    ends = (near, min(far, near + 10)) if low * high > 0 else (max(low, -12), min(high, 12))
    area = integrate.quad(lambda x: np.exp(-(x**2 - near**2) / 2), *ends, epsabs=0, epsrel=1e-13, limit=200)[0]
    expected = np.log(area) - near**2 / 2 - np.log(2 * np.pi) / 2
    found = log_between(jnp.array(float(low)), jnp.array(float(high)))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_far_out_it_has_the_value_and_the_slope_of_scipy():
    """Forty standard deviations away: where NumPyro's density is flat, or has no digit left."""

    def loss(loc, which, value):
        base = dist.Normal(loc, 1.0)
        laws = {
            "right": lambda: dist.RightCensoredDistribution(base, jnp.ones(1, bool)),
            "left": lambda: dist.LeftCensoredDistribution(base, jnp.ones(1, bool)),
            "interval": lambda: dist.IntervalCensoredDistribution(base, jnp.zeros(1, bool), jnp.zeros(1, bool)),
        }
        return log_density(laws[which](), value).sum()

    for which, loc, value in (("right", -40.0, [0.0]), ("left", 40.0, [0.0]), ("interval", 40.0, [[-1.0, 0.0]])):
        slope = jax.grad(loss)(loc, which, jnp.array(value))
        expected = 40.0 + 1 / 40.0  # Mills' ratio, to the term that counts
        np.testing.assert_allclose(abs(slope), expected, rtol=1e-5)
        np.testing.assert_allclose(loss(loc, which, jnp.array(value)), stats.norm.logsf(40.0), rtol=1e-12)


def test_infinite_bounds_and_points_have_finite_slopes():
    bounds = jnp.array([[-jnp.inf, 1.0], [1.0, jnp.inf], [0.5, 0.5], [0.2, 0.9]])

    def total(loc):
        law = dist.IntervalCensoredDistribution(dist.Normal(loc, 1.0), jnp.isinf(bounds[:, 0]), jnp.isinf(bounds[:, 1]))
        return log_density(law, bounds).sum()

    expected = (
        stats.norm.logcdf(1 - 0.1) + stats.norm.logsf(1 - 0.1) + stats.norm.logpdf(0.5 - 0.1)
        + np.log(stats.norm.cdf(0.8) - stats.norm.cdf(0.1))
    )  # fmt: skip
    np.testing.assert_allclose(total(0.1), expected, rtol=1e-12)
    numeric = (total(0.1 + 1e-6) - total(0.1 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(total)(0.1), numeric, rtol=1e-6)


@pytest.mark.parametrize("m_step", [None, autoem.m_step.Augmented()])
def test_a_fit_comes_back_from_far_away(m_step):
    """All values censored but two, from a start at which NumPyro's own density has no slope: the end of SciPy's."""
    y = np.array([0.0, 0.2, 1.0, 1.3, 0.7])
    censored = np.array([True, True, True, False, False])

    def model(y):
        with numpyro.plate("rows", len(y)):
            law = dist.Normal(numpyro.param("mu", -30.0), 1.0)
            numpyro.sample("y", dist.RightCensoredDistribution(law, censored), obs=y)

    options = {"m_step": m_step, "init": "model", "max_steps": 2000, "tol": 1e-14, "progress": False}
    result = autoem.EM(model, **options).run(KEY, y)
    grid = np.linspace(-2, 4, 600_001)
    height = sum(stats.norm.logsf(v - grid) if c else stats.norm.logpdf(v - grid) for v, c in zip(y, censored))  # noqa: B905
    np.testing.assert_allclose(result.params["mu"], grid[height.argmax()], atol=2e-5)


def test_log_odds_of_zero_have_the_slope_of_their_density():
    """NumPyro's derivatives at log-odds of exactly zero are others; fits that began there ended there."""
    for law, y in ((lambda v: dist.BinomialLogits(v, 12), 3), (lambda v: dist.BernoulliLogits(v), 1)):
        found = jax.grad(lambda v, law=law, y=y: log_density(law(v), y))(0.0)
        np.testing.assert_allclose(found, y - (12 if y == 3 else 1) / 2, rtol=1e-12)
        np.testing.assert_allclose(log_density(law(0.7), y), law(0.7).log_prob(y), rtol=1e-12)

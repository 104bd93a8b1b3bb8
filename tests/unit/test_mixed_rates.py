"""Negative binomial means that are sums: one update by NumPy, the end by SciPy, and when it is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from scipy import optimize, stats

import autoem
from autoem.m_step import Augmented

KEY = jax.random.key(0)
BINS, PIXELS, R = 60, 6, 3.0
RNG = np.random.default_rng(2)
SYSTEM = RNG.uniform(size=(BINS, PIXELS)) * (RNG.uniform(size=(BINS, PIXELS)) < 0.6)
SYSTEM[SYSTEM.sum(1) == 0, 0] = 0.5
TRUTH = np.array([0.0, 5.0, 20.0, 0.0, 11.0, 3.0])
COUNTS = RNG.poisson(SYSTEM @ TRUTH * RNG.gamma(R, 1 / R, BINS))
WEIGHTS = RNG.integers(1, 4, BINS).astype(float)


def positive(name, value):
    return numpyro.param(name, value, constraint=constraints.positive)


def by_mean(system, y):
    with numpyro.plate("bins", len(y)):
        numpyro.sample("y", dist.NegativeBinomial2(system @ positive("theta", jnp.ones(PIXELS)), R), obs=y)


def by_rate(system, y):
    mean = system @ positive("theta", jnp.ones(PIXELS))
    with numpyro.plate("bins", len(y)):
        numpyro.sample("y", dist.GammaPoisson(R, R / mean), obs=y)


def other_scale(system, y):
    """The Gamma variable has mean 3: the rate is three times as large."""
    with numpyro.plate("bins", len(y)):
        numpyro.sample("y", dist.GammaPoisson(R, 1 / (system @ positive("theta", jnp.ones(PIXELS) / 3))), obs=y)


def concentration_free(system, y):
    r = positive("r", 1.0)
    with numpyro.plate("bins", len(y)):
        numpyro.sample("y", dist.NegativeBinomial2(system @ positive("theta", jnp.ones(PIXELS)) + 0.1, r), obs=y)


def fit(model, *args, **options):
    options = {"init": "model", "m_step": {"theta": Augmented()}, "progress": False} | options
    return autoem.EM(model, **options).run(KEY, *args)


def step(theta, weights=1.0, r=R):
    """theta_j sum_i a_ij y_i / mu_i / sum_i a_ij (r + y_i) / (r + mu_i)."""
    mean = SYSTEM @ theta
    return theta * (SYSTEM.T @ (weights * COUNTS / mean)) / (SYSTEM.T @ (weights * (r + COUNTS) / (r + mean)))


@pytest.mark.parametrize("model", [by_mean, by_rate, other_scale])
def test_every_way_to_write_it_gives_the_multiplicative_update(model):
    result = fit(model, SYSTEM, COUNTS, max_steps=3, tol=0.0)
    theta = np.ones(PIXELS)
    for _ in range(3):
        theta = step(theta)
    np.testing.assert_allclose(result.params["theta"] * (3 if model is other_scale else 1), theta, rtol=1e-10)
    assert "Poisson given a Gamma variable" in str(result.plan)


@pytest.mark.parametrize("counted", ["plain", "weighted", "masked"])
def test_the_end_is_that_of_scipy(counted):
    """SciPy's own negative binomial, maximised within bounds; the objective never falls on the way."""
    seen = np.arange(BINS) % 4 > 0
    weights, handler = {
        "plain": (np.ones(BINS), handlers.scale(scale=1.0)),
        "weighted": (WEIGHTS, handlers.scale(scale=WEIGHTS)),
        "masked": (seen * 1.0, handlers.mask(mask=seen)),
    }[counted]

    def model(system, y):
        with handler:
            by_mean(system, y)

    def loss(theta):
        mean = SYSTEM @ theta
        return -(weights * stats.nbinom.logpmf(COUNTS, R, R / (R + mean))).sum()

    bounds = [(1e-9, None)] * PIXELS
    best = optimize.minimize(loss, np.ones(PIXELS), bounds=bounds, options={"ftol": 1e-14, "gtol": 1e-9})
    result = fit(model, SYSTEM, COUNTS, max_steps=20_000, tol=1e-14)
    assert (np.diff(result.history) >= -1e-9).all()
    assert result.log_likelihood == pytest.approx(-best.fun, abs=1e-5)


def test_with_a_free_concentration_and_a_background():
    result, newton = (
        fit(concentration_free, SYSTEM, COUNTS, max_steps=20_000, tol=1e-13, m_step=m)
        for m in ({"theta": Augmented()}, None)
    )
    assert [b.names for b in result.plan.blocks] == [("theta",), ("r",)]
    assert result.log_likelihood >= newton.log_likelihood - 1e-4
    assert float(result.params["r"]) == pytest.approx(float(newton.params["r"]), rel=1e-2)


def test_a_gamma_prior_and_a_discrete_latent_beside():
    """Bins that are dimmed or not, unseen: SciPy maximises the mixture with the log prior of its Gamma."""

    def model(system, y):
        theta = numpyro.sample("theta", dist.Gamma(2.0, 0.2).expand([PIXELS]).to_event(1))
        with numpyro.plate("bins", len(y)):
            z = numpyro.sample("z", dist.Categorical(jnp.array([0.3, 0.7])))
            numpyro.sample("y", dist.NegativeBinomial2(jnp.array([0.4, 1.0])[z] * (system @ theta), R), obs=y)

    def loss(theta):
        parts = [
            np.log(w) + stats.nbinom.logpmf(COUNTS, R, R / (R + f * (SYSTEM @ theta)))
            for w, f in ((0.3, 0.4), (0.7, 1.0))
        ]
        return -np.logaddexp(*parts).sum() - stats.gamma.logpdf(theta, 2.0, scale=5.0).sum()

    bounds = [(1e-9, None)] * PIXELS
    best = optimize.minimize(loss, np.full(PIXELS, 5.0), bounds=bounds, options={"ftol": 1e-14, "gtol": 1e-9})
    result = fit(model, SYSTEM, COUNTS, max_steps=20_000, tol=1e-14)
    assert (np.diff(result.history) >= -1e-9).all()
    assert result.objective == pytest.approx(-best.fun, abs=1e-5)


def test_newton_is_for_few_and_the_split_for_many():
    plan = autoem.EM(by_mean, progress=False).plan(SYSTEM, COUNTS)
    assert plan.m_step("theta") == "Newton"
    assert 'm_step={"theta": Augmented()} would split its counts: Shepp and Vardi 1982' in " ".join(str(plan).split())
    assert any("Augmented" in a.strategy for a in plan.alternatives("theta"))

    def many(system, y):
        with numpyro.plate("bins", len(y)):
            numpyro.sample("y", dist.NegativeBinomial2(system @ positive("theta", jnp.ones(300)), R), obs=y)

    wide = np.random.default_rng(3).uniform(size=(BINS, 300))
    plan = autoem.EM(many, progress=False).plan(wide, COUNTS)
    assert plan.m_step("theta") == "closed form" and "superposition" in str(plan)
    mixed = autoem.EM(many, progress=False).plan(wide - 0.01, COUNTS)
    assert mixed.m_step("theta") == "gradient" and "negative coefficients" in str(mixed)
    asked = autoem.EM(many, m_step=autoem.m_step.Gradient(), progress=False).plan(wide, COUNTS)
    assert asked.m_step("theta") == "gradient"


@pytest.mark.parametrize(
    ("law", "why"),
    [
        (lambda theta: dist.NegativeBinomial2(jnp.exp(SYSTEM @ theta), R), "not linear"),
        (lambda theta: dist.GammaPoisson(R, SYSTEM @ theta), "not written out"),
        (lambda theta: dist.NegativeBinomial2(SYSTEM @ theta, theta[0]), "elsewhere than in its mean"),
    ],
)
def test_what_is_no_sum_is_refused(law, why):
    def model(y):
        theta = positive("theta", jnp.ones(PIXELS))
        with numpyro.plate("bins", len(y)):
            numpyro.sample("y", law(theta), obs=y)

    with pytest.raises(autoem.PlanError, match=why):
        autoem.EM(model, m_step=Augmented(), progress=False).plan(COUNTS)

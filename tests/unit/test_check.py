"""`em.check`: it passes on what is right, fails on what is wrong, and says what it could not try."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem
from autoem.checks import check

KEY = jax.random.key(0)
RNG = np.random.default_rng(3)
X = np.concatenate([RNG.normal(0, 1, 60), RNG.normal(6, 1, 40)])


def mixture(x, k=2):
    weights = numpyro.param("weights", jnp.ones(k) / k, constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.linspace(0.0, 6.0, k))
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.Normal(loc[z], scale), obs=x)


def with_factor(x):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.factor("x", -0.5 * (x - loc - 3.0 * z) ** 2)


def _em(model=mixture, **options) -> autoem.EM:
    return autoem.EM(model, progress=False, **options)


def _named(report: check.Report, words: str) -> check.Check:
    return next(c for c in report.checks if words in c.name)


def test_a_right_derivation_passes_every_test():
    report = _em().check(KEY, X)
    assert report.ok, report
    assert report.tried == len(report.checks)
    assert str(report).count("[ok]") == len(report.checks)
    assert "16,384 completions of 14 rows" in _named(report, "completions").detail


@pytest.mark.parametrize("missing", ["error", "marginalize"])
def test_simulated_data_have_the_shape_and_the_gaps_of_the_data(missing):
    x = np.where(np.arange(100) % 7 == 0, np.nan, X) if missing == "marginalize" else X
    em = _em(missing=missing)
    result = em.run(KEY, x)
    call = check.Call(*em._derive((x,), {}), (x,), {})
    drawn = np.asarray(check.simulate(mixture, result.params, KEY, call)["x"])
    np.testing.assert_array_equal(np.isnan(drawn), np.isnan(x))
    assert abs(np.nanmean(drawn) - np.nanmean(x)) < 1.5


def test_data_of_another_model_do_not_lead_back(monkeypatch):
    monkeypatch.setattr(check, "simulate", lambda *a: {"x": jnp.asarray(X + 0.1 * X**2)})
    report = _em().check(KEY, X)
    assert not report.ok
    assert not _named(report, "simulated").ok
    assert "[FAILED] data simulated" in str(report)


def test_what_cannot_be_tried_is_marked_so():
    report = _em(with_factor).check(KEY, X[:30])
    assert report.ok, report
    assert not _named(report, "simulated").tried
    assert "[--] data simulated" in str(report)
    assert report.tried < len(report.checks)


def test_of_many_rows_a_few_thousand_are_taken():
    many = np.tile(X, 300)
    report = _em().check(KEY, many)
    assert report.ok, report
    assert "on 2,000 of 30,000 rows" in str(report)


def test_one_state_and_no_latent_are_no_trouble():
    assert _em().check(KEY, X, 1).ok
    report = _em(lambda x: numpyro.sample("x", dist.Normal(numpyro.param("m", 0.0), 1.0).expand([100]), obs=x))
    assert report.check(KEY, X).ok


def test_a_sum_that_is_all_but_zero_hides_no_slope():
    """The square of such a rate underflows: what came of dividing by it was no number, and passed for none."""
    system = np.eye(6)[:, :5] + 0.2
    system[5], system[:5, 4], system[0, 4] = np.eye(5)[4], 0, 0.1  # the last bin sees the last entry alone
    counts = np.array([9, 4, 7, 0, 3, 0])

    def scan(system, counts):
        start = jnp.array([1.0, 1.0, 1.0, 1.0, 1e-200])
        activity = numpyro.param("activity", start, constraint=constraints.positive)
        with numpyro.plate("bins", 6):
            numpyro.sample("counts", dist.Poisson(system @ activity), obs=counts)

    for tol, ok in ((1e-1, False), (1e-14, True)):
        report = _em(scan, init="model", tol=tol, max_steps=20_000).check(KEY, system, counts)
        assert _named(report, "at convergence").ok == ok, report

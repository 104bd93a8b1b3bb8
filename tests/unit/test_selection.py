"""Model selection against answers found without it: R's mclust, numpy, the t distribution, and single fits."""

import functools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy import stats

import autoem
from autoem.selection._batch import fit_many
from autoem.selection._rows import deal
from tests.reference.cases import matrix

matplotlib.use("Agg")
KEY = jax.random.key(0)
RNG = np.random.default_rng(3)
FEW = {"restarts": 4, "progress": False}


def mixture(x, k=2, shared=False, centre=False):
    n, d = x.shape
    if centre:
        x = x - x.mean(0)
    weights = numpyro.param("weights", jnp.ones(k) / k, constraint=constraints.simplex)
    loc = numpyro.param("loc", lambda key: jax.random.normal(key, (k, d)))
    start = jnp.eye(d) if shared else jnp.tile(jnp.eye(d), (k, 1, 1))
    cov = numpyro.param("cov", start, constraint=constraints.positive_definite)
    with numpyro.plate("eruptions", n):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.MultivariateNormal(loc[z], cov if shared else cov[z]), obs=x)


def normal(y, moved=False):
    loc = numpyro.param("loc", 0.0) if moved else 0.0
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(loc, sd), obs=y)


X = np.asarray(matrix("old_faithful.csv"))
Y = RNG.normal(0.3, 1.0, 20)


@pytest.fixture(scope="module")
def sweep():
    return autoem.select(mixture, {"k": [1, 2, 3], "shared": [True]}, KEY, X, em={"restarts": 8})


def test_bic_of_faithful_is_that_of_mclust(sweep):
    """mclust 6.0, model EEE, in its own sign: -2607.622, -2325.220, -2314.316; its choice of EEE and VVV is EEE, 3."""
    bic = [e.numbers["bic"] for e in sweep.entries]
    np.testing.assert_allclose(bic, [2607.622, 2325.220, 2314.316], atol=0.03)
    assert [e.numbers["num_params"] for e in sweep.entries] == [5, 8, 11]
    assert sweep.chosen == {"k": 3, "shared": True}
    assert sweep.best is sweep["k=3, shared=True"]
    np.testing.assert_allclose(sweep.lead(sweep.entries[1])[0], 10.904, atol=0.03)


def test_the_choice_is_told_and_shown(sweep):
    text = str(sweep)
    assert "BIC chooses k=3, shared=True: 10.92 below the next, k=2, shared=True: very strong evidence." in text
    assert "k=3 is the largest that was tried" in text
    assert "<b>k=3, shared=True</b>" in sweep._repr_html_()
    axes = sweep.plot()
    assert axes.get_xlabel() == "k" and axes.get_ylabel() == "BIC"
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [e.numbers["bic"] for e in sweep.entries])
    with pytest.raises(KeyError, match="there are"):
        sweep["k=9"]


def test_the_table_is_a_pandas_frame(sweep):
    pytest.importorskip("pandas")
    frame = sweep.table
    assert frame["bic"].idxmin() == "k=3, shared=True" and list(frame["k"]) == [1, 2, 3]
    assert frame.loc["k=3, shared=True", "difference"] == 0
    assert list(frame["num_params"]) == [5, 8, 11] and frame["status"].str.startswith("converged").all()


def test_a_structure_that_fails_is_a_row_with_its_reason():
    def model(y, kind):
        sd = numpyro.param("sd", jnp.ones(2), constraint=constraints.positive)
        loc = numpyro.param("loc", y[:2])
        with numpyro.plate("n", len(y)):
            z = numpyro.sample("z", dist.Poisson(2.0)) if kind == "infinite" else 0
            if kind == "unbounded":
                z = numpyro.sample("z", dist.Bernoulli(0.5))
                sd = jnp.stack([sd[0], sd[1]])
            numpyro.sample("y", dist.Normal(loc[z], sd[z]), obs=y)

    y = np.concatenate([np.zeros(8), RNG.normal(5, 1, 12)])
    selection = autoem.select(model, {"kind": ["plain", "infinite", "unbounded"]}, KEY, y, em=FEW)
    reasons = {e.structure.setting["kind"]: e.reason for e in selection.entries}
    assert not reasons["plain"]
    assert reasons["infinite"].startswith("PlanError") or reasons["infinite"].startswith("ModelError")
    assert "without bound" in reasons["unbounded"]
    assert selection.chosen == {"kind": "plain"}
    assert "the only structure that could be fitted" in str(selection)
    assert "2 of 3 structures have no score" in str(selection)


def test_held_out_scores_are_those_of_fits_without_the_rows():
    """Of one Gaussian, numpy gives each training set's estimates, and scipy the density of the rows held out."""
    selection = autoem.select(
        {"origin": normal, "moved": functools.partial(normal, moved=True)}, None, KEY, Y, criterion="heldout", folds=6
    )
    to_deal = jax.random.split(jax.random.fold_in(KEY, 2))[0]
    fold, training = deal(len(Y), 6, to_deal)
    assert {len(t) for t in training} == {16}
    assert all(not set(t) & set(np.flatnonzero(fold == f)) for f, t in enumerate(training))
    for entry, moved in zip(selection.entries, (False, True), strict=True):
        expected = np.empty(len(Y))
        for f, chosen in enumerate(training):
            loc = Y[chosen].mean() if moved else 0.0
            sd = np.sqrt(((Y[chosen] - loc) ** 2).mean())
            expected[fold == f] = stats.norm.logpdf(Y[fold == f], loc, sd)
        np.testing.assert_allclose(entry.held_out, expected, rtol=1e-6)
        np.testing.assert_allclose(entry.numbers["heldout_se"], expected.std(ddof=1) / np.sqrt(len(Y)), rtol=1e-6)
    assert "±" in selection.sentence and selection.plot().get_yticks().size == 2


def test_a_test_set_is_scored_whole():
    selection = autoem.select(
        normal, {"moved": [False, True]}, KEY, Y[:15], criterion="heldout", test=(Y[15:],), em={"restarts": 1}
    )
    expected = stats.norm.logpdf(Y[15:], 0.0, np.sqrt((Y[:15] ** 2).mean()))
    np.testing.assert_allclose(selection.entries[0].held_out, expected, rtol=1e-6)


def test_many_fits_at_once_are_the_single_fits():
    """Eight resampled data sets, one compiled loop; each ends where a fit of its own ends."""
    start = {"loc": [[2.0, 54.0], [4.3, 80.0]], "cov": np.cov(X.T)}
    em = autoem.EM(functools.partial(mixture, k=2), init=start, progress=False)
    sets = [X[RNG.integers(0, len(X), len(X))] for _ in range(8)]
    ends = fit_many(em, [((s,), {}) for s in sets], KEY)
    assert ends.together and len(ends) == 8
    assert [k[0] for k in em._batches] == ["many"]
    singles = [em.run(KEY, s) for s in sets[:3]]
    np.testing.assert_allclose(ends.log_likelihood[:3], [r.log_likelihood for r in singles], rtol=1e-8)
    np.testing.assert_allclose(ends.params["loc"][:3], [r.params["loc"] for r in singles], rtol=1e-4)
    assert list(ends.num_steps[:3]) == [r.num_steps for r in singles]
    (loop,) = (f for k, f in em._batches.items() if k[0] == "many")
    assert len(loop._compiled) == 1


@pytest.mark.parametrize("most", [1, 70], ids=["one after the other", "in batches of a few"])
def test_what_does_not_fit_in_memory_at_once_ends_the_same(monkeypatch, most):
    em = autoem.EM(functools.partial(normal, moved=True), progress=False)
    sets = [((RNG.normal(1, 2, 20),), {}) for _ in range(5)]
    monkeypatch.setattr("autoem.selection._batch.VMAP_UP_TO", most)
    ends = fit_many(em, sets, KEY)
    assert ends.together == (most > 1)
    np.testing.assert_allclose(ends.params["loc"], [y.mean() for (y,), _ in sets], rtol=1e-6)
    np.testing.assert_allclose(ends.params["sd"], [y.std() for (y,), _ in sets], rtol=1e-6)


def test_the_bootstrap_gives_the_p_value_of_the_t_test():
    """Of one Gaussian, the statistic is n log(1 + t²/(n - 1)), whose law under the null is known."""
    null, moved = (autoem.EM(functools.partial(normal, moved=m), progress=False).run(KEY, Y) for m in (False, True))
    test = autoem.bootstrap_test(null, moved, jax.random.key(1), num=199)
    n, t = len(Y), stats.ttest_1samp(Y, 0.0)
    np.testing.assert_allclose(test.statistic, n * np.log1p(t.statistic**2 / (n - 1)), rtol=1e-6)
    assert abs(test.p_value - t.pvalue) < 4 * np.sqrt(t.pvalue * (1 - t.pvalue) / 199)
    as_t = np.sqrt((n - 1) * np.expm1(test.null / n))
    # one false alarm in a thousand, at a fixed seed
    assert stats.kstest(2 * stats.t.sf(as_t, n - 1), "uniform").pvalue > 1e-3
    assert test.p_value == (1 + np.sum(test.null >= test.statistic)) / 200
    np.testing.assert_allclose(test.null_params["sd"].std(), test.null_params["sd"].mean() / np.sqrt(2 * n), rtol=0.15)
    assert f"p = {test.p_value:.4g}" in str(test)
    assert len(test.plot().patches) > 5


@pytest.mark.slow
def test_two_components_of_faithful_are_not_one():
    """mclustBootstrapLRT (mclust 6.0, VVV, 1 against 2): statistic 319.065, p the smallest there is."""
    fits = [autoem.EM(functools.partial(mixture, k=k), **FEW).run(KEY, X) for k in (1, 2)]
    test = autoem.bootstrap_test(*fits, KEY, num=19, restarts=2)
    np.testing.assert_allclose(test.statistic, 319.065354, atol=1e-3)
    assert test.p_value == 0.05 and test.null.max() < 100


def test_holes_in_the_data_are_holes_in_the_draws():
    from autoem.selection._simulate import draws

    y = np.where(np.arange(20) % 7 == 3, np.nan, Y)
    result = autoem.EM(normal, missing="marginalize", progress=False).run(KEY, y)
    drawn = draws(result, KEY, 5)["y"]
    assert drawn.shape == (6, 20)
    np.testing.assert_array_equal(np.isnan(drawn), np.tile(np.isnan(y), (6, 1)))
    np.testing.assert_array_equal(drawn[0], y)
    assert len({float(np.nansum(d)) for d in drawn}) == 6


def test_aic_and_bic_are_those_of_scikit_learn(sweep):
    """The same parameters put into a GaussianMixture, which counts its own parameters and evaluates its own density."""
    mixture_of = pytest.importorskip("sklearn.mixture").GaussianMixture
    result = sweep.best
    other = mixture_of(3, covariance_type="tied")
    other.weights_, other.means_, other.covariances_ = (np.asarray(result.params[n]) for n in ("weights", "loc", "cov"))
    other.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(other.covariances_))
    np.testing.assert_allclose(result.bic, other.bic(X), rtol=1e-9)
    np.testing.assert_allclose(result.aic, other.aic(X), rtol=1e-9)

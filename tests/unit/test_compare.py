"""One model under several strategies: the table against its parts run by hand, and what becomes of what fails."""

import inspect
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem
from autoem.baselines import SVI, AbstractBaseline, Fit, GradientAscent
from autoem.comparison.strategies import options_of

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = np.concatenate([RNG.normal(-2, 1, 60), RNG.normal(2, 1, 100)])
NEW = np.array([-1.0, 0.0, 3.0])


def mixture(x):
    weights = numpyro.param("weights", jnp.array([0.4, 0.6]), constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.array([-1.0, 1.0]))
    variance = numpyro.sample("variance", dist.InverseGamma(2.0, 1.0))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.Normal(loc[z], jnp.sqrt(variance)), obs=x)


def density(params, x):
    """Log density of the data by NumPy."""
    w, loc, s = params["weights"], params["loc"], np.sqrt(params["variance"])
    each = w * np.exp(-0.5 * ((x[:, None] - loc) / s) ** 2) / (s * np.sqrt(2 * np.pi))
    return np.log(each.sum(1)).sum()


class Refuses(AbstractBaseline):
    def prepare(self, target):
        raise ZeroDivisionError("5 < 6 & <b>so</b>")


class Interrupted(AbstractBaseline):
    def prepare(self, target):
        raise KeyboardInterrupt


class InterruptedLater(AbstractBaseline):
    """Broken off in its second run, which only takes the time."""

    def prepare(self, target):
        runs = []

        def run(key):
            runs.append(key)
            if len(runs) > 1:
                raise KeyboardInterrupt
            return Fit(target.starts[0], -1.0, "nothing", np.array([-1.0]), 1, "ran")

        return run


@pytest.fixture(scope="module")
def comparison():
    strategies = {
        "plain": None,
        "squarem": autoem.accelerate.Squarem(),
        "few": {"max_steps": 2},
        "adam": GradientAscent(steps=500),
        "svi": SVI(steps=600),
        "<fails>": Refuses(),
        "odd": 3,
    }
    return autoem.compare(autoem.EM(mixture, tol=1e-12), strategies, KEY, X, held_out=(NEW,))


def test_em_is_as_it_is_by_hand(comparison):
    result = autoem.EM(mixture, tol=1e-12, progress=False).run(KEY, X)
    row = comparison["plain"]
    np.testing.assert_array_equal(row.history, result.history)
    np.testing.assert_array_equal(row.params["loc"], result.params["loc"])
    assert (row.num_steps, row.status) == (result.num_steps, result.status)
    assert row.held_out == pytest.approx(float(result.score(NEW).sum()), abs=1e-9)
    np.testing.assert_allclose(row.latents.marginals["z"], result.posterior(X).marginals["z"], atol=1e-9)


@pytest.mark.parametrize("label", ["plain", "squarem", "few", "adam", "svi"])
def test_every_end_point_is_measured_by_one_yardstick(comparison, label):
    row = comparison[label]
    prior = float(dist.InverseGamma(2.0, 1.0).log_prob(row.params["variance"]))
    assert row.log_likelihood == pytest.approx(density(row.params, X), abs=1e-8)
    assert row.log_joint == pytest.approx(density(row.params, X) + prior, abs=1e-8)
    assert row.held_out == pytest.approx(density(row.params, NEW), abs=1e-8)
    assert row.seconds > 0 <= row.compilation
    assert row.history[0] == pytest.approx(comparison["plain"].history[0], abs=1e-8)  # the same start


def test_all_reach_the_maximum_but_those_that_do_not_try(comparison):
    top = comparison["plain"].log_joint
    assert [abs(comparison[n].log_joint - top) < 1e-5 for n in ("squarem", "adam", "svi")] == [True] * 3
    assert comparison["few"].log_joint < top
    assert comparison.best == pytest.approx(top, abs=1e-6)
    assert comparison["svi"].gap == pytest.approx(0, abs=1e-8)  # nothing but discrete latents: the bound is tight


def test_distances_are_from_the_reference(comparison):
    plain, few = comparison["plain"], comparison["few"]
    squares = [((few.params[n] - v) ** 2).sum() / (v**2).sum() for n, v in plain.params.items()]
    assert comparison.reference == "plain"
    assert (plain.distance, plain.variation) == (0, 0)
    assert few.distance == pytest.approx(np.sqrt(np.mean(squares)))
    apart = np.abs(few.latents.marginals["z"] - plain.latents.marginals["z"])[:, 0]
    assert few.variation == pytest.approx(apart.mean())


def test_a_failure_is_a_row(comparison):
    row = comparison["<fails>"]
    assert isinstance(row.error, ZeroDivisionError)
    assert row.status == "failed: ZeroDivisionError: 5 < 6 & <b>so</b>"
    assert not row.ended and np.isnan(row.log_joint)
    assert "strategy 'odd': 3 is no strategy" in comparison["odd"].status


def test_the_table_without_pandas(comparison, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    text = str(comparison)
    lines = {line.split("  ")[0]: line for line in text.splitlines() if "  " in line}
    assert f"{comparison['plain'].log_joint:.4f}" in lines["plain"]
    assert lines["strategy"].split("  ")[-1] == "variation"
    assert "shift" not in lines["strategy"]  # nothing is continuous
    with pytest.raises(ImportError, match="pip install pandas"):
        comparison.table  # noqa: B018


def test_the_table_of_pandas(comparison):
    pandas = pytest.importorskip("pandas")
    table = comparison.table
    assert isinstance(table, pandas.DataFrame)
    assert list(table.index) == [r.label for r in comparison.rows]
    assert table.loc["adam", "log-likelihood"] == comparison["adam"].log_likelihood
    assert table.loc["adam", "log-likelihood + log prior"] == comparison["adam"].log_joint
    assert table.loc["<fails>", "status"].startswith("failed")
    assert np.isnan(table.loc["odd", "seconds"])


def test_html_is_escaped(comparison):
    page = comparison._repr_html_()
    assert "&lt;fails&gt;" in page and "<fails>" not in page
    assert "5 &lt; 6 &amp; &lt;b&gt;so&lt;/b&gt;" in page
    tags = re.findall(r"</?([a-z]+)", page)
    assert set(tags) <= {"style", "div", "table", "thead", "tbody", "tr", "th", "td", "span", "p"}
    assert all(page.count(f"<{t}") == page.count(f"</{t}>") for t in ("tr", "td", "table", "div", "span"))


def test_the_verdict_names_who_is_level_and_who_is_not(comparison):
    first = comparison.verdict().splitlines()[0]
    assert first.startswith(f"Verdict: the highest log-likelihood + log prior is {comparison.best:.4f}, reached")
    assert all(f"'{n}'" in first for n in ("plain", "squarem", "adam", "svi"))
    assert "'few'" not in first


def test_seconds_to_a_level_are_counted_along_the_history(comparison):
    row = comparison["plain"]
    level = row.history[3]
    assert row.seconds_to(level) == pytest.approx(row.seconds * 3 / row.num_steps)
    assert row.seconds_to(row.log_joint + 1) == np.inf


def test_the_pictures_have_a_line_and_a_cell_for_each(comparison):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    progress, agreement = comparison.plot(), comparison.plot_agreement()
    labels = [t.get_text() for t in progress.legends[0].get_texts()]
    assert labels == ["plain", "squarem", "few", "adam", "svi"]
    assert [a.get_xlabel() for a in progress.axes] == ["seconds, compiled already", "steps"]
    titles = [a.get_title() for a in agreement.axes]
    assert titles == ["discrete latents: total variation", "parameters: relative distance"]
    assert all(len(a.texts) == 25 for a in agreement.axes)
    pyplot.close("all")


def linear(x, y):
    slope, noise = numpyro.param("slope", 0.0), numpyro.param("noise", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(slope * x, noise), obs=y)


def test_an_interrupt_keeps_what_is_done():
    strategies = {"done": None, "broken off": Interrupted(), "never": None}
    found = autoem.compare(linear, strategies, KEY, np.arange(5.0), np.arange(5.0) + RNG.normal(size=5))
    assert found["done"].ended and found["done"].seconds > 0
    assert found["broken off"].status == "interrupted before it had an end point"
    assert found["never"].status == "not run: interrupted before"


def test_an_interrupt_of_the_second_run_keeps_the_end_point_of_the_first():
    strategies = {"twice": InterruptedLater(), "never": None}
    found = autoem.compare(linear, strategies, KEY, np.arange(5.0), np.arange(5.0) + RNG.normal(size=5))
    assert found["twice"].ended and np.isfinite(found["twice"].log_likelihood)
    assert found["twice"].status == "interrupted as its time was taken again; ran"
    assert found["never"].status == "not run: interrupted before"


def test_every_option_of_em_is_carried_over():
    options = set(inspect.signature(autoem.EM).parameters) - {"model"}
    assert set(options_of(autoem.EM(linear))) == options


def test_a_baseline_that_wins_is_said_to():
    """EM that may make a single step of a slow map, against the ascent that goes on."""
    strategies = {"short": {"max_steps": 1}, "adam": GradientAscent(steps=500)}
    found = autoem.compare(mixture, strategies, KEY, X)
    assert "a baseline wins in log-likelihood ('adam') and in time ('adam')" in found.verdict()


def test_strategies_may_be_em_objects_of_the_same_model():
    x, y = np.arange(5.0), np.arange(5.0) + RNG.normal(size=5)
    strategies = {"own": autoem.EM(linear, max_steps=7), "other": autoem.EM(mixture), "start": {"init": "model"}}
    found = autoem.compare(linear, strategies, KEY, x, y, starts=2, reference="own", held_out={"x": x, "y": y})
    assert found["own"].held_out == pytest.approx(found["own"].log_likelihood)
    assert "this EM is of another model" in found["other"].status
    assert "init= would give it a start of its own" in found["start"].status


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"strategies": {}}, autoem.PlanError, "with at least one"),
        ({"strategies": [None]}, autoem.PlanError, "must be a dict by label"),
        ({"strategies": {1: None}}, autoem.PlanError, "the label 1 is no string"),
        ({"reference": "who"}, autoem.PlanError, "'who' is none of the strategies"),
        ({"starts": 0}, ValueError, r"compare\(starts=0\)"),
        ({"held_out": 3.0}, autoem.DataError, "held_out must be the model's arguments"),
    ],
)
def test_what_is_asked_wrongly_is_refused_at_once(options, error, words):
    strategies = options.pop("strategies", {"plain": None})
    with pytest.raises(error, match=words):
        autoem.compare(linear, strategies, KEY, np.arange(5.0), np.arange(5.0), **options)

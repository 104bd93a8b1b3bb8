"""What is refused names the place, the problem and the mend, whatever in model, data or options is wrong."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem
from autoem import DataError, ModelError, PlanError

X = np.array([0, 1, 1, 2, 9, 8, 11, 0])
Y = np.array([0.1, -0.4, 1.2, 4.0, 5.5, 3.9, 0.3, 4.4])
WIDE = np.stack([Y, Y[::-1]], 1)
KEY = jax.random.key(0)


def counts(x, k=2):
    weights = numpyro.param("weights", jnp.ones(k) / k, constraint=constraints.simplex)
    rate = numpyro.param("rate", jnp.arange(1.0, k + 1), constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.Poisson(rate[z]), obs=x)


def priors(x):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    with numpyro.plate("data", x.shape[0]):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(mean * z, scale), obs=x)


def observing(distribution: Callable[..., Any]) -> Callable:
    """A model of two states whose observed site is `distribution(state's parameter)`."""

    def model(x):
        theta = numpyro.param("theta", jnp.array([0.3, 0.7]), constraint=constraints.unit_interval)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            numpyro.sample("x", distribution(theta[z]), obs=x)

    return model


def _plan(model: Callable, *args, **options) -> autoem.Plan:
    return autoem.EM(model, progress=False, **options).plan(*args)


def _run(model: Callable, *args, **options) -> autoem.EMResult:
    return autoem.EM(model, progress=False, max_steps=5, **options).run(KEY, *args)


def test_misspelt_names_are_answered_with_the_nearest():
    for option in ("latent", "maximize"):
        with pytest.raises(PlanError, match=r"'meen'.*\n.*did you mean 'mean'"):
            _plan(priors, Y, **{option: ["meen"]})
    with pytest.raises(KeyError, match=r"did you mean 'rate'"):
        _plan(counts, X).m_step("rates")


def test_names_of_the_wrong_kind_say_what_they_are():
    with pytest.raises(PlanError, match=r"already a parameter"):
        _plan(counts, X, maximize=["rate"])
    with pytest.raises(PlanError, match=r"a discrete latent"):
        _plan(counts, X, maximize=["z"])


@pytest.mark.parametrize(
    ("args", "kwargs", "problem"),
    [((), {}, "missing.*'x'"), ((X, 2, 3), {}, "too many"), ((X,), {"states": 3}, "unexpected.*'states'")],
)
def test_wrong_arguments_are_answered_with_the_signature(args, kwargs, problem):
    with pytest.raises(ModelError, match=rf"'counts'.*{problem}.*\n.*counts\(x, k=2\)"):
        autoem.EM(counts).plan(*args, **kwargs)


def forgotten(x):
    loc = numpyro.param("loc", jnp.array([0.0, 1.0]))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(loc[z], 1.0))


def forgotten_besides(values, y):
    loc = numpyro.param("loc", jnp.array([0.0, 1.0]))
    with numpyro.plate("data", len(values)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(loc[z], 1.0))
        numpyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def unread(x, extra):
    loc = numpyro.param("loc", 0.0)
    numpyro.param("idle", 0.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_a_forgotten_obs_is_found():
    with pytest.raises(ModelError, match=r"site 'x': argument 'x' reaches no observed site.*\n.*obs=x"):
        _plan(forgotten, Y)
    with pytest.raises(ModelError, match=r"argument 'values' reaches no site"):
        _plan(forgotten_besides, Y, Y)


def test_what_nothing_reads_is_noted_in_the_plan():
    plan = _plan(unread, Y, WIDE)
    assert any("'extra'" in n for n in plan.notes)
    assert any("'idle'" in n for n in plan.notes)
    assert plan.m_step("idle") == "fixed"
    assert float(_run(unread, Y, WIDE).params["idle"]) == 0.0


def test_the_plan_checks_the_start_as_the_run_does():
    for init, problem in (({"meen": 0.0}, "did you mean 'mean'"), ({"mean": np.zeros(3)}, "has shape")):
        for ask in (_plan, _run):
            with pytest.raises((PlanError, DataError), match=problem):
                ask(priors, Y, init=init)


SHARES = np.array([0.2, 0.9, 0.4, 0.7])
OPEN = {
    "Beta": lambda a: dist.Beta(a, 2.0),
    "BetaProportion": lambda a: dist.BetaProportion(0.3, a),
    "Kumaraswamy": lambda a: dist.Kumaraswamy(a, 2.0),
}


def shares(x, distribution):
    a = numpyro.param("a", 1.5, constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", distribution(a), obs=x)


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_shares_of_exactly_zero_or_one_are_refused(name, edge):
    with pytest.raises(DataError, match=rf"site 'x': 1 of its values is exactly 0 or 1.*row 2: {edge}\n.*inside"):
        _run(shares, np.insert(SHARES, 2, edge), OPEN[name])
    assert np.isfinite(_run(shares, SHARES, OPEN[name]).log_likelihood)


def test_a_composition_with_a_zero_is_refused():
    def model(x):
        a = numpyro.param("a", jnp.ones(3), constraint=constraints.positive)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Dirichlet(a), obs=x)

    with pytest.raises(DataError, match="2 of its values are exactly 0 or 1, where a Dirichlet"):
        _run(model, np.array([[0.2, 0.3, 0.5], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]))


def sequence(y):
    trans = numpyro.param("trans", jnp.array([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
    stationary = jnp.linalg.solve((jnp.eye(2) - trans + 1.0).T, jnp.ones(2))

    def step(carry, x):
        z, t = carry
        z = numpyro.sample("z", dist.Categorical(jnp.where(t == 0, stationary, trans[z])))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=x)
        return (z, t + 1), None

    scan(step, (0, 0), y)


def test_a_list_that_a_scan_runs_over_is_refused():
    for data in ([0.1, 2.0], [[0.1, 2.0], [1.0, 1.0]], 0.3):
        with pytest.raises(DataError, match=r"scan 'step': it runs over something without a time axis.*\n.*asarray"):
            _run(sequence, data)


def test_a_stationary_start_is_told_in_words():
    plan = str(_plan(sequence, Y))
    assert "it enters a sum in the probs of 'z' at the first step, so its expected counts do not give it" in " ".join(
        plan.split()
    )


def nothing_at_all(x):
    numpyro.param("loc", 0.0)


def latent_only(x):
    numpyro.sample("z", dist.Bernoulli(0.5))


def columns(data):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("rows", len(data["y"])):
        numpyro.sample("y", dist.Normal(loc, 1.0), obs=data["y"])


def test_columns_that_are_not_read_are_no_concern():
    assert not _plan(columns, {"y": Y, "t": X}).notes


def one_for_all(x):
    loc = numpyro.param("loc", jnp.array([0.0, 1.0]))
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def without_plate(x):
    loc = numpyro.param("loc", jnp.array([0.0, 1.0]))
    numpyro.sample("x", dist.Normal(loc[numpyro.sample("z", dist.Bernoulli(0.5))], 1.0), obs=x)


def test_a_forgotten_plate_is_told():
    assert "one value for all rows of rows" in str(_plan(one_for_all, Y))
    with pytest.raises(DataError, match=r'numpyro.plate\("data", 8\)'):
        _plan(without_plate, Y)


def numpy_table(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(np.array([0.0, 1.0])[z], 1.0), obs=x)


def test_a_numpy_table_indexed_by_a_latent_names_its_line():
    with pytest.raises(ModelError, match=r"line \d+ of test_errors.py(.|\n)*jnp.asarray\(table\)\[z\]"):
        _plan(numpy_table, Y)


def test_a_model_that_observes_nothing_is_refused():
    for model in (nothing_at_all, latent_only):
        with pytest.raises(ModelError, match=r"observes nothing"):
            _plan(model, Y)


@pytest.mark.parametrize(
    "data",
    [[0, 1, 1, 2], (0, 1, 1, 2), np.array(["a", "b"]), np.array([1, None, 2], object), Y + 0j],
    ids=["list", "tuple", "strings", "objects", "complex"],
)
def test_data_that_are_no_numbers_are_refused(data):
    with pytest.raises(DataError, match=r"'x'.*no array of numbers"):
        _run(counts, data)


def test_labels_are_told_from_numbers_that_are_objects():
    with pytest.raises(DataError, match=r"np.unique"):
        _run(counts, np.array(["a", "b"], object))
    with pytest.raises(DataError, match=r"np.asarray\(values, float\)"):
        _run(counts, np.array([1, 2, None], object))


class Series:
    """Stands for a column of pandas or polars."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.dtype, self.shape = self.values.dtype, self.values.shape

    def __array__(self, dtype=None, copy=None):
        return self.values if dtype is None else self.values.astype(dtype)

    def __len__(self):
        return len(self.values)


class Frame(Series):
    columns = ("a", "b")


def test_series_of_numbers_are_taken_as_arrays():
    np.testing.assert_allclose(_run(counts, Series(X)).log_likelihood, _run(counts, X).log_likelihood)


def test_series_of_labels_and_frames_are_refused():
    with pytest.raises(DataError, match=r"'x'.*\n.*np.unique"):
        _run(counts, Series(["a", "b"]))
    with pytest.raises(DataError, match=r"'x'.*Frame.*\n.*x.to_numpy\(\)"):
        _run(counts, Frame(WIDE))


def test_a_mask_is_not_dropped_in_silence():
    with pytest.raises(DataError, match=r"'x'.*masked array(.|\n)*filled\(np.nan\)"):
        _run(counts, np.ma.masked_less(X, 1))


@pytest.mark.parametrize("data", [3, np.float64(3), None])
def test_a_scalar_in_place_of_rows_names_the_line(data):
    with pytest.raises(
        ModelError, match=r"line \d+ of test_errors.py, `with numpyro.plate(.|\n)*x: (.|\n)*a row for each"
    ):
        _run(counts, data)


def vectors(x):
    loc = numpyro.param("loc", jnp.zeros(x.shape[1]))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.MultivariateNormal(loc, jnp.eye(x.shape[1])), obs=x)


def test_empty_data_name_the_plate_and_the_argument():
    with pytest.raises(DataError, match=r"'data': this plate is empty; argument 'x' has shape"):
        _run(counts, np.array([], int))
    with pytest.raises(DataError, match=r"'rows': this plate is empty; argument 'x' has shape"):
        _run(vectors, np.zeros((0, 2)))
    with pytest.raises(DataError, match=r"one column"):
        _run(vectors, np.zeros((5, 0)))


@pytest.mark.parametrize(
    ("distribution", "bad", "value"),
    [
        (dist.Poisson, -2, "-2"),
        (dist.Bernoulli, 2, "2"),
        (lambda t: dist.Gamma(2.0, t), 0.0, "0.0"),
        (dist.Exponential, np.inf, "inf"),
        (dist.Geometric, 1.5, "1.5"),
    ],
)
def test_the_first_bad_row_is_named(distribution, bad, value):
    data = np.array([1.0, 1.0, 1.0, bad, 1.0, bad])
    with pytest.raises(DataError, match=rf"'x'.*first in row 3: {value}"):
        _run(observing(distribution), data)


def test_nan_is_named_with_its_row():
    with pytest.raises(DataError, match=r"1 entry is NaN .first in row 3"):
        _run(priors, np.where(np.arange(8) == 3, np.nan, Y))


def categories(x):
    p = numpyro.param("p", jnp.ones((2, 3)) / 3 + jnp.array([[0.2], [-0.2]]) * jnp.array([1, 0, -1]))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Categorical(logits=p[z]), obs=x)


def test_whole_floats_are_categories_and_others_are_refused():
    whole = np.array([0, 1, 2, 2, 1, 0, 0])
    expected = _run(categories, whole).log_likelihood
    np.testing.assert_allclose(_run(categories, whole.astype(float)).log_likelihood, expected)
    with_nan = np.append(whole, np.nan)
    found = _run(categories, with_nan, missing="marginalize").log_likelihood
    np.testing.assert_allclose(found, expected)
    with pytest.raises(DataError, match=r"NaN .first in row 7"):
        _run(categories, with_nan)
    with pytest.raises(DataError, match=r"first in row 7: 0.5"):
        _run(categories, np.append(whole, 0.5))


@pytest.mark.parametrize(("data", "mend"), [(X[:, None], r"data\[:, 0\]"), (WIDE, "2 columns")])
def test_shapes_that_do_not_fit_are_mended(data, mend):
    with pytest.raises(DataError, match=mend):
        _run(counts, data)


def same_site(x):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        numpyro.sample("x", dist.Normal(loc, 2.0), obs=x)


def same_as_param(x):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("loc", dist.Normal(loc, 1.0), obs=x)


def same_as_plate(x):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("x", len(x)):
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def same_plate(x):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    with numpyro.plate("data", 3):
        numpyro.sample("y", dist.Normal(loc, 1.0), obs=x[:3])


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (same_site, "two sample sites"),
        (same_as_param, "a parameter and a sample site"),
        (same_as_plate, "a plate and a sample site"),
        (same_plate, "two plates of different sizes .8 and 3."),
    ],
)
def test_a_name_used_twice_is_refused(model, problem):
    with pytest.raises(ModelError, match=problem):
        _plan(model, Y)


def unstarted(x):
    rate = numpyro.param("rate", constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Poisson(rate), obs=x)


def misconstrained(x):
    rate = numpyro.param("rate", 1.0, constraint="positive")
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Poisson(rate), obs=x)


def test_parameters_without_start_or_constraint_are_refused():
    with pytest.raises(ModelError, match=r"'rate'.*no initial value.*\n.*numpyro.param\("):
        _plan(unstarted, X)
    with pytest.raises(ModelError, match=r"constraint='positive' is no constraint"):
        _plan(misconstrained, X)


def misspelt(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(lok, 1.0), obs=x)  # noqa: F821  # pyright: ignore


def wrong_shapes(x):
    slope = numpyro.param("slope", jnp.zeros(3))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ slope, 1.0), obs=x[:, 0])


def test_the_models_own_failure_names_its_line_and_arguments():
    with pytest.raises(ModelError, match=r"line \d+ of test_errors.py, `.*lok.*: NameError(.|\n)*x: float64\[8\]"):
        _plan(misspelt, Y)
    with pytest.raises(ModelError, match=r"x @ slope(.|\n)*x: float64\[8, 2\](.|\n)*check the shapes"):
        _plan(wrong_shapes, WIDE)


def hidden_counts(x):
    rate = numpyro.param("rate", 3.0, constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        n = numpyro.sample("n", dist.Poisson(rate))
        numpyro.sample("x", dist.Normal(n, 1.0), obs=x)


def test_a_latent_without_end_is_refused_with_its_truncation():
    with pytest.raises(PlanError, match=r"'n'.*no finite support(.|\n)*Truncated"):
        _plan(hidden_counts, Y)


def test_what_is_no_model_or_key_is_refused():
    with pytest.raises(TypeError, match=r"must be a NumPyro model"):
        autoem.EM("counts")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"jax.random.key\(0\)"):
        autoem.EM(counts).run(0, X)  # type: ignore[arg-type]


def labelled(names, x):
    """Reads labels in Python, which are part of the program."""
    kinds, of = np.unique(names, return_inverse=True)
    loc = numpyro.param("loc", jnp.zeros(len(kinds)))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(loc[of], 1.0), obs=x)


def test_labels_changed_in_place_are_read_anew():
    names, em = np.array(["a", "b"] * 4), autoem.EM(labelled, progress=False)
    first = np.asarray(em.run(KEY, names, Y).params["loc"])
    names[:] = ["a"] * 4 + ["b"] * 4
    second = np.asarray(em.run(KEY, names, Y).params["loc"])
    np.testing.assert_allclose(first, [Y[::2].mean(), Y[1::2].mean()])
    np.testing.assert_allclose(second, [Y[:4].mean(), Y[4:].mean()])


def test_a_forgotten_observation_of_a_site_without_finite_support() -> None:
    """The way out is obs=, not the truncation that a latent of this kind would need."""

    def model(counts):
        rate = numpyro.param("rate", 2.0, constraint=dist.constraints.positive)
        with numpyro.plate("rows", len(counts)):
            numpyro.sample("counts", dist.Poisson(rate))

    with pytest.raises(autoem.ModelError, match="obs=counts"):
        autoem.EM(model).plan(np.array([1, 2, 3]))

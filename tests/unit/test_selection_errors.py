"""What selection refuses, by name and with a mend: rows that cannot be left out, data that cannot be drawn again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem
from autoem.selection._bootstrap import told
from autoem.selection._grid import structures
from autoem.selection._rows import deal, row_arguments

KEY = jax.random.key(0)
Y = np.random.default_rng(5).normal(size=12)


def normal(y, moved=False, x=None, centre=False, weights=None, own=False):
    loc = numpyro.param("loc", 0.0) if moved else 0.0
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
    if own:
        loc, sd = numpyro.param("each", jnp.zeros(len(y))), 1.0
    if centre:
        y = y - y.mean()
    with numpyro.plate("n", len(y)), handlers.scale(scale=1.0 if weights is None else weights):
        numpyro.sample("y", dist.Normal(loc if x is None else loc * x, sd), obs=y)


def lagged(y, moved=False):
    slope = numpyro.param("slope", 0.1) if moved else 0.0
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
    with numpyro.plate("n", len(y) - 1):
        numpyro.sample("y", dist.Normal(slope * y[:-1], sd), obs=y[1:])


def chain(y, k=2):
    move = numpyro.param("move", 0.5 * jnp.eye(k) + 0.5 / k, constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.linspace(-1.0, 1.0, k))

    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(move[z]))
        numpyro.sample("y", dist.Normal(loc[z], 1), obs=y)
        return z, None

    scan(step, 0, y)


def sweep(model=normal, *args, grid=None, **options):
    options = {"criterion": "heldout", "folds": 4, "em": {"restarts": 1}} | options
    return autoem.select(model, grid or {"moved": [False, True]}, KEY, *(args or (Y,)), **options)


def fits(model=normal, *args, **kwargs):
    return [
        autoem.EM(functools.partial(model, moved=m), progress=False).run(KEY, *(args or (Y,)), **kwargs)
        for m in (False, True)
    ]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"centre": True}, autoem.PlanError, "changes with the rows around them"),
        ({"rows": ["z"]}, autoem.PlanError, "rows= names it, but it is no argument"),
        ({"rows": ["x"], "x": np.ones(1)}, autoem.PlanError, "its leading axis is not that of plate 'n', of size 12"),
        ({"folds": 13}, autoem.DataError, "12 rows cannot be dealt into 13 folds"),
        ({"folds": None}, ValueError, "give folds=10, or test="),
        ({"test": (Y,)}, ValueError, "not by both"),
        ({"criterion": "dic"}, ValueError, "choose among"),
        ({"grid": {"own": [True]}}, autoem.PlanError, "it has entries for rows held out"),
        ({"grid": {"depth": [1]}}, autoem.DataError, "the model takes"),
        ({"grid": {"moved": True}}, autoem.DataError, "are no list"),
        ({"grid": {"moved": [True, True]}}, autoem.DataError, "stands in it twice"),
        ({"grid": {"moved": []}}, autoem.DataError, "no structures to try"),
    ],
    ids=lambda x: str(x)[:24] if isinstance(x, dict) else "",
)
def test_sweeps_that_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        sweep(**options)


def test_a_chain_has_no_rows_to_hold_out():
    with pytest.raises(autoem.PlanError, match="no plate of rows that are independent"):
        sweep(chain, grid={"k": [2]})


def test_structures_that_observe_different_data_are_not_compared():
    def model(y, last=12):
        normal(y[:last], moved=True)

    with pytest.raises(autoem.PlanError, match="last=6 observes 6"):
        sweep(model, grid={"last": [12, 6]})


def test_no_structure_at_all():
    def model(y, power):
        numpyro.sample("z", dist.Poisson(2.0))
        numpyro.sample("y", dist.Normal(0, 1), obs=jnp.zeros(3) + power + y[:3])

    with pytest.raises(autoem.PlanError, match="none of the 2 structures could be fitted"):
        sweep(model, grid={"power": [1, 2]})


def test_every_array_with_a_row_for_each_datum_is_cut():
    result = autoem.EM(normal, progress=False).run(KEY, Y, x=np.ones(12))
    assert row_arguments(result, None) == [0, 1] and row_arguments(result, ["y"]) == [0]
    square = autoem.EM(lambda y: normal(y[:, 0]), progress=False).run(KEY, np.ones((12, 12)) * Y[:, None])
    with pytest.raises(autoem.PlanError, match="several axes of its size"):
        row_arguments(square, None)


def test_a_structure_whose_rows_cannot_be_held_out_is_a_row_with_its_reason():
    selection = sweep(grid={"moved": [True], "own": [False, True]})
    plain, own = selection.entries
    assert not plain.reason and plain.numbers["heldout"] < 0
    assert own.reason.startswith("PlanError: site 'each'") and selection.ranked == [plain]


def test_labels_and_folds():
    assert [s.label for s in structures({"a": normal, "b": normal}, {"moved": [False, True]})] == [
        "a, moved=False", "a, moved=True", "b, moved=False", "b, moved=True",
    ]  # fmt: skip
    fold, training = deal(11, 3, KEY)
    assert sorted(np.bincount(fold)) == [3, 4, 4] and {len(t) for t in training} == {7}


def test_data_that_cannot_be_drawn_again():
    with pytest.raises(autoem.PlanError, match="reads 'y', which is data of an observed site"):
        autoem.bootstrap_test(*fits(lagged), KEY, num=3)
    with pytest.raises(autoem.PlanError, match="weighted rows are no sample"):
        autoem.bootstrap_test(*fits(weights=jnp.arange(12.0)), KEY, num=3)


def test_fits_that_cannot_be_tested_against_each_other():
    small, large = fits()
    with pytest.raises(autoem.PlanError, match="no more free parameters"):
        autoem.bootstrap_test(large, small, KEY)
    other = autoem.EM(functools.partial(normal, moved=True), progress=False).run(KEY, Y + 1)
    with pytest.raises(autoem.DataError, match="fitted to other data"):
        autoem.bootstrap_test(small, other, KEY)
    notes = told(np.array([0.0, np.nan, 0.0, -0.2]), [-10.0, -10.0], (small, large))
    assert [n.split()[0] for n in notes] == ["1", "in", "the", "the", "the"]
    assert "at most 0.1 nats" in notes[1] and "it is stuck" in notes[2]
    assert told(np.full(3, np.nan), [-30.0, -29.0], (small, large))[0].startswith("3 fits of drawn data broke down")
    with pytest.raises(ValueError, match="num must be at least 1"):
        autoem.bootstrap_test(small, large, KEY, num=0)

"""Crossed effects: what is eliminated cell by cell and what is left as one vector give one dense normal's answers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import autoem
from autoem.e_step.gaussian import crossing
from autoem.e_step.gaussian.block import GaussianBlock
from autoem.e_step.gaussian.crossed import CrossedBlock
from tests.dense_gaussian import Dense
from tests.normal_law_models import flat
from tests.state_space_models import COVARIANCE, POSITIVE, SCATTER, normal, param

KEY = jax.random.key(0)


def ratings(y, student, item, counts):
    mu, of_student, of_item = param("mu", 0.3), param("of_student", 0.8, POSITIVE), param("of_item", 0.6, POSITIVE)
    sd = param("sd", 0.7, POSITIVE)
    with numpyro.plate("students", counts[0]):
        u = normal("u", 0.0, of_student)
    with numpyro.plate("items", counts[1]):
        v = normal("v", 0.0, of_item)
    with numpyro.plate("rows", len(y)):
        normal("y", mu + u[student] + v[item], sd, y)


def slopes(y, student, item, counts):
    """Two coordinates a student and two an item, of which rows read what a covariate weighs; some rows are masked."""
    scatter, sd = param("scatter", SCATTER, COVARIANCE), param("sd", 0.7, POSITIVE)
    of_item = param("of_item", [0.6, 0.3], POSITIVE)
    late = jnp.sin(jnp.arange(len(y)))
    with numpyro.plate("students", counts[0]):
        u = numpyro.sample("u", dist.MultivariateNormal(jnp.zeros(2), scatter))
    with numpyro.plate("items", counts[1]):
        v = numpyro.sample("v", dist.Normal(0.0, of_item).to_event(1))
    with numpyro.plate("rows", len(y)), handlers.mask(mask=np.arange(len(y)) % 7 > 0):
        normal("y", u[student, 0] + u[student, 1] * late + v[item, 0] + v[item, 1] * late, sd, y)


def family(y, pupil, room, item, day, counts):
    """Pupils in rooms, about the rooms' levels, with a second effect of each pupil; items and days cross them all."""
    starts = {"of_pupil": 0.8, "of_room": 0.5, "of_item": 0.6, "of_day": 0.4, "sd": 0.7}
    of_pupil, of_room, of_item, of_day, sd = (param(n, start, POSITIVE) for n, start in starts.items())
    with numpyro.plate("rooms", counts[1]):
        a = normal("a", 0.2, of_room)
    with numpyro.plate("pupils", counts[0]):
        u, w = normal("u", a[room], of_pupil), normal("w", 0.0, 0.5 * of_pupil)
    with numpyro.plate("items", counts[2]):
        v = normal("v", 0.0, of_item)
    with numpyro.plate("days", counts[3]):
        d = normal("d", 0.0, of_day)
    late = jnp.cos(jnp.arange(len(y)))
    with numpyro.plate("rows", len(y)):
        normal("y", u[pupil] + w[pupil] * late + v[item] + d[day], sd, y)


def restricted(y, student, item, counts):
    """Fixed effects of no law, in a line of the covariate."""
    of_student, of_item, sd = (param(n, s, POSITIVE) for n, s in (("of_student", 0.8), ("of_item", 0.6), ("sd", 0.7)))
    beta = flat("beta", 2)
    with numpyro.plate("students", counts[0]):
        u = normal("u", 0.0, of_student)
    with numpyro.plate("items", counts[1]):
        v = normal("v", 0.0, of_item)
    with numpyro.plate("rows", len(y)):
        normal("y", beta[0] + beta[1] * jnp.sin(jnp.arange(len(y))) + u[student] + v[item], sd, y)


def drawn(rng, rows, *counts):
    return (rng.normal(size=rows) * 1.5, *(rng.integers(0, c, rows) for c in counts), counts)


def nested_args(rng):
    counts = (40, 9, 15, 5)
    pupil, item, day = (rng.integers(0, c, 160) for c in (40, 15, 5))
    return rng.normal(size=160) * 1.5, pupil, rng.integers(0, 9, 40), item, day, counts


RNG = np.random.default_rng(11)
GRID = np.indices((45, 22)).reshape(2, -1)
HOLED = np.where(RNG.random(180) < 0.2, np.nan, RNG.normal(size=180))
CASES = {
    "ratings": (ratings, drawn(RNG, 180, 60, 12), {}),
    "every pair": (ratings, (RNG.normal(size=990), *GRID, (45, 22)), {}),
    "slopes": (slopes, drawn(RNG, 150, 35, 8), {}),
    "family": (family, nested_args(RNG), {}),
    "restricted": (restricted, drawn(RNG, 180, 60, 12), {"latent": ["beta"]}),
    "holes": (ratings, (HOLED, *drawn(RNG, 180, 60, 12)[1:]), {"missing": "marginalize"}),
}


def fit(name, **options):
    model, args, own = CASES[name]
    em = autoem.EM(model, init="model", progress=False, **{"max_steps": 3, "tol": 0.0, **own, **options})
    return em, em.run(KEY, *args)


def block_of(em, args):
    return em._derive(args, {})[0].kernel.integrals[0].block


@pytest.mark.parametrize("name", CASES)
def test_likelihood_and_moments(name: str) -> None:
    model, args, _ = CASES[name]
    em, result = fit(name)
    block = block_of(em, args)
    assert isinstance(block, CrossedBlock)
    held = np.isnan(args[0])
    seen = args if not held.any() else (args[0][~held], args[1][~held], args[2][~held], args[3])
    truth = Dense(model, seen).moments(dict(result.params))
    posterior = result.posterior()
    np.testing.assert_allclose(result.log_likelihood, truth.log_likelihood, rtol=1e-9)
    for latent, mean in truth.mean.items():
        np.testing.assert_allclose(posterior.mean[latent], mean, rtol=1e-7, atol=1e-9, err_msg=latent)
        found = posterior.covariance[latent]
        cells = truth.of_cells(latent, found.shape[-1]).reshape(found.shape)
        np.testing.assert_allclose(found, cells, rtol=1e-7, atol=1e-9, err_msg=latent)


@pytest.mark.parametrize("name", ["slopes", "family"])
def test_draws_have_the_moments(name: str) -> None:
    """Of all cells together: six standard errors, which a sound moment is beyond once in 5e8."""
    model, args, _ = CASES[name]
    _, result = fit(name)
    truth = Dense(model, args).moments(dict(result.params))
    draws = result.posterior().sample(KEY, 4000)
    flat_draws = np.zeros((4000, len(truth.covariance)))
    for latent, where in truth.places.items():
        flat_draws[:, where] = np.reshape(draws[latent], (4000, -1)) - truth.mean[latent].ravel()
    variance = np.diag(truth.covariance)
    np.testing.assert_array_less(np.abs(flat_draws.mean(0)), 6 * np.sqrt(variance / 4000))
    products = flat_draws.T @ flat_draws / 4000
    error = np.sqrt((np.outer(variance, variance) + truth.covariance**2) / 4000)
    np.testing.assert_array_less(np.abs(products - truth.covariance), 6 * error)


@pytest.mark.parametrize("name", ["ratings", "slopes", "family"])
def test_the_path_is_that_of_one_vector(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, levels = fit(name, max_steps=12)
    monkeypatch.setattr("autoem.e_step.groups.LEVELS_FROM", 10_000)
    em, whole = fit(name, max_steps=12)
    assert isinstance(block_of(em, CASES[name][1]), GaussianBlock)
    np.testing.assert_allclose(levels.history, whole.history, rtol=1e-9)
    for parameter, value in whole.params.items():
        np.testing.assert_allclose(levels.params[parameter], value, rtol=1e-7)


@pytest.mark.parametrize("pairs", [0, 10**9])
def test_pairs_and_tables_are_one(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of a cell two by two, or in a table of cells and core: whichever is listed."""
    _, before = fit("family")
    monkeypatch.setattr(crossing, "MAX_PAIRS", pairs)
    monkeypatch.setattr(crossing, "PAIR", 0)
    em, after = fit("family")
    cells = em._derive(CASES["family"][1], {})[0].bundle(em._derive(CASES["family"][1], {})[1], KEY).cells
    assert any(n.endswith("·pairs") for n in cells) is bool(pairs)
    np.testing.assert_allclose(before.history, after.history, rtol=1e-10)


def test_entries_and_pairs() -> None:
    """Of two cells that meet three and one coordinates: six pairs and one, each once."""
    found = crossing.pairs_of(np.array([0, 0, 0, 1]), 2, 100)
    assert found is not None
    assert sorted(map(tuple, found.T.tolist())) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2), (3, 3)]
    assert crossing.pairs_of(np.repeat(np.arange(3), 50), 3, 50) is None


def test_more_than_one_vector_holds() -> None:
    """Forty-five thousand coordinates, of which forty are left: likelihood finite and rising."""
    rng = np.random.default_rng(5)
    em = autoem.EM(ratings, init="model", max_steps=4, tol=0.0, progress=False)
    args = drawn(rng, 90_000, 45_000, 40)
    result = em.run(KEY, *args)
    assert isinstance(block_of(em, args), CrossedBlock)
    assert np.isfinite(result.history).all() and (np.diff(result.history) > 0).all()
    assert "eliminated cell by cell" in str(result.plan)


def test_too_many_on_both_sides_are_refused() -> None:
    rng = np.random.default_rng(6)
    em = autoem.EM(ratings, e_step=autoem.e_step.Exact(), progress=False)
    with pytest.raises(autoem.PlanError, match="crossed"):
        em.plan(*drawn(rng, 30_000, 20_000, 6_000))

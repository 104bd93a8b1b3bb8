"""Latents of plates that nest: level by level as by one dense matrix, and what happens to crossed ones among them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem
from autoem.e_step.gaussian.nested import NestedBlock

KEY = jax.random.key(0)


def deviations(*names):
    return (numpyro.param(n, 1.0, constraint=constraints.positive) for n in names)


def pupils(y, pupil, room, school, counts):
    """Classes about their school's level; pupils beside them."""
    mean = numpyro.param("mean", 0.5)
    own, of_room, of_school, noise = deviations("own", "of_room", "of_school", "noise")
    with numpyro.plate("schools", counts[2]):
        a = numpyro.sample("a", dist.Normal(mean, of_school))
    with numpyro.plate("rooms", counts[1]):
        b = numpyro.sample("b", dist.MultivariateNormal(jnp.zeros((counts[1], 2)), jnp.eye(2) * of_room**2))
    with numpyro.plate("pupils", counts[0]):
        c = numpyro.sample("c", dist.Normal(b[room, 0] + a[school[room]], own))
    with numpyro.plate("rows", len(y)):
        late = jnp.arange(len(y)) % 3
        numpyro.sample("y", dist.Normal(c[pupil] + b[room[pupil], 1] * late, noise), obs=y)


def visits(y, visit, student, judge, counts):
    """Students and judges are crossed; each visit is of one student to one judge."""
    mean = numpyro.param("mean", 0.5)
    own, of_student, of_judge, noise = deviations("own", "of_student", "of_judge", "noise")
    with numpyro.plate("students", counts[1]):
        u = numpyro.sample("u", dist.Normal(0.0, of_student))
    with numpyro.plate("judges", counts[2]):
        v = numpyro.sample("v", dist.Normal(0.0, of_judge))
    with numpyro.plate("visits", counts[0]):
        w = numpyro.sample("w", dist.Normal(u[student] + v[judge], own))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mean + w[visit], noise), obs=y)


def nested(rng):
    counts = (60, 12, 4)
    school, room, pupil = (rng.integers(0, high, size) for high, size in ((4, 12), (12, 60), (60, 150)))
    return pupils, (rng.normal(size=150) * 2, pupil, room, school, counts)


def crossed(rng):
    counts = (70, 6, 5)
    student, judge, visit = (rng.integers(0, high, size) for high, size in ((6, 70), (5, 70), (70, 130)))
    return visits, (rng.normal(size=130) * 2, visit, student, judge, counts)


def by_hand(model, args, p):
    """Mean and covariance of all effects and rows, from the model's own law: `(effects' loadings, prior, mean)`."""
    y, first, second, third, counts = args
    one = np.eye
    if model is pupils:
        room, school = one(counts[1])[second[first]], one(counts[2])[third[second[first]]]
        late = (np.arange(len(y)) % 3)[:, None]
        parts = [one(counts[0])[first] * p["own"], room * p["of_room"], room * late * p["of_room"]]
        parts.append(school * p["of_school"])
    else:
        parts = [one(counts[0])[first] * p["own"], one(counts[1])[second[first]] * p["of_student"]]
        parts.append(one(counts[2])[third[first]] * p["of_judge"])
    loadings = np.concatenate(parts, 1)
    return loadings, loadings @ loadings.T + p["noise"] ** 2 * one(len(y))


def block_of(em, args):
    return em._derive(args, {})[0].kernel.integrals[0].block


@pytest.mark.parametrize("make", [nested, crossed])
def test_likelihood_posterior_and_path_are_those_of_one_dense_matrix(make):
    model, args = make(np.random.default_rng(1))
    em = autoem.EM(model, init="model", max_steps=15, tol=0.0, progress=False)
    result = em.run(KEY, *args)
    assert isinstance(block_of(em, args), NestedBlock)
    p = {n: float(v) for n, v in result.params.items()}
    loadings, covariance = by_hand(model, args, p)
    off = args[0] - p["mean"]
    expected = -0.5 * (off @ np.linalg.solve(covariance, off) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    assert result.log_likelihood == pytest.approx(expected, rel=1e-10)
    assert np.all(np.diff(result.history) >= 0)
    posterior = result.posterior(*args)
    name, width = ("v", 5) if model is visits else ("a", 4)
    scale = p["of_judge"] if model is visits else p["of_school"]
    shared = loadings[:, -width:]
    mean = scale * shared.T @ np.linalg.solve(covariance, off) + (p["mean"] if model is pupils else 0.0)
    spread = scale**2 * (np.eye(width) - shared.T @ np.linalg.solve(covariance, shared))
    np.testing.assert_allclose(posterior.mean[name], mean, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(posterior.sd[name], np.sqrt(np.diag(spread)), rtol=1e-8)
    drawn = np.asarray(posterior.sample(jax.random.key(2), 4000)[name])
    np.testing.assert_allclose(np.cov(drawn.T), spread, atol=6 * spread.max() / np.sqrt(4000))


def test_the_plan_says_which_latent_stands_under_which():
    model, args = nested(np.random.default_rng(3))
    text = " ".join(str(autoem.EM(model, progress=False).plan(*args)).split())
    assert "60 cells of 1 dimension; eliminated cell by cell, each under one of" in text
    model, args = crossed(np.random.default_rng(3))
    text = " ".join(str(autoem.EM(model, progress=False).plan(*args)).split())
    assert "crossed: with u, v one vector of 11" in text


def test_ten_thousand_cells_are_no_dense_matrix():
    rng = np.random.default_rng(4)
    counts = (10_000, 500, 20)
    school, room, pupil = (rng.integers(0, high, size) for high, size in ((20, 500), (500, 10_000), (10_000, 20_000)))
    args = (rng.normal(size=20_000), pupil, room, school, counts)
    em = autoem.EM(pupils, init="model", max_steps=2, tol=0.0, progress=False)
    assert np.isfinite(em.run(KEY, *args).log_likelihood)


def rated(y, item, rater, counts):
    """Effects of items and raters, which nest or cross as the indices have it."""
    of_item, of_rater, noise = deviations("of_item", "of_rater", "noise")
    with numpyro.plate("items", counts[0]):
        u = numpyro.sample("u", dist.Normal(0.0, of_item))
    with numpyro.plate("raters", counts[1]):
        v = numpyro.sample("v", dist.Normal(0.0, of_rater))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(u[item] + v[rater], noise), obs=y)


def test_data_that_nest_otherwise_are_refused():
    """Items have one rater each, as the plan was made for; then other data of the same shapes have them crossed."""
    rng = np.random.default_rng(5)
    y, item, rater = rng.normal(size=180), np.arange(180) % 60, np.arange(180) % 60 // 10
    em = autoem.EM(rated, init="model", max_steps=2, progress=False)
    assert "each under one of v" in str(em.plan(y, item, rater, (60, 6)))
    em.run(KEY, y, item, rater[::-1], (60, 6))  # the same nesting by other numbers
    with pytest.raises(autoem.DataError, match="they nest otherwise"):
        em.run(KEY, y, item, rng.integers(0, 6, 180), (60, 6))

"""Ordered subsets: the passes against NumPy, the end against plain EM, and rates whose rows cannot be taken apart."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.experimental import sparse
from numpyro import handlers
from numpyro.distributions import constraints

import autoem
from autoem.m_step import Augmented, ClosedForm, OrderedSubsets
from tests.reference.cases import phantom

KEY = jax.random.key(0)
SYSTEM, COUNTS = (np.asarray(v, float) for v in phantom().values())
BINS, PIXELS = SYSTEM.shape
UNIFORM = jnp.full(PIXELS, COUNTS.sum() / PIXELS)
HEIGHT = -333.00658587  # of plain EM and of L-BFGS-B: tests/data/reference/pet_phantom.json


def positive(name, value):
    return numpyro.param(name, value, constraint=constraints.positive)


def seen(rate, y):
    with numpyro.plate("bins", len(y)):
        numpyro.sample("y", dist.Poisson(rate), obs=y)


def dense(system, y):
    seen(system @ positive("activity", UNIFORM), y)


def fit(model, *args, subsets=8, **options):
    m_step = {"activity": OrderedSubsets(subsets)} if subsets else None
    return autoem.EM(model, **{"init": "model", "progress": False, "m_step": m_step} | options).run(KEY, *args)


def passed(activity, subsets, system=SYSTEM, counts=COUNTS, background=0.0, weights=None):
    """Hudson and Larkin 1994, section 2, written out in NumPy: one update from every `subsets`-th row in turn."""
    for k in range(subsets):
        rows, y = system[k::subsets], counts[k::subsets]
        w = np.ones(len(y)) if weights is None else weights[k::subsets]
        rate = rows @ activity + background
        share, exposure = np.where(y > 0, y / np.where(rate > 0, rate, 1), 0) * w, rows.T @ w
        told = exposure > 0
        ratio = np.where(told, (rows.T @ share) / np.where(told, exposure, 1), 1)
        assert (ratio > 1e-3).all()  # below, an entry would be kept from vanishing for good
        activity = activity * ratio
    return activity


@pytest.mark.parametrize("subsets", [2, 3, 4])
def test_the_first_passes_are_those_of_numpy(subsets):
    """152 bins, so that of three subsets the last is smaller."""
    expected = UNIFORM
    for _ in range(2):
        expected = passed(expected, subsets)
    result = fit(dense, SYSTEM, COUNTS, subsets=subsets, max_steps=2, tol=0.0)
    np.testing.assert_allclose(result.params["activity"], expected, rtol=1e-10)
    assert f"from {subsets} interleaved subsets" in str(result.plan) and "Hudson and Larkin" in result.plan.citations()


def test_fewer_passes_to_the_same_end():
    """The phantom: how many passes each takes to a distance from the top, and that both end there."""
    plain = fit(dense, SYSTEM, COUNTS, subsets=0, max_steps=20_000, tol=1e-12)
    ordered = fit(dense, SYSTEM, COUNTS, max_steps=20_000, tol=1e-12)
    assert (np.diff(ordered.history) >= 0).all() and ordered.converged
    assert ordered.log_likelihood == pytest.approx(HEIGHT, abs=1e-6)
    assert plain.log_likelihood == pytest.approx(HEIGHT, abs=1e-6)
    # 20 entries tend to zero: how near they came is a matter of the last steps
    np.testing.assert_allclose(ordered.params["activity"], plain.params["activity"], atol=2e-3)

    def passes(result, below):
        return int(np.argmax(result.history > HEIGHT - below))

    assert 2 * passes(ordered, 10) < passes(plain, 10) == 20
    assert 1.7 * passes(ordered, 0.1) < passes(plain, 0.1) == 291
    assert ordered.num_steps < plain.num_steps


@pytest.mark.parametrize("tol", [1e-4, 1e-6])
def test_a_fit_does_not_rest_where_the_subsets_go_round(tol):
    """Where a pass gains little, fewer subsets take over: a loose tolerance ends no lower than with plain EM."""
    ordered = fit(dense, SYSTEM, COUNTS, tol=tol, max_steps=5000)
    plain = fit(dense, SYSTEM, COUNTS, subsets=0, tol=tol, max_steps=5000)
    assert ordered.converged and ordered.log_likelihood > plain.log_likelihood
    assert ordered.num_steps < plain.num_steps


INDEX = np.tile(np.arange(PIXELS), (BINS, 1))
OPERATORS = {
    "a matrix": lambda a: SYSTEM @ a,
    "a sum over a table": lambda a: (SYSTEM * a).sum(1) + 0.0,
    "a transposed matrix": lambda a: a @ jnp.asarray(SYSTEM.T),
    "einsum": lambda a: jnp.einsum("ij,j->i", SYSTEM, a),
    "a gather": lambda a: (SYSTEM * a[INDEX]).sum(1),
    "row by row": lambda a: jax.lax.map(lambda row: row @ a, jnp.asarray(SYSTEM)),
    "vmap": lambda a: jax.vmap(lambda row, index: row @ a[index])(jnp.asarray(SYSTEM), jnp.asarray(INDEX)),
    "attenuated": lambda a: jnp.ones(BINS) * (jnp.asarray(SYSTEM) @ a) + 0 * jnp.arange(BINS),
    "normalised": lambda a: (SYSTEM / jnp.asarray(SYSTEM).sum(0)) @ (a * SYSTEM.sum(0)),
    "as a picture": lambda a: jnp.einsum("ijk,jk->i", SYSTEM.reshape(BINS, 8, 8), a.reshape(8, 8)),
}


@pytest.mark.parametrize("project", OPERATORS.values(), ids=OPERATORS)
def test_every_way_to_write_rows(project):
    def model(y):
        seen(project(positive("activity", UNIFORM)), y)

    result = fit(model, COUNTS, subsets=4, max_steps=1)
    np.testing.assert_allclose(result.params["activity"], passed(UNIFORM, 4), rtol=1e-9)


def by_triplets(a, y):
    rows, pixels = np.nonzero(SYSTEM)
    return jax.ops.segment_sum(SYSTEM[rows, pixels] * a[pixels], jnp.asarray(rows), BINS)


MIXING = {
    "scatter-add": by_triplets,
    "bcoo_dot_general": lambda a, y: sparse.BCOO.fromdense(jnp.asarray(SYSTEM)) @ a,
    "fft": lambda a, y: jnp.abs(jnp.fft.fft(jnp.eye(BINS)[0])) * 0 + jnp.fft.ifft(jnp.fft.fft(SYSTEM @ a)).real,
    "rev": lambda a, y: jnp.flip(SYSTEM @ a),
    "concatenate": lambda a, y: jnp.concatenate([SYSTEM[:70] @ a, SYSTEM[70:] @ a]),
    "cumsum": lambda a, y: jnp.cumsum(SYSTEM @ a),
}


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_cannot_be_taken_apart_are_refused_by_name(name):
    def model(y):
        seen(MIXING[name](positive("activity", UNIFORM), y), y)

    with pytest.raises(autoem.PlanError, match=rf"site 'activity': .*rows.*`{name}`") as refusal:
        autoem.EM(model, m_step=OrderedSubsets(), progress=False).plan(COUNTS)
    assert "(weight * activity[index]).sum(1)" in str(refusal.value) and "ClosedForm()" in str(refusal.value)
    again = autoem.EM(model, m_step={"activity": ClosedForm()}, progress=False).plan(COUNTS)
    assert again.m_step("activity") == "closed form"
    assert not any("OrderedSubsets" in a.strategy for a in again.alternatives("activity"))


def test_what_is_no_superposition_is_refused():
    def curved(system, y):
        seen(jnp.exp(system @ positive("activity", jnp.ones(PIXELS))), y)

    with pytest.raises(autoem.PlanError, match="site 'activity': ordered subsets do not serve it: the rate is not lin"):
        autoem.EM(curved, m_step=OrderedSubsets(), progress=False).plan(SYSTEM, COUNTS)
    with pytest.raises(autoem.PlanError, match="negative coefficients"):
        autoem.EM(dense, m_step=OrderedSubsets(), progress=False).plan(SYSTEM - 0.01, COUNTS)
    with pytest.raises(autoem.PlanError, match="152 rows, fewer than 200 subsets"):
        autoem.EM(dense, m_step=OrderedSubsets(200), progress=False).plan(SYSTEM, COUNTS)
    with pytest.raises(autoem.PlanError, match="accelerate"):
        em = autoem.EM(dense, m_step=OrderedSubsets(), accelerate=autoem.accelerate.Squarem(), progress=False)
        em.plan(SYSTEM, COUNTS)
    with pytest.raises(ValueError, match="at least 2"):
        OrderedSubsets(1)


def test_other_data_of_the_same_shapes():
    """The data are no part of the compiled program; signs are looked at anew."""
    em = autoem.EM(dense, init="model", m_step=OrderedSubsets(4), max_steps=1, progress=False)
    em.run(KEY, SYSTEM, COUNTS)
    system, counts = SYSTEM[::-1].copy(), COUNTS[::-1].copy()
    np.testing.assert_allclose(em.run(KEY, system, counts).params["activity"], passed(UNIFORM, 4, system, counts))
    with pytest.raises(autoem.PlanError, match="negative coefficients"):
        em.run(KEY, SYSTEM - 0.01, COUNTS)


def test_weights_masks_and_a_background():
    weights = np.random.default_rng(0).integers(1, 4, BINS).astype(float) * (np.arange(BINS) % 7 > 0)

    def model(system, y):
        activity, background = positive("activity", UNIFORM), positive("background", 0.5)
        with handlers.scale(scale=jnp.maximum(weights, 1)), handlers.mask(mask=weights > 0):
            seen(system @ activity + background, y)

    result = fit(model, SYSTEM, COUNTS, subsets=4, max_steps=1)
    expected = passed(UNIFORM, 4, background=0.5, weights=weights)
    np.testing.assert_allclose(result.params["activity"], expected, rtol=1e-10)


def test_a_gamma_prior_is_shared_among_the_subsets():
    def model(system, y):
        seen(system @ numpyro.sample("activity", dist.Gamma(3.0, 0.05).expand([PIXELS]).to_event(1)), y)

    ordered, plain = (fit(model, SYSTEM, COUNTS, subsets=s, max_steps=20_000, tol=1e-13) for s in (8, 0))
    assert (np.diff(ordered.history) >= 0).all()
    assert ordered.objective == pytest.approx(plain.objective, abs=1e-6)
    np.testing.assert_allclose(ordered.params["activity"], plain.params["activity"], rtol=1e-3)


def test_a_discrete_latent_beside_and_restarts():
    """Bins that are dimmed or not, unseen: each of several starts ends where plain EM ends."""

    def dimmed(system, y):
        activity = positive("activity", UNIFORM)
        with numpyro.plate("bins", len(y)):
            z = numpyro.sample("z", dist.Categorical(jnp.array([0.2, 0.8])))
            numpyro.sample("y", dist.Poisson(jnp.array([0.4, 1.0])[z] * (system @ activity) + 0.5), obs=y)

    ordered, plain = (
        fit(dimmed, SYSTEM, COUNTS, subsets=s, init="random", restarts=2, max_steps=1500, tol=1e-8) for s in (4, 0)
    )
    assert ordered.log_likelihood == pytest.approx(plain.log_likelihood, abs=1e-2)
    assert (np.diff(ordered.history) >= -1e-9).all()


def test_negative_binomial_counts_too():
    def model(system, y):
        with numpyro.plate("bins", len(y)):
            numpyro.sample("y", dist.NegativeBinomial2(system @ positive("activity", UNIFORM), 5.0), obs=y)

    expected = UNIFORM
    for k in range(4):
        rows, y = SYSTEM[k::4], COUNTS[k::4]
        mean = rows @ expected
        expected = expected * (rows.T @ (y / mean)) / (rows.T @ ((5 + y) / (5 + mean)))
    result = fit(model, SYSTEM, COUNTS, subsets=4, max_steps=1)
    np.testing.assert_allclose(result.params["activity"], expected, rtol=1e-9)
    ends = [
        fit(model, SYSTEM, COUNTS, subsets=0, m_step=m, max_steps=20_000, tol=1e-12)
        for m in ({"activity": OrderedSubsets()}, {"activity": Augmented()})
    ]
    assert ends[0].log_likelihood == pytest.approx(ends[1].log_likelihood, abs=1e-4)


def test_a_subset_without_counts_does_not_end_a_pixel():
    """One subset sees none of the pixel's counts: the plain update of it alone would make it zero, for good."""
    system = np.tile(np.eye(2), (4, 1))
    counts = np.array([0, 5, 3, 5, 0, 5, 3, 5.0])

    def model(system, y):
        seen(system @ positive("activity", jnp.ones(2)), y)

    result = fit(model, system, counts, subsets=4, max_steps=500, tol=1e-13)
    np.testing.assert_allclose(result.params["activity"], [1.5, 5.0], rtol=1e-6)


def test_it_is_listed_beside_the_superposition():
    plan = autoem.EM(dense, progress=False).plan(SYSTEM, COUNTS)
    row = next(a for a in plan.alternatives("activity") if "OrderedSubsets" in a.strategy)
    assert row.source == "Hudson and Larkin 1994"
    back = autoem.EM(dense, progress=False, **row.options).plan(SYSTEM, COUNTS)
    assert any("ClosedForm" in a.strategy for a in back.alternatives("activity"))


def test_single_precision():
    with jax.enable_x64(False):
        system, counts = jnp.asarray(SYSTEM, "float32"), jnp.asarray(COUNTS, "int32")

        def model(system, y):
            seen(system @ positive("activity", jnp.full(PIXELS, y.sum() / PIXELS)), y)

        result = fit(model, system, counts, subsets=4, max_steps=1)
    np.testing.assert_allclose(result.params["activity"], passed(UNIFORM, 4), rtol=1e-4)

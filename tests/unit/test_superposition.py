"""Poisson rates that are sums: what is recognised, what is refused, and that the update is that of tomography."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.experimental import sparse
from numpyro.distributions import constraints

import autoem

KEY = jax.random.key(0)
BINS, PIXELS = 30, 7


def positive(name, value):
    return numpyro.param(name, value, constraint=constraints.positive)


def seen(rate, y):
    with numpyro.plate("bins", len(y)):
        numpyro.sample("y", dist.Poisson(rate), obs=y)


def made(seed=0):
    """A sparse system and counts of a truth of which some entries are zero."""
    rng = np.random.default_rng(seed)
    system = rng.uniform(size=(BINS, PIXELS)) * (rng.uniform(size=(BINS, PIXELS)) < 0.5)
    truth = np.array([0.0, 5.0, 20.0, 0.0, 11.0, 3.0, 40.0])
    return jnp.asarray(system), jnp.asarray(rng.poisson(system @ truth))


def by_hand(system, y, steps, activity=None, background=0.0):
    """Shepp and Vardi 1982, equation 2.13, in NumPy."""
    system, y = np.asarray(system), np.asarray(y)
    activity = np.ones(system.shape[1]) if activity is None else np.asarray(activity)
    for _ in range(steps):
        rate = system @ activity + background
        share = np.where(y > 0, y / np.where(rate > 0, rate, 1), 0)
        exposure = system.sum(0)
        activity = np.where(exposure > 0, activity * (system.T @ share) / np.where(exposure > 0, exposure, 1), activity)
    return activity


def fit(model, *args, **options):
    return autoem.EM(model, **{"init": "model", "progress": False} | options).run(KEY, *args)


@jax.custom_vjp
def projector(system, x):
    return system @ x


projector.defvjp(lambda system, x: (system @ x, system), lambda system, g: (None, system.T @ g))


def by_triplets(system, x):
    rows, pixels = np.nonzero(made()[0])
    return jax.ops.segment_sum(system[rows, pixels] * x[pixels], jnp.asarray(rows), BINS)


OPERATORS = {
    "a matrix": lambda system, x: system @ x,
    "a sum over a table": lambda system, x: (system * x).sum(1) + 0.0,
    "gather and scatter": by_triplets,
    "a JAX function with its own transpose": projector,
    "row by row": lambda system, x: jax.lax.map(lambda row: row @ x, system),
    "accumulated": lambda system, x: jax.lax.fori_loop(
        0, PIXELS, lambda j, r: r + system[:, j] * x[j], jnp.zeros(BINS)
    ),
}


@pytest.mark.parametrize("kind", [*OPERATORS, "sparse"])
def test_every_way_to_write_the_operator_gives_the_multiplicative_update(kind):
    system, y = made()
    project = OPERATORS.get(kind, lambda system, x: system @ x)

    def scan_of_counts(system, y):
        seen(project(system, positive("activity", jnp.ones(PIXELS))), y)

    given = sparse.BCOO.fromdense(system) if kind == "sparse" else system
    result = fit(scan_of_counts, given, y, max_steps=4, tol=0.0)
    np.testing.assert_allclose(result.params["activity"], by_hand(system, y, 4), rtol=1e-12)
    row = result.plan.parameters[0]
    assert row.strategy == "closed form" and "superposition" in row.reason and "Shepp and Vardi 1982" in row.source
    assert "split over their sources" in str(result.plan) and "Lange and Carson 1984" in result.plan.citations()


def blurred(y):
    """A convolution through Fourier space: no sign can be read off its text, and rounding makes tiny negative ones."""
    source = positive("source", jnp.ones(BINS))
    kernel = jnp.fft.rfft(jnp.array([0.5, 0.3, 0.2]), BINS)
    seen(jnp.fft.irfft(kernel * jnp.fft.rfft(source), BINS), y)


def test_an_operator_in_fourier_space():
    y = made()[1]
    circulant = sum(w * np.roll(np.eye(BINS), k, 0) for k, w in enumerate([0.5, 0.3, 0.2]))
    result = fit(blurred, y, max_steps=3, tol=0.0)
    assert result.plan.m_step("source") == "closed form"
    np.testing.assert_allclose(result.params["source"], by_hand(circulant, y, 3, np.ones(BINS)), rtol=1e-9, atol=1e-9)


def plain(system, y):
    seen(system @ positive("activity", jnp.ones(PIXELS)), y)


def test_an_operator_that_long_arithmetic_makes():
    """A thousand equations of numbers, one upon the other, before the parameter comes in."""
    system, y = made()

    def model(system, y):
        for _ in range(1000):
            system = system * 1.001
        seen(system @ positive("activity", jnp.ones(PIXELS)), y)

    result = fit(model, system, y, max_steps=5, tol=0.0)
    np.testing.assert_allclose(result.params["activity"], by_hand(np.asarray(system) * 1.001**1000, y, 5), rtol=1e-10)


def test_negative_coefficients_go_to_newton_and_the_plan_says_why():
    system, y = made()
    mixed = system.at[3, 2].set(-0.01)
    em = autoem.EM(plain, init="model", progress=False)
    assert em.plan(system, y).m_step("activity") == "closed form"
    plan = em.plan(mixed, y)  # data of the same shapes: the signs are looked at each time
    assert plan.m_step("activity") == "Newton" and "negative coefficients" in str(plan)
    assert em.plan(system, y).m_step("activity") == "closed form"
    result = em.run(KEY, mixed, y)
    assert result.converged and result.plan.m_step("activity") == "Newton"
    with pytest.raises(autoem.PlanError, match="negative coefficients"):
        autoem.EM(plain, m_step=autoem.m_step.ClosedForm()).plan(mixed, y)


def below(system, y):
    seen(10 * jnp.ones(BINS) - 0.001 * y + system @ positive("activity", jnp.ones(PIXELS)), y)


def subtracted(system, y):
    seen(system @ positive("activity", jnp.ones(PIXELS)) + 1 - positive("loss", 0.01), y)


def test_negative_terms_beside_are_refused():
    system, y = made()
    em = autoem.EM(below, progress=False)
    assert em.plan(system, y).m_step("activity") == "closed form"  # a difference that is positive all the same
    assert em.plan(system, y.at[0].set(20_000)).m_step("activity") == "Newton"
    plan = autoem.EM(subtracted, progress=False).plan(system, y)
    assert (plan.m_step("activity"), plan.m_step("loss")) == ("Newton", "Newton")


@pytest.mark.parametrize(
    ("rate", "word"),
    [
        (lambda x: jnp.exp(x), "not linear"),
        (lambda x: jnp.maximum(x, 1.0), "not linear"),
        (lambda x: x * x[0], "not linear"),
        (lambda x: jnp.where(x > 2, x, 1.0), "not linear"),
    ],
)
def test_what_is_not_linear_is_not_taken_for_it(rate, word):
    system, y = made()

    def curved(system, y):
        seen(0.1 + system @ rate(positive("activity", jnp.ones(PIXELS))), y)

    with pytest.raises(autoem.PlanError):
        autoem.EM(curved, m_step=autoem.m_step.ClosedForm()).plan(system, y)
    assert autoem.EM(curved).plan(system, y).m_step("activity") == "Newton", word


def test_zero_pixels_empty_columns_and_impossible_bins():
    system, y = made()
    system = system.at[:, 5].set(0.0).at[2].set(0.0)  # nothing is seen of pixel 5, and bin 2 sees nothing
    y = y.at[2].set(0)
    start = jnp.ones(PIXELS).at[1].set(0.0)

    def model(system, y):
        seen(system @ positive("activity", start), y)

    result = fit(model, system, y, max_steps=3, tol=0.0)
    activity = np.asarray(result.params["activity"])
    assert activity[1] == 0 and activity[5] == 1
    np.testing.assert_allclose(activity, by_hand(system, y, 3, start), rtol=1e-12)
    assert any("'activity' is on its boundary in entry 1" in w for w in result.warnings)
    impossible = fit(model, system, y.at[2].set(4))
    assert not impossible.converged and "probability zero there (row 2)" in impossible.status


def with_background(system, y):
    activity, scale = positive("activity", jnp.ones(PIXELS)), positive("background", 1.0)
    seen(system @ activity + scale * jnp.linspace(1, 2, BINS), y)


def test_several_parameters_in_one_rate():
    system, y = made()
    both = jnp.concatenate([system, jnp.linspace(1, 2, BINS)[:, None]], 1)
    result = fit(with_background, system, y, max_steps=50_000, tol=1e-15)
    assert {r.strategy for r in result.plan.parameters} == {"closed form"}
    assert np.all(np.diff(result.history) >= -1e-12 * abs(result.log_likelihood))
    rate = both @ jnp.append(result.params["activity"], result.params["background"])
    slope = np.asarray(both.T @ (y / rate - 1))  # Kuhn and Tucker: zero where positive, never above
    assert np.abs(slope * np.append(result.params["activity"], result.params["background"])).max() < 1e-3
    assert slope.max() < 1e-3


def test_parameters_of_one_rate_move_in_turn_each_from_the_rate_that_the_others_left():
    system, y = made()
    result = fit(with_background, system, y, max_steps=4, tol=0.0)
    known = np.linspace(1, 2, BINS)
    activity, scale = np.ones(PIXELS), 1.0
    for _ in range(4):
        activity = by_hand(system, y, 1, activity, scale * known)
        scale *= known @ (np.asarray(y) / (np.asarray(system) @ activity + scale * known)) / known.sum()
    np.testing.assert_allclose(result.params["activity"], activity, rtol=1e-12)
    np.testing.assert_allclose(result.params["background"], scale, rtol=1e-12)


def test_one_parameter_in_two_kinds_of_data():
    """A calibration measures each source alone beside the sums: both kinds of counts are pooled."""
    system, y = made()

    def model(system, y, alone):
        activity = positive("activity", jnp.ones(PIXELS))
        seen(system @ activity, y)
        with numpyro.plate("sources", PIXELS):
            numpyro.sample("alone", dist.Poisson(0.5 * activity), obs=alone)

    alone = jnp.arange(PIXELS)
    result = fit(model, system, y, alone, max_steps=5, tol=0.0)
    stacked = jnp.concatenate([system, 0.5 * jnp.eye(PIXELS)])
    np.testing.assert_allclose(result.params["activity"], by_hand(stacked, jnp.append(y, alone), 5), rtol=1e-12)


@pytest.mark.parametrize("concentration", [3.0, 1.0, 0.6])
def test_gamma_priors_stay_closed_form(concentration):
    system, y = made()

    def model(system, y):
        prior = dist.Gamma(concentration, 0.2).expand([PIXELS]).to_event(1)
        seen(0.01 + system @ numpyro.sample("activity", prior), y)

    result = fit(model, system, y, max_steps=20_000, tol=1e-12)
    assert result.plan.m_step("activity") == "closed form" and result.converged, result.status
    assert np.all(np.diff(result.history) >= -1e-12 * np.abs(result.history[1:]))
    activity = np.asarray(result.params["activity"])
    slope = system.T @ (y / (0.01 + system @ activity) - 1) + (concentration - 1) / activity - 0.2
    inside = activity > 1e-3
    assert inside.any() and np.abs(np.asarray(slope)[inside]).max() < 1e-3
    if concentration > 1:
        assert inside.all()


def test_a_discrete_latent_beside():
    """Bins that are dimmed or not, unseen: expected counts are split over their sources."""
    system, y = made()

    def dimmed(system, y):
        activity, weights = positive("activity", jnp.ones(PIXELS)), jnp.array([0.3, 0.7])
        with numpyro.plate("bins", len(y)):
            z = numpyro.sample("z", dist.Categorical(weights))
            numpyro.sample("y", dist.Poisson(jnp.array([0.4, 1.0])[z] * (system @ activity) + 0.5), obs=y)

    em = autoem.EM(dimmed, init="model", max_steps=20_000, tol=1e-13, progress=False)
    assert em.plan(system, y).m_step("activity") == "closed form"
    report = em.check(KEY, system, y)
    assert report.ok, report
    history = em.run(KEY, system, y).history
    assert np.all(np.diff(history) >= -1e-12 * np.abs(history[1:]))


@pytest.mark.parametrize("step", [autoem.m_step.Newton(), autoem.m_step.Fixed()])
def test_it_can_be_told_not_to(step):
    system, y = made()
    plan = autoem.EM(plain, m_step={"activity": step}).plan(system, y)
    assert plan.m_step("activity") == ("Newton" if isinstance(step, autoem.m_step.Newton) else "fixed")
    assert "superposition" not in str(plan)


def test_single_precision():
    with jax.enable_x64(False):
        system, y = (jnp.asarray(np.asarray(a), t) for a, t in zip(made(), ("float32", "int32"), strict=True))
        result = fit(plain, system, y, max_steps=100, tol=0.0)
    np.testing.assert_allclose(result.params["activity"], by_hand(*made(), 100), rtol=1e-4, atol=1e-4)

"""Continuous latents without an exact posterior of bounded cost: refused by name, or called approximate, and why."""

import re
from collections.abc import Callable

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
from autoem import DataError, ModelError, PlanError
from tests.dense_gaussian import Dense
from tests.gaussian_models import GROUP, OTHER, PATH, ROWS, X, Y, canonical_correlation, random_intercept, with_holes
from tests.state_space_models import POSITIVE, normal, param


def reading(child: Callable) -> Callable:
    """A model whose latent `u` is read by `child(u, y)`, in a plate of rows."""

    def model(y):
        spread = param("spread", 1.0, POSITIVE)
        with numpyro.plate("rows", len(y)):
            child(normal("u", 0.0, spread), y)

    return model


def plan(model: Callable, *args, **options) -> autoem.Plan:
    return autoem.EM(model, init="model", progress=False, **options).plan(*args)


OTHERWISE = {
    "squared": (lambda u, y: normal("y", u**2, 1.0, y), r"not affine in 'u'.*power.*site 'y'"),
    "in the scale": (lambda u, y: normal("y", 0.0, jnp.exp(u), y), r"scale depends on 'u'.*site 'y'"),
    "times another": (lambda u, y: normal("y", u * normal("v", 0.0, 1.0), 1.0, y), r"not affine in 'u', 'v'.*site 'y'"),
    "by its own sign": (lambda u, y: normal("y", jnp.where(u > 0, u, 0.0), 1.0, y), r"not affine in 'u'.*site 'y'"),
    "a discrete child": (
        lambda u, y: numpyro.sample("y", dist.Bernoulli(logits=u), obs=(y > 1).astype(int)),
        r"BernoulliLogits, not Normal.*site 'y'",
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_not_gaussian_is_not_called_so(name):
    """The reason names the site; an answer that is not exact says that it is approximate."""
    child, reason = OTHERWISE[name]
    try:
        found = plan(reading(child), Y)
    except PlanError as refusal:
        assert refusal.mend
        return
    text = " ".join(str(found).split())
    assert re.search(reason, text), text
    assert "approximate" in text and "Gaussian: every site" not in text


def switching(y):
    """A discrete chain beside a continuous one."""
    moves = param("moves", [[0.9, 0.1], [0.2, 0.8]], constraints.simplex)
    spread = param("spread", [0.5, 2.0], POSITIVE)

    def step(carry, seen):
        z, level = carry
        z = numpyro.sample("z", dist.Categorical(moves[z]))
        level = normal("level", level, spread[z])
        normal("y", level, 1.0, seen)
        return (z, level), None

    scan(step, (0, 0.0), y)


def outliers(y):
    """A discrete latent of each step, not carried."""
    shares, spread = param("shares", [0.9, 0.1], constraints.simplex), param("spread", 0.5, POSITIVE)

    def step(level, seen):
        level = normal("level", level, spread)
        z = numpyro.sample("z", dist.Categorical(shares))
        normal("y", level, 1.0 + 4.0 * z, seen)
        return level, None

    scan(step, 0.0, y)


def bent(y):
    spread = param("spread", 0.5, POSITIVE)

    def step(level, seen):
        level = normal("level", jnp.sin(level), spread)
        normal("y", level, 1.0, seen)
        return level, None

    scan(step, 0.0, y)


def crossed(y, first, second, size):
    spread = param("spread", 1.0, POSITIVE)
    with numpyro.plate("firsts", size):
        u = normal("u", 0.0, spread)
    with numpyro.plate("seconds", size):
        v = normal("v", 0.0, spread)
    with numpyro.plate("rows", len(y)):
        normal("y", u[first] + v[second], 1.0, y)


def weighted(y, weight):
    spread = param("spread", 1.0, POSITIVE)
    with numpyro.plate("rows", len(y)), handlers.scale(scale=weight):
        normal("y", normal("u", 0.0, spread), 1.0, y)


MANY = np.arange(6000)
EXACT = {"e_step": autoem.e_step.Exact()}


@pytest.mark.parametrize(
    ("model", "args", "options", "error", "words"),
    [
        (switching, (PATH,), EXACT, (ModelError, PlanError), r"'level'.*discrete latent 'z'"),
        (outliers, (PATH,), EXACT, PlanError, r"'level'.*discrete latent 'z'"),
        (bent, (PATH,), EXACT, PlanError, r"not affine.*`sin`"),
        (crossed, (1.0 * MANY, MANY % 4500, MANY * 7 % 4499, 4500), EXACT, PlanError, r"'u'.*9,000 coordinates"),
        (weighted, (Y, np.full(len(Y), 2.0)), {}, PlanError, r"'u'.*handlers.scale"),
        (random_intercept, (Y, X, GROUP), {"latent": ["between"]}, PlanError, r"'between'.*already a parameter"),
        (random_intercept, (Y, X, GROUP), {"latent": ["w"]}, PlanError, r"'w'.*no unobserved site"),
        (random_intercept, (with_holes(Y, 2), X, GROUP), {}, DataError, r"'y'.*NaN.*row 2"),
    ],
)
def test_refusals_name_the_site_the_reason_and_a_mend(model, args, options, error, words):
    with pytest.raises(error, match=words) as caught:
        plan(model, *args, **options)
    assert "mend: " in str(caught.value)


def test_vectors_seen_in_part_below_a_latent_are_right_or_refused():
    holes = with_holes(OTHER, (2, 1))
    em = autoem.EM(canonical_correlation, init="model", max_steps=1, missing="marginalize", progress=False)
    try:
        result = em.run(jax.random.key(0), ROWS, holes)
    except PlanError as refusal:
        assert "'y'" in str(refusal)
        return
    truth = Dense(canonical_correlation, (ROWS, holes)).moments(dict(result.params))
    np.testing.assert_allclose(result.log_likelihood, truth.log_likelihood, rtol=1e-8)


def neighbours(y):
    spread = param("spread", 1.0, POSITIVE)
    with numpyro.plate("rows", len(y)):
        u = normal("u", 0.0, spread)
        normal("y", u + jnp.roll(u, 1), 1.0, y)


def test_rows_that_read_two_cells_tie_all_cells():
    result = autoem.EM(neighbours, init="model", max_steps=1, progress=False).run(jax.random.key(0), Y)
    truth = Dense(neighbours, (Y,)).moments(dict(result.params))
    np.testing.assert_allclose(result.log_likelihood, truth.log_likelihood, rtol=1e-9)
    np.testing.assert_allclose(result.posterior().mean["u"], truth.mean["u"], atol=1e-9)


def test_a_range_of_whole_numbers_is_no_way_to_integrate_a_continuous_latent():
    em = autoem.EM(random_intercept, e_step={"u": autoem.e_step.Truncated(0, 5)})
    with pytest.raises(PlanError, match=r"site 'u': a range of whole numbers is for discrete latents.*\n.*Quadrature"):
        em.plan(Y, X, GROUP)


def test_rows_with_a_class_each_below_a_shared_effect_are_refused():
    def model(y, group):
        shift, spread = param("shift", [0.0, 1.0]), param("spread", 1.0, POSITIVE)
        with numpyro.plate("groups", 5):
            u = normal("u", 0.0, spread)
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            normal("y", shift[z] + u[group], 1.0, y)

    with pytest.raises(PlanError, match=r"site 'u': rows that share one of its cells each have a 'z' of their own"):
        autoem.EM(model, **EXACT).plan(Y, GROUP)


@pytest.mark.parametrize(("model", "reason"), [
    (outliers, "discrete latent 'z'"), (bent, "sin"),
])  # fmt: skip
def test_what_is_refused_as_exact_is_treated_by_draws(model, reason):
    """Unless the exact is asked for: with the reason, and with an objective that is not called the log-likelihood."""
    em = autoem.EM(model, init="model", max_steps=3, progress=False)
    text = " ".join(str(em.plan(PATH)).split())
    assert "approximate: Laplace" in text and reason in text
    result = em.run(jax.random.key(0), PATH)
    assert np.isfinite(result.log_likelihood) and result.objective_name.startswith("Laplace")
    assert result.posterior().mean["level"].shape == PATH.shape


def test_many_tied_coordinates_go_to_a_mean_field():
    """They are Normal given each other; asked for, a guide takes them as well."""
    text = " ".join(str(plan(crossed, 1.0 * MANY, MANY % 4500, MANY * 7 % 4499, 4500)).split())
    assert "mean field (chosen since no exact E-step is known" in text and "9,000 coordinates" in text

"""Gradient ascent, SVI and NUTS against closed forms, against EM, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoNormal

import autoem
from autoem.baselines import NUTS, SVI, GradientAscent

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
GROUP = np.repeat(np.arange(6), 5)
EFFECT = RNG.normal(0, 2, 6)
Y = EFFECT[GROUP] + RNG.normal(size=30)


def effects(y, group):
    """Random effects: the posterior of `u` is Gaussian and factorises, so a mean-field guide is exact."""
    mean, spread = numpyro.param("mean", 0.0), numpyro.param("spread", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", 6):
        u = numpyro.sample("u", dist.Normal(mean, spread))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(u[group], 1.0), obs=y)


def effects_likelihood(mean, spread):
    """By the joint normal density of all data, the effects integrated by hand."""
    covariance = np.eye(30) + spread**2 * (GROUP[:, None] == GROUP)
    return float(dist.MultivariateNormal(jnp.full(30, mean), covariance).log_prob(Y))


def too_narrow(y, group):
    """A guide with a standard deviation of one for all effects, which is more than twice the posterior's."""
    loc = numpyro.param("loc", jnp.zeros(6))
    with numpyro.plate("groups", 6):
        numpyro.sample("u", dist.Normal(loc, 1.0))


@pytest.fixture(scope="module")
def comparison():
    strategies = {
        "em": {"tol": 1e-13},
        "lbfgs": GradientAscent(optax.lbfgs(), steps=40),
        "wild": GradientAscent(optax.sgd(1e3), steps=50),
        "svi": SVI(AutoNormal, steps=2000),
        "own": SVI(too_narrow, steps=2000),
        "none": SVI(lambda y, group: None),
    }
    return autoem.compare(effects, strategies, KEY, Y, GROUP)


def test_gradient_ascent_reaches_the_maximum_of_em(comparison):
    row, em = comparison["lbfgs"], comparison["em"]
    np.testing.assert_allclose(row.objective, em.result.log_likelihood, atol=1e-6)
    np.testing.assert_allclose(row.params["spread"], em.params["spread"], rtol=1e-3)
    assert row.history[0] == pytest.approx(effects_likelihood(0.0, 1.0), abs=1e-8)
    assert len(row.history) == row.num_steps + 1


def test_gradient_ascent_keeps_the_best_point_of_a_run_that_breaks_down(comparison):
    """Steps of a thousand in free coordinates lead to where the density is not finite."""
    assert comparison["wild"].log_joint >= effects_likelihood(0.0, 1.0) - 1e-9


def test_the_bound_of_svi_lies_below_the_likelihood_and_nearly_reaches_it(comparison):
    row = comparison["svi"]
    exact = effects_likelihood(float(row.params["mean"]), float(row.params["spread"]))
    assert row.objective_name == "ELBO"
    assert row.log_likelihood == pytest.approx(exact, abs=1e-8)
    assert row.objective < exact + 4 * row.result.details["standard_error"]
    assert row.gap < 0.3  # the guide's family holds the posterior
    np.testing.assert_allclose(row.latents.moments["u"][0], comparison["em"].latents.moments["u"][0], atol=0.2)


def test_a_guide_that_cannot_hold_the_posterior_leaves_its_divergence_as_the_gap(comparison):
    row = comparison["own"]
    variance = 1 / (5 + 1 / float(row.params["spread"]) ** 2)
    divergence = 6 * (0.5 / variance - 0.5 + 0.5 * np.log(variance))
    assert row.gap == pytest.approx(divergence, abs=0.7)


def test_a_guide_that_leaves_a_latent_out_is_refused_by_its_name(comparison):
    assert isinstance(comparison["none"].error, autoem.PlanError)
    assert "site 'u': the guide does not sample it" in str(comparison["none"].error)


def conjugate(tosses, colours, counts, points):
    """The posterior is Beta, Dirichlet, Gamma, inverse Wishart: flat on constrained scales but for the Gamma prior."""
    p = numpyro.param("p", 0.5, constraint=constraints.unit_interval)
    w = numpyro.param("w", jnp.ones(3) / 3, constraint=constraints.simplex)
    cov = numpyro.param("cov", jnp.eye(2), constraint=constraints.positive_definite)
    rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
    with numpyro.plate("tosses", len(tosses)):
        numpyro.sample("toss", dist.Bernoulli(p), obs=tosses)
    with numpyro.plate("colours", len(colours)):
        numpyro.sample("colour", dist.Categorical(w), obs=colours)
    with numpyro.plate("counts", len(counts)):
        numpyro.sample("count", dist.Poisson(rate), obs=counts)
    with numpyro.plate("points", len(points)):
        numpyro.sample("point", dist.MultivariateNormal(jnp.zeros(2), cov), obs=points)


POINTS = np.random.default_rng(1).multivariate_normal([0, 0], [[2, 0.7], [0.7, 1]], 40)
CONJUGATE = np.repeat([1, 0], [7, 3]), np.repeat([0, 1, 2], [5, 2, 1]), np.array([2, 4, 1, 5]), POINTS


@pytest.fixture(scope="module")
def drawn():
    return autoem.compare(conjugate, {"nuts": NUTS(500, 3000, 1, point="mode")}, KEY, *CONJUGATE)["nuts"]


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("p", dist.Beta(1.0 + 7, 1.0 + 3)),
        ("w", dist.Dirichlet(1 + jnp.array([5.0, 2.0, 1.0]))),
        ("rate", dist.Gamma(3.0 + 12, 2.0 + 4)),
    ],
)
def test_nuts_draws_from_conjugate_posteriors(drawn, name, law):
    assert drawn.result.details["ess"] > 1000
    draws, sd = np.asarray(drawn.result.draws[name]).reshape(3000, -1), np.sqrt(np.asarray(law.variance).ravel())
    # an effective sample size of 1,000 at least: four standard errors
    np.testing.assert_allclose(draws.mean(0), np.asarray(law.mean).ravel(), atol=4 * sd.max() / np.sqrt(1000))
    np.testing.assert_allclose(draws.std(0), sd, rtol=0.12)


def test_nuts_has_the_volume_of_a_covariance(drawn):
    """Inverse Wishart with n - d - 1 degrees of freedom: its mean is S / (n - 2 d - 2)."""
    np.testing.assert_allclose(drawn.result.draws["cov"].mean((0, 1)), POINTS.T @ POINTS / (40 - 6), atol=0.08)


def test_nuts_says_which_priors_are_flat_and_what_its_best_draw_is(drawn):
    assert "flat prior on the constrained scale of p, w, cov" in " ".join(drawn.notes)
    assert drawn.objective == pytest.approx(drawn.result.details["best"], abs=1e-9)
    assert drawn.objective == pytest.approx(drawn.log_joint, abs=1e-9)


def test_what_no_plan_integrates_is_not_climbed():
    """Effects of two crossed factors on counts: their posterior does not fall into cells."""

    def crossed(y, a, b):
        spread = numpyro.param("spread", jnp.ones(2), constraint=constraints.positive)
        with numpyro.plate("rows", 3):
            u = numpyro.sample("u", dist.Normal(0, spread[0]))
        with numpyro.plate("columns", 2):
            v = numpyro.sample("v", dist.Normal(0, spread[1]))
        with numpyro.plate("cells", 12):
            numpyro.sample("y", dist.Poisson(jnp.exp(u[a] + v[b])), obs=y)

    y = np.array([3, 1, 0, 7, 2, 1, 4, 1, 1, 5, 3, 0])
    strategies = {"ascent": GradientAscent(), "nuts": NUTS()}
    found = autoem.compare(crossed, strategies, KEY, y, np.arange(12) % 3, np.arange(12) % 2)
    assert not found.exact
    for label in ("ascent", "nuts"):
        assert "could climb the likelihood" in str(found[label].error)
    assert found.verdict() == "Verdict: no strategy has an end point that could be measured."


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GradientAscent(steps=0), r"GradientAscent\(steps=0\): steps must be at least 1"),
        (lambda: GradientAscent(optimizer=3), r"GradientAscent\(optimizer=3\): use an optax optimiser"),
        (lambda: SVI(guide=3), r"SVI\(guide=3\): use a class"),
        (lambda: SVI(num_particles=1.5), r"SVI\(num_particles=1.5\): num_particles must be a whole number"),
        (lambda: NUTS(point="median"), r"point must be 'mean' or 'mode'"),
        (lambda: NUTS(target_accept=1.0), r"target_accept must lie between 0 and 1"),
        (lambda: NUTS(num_chains=0), r"NUTS\(num_chains=0\): num_chains must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused_as_they_were_typed(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()

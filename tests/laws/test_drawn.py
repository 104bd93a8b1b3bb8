"""Latents treated by draws: the joint density they are drawn from, and where each treatment must end.

Against NumPyro's own density with the discrete latents enumerated; against the exact E-step on models that have one
(random effects, whose posterior is Gaussian); and against each other, within their stated standard errors.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.util import log_density

import autoem
from autoem.e_step import SAEM, Laplace, MonteCarlo, Quadrature, Variational
from autoem.treatments.laplace import JointLaplace

RNG = np.random.default_rng(3)
GROUP = np.repeat(np.arange(8), 5)
Y = 1.0 + 0.8 * RNG.normal(size=8)[GROUP] + 0.6 * RNG.normal(size=40)
ROWS, COLUMNS = RNG.integers(0, 6, 150), RNG.integers(0, 5, 150)
COUNTS = RNG.poisson(np.exp(0.4 + 0.6 * RNG.normal(size=6)[ROWS] + 0.4 * RNG.normal(size=5)[COLUMNS]))
ITEM, WHO = np.repeat(np.arange(6), 4), np.tile(np.arange(4), 6)
VOTES = RNG.integers(0, 2, 24)


def intercepts(group, y):
    mu = numpyro.param("mu", 0.0)
    between = numpyro.param("between", 1.0, constraint=constraints.positive)
    within = numpyro.param("within", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", 8):
        u = numpyro.sample("u", dist.Normal(0, between))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mu + u[group], within), obs=y)


def crossed(rows, columns, counts):
    a = numpyro.param("a", 0.0)
    su = numpyro.param("su", 1.0, constraint=constraints.positive)
    sv = numpyro.param("sv", 1.0, constraint=constraints.positive)
    with numpyro.plate("row", 6):
        u = numpyro.sample("u", dist.Normal(0, su))
    with numpyro.plate("column", 5):
        v = numpyro.sample("v", dist.Normal(0, sv))
    with numpyro.plate("data", len(counts)):
        numpyro.sample("y", dist.Poisson(jnp.exp(a + u[rows] + v[columns])), obs=counts)


def judged(item, who, votes):
    p = numpyro.param("p", 0.4, constraint=constraints.unit_interval)
    skill = numpyro.param("skill", 1.0)
    with numpyro.plate("judges", 4):
        a = numpyro.sample("a", dist.Normal(skill, 0.5))
    with numpyro.plate("items", 6):
        z = numpyro.sample("z", dist.Bernoulli(p))
    with numpyro.plate("votes", len(votes)):
        numpyro.sample("vote", dist.Bernoulli(logits=(2 * z[item] - 1) * a[who]), obs=votes)


def volatility(y):
    phi = numpyro.param("phi", 0.9, constraint=constraints.unit_interval)
    s = numpyro.param("s", 0.5, constraint=constraints.positive)

    def step(h, y):
        h = numpyro.sample("h", dist.Normal(phi * h, s))
        numpyro.sample("y", dist.Normal(0, jnp.exp(h / 2)), obs=y)
        return h, None

    scan(step, 0.0, y)


def fit(model, data, **options):
    return autoem.EM(model, progress=False, **options).run(jax.random.key(0), *data)


def treated(model, data, **options):
    built, source = autoem.EM(model, **options)._derive(data, {})
    key = jax.random.key(0)
    return built, built.start(source, key), built.bundle(source, key)


def test_joint_density_sums_the_discrete_latents():
    """At two draws of the judges' skills, over all 2^6 classes of the items."""
    built, params, bundle = treated(judged, (ITEM, WHO, VOTES))
    draws = RNG.normal(size=(2, 4))
    ours = built.kernel.treatment.hidden.log_joint(built.kernel, params, bundle, {"a": jnp.asarray(draws)})
    grid = (np.arange(64)[:, None] >> np.arange(6)) & 1
    for a, value in zip(draws, ours, strict=True):
        one = jax.jit(lambda z, a=a: log_density(judged, (ITEM, WHO, VOTES), {}, {**params, "a": a, "z": z})[0])
        assert value == pytest.approx(float(jax.nn.logsumexp(jnp.stack([one(z) for z in grid]))), abs=1e-9)


def test_joint_density_of_a_chain():
    y = RNG.normal(size=7)
    built, params, bundle = treated(volatility, (y,))
    h = RNG.normal(size=(1, 7))
    ours = built.kernel.treatment.hidden.log_joint(built.kernel, params, bundle, {"h": jnp.asarray(h)})
    before = np.concatenate([[0.0], h[0, :-1]])
    theirs = dist.Normal(0.9 * before, 0.5).log_prob(h[0]).sum() + dist.Normal(0, jnp.exp(h[0] / 2)).log_prob(y).sum()
    assert ours[0] == pytest.approx(float(theirs), abs=1e-9)


def as_drawn(strategy):
    """The Gaussian model with all its cells drawn, and exactly."""
    exact = treated(intercepts, (GROUP, Y))
    return exact, treated(intercepts, (GROUP, Y), e_step=strategy)


def test_one_step_from_gaussian_nodes_is_the_exact_one():
    """Of a Gaussian posterior Laplace's approximation is exact, and so are the statistics of its nodes."""
    (exact, params, bundle), (drawn, _, _) = as_drawn(MonteCarlo())
    hidden = drawn.kernel.treatment.hidden
    kernel = dataclasses.replace(drawn.kernel, treatment=JointLaplace(hidden))
    state = kernel.init_e_step(params, bundle, jax.random.key(0))
    ours, theirs = kernel.expect(params, bundle, state), exact.kernel.expect(params, bundle)
    assert ours.likelihood == pytest.approx(float(theirs.likelihood), abs=1e-8)
    moved, _ = kernel.maximise(params, ours.statistics, bundle, kernel.init_states(params))
    step, _ = exact.kernel.maximise(params, theirs.statistics, bundle, exact.kernel.init_states(params))
    for n, value in step.items():
        np.testing.assert_allclose(moved[n], value, rtol=1e-7)


EXACT = {}


def exact_fit():
    if not EXACT:
        EXACT["fit"] = fit(intercepts, (GROUP, Y), tol=1e-12, max_steps=5000)
    return EXACT["fit"]


@pytest.mark.parametrize(
    "strategy", [MonteCarlo(num_draws=16), SAEM(burn_in=20, num_draws=32), Variational(AutoMultivariateNormal)]
)
def test_draws_end_where_the_exact_e_step_does(strategy):
    """Parameters within a quarter of a standard error, the likelihood within four of its own; a bound is lower."""
    exact, errors = exact_fit(), exact_fit().standard_errors()
    result = fit(intercepts, (GROUP, Y), e_step=strategy, init=dict(exact.params), max_steps=150)
    for n, value in result.params.items():
        assert abs(value - exact.params[n]) < 0.25 * errors[n], n
    assert result.standard_error < 0.1
    below, chance = exact.log_likelihood - result.log_likelihood, 0.05 + 4 * result.standard_error
    assert -chance < below < chance + 0.25 * (result.objective_name == "ELBO")


def test_estimated_likelihood_keeps_to_its_standard_error():
    """Of 20 estimates at fixed parameters at most two lie more than two and a half standard errors off."""
    (exact, params, bundle), (drawn, _, _) = as_drawn(MonteCarlo())
    truth = exact.kernel.log_likelihood(params, bundle)
    run = jax.jit(lambda key: drawn.kernel.treatment.estimate(drawn.kernel, params, bundle, key))
    off = [abs(value - truth) / error for value, error in (run(jax.random.key(i)) for i in range(20))]
    assert sum(x > 2.5 for x in off) <= 2 and max(off) < 5


def test_laplace_ends_where_its_objective_is_flat():
    """The gradient of the approximate log-likelihood, in standard errors, at the fixed point of the EM map."""
    built, _, bundle = treated(crossed, (ROWS, COLUMNS, COUNTS))
    result = fit(crossed, (ROWS, COLUMNS, COUNTS), tol=1e-12)
    names = list(result.params)

    @jax.jit
    def objective(values):
        moved = {**result.params, **dict(zip(names, values, strict=True))}
        return built.kernel.expect(moved, bundle, jnp.zeros(11)).likelihood

    at = jnp.stack([result.params[n] for n in names])
    h = 1e-3
    for i, name in enumerate(names):
        step = h * jnp.eye(len(names))[i]
        up, here, down = objective(at + step), objective(at), objective(at - step)
        slope, bend = (up - down) / (2 * h), (up - 2 * here + down) / h**2
        assert abs(slope) / np.sqrt(abs(bend)) < 0.05, name
    assert "Laplace" in result.objective_name


def test_strategies_agree_on_a_crossed_model():
    laplace = fit(crossed, (ROWS, COLUMNS, COUNTS))
    drawn = fit(crossed, (ROWS, COLUMNS, COUNTS), e_step=MonteCarlo(), max_steps=120)
    assert drawn.log_likelihood == pytest.approx(laplace.log_likelihood, abs=0.2 + 4 * drawn.standard_error)
    for n, value in laplace.params.items():
        assert float(drawn.params[n]) == pytest.approx(float(value), abs=0.1), n
    bound = fit(crossed, (ROWS, COLUMNS, COUNTS), e_step=Variational(), max_steps=120)
    assert bound.objective_name == "ELBO" and bound.log_likelihood < drawn.log_likelihood + 4 * bound.standard_error


def test_posterior_of_draws_is_that_of_the_exact_model():
    exact = exact_fit().posterior()
    result = fit(intercepts, (GROUP, Y), e_step=MonteCarlo(), init=dict(exact_fit().params), max_steps=0)
    drawn = result.posterior()
    np.testing.assert_allclose(drawn.mean["u"], exact.mean["u"], atol=0.1)
    np.testing.assert_allclose(drawn.sd["u"], exact.sd["u"], rtol=0.25)
    low, high = drawn.interval("u", 0.9)
    centre = np.asarray(exact.mean["u"])
    assert np.all(np.asarray(low) < centre)
    assert np.all(centre < np.asarray(high))
    assert drawn.sample(jax.random.key(1), 5)["u"].shape == (5, 8)
    with pytest.raises(autoem.PlanError, match="each datum"):
        _ = drawn.log_likelihood


def test_classes_beside_draws_are_exact_given_them():
    """Probabilities of the classes, against all classes and a grid over one judge's skill."""

    def one_judge(item, votes):
        p = numpyro.param("p", 0.4, constraint=constraints.unit_interval)
        a = numpyro.sample("a", dist.Normal(1.0, 0.5))
        with numpyro.plate("items", 6):
            z = numpyro.sample("z", dist.Bernoulli(p))
        with numpyro.plate("votes", len(votes)):
            numpyro.sample("vote", dist.Bernoulli(logits=(2 * z[item] - 1) * a), obs=votes)

    em = autoem.EM(one_judge, latent=["a"], e_step={"a": MonteCarlo(num_chains=8)}, max_steps=0, progress=False)
    post = em.run(jax.random.key(0), ITEM, VOTES).posterior()
    skill = np.linspace(-2, 4, 601)
    vote = dist.Bernoulli(logits=skill[:, None] * np.array([[[-1.0]], [[1.0]]]))
    each = np.stack([vote.log_prob(VOTES[i == ITEM]).sum(-1) for i in range(6)])
    each = each + np.log([0.6, 0.4])[:, None]
    joint = np.logaddexp(each[:, 0], each[:, 1]).sum(0) + np.asarray(dist.Normal(1.0, 0.5).log_prob(skill))
    weight = np.exp(joint - joint.max())
    weight /= weight.sum()
    truth = (np.exp(each[:, 1] - np.logaddexp(each[:, 0], each[:, 1])) * weight).sum(1)
    np.testing.assert_allclose(post.marginals["z"][:, 1], truth, atol=0.03)
    assert post.mean["a"] == pytest.approx((skill * weight).sum(), abs=0.05)


def test_a_guide_of_the_users_serves_new_data():
    """An amortised guide, linear as the exact posterior is: its bound reaches the log-likelihood."""
    x = RNG.normal(size=(60, 3)) @ np.array([[1.0, 0.3, 0.1], [0, 1, 0.2], [0, 0, 1]])

    def model(x):
        load = numpyro.param("load", jnp.array([1.0, 0.5, 0.2]))
        noise = numpyro.param("noise", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", len(x)):
            f = numpyro.sample("f", dist.Normal(0, 1))
            numpyro.sample("x", dist.Normal(f[:, None] * load, noise).to_event(1), obs=x)

    def guide(x):
        w = numpyro.param("w", jnp.zeros(3))
        s = numpyro.param("spread", 0.5, constraint=constraints.positive)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("f", dist.Normal(x @ w, s))

    exact = fit(model, (x,), latent=["f"])
    result = fit(model, (x,), latent=["f"], e_step=Variational(guide, steps=40), init=dict(exact.params), max_steps=80)
    assert result.log_likelihood == pytest.approx(exact.log_likelihood, abs=0.6)
    new = RNG.normal(size=(5, 3))
    ours, theirs = result.posterior(new).mean["f"], exact.posterior(new).mean["f"]
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=0.15)


def test_a_guide_without_the_latent_is_refused():
    def guide(group, y):
        numpyro.sample("v", dist.Normal(0, 1))

    with pytest.raises(autoem.PlanError, match="no sample site for it"):
        fit(intercepts, (GROUP, Y), e_step=Variational(guide))


@pytest.mark.parametrize(("strategy", "words"), [
    (Quadrature(), "tied"), (autoem.e_step.Exact(), "tied"),
])  # fmt: skip
def test_what_was_asked_for_and_cannot_be_is_refused(strategy, words):
    with pytest.raises(autoem.PlanError, match=words):
        autoem.EM(crossed, e_step=strategy).plan(ROWS, COLUMNS, COUNTS)


def test_two_treatments_of_tied_latents_are_refused():
    with pytest.raises(autoem.PlanError, match="one strategy"):
        autoem.EM(crossed, e_step={"u": MonteCarlo(), "v": Variational()}).plan(ROWS, COLUMNS, COUNTS)


def test_random_maps_are_not_extrapolated():
    with pytest.raises(autoem.PlanError, match="draws at random"):
        autoem.EM(intercepts, e_step=SAEM(), accelerate=autoem.accelerate.Squarem()).plan(GROUP, Y)


def test_laplace_in_cells_agrees_with_quadrature():
    """A logistic random intercept and slope in each group: two dimensions a cell."""
    x = RNG.normal(size=(30, 6))
    y = RNG.uniform(size=(30, 6)) < 1 / (1 + np.exp(-(0.3 + x + RNG.normal(size=(30, 1)))))

    def model(x, y):
        b = numpyro.param("b", 0.0)
        s = numpyro.param("s", 1.0, constraint=constraints.positive)
        with numpyro.plate("groups", 30, dim=-2):
            u = numpyro.sample("u", dist.Normal(0, s))
            with numpyro.plate("rows", 6, dim=-1):
                numpyro.sample("y", dist.Bernoulli(logits=b * x + u), obs=y)

    rule, laplace = (fit(model, (x, y.astype(int)), e_step=s) for s in (Quadrature(), Laplace()))
    assert laplace.plan.e_step("u") == "Laplace"
    assert laplace.log_likelihood == pytest.approx(rule.log_likelihood, abs=0.5)
    assert float(laplace.params["b"]) == pytest.approx(float(rule.params["b"]), abs=0.05)
    assert float(laplace.params["s"]) == pytest.approx(float(rule.params["s"]), rel=0.15)


@pytest.mark.parametrize("bad", [
    lambda: Variational(num_draws=0), lambda: MonteCarlo(kernel="gibbs"), lambda: SAEM(decay=0.4),
    lambda: SAEM(memory=1),
])  # fmt: skip
def test_options_out_of_range(bad):
    with pytest.raises(ValueError, match=r"at least|must"):
        bad()


def test_a_masked_cell_that_is_read_has_no_law():
    """Refused; where no site reads it, it leaves the objective as it is."""
    present, group = np.arange(8) < 6, np.repeat(np.arange(8), 5)

    def model(y, seen):
        s = numpyro.param("s", 1.0, constraint=constraints.positive)
        with numpyro.plate("groups", 8), numpyro.handlers.mask(mask=present):
            u = numpyro.sample("u", dist.Normal(0, s))
        with numpyro.plate("rows", 40), numpyro.handlers.mask(mask=seen):
            numpyro.sample("y", dist.Normal(u[group], 1.0), obs=y)

    em = autoem.EM(model, e_step=MonteCarlo())
    with pytest.raises(autoem.PlanError, match="mask takes out cells"):
        em.plan(Y, np.ones(40, bool))
    assert em.plan(Y, present[group]).e_step("u") == "Monte Carlo"


def test_a_parabola_is_not_seen_in_an_exponential_in_single_precision():
    """A Poisson mean of crossed effects has no Normal conditionals, however few digits there are."""
    with jax.enable_x64(False):
        data = tuple(jnp.asarray(x, jnp.int32) for x in (ROWS, COLUMNS, COUNTS))
        assert autoem.EM(crossed).plan(*data).e_step("u") == "Laplace"

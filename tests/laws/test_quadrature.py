"""Adaptive quadrature: against a fine grid, over priors and readers without a conjugate form."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem
from autoem.e_step.cells.quadrature import Gauss
from autoem.graph.programs import jit_once

from ..local_models import GROUP, QUADRATURE, ROWS, X, on_a_grid

KEY = jax.random.key(0)
EVERY_PAIR = pytest.mark.parametrize("pair", QUADRATURE, ids=repr)


def kernel_of(model, *args, **options):
    built, source = autoem.EM(model, progress=False, latent=["u"], **options)._derive(args, {})
    assert all(isinstance(i.block.how, Gauss) for i in built.kernel.integrals)
    return built.kernel, built.start(source, KEY), built.bundle(source, KEY)


@EVERY_PAIR
@pytest.mark.parametrize("grouped", [False, True], ids=["by_row", "by_group"])
def test_integrals_moments_and_slopes(pair, grouped):
    kernel, params, bundle = kernel_of(
        pair.model(grouped=grouped), pair.y, X, e_step={"u": autoem.e_step.Quadrature(points=60)}
    )
    (block,), names = kernel.integrals, list(kernel.problem.factors)
    method = block.block.how

    @jit_once
    def everything(params, bundle):
        likelihood, slope = jax.value_and_grad(kernel.log_likelihood)(params, bundle)
        statistics = kernel.expect(params, bundle)[2]
        filled = kernel.completed(params, bundle)
        of_q = jax.grad(lambda p: kernel.problem.q(p, statistics, filled, names))(params)
        found = block.integrate(params, bundle)[1]
        draws = jax.vmap(lambda k: method.sample(k, found)["u"])(jax.random.split(KEY, 2000)).mean(0)
        return likelihood, slope, of_q, method.mean(found)["u"], method.covariance(found)["u"][..., 0, 0], draws

    likelihood, slope, of_q, mean, variance, draws = everything(params, bundle)
    home = GROUP if grouped else np.arange(ROWS)
    expected = np.array([on_a_grid(pair, [i for i in range(ROWS) if home[i] == c]) for c in sorted(set(home))])
    # sixty points leave what the tails' distance from a Gaussian makes of them
    np.testing.assert_allclose(likelihood, expected[:, 0].sum(), rtol=5e-6)
    np.testing.assert_allclose(mean, expected[:, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, expected[:, 2], rtol=1e-3)
    assert (np.abs(draws - mean) / np.sqrt(variance / 2000)).max() < 6  # importance draws have a little bias
    for name in params:
        np.testing.assert_allclose(of_q[name], slope[name], rtol=1e-8, atol=1e-9, err_msg=name)


@EVERY_PAIR
def test_it_is_chosen_and_rises(pair):
    em = autoem.EM(pair.model(), progress=False, max_steps=6, tol=0.0)
    assert em.plan(pair.y, X).e_step("u") == "quadrature"
    history = np.asarray(em.run(KEY, pair.y, X).history)
    assert np.isfinite(history).all()
    assert np.all(np.diff(history) >= -1e-6)  # the rule moves with the nodes, by less than it errs


def test_two_dimensions_and_a_discrete_latent_beside():
    """A class decides how two correlated effects act on counts: against a product of two fine rules."""
    y = np.array([[0, 2, 1], [3, 0, 5], [1, 1, 0], [6, 2, 9]])

    def model(y):
        share = numpyro.param("share", jnp.array([0.3, 0.7]), constraint=constraints.simplex)
        slope = numpyro.param("slope", jnp.array([0.4, 1.1]))
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Categorical(share))
            u = numpyro.sample("u", dist.MultivariateNormal(jnp.zeros(2), jnp.array([[1.0, 0.4], [0.4, 0.8]])))
            rate = jnp.exp(u[:, :1] + slope[z][:, None] * u[:, 1:] * jnp.arange(-1, 2))
            numpyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)

    kernel, params, bundle = kernel_of(model, y, e_step={"u": autoem.e_step.Quadrature(points=25)})
    at, w = np.polynomial.legendre.leggauss(400)
    u = np.stack(np.meshgrid(8 * at, 8 * at, indexing="ij"), -1).reshape(-1, 2)
    weight = (64 * w[:, None] * w).ravel()
    prior = dist.MultivariateNormal(jnp.zeros(2), jnp.array([[1.0, 0.4], [0.4, 0.8]])).log_prob(u)
    total = 0.0
    for row in y:
        by_class = []
        for p, s in zip((0.3, 0.7), (0.4, 1.1), strict=True):
            rate = jnp.exp(u[:, :1] + s * u[:, 1:] * jnp.arange(-1, 2))
            by_class.append(p * (weight * jnp.exp(prior + dist.Poisson(rate).log_prob(row).sum(-1))).sum())
        total += float(jnp.log(sum(by_class)))
    np.testing.assert_allclose(jax.jit(kernel.log_likelihood)(params, bundle), total, rtol=1e-6)
    result = autoem.EM(model, progress=False, max_steps=5, tol=0.0, init="model").run(KEY, y)
    assert np.all(np.diff(result.history) >= -1e-6)
    assert result.posterior(y).mean["u"].shape == (4, 2)


@pytest.mark.parametrize("points", [1, 2, 3])
def test_a_gaussian_posterior_is_integrated_exactly_by_any_number_of_points(points):
    """By one as well, which is Laplace's approximation."""
    y = np.array([0.3, -1.0, 2.0])

    def model(y):
        s = numpyro.param("s", 0.7, constraint=constraints.positive)
        with numpyro.plate("rows", 3):
            u = numpyro.sample("u", dist.Normal(0.0, s))
            numpyro.sample("y", dist.Normal(u, 1.0), obs=y)

    fits = [autoem.EM(model, progress=False, e_step=how) for how in (None, autoem.e_step.Quadrature(points=points))]
    exact, by_rule = (em.run(KEY, y) for em in fits)
    assert (
        by_rule.plan.e_step("u") == ("Laplace" if points == 1 else "quadrature") and exact.plan.e_step("u") == "exact"
    )
    np.testing.assert_allclose(by_rule.log_likelihood, exact.log_likelihood, rtol=1e-10)
    np.testing.assert_allclose(by_rule.params["s"], exact.params["s"], rtol=1e-6)


def test_what_cannot_be_integrated_is_refused_by_name():
    def ties(y):
        b = numpyro.param("b", 1.0)
        with numpyro.plate("rows", len(y)):
            u = numpyro.sample("u", dist.Normal(b, 1.0))
            numpyro.sample("y", dist.Poisson(jnp.exp(u + u.sum())), obs=y)

    def many(y):
        b = numpyro.param("b", 1.0)
        with numpyro.plate("rows", 3):
            u = numpyro.sample("u", dist.Normal(b, 1.0).expand([3, 4]).to_event(1))
            numpyro.sample("y", dist.Poisson(jnp.exp(u.sum(-1))), obs=y)

    y, rule = np.array([1, 0, 2]), autoem.e_step.Quadrature()
    with pytest.raises(autoem.PlanError, match="3 dimensions, not 5"):  # all its cells are one vector
        autoem.EM(ties, e_step=rule).plan(np.array([1, 0, 2, 1, 0]))
    with pytest.raises(autoem.PlanError, match="3 dimensions, not 4"):
        autoem.EM(many, e_step=rule).plan(y)
    for model in (ties, many):
        assert autoem.EM(model).plan(np.array([1, 0, 2, 1, 0]) if model is ties else y).e_step("u") == "Laplace"
    with pytest.raises(autoem.PlanError, match="no conjugate form"):
        pair = QUADRATURE[0]
        autoem.EM(pair.model(), e_step=autoem.e_step.Exact()).plan(pair.y, X)

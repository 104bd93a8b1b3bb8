"""Coefficients on latents, solved from moments at once: equal to the normal equations that differentiation builds."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem
from autoem.e_step.tables.completions import NODES
from autoem.lowering.kernel import with_nodes
from autoem.m_step.closed_form.location import LeastSquares
from autoem.m_step.closed_form.regress import Regression

RNG = np.random.default_rng(4)
X = RNG.normal(size=(40, 2)) @ RNG.normal(size=(2, 5)) + 0.5 * RNG.normal(size=(40, 5)) + RNG.normal(size=5)


def factors(x):
    loadings = numpyro.param("loadings", jnp.asarray(RNG.normal(size=(5, 2))))
    centre = numpyro.param("centre", jnp.zeros(5))
    scale = numpyro.param("scale", jnp.ones(5), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        f = numpyro.sample("f", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(centre + f @ loadings.T, scale).to_event(1), obs=x)


def without_centre(x):
    """The intercepts are known: a column of coefficients that no parameter fills."""
    loadings = numpyro.param("loadings", jnp.asarray(RNG.normal(size=(5, 2))))
    noise = numpyro.param("noise", jnp.eye(5), constraint=constraints.positive_definite)
    with numpyro.plate("rows", len(x)):
        f = numpyro.sample("f", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
        numpyro.sample("x", dist.MultivariateNormal(0.3 + f @ loadings.T, noise), obs=x)


def with_holes(x):
    """Each output weighs its rows by a mask of its own."""
    loadings = numpyro.param("loadings", jnp.asarray(RNG.normal(size=(5, 2))))
    centre = numpyro.param("centre", jnp.zeros(5))
    seen = jnp.asarray(np.random.default_rng(1).random((40, 5)) < 0.7)
    with numpyro.plate("rows", len(x)):
        f = numpyro.sample("f", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(centre + f @ loadings.T, 0.5).mask(seen).to_event(1), obs=x)


def mixed_factors(x):
    """Loadings for each class."""
    weights = numpyro.param("weights", jnp.array([0.4, 0.6]), constraint=constraints.simplex)
    loadings = numpyro.param("loadings", jnp.asarray(RNG.normal(size=(2, 5, 2))))
    centre = numpyro.param("centre", jnp.asarray(RNG.normal(size=(2, 5))))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(weights))
        f = numpyro.sample("f", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        mean = centre[z] + jnp.einsum("...ij,...j->...i", loadings[z], f)
        numpyro.sample("x", dist.Normal(mean, 0.7).to_event(1), obs=x)


def states(x):
    move = numpyro.param("move", 0.5 * jnp.eye(2))
    read = numpyro.param("read", jnp.asarray(RNG.normal(size=(5, 2))))
    jolt = numpyro.param("jolt", jnp.eye(2), constraint=constraints.positive_definite)

    def step(z, x):
        z = numpyro.sample("z", dist.MultivariateNormal(move @ z, jolt))
        numpyro.sample("x", dist.Normal(read @ z, 0.6).to_event(1), obs=x)
        return z, None

    first = numpyro.sample("first", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    scan(step, first, x)


def known_multiples(x):
    """Columns whose entries count by known numbers, which differ between them and between outputs."""
    loadings = numpyro.param("loadings", jnp.asarray(RNG.normal(size=(5, 2))))
    times = jnp.array([[1.0, 20.0], [3.0, 0.1], [1.0, 1.0], [-2.0, 5.0], [1.0, 0.5]])
    with numpyro.plate("rows", len(x)):
        f = numpyro.sample("f", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(f @ (loadings * times).T, 0.5).to_event(1), obs=x)


def both(model, x):
    """Every block of the kind, its update, and that of the same parameters by differentiation."""
    em = autoem.EM(model, init="model", progress=False)
    built, source = em._derive((x,), {})
    key = jax.random.key(0)
    kernel, bundle = built.kernel, built.bundle(source, key)
    params = built.start(source, key)
    statistics = kernel.expect(params, bundle).statistics
    bundle = with_nodes(bundle, statistics.get(NODES, {}))
    for block in kernel.blocks:
        if isinstance(block, Regression):
            plain = LeastSquares(block.names, block.problem, block.reason)
            one, other = (b.solve(params, statistics, bundle, None)[0] for b in (block, plain))
            yield block, one, other


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (factors, {"loadings", "centre"}),
        (without_centre, {"loadings"}),
        (with_holes, {"loadings", "centre"}),
        (mixed_factors, {"loadings", "centre"}),
        (known_multiples, {"loadings"}),
        (states, {"move", "read"}),
    ],
)
def test_the_update_is_that_of_the_normal_equations(model, names):
    found = list(both(model, X))
    assert {n for block, _, _ in found for n in block.names} == names
    for _, one, other in found:
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-9, atol=1e-11)


def a_common_multiple(x):
    loadings = numpyro.param("loadings", jnp.asarray(RNG.normal(size=(5, 2))))
    times = numpyro.param("times", 1.5)
    with numpyro.plate("rows", len(x)):
        f = numpyro.sample("f", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(f @ (times * loadings).T, 0.5).to_event(1), obs=x)


def test_a_multiple_of_zero_leaves_them_where_they_are():
    em = autoem.EM(a_common_multiple, init="model", progress=False)
    built, source = em._derive((X,), {})
    bundle, params = built.bundle(source, jax.random.key(0)), built.start(source, jax.random.key(0))
    statistics = built.kernel.expect(params, bundle).statistics
    (block,) = (b for b in built.kernel.blocks if b.names == ("loadings",))
    assert isinstance(block, Regression)
    found = block.solve({**params, "times": jnp.zeros(())}, statistics, bundle, None)[0]
    np.testing.assert_array_equal(found["loadings"], params["loadings"])


def zeros_among(x):
    """A loading is fixed at zero for some outputs and not for others: columns are not free as a whole."""
    loadings = numpyro.param("loadings", jnp.ones(8))
    full = jnp.concatenate([loadings, jnp.zeros(2)]).reshape(5, 2)
    with numpyro.plate("rows", len(x)):
        f = numpyro.sample("f", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(f @ full.T, 0.5).to_event(1), obs=x)


def tied(x):
    """Two outputs share their loadings."""
    loadings = numpyro.param("loadings", jnp.ones((3, 2)))
    with numpyro.plate("rows", len(x)):
        f = numpyro.sample("f", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        full = loadings[jnp.array([0, 0, 1, 2, 2])]
        numpyro.sample("x", dist.Normal(f @ full.T, jnp.array([0.5, 1.0, 0.5, 1.0, 2.0])).to_event(1), obs=x)


def shrunk(x):
    """A prior on the loadings adds to the normal equations of each output on its own scale."""
    loadings = numpyro.sample("loadings", dist.Normal(jnp.zeros((5, 2)), 1.0).to_event(2))
    with numpyro.plate("rows", len(x)):
        f = numpyro.sample("f", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(f @ loadings.T, 0.5).to_event(1), obs=x)


def noise_of_a_class(x):
    """Classes differ in their noise alone, so that their rows weigh otherwise in coefficients that they share."""
    loadings = numpyro.param("loadings", jnp.asarray(RNG.normal(size=(5, 2))))
    scale = numpyro.param("scale", jnp.array([0.3, 1.0]), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.4, 0.6])))
        f = numpyro.sample("f", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(f @ loadings.T, scale[z][..., None]).to_event(1), obs=x)


@pytest.mark.parametrize("model", [zeros_among, tied, shrunk, noise_of_a_class])
def test_what_is_not_free_as_a_whole_is_left_to_the_normal_equations(model):
    assert not list(both(model, X))


def test_shared_coefficients_of_classes_that_differ_in_noise():
    centred = X - X.mean(0)
    result = autoem.EM(noise_of_a_class, init="model", progress=False, max_steps=4000, tol=1e-13).run(
        jax.random.key(0), centred
    )

    def log_likelihood(params):
        shared = params["loadings"] @ params["loadings"].T
        laws = [dist.MultivariateNormal(jnp.zeros(5), shared + jnp.eye(5) * s**2) for s in params["scale"]]
        each = jnp.stack([law.log_prob(centred) for law in laws]) + jnp.log(jnp.array([0.4, 0.6]))[:, None]
        return jax.scipy.special.logsumexp(each, axis=0).sum()

    assert result.log_likelihood == pytest.approx(float(log_likelihood(result.params)), rel=1e-10)
    for slope in jax.tree.leaves(jax.grad(log_likelihood)(dict(result.params))):
        np.testing.assert_allclose(slope, 0, atol=1e-3)

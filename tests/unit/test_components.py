"""Mixtures written as one site, with their component written out, against the same with the latent in the text."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints

import autoem
from autoem import Components, ModelError

RNG = np.random.default_rng(6)
WHICH = RNG.integers(0, 2, 80)
X = np.where(WHICH[:, None] == 1, 3.0, 0.0) + RNG.normal(size=(80, 2))
COUNTS = np.where(RNG.random(80) < 0.4, 0, RNG.poisson(3.0, 80))
KEY = jax.random.key(0)


def share():
    return numpyro.param("share", jnp.array([0.4, 0.6]), constraint=constraints.simplex)


def loc(*shape):
    start = jnp.array([0.5, 2.0])
    return numpyro.param("loc", jnp.broadcast_to(start.reshape(2, *(1,) * len(shape)), (2, *shape)))


def scale():
    return numpyro.param("scale", 1.0, constraint=constraints.positive)


def cov():
    return numpyro.param("cov", jnp.tile(jnp.eye(2), (2, 1, 1)), constraint=constraints.positive_definite)


def normal(x):
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(share()), dist.Normal(loc(), scale())), obs=x[:, 0])


def normal_by_hand(x):
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("x_component", dist.Categorical(share()))
        numpyro.sample("x", dist.Normal(loc()[z], scale()), obs=x[:, 0])


def independent(x):
    with numpyro.plate("rows", len(x)):
        law = dist.Normal(loc(2), scale()).to_event(1)
        numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(share()), law), obs=x)


def independent_by_hand(x):
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("x_component", dist.Categorical(share()))
        numpyro.sample("x", dist.Normal(loc(2)[z], scale()).to_event(1), obs=x)


def full(x):
    with numpyro.plate("rows", len(x)):
        law = dist.MultivariateNormal(loc(2), cov())
        numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(share()), law), obs=x)


def full_by_hand(x):
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("x_component", dist.Categorical(share()))
        numpyro.sample("x", dist.MultivariateNormal(loc(2)[z], cov()[z]), obs=x)


def by_row(x):
    slope = numpyro.param("slope", jnp.array([0.1, 1.0]))
    with numpyro.plate("rows", len(x)):
        law = dist.Normal(x[:, 1, None] * slope, scale())
        numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(share()), law), obs=x[:, 0])


def by_row_by_hand(x):
    slope = numpyro.param("slope", jnp.array([0.1, 1.0]))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("x_component", dist.Categorical(share()))
        numpyro.sample("x", dist.Normal(x[:, 1] * slope[z], scale()), obs=x[:, 0])


CASES = ((normal, normal_by_hand), (independent, independent_by_hand), (full, full_by_hand), (by_row, by_row_by_hand))


@pytest.mark.parametrize(("model", "by_hand"), CASES)
def test_the_path_is_that_of_the_latent_by_hand(model, by_hand):
    rewritten = handlers.reparam(model, config={"x": Components()})
    ours, theirs = (
        autoem.EM(m, init="model", max_steps=8, tol=0.0, progress=False).run(KEY, X) for m in (rewritten, by_hand)
    )
    np.testing.assert_allclose(ours.history, theirs.history, rtol=1e-9)
    for name, value in theirs.params.items():
        np.testing.assert_allclose(ours.params[name], value, rtol=1e-7, err_msg=name)
    found, expected = (r.posterior(X).marginals["x_component"] for r in (ours, theirs))
    np.testing.assert_allclose(found, expected, atol=1e-8)
    plan = str(autoem.EM(rewritten, progress=False).plan(X))
    assert "Newton" not in plan and "gradient" not in plan


def test_the_likelihood_is_that_of_the_mixture_itself():
    rewritten = handlers.reparam(full, config={"x": Components()})
    result = autoem.EM(rewritten, init="model", progress=False).run(KEY, X)
    p = result.params
    law = dist.MixtureSameFamily(dist.Categorical(p["share"]), dist.MultivariateNormal(p["loc"], p["cov"]))
    assert result.log_likelihood == pytest.approx(float(law.log_prob(X).sum()), rel=1e-9)


def test_zeros_by_a_gate_or_by_the_rate():
    """The published updates: Lambert 1992, section 3.1; at the end the mean is (1 - gate) rate."""

    def model(x):
        gate = numpyro.param("gate", 0.3, constraint=constraints.unit_interval)
        rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.ZeroInflatedPoisson(gate, rate), obs=x)

    em = autoem.EM(
        handlers.reparam(model, config={"x": Components()}), init="model", max_steps=2000, tol=1e-13, progress=False
    )
    result = em.run(KEY, jnp.asarray(COUNTS))
    gate, rate = result.params["gate"], result.params["rate"]
    assert float((1 - gate) * rate) == pytest.approx(COUNTS.mean(), rel=1e-6)
    expected = float(dist.ZeroInflatedPoisson(gate, rate).log_prob(COUNTS).sum())
    assert result.log_likelihood == pytest.approx(expected, rel=1e-9)
    newton = autoem.EM(model, init="model", tol=1e-12, progress=False).run(KEY, jnp.asarray(COUNTS))
    assert result.log_likelihood == pytest.approx(newton.log_likelihood, abs=1e-7)


def unit(name, value=0.3):
    return numpyro.param(name, value, constraint=constraints.unit_interval)


def positive(name, value=1.0):
    return numpyro.param(name, value, constraint=constraints.positive)


INFLATED = {  # a base, and how its parameters are then maximised
    "Poisson": (lambda: dist.Poisson(positive("a")), "closed form"),
    "Binomial": (lambda: dist.Binomial(12, probs=unit("a")), "closed form"),
    "Geometric": (lambda: dist.Geometric(probs=unit("a")), "closed form"),
    "NegativeBinomial": (lambda: dist.NegativeBinomialProbs(3.0, unit("a")), "closed form"),
    "NegativeBinomial2": (lambda: dist.NegativeBinomial2(positive("a"), positive("b", 2.0)), "Newton"),
    "Binomial by logits": (lambda: dist.Binomial(12, logits=numpyro.param("a", 0.0)), "Newton"),
}


@pytest.mark.parametrize("by", ["gate", "gate_logits"])
@pytest.mark.parametrize("name", INFLATED)
def test_zeros_of_any_base(name, by):
    """The end is that of Newton's method on NumPyro's own density, and the likelihood is that density."""
    base, expected = INFLATED[name]

    def law():
        gate = unit("gate") if by == "gate" else numpyro.param("gate", -1.0)
        return dist.ZeroInflatedDistribution(base(), **{by: gate})

    def model(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", law(), obs=x)

    spread = np.random.default_rng(9).negative_binomial(1, 0.2, 80) * (COUNTS > 0)
    counts = jnp.asarray(spread if name == "NegativeBinomial2" else COUNTS)
    options = {"init": "model", "max_steps": 4000, "tol": 1e-13, "progress": False}
    ours = autoem.EM(handlers.reparam(model, config={"x": Components()}), **options).run(KEY, counts)
    newton = autoem.EM(model, **options).run(KEY, counts)
    assert ours.plan.m_step("gate") == "closed form" and ours.plan.m_step("a") == expected
    assert ours.log_likelihood == pytest.approx(newton.log_likelihood, abs=2e-5)
    assert (np.diff(ours.history) >= -1e-9).all()
    with handlers.substitute(data=ours.params):
        own = float(law().log_prob(counts).sum())
    assert ours.log_likelihood == pytest.approx(own, rel=1e-7)
    certain = ours.posterior(counts).marginals["x_component"][:, 1]
    assert (certain[counts > 0] < 1e-12).all() and (certain[counts == 0] > 0.1).all()


def test_a_zero_inflated_negative_binomial_regression():
    """`ZeroInflatedNegativeBinomial2` by rows, against the same without the rewriting."""

    def model(x, counts):
        beta, r = numpyro.param("beta", jnp.zeros(2)), positive("r")
        with numpyro.plate("rows", len(x)):
            law = dist.ZeroInflatedNegativeBinomial2(jnp.exp(x @ beta), r, gate=unit("gate"))
            numpyro.sample("y", law, obs=counts)

    options = {"init": "model", "max_steps": 2000, "tol": 1e-12, "progress": False}
    ours = autoem.EM(handlers.reparam(model, config={"y": Components()}), **options).run(KEY, X, COUNTS)
    plain = autoem.EM(model, **options).run(KEY, X, COUNTS)
    assert ours.log_likelihood == pytest.approx(plain.log_likelihood, abs=1e-5)
    assert "handlers.reparam(model, config={site: autoem.Components()})" in " ".join(str(plain.plan).split())


def general(components):
    def model(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.MixtureGeneral(dist.Categorical(share()), components()), obs=x)

    return model


def two_normals():
    low = dist.Normal(numpyro.param("low", 0.5), positive("scale"))
    return [low, dist.Normal(numpyro.param("high", 2.0), 1.0)]


def two_normals_by_hand(x):
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("x_component", dist.Categorical(share()))
        low, high = numpyro.param("low", 0.5), numpyro.param("high", 2.0)
        scales = jnp.stack([positive("scale"), 1.0])
        numpyro.sample("x", dist.Normal(jnp.stack([low, high])[z], scales[z]), obs=x)


def test_a_list_of_one_family_has_its_closed_forms():
    rewritten = handlers.reparam(general(two_normals), config={"x": Components()})
    ours, theirs = (
        autoem.EM(m, init="model", max_steps=8, tol=0.0, progress=False).run(KEY, X[:, 0])
        for m in (rewritten, two_normals_by_hand)
    )
    np.testing.assert_allclose(ours.history, theirs.history, rtol=1e-9)
    assert {r.strategy for r in ours.plan.parameters} == {"closed form"}
    for name, value in theirs.params.items():
        np.testing.assert_allclose(ours.params[name], value, rtol=1e-7, err_msg=name)


def normal_and_logistic():
    return [
        dist.Normal(numpyro.param("low", 0.5), positive("scale")),
        dist.Logistic(numpyro.param("high", 2.0), positive("width")),
    ]


def vectors():
    return [
        dist.MultivariateNormal(numpyro.param("low", jnp.zeros(2)), jnp.eye(2)),
        dist.MultivariateStudentT(4.0, numpyro.param("high", jnp.ones(2)), jnp.eye(2)),
    ]


def two_vectors():
    return [
        dist.MultivariateNormal(numpyro.param("low", jnp.zeros(2)), cov()[0]),
        dist.MultivariateNormal(numpyro.param("high", jnp.ones(2)), cov()[1]),
    ]


def test_a_list_of_vectors_of_one_family():
    rewritten = handlers.reparam(general(two_vectors), config={"x": Components()})
    result = autoem.EM(rewritten, init="model", max_steps=5, tol=0.0, progress=False).run(KEY, X)
    theirs = autoem.EM(full_by_hand, init={"share": jnp.array([0.4, 0.6]), "loc": jnp.array([[0.0, 0], [1, 1]])},
                       max_steps=5, tol=0.0, progress=False).run(KEY, X)  # fmt: skip
    np.testing.assert_allclose(result.history, theirs.history, rtol=1e-9)
    assert {r.strategy for r in result.plan.parameters} == {"closed form"}


def test_a_list_of_several_families():
    """The likelihood is that of NumPyro's mixture at the end; the weights are the mean of the posterior there."""
    for components, x in ((normal_and_logistic, X[:, 0]), (vectors, X)):
        rewritten = handlers.reparam(general(components), config={"x": Components()})
        result = autoem.EM(rewritten, init="model", max_steps=2000, tol=1e-13, progress=False).run(KEY, x)
        assert result.plan.m_step("share") == "closed form" and (np.diff(result.history) >= -1e-8).all()
        with handlers.substitute(data=result.params):
            law = dist.MixtureGeneral(dist.Categorical(share()), components())
        assert result.log_likelihood == pytest.approx(float(law.log_prob(x).sum()), rel=1e-9)
        weights = result.posterior(x).marginals["x_component"].mean(0)
        np.testing.assert_allclose(weights, result.params["share"], atol=1e-4)


def test_a_component_of_a_smaller_support():
    """NumPyro's mixture over the whole line, one of whose components lives on its positive half."""
    law = [dist.Normal(-1.0, 1.0), dist.HalfNormal(2.0)]

    def model(x):
        mixture = dist.MixtureGeneral(dist.Categorical(share()), law, support=constraints.real)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", mixture, obs=x)

    x = np.random.default_rng(2).normal(size=60)
    result = autoem.EM(handlers.reparam(model, config={"x": Components()}), progress=False).run(KEY, x)
    mixture = dist.MixtureGeneral(dist.Categorical(result.params["share"]), law, support=constraints.real)
    with numpyro.validation_enabled(False):
        expected = float(mixture.log_prob(x).sum())
    assert result.log_likelihood == pytest.approx(expected, rel=1e-9)
    assert (result.posterior(x).marginals["x_component"][x < 0, 1] == 0).all()


def test_the_rewritten_law_draws_what_it_weighs():
    """`em.check` refits data that NumPyro draws from it: components of several families, and zeros of two kinds."""
    zeros = INFLATED["NegativeBinomial2"][0]

    def inflated(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.ZeroInflatedDistribution(zeros(), gate=unit("gate")), obs=x)

    for model, x in ((general(normal_and_logistic), X[:, 0]), (inflated, jnp.asarray(COUNTS))):
        em = autoem.EM(handlers.reparam(model, config={"x": Components()}), init="model", progress=False)
        report = em.check(KEY, x)
        assert report.ok, report


def anywhere_or_near(x):
    """Components of supports that differ, of which the narrow one ends inside the data."""
    weight = numpyro.param("weight", jnp.array([0.3, 0.7]), constraint=constraints.simplex)
    centre = numpyro.param("centre", 0.0)
    spread = numpyro.param("spread", 1.0, constraint=constraints.positive)
    laws = [dist.Uniform(-2.0, 2.0), dist.Normal(centre, spread)]
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.MixtureGeneral(dist.Categorical(weight), laws, support=constraints.real), obs=x)


def extra_zeros(x):
    gate = numpyro.param("gate", 0.3, constraint=constraints.unit_interval)
    mean = numpyro.param("mean", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.ZeroInflatedNegativeBinomial2(mean, 5.0, gate=gate), obs=x)


@pytest.mark.parametrize("model, data", [(anywhere_or_near, X[:, 0]), (extra_zeros, COUNTS)])
def test_components_of_different_laws_become_masked_sites(model, data):
    """NumPyro's own density of the mixture at the estimate, and the maximum by Newton's method on that."""
    options = {"init": "model", "tol": 1e-13, "max_steps": 5000, "progress": False}
    em = autoem.EM(handlers.reparam(model, config={"x": Components()}), **options)
    result = em.run(KEY, data)
    assert all(em.plan(data).m_step(n).startswith("closed form") for n in result.params if n != "mean")
    given = handlers.substitute(handlers.seed(model, 0), data=result.params)
    with numpyro.validation_enabled(False):
        own = handlers.trace(given).get_trace(data)["x"]["fn"].log_prob(data).sum()
    np.testing.assert_allclose(result.log_likelihood, own, rtol=1e-7)  # to as many digits as JAX's betaln has
    newton = autoem.EM(model, **options).run(KEY, data)
    assert result.log_likelihood == pytest.approx(newton.log_likelihood, abs=1e-6)
    assert result.posterior(data).marginals["x_component"].shape == (len(data), 2)


def test_other_sites_are_refused():
    def model(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Normal(numpyro.param("mean", 0.0), 1.0), obs=x[:, 0])

    with pytest.raises(ModelError, match="site 'x': Components"):
        autoem.EM(handlers.reparam(model, config={"x": Components()}), progress=False).plan(X)

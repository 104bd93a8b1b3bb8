"""Latents integrated cell by cell beside the rest: known margins, discrete latents, weights, answers, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem

KEY = jax.random.key(0)
RNG = np.random.default_rng(3)
POSITIVE = constraints.positive


def fitted(model, *args, steps=4, **options):
    return autoem.EM(model, progress=False, max_steps=steps, tol=0.0, init="model", **options).run(KEY, *args)


def test_dirichlet_and_multinomial():
    """The margin is NumPyro's own Dirichlet-multinomial; data and posterior agree with its mean."""
    y = RNG.multinomial(12, [0.2, 0.5, 0.3], size=9)

    def model(y):
        a = numpyro.param("a", jnp.array([1.0, 2.0, 0.5]), constraint=POSITIVE)
        with numpyro.plate("rows", len(y)):
            p = numpyro.sample("p", dist.Dirichlet(a))
            numpyro.sample("y", dist.Multinomial(12, p), obs=y)

    result = fitted(model, y)
    assert result.plan.e_step("p") == "exact" and "Dirichlet" in str(result.plan)
    margin = dist.DirichletMultinomial(result.params["a"], 12).log_prob(y).sum()
    np.testing.assert_allclose(result.log_likelihood, margin, rtol=1e-8)
    assert np.all(np.diff(result.history) > 0)
    posterior, a = result.posterior(y), result.params["a"]
    expected = (a + y) / (a.sum() + 12)
    np.testing.assert_allclose(posterior.mean["p"], expected, rtol=1e-9)
    sd = jnp.sqrt(expected * (1 - expected) / (a.sum() + 13))
    np.testing.assert_allclose(posterior.sd["p"], sd, rtol=1e-8)
    draws = posterior.sample(KEY, 2000)["p"]
    np.testing.assert_allclose(draws.sum(-1), 1, rtol=1e-9)
    assert (np.abs(draws.mean(0) - expected) / (sd / np.sqrt(2000))).max() < 5


def test_categorical_words_of_a_document():
    """Several rows read one Dirichlet cell by index."""
    words, document = RNG.integers(0, 3, 20), np.repeat(np.arange(4), 5)
    counts = np.zeros((4, 3), int)
    np.add.at(counts, (document, words), 1)

    def model(words):
        a = numpyro.param("a", jnp.array([1.0, 2.0, 0.5]), constraint=POSITIVE)
        with numpyro.plate("documents", 4):
            p = numpyro.sample("p", dist.Dirichlet(a))
        with numpyro.plate("words", 20):
            numpyro.sample("w", dist.Categorical(p[document]), obs=words)

    result = fitted(model, words)
    a, n = result.params["a"], counts
    margin = (jax.scipy.special.gammaln(a + n) - jax.scipy.special.gammaln(a)).sum()
    margin += (jax.scipy.special.gammaln(a.sum()) - jax.scipy.special.gammaln(a.sum() + n.sum(1))).sum()
    np.testing.assert_allclose(result.log_likelihood, margin, rtol=1e-9)


def test_a_mixture_of_negative_binomials():
    """A discrete latent beside, in the same cells: tables over it, and nodes of their own for each of its states."""
    y = RNG.poisson(np.where(RNG.random(60) < 0.4, RNG.gamma(3, 0.5, 60), RNG.gamma(20, 0.5, 60)))

    def model(y):
        share = numpyro.param("share", jnp.array([0.4, 0.6]), constraint=constraints.simplex)
        a = numpyro.param("a", jnp.array([2.0, 5.0]), constraint=POSITIVE)
        m = numpyro.param("m", jnp.array([1.0, 12.0]), constraint=POSITIVE)
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Categorical(share))
            u = numpyro.sample("u", dist.Gamma(a[z], a[z] / m[z]))
            numpyro.sample("y", dist.Poisson(u), obs=y)

    result = fitted(model, y)
    p = result.params

    def margin(p):
        gl, n = jax.scipy.special.gammaln, y[:, None]
        log = gl(n + p["a"]) - gl(p["a"]) - gl(n + 1.0) + p["a"] * jnp.log(p["a"] / (p["a"] + p["m"]))
        return jnp.log(p["share"]) + log + n * jnp.log(p["m"] / (p["a"] + p["m"]))

    joint = margin(p)
    np.testing.assert_allclose(result.log_likelihood, jax.nn.logsumexp(joint, 1).sum(), rtol=1e-9)
    assert np.all(np.diff(result.history) > 0)
    posterior = result.posterior(y)
    weight = jax.nn.softmax(joint, 1)
    np.testing.assert_allclose(posterior.marginals["z"], weight, rtol=1e-7, atol=1e-12)
    mean = (weight * (p["a"] + y[:, None]) / (p["a"] / p["m"] + 1)).sum(1)
    np.testing.assert_allclose(posterior.mean["u"], mean, rtol=1e-8)
    np.testing.assert_allclose(posterior.log_likelihood, jax.nn.logsumexp(joint, 1), rtol=1e-7)
    assert posterior.sample(KEY, 3)["u"].shape == (3, 60)


def test_a_contaminated_t():
    """A discrete latent that only the reader sees: outliers with another scale."""
    y = RNG.standard_t(4, 30)

    def model(y):
        w = numpyro.param("w", jnp.array([0.8, 0.2]), constraint=constraints.simplex)
        s = numpyro.param("s", jnp.array([1.0, 4.0]), constraint=POSITIVE)
        m = numpyro.param("m", 0.0)
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Categorical(w))
            u = numpyro.sample("u", dist.Gamma(2.0, 2.0))
            numpyro.sample("y", dist.Normal(m, s[z] / jnp.sqrt(u)), obs=y)

    result = fitted(model, y)
    p = result.params
    joint = jnp.log(p["w"]) + dist.StudentT(4.0, p["m"], p["s"]).log_prob(y[:, None])
    np.testing.assert_allclose(result.log_likelihood, jax.nn.logsumexp(joint, 1).sum(), rtol=1e-9)
    assert np.all(np.diff(result.history) > 0)
    assert {result.plan.m_step(n) for n in ("w", "s", "m")} == {"closed form"}


def poisson_rows(y, times=None):
    a, b = (numpyro.param(n, 1.5, constraint=POSITIVE) for n in "ab")
    with numpyro.plate("rows", len(y)), numpyro.handlers.scale(scale=1.0 if times is None else times):
        u = numpyro.sample("u", dist.Gamma(a, b))
        numpyro.sample("y", dist.Poisson(u), obs=y)


def test_a_weight_of_a_row_is_its_number_of_copies():
    y, times = np.array([0, 3, 1, 7]), np.array([2.0, 1.0, 3.0, 0.0])
    weighted = fitted(poisson_rows, y, times)
    copied = fitted(poisson_rows, np.repeat(y, times.astype(int)))
    np.testing.assert_allclose(weighted.history, copied.history, rtol=1e-10)
    for name in "ab":
        np.testing.assert_allclose(weighted.params[name], copied.params[name], rtol=1e-9)


def test_one_latent_for_all_rows():
    y = np.array([0, 3, 1, 7])

    def model(y):
        a, b = (numpyro.param(n, 1.5, constraint=POSITIVE) for n in "ab")
        u = numpyro.sample("u", dist.Gamma(a, b))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Poisson(u), obs=y)

    result = fitted(model, y)
    a, b = result.params["a"], result.params["b"]
    gl = jax.scipy.special.gammaln
    margin = a * jnp.log(b) - gl(a) + gl(a + 11) - (a + 11) * jnp.log(b + 4) - gl(y + 1.0).sum()
    np.testing.assert_allclose(result.log_likelihood, margin, rtol=1e-10)
    np.testing.assert_allclose(result.posterior(y).mean["u"], (a + 11) / (b + 4), rtol=1e-9)


def test_standard_errors_are_those_of_the_margin():
    y = RNG.poisson(RNG.gamma(2.0, 1.5, 80))
    result = fitted(poisson_rows, y, steps=300)
    gl = jax.scipy.special.gammaln

    def margin(v):
        a, b = v
        return (a * jnp.log(b) - gl(a) + gl(a + y) - (a + y) * jnp.log(b + 1)).sum()

    at = jnp.array([result.params["a"], result.params["b"]])
    expected = jnp.sqrt(jnp.diagonal(jnp.linalg.inv(-jax.hessian(margin)(at))))
    errors = result.standard_errors()
    np.testing.assert_allclose([errors["a"], errors["b"]], expected, rtol=1e-2)  # in the logarithms, where EM stopped


def test_a_mask_that_hides_a_latent_that_is_read():
    def model(y):
        with numpyro.plate("rows", len(y)):
            with numpyro.handlers.mask(mask=np.array([True, False, True, True])):
                u = numpyro.sample("u", dist.Gamma(numpyro.param("a", 1.0, constraint=POSITIVE), 1.0))
            numpyro.sample("y", dist.Poisson(u), obs=y)

    with pytest.raises(autoem.PlanError, match="a mask takes out cells"):
        autoem.EM(model).plan(np.array([0, 3, 1, 7]))


def test_a_discrete_latent_of_the_group():
    """Rows find both latents of their group by index."""
    y, group = np.array([1, 4, 0, 2, 7]), np.array([0, 0, 1, 1, 1])

    def model(y):
        a, b = (numpyro.param(n, 1.3, constraint=POSITIVE) for n in "ab")
        w = numpyro.param("w", 0.3, constraint=constraints.unit_interval)
        with numpyro.plate("groups", 2):
            z = numpyro.sample("z", dist.Bernoulli(w))
            u = numpyro.sample("u", dist.Gamma(a + z, b))
        with numpyro.plate("rows", 5):
            numpyro.sample("y", dist.Poisson(u[group] * (1 + z[group])), obs=y)

    result = fitted(model, y)
    p, gl = result.params, jax.scipy.special.gammaln
    counts, sizes = np.bincount(group, y), np.bincount(group)
    parts = []
    for z in (0, 1):
        shape = p["a"] + z
        log = shape * jnp.log(p["b"]) - gl(shape) + gl(shape + counts)
        log += counts * np.log1p(z) - (shape + counts) * jnp.log(p["b"] + sizes * (1 + z))
        parts.append(log + jnp.log(p["w"] if z else 1 - p["w"]))
    total = jnp.logaddexp(*parts).sum() - gl(y + 1.0).sum()
    np.testing.assert_allclose(result.log_likelihood, total, rtol=1e-10)
    assert np.all(np.diff(result.history) > 0)


def test_what_a_scan_carries_is_not_integrated_cell_by_cell():
    def model(y):
        s = numpyro.param("s", 1.0, constraint=POSITIVE)

        def step(x, seen):
            x = numpyro.sample("x", dist.Normal(x, s))
            numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=seen)
            return x, None

        scan(step, 0.0, y)

    y = np.array([1, 4, 0, 2, 7])
    with pytest.raises(autoem.PlanError, match="a scan carries it from step to step"):
        autoem.EM(model, e_step=autoem.e_step.Exact()).plan(y)
    assert autoem.EM(model).plan(y).e_step("x") == "Laplace"  # all steps at once


def test_entries_of_an_event_are_told_to_move_into_a_plate():
    def model(y):
        with numpyro.plate("rows", 5):
            law = dist.Gamma(numpyro.param("a", 1.0, constraint=POSITIVE), 1.0)
            u = numpyro.sample("u", law.expand([5, 2]).to_event(1))
            numpyro.sample("y", dist.Poisson(u).to_event(1), obs=y)

    assert "each in a cell of a plate would be integrated apart" in " ".join(
        row.reason for row in autoem.EM(model).plan(np.arange(10).reshape(5, 2)).latents
    )


@pytest.mark.parametrize("what", ["threshold", "prior"])
def test_cuts_that_have_no_formula(what):
    def model(y):
        c = numpyro.param("c", 0.3)
        with numpyro.plate("rows", len(y)):
            law = dist.Normal(c, 1.0) if what == "threshold" else dist.Gumbel(c, 1.0)
            u = numpyro.sample("u", law)
            numpyro.factor("cut", jnp.where(u > (c if what == "threshold" else 0.0), 0.0, -jnp.inf))

    said = "threshold of 'u' depends on 'c'" if what == "threshold" else "Gumbel has no formula"
    with pytest.raises(autoem.PlanError, match=said):
        autoem.EM(model).plan(np.arange(3.0))


def test_the_example_of_the_plan():
    y = np.array([0, 3, 1, 7])
    text = str(autoem.EM(poisson_rows).plan(y))
    assert "u  exact: conjugate: given Poisson 'y', its posterior in every cell is Gamma" in text
    assert "Diaconis" in autoem.EM(poisson_rows).plan(y).citations()

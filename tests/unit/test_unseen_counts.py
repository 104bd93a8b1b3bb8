"""Counts that nobody saw, masks that latents decide, densities that vanish, and parameters kept within bounds.

Each model is written as its author would write it; each answer was worked out by other means.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.optimize
import scipy.special
import scipy.stats as st
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem
from autoem.selection._simulate import refuse_unsimulable

KEY = jax.random.key(2)
MOST = 25


def positive(name, value):
    return numpyro.param(name, jnp.asarray(value), constraint=constraints.positive)


def share(name, value):
    return numpyro.param(name, jnp.asarray(value), constraint=constraints.unit_interval)


def fitted(model, *args, **options):
    em = autoem.EM(model, **{"init": "model", "tol": 1e-13, "max_steps": 5000, "progress": False, **options})
    return em.plan(*args), em.run(KEY, *args), em


def numbers(result):
    return {n: np.asarray(v) for n, v in result.params.items()}


def closed(plan, *names):
    return [plan.m_step(n).startswith("closed form") for n in names]


def abundance(y):
    """Royle 2004: how many animals live at a site, of which every visit finds some."""
    rate, seen = positive("rate", 3.0), share("seen", 0.5)
    with numpyro.plate("sites", y.shape[0], dim=-2):
        number = numpyro.sample("number", dist.Poisson(rate))
        with numpyro.plate("visits", y.shape[1]):
            numpyro.sample("y", dist.Binomial(number, seen), obs=y)


def test_a_number_of_trials_that_nobody_saw_is_counted():
    """The sum over numbers, in SciPy; the posterior of one site too."""
    rng = np.random.default_rng(11)
    y = rng.binomial(rng.poisson(4, 30)[:, None], 0.5, (30, 3))
    options = {"e_step": {"number": autoem.e_step.Truncated(0, MOST)}}
    plan, result, _ = fitted(abundance, y, **options)
    assert closed(plan, "rate", "seen") == [True, True]
    p, k = numbers(result), np.arange(MOST + 1)
    joint = st.poisson.logpmf(k, p["rate"])[:, None] + st.binom.logpmf(y, k[:, None, None], p["seen"]).sum(-1)
    np.testing.assert_allclose(result.log_likelihood, scipy.special.logsumexp(joint, 0).sum(), rtol=1e-12)
    found = result.posterior(y).marginals["number"].reshape(30, -1)
    np.testing.assert_allclose(found, scipy.special.softmax(joint, 0).T, atol=1e-12)


def survivors(first, second):
    """An open population: those of the first year that live on, and how many of each year are found."""
    rate, lives, seen = positive("rate", 3.0), share("lives", 0.5), share("seen", 0.5)
    with numpyro.plate("sites", len(first)):
        one = numpyro.sample("one", dist.Poisson(rate))
        two = numpyro.sample("two", dist.Binomial(one, lives))
        numpyro.sample("first", dist.Binomial(one, seen), obs=first)
        numpyro.sample("second", dist.Binomial(two, seen), obs=second)


def test_a_support_that_reads_another_latent_is_the_range_over_its_states():
    """The double sum, in SciPy; its maximum by a search of SciPy's."""
    rng = np.random.default_rng(11)
    one = rng.poisson(4, 40)
    first, second = rng.binomial(one, 0.6), rng.binomial(rng.binomial(one, 0.5), 0.6)
    plan, result, _ = fitted(survivors, first, second, e_step={"one": autoem.e_step.Truncated(0, MOST)})
    assert closed(plan, "rate", "lives", "seen") == [True, True, True]
    assert result.posterior(first, second).marginals["two"].shape == (40, MOST + 1)
    k = np.arange(MOST + 1)

    def log_likelihood(rate, lives, seen):
        joint = st.poisson.logpmf(k, rate)[:, None, None] + st.binom.logpmf(k, k[:, None], lives)[:, :, None]
        joint = joint + st.binom.logpmf(first, k[:, None], seen)[:, None] + st.binom.logpmf(second, k[:, None], seen)
        return scipy.special.logsumexp(joint, (0, 1)).sum()

    p = numbers(result)
    np.testing.assert_allclose(result.log_likelihood, log_likelihood(**p), rtol=1e-12)
    best = scipy.optimize.minimize(
        lambda v: -log_likelihood(np.exp(v[0]), *scipy.special.expit(v[1:])), [1.4, 0, 0], tol=1e-10
    )
    assert result.log_likelihood == pytest.approx(-best.fun, abs=1e-6)


def twice_thinned(sent, seen):
    hit = share("hit", 0.5)
    with numpyro.plate("batches", len(sent)):
        hits = numpyro.sample("hits", dist.Binomial(sent, hit))
        numpyro.sample("seen", dist.Binomial(hits, 0.7), obs=seen)


def test_a_latent_count_of_a_total_of_its_own_is_counted():
    """A thinned binomial is a binomial: the estimate is that of one line."""
    rng = np.random.default_rng(11)
    sent = rng.integers(3, 12, 40)
    seen = rng.binomial(sent, 0.3)
    plan, result, _ = fitted(twice_thinned, sent, seen)
    assert closed(plan, "hit") == [True]
    np.testing.assert_allclose(result.params["hit"], seen.sum() / sent.sum() / 0.7, rtol=1e-6)
    own = st.binom.logpmf(seen, sent, 0.7 * float(result.params["hit"])).sum()
    np.testing.assert_allclose(result.log_likelihood, own, rtol=1e-12)


def linkage(y):
    """A cell split in two, one of which holds `z` of its 125: what is observed is computed from the latent."""
    psi = share("psi", 0.5)
    z = numpyro.sample("z", dist.DiscreteUniform(0, 125))
    cells = jnp.stack([jnp.asarray(0.5), psi / 4, (1 - psi) / 4, (1 - psi) / 4, psi / 4])
    numpyro.sample("y", dist.Multinomial(197, cells), obs=jnp.stack([y[0] - z, z, y[1], y[2], y[3]]))


def test_iterates_where_an_observation_is_computed_from_a_latent():
    """Dempster, Laird and Rubin 1977, Table 1."""
    y = jnp.array([125, 18, 20, 34])
    for steps, published in ((1, 0.608247423), (5, 0.626815632)):
        plan, result, _ = fitted(linkage, y, max_steps=steps)
        np.testing.assert_allclose(result.params["psi"], published, atol=1e-9)
    assert closed(plan, "psi") == [True]
    with pytest.raises(autoem.PlanError, match="computed from latents"):
        refuse_unsimulable(result)


def outliers(x):
    """A mask for each component, of distributions that no index could choose between."""
    far, centre, spread = share("far", 0.2), numpyro.param("centre", 0.5), positive("spread", 1.0)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(far))
        with handlers.mask(mask=z == 1):
            numpyro.sample("anywhere", dist.Uniform(-10.0, 10.0), obs=x)
        with handlers.mask(mask=z == 0):
            numpyro.sample("near", dist.Normal(centre, spread), obs=x)


def test_a_mask_may_be_decided_by_a_latent():
    """The mixture's density in SciPy, and its maximum by a search."""
    rng = np.random.default_rng(11)
    x = np.where(rng.random(120) < 0.2, rng.uniform(-10, 10, 120), rng.normal(1, 0.5, 120))
    plan, result, _ = fitted(outliers, x)
    assert closed(plan, "far", "centre", "spread") == [True] * 3

    def log_likelihood(far, centre, spread):
        return np.log(far / 20 + (1 - far) * st.norm.pdf(x, centre, spread)).sum()

    np.testing.assert_allclose(result.log_likelihood, log_likelihood(**numbers(result)), rtol=1e-12)
    best = scipy.optimize.minimize(
        lambda v: -log_likelihood(scipy.special.expit(v[0]), v[1], np.exp(v[2])), [-1, 1, -1], tol=1e-10
    )
    assert result.log_likelihood == pytest.approx(-best.fun, abs=1e-6)


def sorts(group, x):
    """Which of two laws holds for a group of rows: masks that read latents of another plate."""
    first, rate, tempo = share("first", 0.5), positive("rate", 1.0), positive("tempo", 2.0)
    with numpyro.plate("groups", 10):
        z = numpyro.sample("z", dist.Bernoulli(first))
    with numpyro.plate("rows", len(x)):
        with handlers.mask(mask=z[group] == 1):
            numpyro.sample("waits", dist.Exponential(rate), obs=x)
        with handlers.mask(mask=z[group] == 0):
            numpyro.sample("sums", dist.Gamma(9.0, tempo), obs=x)


def test_a_mask_may_read_latents_of_another_plate():
    """The densities of each group's rows under either law, multiplied in SciPy."""
    rng = np.random.default_rng(11)
    group = np.repeat(np.arange(10), 4)
    x = np.where(group < 4, rng.exponential(1.0, 40), rng.gamma(9.0, 0.5, 40))
    plan, result, _ = fitted(sorts, group, x)
    assert closed(plan, "first", "rate", "tempo") == [True] * 3
    p = numbers(result)
    one, other = st.expon.logpdf(x, scale=1 / p["rate"]), st.gamma.logpdf(x, 9, scale=1 / p["tempo"])
    parts = np.log(p["first"]) + np.bincount(group, one), np.log(1 - p["first"]) + np.bincount(group, other)
    np.testing.assert_allclose(result.log_likelihood, np.logaddexp(*parts).sum(), rtol=1e-12)


def decay(y):
    """Those of sixteen that are still alive, year by year: the support moves with the step before."""
    lives, seen = share("lives", 0.8), share("seen", 0.6)

    def year(number, y):
        number = numpyro.sample("number", dist.Binomial(number, lives))
        numpyro.sample("y", dist.Binomial(number, seen), obs=y)
        return number, None

    scan(year, 16, y)


def test_a_support_that_reads_the_step_before():
    """The forward recursion over numbers, in SciPy."""
    plan, result, _ = fitted(decay, y := np.array([9, 7, 6, 4, 4, 2]))
    assert closed(plan, "lives", "seen") == [True, True]
    p, k = numbers(result), np.arange(17)
    alpha = (k == 16).astype(float)
    for now in y:
        alpha = (alpha @ st.binom.pmf(k, k[:, None], p["lives"])) * st.binom.pmf(now, k, p["seen"])
    np.testing.assert_allclose(result.log_likelihood, np.log(alpha.sum()), rtol=1e-12)


def cured(time, event):
    """Berkson and Gage 1952 with exponential times: the sick, and those who will never fall ill."""
    sick, rate = share("sick", 0.5), positive("rate", 1.0)
    with numpyro.plate("patients", len(time)):
        z = numpyro.sample("z", dist.Bernoulli(sick))
        density = jnp.where(event, dist.Exponential(rate).log_prob(time), -rate * time)
        numpyro.factor("seen", jnp.where(z == 1, density, jnp.where(event, -jnp.inf, 0.0)))


def test_a_rate_inside_a_factor_is_events_over_exposure():
    """Three iterations of the update written out by hand."""
    rng = np.random.default_rng(11)
    time, event = rng.exponential(1.0, 60), rng.random(60) < 0.5
    sick, rate = 0.5, 1.0
    for _ in range(3):
        weight = np.where(event, 1, sick * np.exp(-rate * time) / (1 - sick + sick * np.exp(-rate * time)))
        sick, rate = weight.mean(), event.sum() / (weight * time).sum()
    plan, result, _ = fitted(cured, time, event, max_steps=3)
    np.testing.assert_allclose([result.params["sick"], result.params["rate"]], [sick, rate], rtol=1e-12)
    assert "rate  closed form: E[statistic] / E[exposure]" in str(plan)


def line(x, y):
    """A regression written as a factor, with two slopes that meet in the same density."""
    a, b, scale = numpyro.param("a", 0.0), numpyro.param("b", jnp.zeros(2)), positive("scale", 1.0)
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.factor("y", dist.Normal(a + b[z] * x, scale).log_prob(y))


def test_a_location_inside_a_factor_is_that_of_the_site():
    rng = np.random.default_rng(11)
    x = np.linspace(-1, 1, 50)
    y = np.where(np.arange(50) % 2, 1 + 2 * x, 1 - x) + 0.1 * rng.normal(size=50)

    def site(x, y):
        a, b, scale = numpyro.param("a", 0.0), numpyro.param("b", jnp.zeros(2)), positive("scale", 1.0)
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("y", dist.Normal(a + b[z] * x, scale), obs=y)

    options = {"init": {"b": jnp.array([-0.5, 1.5])}, "max_steps": 5}
    plan, result, _ = fitted(line, x, y, **options)
    assert "b      closed form: weighted least squares of a, b together" in str(plan)
    assert closed(plan, "scale") == [True]
    _, other, _ = fitted(site, x, y, **options)
    for name, value in numbers(other).items():
        np.testing.assert_allclose(result.params[name], value, rtol=1e-9, err_msg=name)


def rounded(y):
    w, loc = share("w", 0.5), numpyro.param("loc", jnp.array([0.0, 7.0]))
    scale = positive("scale", [1.0, 2.0])
    with numpyro.plate("rows", len(y)):
        law = dist.Normal(loc[z := numpyro.sample("z", dist.Bernoulli(w))], scale[z])
        numpyro.factor("y", jnp.log(law.cdf(y + 0.5) - law.cdf(y - 0.5)))


def test_cells_without_density_do_not_stop_newtons_method():
    """Rounded values so far from one component that its probability there is zero; a search by SciPy."""
    rng = np.random.default_rng(11)
    y = np.round(np.where(rng.random(100) < 0.4, rng.normal(0, 1, 100), rng.normal(9, 1.5, 100)))
    _, result, _ = fitted(rounded, y)

    def log_likelihood(w, loc, scale):
        law = st.norm(loc, scale)
        cells = law.cdf(y[:, None] + 0.5) - law.cdf(y[:, None] - 0.5)
        return np.log(cells @ np.array([1 - w, w])).sum()

    best = scipy.optimize.minimize(
        lambda v: -log_likelihood(scipy.special.expit(v[0]), v[1:3], np.exp(v[3:])), [0, 0, 9, 0, 0.4], tol=1e-10
    )
    assert result.log_likelihood == pytest.approx(-best.fun, abs=1e-6)
    assert np.isfinite(result.standard_errors()["loc"]).all()


def blood(group):
    """Two alleles each, of which the group shows: a point mass for the likelihood."""
    freq = numpyro.param("freq", jnp.full(3, 1 / 3), constraint=constraints.simplex)  # A, B, O
    shows = jnp.array([[0, 2, 0], [2, 1, 1], [0, 1, 3]])
    with numpyro.plate("people", len(group)):
        one, two = (numpyro.sample(n, dist.Categorical(freq)) for n in ("one", "two"))
        numpyro.sample("group", dist.Delta(shows[one, two]), obs=group)


def test_standard_errors_beside_impossible_completions():
    """Clarke et al. 1959 (521 people): the information of four multinomial cells, by the delta method."""
    counts = np.array([186, 38, 13, 284])
    _, result, _ = fitted(blood, np.repeat(np.arange(4), counts))
    p, q = np.asarray(result.params["freq"])[:2]

    def cells(v):
        a, b, o = v[0], v[1], 1 - v[0] - v[1]
        return jnp.array([a * a + 2 * a * o, b * b + 2 * b * o, 2 * a * b, o * o])

    information = -jax.hessian(lambda v: (counts * jnp.log(cells(v))).sum())(jnp.array([p, q]))
    own = np.sqrt(np.diag(np.linalg.inv(information)))
    np.testing.assert_allclose(result.standard_errors()["freq"][:2], own, rtol=1e-6)


def dose(group, y):
    mean = numpyro.param("mean", jnp.linspace(0, 1, 5), constraint=constraints.ordered_vector)
    scale = numpyro.param("scale", 1.0, constraint=constraints.greater_than(0.01))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mean[group], scale), obs=y)


def test_ordered_means_are_an_isotonic_regression():
    """scikit-learn's, and the standard error of a mean, pooled where two are."""
    rng = np.random.default_rng(11)
    from sklearn.isotonic import isotonic_regression

    group = np.repeat(np.arange(5), 12)
    y = np.array([0.0, 1.0, 0.5, 2.0, 1.8])[group] + 0.1 * rng.normal(size=60)
    plan, result, _ = fitted(dose, group, y)
    assert "E[count], in order" in str(plan) and "E[count]), within its bounds" in str(plan)
    own = isotonic_regression(y.reshape(5, 12).mean(1))
    np.testing.assert_allclose(result.params["mean"], own, atol=1e-9)
    pooled = np.sqrt(np.asarray(result.params["scale"]) ** 2 / np.array([12, 24, 24, 24, 24]))
    np.testing.assert_allclose(result.standard_errors()["mean"], pooled, rtol=1e-6)


def two_sided(y):
    loc, scale = positive("loc", 1.0), positive("scale", 1.0)
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(loc * (2 * z - 1), scale), obs=y)


def mixing(x, y):
    part, offset = positive("part", jnp.ones(3)), numpyro.param("offset", 0.0)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x @ part + offset, 1.0), obs=y)


def test_locations_kept_positive_have_closed_forms():
    """The symmetric mixture's fixed point by hand; for parts of a mixture SciPy's bounded least squares."""
    rng = np.random.default_rng(11)
    y = np.where(rng.random(80) < 0.5, rng.normal(-2, 1, 80), rng.normal(2, 1, 80))
    plan, result, _ = fitted(two_sided, y)
    loc, variance = (float(result.params[n]) ** k for n, k in (("loc", 1), ("scale", 2)))
    assert closed(plan, "loc") == [True]
    np.testing.assert_allclose(loc, (y * np.tanh(loc * y / variance)).mean(), rtol=1e-6)
    x = rng.random((60, 3))
    y = x @ [2.0, -0.4, 1.0] + 0.1 * rng.normal(size=60)
    plan, result, _ = fitted(mixing, x, y)
    own = scipy.optimize.lsq_linear(np.c_[x, np.ones(60)], y, ([0, 0, 0, -np.inf], np.inf), "bvls", tol=1e-14).x
    np.testing.assert_allclose([*result.params["part"], result.params["offset"]], own, atol=1e-8)
    assert np.isnan(result.standard_errors()["part"]).tolist() == [False, True, False]


def contaminated(signal, both):
    """Karlis and Ntzoufras 2003: counts that share a part."""
    shared, own = positive("shared", 0.5), positive("own", [1.0, 1.0])
    with numpyro.plate("rows", len(signal)):
        z = numpyro.sample("z", dist.Poisson(shared))
        numpyro.sample("signal", dist.Poisson(own[0]), obs=signal - z)
        numpyro.sample("both", dist.Poisson(own[1]), obs=both - z)


def test_what_is_observed_as_a_difference_is_checked_as_data_are():
    """The double sum in SciPy; NaN and halves are refused, holes left out where that is asked for."""
    rng = np.random.default_rng(12)
    z = rng.poisson(1, 30)
    data = np.stack([rng.poisson(2, 30) + z, rng.poisson(1, 30) + z]).astype(float)
    options = {"e_step": autoem.e_step.Truncated(0, 12)}
    plan, result, _ = fitted(contaminated, *data, **options)
    assert closed(plan, "shared", "own") == [True, True] and "'z' is summed over 0 ... 12 only" in str(plan)
    p, k = numbers(result), np.arange(13)[:, None]

    def log_joint(columns):
        parts = (st.poisson.logpmf(x - k, r) for x, r in zip(columns, p["own"], strict=True))
        return st.poisson.logpmf(k, p["shared"]) + sum(np.where(np.isnan(q), 0, q) for q in parts)

    np.testing.assert_allclose(result.log_likelihood, scipy.special.logsumexp(log_joint(data), 0).sum(), rtol=1e-12)
    holes, halves = data.copy(), data.copy()
    holes[0, 3], halves[1, 2] = np.nan, 0.5
    with pytest.raises(autoem.DataError, match="1 entry is NaN"):
        fitted(contaminated, *holes, **options)
    with pytest.raises(autoem.DataError, match="whole numbers; first otherwise in row 2"):
        fitted(contaminated, *halves, **options)
    _, result, _ = fitted(contaminated, *holes, missing="marginalize", **options)
    p = numbers(result)
    np.testing.assert_allclose(result.log_likelihood, scipy.special.logsumexp(log_joint(holes), 0).sum(), rtol=1e-12)


@pytest.mark.parametrize("start, kind", [([-1.0, 1.0], "positive"), ([2.0, 1.0], "ordered_vector")])
def test_a_start_outside_its_constraint_is_refused(start, kind):
    def model(x):
        loc = numpyro.param("loc", jnp.array(start), constraint=getattr(constraints, kind))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Normal(loc[numpyro.sample("z", dist.Bernoulli(0.5))], 1.0), obs=x)

    with pytest.raises(autoem.DataError, match="parameter 'loc': the model starts it outside"):
        fitted(model, np.arange(5.0))

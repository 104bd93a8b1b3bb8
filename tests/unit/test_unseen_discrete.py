"""Models of discrete latents and chains that nobody tuned for, each against an answer worked out by other means."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
from jax.scipy.special import gammaln, logsumexp
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem
from autoem.families.densities import log_density

KEY = jax.random.key(4)
COUNTS = np.random.default_rng(8).poisson(np.repeat([1.0, 6.0, 2.0], 20))


def forward(start, trans, log_density):
    """Log-likelihood of a chain, by the recursion in logarithms."""

    def step(alpha, now):
        return logsumexp(alpha[:, None] + jnp.log(trans), axis=0) + now, None

    return logsumexp(jax.lax.scan(step, jnp.log(start) + log_density[0], log_density[1:])[0])


def chain_of(emission):
    def model(y):
        trans = numpyro.param("trans", jnp.array([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
        given = emission()

        def step(z, y):
            z = numpyro.sample("z", dist.Categorical(trans[z]))
            numpyro.sample("y", given(z), obs=y)
            return z, None

        scan(step, 0, y)

    return model


def poisson():
    rate = numpyro.param("rate", jnp.array([1.0, 6.0]), constraint=constraints.positive)
    return lambda z: dist.Poisson(rate[z])


def category():
    table = numpyro.param("table", jnp.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]), constraint=constraints.simplex)
    return lambda z: dist.Categorical(table[z])


def inflated():
    gate = numpyro.param("gate", jnp.array([0.3, 0.2]), constraint=constraints.unit_interval)
    rate = numpyro.param("rate", jnp.array([1.0, 6.0]), constraint=constraints.positive)
    return lambda z: dist.ZeroInflatedPoisson(gate[z], rate=rate[z])


@pytest.mark.parametrize("emission, data", [(poisson, COUNTS), (category, np.minimum(COUNTS, 2))])
def test_standard_errors_of_a_chain_are_those_of_the_curvature_of_the_forward_recursion(emission, data):
    """The Hessian of a recursion written here, in log-odds and logarithms, by the delta method."""
    em = autoem.EM(chain_of(emission), init="model", tol=1e-13, max_steps=5000, progress=False)
    result = em.run(KEY, data)
    errors, params = result.standard_errors(), result.params

    def log_likelihood(v):
        odds = v[:2] + jnp.log(params["trans"][:, 0] / params["trans"][:, 1])
        trans = jnp.stack([jax.nn.sigmoid(odds), jax.nn.sigmoid(-odds)], 1)
        if emission is poisson:
            log_density = dist.Poisson(params["rate"] * jnp.exp(v[2:])).log_prob(data[:, None])
        else:
            logits = jnp.log(params["table"]).at[:, :2].add(v[2:].reshape(2, 2))
            log_density = jax.nn.log_softmax(logits, -1).T[data]
        return forward(trans[0], trans, log_density)

    size = 4 if emission is poisson else 6
    covariance = jnp.linalg.inv(-jax.hessian(log_likelihood)(jnp.zeros(size)))
    sd = jnp.sqrt(jnp.diagonal(covariance))
    np.testing.assert_allclose(errors["trans"][:, 0], sd[:2] * params["trans"].prod(1), rtol=1e-5)
    if emission is poisson:
        np.testing.assert_allclose(errors["rate"], sd[2:] * params["rate"], rtol=1e-5)


def test_components_are_written_out_inside_a_scan():
    """The likelihood is that of the forward recursion with the component summed inside; updates are closed forms."""
    model = handlers.reparam(chain_of(inflated), config={"y": autoem.Components()})
    em = autoem.EM(model, init="model", tol=1e-13, max_steps=5000, progress=False)
    result = em.run(KEY, COUNTS)
    assert all(em.plan(COUNTS).m_step(n).startswith("closed form") for n in ("trans", "gate", "rate"))
    gate, rate = result.params["gate"], result.params["rate"]
    y = COUNTS[:, None]
    log_density = jnp.log(
        jnp.where(y == 0, gate, 0) + (1 - gate) * jnp.exp(y * jnp.log(rate) - rate - gammaln(y + 1.0))
    )
    own = forward(result.params["trans"][0], result.params["trans"], log_density)
    np.testing.assert_allclose(result.log_likelihood, own, rtol=1e-12)
    assert result.posterior(COUNTS).marginals["y_component"].shape == (60, 2)


def negative_binomials(y):
    share = numpyro.param("share", 0.5, constraint=constraints.unit_interval)
    mean = numpyro.param("mean", jnp.array([2.0, 9.0]), constraint=constraints.positive)
    size = numpyro.param("size", jnp.array([3.0, 3.0]), constraint=constraints.positive)
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(share))
        numpyro.sample("y", dist.NegativeBinomial2(mean[z], size[z]), obs=y)


def students(y):
    df, scale = (numpyro.param(n, 4.0, constraint=constraints.positive) for n in ("df", "scale"))
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.StudentT(df, loc, scale), obs=y)


def test_a_size_that_grows_without_end_gives_the_limit_and_no_rounding_for_fit():
    """Counts less spread than a Poisson's, values of lighter tails than a Normal's: SciPy's densities of the limits."""
    y = np.repeat([2, 3, 4, 12, 13, 14, 15], [20, 100, 40, 25, 25, 25, 25])
    result = autoem.EM(negative_binomials, init="model", tol=1e-12, progress=False).run(KEY, y)
    share, mean = result.params["share"], result.params["mean"]
    log_density = scipy.stats.poisson.logpmf(y[:, None], np.asarray(mean)) + np.log([1 - share, share])
    assert result.params["size"].min() > 1e6
    np.testing.assert_allclose(result.log_likelihood, scipy.special.logsumexp(log_density, 1).sum(), rtol=1e-7)
    normal = np.linspace(-1, 1, 101)  # lighter tails than a Normal's
    result = autoem.EM(students, init="model", tol=1e-12, progress=False).run(KEY, normal)
    own = scipy.stats.norm.logpdf(normal, 0, normal.std()).sum()
    np.testing.assert_allclose(result.log_likelihood, own, rtol=1e-8)


@jax.jit
def stable(size, y):
    """Log densities of mean 3, of 11 trials of probability 0.3, and of location 1 and scale 2."""
    a, b, by_size = 0.3 * size, 0.7 * size, dist.NegativeBinomial2(jnp.array([3.0, 3.0]), size)
    return {
        "counts": log_density(dist.NegativeBinomial2(3.0, size), y),
        "mixed": log_density(dist.MixtureSameFamily(dist.Categorical(jnp.array([0.2, 0.8])), by_size), y),
        "inflated": log_density(dist.ZeroInflatedNegativeBinomial2(3.0, size, gate=0.25), y),
        "trials": log_density(dist.BetaBinomial(a, b, total_count=11), y),
        "pairs": log_density(dist.DirichletMultinomial(jnp.stack([a, b]), total_count=11), jnp.stack([y, 11 - y], -1)),
        "values": log_density(dist.StudentT(size, 1.0, 2.0), y),
    }


@pytest.mark.parametrize("size", [0.01, 1.3, 63.9, 64.1, 5e3, 1e9, 1e16, 1e26])
def test_stable_densities_are_scipys_or_the_limits(size):
    """SciPy where it keeps its digits; from a size of 1e9 on the Poisson, the binomial, the Normal."""
    y, limit, stats = np.arange(12.0), size > 1e8, scipy.stats
    counts = stats.poisson.logpmf(y, 3) if limit else stats.nbinom.logpmf(y, size, size / (size + 3))
    trials = stats.binom.logpmf(y, 11, 0.3) if limit else stats.betabinom.logpmf(y, 11, 0.3 * size, 0.7 * size)
    values = stats.norm.logpdf(y, 1, 2) if limit else stats.t.logpdf(y, size, 1, 2)
    inflated = np.log(np.where(y == 0, 0.25, 0) + 0.75 * np.exp(counts))
    own = dict(counts=counts, mixed=counts, inflated=inflated, trials=trials, pairs=trials, values=values)
    for name, found in stable(size, y).items():
        np.testing.assert_allclose(found, own[name], rtol=0, atol=1e-6 if limit else 1e-9, err_msg=name)


def recombination(first, second):
    """A locus between two that were typed: how often each half was broken is one fraction, of at most a half."""
    r = numpyro.param("r", 0.2, constraint=constraints.interval(0.0, 0.5))
    with numpyro.plate("offspring", len(first)):
        hidden = numpyro.sample("hidden", dist.Bernoulli(jnp.where(first == 1, 1 - r, r)))
        numpyro.sample("second", dist.Bernoulli(jnp.where(hidden == 1, 1 - r, r)), obs=second)


@pytest.mark.parametrize("broken", [9, 80])
def test_a_probability_kept_to_a_part_of_the_unit_interval_is_counted(broken):
    """Of 90, `broken` differ; their share is `2 r (1 - r)`, at most a half: `r` solves it, or stands at a half."""
    first = np.zeros(90, int)
    second = (np.arange(90) < broken).astype(int)
    em = autoem.EM(recombination, tol=1e-14, max_steps=20_000, progress=False)
    result = em.run(KEY, first, second)
    assert em.plan(first, second).m_step("r").startswith("closed form")
    share = min(broken / 90, 0.5)
    np.testing.assert_allclose(result.params["r"], (1 - np.sqrt(1 - 2 * share)) / 2, atol=1e-6)
    own = broken * np.log(share) + (90 - broken) * np.log(1 - share)
    np.testing.assert_allclose(result.log_likelihood, own, rtol=1e-10)
    assert np.isnan(result.standard_errors()["r"]) == (broken > 45)


ANSWERS = np.where(np.arange(40)[:, None] < 12, 0, np.random.default_rng(5).integers(0, 2, (40, 4)))
NEEDS = np.array([[1, 0], [0, 1], [1, 1], [1, 0]])


def share(name, value):
    return numpyro.param(name, jnp.asarray(value), constraint=constraints.unit_interval)


def occupancy(y):
    psi, p = share("psi", 0.6), share("p", [0.4, 0.5, 0.6, 0.3])
    with numpyro.plate("places", len(y), dim=-2):
        z = numpyro.sample("z", dist.Bernoulli(psi))
        with numpyro.plate("visits", 4):
            numpyro.sample("y", dist.Bernoulli(z * p), obs=y)


def two_sums(y):
    known, slip, guess = share("known", 0.5), share("slip", [0.1, 0.2, 0.1, 0.1]), share("guess", 0.2)
    with numpyro.plate("pupils", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(known))[..., None]
        numpyro.sample("y", dist.Bernoulli(z * (1 - slip) + (1 - z) * guess).to_event(1), obs=y)


def skills(y):
    known, slip, guess = share("known", [0.5, 0.6]), share("slip", [0.1] * 4), share("guess", [0.2] * 4)
    with numpyro.plate("pupils", len(y)):
        skill = [numpyro.sample(f"skill_{k}", dist.Bernoulli(known[k])) for k in range(2)]
        for j in range(4):
            able = jnp.ones_like(skill[0])
            for k in range(2):
                able = able * (skill[k] if NEEDS[j, k] else 1)
            numpyro.sample(f"y_{j}", dist.Bernoulli((1 - slip[j]) ** able * guess[j] ** (1 - able)), obs=y[:, j])


def by_hand(model, p, y):
    """Log-likelihood, by the sum over all states of a row."""
    total = 0.0
    for a, b in itertools.product([0, 1], repeat=2):
        if model is skills:
            able, prior = np.all(np.array([a, b]) >= NEEDS, 1), np.prod(np.where([a, b], p["known"], 1 - p["known"]))
        else:
            able, known = np.array([a] * 4), p["psi" if model is occupancy else "known"]
            prior = 0.5 * (known if a else 1 - known)  # `b` is no latent of these two
        one = np.where(able, p["p"], 0) if model is occupancy else np.where(able, 1 - p["slip"], p["guess"])
        total = total + prior * np.where(y == 1, one, 1 - one).prod(1)
    return np.log(total).sum()


@pytest.mark.parametrize("model", [occupancy, two_sums, skills])
def test_a_choice_written_as_arithmetic_is_counted(model):
    """Products with a latent that is 0 or 1, sums and powers: closed forms, and the maximum is Newton's."""
    options = dict(init="model", tol=1e-13, max_steps=5000, progress=False)
    em = autoem.EM(model, **options)
    plan, result = em.plan(ANSWERS), em.run(KEY, ANSWERS)
    assert all(plan.m_step(n).startswith("closed form") for n in result.params)
    params = {n: np.asarray(v) for n, v in result.params.items()}
    np.testing.assert_allclose(result.log_likelihood, by_hand(model, params, ANSWERS), rtol=1e-12)
    newton = {n: autoem.m_step.Newton() for n in params}
    other = autoem.EM(model, m_step=newton, **options).run(KEY, ANSWERS)
    np.testing.assert_allclose(result.log_likelihood, other.log_likelihood, rtol=1e-9)


def treated(dose, y):
    """Two sorts of people; of one the treatment changes how often they are well, written as arithmetic with data."""
    sort, well, helped = share("sort", 0.4), share("well", [0.3, 0.6]), share("helped", 0.8)
    with numpyro.plate("people", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(sort))
        p = jnp.where(z == 1, well[1], dose * helped + (1 - dose) * well[0])
        numpyro.sample("y", dist.Binomial(5, p), obs=y)


def test_data_that_are_0_or_1_choose_as_latents_do():
    """The sum over both sorts in SciPy. Other data of the same model, in between, are no choice any more."""
    rng = np.random.default_rng(6)
    dose, z = rng.integers(0, 2, 60), rng.random(60) < 0.4
    y = rng.binomial(5, np.where(z, 0.5, np.where(dose == 1, 0.9, 0.2)))
    em = autoem.EM(treated, init="model", tol=1e-13, max_steps=5000, progress=False)
    plan, result = em.plan(dose, y), em.run(KEY, dose, y)
    assert all(plan.m_step(n).startswith("closed form") for n in result.params)

    def log_likelihood(p, dose):
        first = dose * p["helped"] + (1 - dose) * p["well"][0]
        parts = [np.log(p["sort"]) + scipy.stats.binom.logpmf(y, 5, p["well"][1])]
        parts.append(np.log(1 - p["sort"]) + scipy.stats.binom.logpmf(y, 5, first))
        return scipy.special.logsumexp(parts, 0).sum()

    params = {n: np.asarray(v) for n, v in result.params.items()}
    np.testing.assert_allclose(result.log_likelihood, log_likelihood(params, dose), rtol=1e-12)
    half = dose / 2
    assert em.plan(half, y).m_step("helped") == em.plan(half.astype(float), y).m_step("well") == "Newton"
    result = em.run(KEY, half, y)
    params = {n: np.asarray(v) for n, v in result.params.items()}
    np.testing.assert_allclose(result.log_likelihood, log_likelihood(params, half), rtol=1e-12)

"""Mean field against exact sums, scikit-learn's bound, and published partitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from sklearn.decomposition import LatentDirichletAllocation

import autoem
from autoem.e_step import MeanField
from autoem.e_step.cells.conjugate import DirichletNatural

KEY = jax.random.key(0)


def fit(model, *args, e_step=None, **options):
    em = autoem.EM(model, e_step=e_step or MeanField(), progress=False, **{"max_steps": 3000, "tol": 1e-12, **options})
    return em.run(KEY, *args)


def rises(result):
    return np.all(np.diff(result.history) >= -1e-9 * np.abs(result.history[:-1]))


def mixture(x, weight):
    w = numpyro.param("w", jnp.ones(2) / 2, constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.array([-1.0, 1.0]))
    with numpyro.plate("rows", len(x)), handlers.scale(scale=weight):
        z = numpyro.sample("z", dist.Categorical(w))
        numpyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def test_one_group_is_exact():
    """With a single group `q` is the posterior itself, row weights included: every step equals exact EM's."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=30) + np.repeat([-2, 2], 15), rng.integers(0, 3, 30).astype(float)
    exact = autoem.EM(mixture, progress=False, max_steps=20).run(KEY, x, weight)
    field = autoem.EM(mixture, e_step=MeanField(), progress=False, max_steps=20).run(KEY, x, weight)
    np.testing.assert_allclose(field.history, exact.history, rtol=1e-12)
    np.testing.assert_allclose(field.posterior().marginals["z"], exact.posterior().marginals["z"], atol=1e-10)


def topics_model(word, doc, count, docs, words, k, alpha=0.4, latent_topics=True):
    if latent_topics:
        with numpyro.plate("topic", k):
            topics = numpyro.sample("topics", dist.Dirichlet(0.7 * jnp.ones(words)))
    else:
        start = np.random.default_rng(3).dirichlet(np.ones(words), k)
        topics = numpyro.param("topics", start, constraint=constraints.simplex)
        alpha = numpyro.param("alpha", jnp.full(k, alpha), constraint=constraints.positive)
    with numpyro.plate("docs", docs):
        theta = numpyro.sample("theta", dist.Dirichlet(alpha * jnp.ones(k)))
    with numpyro.plate("entries", len(word)), handlers.scale(scale=count):
        z = numpyro.sample("z", dist.Categorical(theta[doc]))
        numpyro.sample("word", dist.Categorical(topics[z]), obs=word)


FIELD = {"theta": MeanField(), "topics": MeanField()}


def entries(table):
    doc, word = np.nonzero(table)
    return word, doc, table[doc, word].astype(float)


def test_lda_has_the_bound_of_scikit_learn():
    """At scikit-learn's own variational parameters the ELBO is its `_approx_bound`."""
    table = np.random.default_rng(0).poisson(1.2, (8, 12)).astype(float)
    peer = LatentDirichletAllocation(
        3, doc_topic_prior=0.4, topic_word_prior=0.7, max_iter=30, random_state=0, max_doc_update_iter=500,
        mean_change_tol=1e-12,
    ).fit(table)  # fmt: skip
    gamma = peer._unnormalized_transform(table)
    args = (*entries(table), 8, 12, 3)
    em = autoem.EM(topics_model, e_step=FIELD, progress=False)
    built, source = em._derive(args, {})
    kernel, bundle = built.kernel, built.plain_bundle(source, KEY)
    laws = kernel.treatment.init(kernel, {}, bundle, KEY)
    natural = {
        n: DirichletNatural(jnp.asarray(v), jnp.zeros(len(v)))
        for n, v in (("theta", gamma), ("topics", peer.components_))
    }
    laws, total = kernel.treatment._closed(kernel, {}, bundle, laws._replace(natural=natural))
    bound = total + kernel.treatment.value(kernel, {}, bundle, laws)
    np.testing.assert_allclose(bound, peer._approx_bound(table, gamma, False), rtol=1e-9)


def test_lda_rises_and_reaches_a_bound_as_high_as_scikit_learn():
    table = np.random.default_rng(0).poisson(1.2, (8, 12)).astype(float)
    result = fit(topics_model, *entries(table), 8, 12, 3, e_step=FIELD)
    assert rises(result) and result.converged and result.objective_name == "ELBO"
    bounds = []
    for seed in range(3):
        peer = LatentDirichletAllocation(3, doc_topic_prior=0.4, topic_word_prior=0.7, max_iter=200, random_state=seed)
        gamma = peer.fit(table)._unnormalized_transform(table)
        bounds.append(peer._approx_bound(table, gamma, False))
    assert result.log_likelihood > np.median(bounds) - 0.5


def test_lda_bounds_the_sum_over_all_assignments():
    """Topics and concentrations as parameters; the exact likelihood by Polya's urn over all 2^9 assignments."""
    word, doc, count = np.array([0, 1, 1, 2, 3, 3, 0, 2, 3]), np.repeat([0, 1, 2], 3), np.ones(9)
    result = fit(topics_model, word, doc, count, 3, 4, 2, 0.4, False, e_step={"theta": MeanField()}, max_steps=50)
    assert rises(result)
    topics, alpha = np.asarray(result.params["topics"]), np.asarray(result.params["alpha"])
    exact = 0.0
    for d in range(3):
        total = 0.0
        for z in itertools.product(range(2), repeat=3):
            p, seen = 1.0, alpha.copy()
            for state, w in zip(z, word[doc == d], strict=True):
                p *= seen[state] / seen.sum() * topics[state, w]
                seen[state] += 1
            total += p
        exact += np.log(total)
    assert exact - 2.0 < result.log_likelihood <= exact + 1e-9


def test_words_as_rows_equal_entries_with_counts():
    table = np.random.default_rng(1).poisson(0.8, (5, 6))
    word, doc, count = entries(table)
    long_word, long_doc = np.repeat(word, count.astype(int)), np.repeat(doc, count.astype(int))
    options = {"e_step": {"theta": MeanField(sweeps=3)}, "max_steps": 300}
    short = fit(topics_model, word, doc, count, 5, 6, 2, 0.4, False, **options)
    long = fit(topics_model, long_word, long_doc, np.ones(len(long_word)), 5, 6, 2, 0.4, False, **options)
    np.testing.assert_allclose(short.log_likelihood, long.log_likelihood, rtol=1e-6)


def two_chains(count):
    first = numpyro.param("first", jnp.array([[0.9, 0.1], [0.1, 0.9]]), constraint=constraints.simplex)
    second = numpyro.param("second", jnp.array([[0.8, 0.2], [0.4, 0.6]]), constraint=constraints.simplex)
    level = numpyro.param("level", jnp.array([4.0, 9.0]), constraint=constraints.positive)

    def step(carry, n):
        a, b = carry
        a = numpyro.sample("a", dist.Categorical(first[a]))
        b = numpyro.sample("b", dist.Categorical(second[b]))
        numpyro.sample("count", dist.Poisson(level[a] * jnp.array([1.0, 1.6])[b]), obs=n)
        return (a, b), None

    scan(step, (0, 0), count)


def test_factorial_chains_keep_each_path_whole():
    """The bound lies below the exact likelihood at the same parameters, and near it."""
    count = np.random.default_rng(2).poisson(np.repeat([4, 9, 4, 12], 15))
    result = fit(two_chains, count, max_steps=100)
    at = {n: np.asarray(v) for n, v in result.params.items()}
    exact = autoem.EM(two_chains, init=at, max_steps=1, progress=False).run(KEY, count).history[0]
    assert rises(result)
    assert exact - 3.0 < result.log_likelihood <= exact
    posterior = result.posterior()
    assert posterior.marginals["a"].shape == (60, 2) and posterior.pairs("a").shape == (59, 2, 2)
    draws = posterior.sample(jax.random.key(1), 400)
    np.testing.assert_allclose(draws["b"].mean(0), posterior.marginals["b"][:, 1], atol=0.12)
    with pytest.raises(autoem.PlanError, match="not known under a mean field"):
        posterior.joint("a", "b")
    with pytest.raises(autoem.PlanError, match="not known under a mean field"):
        result.score()


KARATE = """1-2 1-3 2-3 1-4 2-4 3-4 1-5 1-6 1-7 5-7 6-7 1-8 2-8 3-8 4-8 1-9 3-9 3-10 1-11 5-11 6-11 1-12 1-13 4-13 1-14
2-14 3-14 4-14 6-17 7-17 1-18 2-18 1-20 2-20 1-22 2-22 24-26 25-26 3-28 24-28 25-28 3-29 24-30 27-30 2-31 9-31 1-32
25-32 26-32 29-32 3-33 9-33 15-33 16-33 19-33 21-33 23-33 24-33 30-33 31-33 32-33 9-34 10-34 14-34 15-34 16-34 19-34
20-34 21-34 23-34 24-34 27-34 28-34 29-34 30-34 31-34 32-34 33-34"""  # Zachary 1977, figure 1
CLUB = np.isin(np.arange(34), [9, 14, 15, 18, 20, 22, *range(23, 34)]).astype(
    int
)  # who left with the instructor's rival


def karate():
    edges = np.array([[int(i) for i in pair.split("-")] for pair in KARATE.split()]) - 1
    adjacency = np.zeros((34, 34))
    adjacency[edges[:, 0], edges[:, 1]] = 1
    adjacency += adjacency.T
    source, target = np.triu_indices(34, 1)
    return adjacency[source, target], source, target, adjacency.sum(0)


def blocks(y, source, target, degree=None):
    p = numpyro.param("p", jnp.ones(2) / 2, constraint=constraints.simplex)
    b = numpyro.param("b", jnp.array([0.4, 0.1, 0.3]), constraint=constraints.positive)[jnp.array([[0, 1], [1, 2]])]
    with numpyro.plate("nodes", 34):
        z = numpyro.sample("z", dist.Categorical(p))
    with numpyro.plate("pairs", len(y)):
        rate = b[z[source], z[target]]
        numpyro.sample("y", dist.Bernoulli(rate) if degree is None else dist.Poisson(degree[source] * degree[target]
                       * rate / 30), obs=y)  # fmt: skip


def test_block_model_of_the_karate_club():
    """Karrer and Newman 2011, figure 1: hubs against the rest, and with degrees the two factions but for one member."""
    y, source, target, degree = karate()
    plain = fit(blocks, y, source, target, init={"b": np.array([0.6, 0.3, 0.05])})
    hubs = np.asarray(plain.posterior().mode()["z"])
    assert rises(plain) and set(np.flatnonzero(hubs == hubs[33])) == {0, 1, 2, 32, 33}
    corrected = fit(blocks, y, source, target, degree, init="model")
    club = np.asarray(corrected.posterior().mode()["z"])
    assert rises(corrected) and max((club == CLUB).sum(), (club != CLUB).sum()) >= 33


def test_block_model_bounds_the_sum_over_all_labels():
    """Six nodes: 2^6 labellings."""
    rng = np.random.default_rng(4)
    source, target = np.triu_indices(6, 1)
    y = rng.integers(2, size=15).astype(float)

    def model(y):
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.6, 0.4])).expand([6]))
        rate = jnp.array([[0.7, 0.2], [0.2, 0.5]])
        numpyro.sample("y", dist.Bernoulli(rate[z[source], z[target]]), obs=y)

    result = fit(model, y)
    total = 0.0
    for z in itertools.product(range(2), repeat=6):
        z = np.array(z)
        rate = np.array([[0.7, 0.2], [0.2, 0.5]])[z[source], z[target]]
        total += np.prod(np.array([0.6, 0.4])[z]) * np.prod(np.where(y > 0, rate, 1 - rate))
    assert rises(result)
    assert np.log(total) - 3 < result.log_likelihood <= np.log(total)
    report = autoem.EM(model, progress=False).check(KEY, y)  # chosen by itself, and held against enumeration
    assert report.ok and "the ELBO is below the sum over all completions" in str(report)


def effects(x, group):
    loc = numpyro.param("loc", jnp.array([-2.0, 2.0]))
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", 4):
        u = numpyro.sample("u", dist.Normal(0.0, 1 / jnp.sqrt(precision)))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(probs=jnp.array([0.5, 0.5])))
        numpyro.sample("x", dist.Normal(loc[z] + u[group], 1.0), obs=x)


def test_normal_effect_beside_a_class_of_each_row():
    """A Gaussian for every combination of rows' classes: a Normal law for each group, bounded by quadrature."""
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(4), 6)
    x = rng.choice([-2, 2], 24) + rng.normal(size=4)[group] + rng.normal(size=24)
    result = fit(effects, x, group, max_steps=60)
    assert rises(result)
    loc, precision = np.asarray(result.params["loc"]), float(result.params["precision"])
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    u = nodes / np.sqrt(precision)
    each = np.log(0.5 * np.exp(-0.5 * (x[:, None, None] - loc[:, None] - u) ** 2).sum(1) / np.sqrt(2 * np.pi))
    exact = sum(np.log(np.exp(each[group == g].sum(0)) @ weights / weights.sum()) for g in range(4))
    assert exact - 2 < result.log_likelihood <= exact + 1e-8


def test_what_has_no_law_is_refused_by_name():
    def model(x):
        s = numpyro.param("s", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", len(x)):
            u = numpyro.sample("u", dist.Normal(0.0, s))
            numpyro.sample("x", dist.Bernoulli(logits=u), obs=x)

    with pytest.raises(autoem.PlanError, match=r"'u'.*that of no law in the table"):
        autoem.EM(model, e_step=MeanField(), progress=False).plan(np.array([0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="sweeps must be a whole number"):
        MeanField(sweeps=0)

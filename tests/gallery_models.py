"""Models as NumPyro's gallery and its users write them, with small simulated data: none was written for autoem.

Each case is a model, a function from (random generator, number of rows) to its arguments, and two sizes: one to fit,
and one small enough for every completion to be added up.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.ops.indexing import Vindex

Rng = np.random.Generator
ANNOTATORS, CLASSES, DEPTH = 4, 3, 3


class Case(NamedTuple):
    """A model, its data at any size as (args, kwargs), the number of rows to fit, and few enough to add up.

    `maximize` names priors in the data's own plates, which would otherwise count as latent.
    """

    model: Callable
    data: Callable[[Rng, int], tuple[tuple, dict[str, Any]]]
    rows: int
    few: int
    maximize: tuple[str, ...] = ()


def _choice(rng: Rng, probs: Any) -> np.ndarray:
    probs = np.asarray(probs)
    return (rng.random((*probs.shape[:-1], 1)) > probs.cumsum(-1)).sum(-1).clip(0, probs.shape[-1] - 1)


def _crowd(rng: Rng, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Which annotator gave each label, and the labels: (items, positions) each."""
    truth = rng.integers(CLASSES, size=items)
    positions = rng.permuted(np.tile(np.arange(ANNOTATORS), (items, 1)), axis=1)[:, :DEPTH]
    skill = np.linspace(0.5, 0.9, ANNOTATORS)[positions][..., None]
    return positions, _choice(rng, skill * np.eye(CLASSES)[truth][:, None] + (1 - skill) / CLASSES)


def crowd_multinomial(annotations):
    """All annotators alike."""
    num_items, num_positions = annotations.shape
    with numpyro.plate("class", CLASSES):
        zeta = numpyro.sample("zeta", dist.Dirichlet(jnp.ones(CLASSES)))
    pi = numpyro.sample("pi", dist.Dirichlet(jnp.ones(CLASSES)))
    with numpyro.plate("item", num_items, dim=-2):
        c = numpyro.sample("c", dist.Categorical(pi), infer={"enumerate": "parallel"})
        with numpyro.plate("position", num_positions):
            numpyro.sample("y", dist.Categorical(zeta[c]), obs=annotations)


def dawid_skene(positions, annotations):
    """Each annotator has a confusion matrix."""
    num_annotators = int(np.max(positions)) + 1
    num_items, num_positions = annotations.shape
    with numpyro.plate("annotator", num_annotators, dim=-2), numpyro.plate("class", CLASSES):
        beta = numpyro.sample("beta", dist.Dirichlet(jnp.ones(CLASSES)))
    pi = numpyro.sample("pi", dist.Dirichlet(jnp.ones(CLASSES)))
    with numpyro.plate("item", num_items, dim=-2):
        c = numpyro.sample("c", dist.Categorical(pi), infer={"enumerate": "parallel"})
        with numpyro.plate("position", num_positions):
            numpyro.sample("y", dist.Categorical(Vindex(beta)[positions, c, :]), obs=annotations)


def mace(positions, annotations):
    """An annotator knows the class, or is spamming: a latent for each annotation beside one for each item."""
    num_annotators = int(np.max(positions)) + 1
    num_items, num_positions = annotations.shape
    with numpyro.plate("annotator", num_annotators):
        epsilon = numpyro.sample("epsilon", dist.Dirichlet(jnp.full(CLASSES, 10.0)))
        theta = numpyro.sample("theta", dist.Beta(0.5, 0.5))
    with numpyro.plate("item", num_items, dim=-2):
        c = numpyro.sample("c", dist.DiscreteUniform(0, CLASSES - 1), infer={"enumerate": "parallel"})
        with numpyro.plate("position", num_positions):
            s = numpyro.sample("s", dist.Bernoulli(1 - theta[positions]), infer={"enumerate": "parallel"})
            probs = jnp.where(s[..., None] == 0, jax.nn.one_hot(c, CLASSES), epsilon[positions])
            numpyro.sample("y", dist.Categorical(probs), obs=annotations)


def response_classes(answers):
    """Item response with three ability classes; difficulties free, abilities increasing."""
    people, items = answers.shape
    share = numpyro.sample("share", dist.Dirichlet(jnp.full(3, 2.0)))
    gain = numpyro.sample("gain", dist.HalfNormal(2.0).expand([2]).to_event(1))
    with numpyro.plate("items", items):
        difficulty = numpyro.sample("difficulty", dist.Normal(0, 2))
    ability = jnp.concatenate([jnp.zeros(1), jnp.cumsum(gain)])
    with numpyro.plate("people", people, dim=-2):
        level = numpyro.sample("level", dist.Categorical(share))
        with numpyro.plate("items", items, dim=-1):
            numpyro.sample("answer", dist.Bernoulli(logits=ability[level] - difficulty), obs=answers)


def gaussian_mixture(data, k=3):
    weights = numpyro.sample("weights", dist.Dirichlet(0.5 + jnp.ones(k)))
    with numpyro.plate("components", k):
        locs = numpyro.sample("locs", dist.Normal(0.0, 10.0))
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        assignment = numpyro.sample("assignment", dist.Categorical(weights), infer={"enumerate": "parallel"})
        numpyro.sample("obs", dist.Normal(locs[assignment], scale[assignment]), obs=data)


def shared_covariance(x):
    weights = numpyro.param("weights", jnp.array([0.4, 0.6]), constraint=constraints.simplex)
    loc = numpyro.param("loc", lambda key: jax.random.normal(key, (2, x.shape[-1])))
    cov = numpyro.param("cov", jnp.eye(x.shape[-1]), constraint=constraints.positive_definite)
    with numpyro.plate("n", x.shape[0]):
        z = numpyro.sample("z", dist.Categorical(probs=weights))
        numpyro.sample("x", dist.MultivariateNormal(loc[z], covariance_matrix=cov), obs=x)


def shared_correlation(x):
    """Correlations with their usual prior, a scale for each column."""
    d = x.shape[-1]
    chol = numpyro.sample("chol", dist.LKJCholesky(d, concentration=2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(3.0).expand([d]).to_event(1))
    loc = numpyro.sample("loc", dist.Normal(0, 5).expand([2, d]).to_event(2))
    with numpyro.plate("n", x.shape[0]):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.MultivariateNormal(loc[z], scale_tril=sigma[:, None] * chol), obs=x)


def imputation_by_mask(a, seen, b):
    """A binary covariate with holes, filled by the model; the outcome's law depends on it."""
    p = numpyro.sample("p", dist.Beta(1.5, 1.5))
    mu = numpyro.sample("mu", dist.Normal(0, 5).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(0, 1))
    with numpyro.plate("n", len(b)):
        value = numpyro.sample("a", dist.Bernoulli(p), obs=a, obs_mask=seen)
        numpyro.sample("b", dist.Normal(Vindex(mu)[value], sigma), obs=b)


def imputation_by_hand(a, seen, b):
    """The same, with the two halves written out."""
    p = numpyro.sample("p", dist.Dirichlet(jnp.full(3, 1.5)))
    q = numpyro.sample("q", dist.Dirichlet(jnp.full(4, 1.5)).expand([3]).to_event(1))
    with numpyro.plate("n", len(b)):
        with handlers.mask(mask=seen):
            numpyro.sample("a_seen", dist.Categorical(p), obs=a)
        with handlers.mask(mask=~seen):
            missing = numpyro.sample("a_missing", dist.Categorical(p), infer={"enumerate": "parallel"})
        value = jnp.where(seen, a, missing)
        numpyro.sample("b", dist.Categorical(Vindex(q)[value]), obs=b)


def zero_inflated(counts, x):
    """A latent says which zeros are structural."""
    gate = numpyro.param("gate", 0.3, constraint=constraints.unit_interval)
    beta = numpyro.param("beta", jnp.array([0.5, 0.1]))
    with numpyro.plate("n", len(counts)):
        never = numpyro.sample("never", dist.Bernoulli(gate))
        rate = jnp.exp(beta[0] + beta[1] * x)
        numpyro.sample("counts", dist.Poisson(jnp.where(never == 1, 1e-12, rate)), obs=counts)


def pedigree(parent, child):
    """Genotypes of parent and child at one locus; the second allele's carriers show the trait with penetrance `f`."""
    p = numpyro.param("p", 0.6, constraint=constraints.unit_interval)
    f = numpyro.param("f", jnp.array([0.05, 0.5, 0.9]), constraint=constraints.unit_interval)
    q = 1 - p
    founder = jnp.stack([p * p, 2 * p * q, q * q])
    inherit = jnp.stack([jnp.stack([p, q, 0 * p]), jnp.stack([p / 2, 0.5 + 0 * p, q / 2]), jnp.stack([0 * p, p, q])])
    with numpyro.plate("pairs", len(parent)):
        g1 = numpyro.sample("g1", dist.Categorical(founder))
        g2 = numpyro.sample("g2", dist.Categorical(inherit[g1]))
        numpyro.sample("parent", dist.Bernoulli(f[g1]), obs=parent)
        numpyro.sample("child", dist.Bernoulli(f[g2]), obs=child)


def naive_bayes(words, label, labelled):
    share = numpyro.sample("share", dist.Dirichlet(jnp.ones(2)))
    with numpyro.plate("classes", 2):
        theta = numpyro.sample("theta", dist.Beta(2.0, 2.0).expand([words.shape[1]]).to_event(1))
    with numpyro.plate("documents", len(words)):
        topic = numpyro.sample("topic", dist.Categorical(share), obs=label, obs_mask=labelled)
        numpyro.sample("words", dist.Bernoulli(theta[topic]).to_event(1), obs=words)


def schools(school, score):
    """A class of the school, and of the pupil given the school's."""
    num_schools = int(np.max(school)) + 1
    kinds = numpyro.sample("kinds", dist.Dirichlet(jnp.full(2, 2.0)))
    with numpyro.plate("kind", 2):
        mix = numpyro.sample("mix", dist.Dirichlet(jnp.full(2, 2.0)))
    mean = numpyro.sample("mean", dist.Normal(0, 5).expand([2]).to_event(1))
    spread = numpyro.sample("spread", dist.Gamma(2.0, 1.0))
    with numpyro.plate("schools", num_schools):
        kind = numpyro.sample("school_kind", dist.Categorical(kinds))
    with numpyro.plate("pupils", len(score)):
        level = numpyro.sample("level", dist.Categorical(mix[kind[school]]))
        numpyro.sample("score", dist.Normal(mean[level], spread), obs=score)


def diagnosis(findings):
    """Noisy-or: four causes, each finding silent unless a present cause, or the leak, sets it off."""
    num_causes, num_findings = 4, findings.shape[1]
    prior = numpyro.sample("prior", dist.Beta(2, 5).expand([num_causes]).to_event(1))
    fail = numpyro.sample("fail", dist.Beta(2, 2).expand([num_causes, num_findings]).to_event(2))
    leak = numpyro.param("leak", 0.05, constraint=constraints.unit_interval)
    with numpyro.plate("patients", len(findings)):
        causes = [numpyro.sample(f"cause_{i}", dist.Bernoulli(prior[i])) for i in range(num_causes)]
        silent = (1 - leak) * jnp.ones(num_findings)
        for i, cause in enumerate(causes):
            silent = silent * jnp.where(cause[..., None] == 1, fail[i], 1.0)
        numpyro.sample("findings", dist.Bernoulli(1 - silent).to_event(1), obs=findings)


def recapture(history):
    """Augmented capture histories: an animal may not exist, and those that do are of two kinds."""
    occasions = history.shape[1]
    psi = numpyro.sample("psi", dist.Beta(2, 2))
    shy = numpyro.sample("shy", dist.Beta(2, 2))
    with numpyro.plate("sorts", 2, dim=-2), numpyro.plate("occasions", occasions, dim=-1):
        p = numpyro.sample("p", dist.Beta(2, 2))
    with numpyro.plate("animals", len(history), dim=-2):
        exists = numpyro.sample("exists", dist.Bernoulli(psi), infer={"enumerate": "parallel"})
        sort = numpyro.sample("sort", dist.Bernoulli(shy), infer={"enumerate": "parallel"})
        with numpyro.plate("occasions", occasions, dim=-1):
            numpyro.sample("seen", dist.Bernoulli(exists * Vindex(p)[sort, jnp.arange(occasions)]), obs=history)


def _mixture_rows(rng: Rng, n: int, d: int = 2) -> np.ndarray:
    z = rng.integers(2, size=n)
    return rng.normal(size=(n, d)) + 3.0 * z[:, None]


def _holes(rng: Rng, n: int, k: int, outcome: Callable) -> tuple[tuple, dict]:
    a = rng.integers(k, size=n)
    return (a, rng.random(n) < 0.6, outcome(a)), {}


def _school_rows(rng: Rng, n: int) -> tuple[tuple, dict]:
    school = np.arange(n) % max(2, n // 6)
    return (school, rng.normal(size=n) + 3 * (rng.random(n) < 0.2 + 0.5 * (school % 2))), {}


def _pairs(rng: Rng, n: int) -> tuple[tuple, dict]:
    return tuple((rng.random((2, n)) < 0.35).astype(int)), {}


def _documents(rng: Rng, n: int) -> tuple[tuple, dict]:
    topic = rng.integers(2, size=n)
    words = (rng.random((n, 5)) < np.where(topic[:, None], 0.7, 0.3)).astype(int)
    return (words, topic, rng.random(n) < 0.4), {}


def _counts(rng: Rng, n: int) -> tuple[tuple, dict]:
    x = rng.normal(size=n)
    return (rng.poisson(np.exp(0.6 + 0.4 * x)) * (rng.random(n) < 0.7), x), {}


def _binary(columns: int, probability: float) -> Callable:
    return lambda rng, n: (((rng.random((n, columns)) < probability * rng.uniform(0.4, 1.6, (n, 1))).astype(int),), {})


CASES = {
    "crowd multinomial": Case(crowd_multinomial, lambda rng, n: (_crowd(rng, n)[1:], {}), 40, 5),
    "dawid-skene": Case(dawid_skene, lambda rng, n: (_crowd(rng, n), {}), 40, 5),
    "mace": Case(mace, lambda rng, n: (_crowd(rng, n), {}), 40, 3),
    "response classes": Case(response_classes, _binary(4, 0.5), 60, 6, ("difficulty",)),
    "gaussian mixture": Case(gaussian_mixture, lambda rng, n: ((_mixture_rows(rng, n, 1)[:, 0],), {}), 60, 6),
    "shared covariance": Case(shared_covariance, lambda rng, n: ((_mixture_rows(rng, n),), {}), 60, 6),
    "shared correlation": Case(shared_correlation, lambda rng, n: ((_mixture_rows(rng, n),), {}), 60, 6),
    "imputation by mask": Case(
        imputation_by_mask, lambda rng, n: _holes(rng, n, 2, lambda a: rng.normal(a * 3.0)), 60, 8
    ),
    "imputation by hand": Case(
        imputation_by_hand, lambda rng, n: _holes(rng, n, 3, lambda a: (a + rng.integers(2, size=n)) % 4), 60, 6
    ),
    "zero inflated": Case(zero_inflated, _counts, 60, 8),
    "pedigree": Case(pedigree, _pairs, 60, 4),
    "naive bayes": Case(naive_bayes, _documents, 60, 8),
    "schools": Case(schools, _school_rows, 60, 8),
    "diagnosis": Case(diagnosis, _binary(5, 0.4), 60, 3),
    "recapture": Case(recapture, _binary(4, 0.3), 60, 4, ("p",)),
}

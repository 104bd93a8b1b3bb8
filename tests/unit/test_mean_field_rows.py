"""Sweeps over each row's own simplex: against the sweeps of all groups, and against scikit-learn's."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from sklearn.decomposition import LatentDirichletAllocation

import autoem
from autoem.e_step import MeanField
from autoem.mean_field.field import Field
from autoem.mean_field.rows import CELLS, ROWS, padded

KEY = jax.random.key(0)
FIELD = {"theta": MeanField(), "topics": MeanField()}


def topics_model(word, doc, count, docs, words, k, alpha):
    with numpyro.plate("topic", k):
        topics = numpyro.sample("topics", dist.Dirichlet(0.7 * jnp.ones(words)))
    with numpyro.plate("docs", docs):
        theta = numpyro.sample("theta", dist.Dirichlet(alpha * jnp.ones(k)))
    with numpyro.plate("entries", len(word)), handlers.scale(scale=count):
        z = numpyro.sample("z", dist.Categorical(theta[doc]))
        numpyro.sample("word", dist.Categorical(topics[z]), obs=word)


def corpus(docs=9, words=14):
    """Documents of one to many different words, the entries in no order."""
    rng = np.random.default_rng(0)
    table = rng.poisson(np.linspace(0.05, 2.5, docs)[:, None] * np.ones(words)).astype(float)
    table[0, 3] = 1
    doc, word = np.nonzero(table)
    shuffled = rng.permutation(len(doc))
    return table, (word[shuffled], doc[shuffled], table[doc, word][shuffled], docs, words, 3)


def test_rows_side_by_side_hold_every_row_once():
    """Against a list by cell; no bucket holds more than twice as many places as rows."""
    rng = np.random.default_rng(1)
    cells = np.concatenate([rng.integers(0, 30, 60), np.full(400, 3)])
    out = padded(cells, 32)
    seen = []
    for i in range(len(out) // 2):
        rows, own = out[f"{ROWS}{i}"], out[f"{CELLS}{i}"]
        assert (rows < len(cells)).sum() * 2 >= rows.size
        for c, r in zip(own, rows, strict=True):
            assert sorted(r[r < len(cells)]) == list(np.flatnonzero(cells == c))
        seen += list(own)
    assert sorted(seen) == list(np.unique(cells)) and len(out) > 2


@pytest.mark.parametrize("alpha", [0.4, 1e-5])  # the second underflows as a probability, and goes by logarithms
def test_products_sweep_as_updates_of_all_groups_do(alpha):
    """Seven sweeps of every group in turn give the same law of each document."""
    args = (*corpus()[1], alpha)
    built, source = autoem.EM(topics_model, e_step=FIELD, progress=False)._derive(args, {})
    kernel, bundle = built.kernel, built.plain_bundle(source, KEY)
    field = kernel.treatment
    assert isinstance(field, Field) and field.own is not None and field.own.laid_out(bundle.cells)
    laws = field._close(kernel, {}, bundle, field.begin(kernel, bundle, KEY))
    fast = jax.jit(lambda laws: field._settle_rows(kernel, {}, bundle, laws, 7))(laws)
    once = jax.jit(lambda laws: field._close(kernel, {}, bundle, field.sweep(kernel, {}, bundle, laws)))
    slow = laws
    for _ in range(7):
        slow = once(slow)
    ours, theirs = fast.natural["theta"].concentration, slow.natural["theta"].concentration
    np.testing.assert_allclose(ours, theirs, rtol=1e-8)


def test_a_fit_rises_and_its_documents_are_those_of_scikit_learn():
    """Given the topics found, scikit-learn's own sweeps lead to the same laws of documents."""
    table, args = corpus()
    result = autoem.EM(topics_model, e_step=FIELD, progress=False, max_steps=400, tol=1e-12).run(KEY, *args, 0.4)
    assert np.all(np.diff(result.history) >= -1e-9 * np.abs(result.history[:-1]))
    posterior = result.posterior()
    peer = LatentDirichletAllocation(
        3, doc_topic_prior=0.4, topic_word_prior=0.7, max_iter=1, max_doc_update_iter=5000, mean_change_tol=1e-13
    ).fit(table)
    natural = np.asarray(posterior._laws.natural["topics"].concentration)
    peer.components_, digamma = natural, jax.scipy.special.digamma
    peer.exp_dirichlet_component_ = np.exp(digamma(natural) - digamma(natural.sum(1, keepdims=True)))
    np.testing.assert_allclose(posterior.mean["theta"], peer.transform(table), atol=2e-3)


def test_a_site_of_many_parents_is_refused_with_the_size_of_its_table():
    """Sixteen chains' worth of states, 4 to the 16th, twenty rows of eight bytes: 640 GiB."""

    def model(y):
        level = numpyro.param("level", jnp.arange(4.0))
        with numpyro.plate("rows", len(y)):
            total = sum(level[numpyro.sample(f"z{i}", dist.Categorical(jnp.ones(4) / 4))] for i in range(16))
            numpyro.sample("y", dist.Normal(total, 1.0), obs=y)

    with pytest.raises(autoem.PlanError, match=r"'y'.*every joint state.*4 x 4 x .*which needs 640"):
        autoem.EM(model, e_step=MeanField(), progress=False).plan(np.zeros(20))

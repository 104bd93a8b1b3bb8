"""Latent Dirichlet allocation: documents of counted words, a start that all share, and the bound as scorer.

The same promise as in `workloads`: deterministic data, and a scorer in NumPy.
"""

from __future__ import annotations

import numpy as np

from .workloads import Arrays, Recipe, Workload

SWEEPS = 20  # of a document in one step, for those who do as the hand-written do


def topics(docs: int, words: int, k: int, num_steps: int) -> Workload:
    """Sparse counts of words by document, in compressed rows; topics start about one, as scikit-learn's do."""
    rng = np.random.default_rng(8)
    beta, theta = rng.dirichlet(np.full(words, 0.02), size=k), rng.dirichlet(np.full(k, 0.2), size=docs)
    lengths = rng.integers(80, 220, docs)
    table = np.stack([rng.multinomial(n, share @ beta) for n, share in zip(lengths, theta, strict=True)])
    doc, word = np.nonzero(table)
    data = {"word": word, "doc": doc, "count": table[doc, word].astype(float)}
    start = {"topics": rng.gamma(100.0, 0.01, (k, words))}

    def score(p: Arrays) -> float:
        return bound(p["topics"], table.astype(float), 1 / k, 1 / k)

    return Workload("topics", num_steps, data, start, score)


def bound(topics: np.ndarray, table: np.ndarray, alpha: float, eta: float, sweeps: int = 200) -> float:
    """The ELBO at Dirichlet laws of the topics, each document swept from a flat start (Hoffman et al. 2010, eq. 4)."""
    from scipy.special import digamma, gammaln

    def logs(natural: np.ndarray) -> np.ndarray:
        return digamma(natural) - digamma(natural.sum(1, keepdims=True))

    k = len(topics)
    weights, law = np.exp(logs(topics)), np.ones((len(table), k))
    for _ in range(sweeps):
        own = np.exp(logs(law))
        law = alpha + own * ((table / (own @ weights + 1e-300)) @ weights.T)
    own = np.exp(logs(law))
    total = (table * np.log(own @ weights + 1e-300)).sum()
    for natural, prior in ((law, alpha), (topics, eta)):
        size = natural.shape[1]
        total += ((prior - natural) * logs(natural) + gammaln(natural)).sum() - gammaln(natural.sum(1)).sum()
        total += len(natural) * (gammaln(size * prior) - size * gammaln(prior))
    return float(total)


WORKLOADS: dict[str, Recipe] = {
    "W8": Recipe("topics", "topics: 2,000 documents, 5,000 words, 20 topics", lambda: topics(2_000, 5_000, 20, 20)),
}

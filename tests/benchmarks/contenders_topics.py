"""autoem, scikit-learn and JAX by hand on latent Dirichlet allocation; the common scorer tells how far each has come.

autoem begins its topics at random, and goes over all documents before its first step; the others share a start.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._contender import CORES, Contender, Outcome, stepped
from .workloads import Workload
from .workloads_topics import SWEEPS


def lda(word, doc, count):
    """A row is an entry of the table."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro import handlers

    with numpyro.plate("topic", 20):
        topics = numpyro.sample("topics", dist.Dirichlet(jnp.ones(5_000) / 20))
    with numpyro.plate("docs", 2_000):
        theta = numpyro.sample("theta", dist.Dirichlet(jnp.ones(20) / 20))
    with numpyro.plate("entries", len(word)), handlers.scale(scale=count):
        z = numpyro.sample("z", dist.Categorical(theta[doc]))
        numpyro.sample("word", dist.Categorical(topics[z]), obs=word)


def autoem_fit(w: Workload) -> Callable[[], Outcome]:
    """A whole `run`, its rounds at the start among the time; and the law of the topics."""
    import jax

    import autoem

    field = autoem.e_step.MeanField()
    em = autoem.EM(lda, e_step={"theta": field, "topics": field}, max_steps=w.num_steps, tol=0.0, progress=False)
    args = (w.data["word"], w.data["doc"], w.data["count"])

    def run() -> Outcome:
        result = em.run(jax.random.key(0), *args)
        return Outcome({"topics": np.asarray(result._context.e_step.natural["topics"].concentration)})

    return run


def sklearn_fit(jobs: int) -> Callable[[Workload], Callable[[], Outcome]]:
    """scikit-learn's batch algorithm near its defaults, from the common start of the topics."""

    def prepare(w: Workload) -> Callable[[], Outcome]:
        from scipy.sparse import csr_matrix
        from scipy.special import digamma
        from sklearn.decomposition import LatentDirichletAllocation

        table = csr_matrix((w.data["count"], (w.data["doc"], w.data["word"])), shape=(2_000, 5_000))
        start = w.start["topics"]

        class Started(LatentDirichletAllocation):
            def _init_latent_vars(self, n_features, dtype=np.float64):
                super()._init_latent_vars(n_features, dtype)
                self.components_ = start.copy()
                self.exp_dirichlet_component_ = np.exp(digamma(start) - digamma(start.sum(1, keepdims=True)))

        def run() -> Outcome:
            model = Started(len(start), learning_method="batch", max_iter=w.num_steps, n_jobs=jobs, random_state=0)
            return Outcome({"topics": model.fit(table).components_})

        return run

    return prepare


def jax_fit(devices: int) -> Callable[[Workload], Callable[[], Outcome]]:
    """Documents padded to the longest; on several devices each has its share of them."""

    def prepare(w: Workload) -> Callable[[], Outcome]:
        import jax
        import jax.numpy as jnp
        from jax.scipy.special import digamma
        from jax.sharding import Mesh
        from jax.sharding import PartitionSpec as P

        doc, k = w.data["doc"], len(w.start["topics"])
        lengths = np.bincount(doc)
        place = np.arange(len(doc)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids, times = np.zeros((len(lengths), lengths.max()), np.int32), np.zeros((len(lengths), lengths.max()))
        ids[doc, place], times[doc, place] = w.data["word"], w.data["count"]

        def weights(law):
            return jnp.exp(digamma(law) - digamma(law.sum(1, keepdims=True)))

        def expect(topics, ids, times):
            own = weights(topics).T
            seen = own[ids]

            def sweep(_, law):
                t = weights(law)
                return 1 / k + t * jnp.einsum("dlk,dl->dk", seen, times / jnp.einsum("dlk,dk->dl", seen, t))

            t = weights(jax.lax.fori_loop(0, SWEEPS, sweep, jnp.ones((len(ids), k))))
            share = times / jnp.einsum("dlk,dk->dl", seen, t)
            spread = jnp.zeros((len(ids), len(own))).at[jnp.arange(len(ids))[:, None], ids].add(share)
            return jax.lax.psum(t.T @ spread, "docs") * own.T

        mesh = Mesh(np.array(jax.devices()[:devices]), ("docs",))
        shared = jax.shard_map(expect, mesh=mesh, in_specs=(P(), P("docs"), P("docs")), out_specs=P(), check_vma=False)
        step = jax.jit(lambda topics, ids, times: 1 / k + shared(topics, ids, times))
        # from the host, for one program of all steps comes to wrong sums on two devices (JAX 0.10)
        return stepped(w, lambda p: {"topics": step(p["topics"], ids, times)})

    return prepare


_JAX, _NOTE = ("jax.numpy", "jax.scipy"), "its own start"
CONTENDERS = (
    Contender("autoem-1", "topics", autoem_fit, ("jax.numpy", "numpyro", "autoem"), 1, "autoem", _NOTE),
    Contender("autoem-all", "topics", autoem_fit, ("jax.numpy", "numpyro", "autoem"), CORES, "autoem", _NOTE),
    Contender("jax-best", "topics", jax_fit(CORES), _JAX, CORES, "best"),
    Contender("jax-plain", "topics", jax_fit(1), _JAX, 1, "plain"),
    Contender("sklearn", "topics", sklearn_fit(1), ("sklearn.decomposition",)),
    Contender("sklearn-jobs", "topics", sklearn_fit(CORES), ("sklearn.decomposition",)),
)

# %% [markdown]
# # Topics: latent Dirichlet allocation on the bars of Griffiths and Steyvers
# Ten topics are the rows and columns of a five by five grid of words; a document mixes a few. The corpus is simulated
# as in Griffiths and Steyvers 2004, figure 1, so the topics are known and can be looked at.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import plt, save
from numpyro import handlers

import autoem

jax.config.update("jax_enable_x64", True)
K, WORDS, DOCS, LENGTH = 10, 25, 300, 100

bars = np.zeros((K, 5, 5))
for i in range(5):
    bars[i, i, :] = bars[5 + i, :, i] = 0.2
bars = bars.reshape(K, WORDS)
rng = np.random.default_rng(0)
mixed = rng.dirichlet(np.full(K, 0.3), DOCS)
table = np.stack([rng.multinomial(LENGTH, share @ bars) for share in mixed])
doc, word = np.nonzero(table)
count = table[doc, word].astype(float)


# %% [markdown]
# A row is an entry of the table, which counts as often as its word was seen. Topics and mixtures are both latent.


# %%
def lda(word, doc, count):
    with numpyro.plate("topic", K):
        topics = numpyro.sample("topics", dist.Dirichlet(0.1 * jnp.ones(WORDS)))
    with numpyro.plate("docs", DOCS):
        theta = numpyro.sample("theta", dist.Dirichlet(0.3 * jnp.ones(K)))
    with numpyro.plate("entries", len(word)), handlers.scale(scale=count):
        z = numpyro.sample("z", dist.Categorical(theta[doc]))
        numpyro.sample("word", dist.Categorical(topics[z]), obs=word)


field = autoem.e_step.MeanField()
em = autoem.EM(lda, e_step={"theta": field, "topics": field}, max_steps=300, tol=1e-7, restarts=4, progress=False)
print(em.plan(word, doc, count))
result = em.run(jax.random.key(0), word, doc, count)
print(f"\n{result.objective_name} {result.log_likelihood:.1f} after {result.num_steps} steps")

# %% [markdown]
# Each bar is matched with the topic that resembles it most.

# %%
posterior = result.posterior()
found = np.asarray(posterior.mean["topics"])
distance = np.abs(bars[:, None] - found[None]).sum(-1) / 2
match = distance.argmin(1)
figure, panels = plt.subplots(2, K, figsize=(10, 2.3))
for i in range(K):
    for row, values in ((0, bars[i]), (1, found[match[i]])):
        panels[row, i].imshow(values.reshape(5, 5), cmap="Greys", vmin=0, vmax=0.22)
        panels[row, i].set(xticks=[], yticks=[])
panels[0, 0].set_ylabel("true")
panels[1, 0].set_ylabel("found")
save(figure, "topics.png")
print("total variation of each topic from its bar:", distance.min(1).round(3))

# %%
assert np.all(np.diff(result.history) >= -1e-8 * abs(result.history[-1]))
assert sorted(match) == list(range(K)) and distance.min(1).max() < 0.1
correlation = np.corrcoef(np.asarray(posterior.mean["theta"])[:, match].ravel(), mixed.ravel())[0, 1]
assert correlation > 0.95

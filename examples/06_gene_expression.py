# %% [markdown]
# # Gene expression: clusters of leukaemia samples
# 38 samples of bone marrow (Golub and others 1999), the 50 genes of largest variance. With fewer samples than genes a
# covariance for each cluster would collapse; one standard deviation a gene, common to all clusters, cannot.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, INK, ORANGE, columns, plt, save
from matplotlib.colors import ListedColormap
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)


def clusters(x, k=3):
    n, genes = x.shape
    weights = numpyro.param("weights", jnp.full(k, 1 / k), constraint=constraints.simplex)
    mean = numpyro.param("mean", lambda key: jax.random.normal(key, (k, genes)))
    sd = numpyro.param("sd", jnp.ones(genes), constraint=constraints.positive)
    with numpyro.plate("samples", n):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.Normal(mean[z], sd).to_event(1), obs=x)


data = columns("golub.csv")
is_aml, _ = data.pop("all0_aml1") == 1, data.pop("start_cluster")  # the diagnosis is for looking only
genes, x = list(data), jnp.stack([jnp.asarray(gene) for gene in data.values()], -1)

# %% [markdown]
# Few samples in many dimensions have many local maxima: one start is not enough, so 60 run side by side.

# %%
em = autoem.EM(clusters, restarts=60, progress=False)
print(em.plan(x))
result = em.run(jax.random.key(0), x)
ends = np.unique(np.asarray(result.restarts.objective).round(2))[::-1]
print(f"\n{result.status}\nlog-likelihood {result.log_likelihood:.4f}; the best ends are {ends[:5]}")

# %%
z = np.asarray(result.posterior(x).marginals["z"].argmax(-1))
first = np.argsort([-is_aml[z == cluster].mean() for cluster in range(3)])  # the cluster of AML comes first
order = np.lexsort((~is_aml, np.argsort(first)[z]))
leaning = np.asarray(result.params["mean"] - x.mean(0))[first]
by_gene = np.lexsort((-leaning.max(0), leaning.argmax(0)))  # a gene stands with the cluster that it leans to
figure, (top, axes) = plt.subplots(2, 1, figsize=(7.4, 7.6), height_ratios=[1, 24], sharex=True)
top.imshow(np.stack([is_aml[order]]), aspect="auto", cmap=ListedColormap([BLUE, ORANGE]))
top.set(yticks=[0], title="Leukaemia: 38 samples, 50 genes, three clusters")
top.set_yticklabels(["AML (orange) or ALL"])
picture = axes.imshow(np.asarray(x - x.mean(0))[order][:, by_gene].T, aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3)
for edge in np.flatnonzero(np.diff(z[order])) + 0.5:
    axes.axvline(edge, color=INK, lw=1.5)
axes.set(xlabel="samples, by cluster", xticks=[], yticks=range(len(genes)))
axes.set_yticklabels(np.array(genes)[by_gene], fontsize=6)
figure.colorbar(picture, ax=axes, shrink=0.5, label="expression above the gene's mean")
save(figure, "gene_expression.png")

# %% [markdown]
# All eleven samples of acute myeloid leukaemia fall into one cluster, with a single other sample.

# %%
table = np.array([[(is_aml[z == cluster] == kind).sum() for cluster in range(3)] for kind in (False, True)])
print(table)
assert result.log_likelihood > -2762.3336
assert sorted(map(tuple, table.T)) == [(1, 11), (8, 0), (18, 0)]

# %% [markdown]
# # Gene counting: allele frequencies from blood groups
# A blood group shows a pair of alleles only in part: A may be AA or AO. Gene counting (Ceppellini, Siniscalco and Smith
# 1955) was an EM algorithm before EM had its name. Here it follows from the model: two alleles a person, one table.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import columns
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)

ALLELES, GROUPS = "ABO", ["A", "B", "AB", "O"]
GROUP_OF = jnp.array([[0, 2, 0], [2, 1, 1], [0, 1, 3]])  # mother's and father's allele -> blood group


def blood_groups(group):
    frequency = numpyro.param("frequency", jnp.full(3, 1 / 3), constraint=constraints.simplex)
    with numpyro.plate("people", len(group)):
        mother = numpyro.sample("mother", dist.Categorical(frequency))
        father = numpyro.sample("father", dist.Categorical(frequency))
        numpyro.sample("group", dist.Categorical(jax.nn.one_hot(GROUP_OF[mother, father], 4)), obs=group)


group = jnp.asarray(columns("abo.csv")["phenotype"])  # 521 people with duodenal ulcer

# %% [markdown]
# One parameter stands behind two latents: the plan counts both.

# %%
em = autoem.EM(blood_groups, tol=1e-12, progress=False)
print(em.plan(group))
result = em.run(jax.random.key(0), group)
frequency, error = result.params["frequency"], result.standard_errors()["frequency"]
print(f"\n{result.status}\nallele  frequency  standard error")
for allele, value, se in zip(ALLELES, frequency, error, strict=True):
    print(f"{allele:>6}  {value:.4f}     {se:.4f}")

# %% [markdown]
# What is hidden can be asked for: how probable is each pair of alleles, for one person of each blood group?

# %%
pairs = result.posterior(jnp.arange(4)).joint("mother", "father")
for name, table in zip(GROUPS, pairs, strict=True):
    unordered = {a + b: table[i, j] + (i != j) * table[j, i] for i, a in enumerate(ALLELES)
                 for j, b in enumerate(ALLELES) if i <= j}  # fmt: skip
    print(f"{name:>2}: " + ", ".join(f"{genes} {p:.1%}" for genes, p in unordered.items() if p > 0))

# %% [markdown]
# The frequencies are those commonly quoted for these counts, which Lange's textbook uses for gene counting. The
# standard errors agree with Fisher's information of the four groups, worked out by hand.

# %%
p, q, r = np.asarray(frequency)
probability = np.array([p * p + 2 * p * r, q * q + 2 * q * r, 2 * p * q, r * r])
slope = np.array([[2 * r, -2 * p], [-2 * q, 2 * r], [2 * q, 2 * p], [-2 * r, -2 * r]])  # by p and q; r = 1 - p - q
covariance = np.linalg.inv(len(group) * slope.T @ (slope / probability[:, None]))
by_hand = np.sqrt([covariance[0, 0], covariance[1, 1], covariance.sum()])

np.testing.assert_allclose(frequency, [0.2136, 0.0501, 0.7363], atol=5e-5)
np.testing.assert_allclose(error, by_hand, rtol=0.02)  # ours is of the observed counts, his of the expected ones

# %% [markdown]
# # Linkage: the example that opened the paper of 1977
# 197 animals fall into four phenotypes with probabilities (2 + psi, 1 - psi, 1 - psi, psi) / 4. The first hides two
# genotypes; were it split, psi would be a proportion. Dempster, Laird and Rubin begin with it (1977, section 1).

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

SEEN_AS = jnp.eye(4)[jnp.array([0, 0, 1, 2, 3])]  # the first two genotypes look alike


def linkage(phenotype, start=0.5):
    psi = numpyro.param("psi", start, constraint=constraints.unit_interval)
    with numpyro.plate("animals", len(phenotype)):
        genotype = numpyro.sample("genotype", dist.Categorical(jnp.stack([2.0, psi, 1 - psi, 1 - psi, psi]) / 4))
        numpyro.sample("phenotype", dist.Categorical(SEEN_AS[genotype]), obs=phenotype)


animals = jnp.asarray(columns("linkage.csv")["phenotype"])

# %% [markdown]
# `psi` stands in four of the five cells, always in a product with constants: such a parameter is counted, so its M-step
# is a closed form. The LaTeX of it can be had too, from `plan.latex()`.

# %%
print(autoem.EM(linkage, progress=False).plan(animals))

# %% [markdown]
# The path from psi = 0.5, as it is commonly quoted from the paper, and ours.

# %%
published = [0.500000000, 0.608247423, 0.624321051, 0.626488879, 0.626777323, 0.626815632, 0.626820719, 0.626821395,
             0.626821484]  # fmt: skip


one_step = autoem.EM(linkage, init="model", max_steps=1, progress=False)  # compiled once for all steps
path = [jnp.array(0.5)]
while len(path) < len(published):
    path.append(one_step.run(jax.random.key(0), animals, path[-1]).params["psi"])
result = autoem.EM(linkage, init="model", max_steps=50, tol=0.0, progress=False).run(jax.random.key(0), animals)
limit = float(result.params["psi"])
print("\nstep  published    autoem       error        error / last error")
for step, (theirs, ours) in enumerate(zip(published, path, strict=True)):
    ratio = f"{(ours - limit) / (path[step - 1] - limit):.4f}" if step else ""
    print(f"{step:4d}  {theirs:.9f}  {ours:.9f}  {ours - limit:+.9f}  {ratio}")
print(f"limit {limit:.10f}, standard error {result.standard_errors()['psi']:.4f}")

# %% [markdown]
# The errors shrink at the share of information that the hidden split takes away; the limit is the positive root of a
# quadratic.

# %%
root = np.roots([197, -15, -68]).max()
np.testing.assert_allclose(path, published, rtol=0, atol=1e-9)
np.testing.assert_allclose(limit, root, rtol=0, atol=1e-9)

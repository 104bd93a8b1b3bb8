# %% [markdown]
# # How many kinds of eruption?
# Old Faithful erupts in two ways, one reads. Two components, each with a covariance of its own, is one answer; three
# that share one covariance is another. Which do the data prefer, and how clearly?

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import columns, plt, save
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)


def mixture(x, k, shared):
    n, d = x.shape
    weights = numpyro.param("weights", jnp.ones(k) / k, constraint=constraints.simplex)
    loc = numpyro.param("loc", lambda key: jax.random.normal(key, (k, d)))
    start = jnp.eye(d) if shared else jnp.tile(jnp.eye(d), (k, 1, 1))
    cov = numpyro.param("cov", start, constraint=constraints.positive_definite)
    with numpyro.plate("eruptions", n):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.MultivariateNormal(loc[z], cov if shared else cov[z]), obs=x)


data = columns("old_faithful.csv")
x = np.stack([data["eruptions"], data["waiting"]], -1)

# %% [markdown]
# A structure is what the model's keyword arguments make of it. Each combination is fitted, from eight starts.

# %%
sweep = autoem.select(mixture, {"k": range(1, 5), "shared": [False, True]}, jax.random.key(0), x, em={"restarts": 8})
print(sweep)

# %% [markdown]
# BIC penalises by a formula. The bootstrap asks the data: of 99 data sets drawn from two components, in how many does a
# third improve the fit by as much as it does here? All of their fits run as one compiled program.

# %%
two, three = sweep["k=2, shared=True"], sweep["k=3, shared=True"]
test = autoem.bootstrap_test(two, three, jax.random.key(1), num=99, restarts=2)
print(test)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2))
sweep.plot(left)
left.set_ylim(2300, 2400)  # one component, at 2608, is far above
test.plot(right)
save(figure, "how_many.png")

# %% [markdown]
# R's mclust 6.0 chooses the same of these eight (its EEE with three components), with these BICs in the other sign.

# %%
assert sweep.chosen == {"k": 3, "shared": True}
bic = [sweep[label].bic for label in ("k=3, shared=True", "k=2, shared=False", "k=2, shared=True")]
np.testing.assert_allclose(bic, [2314.316, 2322.192, 2325.220], atol=0.03)
assert test.p_value == 0.01

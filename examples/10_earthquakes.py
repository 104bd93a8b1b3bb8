# %% [markdown]
# # Earthquakes: a hidden Markov model
# How many earthquakes of magnitude 7 or more does a year have? The counts of 1900 to 2006 spread more than a Poisson's,
# and busy years come together. A hidden state, carried from year to year by a plain `scan`, sets the rate.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, GREEN, GREY, INK, ORANGE, columns, plt, save
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)


def earthquakes(count, k):
    trans = numpyro.param("trans", 0.8 * jnp.eye(k) + 0.2 / k, constraint=constraints.simplex)
    rate = numpyro.param("rate", jnp.linspace(0.7, 1.4, k) * count.mean(), constraint=constraints.positive)
    stationary = jnp.linalg.solve((jnp.eye(k) - trans + 1.0).T, jnp.ones(k))  # the law that `trans` leaves as it is

    def step(state, year):
        t, n = year
        state = numpyro.sample("state", dist.Categorical(jnp.where(t == 0, stationary, trans[state])))
        numpyro.sample("count", dist.Poisson(rate[state]), obs=n)
        return state, None

    scan(step, 0, (jnp.arange(len(count)), count))


count = columns("earthquakes.csv")["count"]

# %% [markdown]
# Forward-backward follows from the `scan`. The rates are counted, as in Baum and Welch's algorithm; the transitions
# decide how the first year starts too, so Newton's method finds them, and the plan says why.

# %%
em = autoem.EM(earthquakes, init="model", tol=1e-12, progress=False)
print(em.plan(count, 3))
results = {k: em.run(jax.random.key(0), count, k) for k in (2, 3)}
print("\nstates  log-likelihood  AIC     BIC     steps")
for k, fit in results.items():
    print(f"{k:6d}  {fit.log_likelihood:14.4f}  {fit.aic:6.1f}  {fit.bic:6.1f}  {fit.num_steps:5d}")
result = results[3]
print(f"\nrates {result.params['rate'].round(3)}, transitions\n{result.params['trans'].round(3)}")

# %% [markdown]
# `mode` is the most probable path (Viterbi's), `marginals` what forward-backward says of each year by itself. The bands
# are a standard deviation of the counts wide to either side.

# %%
posterior = result.posterior(count, 3)
path, probability = np.asarray(posterior.mode()["state"]), np.asarray(posterior.marginals["state"])
rate, year, colours = np.asarray(result.params["rate"]), np.arange(1900, 2007), np.array([BLUE, GREEN, ORANGE])
figure, (axes, below) = plt.subplots(2, 1, figsize=(8.4, 5.2), height_ratios=[4, 1], sharex=True)
axes.plot(year, count, color=GREY, lw=0.8, alpha=0.7, zorder=1)
axes.scatter(year, count, c=colours[path], s=24, ec="white", lw=0.5, zorder=3)
axes.bar(year, 2 * rate[path] ** 0.5, 1.0, (rate - rate**0.5)[path], color=colours[path], alpha=0.15, lw=0, aa=False)
edges = np.append(year, 2007) - 0.5
axes.stairs(rate[path], edges, baseline=None, color=INK, lw=1.6, zorder=2, label="rate on the most probable path")
axes.set(ylabel="earthquakes in the year", ylim=(0, 44), title="Earthquakes of magnitude 7 or more, three states")
axes.legend(loc="upper right")
below.stackplot(year, probability.T, colors=colours, alpha=0.85, lw=0)
below.set(xlim=(1899.5, 2006.5), ylim=(0, 1), yticks=[0, 1], ylabel="probability\nof the state")
save(figure, "earthquakes.png")

# %% [markdown]
# The figures commonly quoted from the book by Zucchini and MacDonald that the counts are from.

# %%
np.testing.assert_allclose([results[2].log_likelihood, result.log_likelihood], [-342.3183, -329.4603], atol=1e-4)
np.testing.assert_allclose(rate, [13.146, 19.721, 29.714], atol=1e-3)
np.testing.assert_allclose(result.params["trans"][0], [0.955, 0.024, 0.021], atol=5e-4)

# %% [markdown]
# # Two chains at once: a factorial hidden Markov model
# The earthquakes again: one hidden switch sets the level, another, on a clock of its own, multiplies it. Two chains of
# two states make four states of a year, with seven parameters instead of sixteen.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, GREY, INK, ORANGE, columns, plt, save
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)


def two_chains(count):
    era_moves = numpyro.param("era_moves", jnp.array([[0.9, 0.1], [0.1, 0.9]]), constraint=constraints.simplex)
    surge_moves = numpyro.param("surge_moves", jnp.array([[0.8, 0.2], [0.4, 0.6]]), constraint=constraints.simplex)
    level = numpyro.param("level", jnp.array([12.0, 18.0]), constraint=constraints.positive)
    factor = numpyro.param("factor", 1.6, constraint=constraints.positive)
    lift = jnp.stack([1.0, factor])

    def step(carry, n):
        era, surge = carry
        era = numpyro.sample("era", dist.Categorical(era_moves[era]))
        surge = numpyro.sample("surge", dist.Categorical(surge_moves[surge]))
        numpyro.sample("count", dist.Poisson(level[era] * lift[surge]), obs=n)
        return (era, surge), None

    scan(step, (0, 0), count)


count = columns("earthquakes.csv")["count"]

# %% [markdown]
# Both chains are summed out together, exactly. The rate is a product of two parameters; each has a closed form in turn.

# %%
em = autoem.EM(two_chains, init="model", tol=1e-13, progress=False)
print(em.plan(count))
result = em.run(jax.random.key(0), count)
level, factor = np.asarray(result.params["level"]), result.params["factor"]
print(f"\nlog-likelihood {result.log_likelihood:.4f}, AIC {result.aic:.1f}, BIC {result.bic:.1f}")
print(f"{level[0]:.1f} or {level[1]:.1f} earthquakes a year, in a surge {factor:.2f} times as many")

# %% [markdown]
# `joint` gives the four states of every year, and so the rate to expect. One switch alone gives about twenty a year,
# whichever it is: there the marginals leave open which of the two it was, and say so.

# %%
posterior, year = result.posterior(count), np.arange(1900, 2007)
joint, rates = posterior.joint("era", "surge"), np.outer(level, [1.0, factor])
figure, panels = plt.subplots(3, 1, figsize=(8.4, 5.8), height_ratios=[5, 1, 1], sharex=True)
panels[0].plot(year, count, "o-", color=GREY, lw=0.8, ms=4, mec="white", mew=0.5)
panels[0].plot(year, (joint * rates).sum((1, 2)), color=INK, lw=2, label="rate, given all years")
panels[0].set(ylabel="earthquakes in the year", ylim=(0, 44), title="Earthquakes: a level and a surge")
panels[0].legend(loc="upper right")
for panel, name, label, colour in [(panels[1], "era", "high level", BLUE), (panels[2], "surge", "surge", ORANGE)]:
    panel.fill_between(year, posterior.marginals[name][:, 1], color=colour, alpha=0.85, lw=0)
    panel.set(xlim=(1899.5, 2006.5), ylim=(0, 1), yticks=[0, 1], ylabel=f"probability\nof {label}")
save(figure, "two_chains.png")

# %% [markdown]
# By hand: one chain over the four pairs of states, and the forward recursion in NumPy.

# %%
moves = np.kron(result.params["era_moves"], result.params["surge_moves"])
alpha, by_hand = np.eye(4)[0], 0.0  # before the first year both switches are off
for seen in np.exp(dist.Poisson(rates.ravel()).log_prob(count[:, None])):
    alpha = alpha @ moves * seen
    by_hand, alpha = by_hand + np.log(alpha.sum()), alpha / alpha.sum()
np.testing.assert_allclose(result.log_likelihood, by_hand, rtol=1e-12)
np.testing.assert_allclose(joint[-1].ravel(), alpha, rtol=0, atol=1e-12)
assert result.log_likelihood > -329.7953

# %% [markdown]
# # The Nile: when did its level fall?
# A hundred annual flows at Aswan, 1871 to 1970. The chain runs from left to right: from "before" to "after" and never
# back. That is said by a zero in the start value of its table, which EM keeps.

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

BEFORE, AFTER = 0, 1
ONWARDS = jnp.array([[0.95, 0.05], [0.0, 1.0]])


def nile(flow):
    moves = numpyro.param("moves", ONWARDS, constraint=constraints.simplex)
    level = numpyro.param("level", jnp.quantile(flow, jnp.array([0.75, 0.25])))
    sd = numpyro.param("sd", jnp.full(2, flow.std()), constraint=constraints.positive)

    def step(era, year):
        t, x = year
        era = numpyro.sample("era", dist.Categorical(jnp.where(t == 0, jnp.array([1.0, 0.0]), moves[era])))
        numpyro.sample("flow", dist.Normal(level[era], sd[era]), obs=x)
        return era, None

    scan(step, BEFORE, (jnp.arange(len(flow)), flow))


flow, year = columns("nile.csv")["x"], np.arange(1871, 1971)

# %%
em = autoem.EM(nile, init="model", tol=1e-13, progress=False)
print(em.plan(flow))
result = em.run(jax.random.key(0), flow)
level, sd = np.asarray(result.params["level"]), np.asarray(result.params["sd"])
print(f"\n{result.status}\nlog-likelihood {result.log_likelihood:.4f}")
print(f"mean flow {level[0]:.0f} before, {level[1]:.0f} after; transitions\n{result.params['moves'].round(4)}")

# %% [markdown]
# The pair of neighbouring years that is (before, after) is the change: `pairs` holds its probability for each year.

# %%
posterior = result.posterior(flow)
change = np.asarray(posterior.pairs("era")[:, BEFORE, AFTER])
era, last = np.asarray(posterior.mode()["era"]), int(year[change.argmax()])
print(f"{last} is the last year before the change with probability {change.max():.1%}")
figure, (axes, below) = plt.subplots(2, 1, figsize=(8.4, 5.2), height_ratios=[4, 1], sharex=True)
axes.plot(year, flow, color=GREY, lw=0.8, alpha=0.8, zorder=1)
for state, colour in [(BEFORE, BLUE), (AFTER, ORANGE)]:
    inside = year[era == state][[0, -1]] + np.array([-0.5, 0.5])
    axes.fill_between(inside, level[state] - sd[state], level[state] + sd[state], color=colour, alpha=0.14, lw=0)
    axes.plot(inside, level[[state, state]], color=INK, lw=1.6, solid_capstyle="butt")
    axes.scatter(year[era == state], flow[era == state], color=colour, s=24, ec="white", lw=0.5, zorder=3)
axes.set(ylabel="annual flow (100 million m³)", title=f"The Nile at Aswan: a change after {last}")
below.bar(year[:-1] + 0.5, change, color=INK, width=0.8)
below.set(xlim=(1870, 1971), ylim=(0, 1), yticks=[0, 1], ylabel="probability\nof the change")
save(figure, "nile.png")

# %% [markdown]
# A free table, as in hmmlearn, ends at the same maximum. By hand: one term for each year in which the change may come.

# %%
log_before, log_after = (np.asarray(dist.Normal(level[k], sd[k]).log_prob(flow)) for k in (BEFORE, AFTER))
stay, go = np.log(result.params["moves"][0])
log_joint = [log_before[:t].sum() + log_after[t:].sum() + (t - 1) * stay + go for t in range(1, 100)]
np.testing.assert_allclose(change * np.exp(result.log_likelihood + 600), np.exp(np.array(log_joint) + 600), rtol=1e-8)
np.testing.assert_allclose(result.log_likelihood, -629.80445639, atol=1e-6)
assert result.params["moves"][AFTER, BEFORE] == 0 and last == 1898

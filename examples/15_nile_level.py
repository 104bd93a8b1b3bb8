# %% [markdown]
# # The Nile again: a level that drifts
# The same hundred flows as before, and no switch: the level of each year is that of the year before and a little noise.
# A Kalman filter and smoother comes of that, and with it forecasts, and what lies in a hole of the data.

# %%
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, GREY, ORANGE, columns, plt, save
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)


def drift(flow):
    move = numpyro.param("move", 100.0, constraint=constraints.positive)
    noise = numpyro.param("noise", 100.0, constraint=constraints.positive)
    first = numpyro.sample("first", dist.Normal(1000.0, 1000.0))  # wide: nothing is known before 1871
    numpyro.sample("flow_first", dist.Normal(first, noise), obs=flow[0])

    def year(level, x):
        level = numpyro.sample("level", dist.Normal(level, move))
        numpyro.sample("flow", dist.Normal(level, noise), obs=x)
        return level, None

    scan(year, first, flow[1:])


flow = columns("nile.csv")["x"]

# %%
options = dict(init="model", max_steps=5000, tol=1e-13, missing="marginalize", progress=False)
em = autoem.EM(drift, **options)
print(em.plan(flow))
result = em.run(jax.random.key(0), flow)
print(f"\n{result.status}\nlog-likelihood {result.log_likelihood:.4f}")
print(f"the level moves by {result.params['move']:.1f} a year, a flow lies {result.params['noise']:.1f} off it")

# %% [markdown]
# The posterior of other data, with the parameters that were found: ten years are hidden, ten more are asked for. Both
# are NaN.

# %%
hole = np.arange(55, 65)
seen = np.append(np.where(np.isin(np.arange(100), hole), np.nan, flow), np.full(10, np.nan))
posterior, year = result.posterior(seen), np.arange(1871, 1981)
level = np.append(posterior.mean["first"], posterior.mean["level"])
sd = np.append(posterior.sd["first"], posterior.sd["level"])
wide = np.hypot(sd, result.params["noise"])  # of a flow
figure, axes = plt.subplots(figsize=(8.4, 4.4))
unseen = np.isnan(seen)
for part, label in [(np.arange(54, 66), None), (np.arange(99, 110), "95% of the flows not shown")]:
    low, high = level[part] - 1.96 * wide[part], level[part] + 1.96 * wide[part]
    axes.fill_between(year[part], low, high, color=ORANGE, alpha=0.16, lw=0, label=label)
axes.fill_between(year, level - 1.96 * sd, level + 1.96 * sd, color=BLUE, alpha=0.25, lw=0, label="95% of levels")
axes.plot(year, level, color=BLUE, lw=2, label="level, smoothed")
axes.scatter(year[~unseen], seen[~unseen], color=GREY, s=14, lw=0, zorder=3)
axes.scatter(year[hole], flow[hole], s=22, fc="none", ec=ORANGE, zorder=3, label="hidden")
axes.legend(ncols=2, loc="upper right", fontsize=9)
axes.set(xlim=(1870, 1981), ylim=(400, 1700), ylabel="annual flow (100 million m³)", title="The Nile: a local level")
save(figure, "nile_level.png")

# %% [markdown]
# R's `StructTS` finds nearly the same variances, from a start that is wider still; the draws agree with the band.

# %%
draws = np.asarray(posterior.impute(jax.random.key(1), 4000)["flow"])[:, -1]
np.testing.assert_allclose([draws.mean(), draws.std()], [level[-1], wide[-1]], rtol=0.05)
np.testing.assert_allclose(result.log_likelihood, -640.38054029, atol=1e-4)
assert abs(result.params["move"] ** 2 - 1469) < 15 and abs(result.params["noise"] ** 2 - 15099) < 15

# %% [markdown]
# # A table with holes: ozone over New York, 1973
# Ozone, sunshine, wind and temperature on 153 days; on 37 of them nobody measured ozone, on 7 not the sun. The days are
# one multivariate normal (ozone by its logarithm), of which each day shows a part.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, INK, ORANGE, columns, plt, save
from numpyro.distributions import constraints
from scipy import optimize, stats

import autoem

jax.config.update("jax_enable_x64", True)


def weather(x):
    centre = numpyro.param("centre", jnp.array([3.0, 180.0, 10.0, 78.0]))
    start = jnp.diag(jnp.array([0.8, 8e3, 12.0, 90.0]))
    scatter = numpyro.param("scatter", start, constraint=constraints.positive_definite)
    with numpyro.plate("days", len(x)):
        numpyro.sample("x", dist.MultivariateNormal(centre, scatter), obs=x)


data = columns("airquality.csv")
x = np.stack([np.log(data["ozone"]), data["solar"], data["wind"], data["temperature"]], 1)

# %% [markdown]
# NaN and `missing="marginalize"` are all it takes: each day counts by the density of what was seen of it.

# %%
em = autoem.EM(weather, init="model", missing="marginalize", tol=1e-13, progress=False)
print(em.plan(x))
result = em.run(jax.random.key(0), x)
centre, scatter = (np.asarray(result.params[name]) for name in ("centre", "scatter"))
sd = np.sqrt(np.diag(scatter))
print(f"\n{result.status}, log-likelihood {result.log_likelihood:.4f}")
print("correlations with log ozone:", (scatter[0] / sd / sd[0]).round(2)[1:])

# %% [markdown]
# What was not seen has a law of its own, given the rest of the day: its mean, its deviation, and joint draws.

# %%
posterior, gone = result.posterior(x), np.isnan(x[:, 0])
drawn = np.exp(posterior.impute(jax.random.key(1), 4000)["x"][:, gone, 0])
low, middle, high = np.quantile(drawn, [0.05, 0.5, 0.95], axis=0)
figure, axes = plt.subplots(figsize=(10, 4))
when = np.arange(len(x))
axes.scatter(when[~gone], data["ozone"][~gone], s=12, color=INK, label="measured")
axes.vlines(when[gone], low, high, color=ORANGE, lw=1.6, alpha=0.8, label="not measured: 90% of the draws")
axes.scatter(when[gone], middle, s=12, color=BLUE, zorder=3, label="their median")
axes.set(yscale="log", xlabel="days from the first of May", ylabel="ozone (parts per billion)", title="Ozone, 1973")
axes.legend(ncols=3, loc="lower right")
save(figure, "missing_values.png")

# %% [markdown]
# The same likelihood, pattern by pattern in SciPy, maximised by a general optimiser from the complete days' moments.

# %%
whole, lower = x[~np.isnan(x).any(1)], np.tril_indices(4)


def loss(v):
    root = np.zeros((4, 4))
    root[lower] = v[4:]
    mean, cov = sd * v[:4] + whole.mean(0), np.outer(sd, sd) * (root @ root.T)
    days = ((row, ~np.isnan(row)) for row in x)
    return -sum(stats.multivariate_normal.logpdf(row[s], mean[s], cov[np.ix_(s, s)]) for row, s in days)


best = optimize.minimize(loss, np.r_[np.zeros(4), np.eye(4)[lower]], method="BFGS", options={"gtol": 1e-3})
print(f"log-likelihood {-best.fun:.4f} by general optimisation")
np.testing.assert_allclose(result.log_likelihood, -best.fun, atol=1e-4)
np.testing.assert_allclose(centre, sd * best.x[:4] + whole.mean(0), rtol=1e-3)

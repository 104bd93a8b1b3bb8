# %% [markdown]
# # Death notices in The Times: a mixture of Poissons
# On how many days of 1910 to 1912 did The Times print 0, 1, 2, ... death notices of women over 80? One Poisson does not
# spread enough: winters may differ from summers. The counts are from Hasselblad (1969); the fit is a slow one.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, GREY, INK, ORANGE, columns, plt, save
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)


def mixture(count, k):
    weights = numpyro.param("weights", jnp.full(k, 1 / k), constraint=constraints.simplex)
    rate = numpyro.param("rate", jnp.linspace(0.5, 1.5, k) * count.mean(), constraint=constraints.positive)
    with numpyro.plate("days", len(count)):
        z = numpyro.sample("season", dist.Categorical(weights))
        numpyro.sample("count", dist.Poisson(rate[z]), obs=count)


count = jnp.asarray(columns("times_deaths.csv")["count"])

# %%
em = autoem.EM(mixture, init="model", max_steps=20_000, tol=1e-13, progress=False)
print(em.plan(count, 2))
results = {k: em.run(jax.random.key(0), count, k) for k in (1, 2)}
print("\ncomponents  log-likelihood  AIC      BIC      steps")
for k, fit in results.items():
    print(f"{k:10d}  {fit.log_likelihood:14.4f}  {fit.aic:7.1f}  {fit.bic:7.1f}  {fit.num_steps:5d}")
result = results[2]
order = jnp.argsort(result.params["rate"])
weights, rate = result.params["weights"][order], result.params["rate"][order]
print(f"{weights[0]:.1%} of days at {rate[0]:.3f} notices a day, {weights[1]:.1%} at {rate[1]:.3f}")

# %%
notices = jnp.arange(count.max() + 1)
days = np.bincount(count)
parts = len(count) * weights * jnp.exp(dist.Poisson(rate).log_prob(notices[:, None]))
single = len(count) * jnp.exp(dist.Poisson(results[1].params["rate"][0]).log_prob(notices))
figure, axes = plt.subplots(figsize=(7.2, 4.2))
axes.bar(notices, parts[:, 0], color=BLUE, alpha=0.75, label=f"quiet days, {rate[0]:.2f} a day")
axes.bar(notices, parts[:, 1], bottom=parts[:, 0], color=ORANGE, alpha=0.75, label=f"busy days, {rate[1]:.2f} a day")
axes.plot(notices, single, "--", color=GREY, lw=1.5, label="a single Poisson")
axes.plot(notices, days, "o", color=INK, ms=6, mfc="white", mew=1.5, label="days counted")
axes.set(xlabel="death notices in a day", ylabel="days", title="The Times, 1,096 days", xticks=notices)
axes.legend()
save(figure, "times_deaths.png")

# %% [markdown]
# The values commonly quoted for these counts.

# %%
np.testing.assert_allclose(weights, [0.3599, 0.6401], atol=2e-4)
np.testing.assert_allclose(rate, [1.2561, 2.6634], atol=2e-4)
np.testing.assert_allclose(result.log_likelihood, -1989.946, atol=1e-3)

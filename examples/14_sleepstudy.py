# %% [markdown]
# # Short nights: a line for each subject
# Eighteen people, ten days of little sleep. They react more slowly from day to day, each from a level and at a pace of
# their own: a pair of random effects, whose covariance is learnt.

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


def reactions(y, day, subject):
    line = numpyro.param("line", jnp.array([250.0, 10.0]))
    spread = numpyro.param("spread", jnp.diag(jnp.array([600.0, 30.0])), constraint=constraints.positive_definite)
    noise = numpyro.param("noise", 30.0, constraint=constraints.positive)
    with numpyro.plate("subjects", 18):
        own = numpyro.sample("own", dist.MultivariateNormal(line, spread))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(own[subject, 0] + own[subject, 1] * day, noise), obs=y)


data = columns("sleepstudy.csv")
y, day, subject = data["reaction"], data["days"], data["subject"]

# %% [markdown]
# The effects enter the mean affinely, so their posterior is Gaussian: it is integrated exactly, subject by subject.

# %%
em = autoem.EM(reactions, init="model", max_steps=5000, tol=1e-13, progress=False)
print(em.plan(y, day, subject))
result = em.run(jax.random.key(0), y, day, subject)
line, spread = np.asarray(result.params["line"]), np.asarray(result.params["spread"])
sd = np.sqrt(np.diag(spread))
print(f"\n{result.status}, after {result.num_steps} steps\nlog-likelihood {result.log_likelihood:.4f}")
print(f"{line[0]:.1f} ms and {line[1]:.2f} ms a day; between subjects {sd[0]:.2f} and {sd[1]:.2f}")
print(f"within a subject {result.params['noise']:.2f}; correlation {spread[0, 1] / sd.prod():.3f}")

# %% [markdown]
# A subject's own least squares (dashed) is drawn towards the common line (grey), the more so the further off it lies:
# the posterior mean, with the band that holds the line's height with probability 0.95.

# %%
posterior = result.posterior(y, day, subject)
own, scatter = np.asarray(posterior.mean["own"]), np.asarray(posterior.covariance["own"])
days = np.arange(10)
design = np.stack([np.ones(10), days], 1)
figure, panels = plt.subplots(3, 6, figsize=(11, 6), sharex=True, sharey=True)
for i, axes in enumerate(panels.flat):
    mean, half = design @ own[i], 1.96 * np.sqrt(np.einsum("td,de,te->t", design, scatter[i], design))
    axes.plot(days, design @ line, color=GREY, lw=1)
    axes.plot(days, design @ np.linalg.lstsq(design, y[subject == i], rcond=None)[0], color=ORANGE, lw=1.2, ls="--")
    axes.fill_between(days, mean - half, mean + half, color=BLUE, alpha=0.18, lw=0)
    axes.plot(days, mean, color=BLUE, lw=1.8)
    axes.scatter(days, y[subject == i], color=INK, s=9, zorder=3)
    axes.text(0.04, 0.9, f"subject {i + 1}", transform=axes.transAxes, fontsize=9)
figure.supxlabel("days with little sleep")
figure.supylabel("reaction time (ms)")
save(figure, "sleepstudy.png")

# %% [markdown]
# As in lme4, `lmer(Reaction ~ Days + (Days | Subject), REML = FALSE)`.

# %%
np.testing.assert_allclose(result.log_likelihood, -875.96967224, atol=1e-4)
np.testing.assert_allclose([*line, *sd, result.params["noise"]], [251.405, 10.467, 23.781, 5.717, 25.592], rtol=2e-3)
assert abs(spread[0, 1] / sd.prod() - 0.081) < 2e-3

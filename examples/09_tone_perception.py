# %% [markdown]
# # Tone perception: a mixture of two regression lines
# A musician hears a tone whose overtones are stretched, and tunes another to the octave above it (Cohen 1980). Right is
# always 2. Some trials keep near to it, others follow the overtones; nobody marked which trial did which.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, ORANGE, columns, plt, save
from matplotlib.colors import LinearSegmentedColormap
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)


def two_lines(x, y):
    weights = numpyro.param("weights", jnp.full(2, 0.5), constraint=constraints.simplex)
    beta = numpyro.param("beta", jnp.array([[2.0, 0.0], [0.0, 1.0]]))  # intercepts and slopes: y = 2, and y = x
    sd = numpyro.param("sd", jnp.array([0.3, 0.03]), constraint=constraints.positive)
    with numpyro.plate("trials", len(y)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("y", dist.Normal(beta[z, 0] + beta[z, 1] * x, sd[z]), obs=y)


data = columns("tone.csv")
x, y = jnp.asarray(data["stretchratio"]), jnp.asarray(data["tuned"])

# %% [markdown]
# A line through two points has a likelihood without bound, so the start is stated: the model's own values.

# %%
em = autoem.EM(two_lines, init="model", progress=False)
print(em.plan(x, y))
result = em.run(jax.random.key(0), x, y)
errors = result.standard_errors()
print(f"\n{result.status}\nlog-likelihood {result.log_likelihood:.4f}")
for j, what in enumerate(["keeps to the octave", "follows the overtones"]):
    (a, b), (se_a, se_b) = result.params["beta"][j], errors["beta"][j]
    share, sd = result.params["weights"][j], result.params["sd"][j]
    print(f"{what:>22}: {share:.0%}, y = {a:.3f} ({se_a:.3f}) + {b:.3f} ({se_b:.3f}) x, sd {sd:.4f}")

# %%
probability = result.posterior(x, y).marginals["z"][:, 1]
colours = LinearSegmentedColormap.from_list("kind", [BLUE, "#b9b4ae", ORANGE])
ends = np.linspace(1.3, 3.05, 2)
figure, axes = plt.subplots(figsize=(7.2, 4.6))
for (a, b), sd, colour in zip(result.params["beta"], result.params["sd"], [BLUE, ORANGE], strict=True):
    line = a + b * ends
    axes.fill_between(ends, line - 2 * sd, line + 2 * sd, color=colour, alpha=0.12, lw=0)
    axes.plot(ends, line, color=colour, lw=1.6)
points = axes.scatter(x, y, c=probability, cmap=colours, vmin=0, vmax=1, s=26, ec="white", lw=0.5, zorder=3)
figure.colorbar(points, ax=axes, pad=0.02, aspect=30, label="probability of following the overtones")
axes.set(xlabel="stretching of the overtones", ylabel="tuned ratio", title="Tone perception, 150 trials")
save(figure, "tone_perception.png")

# %% [markdown]
# R's mixtools (regmixEM, the best of 20 starts) finds the same.

# %%
np.testing.assert_allclose(result.log_likelihood, 145.41684816, atol=1e-3)
np.testing.assert_allclose(result.params["beta"], [[1.5608, 0.2176], [0.0032, 0.9989]], atol=1e-3)
np.testing.assert_allclose(result.params["sd"], [0.21707, 0.004525], atol=1e-4)

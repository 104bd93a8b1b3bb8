# %% [markdown]
# # Whom to believe: Dawid and Skene's anaesthetists
# Five anaesthetists grade 45 patients from 1 (fit) to 4, the first of them three times. Nobody knows the true grades.
# The model learns them together with each rater's habits: the table of what is said when something is true.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, INK, columns, plt, save
from matplotlib.colors import LinearSegmentedColormap
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)


def ratings(patient, rater, grade, patients=45, raters=5, grades=4):
    prevalence = numpyro.param("prevalence", jnp.full(grades, 1 / grades), constraint=constraints.simplex)
    habits = 0.6 * jnp.eye(grades) + 0.4 / grades
    says = numpyro.param("says", jnp.tile(habits, (raters, 1, 1)), constraint=constraints.simplex)
    with numpyro.plate("patients", patients):
        truth = numpyro.sample("truth", dist.Categorical(prevalence))
    with numpyro.plate("ratings", len(grade)):  # one row a rating: a patient's truth stands behind several rows
        numpyro.sample("grade", dist.Categorical(says[rater, truth[patient]]), obs=grade)


data = columns("anaesthetists.csv")
patient, rater, grade = (jnp.asarray(data[name]) for name in ("item", "rater", "label"))

# %% [markdown]
# The paper starts from the shares of the grades that a patient was given: not from parameters but from a posterior.

# %%
votes = jnp.zeros((45, 4)).at[patient, grade].add(1.0)
em = autoem.EM(ratings, init={"truth": votes / votes.sum(1, keepdims=True)}, max_steps=5000, progress=False)
print(em.plan(patient, rater, grade))
result = em.run(jax.random.key(0), patient, rater, grade)
print(f"\n{result.status}\nprevalence {np.round(result.params['prevalence'], 2)}")
posterior = result.posterior(patient, rater, grade).marginals["truth"]
print(f"only patients {np.flatnonzero(posterior.max(1) < 0.99) + 1} leave more than one per cent of doubt")

# %%
blues = LinearSegmentedColormap.from_list("blues", ["white", BLUE])
figure, axes = plt.subplots(1, 5, figsize=(9.6, 2.75), sharey=True)
for number, (panel, table) in enumerate(zip(axes, np.asarray(result.params["says"]), strict=True), start=1):
    panel.imshow(table, cmap=blues, vmin=0, vmax=1)
    for (true, said), p in np.ndenumerate(table):
        if p >= 0.005:
            panel.text(said, true, f"{p:.2f}".lstrip("0") if p < 0.995 else "1", ha="center", va="center", fontsize=9,
                       color="white" if p > 0.55 else INK)  # fmt: skip
    panel.set(xticks=range(4), yticks=range(4), xticklabels=range(1, 5), yticklabels=range(1, 5), xlabel="grade said")
    panel.set_title(f"rater {number}", loc="center", fontsize=10.5)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
axes[0].set_ylabel("true grade")
figure.suptitle("What five anaesthetists say", x=0.01, ha="left", fontsize=12, fontweight="bold")
save(figure, "anaesthetists.png")

# %% [markdown]
# The prevalences of the paper's table 2, to its two digits.

# %%
np.testing.assert_allclose(result.params["prevalence"], [0.40, 0.42, 0.11, 0.07], atol=5e-3)
np.testing.assert_allclose(result.log_likelihood, -190.73099659, atol=1e-3)

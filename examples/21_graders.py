# %% [markdown]
# # Five anaesthetists with habits of their own
# Forty-five patients are graded in four classes by five people. What class a patient is in is hidden; how each grader
# confuses the classes varies about what graders do on average. The classes are summed out exactly, the habits are not:
# they get a variational posterior. One call does both.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, GREEN, GREY, ORANGE, columns, plt, save
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)


def grades(patient, grader, grade):
    share = numpyro.param("share", jnp.ones(4) / 4, constraint=constraints.simplex)
    habit = numpyro.param("habit", 2.0 * jnp.eye(4))
    spread = numpyro.param("spread", 1.0, constraint=constraints.positive)
    with numpyro.plate("graders", 5):
        own = numpyro.sample("own", dist.Normal(habit, spread).to_event(2))
    with numpyro.plate("patients", 45):
        fitness = numpyro.sample("fitness", dist.Categorical(share))
    with numpyro.plate("grades", len(grade)):
        numpyro.sample("grade", dist.Categorical(logits=own[grader, fitness[patient]]), obs=grade)


data = columns("anaesthetists.csv")
patient, grader, grade = data["item"], data["rater"], data["label"]
options = {"e_step": {"own": autoem.e_step.Variational()}, "accelerate": autoem.accelerate.Anderson()}
em = autoem.EM(grades, init="model", progress=False, **options)
print(em.plan(patient, grader, grade))
result = em.run(jax.random.key(0), patient, grader, grade)
print(f"{result.status}\n{result.objective_name} {result.log_likelihood:.2f} +- {result.standard_error:.2f}")

# %% [markdown]
# The habits are known up to a spread. Of each grader: the odds of saying a patient's own class rather than the next.

# %%
posterior = result.posterior()
classes = np.asarray(posterior.marginals["fitness"])
own = np.asarray(posterior.sample(jax.random.key(1), 2000)["own"])
odds = np.stack([own[:, :, k, k] - own[:, :, k, k + 1] for k in range(3)], -1)
low, middle, high = np.quantile(odds, [0.05, 0.5, 0.95], axis=0)
figure, axes = plt.subplots(figsize=(8, 3.6))
for k, colour in enumerate((BLUE, ORANGE, GREEN)):
    at = np.arange(1, 6) + 0.18 * (k - 1)
    axes.vlines(at, low[:, k], high[:, k], color=colour, alpha=0.4, lw=3)
    axes.scatter(at, middle[:, k], color=colour, zorder=3, label=f"class {k + 1} against {k + 2}")
axes.axhline(0, color=GREY, lw=0.8)
axes.set(xlabel="grader", ylabel="log odds", ylim=(-0.2, 4.2), title="How sharply each grader tells classes apart")
axes.legend(ncols=3, loc="upper center")
save(figure, "graders.png")

# %% [markdown]
# The shares of the classes are near those of Dawid and Skene (0.40, 0.42, 0.11), who let every grader differ freely.
# The grade that was said most often is no bad answer either.

# %%
votes = np.zeros((45, 4))
np.add.at(votes, (patient, grade), 1)
print(f"the class that most grades say: {np.mean(classes.argmax(1) == votes.argmax(1)):.0%} of the patients")
assert np.mean(classes.argmax(1) == votes.argmax(1)) > 0.85
np.testing.assert_allclose(np.asarray(result.params["share"])[:3], [0.40, 0.42, 0.11], atol=0.05)

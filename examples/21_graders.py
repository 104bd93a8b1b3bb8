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
from _common import columns
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
guess = autoem.e_step.Variational(num_draws=16, steps=20)
em = autoem.EM(grades, e_step={"own": guess}, init="model", max_steps=80, progress=False)
print(em.plan(patient, grader, grade))
result = em.run(jax.random.key(0), patient, grader, grade)
print(result)
posterior = result.posterior()
print(np.asarray(posterior.marginals["fitness"]).argmax(1), np.asarray(result.params["share"]))

# %% [markdown]
# # How hard is a question, and how much does it tell?
# A thousand people answer five questions. How able a person is nobody saw; it moves the odds of every answer, by an
# amount of the question's own. No integral over it has a formula, so it is done by quadrature, person by person.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, GREEN, GREY, ORANGE, columns, plt, save

import autoem

jax.config.update("jax_enable_x64", True)


def answers(y, weight):
    easiness = numpyro.param("easiness", jnp.zeros(5))
    slope = numpyro.param("slope", jnp.ones(5))
    with numpyro.plate("people", len(y)), numpyro.handlers.scale(scale=weight):
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Bernoulli(logits=easiness + slope * ability[:, None]).to_event(1), obs=y)


data = columns("lsat6.csv")
everyone = np.stack([data[f"item{i}"] for i in range(1, 6)], 1)
y, weight = np.unique(everyone, axis=0, return_counts=True)  # 32 patterns at most: equal answers count as one

# %% [markdown]
# One argument changes the method. Laplace's approximation puts a Gaussian at the mode of each person's ability.

# %%
options = {"latent": ["ability"], "max_steps": 3000, "progress": False}
rule = autoem.EM(answers, **options)
print(rule.plan(y, weight))
result = rule.run(jax.random.key(0), y, weight)
gauss = autoem.EM(answers, e_step=autoem.e_step.Laplace(), **options).run(jax.random.key(0), y, weight)
for fit in (result, gauss):
    print(f"{fit.objective_name} {fit.log_likelihood:.4f}, slopes {np.round(np.asarray(fit.params['slope']), 3)}")

# %% [markdown]
# Left: the probability of a right answer by ability. Right: what five answers tell of a person, by how many are right:
# the posterior mean of the ability, and the interval that holds it with probability 0.9.

# %%
easiness, slope = (np.asarray(result.params[n]) for n in ("easiness", "slope"))
posterior = result.posterior(y, weight)
ability, right = np.asarray(posterior.mean["ability"]), y.sum(1)
low, high = (np.asarray(end) for end in posterior.interval("ability", 0.9))
figure, (left, other) = plt.subplots(1, 2, figsize=(10.5, 4.2))
grid = np.linspace(-4, 4, 200)
for i, colour in enumerate([BLUE, ORANGE, GREEN, GREY, "#7b5ea7"]):
    left.plot(grid, 1 / (1 + np.exp(-(easiness[i] + slope[i] * grid))), color=colour, label=f"question {i + 1}")
left.set(xlabel="ability", ylabel="probability of a right answer", title="Five questions")
left.legend()
shift = right + np.linspace(-0.3, 0.3, len(y))
other.vlines(shift, low, high, color=BLUE, alpha=0.35, lw=2)
other.scatter(shift, ability, s=8 + weight / 4, color=BLUE, zorder=3)
other.set(xlabel="right answers of five", ylabel="ability", title="Each pattern of answers (area: people)")
save(figure, "item_response.png")

# %% [markdown]
# The maximum that R's ltm finds with 61 nodes; Laplace's Gaussian is a little off, as its name in the plan admits.

# %%
np.testing.assert_allclose(result.log_likelihood, -2466.65337740, atol=5e-3)
np.testing.assert_allclose(slope, [0.8256595, 0.7227442, 0.8908745, 0.688368, 0.6568559], atol=0.01)
np.testing.assert_allclose(gauss.params["easiness"], easiness, atol=0.05)

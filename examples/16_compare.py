# %% [markdown]
# # Six ways to the same lines
# The sleep study once more, a line for each of eighteen people. EM integrates the lines exactly; but what would another
# strategy have given, and how fast? One model, the same data and start, side by side.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _common import columns, save
from numpyro.distributions import constraints

import autoem
from autoem.baselines import NUTS, SVI, GradientAscent

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
# EM three times: as it is derived, accelerated, and with a rule in the place of the exact integral. Then what one would
# do without EM: climb the marginal likelihood by its gradient; let NumPyro's SVI guess each line; draw the parameters.

# %%
slower = optax.adam(optax.cosine_decay_schedule(0.5, 6000))
comparison = autoem.compare(
    autoem.EM(reactions, init="model", max_steps=5000, tol=1e-13),
    {
        "exact EM": None,
        "EM with SQUAREM": autoem.accelerate.Squarem(),
        "EM by quadrature": autoem.e_step.Quadrature(3),
        "gradient ascent": GradientAscent(optax.adam(0.05), steps=2000),
        "SVI": SVI(optimizer=slower, steps=6000),
        "NUTS": NUTS(num_warmup=300, num_samples=300, num_chains=1),
    },
    jax.random.key(0),
    *(y, day, subject),
)
print(comparison)

# %% [markdown]
# Left of a dot is the way there. Dashed is what is not the likelihood at one point: the bound of SVI, and the draws of
# NUTS, which lie around the maximum and not on it. SVI's guide draws a person's level and pace as if they were
# independent; its bound is nearly tight where it ends, but only since the parameters went where that is nearly so.

# %%
save(comparison.plot(), "compare.png")

# %% [markdown]
# All that climb the likelihood end where lme4 does; the rule is exact here, as the effects are Gaussian.

# %%
for label in ("exact EM", "EM with SQUAREM", "EM by quadrature", "gradient ascent"):
    np.testing.assert_allclose(comparison[label].log_likelihood, -875.96967224, atol=1e-4)
assert comparison["SVI"].objective < comparison["SVI"].log_likelihood < -877
assert comparison["NUTS"].result.details["best"] < -875.9696
assert comparison["gradient ascent"].shift < 0.01

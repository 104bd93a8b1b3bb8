# %% [markdown]
# # Emission tomography: a picture from counts
# Positrons decay in 64 pixels; 152 detector bins around them count photons. A bin sees a strip of pixels, each with a
# weight, so its count is Poisson with a rate that is a sum. The model holds no latent: how many of a bin's photons came
# from which pixel is never written down.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import INK, columns, plt, save
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)
SIDE = 8


def project(image, strip):
    return jax.ops.segment_sum(strip["weight"] / 300 * image[strip["pixel"]], strip["bin"], 152)


def scanner(counts, strip):
    uniform = jnp.full(SIDE**2, counts.sum() / SIDE**2)
    image = numpyro.param("image", uniform, constraint=constraints.positive)
    with numpyro.plate("bins", 152):
        numpyro.sample("counts", dist.Poisson(project(image, strip)), obs=counts)


def smooth_scanner(counts, strip):
    image = numpyro.sample("image", dist.Gamma(3.0, 0.05).expand([SIDE**2]).to_event(1))
    with numpyro.plate("bins", 152):
        numpyro.sample("counts", dist.Poisson(project(image, strip)), obs=counts)


counts, strip = columns("phantom_counts.csv")["count"], columns("phantom_system.csv")
truth = columns("phantom_truth.csv")["activity"]

# %% [markdown]
# autoem sees that the rate is a non-negative sum, splits each count over its terms, and finds the update of Shepp and
# Vardi (1982): a projection and a back-projection, here a gather and a scatter. A Gamma prior keeps it closed form.

# %%
em = autoem.EM(scanner, init="model", max_steps=20_000, tol=1e-12, progress=False)
print(em.plan(counts, strip))
result = em.run(jax.random.key(0), counts, strip)
print(f"\n{result.status}\nlog-likelihood {result.log_likelihood:.5f} after {result.num_steps} steps")
early = autoem.EM(scanner, init="model", max_steps=30, progress=False).run(jax.random.key(0), counts, strip)
prior = autoem.EM(smooth_scanner, max_steps=20_000, tol=1e-12, progress=False).run(jax.random.key(0), counts, strip)

# %%
images = {
    "what was there": truth,
    "greatest likelihood": result.params["image"],
    "30 steps": early.params["image"],
    "with a Gamma prior": prior.params["image"],
}
figure, panels = plt.subplots(1, 4, figsize=(11, 3.2))
for axes, (title, image) in zip(panels, images.items(), strict=True):
    drawn = axes.imshow(np.reshape(image, (SIDE, SIDE)), cmap="magma", vmin=0, vmax=260)
    error = np.sqrt(np.mean((np.asarray(image) - truth) ** 2))
    axes.set_title(title, fontsize=11)
    axes.set(xticks=[], yticks=[], xlabel="" if image is truth else f"error {error:.0f}")
figure.colorbar(drawn, ax=panels, shrink=0.8, label="decays").outline.set_edgecolor(INK)
save(figure, "tomography.png")

# %% [markdown]
# The greatest likelihood fits the noise: 23 pixels are zero. It was found independently by L-BFGS-B with bounds.

# %%
np.testing.assert_allclose(result.log_likelihood, -333.00658587, atol=1e-6)
np.testing.assert_allclose(project(result.params["image"], strip).sum(), counts.sum(), rtol=1e-6)
assert np.sum(result.params["image"] < 1e-6) == 23

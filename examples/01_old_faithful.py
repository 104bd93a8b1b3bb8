# %% [markdown]
# # Old Faithful: a mixture of two Gaussians
# The geyser in Yellowstone erupts briefly and soon again, or for long and then rests. Nobody wrote down which kind an
# eruption was: that is the latent. The model is ordinary NumPyro; autoem derives its EM algorithm.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, GREY, INK, ORANGE, columns, plt, save
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.patches import Ellipse
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)


def mixture(x, k=2):
    n, d = x.shape
    weights = numpyro.param("weights", jnp.ones(k) / k, constraint=constraints.simplex)
    loc = numpyro.param("loc", lambda key: jax.random.normal(key, (k, d)))
    cov = numpyro.param("cov", jnp.tile(jnp.eye(d), (k, 1, 1)), constraint=constraints.positive_definite)
    with numpyro.plate("eruptions", n):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.MultivariateNormal(loc[z], cov[z]), obs=x)


data = columns("old_faithful.csv")
x = np.stack([data["eruptions"], data["waiting"]], -1)

# %% [markdown]
# The plan says what will be done with every latent and every parameter, and why.

# %%
em = autoem.EM(mixture, restarts=8, progress=False)
print(em.plan(x))

# %%
result = em.run(jax.random.key(0), x)
short, long = np.argsort(result.params["loc"][:, 0])  # components come in any order
weights, loc, cov = (np.asarray(result.params[name])[[short, long]] for name in ("weights", "loc", "cov"))
print(f"\n{result.status}\nlog-likelihood {result.log_likelihood:.4f} after {result.num_steps} steps")
for kind, w, (minutes, wait) in zip(["short", "long"], weights, loc, strict=True):
    print(f"{kind:>5}: {w:.1%} of eruptions, {minutes:.2f} minutes, then a wait of {wait:.1f} minutes")

# %% [markdown]
# Each eruption is coloured by its posterior probability of being long; ellipses show one and two standard deviations,
# and the dashed line, from the posterior of new points on a grid, is where both kinds are equally probable.

# %%
probability = result.posterior(x).marginals["z"][:, long]
colours = LinearSegmentedColormap.from_list("kind", [BLUE, "#b9b4ae", ORANGE])
grid = np.stack(np.meshgrid(np.linspace(1.3, 5.4, 150), np.linspace(40, 98, 150)), -1)
on_grid = result.posterior(grid.reshape(-1, 2)).marginals["z"][:, long].reshape(150, 150)
figure, axes = plt.subplots(figsize=(7.2, 4.8))
axes.contour(*grid.transpose(2, 0, 1), on_grid, [0.5], colors=GREY, linestyles="dashed", linewidths=1)
for centre, spread, colour in zip(loc, cov, [BLUE, ORANGE], strict=True):
    variances, directions = np.linalg.eigh(spread)
    angle = np.degrees(np.arctan2(directions[1, 1], directions[0, 1]))
    for sigmas, alpha in [(2, 0.10), (1, 0.16)]:
        height, width = 2 * sigmas * np.sqrt(variances)
        fill = to_rgba(colour, alpha)
        axes.add_patch(Ellipse(centre, width, height, angle=angle, fc=fill, ec=colour, lw=1.3))
points = axes.scatter(*x.T, c=probability, cmap=colours, vmin=0, vmax=1, s=24, ec="white", lw=0.5, zorder=3)
axes.scatter(*loc.T, marker="+", s=110, c=INK, lw=1.6, zorder=4)
figure.colorbar(points, ax=axes, pad=0.02, aspect=30, label="posterior probability of a long eruption")
axes.set(xlabel="eruption (minutes)", ylabel="wait for the next (minutes)", title="Old Faithful, 272 eruptions")
save(figure, "old_faithful.png")

# %% [markdown]
# R's mclust 6.0 (model VVV, two components) finds the same maximum.

# %%
assert abs(result.log_likelihood - -1130.264) < 1e-3
np.testing.assert_allclose(loc, [[2.0364, 54.4785], [4.2897, 79.9681]], atol=1e-2)

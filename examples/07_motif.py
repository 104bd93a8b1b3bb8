# %% [markdown]
# # Finding a motif in DNA
# Each of 18 stretches of E. coli's genome, 105 letters long, holds a binding site of the protein CRP: where, and what
# does it look like? The latent is the place, one of 90; letters within follow a table, all others the background.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, GREEN, HERE, ORANGE, plt, save
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)
ACGT, WIDTH = "ACGT", 16


def motif(dna):
    n, length = dna.shape
    places = length - WIDTH + 1
    site = numpyro.param("site", jnp.full((WIDTH, 4), 0.25), constraint=constraints.simplex)
    background = numpyro.param("background", jnp.full(4, 0.25), constraint=constraints.simplex)
    log_site, log_background = jnp.log(jnp.maximum(site, 1e-300)), jnp.log(background)
    windows = [dna[:, j : j + places] for j in range(WIDTH)]  # column j of every possible site
    gain = sum(log_site[j][letters] - log_background[letters] for j, letters in enumerate(windows))
    with numpyro.plate("sequences", n):
        place = numpyro.sample("place", dist.Categorical(jnp.full(places, 1 / places)))
        numpyro.factor("letters", log_background[dna].sum(1) + gain[jnp.arange(n), place])


lines = (HERE / "data" / "crp.fasta").read_text().split()[1::2]
dna = jnp.array([[ACGT.index(letter) for letter in line] for line in lines])

# %% [markdown]
# There are many local maxima. As is usual for motifs, the start leans half on one word, half on the letters' shares.

# %%
shares = jnp.bincount(dna.ravel(), length=4) / dna.size
word = jax.nn.one_hot(jnp.array([ACGT.index(letter) for letter in "TTTAATATTGCTCCCC"]), 4)
em = autoem.EM(motif, init={"site": (word + shares) / 2, "background": shares}, tol=1e-12, progress=False)
print(em.plan(dna))
result = em.run(jax.random.key(0), dna)
site = np.asarray(result.params["site"])
consensus = "".join(ACGT[j] for j in site.argmax(1))
print(f"\n{result.status}\nlog-likelihood {result.log_likelihood:.4f}, consensus {consensus}")

# %%
bits = 2 + np.sum(site * np.log2(np.maximum(site, 1e-12)), 1)  # a letter is as tall as what it tells
colours = dict(zip(ACGT, [GREEN, BLUE, ORANGE, "#b3413b"], strict=True))
figure, (logo, where) = plt.subplots(2, 1, figsize=(7.4, 6), height_ratios=[3, 4])
for column, (heights, total) in enumerate(zip(site, bits, strict=True)):
    foot = 0.0
    for letter in np.argsort(heights):
        outline = TextPath((0, 0), ACGT[letter], size=1, prop={"weight": "bold", "family": "DejaVu Sans"})
        box, height = outline.get_extents(), heights[letter] * total
        fit = Affine2D().translate(-box.x0, -box.y0).scale(0.92 / box.width, height / box.height)
        shape = fit.translate(column + 0.54, foot).transform_path(outline)
        logo.add_patch(PathPatch(shape, fc=colours[ACGT[letter]], ec="none"))
        foot += height
logo.set(xlim=(0.4, 16.6), ylim=(0, 2), xticks=range(1, 17), ylabel="bits", title="Binding site of CRP")
place = result.posterior(dna).marginals["place"]
blues = LinearSegmentedColormap.from_list("blues", ["white", BLUE])
where.imshow(place, aspect="auto", cmap=blues, vmin=0, extent=(0.5, 90.5, 18.5, 0.5))
where.set(xlabel="first letter of the site", ylabel="sequence", title="Posterior probability of its place")
save(figure, "motif.png")

# %% [markdown]
# The literature knows the site as the two halves of a palindrome: TGTGA, six letters, TCACA.

# %%
assert consensus.startswith("TGTGA") and consensus.endswith("TCACA")
np.testing.assert_allclose(result.log_likelihood, -2491.56123562, atol=1e-3)

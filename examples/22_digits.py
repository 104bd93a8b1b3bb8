# %% [markdown]
# # Handwritten digits from eight numbers
# Each picture has eight numbers behind it, which a small neural network turns into 64 pixels. Their posterior has no
# formula: a second network guesses it from the picture, and both are trained by one call (a variational autoencoder).

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _common import BLUE, columns, plt, save

import autoem

PIXELS, HIDDEN, CODE = 64, 64, 8


def layer(name, x, inputs, outputs):
    weight = numpyro.param(f"{name}.weight", lambda key: jax.random.normal(key, (inputs, outputs)) / inputs**0.5)
    return x @ weight + numpyro.param(f"{name}.bias", jnp.zeros(outputs))


def decoded(code):
    return layer("out", jnp.tanh(layer("in", code, CODE, HIDDEN)), HIDDEN, PIXELS)


def digits(pictures):
    with numpyro.plate("pictures", len(pictures)):
        code = numpyro.sample("code", dist.Normal(jnp.zeros(CODE), 1).to_event(1))
        numpyro.sample("pixels", dist.Bernoulli(logits=decoded(code)).to_event(1), obs=pictures)


def encoder(pictures):
    found = layer("code", jnp.tanh(layer("see", pictures, PIXELS, HIDDEN)), HIDDEN, 2 * CODE)
    with numpyro.plate("pictures", len(pictures)):
        numpyro.sample("code", dist.Normal(found[:, :CODE], jnp.exp(found[:, CODE:] / 2)).to_event(1))


data = columns("digits.csv")
lines = np.stack([data[part] for part in ("top", "upper", "lower", "bottom")], 1)
pictures = ((lines[:, :, None] >> np.arange(15, -1, -1)) & 1).reshape(-1, PIXELS).astype(np.float32)
train, test = pictures[:1500], pictures[1500:]

# %% [markdown]
# The M-step sees draws of the guessed posterior; a network has no closed form, so it takes gradient steps.

# %%
guess = autoem.e_step.Variational(encoder, num_draws=1, num_particles=1, steps=5, optimizer=optax.adam(3e-3))
step = autoem.m_step.Gradient(optax.adam(3e-3), steps=5)
em = autoem.EM(digits, latent=["code"], e_step=guess, m_step=step, max_steps=400, progress=False)
print(em.plan(train))
result = em.run(jax.random.key(0), train)
begin, end = result.history[0] / len(train), result.log_likelihood / len(train)
print(f"{result.status}\n{result.objective_name} {end:.2f} nats a picture, at the start {begin:.2f}")

# %% [markdown]
# Pictures that it never saw, as the two networks give them back; and pictures of nobody's hand.

# %%
unseen, code = result.posterior(test), jax.random.normal(jax.random.key(1), (16, CODE))
with numpyro.handlers.substitute(data=result.params):
    back, drawn = (1 / (1 + np.exp(-np.asarray(decoded(c)))) for c in (unseen.mean["code"][:16], code))
figure, panels = plt.subplots(3, 16, figsize=(11, 2.4))
for row, images, title in zip(panels, (test[:16], back, drawn), ("seen", "given back", "dreamt"), strict=True):
    row[0].set_ylabel(title, rotation=0, ha="right", va="center", color=BLUE)
    for axes, image in zip(row, images, strict=True):
        axes.imshow(image.reshape(8, 8), cmap="Greys", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
save(figure, "digits.png")

# %% [markdown]
# Each pixel on its own, at its frequency, gives the unseen pictures so many nats; the code has to be far better.

# %%
alone = np.asarray(dist.Bernoulli(np.clip(train.mean(0), 1e-3, 1 - 1e-3)).log_prob(test)).sum(1).mean()
print(f"unseen pictures: {unseen.total / len(test):.2f} nats each, pixel by pixel {alone:.2f}")
assert begin < alone + 4 < unseen.total / len(test)

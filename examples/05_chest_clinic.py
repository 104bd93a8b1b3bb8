# %% [markdown]
# # Chest clinic: diagnosis when a fifth of the findings is missing
# The network of Lauritzen and Spiegelhalter (1988): a visit to Asia and smoking bear on three diseases, and these on an
# X-ray and on shortness of breath. 800 patients, of whose findings a fifth is missing, for each patient other ones.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import BLUE, GREEN, INK, ORANGE, columns, plt, save
from numpyro.distributions import constraints

import autoem

jax.config.update("jax_enable_x64", True)

# probability of "yes" by the parents' values, the first parent being the most significant bit; as published in 1988
PUBLISHED = {"asia": [0.01], "smoke": [0.5], "tub": [0.01, 0.05], "lung": [0.01, 0.1], "bronc": [0.3, 0.6],
             "either": [0.0, 1.0, 1.0, 1.0], "xray": [0.05, 0.98], "dysp": [0.1, 0.7, 0.8, 0.9]}  # fmt: skip


def clinic(d):
    start = {name: jnp.full(len(values), 0.4) for name, values in PUBLISHED.items()}
    p = {name: numpyro.param(f"p_{name}", v, constraint=constraints.unit_interval) for name, v in start.items()}

    def finding(name, row):
        seen = d[name] >= 0  # -1 in the file: missing
        return numpyro.sample(name, dist.Bernoulli(p[name][row]), obs=jnp.where(seen, d[name], 0), obs_mask=seen)

    with numpyro.plate("patients", len(d["asia"])):
        asia, smoke = finding("asia", 0), finding("smoke", 0)
        tub, lung, bronc = finding("tub", asia), finding("lung", smoke), finding("bronc", smoke)
        either = finding("either", 2 * tub + lung)
        finding("xray", either), finding("dysp", 2 * bronc + either)


patients = {name: jnp.asarray(values) for name, values in columns("asia.csv").items()}

# %%
em = autoem.EM(clinic, init="model", max_steps=5000, progress=False)
print(em.plan(patients))
learnt = em.run(jax.random.key(0), patients)
print(f"\n{learnt.status}\nlog-likelihood {learnt.log_likelihood:.4f}")

# %% [markdown]
# New patients are rows like any others: known findings are given, the rest is asked for. A smoker short of breath is
# diagnosed before and after the X-ray; so is the patient of 1988, back from Asia and short of breath. With no step
# taken from them, the published tables answer too.

# %%
smoker = dict(asia=0, smoke=1, dysp=1)
visits = {"before the X-ray": smoker, "X-ray clear": smoker | {"xray": 0}, "X-ray abnormal": smoker | {"xray": 1}}
known = [*visits.values(), dict(asia=1, dysp=1)]
new = {name: jnp.array([findings.get(name, -1) for findings in known]) for name in PUBLISHED}
tables = {f"p_{name}": jnp.array(values) for name, values in PUBLISHED.items()}
published = autoem.EM(clinic, init=tables, max_steps=0, progress=False).run(jax.random.key(0), new)
diagnoses = {}
for source, fit in {"learnt": learnt, "published": published}.items():
    marginals = fit.posterior(new).marginals
    diagnoses[source] = np.stack([marginals[disease][:, 1] for disease in ("tub", "lung", "bronc")], -1)
    print(f"{source:>10}: tuberculosis, lung cancer, bronchitis\n{diagnoses[source].round(3)}")

# %%
ours, theirs = diagnoses["learnt"][:3], diagnoses["published"][:3]
figure, axes = plt.subplots(figsize=(7.2, 3.6))
for j, (disease, colour) in enumerate([("tuberculosis", GREEN), ("lung cancer", ORANGE), ("bronchitis", BLUE)]):
    bars = axes.bar(np.arange(3) + 0.27 * (j - 1), ours[:, j], 0.25, color=colour, label=disease)
    axes.bar_label(bars, [f"{p:.0%}" for p in ours[:, j]], padding=4, fontsize=9)
    axes.hlines(theirs[:, j], *(np.arange(3) + 0.27 * (j - 1) + side for side in (-0.12, 0.12)), color=INK, lw=1.6)
axes.set(xticks=range(3), xticklabels=visits, ylim=(0, 1.05), ylabel="probability", title="A smoker short of breath")
axes.plot([], color=INK, lw=1.6, label="published tables")
axes.legend(ncols=4, loc="upper left", bbox_to_anchor=(0, -0.1), columnspacing=1.2)
save(figure, "chest_clinic.png")

# %%
np.testing.assert_allclose(diagnoses["published"][3], [0.0878, 0.0995, 0.8114], atol=1e-4)  # summed by hand
np.testing.assert_allclose(learnt.log_likelihood, -1511.74041858, atol=1e-3)

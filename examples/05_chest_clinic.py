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
from _common import BLUE, GREEN, GREY, ORANGE, columns, plt, save
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
        finding("xray", either)
        finding("dysp", 2 * bronc + either)


patients = {name: jnp.asarray(values) for name, values in columns("asia.csv").items()}

# %%
em = autoem.EM(clinic, init="model", max_steps=5000, progress=False)
print(em.plan(patients))
result = em.run(jax.random.key(0), patients)
print(f"\n{result.status}\nlog-likelihood {result.log_likelihood:.4f}")

# %% [markdown]
# A new patient is a row like any other: known findings are given, the rest is asked for. A smoker, short of breath, who
# has not been to Asia; then the X-ray comes back, good or bad.


# %%
def diagnose(fit, **known):
    row = {name: jnp.array([known.get(name, -1)]) for name in PUBLISHED}
    marginals = fit.posterior(row).marginals
    return {name: float(marginals[f"{name}_unobserved"][0, 1]) for name in ("tub", "lung", "bronc")}


patient = dict(asia=0, smoke=1, dysp=1)
visits = {"before the X-ray": patient, "X-ray clear": patient | {"xray": 0}, "X-ray abnormal": patient | {"xray": 1}}
answers = {visit: diagnose(result, **known) for visit, known in visits.items()}
figure, axes = plt.subplots(figsize=(7.2, 3.6))
for offset, (disease, label, colour) in enumerate(
    [("tub", "tuberculosis", GREEN), ("lung", "lung cancer", ORANGE), ("bronc", "bronchitis", BLUE)]
):
    heights = [answer[disease] for answer in answers.values()]
    bars = axes.bar(np.arange(3) + 0.27 * (offset - 1), heights, 0.25, color=colour, label=label)
    axes.bar_label(bars, [f"{h:.0%}" for h in heights], padding=2, fontsize=9)
axes.set(xticks=range(3), ylim=(0, 1.05), ylabel="probability", title="A smoker short of breath")
axes.set_xticklabels(answers)
axes.axhline(0, color=GREY, lw=0.8)
axes.legend(ncols=3, loc="upper left", bbox_to_anchor=(0, -0.1))
save(figure, "chest_clinic.png")
for visit, answer in answers.items():
    print(f"{visit:>17}: " + ", ".join(f"{name} {p:.3f}" for name, p in answer.items()))

# %%
np.testing.assert_allclose(result.log_likelihood, -1511.74041858, atol=1e-3)

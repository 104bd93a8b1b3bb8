"""Every registered E-step that can be offered, for one latent and for all of its kind: where it ends, beside the exact.

Two models have an exact E-step for each of their latents. What a strategy reports at the parameters that it found is
compared with the log-likelihood at these, by a formula: equal, or below it by what the strategy gives up, or within its
standard error. A strategy is tested by being registered.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem
from autoem.e_step.registry import CONTINUOUS, DISCRETE, STRATEGIES

RNG = np.random.default_rng(11)
GROUP = np.repeat(np.arange(12), 6)
LEFT = 1.0 + 0.9 * RNG.normal(size=12)[GROUP] + 0.5 * RNG.normal(size=72)
RIGHT = -1.0 + 0.7 * RNG.normal(size=12)[GROUP] + 0.6 * RNG.normal(size=72)
KIND = RNG.random(150) < 0.4
MARK = (RNG.random(150) < np.where(KIND, 0.9, 0.2)).astype(int)
CLASS = (RNG.random(150) < np.where(KIND, 0.8, 0.2)).astype(int)
SIZE = np.where(CLASS, 4.0, 0.0) + RNG.normal(size=150)

BIASED = {"Hard", "Sparse", "MeanField", "Variational"}  # what is maximised is a lower bound
RANDOM = {"Stochastic", "MonteCarlo", "SAEM"}  # the path is random: it has to stay near the maximum, where it begins


def classes(mark, size):
    """Two discrete latents a row, one given the other."""
    p = numpyro.param("p", 0.5, constraint=constraints.unit_interval)
    read = numpyro.param("read", jnp.array([0.3, 0.8]), constraint=constraints.unit_interval)
    table = numpyro.param("table", jnp.array([0.35, 0.65]), constraint=constraints.unit_interval)
    loc = numpyro.param("loc", jnp.array([-0.5, 2.0]))
    with numpyro.plate("rows", len(mark)):
        w = numpyro.sample("w", dist.Bernoulli(p))
        z = numpyro.sample("z", dist.Bernoulli(table[w]))
        numpyro.sample("mark", dist.Bernoulli(read[w]), obs=mark)
        numpyro.sample("size", dist.Normal(loc[z], 1.0), obs=size)


def effects(group, left, right):
    """Two continuous latents a group, each seen through observations of its own."""
    mean = numpyro.param("mean", jnp.zeros(2))
    between = numpyro.param("between", jnp.ones(2), constraint=constraints.positive)
    within = numpyro.param("within", jnp.ones(2), constraint=constraints.positive)
    with numpyro.plate("groups", 12):
        u = numpyro.sample("u", dist.Normal(0, between[0]))
        v = numpyro.sample("v", dist.Normal(0, between[1]))
    with numpyro.plate("rows", len(group)):
        numpyro.sample("left", dist.Normal(mean[0] + u[group], within[0]), obs=left)
        numpyro.sample("right", dist.Normal(mean[1] + v[group], within[1]), obs=right)


def of_classes(params):
    """The log-likelihood of `classes`, over the four completions of a row."""
    p, read, table, loc = (params[n] for n in ("p", "read", "table", "loc"))
    joint = [
        np.where(w, p, 1 - p) * np.where(z, table[w], 1 - table[w])
        * np.where(MARK, read[w], 1 - read[w]) * np.exp(-0.5 * (SIZE - loc[z]) ** 2) / np.sqrt(2 * np.pi)
        for w in (0, 1) for z in (0, 1)
    ]  # fmt: skip
    return float(np.log(sum(joint)).sum())


def of_effects(params):
    """The log-likelihood of `effects`, by the dense covariance of the rows."""
    same, total = GROUP[:, None] == GROUP, 0.0
    for i, y in enumerate((LEFT, RIGHT)):
        cov = params["between"][i] ** 2 * same + params["within"][i] ** 2 * np.eye(len(y))
        off = y - params["mean"][i]
        total -= 0.5 * (off @ np.linalg.solve(cov, off) + np.linalg.slogdet(2 * np.pi * cov)[1])
    return float(total)


MODELS = {
    DISCRETE: (classes, of_classes, (MARK, SIZE), ("w", "z")),
    CONTINUOUS: (effects, of_effects, (GROUP, LEFT, RIGHT), ("u", "v")),
}
WAYS = [
    pytest.param(row, kind, names, id=f"{row.name}-{'-'.join(names)}")
    for row in STRATEGIES
    if row.offered
    for kind in row.latents
    for names in ((MODELS[kind][3],) if row.together else (MODELS[kind][3][:1], MODELS[kind][3]))
]
BEST: dict[str, autoem.EMResult] = {}


def fit(kind, **options):
    model, _, data, _ = MODELS[kind]
    return autoem.EM(model, progress=False, **options).run(jax.random.key(0), *data)


def best(kind):
    """The fit by the exact E-step."""
    if kind not in BEST:
        BEST[kind] = fit(kind, tol=1e-10, max_steps=2000)
    return BEST[kind]


@pytest.mark.parametrize(("row", "kind", "names"), WAYS)
def test_ends_where_it_says(row, kind, names):
    random = {"init": dict(best(kind).params), "max_steps": 60} if row.name in RANDOM else {}
    result = fit(kind, e_step=dict.fromkeys(names, row.example), **random)
    true = MODELS[kind][1]({n: np.asarray(v) for n, v in result.params.items()})
    chance = 1e-6 * abs(true) + 4 * (result.standard_error or 0.0)
    if result.objective_name == "ELBO":
        assert result.log_likelihood <= true + chance
    else:
        assert abs(result.log_likelihood - true) <= chance
    if row.name in BIASED:
        assert result.objective <= true + chance
    top = best(kind).log_likelihood
    slack = 10.0 if row.name in BIASED else 0.5 if row.name in RANDOM or result.standard_error else 0.01
    assert true <= top + 1e-6 * abs(top)
    assert true >= top - slack or "merged" in result.status  # what has ended on another hill says so

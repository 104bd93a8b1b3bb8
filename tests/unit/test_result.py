"""What a fit says of its end: which parameter and component broke it, what lies on a boundary, and short tables."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import autoem

KEY = jax.random.key(0)
RNG = np.random.default_rng(5)
POINTS = RNG.normal(size=(30, 2))


def _weights(k):
    return numpyro.param("weights", jnp.ones(k) / k, constraint=constraints.simplex)


def full(x):
    n, d = x.shape
    loc = numpyro.param("loc", x[:3] + jnp.arange(3.0)[:, None])
    cov = numpyro.param("cov", jnp.tile(jnp.eye(d), (3, 1, 1)), constraint=constraints.positive_definite)
    with numpyro.plate("data", n):
        z = numpyro.sample("z", dist.Categorical(_weights(3)))
        numpyro.sample("x", dist.MultivariateNormal(loc[z], cov[z]), obs=x)


def factored(x):
    n, d = x.shape
    loc = numpyro.param("loc", x[:3] + jnp.arange(3.0)[:, None])
    tril = numpyro.param("tril", jnp.tile(jnp.eye(d), (3, 1, 1)), constraint=constraints.lower_cholesky)
    with numpyro.plate("data", n):
        z = numpyro.sample("z", dist.Categorical(_weights(3)))
        numpyro.sample("x", dist.MultivariateNormal(loc[z], scale_tril=tril[z]), obs=x)


def diagonal(x):
    n, d = x.shape
    loc = numpyro.param("loc", x[:3] + jnp.arange(3.0)[:, None])
    scale = numpyro.param("scale", jnp.ones((3, d)), constraint=constraints.positive)
    with numpyro.plate("data", n):
        z = numpyro.sample("z", dist.Categorical(_weights(3)))
        numpyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)


def single(x, k=2):
    loc = numpyro.param("loc", jnp.linspace(0.0, 10.0, k))
    scale = numpyro.param("scale", jnp.ones(k), constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(_weights(k)))
        numpyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def single_log(x):
    loc = numpyro.param("loc", jnp.array([0.0, 10.0]))
    log_scale = numpyro.param("log_scale", jnp.zeros(2))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(_weights(2)))
        numpyro.sample("x", dist.Normal(loc[z], jnp.exp(log_scale[z])), obs=x)


def counts(x):
    rate = numpyro.param("rate", jnp.array([0.1, 5.0]), constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(_weights(2)))
        numpyro.sample("x", dist.Poisson(rate[z]), obs=x)


def answers(x):
    p = numpyro.param("p", jnp.array([[0.3, 0.4], [0.6, 0.7]]), constraint=constraints.unit_interval)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(_weights(2)))
        numpyro.sample("x", dist.Bernoulli(p[z]).to_event(1), obs=x)


def _run(model, *args, **options) -> autoem.EMResult:
    return autoem.EM(model, progress=False, **options).run(KEY, *args)


LONE = np.append(RNG.normal(size=40), 10.0)
DOUBLES = np.where(np.arange(30)[:, None] < 12, POINTS[0] - 6.0, POINTS)
MIDDLE = {"loc": np.array([[0.0, 0.0], POINTS[0] - 6.0, [1.0, 1.0]])}


@pytest.mark.parametrize(
    ("model", "data", "init", "name"),
    [
        (full, DOUBLES, MIDDLE, "cov"),
        (factored, DOUBLES, MIDDLE, "tril"),
        (diagonal, DOUBLES, MIDDLE, "scale"),
        (single, LONE, {}, "scale"),
        (single_log, LONE, {}, "log_scale"),
    ],
)
def test_a_collapse_names_its_parameter_component_and_mend(model, data, init, name):
    result = _run(model, data, init=init)
    assert f"'{name}' collapsed" in result.status
    assert "in component 1" in result.status
    assert "give it a prior" in result.status
    assert any(f"'{name}'" in w for w in result.warnings)
    assert all(np.isfinite(v).all() for v in result.params.values())


def test_one_component_without_spread_is_not_told_to_use_fewer():
    def one(x):
        loc = numpyro.param("loc", 0.0)
        scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(loc, scale), obs=x)

    result = _run(one, np.ones(10))
    assert "'scale' collapsed" in result.status
    assert "fewer components" not in result.status


def test_an_empty_component_is_named():
    result = _run(single, LONE[:-1], 3, init={"loc": np.array([0.0, 0.5, 1e4])})
    assert "component 2 of 'weights' is empty" in result.status


def test_boundaries_are_warnings_and_no_part_of_the_status():
    zeros = np.concatenate([np.zeros(30), RNG.poisson(6, 30) + 1])
    result = _run(counts, zeros)
    assert result.converged
    assert result.status.startswith("converged")
    assert any("'rate' is on its boundary in component 0" in w for w in result.warnings)
    assert "boundary" not in result.status
    assert "boundary" in str(result)


def test_an_entry_of_a_table_on_the_boundary_is_named():
    x = (RNG.random((80, 2)) < np.where(RNG.random((80, 1)) < 0.5, 0.2, 0.8)).astype(float)
    x[:, 1] = 1.0
    result = _run(answers, x)
    assert any("'p' is on its boundary" in w and "[0, 1]" in w for w in result.warnings)


def test_a_sound_fit_has_nothing_to_say():
    result = _run(single, np.concatenate([RNG.normal(0, 1, 50), RNG.normal(9, 1, 50)]))
    assert result.warnings == ()
    assert "collapsed" not in result.status


def test_large_values_with_a_small_spread_are_no_collapse():
    x = 1e4 + np.concatenate([RNG.normal(0, 1, 50), RNG.normal(9, 1, 50)])
    result = _run(single, x, init={"loc": np.array([1e4, 1e4 + 9])})
    assert result.converged, result.status
    assert "collapsed" not in result.status


def test_wide_positive_data_are_no_collapse():
    def logarithmic(x):
        loc = numpyro.param("loc", 0.0)
        scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.LogNormal(loc, scale), obs=x)

    result = _run(logarithmic, np.exp(0.5 * RNG.normal(size=50) + 20.0))
    assert result.converged, result.status
    assert result.warnings == ()


def test_reprs_are_short_and_mark_the_best_start():
    result = _run(single, LONE[:-1], restarts=15, max_steps=30)
    table = repr(result.restarts).splitlines()
    assert len(table) == 2 + 12 + 1
    assert sum(line.startswith(" *") for line in table) == 1
    assert f"{result.restarts.best}" in next(line for line in table if line.startswith(" *"))
    assert len(repr(result)) < 400
    assert "loc [2]" in repr(result)


def many_items(x):
    p = [numpyro.sample(f"p_{j}", dist.Beta(2, 2).expand([2]).to_event(1)) for j in range(x.shape[1])]
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(_weights(2)))
        for j in range(x.shape[1]):
            numpyro.sample(f"item_{j}", dist.Bernoulli(p[j][z]), obs=x[:, j])


def test_the_plan_of_a_large_model_stays_short():
    plan = str(autoem.EM(many_items).plan(RNG.integers(0, 2, (20, 25))))
    assert len(plan.splitlines()) < 40
    assert plan.count("... 22 more alike") == 4
    assert all(name in plan for name in ("p_0 ", "p_1 ", "p_24 ", "item_24["))


def sampled_rows(x):
    with numpyro.plate("rows", len(x), subsample_size=10) as chosen:
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x[chosen])


def test_the_plan_says_each_note_once_and_that_nothing_is_maximised():
    plan = str(autoem.EM(sampled_rows).plan(LONE))
    assert plan.count("subsampled") == 1
    assert "no parameters: nothing to maximise" in plan


class Improper(dist.Poisson):
    """A Poisson law whose density is far too large."""

    def log_prob(self, value):
        return super().log_prob(value) + 10.0


def test_a_likelihood_of_counts_above_zero_is_named():
    def model(y, law):
        rate = numpyro.param("rate", jnp.array([1.0, 5.0]), constraint=constraints.positive)
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Categorical(jnp.array([0.4, 0.6])))
            numpyro.sample("y", law(rate[z]), obs=y)

    y = np.array([0, 1, 1, 4, 6, 7])
    good = autoem.EM(model, progress=False).run(jax.random.key(0), y, dist.Poisson)
    bad = autoem.EM(model, progress=False).run(jax.random.key(0), y, Improper)
    assert bad.log_likelihood > 0 > good.log_likelihood
    assert "above zero" in bad.status and "'y'" in bad.status
    assert "above zero" not in good.status

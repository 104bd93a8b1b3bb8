"""Hard, stochastic and annealed E-steps of every structure against all completions added up by brute force.

The objective is the maximum, or the tempered sum, over the completions; the statistics are right if the gradient of `Q`
is that of the log density under the same weights (Fisher's identity); a draw is exact if its law is the posterior.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem
from autoem.e_step import Annealed, Hard, Sparse, Stochastic
from autoem.e_step.elimination.along_time import in_pieces
from autoem.e_step.elimination.eliminate import Table, eliminate
from autoem.e_step.elimination.reductions import Drawn
from autoem.graph.named import Named
from autoem.m_step.problem import make_layout
from tests.brute_force import Oracle
from tests.chain_models import unrolled

Y = jnp.array([0.3, -1.2, 2.1, 1.4])
POSITIVE, SIMPLEX, UNIT = constraints.positive, constraints.simplex, constraints.unit_interval


def weights(name="weights", start=(0.35, 0.65)):
    return numpyro.param(name, jnp.array(start), constraint=SIMPLEX)


def mixture(y):
    loc = numpyro.param("loc", jnp.array([-0.5, 1.5]))
    scale = numpyro.param("scale", 0.8, constraint=POSITIVE)
    w = weights()
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Categorical(w))
        numpyro.sample("y", dist.Normal(loc[z], scale), obs=y)


def masked(y):
    w, loc = weights(start=(0.2, 0.3, 0.5)), numpyro.param("loc", jnp.array([-0.5, 1.5, 0.2]))
    with numpyro.plate("rows", len(y)), handlers.mask(mask=jnp.array([True, False, True, False])):
        z = numpyro.sample("z", dist.Categorical(w))
        numpyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def tree(y):
    w, table = weights(), numpyro.param("table", jnp.array([[0.7, 0.3], [0.2, 0.8]]), constraint=SIMPLEX)
    loc = numpyro.param("loc", jnp.array([-0.5, 1.5]))
    root = numpyro.sample("root", dist.Categorical(w))
    with numpyro.plate("groups", 2):
        g = numpyro.sample("g", dist.Categorical(table[root]))
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Categorical(table[g[jnp.array([0, 0, 1, 1])]]))
        numpyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def chain(y):
    table = numpyro.param("table", jnp.array([[0.7, 0.3], [0.2, 0.8]]), constraint=SIMPLEX)
    loc, p = numpyro.param("loc", jnp.array([-0.5, 1.5])), numpyro.param("p", jnp.array([0.3, 0.6]), constraint=UNIT)

    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(table[z]))
        outlier = numpyro.sample("outlier", dist.Bernoulli(p[z]))
        numpyro.sample("y", dist.Normal(loc[z], 1.0 + 2 * outlier), obs=y)
        return z, None

    scan(step, 0, y)


def sequences(y):
    table = numpyro.param("table", jnp.array([[0.7, 0.3], [0.2, 0.8]]), constraint=SIMPLEX)
    loc = numpyro.param("loc", jnp.array([-0.5, 1.5]))
    kind = numpyro.param("kind", jnp.array([0.4, 0.6]), constraint=SIMPLEX)
    with numpyro.plate("sequences", 2):
        c = numpyro.sample("c", dist.Categorical(kind))

    def step(z, y):
        with numpyro.plate("sequences", 2):
            z = numpyro.sample("z", dist.Categorical(table[z]))
            numpyro.sample("y", dist.Normal(loc[z] + c, 1.0), obs=y)
        return z, None

    scan(step, jnp.zeros(2, int), jnp.stack([y, y[::-1]], 1)[:3])


MODELS = {f.__name__: f for f in (mixture, masked, tree, chain, sequences)}
ORACLES: dict = {}


def oracle(name):
    """Every completion's log density, and how its sum over the parameters' weights changes."""
    if name not in ORACLES:
        model, y = MODELS[name], Y
        loop = unrolled(model) if name in ("chain", "sequences") else model
        params = dict(autoem.EM(model, progress=False).plan(y).program.params)
        with handlers.seed(rng_seed=0), handlers.trace() as trace:
            loop(y)
        params = {n: trace[n]["value"] for n in params}
        ORACLES[name] = Oracle(loop, params, y), params
    return ORACLES[name]


def kernel_of(name, e_step):
    em = autoem.EM(MODELS[name], e_step=e_step, progress=False)
    built, source = em._derive((Y,), {})
    return built, built.plain_bundle(source, jax.random.key(0))


@pytest.mark.parametrize("name", MODELS)
def test_statistics_and_objective_at_the_best_and_at_any_temperature(name):
    truth, params = oracle(name)
    every = jnp.asarray(truth._completions(params))
    numbers = jnp.arange(truth.completions)
    theirs = jax.jit(lambda weight: jax.grad(lambda p: jnp.sum(weight * truth._log_weights(p, numbers)))(params))
    best = jnp.asarray(numbers == every.argmax(), float)
    cases = [(Hard(), None, every.max(), best)]
    for beta, step in ((0.3, 0), (1.0, 10)):
        value = jax.nn.logsumexp(beta * every) / beta - truth._log_masked / beta
        cases += [(Annealed(start=0.3, steps=10), jnp.asarray(step), value, jax.nn.softmax(beta * every))]
    for strategy, state, objective, weight in cases:
        built, bundle = kernel_of(name, strategy)
        problem, names = built.kernel.problem, [f.name for f in built.kernel.likelihood_factors]

        def both(state, kernel=built.kernel, problem=problem, names=names, bundle=bundle):
            out = kernel.expect(params, bundle, state)
            return out.likelihood, jax.grad(lambda p: problem.q(p, out.statistics, bundle, names))(params)

        likelihood, ours = jax.jit(both)(state)
        np.testing.assert_allclose(likelihood, objective, rtol=1e-12)
        for n, expected in theirs(weight).items():
            np.testing.assert_allclose(ours[n], expected, rtol=1e-9, atol=1e-9, err_msg=f"{strategy}: {n}")


@pytest.mark.parametrize("name", MODELS)
def test_few_states_lie_between_the_best_and_all(name):
    """One state each is the maximum and all are the sum; statistics are the objective's own slope, by Fisher."""
    truth, params = oracle(name)
    every = jnp.asarray(truth._completions(params))
    ends = {1: every.max(), 2: None, 9: jax.nn.logsumexp(every) - truth._log_masked}
    for top, objective in ends.items():
        built, bundle = kernel_of(name, Sparse(top))
        problem, names = built.kernel.problem, [f.name for f in built.kernel.likelihood_factors]

        def climbed(p, kernel=built.kernel, bundle=bundle):
            return kernel.expect(p, bundle, None).likelihood

        def both(p, climbed=climbed, kernel=built.kernel, problem=problem, names=names, bundle=bundle):
            statistics = kernel.expect(p, bundle, None).statistics
            own = jax.grad(lambda q: problem.q(q, statistics, bundle, names))(p)
            return climbed(p), own, jax.grad(climbed)(p)

        likelihood, own, slope = jax.jit(both)(params)
        if objective is not None:
            np.testing.assert_allclose(likelihood, objective, rtol=1e-12)
        assert ends[1] - 1e-9 <= likelihood <= ends[9] + 1e-9
        for n, expected in slope.items():
            np.testing.assert_allclose(own[n], expected, rtol=1e-9, atol=1e-9, err_msg=f"{top}: {n}")


@pytest.mark.parametrize("name", MODELS)
def test_a_draw_is_exact(name):
    """10,000 joint draws of all latents: no completion's frequency is five standard errors from its probability.

    Of at most 500 completions, that happens by chance less than once in a thousand.
    """
    truth, params = oracle(name)
    built, bundle = kernel_of(name, Stochastic())
    kernel, latents, draws = built.kernel, built.program.latents, 10_000
    zero = {
        n: Named(jnp.zeros((*z.shape, z.num_states)), (*z.axes, n)) for n, z in latents.items()
    }  # fmt: skip

    def log_z(extra, key):
        tables = kernel.tables(kernel.problem.cells(params, bundle), bundle.rows, kernel.likelihood_factors)
        for n, value in extra.items():
            own = Table(value, frozenset((n,)), kernel.layout.plates_of[n])
            tables += in_pieces(own, built.program)
        return eliminate(tables, make_layout(kernel.layout, bundle), Drawn(key))

    value, drawn = jax.jit(jax.vmap(jax.value_and_grad(log_z), (None, 0)))(
        zero, jax.random.split(jax.random.key(7), draws)
    )
    likelihood = float(jnp.asarray(value[0] + bundle.constant))
    np.testing.assert_allclose(likelihood, truth.exact(params).log_likelihood, rtol=1e-12)
    number = np.zeros(draws, int)
    stride = 1
    for site in truth.latents:  # the completion's number, one digit a cell
        base, _, step = site.name.partition("_")
        hot = np.asarray(drawn[base].array)
        states = hot.argmax(-1)
        np.testing.assert_allclose(hot.max(-1), 1)
        states = states[:, int(step)] if step else states
        for cell in np.asarray(states).reshape(draws, -1).T:
            number += stride * cell
            stride *= len(site.support)
    every = truth._completions(params)
    probability = np.exp(every - np.logaddexp.reduce(every))
    frequency = np.bincount(number, minlength=len(every)) / draws
    error = np.sqrt(probability * (1 - probability) / draws) + 1 / draws
    assert np.max(np.abs(frequency - probability) / error) < 5


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("chain", Hard()), ("tree", Hard()), ("masked", Annealed(start=0.5, steps=5)), ("sequences", Stochastic())],
    ids=str,
)
def test_the_fit_rises_and_ends_at_the_exact_likelihood(name, strategy):
    model = MODELS[name]
    result = autoem.EM(model, e_step=strategy, init="model", max_steps=60, progress=False).run(jax.random.key(0), Y)
    history = result.history[5:] if isinstance(strategy, Annealed) else result.history
    if not isinstance(strategy, Stochastic):
        assert np.all(np.diff(history) >= -1e-9), history
    assert "fell" not in result.status and "finite" not in result.status
    exact = autoem.EM(model, init=result.params, max_steps=0, progress=False).run(jax.random.key(0), Y).log_likelihood
    np.testing.assert_allclose(result.log_likelihood, exact, rtol=1e-12)
    name = "classification log-likelihood" if isinstance(strategy, Hard) else "log-likelihood"
    assert result.objective_name == name and name in str(result.plan) and name in str(result)
    assert result.plan.e_step(next(iter(result.plan.program.latents))) == type(strategy).__name__.lower()

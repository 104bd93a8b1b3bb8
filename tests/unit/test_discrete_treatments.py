"""Hard, stochastic and annealed EM, truncated sums, and the list of alternatives, as a user meets them."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris

import autoem
from autoem import PlanError
from autoem.e_step import Annealed, Exact, Hard, Sparse, Stochastic, Truncated, strategies
from autoem.e_step.registry import STRATEGIES
from autoem.m_step import Fixed
from tests.laws.test_discrete_treatments import MODELS, Y, kernel_of, oracle

KEY = jax.random.key(3)
IRIS = load_iris().data


def spheres(x, k=3):
    centre = numpyro.param("centre", jnp.zeros((k, x.shape[1])))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(jnp.ones(k) / k))
        numpyro.sample("x", dist.Normal(centre[z], 1.0).to_event(1), obs=x)


def gauss(y, k=2):
    w = numpyro.param("w", jnp.ones(k) / k, constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.linspace(-1.0, 1.0, k))
    scale = numpyro.param("scale", jnp.ones(k), constraint=constraints.positive)
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Categorical(w))
        numpyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)


def repeated(y, e_scale=1.0):
    """A class for each row, and three measurements of a random effect about the class's mean."""
    w = numpyro.param("w", jnp.ones(2) / 2, constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.array([-1.0, 1.0]))
    with numpyro.plate("rows", y.shape[1]):
        z = numpyro.sample("z", dist.Categorical(w))
        u = numpyro.sample("u", dist.Normal(loc[z], 1.0))
        with numpyro.plate("times", len(y), dim=-2):
            numpyro.sample("y", dist.Normal(u, e_scale), obs=y)


def plain(y):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def test_hard_em_of_equal_spheres_is_k_means():
    """Against scikit-learn's Lloyd iterations from the same start: partition, inertia and number of steps."""
    em = {}
    for seed in range(3):
        start = IRIS[np.random.default_rng(seed).choice(len(IRIS), 3, replace=False)]
        em = autoem.EM(spheres, e_step=Hard(), init={"centre": start}, progress=False)
        result = em.run(KEY, IRIS)
        theirs = KMeans(3, init=start, n_init=1, tol=0, max_iter=500).fit(IRIS)
        labels = np.asarray(result.posterior().mode()["z"])
        np.testing.assert_array_equal(labels, theirs.labels_)
        inertia = -2 * (result.objective + len(IRIS) * (np.log(3) + 2 * np.log(2 * np.pi)))
        np.testing.assert_allclose(inertia, theirs.inertia_, rtol=1e-10)
        np.testing.assert_allclose(inertia, ((IRIS - np.asarray(result.params["centre"])[labels]) ** 2).sum())


def test_ties_are_not_split():
    """Of equal states the first takes all: counts stay whole."""
    built, bundle = kernel_of("mixture", Hard())
    params = {"loc": jnp.zeros(2), "scale": jnp.asarray(1.0), "weights": jnp.array([0.5, 0.5])}
    counts = jax.jit(built.kernel.expect)(params, bundle).statistics["z"][0]
    assert sorted(np.asarray(counts).ravel().tolist()) == [0.0, 4.0]


@pytest.mark.parametrize(("name", "hard"), [("chain", "z"), ("tree", "root"), ("sequences", "c")])
def test_some_latents_at_their_best_the_others_summed_out(name, hard):
    """The largest sum over the others, by brute force; and the fit rises."""
    truth, params = oracle(name)
    every = truth._completions(params)
    digits = [d for site, d in truth._digits(np.arange(len(every))) if site.name.partition("_")[0] == hard]
    groups = np.unique(np.concatenate(digits, 1), axis=0, return_inverse=True)[1].ravel()
    sums = [np.logaddexp.reduce(every[groups == g]) for g in range(groups.max() + 1)]
    built, bundle = kernel_of(name, {hard: Hard()})
    np.testing.assert_allclose(jax.jit(built.kernel.expect)(params, bundle).likelihood, max(sums), rtol=1e-12)
    assert built.plan.e_step(hard) == "hard"
    assert {r.strategy for r in built.plan.latents if r.name != hard} == {"exact"}


SQUAREM = autoem.accelerate.Squarem()
REFUSED = {
    "after a sum": ("tree", {"e_step": {"z": Hard()}}, r"'z': its maximum would .* before 'g' is summed"),
    "within a chain": ("chain", {"e_step": {"outlier": Hard()}}, r"'outlier': its maximum .* 'z' is summed"),
    "some drawn": ("tree", {"e_step": {"z": Stochastic()}}, r"'z': Stochastic\(\) is for all .*\n.*e_step=a"),
    "two kinds": ("tree", {"e_step": {"z": Stochastic(), "g": Hard()}}, r"'g': Hard\(\) does not go with"),
    "continuous": (repeated, {"e_step": {"u": Hard()}}, r"'u': Hard\(\) is for discrete latents"),
    "no latents": (plain, {"e_step": Annealed()}, r"Annealed\(.*\) is for discrete latents, and the model has none"),
    "accelerated": (gauss, {"e_step": Hard(), "accelerate": SQUAREM}, r"nothing to extrapolate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    model, options, message = REFUSED[case]
    data = np.ones((3, 4)) if model is repeated else Y
    with pytest.raises(PlanError, match=message):
        autoem.EM(MODELS.get(model, model), **options).plan(data)


@pytest.mark.parametrize("wrong", [{"start": 0.0}, {"start": 1.0}, {"steps": 0}, {"steps": 1.5}], ids=str)
def test_annealing_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"Annealed\("):
        Annealed(**wrong)


def test_annealing_leaves_poor_starts():
    """Nine classes of known spread, 50 random starts: most annealed fits reach the best hill, fewer plain ones do.

    Measured: 47 and 31. Were the rates equal, a gap that large would come by chance less than once in a hundred.
    """
    rng = np.random.default_rng(1)
    centres = 4.0 * np.array([[i, j] for i in range(3) for j in range(3)])
    x = centres[rng.integers(9, size=450)] + rng.normal(size=(450, 2))

    def nine(x):
        w = numpyro.param("w", jnp.ones(9) / 9, constraint=constraints.simplex)
        centre = numpyro.param("centre", jnp.zeros((9, 2)))
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Categorical(w))
            numpyro.sample("x", dist.Normal(centre[z], 1.0).to_event(1), obs=x)

    options = {"init": "random", "restarts": 50, "tol": 1e-7, "max_steps": 400, "progress": False}
    ends = [autoem.EM(nine, e_step=s, **options).run(KEY, x).restarts.objective for s in (None, Annealed())]
    best = max(e.max() for e in ends)
    good_plain, good_annealed = (int((e > best - 1).sum()) for e in ends)
    assert good_annealed >= 44
    assert good_plain <= 38


def test_two_states_of_five_by_sorting_and_adding():
    """Each row's two largest joint densities, in NumPy; the bound rises, and the status tells what is left out."""
    rng = np.random.default_rng(3)
    y = rng.normal(2.0 * rng.integers(5, size=200), 1.0)

    def five(y):
        w = numpyro.param("w", jnp.ones(5) / 5, constraint=constraints.simplex)
        loc = numpyro.param("loc", 2.0 * jnp.arange(5) - 0.5)
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Categorical(w))
            numpyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)

    options = {"init": "model", "tol": 1e-10, "max_steps": 2000, "progress": False}
    result = autoem.EM(five, e_step=Sparse(2), **options).run(KEY, y)
    w, loc = (np.asarray(result.params[n]) for n in ("w", "loc"))
    joint = w * np.exp(-0.5 * (y[:, None] - loc) ** 2) / np.sqrt(2 * np.pi)
    objective, whole = np.log(np.sort(joint)[:, 3:].sum(1)).sum(), np.log(joint.sum(1)).sum()
    np.testing.assert_allclose([result.objective, result.log_likelihood], [objective, whole], rtol=1e-10)
    assert result.converged and (np.diff(result.history) > -1e-9).all()
    share = 1 - np.exp((objective - whole) / 200)
    assert f"hold {whole - objective:.3g} nats" in result.status and f"{share:.2g} of the posterior" in result.status
    exact = autoem.EM(five, **options).run(KEY, y)
    assert result.log_likelihood < exact.log_likelihood
    named = autoem.EM(five, e_step={"z": Sparse(5)}, accelerate=SQUAREM, **options).run(KEY, y)
    np.testing.assert_allclose(named.log_likelihood, exact.log_likelihood, atol=1e-6)
    with pytest.raises(ValueError, match=r"Sparse\(top=0\)"):
        Sparse(0)


def test_states_that_annealing_has_merged_are_named():
    y = np.concatenate([np.random.default_rng(0).normal(m, 1.0, 60) for m in (-2, 3)])
    result = autoem.EM(gauss, e_step=Annealed(), progress=False).run(KEY, y)
    assert "states of 'z' have merged" in result.status
    near = autoem.EM(gauss, e_step=Annealed(start=0.8, steps=10), progress=False).run(KEY, y)
    exact = autoem.EM(gauss, progress=False).run(KEY, y)
    assert near.status.startswith("converged") and "merged" not in near.status
    np.testing.assert_allclose(near.log_likelihood, exact.log_likelihood, atol=1e-4)
    held = autoem.EM(gauss, e_step=Annealed(), m_step={"scale": Fixed()}, progress=False).run(KEY, y)
    assert "merged" not in held.status
    freed = autoem.EM(gauss, init=held.params, progress=False).run(KEY, y)
    np.testing.assert_allclose(freed.log_likelihood, exact.log_likelihood, atol=1e-4)
    short = autoem.EM(gauss, e_step=Annealed(), max_steps=20, progress=False).run(KEY, y)
    assert "sharpens until step 50" in short.status and not short.converged


def test_stochastic_em_ends_near_the_maximum_and_tells_its_exact_likelihood():
    """Of the best of many draws: no more than a chi-square's worth below the maximum, and the exact value there."""
    y = np.concatenate([np.random.default_rng(0).normal(m, 1.0, 60) for m in (-2, 3)])
    exact = autoem.EM(gauss, progress=False).run(KEY, y)
    result = autoem.EM(gauss, e_step=Stochastic(), progress=False).run(KEY, y)
    assert result.status.startswith("settled") and result.converged
    assert exact.log_likelihood - 2 < result.log_likelihood <= exact.log_likelihood + 1e-9
    np.testing.assert_allclose(result.log_likelihood, result.posterior().total, rtol=1e-12)
    assert result.log_likelihood >= result.history.max() - 1e-9
    with pytest.raises(PlanError, match=r"does not end at a maximum[^\n]*\n.*init=result\.params"):
        result.standard_errors()


@pytest.mark.parametrize("strategy", [Hard(), Sparse(1), Annealed(start=0.5, steps=5), Stochastic()], ids=str)
def test_continuous_latents_are_integrated_within(strategy):
    """The same objective where the random effect is integrated by hand: its measurements' joint Gaussian."""
    y = np.random.default_rng(5).normal(size=(3, 12)) + np.repeat([-1.0, 2.0], 6)

    def by_hand(y):
        w = numpyro.param("w", jnp.ones(2) / 2, constraint=constraints.simplex)
        loc = numpyro.param("loc", jnp.array([-1.0, 1.0]))
        with numpyro.plate("rows", y.shape[1]):
            z = numpyro.sample("z", dist.Categorical(w))
            numpyro.sample("y", dist.MultivariateNormal(loc[z][..., None] * jnp.ones(3), jnp.eye(3) + 1.0), obs=y.T)

    both = [autoem.EM(m, e_step=strategy, init="model", max_steps=0, progress=False).run(KEY, y)
            for m in (repeated, by_hand)]  # fmt: skip
    np.testing.assert_allclose(both[0].history, both[1].history, rtol=1e-10)
    np.testing.assert_allclose(both[0].log_likelihood, both[1].log_likelihood, rtol=1e-10)


@pytest.mark.parametrize("strategy", [Hard(), Sparse(1), Annealed(start=0.5, steps=5)], ids=str)
def test_a_weight_counts_as_often_as_a_repeated_row(strategy):
    weights = jnp.array([1.0, 3.0, 2.0, 1.0])

    def weighted(y):
        w = numpyro.param("w", jnp.array([0.4, 0.6]), constraint=constraints.simplex)
        loc = numpyro.param("loc", jnp.array([-1.0, 1.0]))
        with numpyro.plate("rows", len(y)), handlers.scale(scale=weights if len(y) == 4 else 1.0):
            z = numpyro.sample("z", dist.Categorical(w))
            numpyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)

    both = [autoem.EM(weighted, e_step=strategy, init="model", progress=False).run(KEY, y)
            for y in (Y, jnp.repeat(Y, weights.astype(int)))]  # fmt: skip
    np.testing.assert_allclose(both[0].history, both[1].history, rtol=1e-10)


@pytest.mark.parametrize("strategy", [Hard(), Sparse(1), Annealed(start=0.5, steps=5), Stochastic()], ids=str)
def test_rows_in_chunks_are_as_rows_at_once(strategy):
    """The objective is the same; draws are as far apart as two sets of draws: each chunk has its own."""
    y = np.random.default_rng(0).normal(size=5000)
    em = autoem.EM(gauss, e_step=strategy, progress=False)
    built, source = em._derive((y,), {})
    assert built.kernel.chunks is not None
    bundle = built.bundle(source, KEY)
    params = {"w": jnp.array([0.5, 0.5]), "loc": jnp.array([0.1, 0.2]), "scale": jnp.ones(2)}
    state = built.e_state(params, bundle, KEY, 0)
    pieces, whole = (
        jax.jit(dataclasses.replace(built.kernel, chunks=c).expect)(params, bundle, state)
        for c in (built.kernel.chunks, None)
    )
    np.testing.assert_allclose(pieces.likelihood, whole.likelihood, rtol=1e-10)
    error = 5 * np.sqrt(2 * 5000 / 4) if isinstance(strategy, Stochastic) else 1e-6
    counts = [np.asarray(e.statistics["z"][0]).ravel() for e in (pieces, whole)]
    np.testing.assert_allclose(counts[0], counts[1], rtol=0, atol=error)
    if isinstance(strategy, Stochastic):
        assert np.abs(counts[0] - counts[1]).max() > 0


def test_what_a_truncated_sum_leaves_out_is_told():
    """The Poisson's tail beyond the range, by SciPy."""
    from scipy.stats import poisson

    y = np.random.default_rng(0).poisson(4, 30)

    def caught(y):
        rate = numpyro.param("rate", 3.0, constraint=constraints.positive)
        with numpyro.plate("rows", len(y)):
            n = numpyro.sample("n", dist.Poisson(rate))
            numpyro.sample("y", dist.Binomial(n, 0.8), obs=y)

    short, wide = (
        autoem.EM(caught, e_step={"n": Truncated(0, high)}, max_steps=50, progress=False).run(KEY, y)
        for high in (12, 60)
    )
    tail = poisson.sf(12, float(short.params["rate"]))
    assert any(
        f"up to {tail:.1e} of the prior mass of a cell of 'n' lies outside 0 ... 12" in w for w in short.warnings
    )
    assert not any("prior mass" in w for w in wide.warnings)


def strategy_of(plan, name):
    return next(r.strategy for r in (*plan.latents, *plan.parameters) if r.name == name)


LONG = ("Variational", "MonteCarlo", "SAEM")  # thousands of draws or gradients before the first step


@pytest.mark.parametrize(
    ("model", "long"),
    [("gauss", False), *(pytest.param(m, m != "tree", marks=pytest.mark.slow) for m in ("tree", "repeated"))],
)
def test_every_alternative_listed_runs(model, long):
    """Each E-step is fitted for a step; nothing listed is refused, and the plan then says that it is done so."""
    y = np.random.default_rng(5).normal(size=(3, 8)) + np.repeat([-1.0, 2.0], 4)
    run, args = {"gauss": (gauss, (y[0],)), "repeated": (repeated, (y,)), "tree": (MODELS["tree"], (Y,))}[model]
    before = autoem.EM(run, progress=False).plan(*args)
    listed = before.alternatives()
    fitted: dict = {}
    for other in listed:
        options = repr(sorted(other.options.items()))
        if options not in fitted:
            em = autoem.EM(run, init="model", max_steps=1, progress=False, **other.options)
            runs = "e_step" in other.options and (long or not any(n in other.strategy for n in LONG))
            fitted[options] = em.run(KEY, *args).plan if runs else em.plan(*args)
        assert strategy_of(fitted[options], other.name) != strategy_of(before, other.name)
    names = {a.strategy.partition("(")[0].removeprefix("autoem.e_step.") for a in listed if a.name in ("z", "g")}
    assert {"Hard", "Stochastic", "Annealed"} <= names
    assert not {"Exact", "Quadrature", "Truncated"} & names
    only = before.alternatives("z")
    assert {a.name for a in only} == {"z"} and "price" in str(only) and "<table>" in only._repr_html_()
    with pytest.raises(KeyError, match="nobody"):
        before.alternatives("nobody")


def test_alternatives_of_a_hard_plan_lead_back_to_the_exact_one():
    listed = autoem.EM(gauss, e_step=Hard(), missing="marginalize").plan(Y).alternatives("z")
    back = next(a for a in listed if "Exact" in a.strategy)
    assert back.options == {"e_step": {"z": Exact()}, "missing": "marginalize"}


def test_the_table_in_the_docs_is_the_registry():
    """Every public strategy is a row of the registry, and every row stands in the decision table as it is."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "choose.md").read_text()
    for row in STRATEGIES:
        line = (
            f"| `autoem.e_step.{row.name}()` | {', '.join(row.latents)} | {row.changes} | {row.price} | {row.source} |"
        )
        assert line in text, line
    public = {n for n, c in vars(strategies).items() if isinstance(c, type) and issubclass(c, strategies.AbstractEStep)}
    assert public - {"AbstractEStep"} == {r.name for r in STRATEGIES}

"""Law: what is said of a chain written with `scan` is what adding up every completion of its Python loop gives.

The loop is NumPyro's own reading of the scan (checked first); the sums are those of `tests/brute_force.py`, which knows
nothing of chains. Numbers that no sum can reach, a hundred thousand steps, come from Baum-Welch in plain numpy.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import biject_to
from numpyro.infer.util import log_density

import autoem
from tests import chain_models, chain_step_models, odd_chain_models
from tests.brute_force import Exact, Latent, Oracle, constraints_of
from tests.chain_models import ROWS, SIMPLEX, Case, Y, normal, param, seen_until, state

CASES = chain_models.CASES | chain_step_models.CASES | odd_chain_models.CASES
SLOW = (  # what they hold stands in other cases, in the reference cases, or in the tests below as well
    "start outside",
    "extra row",
    "lag two",
    "sequences",
    "dimensions",
    "no order",
    "reads both states",
    "classes of emissions",
    "one class",
)
# a sum over what comes before a step says nothing of chains that run backwards, or of what stands after the scan
UNFILTERED = ("backwards", "after the scan", "latent after the scan")
# latents of the step alone: an answer, if any, is the right one
MAY_REFUSE = ("mixture emission", "zero inflated", "no order")
TOLERANCE = {"rtol": 1e-8, "atol": 1e-8}
KEY = jax.random.key(0)
DRAWS = 4000


@dataclasses.dataclass(frozen=True)
class Truth:
    """Brute force on the loop, with the sites of the steps put together as `scan` puts them."""

    case: Case
    oracle: Oracle
    params: dict[str, Any]

    @functools.cached_property
    def exact(self) -> Exact:
        return self.oracle.exact(self.params)

    def name_of(self, site: str) -> str:
        """The site of the model that a site of the loop belongs to."""
        whole, _, step = site.rpartition("_")
        return whole if step.isdigit() and whole in self.case.chain else site

    @functools.cached_property
    def steps(self) -> dict[str, list[Latent]]:
        """The loop's latents of each latent of the model, in the order of time."""
        out: dict[str, list[Latent]] = {}
        for site in self.oracle.latents:
            out.setdefault(self.name_of(site.name), []).append(site)
        for name in self.case.chain:
            out[name].sort(key=lambda site: int(site.name.rpartition("_")[2]))
        return out

    @property
    def marginals(self) -> dict[str, np.ndarray]:
        return {name: self.stacked(name, self.exact.marginals) for name in self.steps}

    def stacked(self, name: str, values: dict[str, np.ndarray]) -> np.ndarray:
        each = [values[site.name] for site in self.steps[name]]
        return np.stack(each) if name in self.case.chain else each[0]

    def pairs(self, name: str) -> np.ndarray:
        """Joint probabilities of neighbours, (steps - 1, plates, states, states)."""
        sites = self.steps[name]
        k = len(sites[0].support)
        tables = [self.neighbours(a, b).reshape(*a.shape, k, k) for a, b in itertools.pairwise(sites)]
        return np.stack(tables) if tables else np.zeros((0, *sites[0].shape, k, k))

    def neighbours(self, before: Latent, after: Latent) -> np.ndarray:
        table = self.oracle.pairwise(self.params, before.name, after.name)
        return table[np.arange(before.size), np.arange(before.size)]

    def split(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values of the model's latents as values of the loop's."""
        out = {}
        for name, sites in self.steps.items():
            rows = values[name] if name in self.case.chain else [values[name]]
            out |= {site.name: np.reshape(row, site.shape) for site, row in zip(sites, rows, strict=True)}
        return out


def truth_of(case: Case, **values: Any) -> Truth:
    params = case.params | {name: jnp.asarray(value) for name, value in values.items()}
    return Truth(case, Oracle(seen_until(case.truth or case.model), params, *case.args), params)


def fit(case: Case, params: dict[str, Any], max_steps: int) -> autoem.EMResult:
    em = autoem.EM(case.model, init=params, max_steps=max_steps, progress=False, **case.options)
    return em.run(KEY, *case.args)


@functools.lru_cache(maxsize=1)
def truth_by(name: str) -> Truth:
    """Kept for the tests of one case, which run one after another."""
    return truth_of(CASES[name])


@functools.lru_cache(maxsize=1)
def solved(name: str) -> tuple[Truth, autoem.EMResult]:
    """One step, and the truth where it leads."""
    truth = truth_by(name)
    result = fit(truth.case, truth.params, max_steps=1)
    return dataclasses.replace(truth, params=dict(result.params)), result


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.slow
def test_the_loop_is_the_scan(name: str) -> None:
    """Both have one joint density, so that the truth below is that of the model: it checks the tests themselves."""
    truth, case = truth_by(name), CASES[name]
    latents = {n: jnp.asarray(truth.stacked(n, truth.exact.mode)) for n in truth.steps}
    if (
        name == "backwards"
    ):  # NumPyro gives out a reversed scan's values in the order of the data, and takes them reversed
        latents = {n: z[::-1] for n, z in latents.items()}
    scanned, _ = log_density(handlers.seed(case.truth or case.model, KEY), case.args, {}, truth.params | latents)
    np.testing.assert_allclose(scanned, truth.exact.mode_log_density + truth.exact.log_prior, **TOLERANCE)


def test_sums(name: str) -> None:
    truth, result = solved(name)
    posterior = result.posterior(*truth.case.args)
    np.testing.assert_allclose(result.log_likelihood, truth.exact.log_likelihood, **TOLERANCE)
    np.testing.assert_allclose(result.objective, truth.exact.log_likelihood + truth.exact.log_prior, **TOLERANCE)
    np.testing.assert_allclose(posterior.total, truth.exact.log_likelihood, **TOLERANCE)
    np.testing.assert_allclose(np.sum(posterior.log_likelihood), truth.exact.log_likelihood, **TOLERANCE)
    assert set(posterior.marginals) == set(truth.steps)
    for latent, expected in truth.marginals.items():
        assert posterior.marginals[latent].shape == expected.shape
        np.testing.assert_allclose(posterior.marginals[latent], expected, **TOLERANCE, err_msg=latent)


def test_mode_and_samples(name: str) -> None:
    truth, result = solved(name)
    posterior = result.posterior(*truth.case.args)
    mode = posterior.mode()
    best = truth.oracle.log_joint(truth.params, truth.split(mode))
    np.testing.assert_allclose(best, truth.exact.mode_log_density, **TOLERANCE)
    if not truth.steps:
        return
    draws = posterior.sample(KEY, DRAWS)
    for latent, expected in truth.marginals.items():
        assert np.shape(mode[latent]) == expected.shape[:-1]
        assert np.shape(draws[latent]) == (DRAWS, *expected.shape[:-1])
        hot = np.asarray(draws[latent])[..., None] == truth.steps[latent][0].support
        check_frequencies(hot.mean(0), expected)
    for latent in truth.case.paired:
        hot = np.asarray(draws[latent])[..., None] == truth.steps[latent][0].support
        both = hot[:, :-1, ..., :, None] & hot[:, 1:, ..., None, :]
        check_frequencies(both.mean(0), truth.pairs(latent))


def check_frequencies(found: np.ndarray, expected: np.ndarray) -> None:
    """Five standard errors, and three draws for what is so rare that no error is normal."""
    error = np.sqrt(np.clip(expected * (1 - expected), 0, None) / DRAWS)
    np.testing.assert_array_less(np.abs(found - expected), 5 * error + 3 / DRAWS)


def test_pairs(name: str) -> None:
    truth, result = solved(name)
    posterior = result.posterior(*truth.case.args)
    for latent in truth.case.paired:
        expected = truth.pairs(latent)
        assert posterior.pairs(latent).shape == expected.shape
        np.testing.assert_allclose(posterior.pairs(latent), expected, **TOLERANCE)


def test_pairs_where_nothing_is_carried_are_refused() -> None:
    truth, result = solved("no order")
    with pytest.raises(autoem.PlanError, match=r"(?s)'z'.*no latent that a scan carries on.*posterior\.marginals"):
        result.posterior(*truth.case.args).pairs("z")


def test_filtered(name: str) -> None:
    truth, result = solved(name)
    posterior = result.posterior(*truth.case.args)
    for latent in () if name in UNFILTERED else truth.case.chain:
        sites = truth.steps[latent]
        until = [truth.oracle.exact(truth.params | {"last": t}).marginals[s.name] for t, s in enumerate(sites)]
        try:
            found = posterior.filtered(latent)
        except autoem.PlanError:
            if name not in MAY_REFUSE:
                raise
            continue
        assert found.shape == np.shape(until)
        np.testing.assert_allclose(found, until, **TOLERANCE)


def test_one_step(name: str) -> None:
    """It raises what it should, and where its forms are closed nothing is left to gain nearby."""
    before, (after, result) = truth_by(name), solved(name)
    here, there = before.exact, after.exact
    np.testing.assert_allclose(result.history[0], here.log_likelihood + here.log_prior, **TOLERANCE)
    assert result.history[1] >= result.history[0] - 1e-9
    start = before.oracle.expected_log_density(before.params, before.params) + here.log_prior
    end = before.oracle.expected_log_density(after.params, before.params) + there.log_prior
    assert end >= start - 1e-9
    if before.case.exact_step:
        np.testing.assert_allclose(slopes_of_q(before, after.params), 0, atol=1e-6)


def slopes_of_q(truth: Truth, params: dict[str, Any]) -> list[float]:
    """Slope of the expected log density at `params` in random directions, in coordinates without constraints."""
    domains = constraints_of(truth.case.loop, params, *truth.case.args)
    to = {name: biject_to(domains[name]) for name in params}
    free = {name: np.asarray(to[name].inv(value)) for name, value in params.items()}
    rng, step = np.random.default_rng(0), 1e-5

    def q(direction: dict[str, np.ndarray], step: float) -> float:
        moved = {name: to[name](value + step * direction[name]) for name, value in free.items()}
        return float(truth.oracle.expected_log_density(moved, truth.params))

    directions = [{name: rng.normal(size=value.shape) for name, value in free.items()} for _ in range(3)]
    return [(q(each, step) - q(each, -step)) / (2 * step) for each in directions]


@pytest.mark.parametrize("name", odd_chain_models.RIGHT_OR_REFUSED)
def test_right_or_refused(name: str) -> None:
    """Chains in unusual words: an answer, if any, is the right one, or a bound that is called so and holds."""
    truth = truth_of(odd_chain_models.RIGHT_OR_REFUSED[name])
    try:
        result = fit(truth.case, truth.params, max_steps=1)
    except (autoem.ModelError, autoem.PlanError) as refusal:
        print(refusal)
        return
    after = truth.oracle.exact(result.params)
    if result.objective_name == "ELBO":
        assert "mean field" in str(result.plan)
        assert result.log_likelihood <= after.log_likelihood + 1e-8
        return
    np.testing.assert_allclose(result.history[0], truth.exact.log_likelihood, **TOLERANCE)
    np.testing.assert_allclose(result.log_likelihood, after.log_likelihood, **TOLERANCE)
    assert result.history[1] >= result.history[0] - 1e-9


def test_filtered_below_a_class_over_a_thousand_steps() -> None:
    """No class's likelihood is a number that a float could hold; at the end all has been seen."""
    y = np.random.default_rng(0).normal(size=(1000, 2))
    posterior = fit(case := Case(odd_chain_models.mixture_of_chains, (y,)), case.params, max_steps=0).posterior(y)
    filtered = posterior.filtered("z")
    np.testing.assert_allclose(filtered.sum(-1), 1, **TOLERANCE)
    np.testing.assert_allclose(filtered[-1], posterior.marginals["z"][-1], **TOLERANCE)


def test_filtered_is_refused_where_a_site_of_the_step_tells_of_a_class_alone() -> None:
    def model(y):
        shares, trans, loc, effect = param("shares", SIMPLEX), param("trans", SIMPLEX), param("loc"), param("effect")
        kind = state(shares, "kind")

        def step(z, x):
            z = state(trans[z])
            normal(loc[z] + kind, x)
            normal(effect[kind], x, name="x")
            return z, None

        scan(step, 0, y)

    posterior = fit(case := Case(model, (Y,)), case.params, max_steps=0).posterior(Y)
    with pytest.raises(autoem.PlanError, match="site 'x': reads no latent of its own step"):
        posterior.filtered("z")


@pytest.mark.parametrize("reverse", [False, True])
def test_states_that_are_known_at_some_steps(reverse: bool) -> None:
    """A site that `obs_mask` splits is asked for by its own name: known states count as certain."""

    def model(labels, known, y, reverse=reverse):
        trans, loc = param("trans", SIMPLEX), param("loc")

        def step(z, lkx):
            label, known, x = lkx
            with numpyro.plate("sequences", y.shape[1]):
                z = numpyro.sample("z", dist.Categorical(trans[z]), obs=label, obs_mask=known)
                normal(loc[z], x)
            return z, None

        scan(step, jnp.zeros(y.shape[1], int), (labels, known, y), reverse=reverse)

    labels = np.array([[0, 1], [1, 1], [0, 0], [1, 0]])
    known = np.array([[True, False], [False, False], [True, True], [False, False]])
    case = Case(model, (labels, known, ROWS))
    posterior = fit(case, case.params, max_steps=0).posterior()
    trans, start, emit = path_tables(case.params, ROWS, labels, known)
    expected = [chain_sums(start, trans, e[::-1] if reverse else e) for e in emit]
    for i, (smoothed, filtered, pairs) in enumerate(expected):
        order = slice(None, None, -1 if reverse else 1)
        np.testing.assert_allclose(posterior.marginals["z"][:, i], smoothed[order], **TOLERANCE)
        np.testing.assert_allclose(posterior.filtered("z")[:, i], filtered[order], **TOLERANCE)
        found = posterior.pairs("z")[:, i]
        np.testing.assert_allclose(found, pairs[::-1].swapaxes(1, 2) if reverse else pairs, **TOLERANCE)
    assert (np.asarray(posterior.mode()["z"]) == labels)[known].all()
    assert (np.asarray(posterior.sample(KEY, 20)["z"]) == labels)[:, known].all()


def path_tables(params: dict[str, Any], y: np.ndarray, labels: np.ndarray, known: np.ndarray) -> tuple:
    """Transitions, start, and the probability of what each step shows, known states included."""
    trans, loc = np.asarray(params["trans"]), np.asarray(params["loc"])
    seen = np.exp(-0.5 * (y[..., None] - loc) ** 2) * np.where(known[..., None], labels[..., None] == np.arange(2), 1)
    return trans, trans[0], seen.swapaxes(0, 1)


def chain_sums(start: np.ndarray, trans: np.ndarray, emit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smoothed, filtered and pair probabilities of one sequence by adding up every path."""
    steps, k = emit.shape
    smoothed, filtered, pairs = np.zeros((steps, k)), np.zeros((steps, k)), np.zeros((steps - 1, k, k))
    for path in itertools.product(range(k), repeat=steps):
        weights = np.array([start[path[0]], *(trans[a, b] for a, b in itertools.pairwise(path))])
        so_far = weights.prod() * np.cumprod(emit[np.arange(steps), path])
        filtered[np.arange(steps), path] += so_far
        smoothed[np.arange(steps), path] += so_far[-1]
        pairs[np.arange(steps - 1), path[:-1], path[1:]] += so_far[-1]
    total = smoothed[0].sum()
    return smoothed / total, filtered / filtered.sum(1, keepdims=True), pairs / total


def test_each_sequence_has_its_own_likelihood() -> None:
    case = Case(odd_chain_models.weighted, (np.ones(2), ROWS))
    alone = [truth_of(Case(case.model, (np.ones(1), ROWS[:, [i]]))).exact.log_likelihood for i in range(2)]
    found = fit(case, case.params, max_steps=0).score(*case.args)
    np.testing.assert_allclose(found, alone, **TOLERANCE)


def test_a_weight_repeats_a_sequence() -> None:
    case = Case(odd_chain_models.weighted, (np.array([2.0, 1.0]), ROWS[:3]))
    repeated = Case(case.model, (np.ones(3), ROWS[:3, [0, 0, 1]]))
    truth, result = truth_of(repeated), fit(case, case.params, max_steps=1)
    np.testing.assert_allclose(result.history[0], truth.exact.log_likelihood, **TOLERANCE)
    np.testing.assert_allclose(slopes_of_q(truth, dict(result.params)), 0, atol=1e-6)
    marginals = result.posterior(*case.args).marginals["z"]
    there = dataclasses.replace(truth, params=dict(result.params))
    np.testing.assert_allclose(marginals, there.marginals["z"][:, [0, 2]], **TOLERANCE)


def test_new_data_through_the_same_object() -> None:
    """Data of the same shapes reuse what was compiled; other lengths are read anew."""
    case = CASES["lengths"]
    em = autoem.EM(case.model, init=case.params, max_steps=0, progress=False)
    for args in [case.args, (-ROWS, np.array([1, 3])), (ROWS[:2], np.array([2, 2]))]:
        expected = truth_of(Case(case.model, args)).exact.log_likelihood
        np.testing.assert_allclose(em.run(KEY, *args).log_likelihood, expected, **TOLERANCE)

"""Law: chains too long to add up, against Baum-Welch written out in numpy and against NumPyro's own elimination.

Float32 is asked to keep its digits over a hundred thousand steps, over emissions that differ by hundreds of nats, and
over zeros.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib import funsor
from numpyro.contrib.control_flow import scan

import autoem
from tests import chain_models as chains
from tests import chain_step_models as steps
from tests.chain_models import SIMPLEX, VALUES, Y, param, state

KEY = jax.random.key(0)
FIT = {"max_steps": 0, "progress": False}
START, TRANS = np.full(3, 1 / 3), np.asarray(VALUES["trans3"])


class Smoothed(NamedTuple):
    """Answers of the forward and backward passes: (T, k) marginals, and expected transitions summed over time."""

    log_likelihood: float
    filtered: np.ndarray
    marginals: np.ndarray
    counts: np.ndarray


def smooth(start: np.ndarray, trans: np.ndarray, log_emission: np.ndarray) -> Smoothed:
    """Rabiner 1989, section III, rescaled at every step."""
    top = log_emission.max(1)
    emission = np.exp(log_emission - top[:, None])
    filtered, scale = np.empty_like(emission), np.empty(len(emission))
    forward = start
    for t, likelihood in enumerate(emission):
        joint = forward * likelihood
        scale[t] = joint.sum()
        filtered[t] = joint / scale[t]
        forward = filtered[t] @ trans
    marginals, counts, backward = filtered.copy(), np.zeros_like(trans), np.ones(len(trans))
    for t in range(len(emission) - 1, 0, -1):
        future = emission[t] * backward / scale[t]
        counts += np.outer(filtered[t - 1], future)
        backward = trans @ future
        marginals[t - 1] = filtered[t - 1] * backward
    return Smoothed(float(np.log(scale).sum() + top.sum()), filtered, marginals, counts * trans)


def gaussian(y):
    trans, loc = param("trans3", SIMPLEX), param("loc3")

    def step(z, tx):
        t, x = tx
        z = state(jnp.where(t == 0, jnp.full(3, 1 / 3), trans[z]))
        numpyro.sample("y", dist.Normal(loc[z], 1.0), obs=x)
        return z, None

    scan(step, 0, (jnp.arange(len(y)), y))


def simulate(length: int, loc: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    z = np.zeros(length, int)
    for t, u in enumerate(rng.random(length)):
        z[t] = np.searchsorted(TRANS[z[t - 1]].cumsum()[:-1], u)
    return (loc[z] + rng.normal(size=length)).astype(np.float32)


def log_normal(y: np.ndarray, loc: np.ndarray) -> np.ndarray:
    return -0.5 * (y.astype(float)[:, None] - loc) ** 2 - 0.5 * np.log(2 * np.pi)


def in_float32(params: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value, np.float32) for name, value in params.items()}


@pytest.mark.parametrize("length", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_float32_keeps_its_digits(length: int, spread: float) -> None:
    """With `spread` 30 the emissions of a step differ by hundreds of nats."""
    loc = spread * np.asarray(VALUES["loc3"])
    y = simulate(length, loc)
    expected = smooth(START, TRANS, log_normal(y, loc))
    with jax.enable_x64(False):
        params = in_float32({"trans3": TRANS, "loc3": loc})
        em = autoem.EM(gaussian, init=params, max_steps=1, tol=0.0, progress=False)
        result = em.run(KEY, y)
        assert result.params["trans3"].dtype == jnp.float32
        marginals = np.asarray(autoem.EM(gaussian, init=params, **FIT).run(KEY, y).posterior(y).marginals["z"])
    np.testing.assert_allclose(result.history[0], expected.log_likelihood, rtol=1e-4)
    np.testing.assert_allclose(marginals, expected.marginals, atol=1e-3)
    trans = expected.counts / expected.counts.sum(1, keepdims=True)
    np.testing.assert_allclose(result.params["trans3"], trans, atol=1e-3)
    means = (expected.marginals * y[:, None]).sum(0) / expected.marginals.sum(0)
    np.testing.assert_allclose(result.params["loc3"], means, rtol=1e-3, atol=1e-3)


def test_answers_along_a_long_chain() -> None:
    y = simulate(2000, np.asarray(VALUES["loc3"])).astype(float)
    params = {"trans3": VALUES["trans3"], "loc3": VALUES["loc3"]}
    expected = smooth(START, TRANS, log_normal(y, np.asarray(VALUES["loc3"])))
    posterior = autoem.EM(gaussian, init=params, **FIT).run(KEY, y).posterior(y)
    np.testing.assert_allclose(posterior.total, expected.log_likelihood, rtol=1e-10)
    np.testing.assert_allclose(posterior.marginals["z"], expected.marginals, atol=1e-9)
    np.testing.assert_allclose(posterior.filtered("z"), expected.filtered, atol=1e-9)
    np.testing.assert_allclose(posterior.pairs("z").sum(0), expected.counts, rtol=1e-9)
    trans = expected.counts / expected.counts.sum(1, keepdims=True)
    means = (expected.marginals * y[:, None]).sum(0) / expected.marginals.sum(0)
    stepped = autoem.EM(gaussian, init=params, max_steps=1, progress=False).run(KEY, y)
    np.testing.assert_allclose(stepped.params["trans3"], trans, rtol=1e-9)
    np.testing.assert_allclose(stepped.params["loc3"], means, rtol=1e-9)
    np.testing.assert_array_equal(posterior.mode()["z"], viterbi(START, TRANS, log_normal(y, params["loc3"])))


def viterbi(start: np.ndarray, trans: np.ndarray, log_emission: np.ndarray) -> np.ndarray:
    score, back = np.log(start) + log_emission[0], []
    for emission in log_emission[1:]:
        through = score[:, None] + np.log(trans)
        back.append(through.argmax(0))
        score = through.max(0) + emission
    path = [int(score.argmax())]
    for pointer in reversed(back):
        path.append(int(pointer[path[-1]]))
    return np.array(path[::-1])


@pytest.mark.parametrize("wide", [True, False])
def test_emissions_far_from_every_state(wide: bool) -> None:
    """Each step has almost no density under any state, and the best is hundreds of nats ahead."""
    y, loc = 1e3 * Y, np.array([-30.0, 0.0, 40.0])
    expected = smooth(START, TRANS, log_normal(y, loc))
    with jax.enable_x64(wide):
        params = {"trans3": TRANS, "loc3": loc} if wide else in_float32({"trans3": TRANS, "loc3": loc})
        result = autoem.EM(gaussian, init=params, **FIT).run(KEY, y if wide else y.astype(np.float32))
        marginals = np.asarray(result.posterior().marginals["z"])
    np.testing.assert_allclose(result.log_likelihood, expected.log_likelihood, rtol=1e-12 if wide else 1e-5)
    np.testing.assert_allclose(marginals, expected.marginals, atol=1e-9 if wide else 1e-5)


@pytest.mark.parametrize("wide", [True, False])
def test_zeros_stay_zero(wide: bool) -> None:
    """Left to right through a chain whose last state comes late, as one symbol shows; steps at zero stay there."""
    y = np.repeat([0, 1, 2], [150, 100, 50])
    emit = np.array([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.1, 0.1, 0.8]])
    forward = np.asarray(VALUES["forward"])
    with np.errstate(divide="ignore"):
        expected = smooth(forward[0], forward, np.log(emit)[:, y].T)
    with jax.enable_x64(wide):
        values = {"forward": forward, "emit3": emit}
        em = autoem.EM(steps.left_to_right, init=values if wide else in_float32(values), max_steps=3, progress=False)
        result = em.run(KEY, y)
    np.testing.assert_allclose(result.history[0], expected.log_likelihood, rtol=1e-12 if wide else 1e-5)
    np.testing.assert_array_equal(np.asarray(result.params["forward"])[forward == 0], 0)
    np.testing.assert_array_equal(np.asarray(result.params["emit3"])[emit == 0], 0)
    assert (np.diff(result.history) >= -(1e-9 if wide else 1e-3)).all()


def test_impossible_data() -> None:
    """A chain that cannot go back, and data that do: the density is zero, and the status says so."""
    params = {"forward": VALUES["forward"], "emit3": jnp.eye(3)}
    result = autoem.EM(steps.left_to_right, init=params, progress=False).run(KEY, np.array([0, 1, 0, 2]))
    assert result.log_likelihood == -np.inf
    assert not result.converged
    assert "probability zero" in result.status


@pytest.mark.parametrize("name", ["constant start", "second order", "lengths"])
def test_a_fit_never_falls(name: str) -> None:
    case, rng = (chains.CASES | steps.CASES)[name], np.random.default_rng(0)
    args = {
        "constant start": (rng.normal(size=200) + 3 * (np.arange(200) // 20 % 2),),
        "second order": (rng.integers(3, size=200),),
        "lengths": (rng.normal(size=(40, 6)), np.array([40, 30, 1, 17, 0, 5])),
    }[name]
    result = autoem.EM(case.model, init=case.params, max_steps=30, tol=0.0, progress=False).run(KEY, *args)
    history = np.asarray(result.history)
    assert np.isfinite(history).all()
    assert (np.diff(history) >= -1e-11 * np.abs(history[:-1])).all()


def _tones() -> tuple:
    """Sequences of one length: NumPyro counts a step that a mask takes out once for each state, this library once."""
    rng = np.random.default_rng(0)
    return (rng.random((12, 3, 2)) < 0.4).astype(int), np.full(3, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "args"),
    [
        (chains.CASES["dynamic network"], (np.arange(15) * 7 % 5 % 2,)),
        (chains.CASES["second order"], (np.arange(15) * 7 % 5 % 3,)),
        (steps.CASES["tones"], _tones()),
    ],
)
def test_agrees_with_the_elimination_of_numpyro(case: chains.Case, args: tuple) -> None:
    params = case.params
    model = funsor.enum(funsor.config_enumerate(handlers.seed(case.model, KEY)), -3)
    expected, _ = funsor.log_density(model, args, {}, params)
    result = autoem.EM(case.model, init=params, **FIT).run(KEY, *args)
    np.testing.assert_allclose(result.objective, expected, rtol=1e-9)


def two_blocks(y):
    """States that never mix, so that what scaled messages lose no transition restores."""
    loc = numpyro.param("loc", jnp.array([0.0, 1.0]))
    z = numpyro.sample("z0", dist.Categorical(jnp.ones(2) / 2))

    def step(z_prev, value):
        z = numpyro.sample("z", dist.Categorical(jnp.eye(2)[z_prev]))
        numpyro.sample("y", dist.Normal(loc[z], 0.35), obs=value)
        return z, None

    scan(step, z, y)


def test_a_state_that_is_needed_again_after_it_has_vanished() -> None:
    """Half-way the first state is 1,600 nats ahead, and at the end it is behind: no scaled probability holds that."""
    y = np.concatenate([np.zeros(400), 2 * np.ones(400)])

    def alone(loc: float) -> float:
        return float((-0.5 * ((y - loc) / 0.35) ** 2 - np.log(0.35 * np.sqrt(2 * np.pi))).sum())

    result = autoem.EM(two_blocks, init="model", progress=False).run(jax.random.key(0), y)
    np.testing.assert_allclose(result.history[0], np.logaddexp(alone(0.0), alone(1.0)) + np.log(0.5), rtol=1e-10)
    np.testing.assert_allclose(result.posterior(y).marginals["z"][:, 1], 1.0)


def test_sequences_of_different_lengths() -> None:
    """Padded and masked they count what they count one by one."""

    def model(values, present):
        trans = numpyro.param("trans", jnp.array([[0.8, 0.2], [0.3, 0.7]]), constraint=dist.constraints.simplex)
        loc = numpyro.param("loc", jnp.array([0.0, 2.0]))

        def step(z_prev, at):
            y, there = at
            with numpyro.plate("sequences", y.shape[0]), numpyro.handlers.mask(mask=there):
                z = numpyro.sample("z", dist.Categorical(trans[z_prev]))
                numpyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)
            return z, None

        scan(step, jnp.zeros(values.shape[1], int), (values, present))

    rng = np.random.default_rng(4)
    sequences = [rng.normal(size=n) for n in (5, 1, 3)]
    em = autoem.EM(model, init="model", max_steps=0, progress=False)
    together = em.run(jax.random.key(0), *autoem.padded(sequences))
    alone = [em.run(jax.random.key(0), *autoem.padded([s])).log_likelihood for s in sequences]
    np.testing.assert_allclose(together.log_likelihood, sum(alone), rtol=1e-12)
    np.testing.assert_allclose(together.posterior().log_likelihood, alone, rtol=1e-12)
    with pytest.raises(autoem.DataError, match="number 1"):
        autoem.padded([[1.0], []])


def test_conditioned_from_outside() -> None:
    """`handlers.condition` around a model that only draws gives what observing in the step gives."""

    def drawn(y):
        loc = numpyro.param("loc", 0.5)

        def draw(carry, _):
            z, t = carry
            z = numpyro.sample("z", dist.Categorical(jnp.array([[0.6, 0.4], [0.3, 0.7]])[z]))
            numpyro.sample("y", dist.Normal(loc + z, 1.0))
            return (z, t + 1), None

        with handlers.condition(data={"y": y}):
            scan(draw, (0, 0), None, length=len(y))

    def seen(y):
        loc = numpyro.param("loc", 0.5)

        def see(carry, y):
            z, t = carry
            z = numpyro.sample("z", dist.Categorical(jnp.array([[0.6, 0.4], [0.3, 0.7]])[z]))
            numpyro.sample("y", dist.Normal(loc + z, 1.0), obs=y)
            return (z, t + 1), None

        scan(see, (0, 0), y)

    y = np.random.default_rng(3).normal(size=7)
    a, b = (autoem.EM(m, init="model", max_steps=2, progress=False).run(jax.random.key(0), y) for m in (drawn, seen))
    np.testing.assert_allclose(a.history, b.history, rtol=1e-12)

"""Law: plates, indices, scales and masks in any arrangement give the sums that adding up every completion gives.

Each model is small and fixed, and holds one arrangement that a general rule could get wrong.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import autoem
from tests.brute_force import Oracle

TOLERANCE = {"rtol": 1e-8, "atol": 1e-8}
Y = np.array([0.3, -1.2, 2.1, 0.4, 1.7, -0.5])
PARAMS = {"loc": np.array([0.0, 2.0])}
FIT = {"max_steps": 0, "progress": False}


def _loc() -> Any:
    return numpyro.param("loc", jnp.array([0.0, 2.0]))


def _flips(name: str, p: Any) -> Any:
    return numpyro.sample(name, dist.Bernoulli(p))


def _normal(name: str, mean: Any, y: Any) -> None:
    numpyro.sample(name, dist.Normal(mean, 1.0), obs=y)


def groups(index, y):
    with numpyro.plate("groups", 3):
        a = _flips("a", 0.4)
    with numpyro.plate("rows", len(y)):
        _normal("y", _loc()[a[index]], y)


def categorical_given_group(index, y):
    table = jnp.array([[0.2, 0.8], [0.6, 0.4]])
    with numpyro.plate("groups", 3):
        a = _flips("a", 0.4)
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Categorical(table[a[index]]))
        _normal("y", _loc()[z], y)


def chain_of_plates(top_of, group_of, y):
    """Rows find their group and groups their top by index; the plates' names sort against their order."""
    with numpyro.plate("tops", 2):
        a = _flips("a", 0.4)
    with numpyro.plate("groups", 3):
        b = _flips("b", 0.2 + 0.4 * a[top_of])
        c = _flips("c", 0.1 + 0.4 * a[top_of] + 0.3 * b)
    with numpyro.plate("rows", len(y)):
        z = _flips("z", 0.2 + 0.5 * b[group_of])
        _normal("y", _loc()[z] + c[group_of], y)
    with numpyro.plate("again", 2):
        _normal("x", _loc()[a], y[:2])


def two_plates_of_rows(index, y):
    with numpyro.plate("groups", 3):
        a = _flips("a", 0.3)
        b = _flips("b", 0.2 + 0.6 * a)
        numpyro.sample("count", dist.Poisson(1.0 + b), obs=np.array([0, 2, 1]))
    with numpyro.plate("rows", len(y)):
        _normal("y", _loc()[a[index]] + b[index], y)
    with numpyro.plate("more", 2):
        _normal("x", _loc()[b[index[:2]]], y[:2])


def index_into_a_nest(index, y):
    with numpyro.plate("outer", 2, dim=-2):
        a = _flips("a", 0.3)
        with numpyro.plate("inner", 2, dim=-1):
            b = _flips("b", 0.2 + 0.6 * a)
    with numpyro.plate("rows", len(y)):
        _normal("y", _loc()[b.reshape(-1)[index]], y)


def three_nested(y):
    with numpyro.plate("one", 2, dim=-3):
        a = _flips("a", 0.4)
        with numpyro.plate("two", 1, dim=-2):
            b = _flips("b", 0.2 + 0.4 * a)
            with numpyro.plate("three", 3, dim=-1):
                c = _flips("c", 0.3)
                _normal("y", _loc()[b] + c + a, y)


def one_for_all_and_groups(index, y):
    q = _flips("q", 0.4)
    with numpyro.plate("groups", 3):
        a = _flips("a", 0.2 + 0.5 * q)
    with numpyro.plate("rows", len(y)):
        z = _flips("z", 0.2 + 0.3 * a[index] + 0.3 * q)
        _normal("y", _loc()[z] + q, y)


def never_read(y):
    """A latent with a flat density that nothing reads."""
    with numpyro.plate("rows", len(y)):
        numpyro.sample("z", dist.DiscreteUniform(0, 2))
        _normal("y", _loc()[0], y)


def certain_and_impossible(y):
    table = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    with numpyro.plate("rows", len(y)):
        a = numpyro.sample("a", dist.Categorical(jnp.array([0.5, 0.5, 0.0])))
        b = numpyro.sample("b", dist.Categorical(table[a]))
        _normal("y", _loc()[0] + b, y)


def observed_beside(label, y):
    """A site without latents beside one with them: each row's own density, not the plate's, belongs to the row."""
    with numpyro.plate("rows", len(y)):
        numpyro.sample("label", dist.Categorical(jnp.array([0.3, 0.7])), obs=label)
        _normal("y", _loc()[label] + _flips("w", 0.3), y)


def masked_partly_seen(kept, seen, label, index, y):
    with numpyro.plate("groups", 3):
        a = _flips("a", 0.4)
    with numpyro.plate("rows", len(y)), handlers.mask(mask=kept):
        z = numpyro.sample("z", dist.Bernoulli(0.2 + 0.5 * a[index]), obs=label, obs_mask=seen)
        _normal("y", _loc()[z], y)


def support_from_data(most, y):
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.DiscreteUniform(0, most))
        _normal("y", _loc()[0] + z, y)


INDEX = np.array([0, 1, 2, 1])
TOPS = np.array([0, 1, 1])
KEPT = np.array([True, False, True, True])
SEEN = np.array([True, True, False, False])
CASES: dict[str, tuple[Callable, tuple]] = {
    "categorical given group": (categorical_given_group, (INDEX, Y[:4])),
    "chain of plates": (chain_of_plates, (TOPS, INDEX, Y[:4])),
    "two plates of rows": (two_plates_of_rows, (INDEX, Y[:4])),
    "index into a nest": (index_into_a_nest, (np.array([0, 3, 2, 1]), Y[:4])),
    "three nested": (three_nested, (Y.reshape(2, 1, 3),)),
    "one for all": (one_for_all_and_groups, (INDEX, Y[:4])),
    "never read": (never_read, (Y[:4],)),
    "certain and impossible": (certain_and_impossible, (Y[:4],)),
    "far away": (groups, (INDEX, 1e3 * Y[:4])),
    "observed beside": (observed_beside, (np.array([0, 1, 1, 0]), Y[:4])),
    "masked, partly seen": (masked_partly_seen, (KEPT, SEEN, INDEX % 2, INDEX, Y[:4])),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_adding_up_every_completion(name: str) -> None:
    model, args = CASES[name]
    _check(autoem.EM(model, init=PARAMS, **FIT), model, args)


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        (groups, [(np.zeros(4, int), Y[:4]), (INDEX, Y[:4]), (np.ones(4, int), -Y[:4]), (INDEX[:3], Y[:3])]),
        (support_from_data, [(np.array([1, 2, 3]), Y[:3]), (np.array([3, 1, 1]), Y[:3]), (np.array([4, 1, 1]), Y[:3])]),
    ],
)
def test_new_data_through_the_same_object(model: Callable, calls: list[tuple]) -> None:
    """Data of the same shapes reuse what was compiled, and nothing of the old data's values."""
    em = autoem.EM(model, init=PARAMS, **FIT)
    for args in calls:
        _check(em, model, args)


def _check(em: autoem.EM, model: Callable, args: tuple, bound: bool = False) -> None:
    oracle = Oracle(model, PARAMS, *args)
    exact = oracle.exact(PARAMS)
    result = em.run(jax.random.key(0), *args)
    if bound and result.objective_name == "ELBO":
        assert "mean field" in str(result.plan)
        assert result.log_likelihood <= exact.log_likelihood + 1e-8
        return
    posterior = result.posterior(*args)
    np.testing.assert_allclose(posterior.total, exact.log_likelihood, **TOLERANCE)
    np.testing.assert_allclose(np.sum(posterior.log_likelihood), exact.log_likelihood, **TOLERANCE)
    for site in oracle.latents:
        name = site.name.removesuffix("_unobserved")
        found = np.asarray(posterior.marginals[name])
        np.testing.assert_allclose(found, exact.marginals[name].reshape(found.shape), **TOLERANCE, err_msg=name)
    mode = posterior.mode()
    values = {s.name: np.reshape(mode[s.name.removesuffix("_unobserved")], s.shape) for s in oracle.latents}
    np.testing.assert_allclose(oracle.log_joint(PARAMS, values), exact.mode_log_density, **TOLERANCE)


def two_scales(first, second, y):
    """Two mixtures in one plate, each with weights of its own."""
    with numpyro.plate("rows", len(y)):
        with handlers.scale(scale=first):
            _normal("y", _loc()[_flips("z", 0.3)], y)
        with handlers.scale(scale=second):
            _normal("x", _loc()[_flips("v", 0.3)], -y)


def test_scales_of_one_plate_do_not_mix() -> None:
    y, first, second = Y[:3], np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 0.5])

    def rows(x: np.ndarray) -> np.ndarray:
        return np.logaddexp(np.log(0.7) - x**2 / 2, np.log(0.3) - (x - 2) ** 2 / 2) - np.log(2 * np.pi) / 2

    result = autoem.EM(two_scales, init=PARAMS, **FIT).run(jax.random.key(0), first, second, y)
    expected = (first * rows(y) + second * rows(-y)).sum()
    np.testing.assert_allclose(result.log_likelihood, expected, **TOLERANCE)
    np.testing.assert_allclose(np.sum(result.posterior().log_likelihood), expected, **TOLERANCE)


def scaled_groups(weight, index, y):
    with numpyro.plate("groups", 2), handlers.scale(scale=weight):
        a = _flips("a", 0.4)
    with numpyro.plate("rows", len(y)), handlers.scale(scale=weight[index]):
        _normal("y", _loc()[_flips("z", 0.2 + 0.5 * a[index])], y)


def test_a_group_with_its_rows_repeated() -> None:
    index, y, weight = np.array([0, 0, 1, 1]), Y[:4], np.array([2.0, 3.0])
    each = [
        Oracle(scaled_groups, PARAMS, np.ones(2), np.zeros(2, int), part).exact(PARAMS).log_likelihood
        for part in (y[:2], y[2:])
    ]
    result = autoem.EM(scaled_groups, init=PARAMS, **FIT).run(jax.random.key(0), weight, index, y)
    np.testing.assert_allclose(result.log_likelihood, weight @ each, **TOLERANCE)


def two_indices(first, second, y):
    with numpyro.plate("groups", 2):
        a = _flips("a", 0.4)
    with numpyro.plate("rows", len(y)):
        z = _flips("z", 0.2 + 0.6 * a[first])
        w = _flips("w", 0.2 + 0.6 * a[second])
        _normal("y", _loc()[z] + w, y)


def both_sides(y):
    with numpyro.plate("left", y.shape[0], dim=-2):
        a = _flips("a", 0.4)
    with numpyro.plate("right", y.shape[1], dim=-1):
        b = _flips("b", 0.4)
    with numpyro.plate("left", y.shape[0], dim=-2), numpyro.plate("right", y.shape[1], dim=-1):
        _normal("y", _loc()[a] + b, y)


def running_sum(y):
    with numpyro.plate("rows", len(y)):
        _normal("y", jnp.cumsum(_flips("z", 0.4)), y)


def mask_by_a_latent(y):
    with numpyro.plate("rows", len(y)):
        z = _flips("z", 0.4)
        with handlers.mask(mask=z == 0):
            _normal("y", _loc()[0], y)


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (two_indices, (np.array([0, 1, 1, 0]), np.array([1, 1, 0, 0]), Y[:4])),
        (both_sides, (Y.reshape(2, 3),)),
        (running_sum, (Y[:4],)),
        (mask_by_a_latent, (Y[:4],)),
    ],
)
def test_right_or_refused(model: Callable, args: tuple) -> None:
    """Latents that are coupled along a plate, or that decide a mask: an answer, if any, is the right one."""
    em = autoem.EM(model, init=PARAMS, **FIT)
    try:
        em.plan(*args)
    except (autoem.ModelError, autoem.PlanError):
        return
    _check(em, model, args, bound=True)


def test_a_rate_of_which_nothing_was_seen() -> None:
    """The maximum is at the boundary: staying at the start would be called converged, and wrong."""

    def zeros(y):
        rate = numpyro.param("rate", jnp.full(2, 0.5), constraint=dist.constraints.positive)
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)

    result = autoem.EM(zeros, init="model", progress=False).run(jax.random.key(0), np.array([[0, 3], [0, 1]]))
    np.testing.assert_allclose(result.params["rate"], [0.0, 2.0], atol=1e-12)

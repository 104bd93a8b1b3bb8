"""What every reference case must show: a case and its fit in, an assertion out."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import autoem

from .cases import Case

KEY = jax.random.key(0)


def fit(case: Case, **options: Any) -> tuple[autoem.EMResult, Any]:
    """The case fitted from its start, and its data."""
    data = case.data()
    settings = {"init": case.init(data), "tol": 1e-13, "progress": False} | dict(case.options) | options
    return autoem.EM(case.model, **settings).run(KEY, data), data


def relabelled(params: dict[str, Any], axes_of: Mapping[str, int | Sequence[int]]) -> Iterator[dict[str, Any]]:
    """Every naming of the labels: parameters with their label axes permuted alike; a table of transitions has two."""
    axes = {name: [of] if isinstance(of, int) else of for name, of in axes_of.items()}
    size = max((params[name].shape[of[0]] for name, of in axes.items()), default=1)
    for order in itertools.permutations(range(size)):
        out = dict(params)
        for name, axis in ((name, axis) for name, of in axes.items() for axis in of):
            out[name] = jnp.take(out[name], jnp.array(order), axis=axis)
        yield out


def excess(params: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest distance from the reference in units of its tolerance: at most one when all agree."""
    tolerance = reference["tolerance"]

    def of(name: str) -> float:
        expected = np.asarray(reference["params"][name])
        allowed = np.maximum(tolerance["param_abs"], tolerance["param_rel"] * np.abs(expected))
        return float(np.max(np.abs(np.asarray(params[name]) - expected) / allowed))

    return max(of(name) for name in reference["params"])


def reaches_the_reference(case: Case, result: autoem.EMResult) -> None:
    reference = case.reference
    np.testing.assert_allclose(
        result.log_likelihood, reference["log_likelihood"], rtol=0, atol=reference["tolerance"]["log_likelihood"]
    )
    found = case.quantities(result.params)
    assert set(found) == set(reference["params"])
    assert min(excess(p, reference) for p in relabelled(found, reference.get("label_axis", {}))) <= 1
    assert result.converged, result.status


def log_likelihood_never_falls(case: Case, result: autoem.EMResult) -> None:
    history = np.asarray(result.history)
    assert len(history) == result.num_steps + 1
    # float64 carries a sum of n terms to about n ulps
    assert np.all(np.diff(history) >= -1e-12 * np.abs(history[:-1]).clip(1))


def plan_is_closed_form_wherever_the_algebra_allows(case: Case, result: autoem.EMResult) -> None:
    for parameter, words in case.m_step.items():
        allowed = (words,) if isinstance(words, str) else words
        assert result.plan.m_step(parameter) in allowed, f"{parameter}\n{result.plan}"


ACCELERATED = {"squarem": autoem.accelerate.Squarem(), "anderson": autoem.accelerate.Anderson()}


def accelerated_is_no_worse(case: Case, plain: autoem.EMResult, accelerated: autoem.EMResult) -> None:
    """It ends where plain EM does or higher, and never goes down: a refused map repeats the objective before it."""
    assert accelerated.objective >= plain.objective - 1e-9 * abs(plain.objective)
    reaches_the_reference(case, accelerated)
    log_likelihood_never_falls(case, accelerated)


EVERY = (reaches_the_reference, log_likelihood_never_falls, plan_is_closed_form_wherever_the_algebra_allows)

"""Acceleration of the EM map: what is promised of any method, of good ones and of one that is always wrong."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

import autoem
from autoem.accelerate import AbstractAcceleration, Accelerator, Anderson, Move, Squarem
from autoem.ir import Param

KEY = jax.random.key(0)
METHODS = [Squarem(), Squarem(growth=2.0), Anderson(), Anderson(order=1), Anderson(order=10)]
EVERY_METHOD = pytest.mark.parametrize("method", METHODS, ids=str)
DEATHS = np.repeat(np.arange(10), [162, 267, 271, 185, 111, 61, 27, 8, 3, 1])


def mixture(x):
    weights = numpyro.param("weights", jnp.array([0.3, 0.7]), constraint=constraints.simplex)
    rate = numpyro.param("rate", jnp.array([1.0, 2.5]), constraint=constraints.positive)
    with numpyro.plate("days", len(x)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.Poisson(rate[z]), obs=x)


def fit(method, model=mixture, data=DEATHS, **options):
    settings = {"init": "model", "tol": 1e-12, "max_steps": 5000, "progress": False} | options
    return autoem.EM(model, accelerate=method, **settings).run(KEY, data)


@EVERY_METHOD
def test_fewer_maps_to_the_same_maximum(method):
    plain, result = fit(None), fit(method)
    assert result.converged and result.num_steps < plain.num_steps / 5
    assert len(result.history) == result.num_steps + 1
    assert np.all(np.diff(result.history) >= -1e-15 * abs(result.objective))  # a plain step may fall by an ulp
    assert result.history[-1] == result.objective
    np.testing.assert_allclose(result.log_likelihood, -1989.945859883, atol=1e-6)
    np.testing.assert_allclose(result.params["rate"], [1.256095101, 2.663404357], atol=2e-3)


@EVERY_METHOD
def test_a_limit_of_steps_is_one_of_maps_and_is_not_convergence(method):
    for steps in (0, 2, 5, 9):
        result = fit(method, max_steps=steps)
        assert (result.num_steps, len(result.history)) == (steps, steps + 1) and not result.converged
        # what is returned has the objective that is stated, even where the last map was spent in vain
        np.testing.assert_allclose(result.score(DEATHS).sum(), result.objective, rtol=1e-12)


@EVERY_METHOD
def test_restarts_run_together(method):
    result = fit(method, restarts=4, init="auto")
    assert result.converged and len(result.restarts.objective) == 4
    np.testing.assert_allclose(result.log_likelihood, -1989.945859883, atol=1e-6)


@EVERY_METHOD
def test_single_precision(method):
    with jax.enable_x64(False):  # the slow end is below its rounding error: no method is expected to get there
        plain, result = fit(None, tol=1e-6), fit(method, tol=1e-6)
    assert result.converged and result.params["rate"].dtype == jnp.float32
    assert np.all(np.diff(result.history) >= -1e-5 * abs(result.objective))
    assert result.log_likelihood >= plain.log_likelihood - 0.01


WILD = {"far": 1e3, "nan": jnp.nan, "back": 0.3}


@dataclasses.dataclass(frozen=True)
class Wild(AbstractAcceleration):
    """Always proposes somewhere bad."""

    how: str = "far"

    def init(self, x) -> Any:
        return ()

    def propose(self, state, x, image, weight, trial):
        return Move(WILD[self.how] * image, jnp.ones((), bool), ())

    def refused(self, state):
        return ()


@pytest.mark.parametrize("how", ["far", "nan", "back"])
def test_bad_extrapolations_cost_maps_and_nothing_else(how):
    """Every second map is wasted at most; the points between are those of plain EM, and so is the end."""
    plain, result = fit(None, tol=1e-9), fit(Wild(how), tol=1e-9)
    path = result.history[np.append(True, np.diff(result.history) > 0)]
    np.testing.assert_allclose(path, plain.history[: len(path)], rtol=1e-13)
    assert result.converged and result.num_steps <= 2 * plain.num_steps + 2
    np.testing.assert_allclose(result.objective, plain.objective, rtol=1e-12)


def test_entries_on_the_boundary_stay_there():
    def absorbing(x):
        weights = numpyro.param("weights", jnp.array([0.3, 0.0, 0.7]), constraint=constraints.simplex)
        rate = numpyro.param("rate", jnp.array([1.0, 9.0, 2.5]), constraint=constraints.positive)
        with numpyro.plate("days", len(x)):
            z = numpyro.sample("z", dist.Categorical(weights))
            numpyro.sample("x", dist.Poisson(rate[z]), obs=x)

    for method in (Squarem(), Anderson()):
        result = fit(method, absorbing)
        assert result.params["weights"][1] == 0 and result.converged
        np.testing.assert_allclose(result.log_likelihood, -1989.945859883, atol=1e-6)


@pytest.mark.parametrize(
    ("constraint", "value"),
    [
        (constraints.positive, [3.0, 0.0, 1e-9]),
        (constraints.simplex, [0.2, 0.0, 0.8]),
        (constraints.unit_interval, [0.0, 0.3, 1.0]),
        (constraints.real, [-1.0, 0.0, 2.0]),
        (constraints.positive_definite, [[2.0, 0.3], [0.3, 1.0]]),
        (constraints.interval(-1.0, 4.0), [0.5, 3.0]),
    ],
)
def test_any_vector_of_coordinates_is_a_valid_point(constraint, value):
    value = jnp.array(value)
    param = Param("p", value.shape, None, constraint)
    accelerator = Accelerator(Wild(), {"p": param}, ("p",))
    flat = accelerator.flat(autoem.accelerate.free, {"p": value})
    assert jnp.isfinite(flat).all()
    coordinates = autoem.accelerate.free(param, value)
    np.testing.assert_allclose(autoem.accelerate.constrained(param, coordinates), value, atol=1e-12)
    noise = jax.random.normal(KEY, coordinates.shape)
    assert constraint(autoem.accelerate.constrained(param, coordinates + noise)).all()


def test_the_plan_says_so():
    em = autoem.EM(mixture, accelerate=Anderson(order=3))
    plan = em.plan(DEATHS)
    assert "Anderson(order=3)" in str(plan) and "refused" in str(plan) and "Anderson(order=3)" in plan._repr_html_()
    assert "Henderson and Varadhan 2019" in plan.citations()
    assert "Acceleration" not in str(autoem.EM(mixture).plan(DEATHS))


def test_an_optimiser_with_a_memory_is_refused():
    step = {"rate": autoem.m_step.Gradient(optimizer=optax.adam(0.05))}
    with pytest.raises(autoem.PlanError, match="site 'rate': its optimiser's state"):
        autoem.EM(mixture, m_step=step, accelerate=Squarem()).plan(DEATHS)
    fresh = {"rate": autoem.m_step.Gradient(steps=3)}  # L-BFGS begins anew with every M-step
    np.testing.assert_allclose(fit(Squarem(), m_step=fresh).log_likelihood, -1989.945859883, atol=1e-5)


def test_wrong_options_are_refused():
    with pytest.raises(TypeError, match="Squarem"):
        autoem.EM(mixture, accelerate="squarem")
    with pytest.raises(ValueError, match=r"Squarem\(growth=1\)"):
        Squarem(growth=1)
    with pytest.raises(ValueError, match=r"Anderson\(order=0\)"):
        Anderson(order=0)

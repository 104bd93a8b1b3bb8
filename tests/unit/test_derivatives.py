"""Derivatives that vanish where a density does, against JAX's own elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoem.graph.derivatives import SAFE
from autoem.graph.jaxpr import trace_graph

PLAIN = {"log": jnp.log, "log1p": jnp.log1p, "sqrt": jnp.sqrt, "div": jnp.divide}
AWAY = jnp.array([0.3, 1.0, 7.5])


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_derivatives_are_jaxs_own_where_those_are_finite(name, order):
    safe, plain = SAFE[name], PLAIN[name]
    if name == "div":
        safe, plain = (lambda x: SAFE["div"](x**2, x + 1)), (lambda x: x**2 / (x + 1))
    for f, g in ((safe, plain), (jax.grad(safe), jax.grad(plain))):
        for _ in range(order):
            f, g = jax.jacfwd(f), jax.jacfwd(g)
        np.testing.assert_allclose(jax.vmap(f)(AWAY), jax.vmap(g)(AWAY), rtol=1e-13)


@pytest.mark.parametrize("x", [0.0, 1e-320, 1e-200, 1e-30])
def test_a_weight_of_zero_takes_a_cell_out_of_every_derivative(x):
    """The logarithm of a vanishing probability, its slope times zero: by JAX's own rules it would be NaN."""
    graph = trace_graph(lambda v: {("out", 0): jnp.log(v["in", 0]) + jnp.sqrt(v["in", 0])}, {("in", 0): jnp.ones(())})

    def weighed(theta):
        density = graph.evaluate([("out", 0)], {("in", 0): theta * x})[0]
        return 0.0 * jnp.where(jnp.isfinite(density), density, 0) + theta**2

    at = jnp.asarray(3.0)
    assert jax.grad(weighed)(at) == 6.0
    assert jax.hessian(weighed)(at) == 2.0


def test_a_guarded_logarithm_is_opened_so_that_its_derivatives_vanish_too():
    """`xlogy(0, p)` at the least number that a clamped probability is; SciPy's and JAX's value elsewhere."""

    def model(v):
        return {("out", 0): jax.scipy.special.xlogy(v["x", 0], jnp.maximum(v["p", 0], jnp.finfo(float).tiny))}

    graph = trace_graph(model, {("x", 0): jnp.ones(()), ("p", 0): jnp.ones(())})

    def density(p, x):
        return graph.evaluate([("out", 0)], {("x", 0): x, ("p", 0): p})[0]

    assert jax.hessian(density)(0.0, 0.0) == 0
    np.testing.assert_allclose(jax.hessian(density)(0.25, 3.0), -3 / 0.25**2, rtol=1e-14)

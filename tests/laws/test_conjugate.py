"""Latents integrated cell by cell in closed form: every law over every pair of a prior and a reader."""

import jax
import numpy as np
import pytest

import autoem
from autoem.e_step.cells.local import LocalBlock
from autoem.graph.programs import jit_once

from ..local_models import GROUP, PAIRS, ROWS, Pair, X, on_a_grid

KEY = jax.random.key(0)
EVERY_PAIR = pytest.mark.parametrize("pair", PAIRS, ids=repr)
READING = pytest.mark.parametrize("grouped", [False, True], ids=["by_row", "by_group"])


def derived(pair: Pair, **how):
    """The kernel, the start and the data of a pair's model."""
    em = autoem.EM(pair.model(**how), progress=False, latent=["u"])
    built, source = em._derive((pair.y, X), {})
    return em, built.kernel, built.start(source, KEY), built.bundle(source, KEY)


@EVERY_PAIR
@READING
def test_integrals_moments_and_slopes(pair, grouped):
    """Against the grid; and Fisher's identity, which holds only if the nodes reproduce every expected statistic."""
    _, kernel, params, bundle = derived(pair, grouped=grouped)
    (block,) = kernel.integrals
    assert isinstance(block.block, LocalBlock)
    method, names = block.block.how, list(kernel.problem.factors)
    assert method.form.name == pair.form

    @jit_once
    def everything(params, bundle):
        likelihood, slope = jax.value_and_grad(kernel.log_likelihood)(params, bundle)
        statistics = kernel.expect(params, bundle).statistics
        filled = kernel.completed(params, bundle)
        of_q = jax.grad(lambda p: kernel.problem.q(p, statistics, filled, names))(params)
        found = block.integrate(params, bundle)[1]
        keys = jax.random.split(KEY, 4000)
        draws = jax.vmap(lambda k: method.sample(k, found)["u"])(keys).mean(0)
        return likelihood, slope, of_q, method.mean(found)["u"], method.covariance(found)["u"][..., 0, 0], draws

    likelihood, slope, of_q, mean, variance, draws = everything(params, bundle)
    home = GROUP if grouped else np.arange(ROWS)
    expected = [on_a_grid(pair, [i for i in range(ROWS) if home[i] == c]) for c in sorted(set(home))]
    np.testing.assert_allclose(likelihood, sum(e[0] for e in expected), rtol=1e-10)
    np.testing.assert_allclose(mean, [e[1] for e in expected], rtol=1e-9)
    finite = np.isfinite(variance)  # where the posterior has none, neither has the rule
    np.testing.assert_allclose(variance[finite], np.array([e[2] for e in expected])[finite], rtol=1e-8)
    # five standard errors of a mean of 4000 draws
    np.testing.assert_array_less(np.abs(draws - mean)[finite], 5 * np.sqrt(variance / 4000)[finite])
    for name in params:
        np.testing.assert_allclose(of_q[name], slope[name], rtol=1e-7, atol=1e-9, err_msg=name)


@EVERY_PAIR
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_em_rises(pair, masked):
    em = autoem.EM(pair.model(masked=masked), progress=False, max_steps=6, tol=0.0)
    history = np.asarray(em.run(KEY, pair.y, X).history)
    assert np.isfinite(history).all()
    assert np.all(np.diff(history) >= -1e-11 * np.abs(history[:-1]).clip(1))

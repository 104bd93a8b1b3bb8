"""Linear-Gaussian models that nobody wrote: log-likelihood and M-steps against one dense Gaussian over all latents.

A dozen run with the tests, two hundred under `-m slow`. To reproduce a failure: `random_rows(seed)` or
`random_chain(seed)`, whose `text` says what was drawn.
"""

import jax
import numpy as np
import pytest
from numpyro.distributions import biject_to

import autoem
from autoem.e_step.tables.completions import NODES
from autoem.lowering.kernel import with_nodes
from tests.dense_gaussian import Dense
from tests.random_gaussian import Drawn, random_chain, random_rows

KEY = jax.random.key(0)
CLOSED = "autoem.m_step.closed_form"


def slopes_of_q(drawn: Drawn, dense: Dense, at: dict):
    """`Q(params | at)`, and its gradient by the parameters without their constraints."""
    maps = {n: biject_to(c) for n, c in drawn.constraints.items()}

    def q(free):
        return dense.expected_log_joint({n: maps[n](v) for n, v in free.items()}, at)

    run = jax.jit(jax.value_and_grad(q))
    return lambda params: run({n: maps[n].inv(v) for n, v in params.items()})


def assert_laws(drawn: Drawn) -> None:
    """The log-likelihood is the dense one, closed forms are maxima of the dense `Q`, and EM never falls."""
    em = autoem.EM(drawn.model, init="model", progress=False, max_steps=5, tol=0.0)
    result, dense = em.run(KEY, *drawn.args), Dense(drawn.model, drawn.args)
    assert set(result.params) == set(drawn.params)
    assert result.history[0] == pytest.approx(float(dense.log_likelihood(drawn.params)), rel=1e-7, abs=1e-7)
    assert result.log_likelihood == pytest.approx(float(dense.log_likelihood(dict(result.params))), rel=1e-5)
    assert np.all(np.diff(result.history) > -1e-7), result.history
    built, source = em._derive(drawn.args, {})
    assert built.kernel.treatment is None, drawn.text
    kernel, bundle, params = built.kernel, built.bundle(source, KEY), dict(drawn.params)
    statistics = kernel.expect(params, bundle).statistics
    bundle = with_nodes(bundle, statistics.get(NODES, {}))
    slopes = slopes_of_q(drawn, dense, dict(drawn.params))
    before = float(slopes(params)[0])
    for block in kernel.blocks:
        params |= block.solve(params, statistics, bundle, block.init(params))[0]
        value, slope = slopes(params)
        assert value >= before - 1e-9 * max(1.0, abs(before)), block
        before = float(value)
        if block.maximises and type(block).__module__.startswith(CLOSED):
            for name in block.names:
                np.testing.assert_allclose(slope[name], 0, atol=1e-6, err_msg=f"{name} by {type(block).__name__}")


@pytest.mark.parametrize("seed", range(6))
def test_rows(seed):
    assert_laws(random_rows(seed))


@pytest.mark.parametrize("seed", range(6))
def test_chains(seed):
    assert_laws(random_chain(seed))


@pytest.mark.slow
@pytest.mark.parametrize("draw", [random_rows, random_chain])
@pytest.mark.parametrize("seed", range(6, 100))
def test_more_of_them(draw, seed):
    assert_laws(draw(seed))

"""Latents integrated cell by cell in closed form: every law over every pair of a prior and a reader."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autoem
from autoem._jaxpr import jit_once
from autoem.e_step.local import LocalBlock

from ..local_models import GROUP, PAIRS, ROWS, Pair, X

KEY = jax.random.key(0)
EVERY_PAIR = pytest.mark.parametrize("pair", PAIRS, ids=repr)
READING = pytest.mark.parametrize("grouped", [False, True], ids=["by_row", "by_group"])


def derived(pair: Pair, **how):
    """The kernel, the start and the data of a pair's model."""
    em = autoem.EM(pair.model(**how), progress=False, latent=["u"])
    built, source = em._derive((pair.y, X), {})
    return em, built.kernel, built.start(source, KEY), built.bundle(source, KEY)


def on_a_grid(pair: Pair, rows: list[int]) -> tuple[float, float, float]:
    """Log integral, mean and variance of one cell that the given rows read, by the trapezoid rule in free coordinates.

    The integrand and all its derivatives vanish at both ends, where the rule converges faster than any power.
    """
    params = {n: jnp.asarray(v) for n, (v, _) in pair.params.items()}
    s = jnp.linspace(-45.0, 45.0, 18_001)
    u = jax.nn.sigmoid(s) if pair.form == "Beta" else jnp.exp(s)
    jacobian = -jax.nn.softplus(s) - jax.nn.softplus(-s) if pair.form == "Beta" else s
    log_joint = pair.prior(params).log_prob(u) + jacobian
    for i in rows:
        log_joint += jax.vmap(lambda v, i=i: pair.reader(v, params, X[i]).log_prob(pair.y[i]))(u)
    log_joint = jnp.where(jnp.isnan(log_joint), -jnp.inf, log_joint)  # where 1 - u rounds to zero
    weight = jnp.exp(log_joint)
    z = weight.sum()
    mean = (weight * u).sum() / z
    return float(jnp.log(z * (s[1] - s[0]))), float(mean), float((weight * (u - mean) ** 2).sum() / z)


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
        _, _, statistics = kernel.expect(params, bundle)
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

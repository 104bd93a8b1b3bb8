"""Truncated and censored latents: masses and moments far out, and whole models against a rule on each piece."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special

import autoem
from autoem.e_step.cells.pieces import Pieces, between, upper_tail
from autoem.graph.programs import jit_once

from ..cut_models import MODELS, SEEN, X, Y

KEY = jax.random.key(0)


@pytest.mark.parametrize("z", [-40.0, -8.0, -1.0, 0.0, 0.7, 3.0, 4.999, 5.001, 12.0, 40.0])
def test_upper_tail(z):
    """Against Gauss' rule for the excess over `z`, whose density is `exp(-z t - t^2 / 2)`."""

    def moment(k: int) -> float:
        return integrate.quad(lambda t: t**k * np.exp(-z * t - t**2 / 2), 0, np.inf)[0]

    found = upper_tail(jnp.asarray(z))
    np.testing.assert_allclose(found.log_mass, special.log_ndtr(-z), rtol=1e-12, atol=1e-15)
    if z > -1:
        excess = moment(1) / moment(0)
        np.testing.assert_allclose(found.mean, z + excess, rtol=1e-12)
        np.testing.assert_allclose(found.deviation**2, moment(2) / moment(0) - excess**2, rtol=1e-9)


@pytest.mark.parametrize("low", [-40.0, -6.0, -0.3, 0.0, 2.0, 38.0])
@pytest.mark.parametrize("width", [1e-7, 0.01, 1.0, 5.0, 100.0])
def test_between(low, width):
    """The mirror image, and the law cut once more, must agree; a narrow piece is nearly uniform."""
    low, high = jnp.asarray(low), jnp.asarray(low + width)
    found, mirrored = between(low, high), between(-high, -low)
    np.testing.assert_allclose(found.log_mass, mirrored.log_mass, rtol=1e-13)
    np.testing.assert_allclose(found.mean, -mirrored.mean, rtol=1e-13)
    middle = low + 0.5 * (high - low)
    parts = [between(low, middle), between(middle, high)]
    np.testing.assert_allclose(found.log_mass, jnp.logaddexp(*(p.log_mass for p in parts)), rtol=1e-11, atol=1e-14)
    share = np.exp(np.array([p.log_mass for p in parts]) - float(found.log_mass))
    np.testing.assert_allclose(
        found.mean, sum(s * p.mean for s, p in zip(share, parts, strict=True)), rtol=1e-9, atol=1e-13
    )
    if width == 1e-7:
        np.testing.assert_allclose(found.deviation, (high - low) / np.sqrt(12), rtol=1e-5)


def on_pieces(case, i: int) -> np.ndarray:
    """Log integral, mean and variance of one cell: Gauss' rule on short panels that end at the breaks."""
    at, share = np.polynomial.legendre.leggauss(40)
    ends = np.unique([*np.linspace(case.low, 40.0, 81 if case.low < 0 else 41), *case.breaks(i)])
    u = np.concatenate([a + (b - a) * (at + 1) / 2 for a, b in itertools.pairwise(ends)])
    w = np.concatenate([(b - a) * share / 2 for a, b in itertools.pairwise(ends)])
    density = w * np.exp(case.log_joint(u, i))
    z = density.sum()
    mean = (density * u).sum() / z
    return np.array([np.log(z), mean, (density * (u - mean) ** 2).sum() / z])


@pytest.mark.parametrize("case", MODELS, ids=repr)
def test_integrals_moments_and_slopes(case):
    """Against the rule on pieces; and Fisher's identity, which holds only if nodes reproduce every statistic."""
    built, source = autoem.EM(case.model, progress=False)._derive((), {})
    kernel, params, bundle = built.kernel, built.start(source, KEY), built.bundle(source, KEY)
    (block,) = kernel.integrals
    assert isinstance(block.block.how, Pieces)
    names = list(kernel.problem.factors)

    @jit_once
    def everything(params, bundle):
        likelihood, slope = jax.value_and_grad(kernel.log_likelihood)(params, bundle)
        statistics = kernel.expect(params, bundle)[2]
        filled = kernel.completed(params, bundle)
        of_q = jax.grad(lambda p: kernel.problem.q(p, statistics, filled, names))(params)
        found = block.integrate(params, bundle)[1]
        method = block.block.how
        draws = jax.vmap(lambda k: method.sample(k, found)["u"])(jax.random.split(KEY, 4000))
        return likelihood, slope, of_q, method.mean(found)["u"], method.covariance(found)["u"][..., 0, 0], draws

    likelihood, slope, of_q, mean, variance, draws = everything(params, bundle)
    cells = [i for i in range(case.cells) if case.name != "right" or not SEEN[i]]
    expected = np.array([on_pieces(case, i) for i in cells])
    seen = 0.0
    if case.name == "right":
        seen = float(jax.scipy.stats.norm.logpdf(Y, 0.7 * X, 1.3)[SEEN].sum())
    np.testing.assert_allclose(likelihood, expected[:, 0].sum() + seen, rtol=1e-11)
    np.testing.assert_allclose(np.asarray(mean)[cells], expected[:, 1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.asarray(variance)[cells], expected[:, 2], rtol=1e-8)
    error = np.abs(draws.mean(0) - mean)[np.array(cells)] / np.sqrt(expected[:, 2] / 4000)
    assert error.max() < 5  # standard errors of a mean of 4000 draws
    for name in params:
        np.testing.assert_allclose(of_q[name], slope[name], rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("case", MODELS, ids=repr)
def test_em_rises(case):
    history = np.asarray(autoem.EM(case.model, progress=False, max_steps=6, tol=0.0).run(KEY).history)
    assert np.isfinite(history).all()
    assert np.all(np.diff(history) >= -1e-11 * np.abs(history[:-1]).clip(1))

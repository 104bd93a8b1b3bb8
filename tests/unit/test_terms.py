"""What kind of function of a parameter a density is: read off its code, against powers known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from autoem.graph.jaxpr import trace_graph
from autoem.m_step.closed_form.domain import domain_of, in_box, isotonic
from autoem.passes.forms import Declined
from autoem.passes.terms import LOG, terms_of

T, Z = jnp.array([0.5, 2.0, 3.0]), jnp.array([0, 1, 0])
CENSORED = jnp.array([True, False, True])


def survival(v):
    rate = v[Z]
    return jnp.where(CENSORED, -rate * T, dist.Exponential(rate).log_prob(T))


SCALES = {
    "censored exponential": (survival, {0.0, LOG, 1.0}),
    "mean of an exponential": (lambda v: -T / v[Z] - jnp.log(v[Z]), {0.0, LOG, -1.0}),
    "normal": (lambda v: dist.Normal(0.3, v[Z]).log_prob(T), {0.0, LOG, -2.0}),
    "variance": (lambda v: dist.Normal(0.3, jnp.sqrt(v[Z])).log_prob(T), {0.0, LOG, -1.0}),
    "weibull of known shape": (lambda v: dist.Weibull(v[Z], 1.5).log_prob(T), {0.0, LOG, -1.5}),
    "intensity summed": (lambda v: jnp.log(v[Z]).sum() - (v * jnp.ones(2)).sum(), {0.0, LOG, 1.0}),
    "poisson": (lambda v: dist.Poisson(v[Z] * T).log_prob(jnp.array([1, 0, 4])), {0.0, LOG, 1.0}),
}
DECLINED = {
    "sum inside a logarithm": lambda v: jnp.log(v[0] * T + v[1]),
    "two entries multiplied": lambda v: v[Z] * v[1 - Z],
    "survivor function of a normal": lambda v: jnp.log1p(-dist.Normal(0.3, v[Z]).cdf(T)),
    "its logarithm times itself": lambda v: v[Z] * jnp.log(v[Z]),
    "exponent": lambda v: T ** v[Z],
    "choice": lambda v: jnp.where(v[Z] > 1, T, 0.0),
}


def graph(function):
    return trace_graph(lambda v: {("out", 0): function(v["in", 0])}, {("in", 0): jnp.ones(2)})


@pytest.mark.parametrize("name", SCALES)
def test_powers_and_logarithm_of_a_scale(name):
    function, powers = SCALES[name]
    g = graph(function)
    found = terms_of(g, g.outputs["out", 0], [("in", 0)], joint=False)
    assert found | {0.0} == powers
    g = graph(lambda v: function(jnp.exp(v)))
    assert terms_of(g, g.outputs["out", 0], [("in", 0)], joint=False, real=True) | {0.0} == powers


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_no_such_sum_is_declined(name):
    g = graph(DECLINED[name])
    with pytest.raises(Declined):
        terms_of(g, g.outputs["out", 0], [("in", 0)], joint=False)


def test_polynomials_may_mix_entries():
    g = graph(lambda v: dist.Normal(v[0] + v[1] * T, 2.0).log_prob(T) + (v @ jnp.eye(2)) @ v)
    assert terms_of(g, g.outputs["out", 0], [("in", 0)], joint=True) == {0.0, 1.0, 2.0}
    g = graph(lambda v: v[0] ** 2 / v[1])
    with pytest.raises(Declined):
        terms_of(g, g.outputs["out", 0], [("in", 0)], joint=True)


def test_isotonic_regression_is_scikit_learns():
    from sklearn.isotonic import isotonic_regression

    rng = np.random.default_rng(0)
    y, w = rng.normal(size=(20, 7)), rng.exponential(size=(20, 7))
    own = np.stack([isotonic_regression(a, sample_weight=b) for a, b in zip(y, w, strict=True)])
    np.testing.assert_allclose(isotonic(jnp.asarray(y), jnp.asarray(w)), own, atol=1e-12)


def test_least_squares_in_a_box_is_scipys():
    import scipy.optimize

    rng = np.random.default_rng(1)
    solve = jax.jit(in_box)
    for _ in range(5):
        x, y = rng.normal(size=(30, 4)), rng.normal(size=30)
        low, high = np.array([0, -np.inf, 0, -0.1]), np.array([np.inf, 0.05, np.inf, 0.1])
        start = np.array([0.1, 0.0, 0.1, 0.0])
        own = scipy.optimize.lsq_linear(x, y, (low, high), method="bvls", tol=1e-14).x
        found = solve(-x.T @ x, x.T @ (y - x @ start), start, low, high)
        np.testing.assert_allclose(found, own, atol=1e-9)


def test_domains_of_constraints():
    c = dist.constraints
    assert str(domain_of(c.interval(0.1, 2.0))) == "kept within 0.1 ... 2"
    assert str(domain_of(c.positive)) == "kept above 0" and domain_of(c.real).free
    assert domain_of(c.simplex) is None and domain_of(c.positive_definite) is None
    kept = domain_of(c.greater_than(0.05)).clipped(jnp.array([0.01, 1.0]))
    assert kept[0] > 0.05 and jax.numpy.isclose(kept[0], 0.05) and kept[1] == 1.0

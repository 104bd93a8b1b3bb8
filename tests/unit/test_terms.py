"""What kind of function of a parameter a density is: read off its code, against powers known by hand."""

import jax.numpy as jnp
import numpyro.distributions as dist
import pytest

from autoem.graph.jaxpr import trace_graph
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

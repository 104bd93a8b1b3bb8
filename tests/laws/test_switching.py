"""A scan that carries a discrete and a continuous state: against every path of the discrete one, enumerated.

Given a path of classes a linear model is Gaussian, so the likelihood is a sum of Gaussian densities, one a path; the
joint density of a drawn path is NumPyro's own, summed over the classes.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer.util import log_density

import autoem
from autoem.e_step import Laplace

Y = jnp.array([0.3, -0.2, 1.0, 0.8, -1.2])
P, A, Q, R = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0.9, -0.5]), np.array([0.3, 1.0]), 0.5


def parameters():
    return (
        numpyro.param("P", jnp.asarray(P), constraint=constraints.simplex),
        numpyro.param("a", jnp.asarray(A)),
        numpyro.param("q", jnp.asarray(Q), constraint=constraints.positive),
        numpyro.param("r", R, constraint=constraints.positive),
    )


def switching(y):
    trans, a, q, r = parameters()

    def step(carry, y):
        z, x = carry
        z = numpyro.sample("z", dist.Categorical(trans[z]))
        x = numpyro.sample("x", dist.Normal(a[z] * x, q[z]))
        numpyro.sample("y", dist.Normal(x, r), obs=y)
        return (z, x), None

    scan(step, (0, 0.5), y)


def fresh(y):
    """A class of each step's own, which nothing carries."""
    trans, a, q, r = parameters()

    def step(x, y):
        z = numpyro.sample("z", dist.Categorical(trans[0]))
        x = numpyro.sample("x", dist.Normal(a[z] * x, q[z]))
        numpyro.sample("y", dist.Normal(x, r), obs=y)
        return x, None

    scan(step, 0.5, y)


def backwards(y):
    """The classes choose what is seen alone; the scan runs from the end."""
    trans, a, q, r = parameters()

    def step(carry, y):
        z, x = carry
        z = numpyro.sample("z", dist.Categorical(trans[z]))
        x = numpyro.sample("x", dist.Normal(a[0] * x, 1.0))
        numpyro.sample("y", dist.StudentT(4.0, x, r * q[z]), obs=y)
        return (z, x), None

    scan(step, (0, 0.0), y, reverse=True)


def sequences(y):
    """Two sequences, classes of second order, a vector as state, and steps that are not seen."""
    trans, a, q, r = parameters()
    seen = jnp.arange(len(y)) != 1

    def step(carry, given):
        y, seen = given
        z2, z1, x = carry
        with numpyro.plate("n", 2):
            z = numpyro.sample("z", dist.Categorical(jnp.stack([trans, trans[::-1]])[z2, z1]))
            turn = jnp.array([[0.0, 1.0], [-1.0, 0.2]])
            mean = a[z][..., None] * (x @ turn)
            x = numpyro.sample("x", dist.Normal(mean, q[z][..., None]).to_event(1))
            numpyro.sample("y", dist.Normal(x[..., 0] + x[..., 1], r).mask(seen), obs=y)
        return (z1, z, x), None

    scan(step, (jnp.zeros(2, int), jnp.zeros(2, int), jnp.ones((2, 2))), (y, seen))


CASES = {
    "switching": (switching, Y, (5,)),
    "fresh": (fresh, Y, (5,)),
    "backwards": (backwards, Y, (5,)),
    "sequences": (sequences, jnp.stack([Y[:4], Y[1:]], 1), (4, 2, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_density_of_a_path_is_that_of_the_model_with_every_path_of_classes(name):
    model, y, shape = CASES[name]
    em = autoem.EM(model, e_step={"x": Laplace()}, progress=False)
    built, _ = em._derive((y,), {})
    params, bundle = built.start(built.source, jax.random.key(0)), built.bundle(built.source, jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *shape)))
    hidden = built.kernel.treatment.hidden
    ours = hidden.log_joint(built.kernel, params, bundle, {"x": x})[0]
    cells = shape if len(shape) == 1 else shape[:2]
    states = np.array(list(itertools.product(range(2), repeat=int(np.prod(cells))))).reshape(-1, *cells)

    def one(z):  # NumPyro gives values to a scan in the order in which it runs, as `hidden` does
        return log_density(model, (y,), {}, {"z": z, "x": x[0], **params})[0]

    each = jax.jit(lambda z: jax.lax.map(one, z))(jnp.asarray(states))
    np.testing.assert_allclose(ours, jax.nn.logsumexp(each), rtol=1e-10)

"""Chains in plates, and chains whose steps hold more: zeros, mixtures, durations, holes. In the words of users."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from tests.chain_models import BITS, COUNTS, POSITIVE, ROWS, SIMPLEX, SYMBOLS, UNIT, Case, Y, normal, param, state

HOLES = np.array([0.3, np.nan, 2.1, np.nan])


def sequences(y):
    trans, start, loc = param("trans", SIMPLEX), param("start", SIMPLEX), param("loc")

    def step(z, tx):
        t, x = tx
        with numpyro.plate("sequences", y.shape[1]):
            z = state(jnp.where(t == 0, start, trans[z]))
            normal(loc[z], x)
        return z, None

    scan(step, jnp.zeros(y.shape[1], int), (jnp.arange(len(y)), y))


def lengths(y, length):
    trans, loc = param("trans", SIMPLEX), param("loc")

    def step(carry, x):
        z, t = carry
        with numpyro.plate("sequences", y.shape[1]), handlers.mask(mask=t < length):
            z = state(trans[z])
            normal(loc[z], x)
        return (z, t + 1), None

    scan(step, (jnp.zeros(y.shape[1], int), 0), y)


def dimensions(y):
    trans, locs = param("trans", SIMPLEX), param("locs")

    def step(z, x):
        z = state(trans[z])
        with numpyro.plate("dimensions", y.shape[-1]):
            normal(locs[z], x)
        return z, None

    scan(step, 0, y)


def tones(y, length):
    """A batch of sequences of several tones: priors on everything, lengths by a mask, plates in the body."""
    _, num_sequences, num_tones = y.shape
    rows = numpyro.sample("rows", dist.Dirichlet(0.9 * jnp.eye(2) + 1.1).to_event(1))
    keys = numpyro.sample("keys", dist.Beta(1.1, 1.9).expand([2, num_tones]).to_event(2))

    def step(carry, x):
        z, t = carry
        with numpyro.plate("sequences", num_sequences, dim=-2), handlers.mask(mask=(t < length)[:, None]):
            z = numpyro.sample("z", dist.Categorical(rows[z]), infer={"enumerate": "parallel"})
            with numpyro.plate("tones", num_tones, dim=-1):
                numpyro.sample("y", dist.Bernoulli(keys[z.squeeze(-1)]), obs=x)
        return (z, t + 1), None

    scan(step, (jnp.zeros((num_sequences, 1), int), 0), y)


def left_to_right(y):
    """A free table whose values hold zeros."""
    trans, emit = param("forward", SIMPLEX), param("emit3", SIMPLEX)

    def step(z, x):
        z = state(trans[z])
        numpyro.sample("y", dist.Categorical(emit[z]), obs=x)
        return z, None

    scan(step, 0, y)


def banded(y):
    """Stay or go on, and the last state for ever: built from two probabilities."""
    stay, loc = param("stay", UNIT), param("loc3")
    trans = (
        jnp.zeros((3, 3)).at[jnp.arange(2), jnp.arange(2)].set(stay).at[jnp.arange(2), jnp.arange(1, 3)].set(1 - stay)
    )
    trans = trans.at[2, 2].set(1.0)

    def step(z, x):
        z = state(trans[z])
        normal(loc[z], x)
        return z, None

    scan(step, 0, y)


def mixture_emission(y):
    trans, shares, locs = param("trans", SIMPLEX), param("rows", SIMPLEX), param("locs")

    def step(z, x):
        z = state(trans[z])
        c = state(shares[z], "c")
        normal(locs[z, c], x)
        return z, None

    scan(step, 0, y)


def zero_inflated(y):
    trans, gate, rate = param("trans", SIMPLEX), param("gate", UNIT), param("rate", POSITIVE)

    def step(z, x):
        z = state(trans[z])
        never = numpyro.sample("never", dist.Bernoulli(gate[z]))
        numpyro.sample("y", dist.Poisson(jnp.where(never == 1, 1e-12, rate[z])), obs=x)
        return z, None

    scan(step, 0, y)


def reads_both_states(y):
    trans, loc, effect = param("trans", SIMPLEX), param("loc"), param("effect")

    def step(before, x):
        z = state(trans[before])
        normal(loc[z] + effect[before], x)
        return z, None

    scan(step, 1, y)


def tied_emissions(y):
    """Three states, two of which emit alike."""
    trans, loc, sd = param("trans3", SIMPLEX), param("loc"), param("sd", POSITIVE)
    kind = jnp.array([0, 1, 0])

    def step(z, x):
        z = state(trans[z])
        normal(loc[kind[z]], x, sd[kind[z]])
        return z, None

    scan(step, 2, y)


def explicit_durations(y):
    """A state lasts as long as was drawn when it was entered; the steps left are part of the state."""
    trans, duration, loc = param("trans", SIMPLEX), param("duration", SIMPLEX), param("loc")

    def step(carry, x):
        z, left = carry
        z = state(jnp.where(left == 0, trans[z], jnp.eye(2)[z]))
        left = state(jnp.where(left == 0, duration[z], jnp.array([1.0, 0.0])), "left")
        normal(loc[z], x)
        return (z, left), None

    scan(step, (0, 0), y)


def no_order(y):
    """Nothing is carried from step to step."""
    start, loc = param("start", SIMPLEX), param("loc")

    def step(carry, x):
        normal(loc[state(start)], x)
        return carry, None

    scan(step, None, y)


def backwards(y):
    trans, loc = param("trans", SIMPLEX), param("loc")

    def step(z, x):
        z = state(trans[z])
        normal(loc[z], x)
        return z, None

    scan(step, 0, y, reverse=True)


def with_holes(y):
    trans, loc = param("trans", SIMPLEX), param("loc")

    def step(z, x):
        z = state(trans[z])
        normal(loc[z], x)
        return z, None

    scan(step, 0, y)


def holes_masked(y):
    trans, loc, seen = param("trans", SIMPLEX), param("loc"), ~np.isnan(y)

    def step(z, sx):
        seen, x = sx
        z = state(trans[z])
        with handlers.mask(mask=seen):
            normal(loc[z], x)
        return z, None

    scan(step, 0, (seen, np.nan_to_num(y)))


CASES = {
    "sequences": Case(sequences, (ROWS,)),
    "lengths": Case(lengths, (ROWS, np.array([4, 2]))),
    "dimensions": Case(dimensions, (ROWS,)),
    "tones": Case(tones, (BITS, np.array([3, 2])), exact_step=False),
    "left to right": Case(left_to_right, (SYMBOLS,), exact_step=False),
    "banded": Case(banded, (Y,)),
    "mixture emission": Case(mixture_emission, (Y[:4],), ("z", "c")),
    "zero inflated": Case(zero_inflated, (COUNTS[:4],), ("z", "never"), exact_step=False),
    "reads both states": Case(reads_both_states, (Y,)),
    "tied emissions": Case(tied_emissions, (Y,)),
    "explicit durations": Case(explicit_durations, (Y[:4],), ("z", "left"), ()),
    "no order": Case(no_order, (Y,), paired=()),
    "backwards": Case(backwards, (Y,)),
    "with holes": Case(with_holes, (HOLES,), truth=holes_masked, options={"missing": "marginalize"}),
}

"""Chains beside other latents, and chains in unusual words: each of these may be refused only where its case says so.

`CASES` are answered; an answer to one of `RIGHT_OR_REFUSED` is the right one, or a `ModelError` or `PlanError` comes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from tests.chain_models import COUNTS, POSITIVE, ROWS, SIMPLEX, UNIT, Case, Y, normal, param, state


def mixture_of_chains(y):
    """A class for each sequence selects its transitions."""
    shares, tables, loc = param("shares", SIMPLEX), param("trans_of_pair", SIMPLEX), param("loc")
    with numpyro.plate("sequences", y.shape[1]):
        kind = state(shares, "kind")

    def step(z, x):
        with numpyro.plate("sequences", y.shape[1]):
            z = state(tables[kind, z])
            normal(loc[z], x)
        return z, None

    scan(step, jnp.zeros(y.shape[1], int), y)


def classes_of_emissions(y):
    """A class for each sequence shifts its emissions and chooses its first state."""
    shares, trans, locs = param("shares", SIMPLEX), param("trans", SIMPLEX), param("locs")
    with numpyro.plate("sequences", y.shape[1]):
        kind = state(shares, "kind")

    def step(z, x):
        with numpyro.plate("sequences", y.shape[1]):
            z = state(trans[z])
            normal(locs[kind, z], x)
        return z, None

    scan(step, kind, y)


def one_class(y):
    """A latent that every step reads."""
    shares, trans, loc, effect = param("shares", SIMPLEX), param("trans", SIMPLEX), param("loc"), param("effect")
    kind = state(shares, "kind")

    def step(z, x):
        z = state(trans[z])
        normal(loc[z] + effect[kind], x)
        return z, None

    scan(step, 0, y)


def class_of_second_order(y):
    """Two chains of different memories; a class for each sequence chooses the longer one's start and its emissions."""
    shares, tables, rows, loc = (
        param("shares", SIMPLEX),
        param("trans_of_pair", SIMPLEX),
        param("rows", SIMPLEX),
        param("locs"),
    )
    with numpyro.plate("sequences", y.shape[1]):
        kind = state(shares, "kind")

    def step(carry, x):
        older, old, b = carry
        with numpyro.plate("sequences", y.shape[1]):
            a, b = state(tables[older, old], "a"), state(rows[b], "b")
            normal(loc[kind, a] + b, x)
        return (old, a, b), None

    none = jnp.zeros(y.shape[1], int)
    scan(step, (none, kind, none), y)


def after_the_scan(y, end):
    trans, loc, effect = param("trans", SIMPLEX), param("loc"), param("effect")

    def step(z, x):
        z = state(trans[z])
        normal(loc[z], x)
        return z, None

    last, _ = scan(step, 0, y)
    normal(effect[last], end, name="end")


def latent_after_the_scan(y, end):
    trans, loc, rows = param("trans", SIMPLEX), param("loc"), param("rows", SIMPLEX)

    def step(z, x):
        z = state(trans[z])
        normal(loc[z], x)
        return z, None

    last, _ = scan(step, 0, y)
    normal(loc[state(rows[last], "end")], end, name="y_end")


def two_scans(y, x):
    """Two sequences of different lengths with parameters in common."""
    trans, loc, rate = param("trans", SIMPLEX), param("loc"), param("rate", POSITIVE)

    def step(z, x):
        z = state(trans[z])
        normal(loc[z], x)
        return z, None

    def count(w, x):
        w = state(trans[w], "w")
        numpyro.sample("x", dist.Poisson(rate[w]), obs=x)
        return w, None

    scan(step, 0, y)
    scan(count, 1, x)


def priors(y):
    with numpyro.plate("states", 2):
        rows = numpyro.sample("rows", dist.Dirichlet(jnp.array([2.0, 1.5])))
        means = numpyro.sample("means", dist.Normal(0.0, 3.0))

    def step(z, x):
        z = state(rows[z])
        normal(means[z], x)
        return z, None

    scan(step, 0, y)


def autoregression(y):
    """No latent at all."""
    slope, sd = param("slope"), param("one_sd", POSITIVE)

    def step(before, x):
        normal(slope * before, x, sd)
        return x, None

    scan(step, jnp.array(0.5), y)


def param_in_the_body(y):
    loc = param("loc")

    def step(z, x):
        z = state(param("trans", SIMPLEX)[z])
        normal(loc[z], x)
        return z, None

    scan(step, 0, y)


def carries_one_hot(y):
    trans, loc = param("trans", SIMPLEX), param("loc")

    def step(carry, x):
        z = state(carry @ trans)
        normal(loc[z], x)
        return jax.nn.one_hot(z, 2), None

    scan(step, jnp.array([1.0, 0.0]), y)


def carries_probabilities(y):
    trans, loc = param("trans", SIMPLEX), param("loc")

    def step(probs, x):
        z = state(probs)
        normal(loc[z], x)
        return trans[z], None

    scan(step, jnp.array([0.5, 0.5]), y)


def counts_visits(y):
    """The sum of all states so far: no finite number of lags is enough."""
    gate, slope = param("gate", UNIT), param("slope")

    def step(visits, x):
        z = numpyro.sample("z", dist.Bernoulli(gate[0]))
        normal(slope * (visits + z), x)
        return visits + z, None

    scan(step, 0, y)


def common_chain(y):
    """A chain for all sequences drives one for each."""
    trans, tables, loc = param("trans", SIMPLEX), param("trans_of_pair", SIMPLEX), param("loc")

    def step(carry, x):
        season, z = carry
        season = state(trans[season], "season")
        with numpyro.plate("sequences", y.shape[1]):
            z = state(tables[season, z])
            normal(loc[z], x)
        return (season, z), None

    scan(step, (0, jnp.zeros(y.shape[1], int)), y)


def neighbours(y):
    """Each sequence's next state reads the state of the sequence beside it."""
    p, loc = param("p", UNIT), param("loc")

    def step(z, x):
        with numpyro.plate("sequences", y.shape[1]):
            z = numpyro.sample("z", dist.Bernoulli(p[z, jnp.roll(z, 1)]))
            normal(loc[z], x)
        return z, None

    scan(step, jnp.zeros(y.shape[1], int), y)


def continued(y, x):
    """The second scan goes on where the first ends."""
    trans, loc, rate = param("trans", SIMPLEX), param("loc"), param("rate", POSITIVE)

    def step(z, x):
        z = state(trans[z])
        normal(loc[z], x)
        return z, None

    def count(w, x):
        w = state(trans[w], "w")
        numpyro.sample("x", dist.Poisson(rate[w]), obs=x)
        return w, None

    last, _ = scan(step, 0, y)
    scan(count, last, x)


def states_read_outside(y):
    """The data are read outside from the states that the scan hands out."""
    trans, loc = param("trans", SIMPLEX), param("loc")

    def step(z, _):
        z = state(trans[z])
        return z, z

    _, z = scan(step, 0, None, length=len(y))
    with numpyro.plate("steps", len(y)):
        normal(loc[z], y)


def masked_from_outside(seen, y):
    trans, loc = param("trans", SIMPLEX), param("loc")

    def step(z, x):
        z = state(trans[z])
        normal(loc[z], x)
        return z, None

    with handlers.mask(mask=seen):
        scan(step, 0, y)


def partly_labelled(labels, known, y):
    trans, loc = param("trans", SIMPLEX), param("loc")

    def step(z, lkx):
        label, known, x = lkx
        z = numpyro.sample("z", dist.Categorical(trans[z]), obs=label, obs_mask=known)
        normal(loc[z], x)
        return z, None

    scan(step, 0, (labels, known, y))


def indexed_class(group, y):
    """A class for each group of sequences."""
    shares, tables, loc = param("shares", SIMPLEX), param("trans_of_pair", SIMPLEX), param("loc")
    with numpyro.plate("groups", 2):
        kind = state(shares, "kind")

    def step(z, x):
        with numpyro.plate("sequences", y.shape[1]):
            z = state(tables[kind[group], z])
            normal(loc[z], x)
        return z, None

    scan(step, jnp.zeros(y.shape[1], int), y)


def weighted(weight, y):
    """Each sequence stands for as many as its weight says."""
    trans, loc = param("trans", SIMPLEX), param("loc")

    def step(z, x):
        with numpyro.plate("sequences", y.shape[1]), handlers.scale(scale=weight):
            z = state(trans[z])
            normal(loc[z], x)
        return z, None

    scan(step, jnp.zeros(y.shape[1], int), y)


CASES = {
    "mixture of chains": Case(mixture_of_chains, (ROWS,)),
    "classes of emissions": Case(classes_of_emissions, (ROWS,)),
    "one class": Case(one_class, (Y,)),
    "class of second order": Case(class_of_second_order, (ROWS[:3],), ("a", "b"), ("a", "b")),
    "after the scan": Case(after_the_scan, (Y[:4], 1.5)),
    "latent after the scan": Case(latent_after_the_scan, (Y[:4], 1.5)),
    "two scans": Case(two_scans, (Y[:4], COUNTS[:3]), ("z", "w"), ("z", "w")),
    "priors": Case(priors, (Y,), exact_step=False),
    "autoregression": Case(autoregression, (Y,), (), ()),
}
RIGHT_OR_REFUSED = {
    "param in the body": Case(param_in_the_body, (Y[:4],)),
    "carries one-hot": Case(carries_one_hot, (Y[:4],)),
    "carries probabilities": Case(carries_probabilities, (Y[:4],)),
    "counts visits": Case(counts_visits, (Y[:4],)),
    "common chain": Case(common_chain, (ROWS[:3],), ("season", "z"), ()),
    "neighbours": Case(neighbours, (ROWS,)),
    "continued": Case(continued, (Y[:3], COUNTS[:2]), ("z", "w")),
    "states read outside": Case(states_read_outside, (Y[:4],)),
    "masked from outside": Case(masked_from_outside, (False, Y[:3])),
    "partly labelled": Case(partly_labelled, (np.array([0, 1, 0]), np.array([False, True, False]), Y[:3])),
    "indexed class": Case(indexed_class, (np.array([0, 1, 0]), np.hstack([ROWS, ROWS[:, :1]])[:3])),
}

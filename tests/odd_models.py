"""Models as odd as users write them: legal NumPyro, each with one habit that a reader of models might stumble over."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.funsor import config_enumerate
from numpyro.distributions import constraints

from tests.gallery_models import Case, Rng, _binary, _counts, _mixture_rows, _school_rows


def params_in_plates(x):
    """Parameters declared inside plates, with `event_dim`, one of them in the plate of features."""
    d = x.shape[-1]
    weights = numpyro.param("weights", jnp.array([0.3, 0.7]), constraint=constraints.simplex)
    with numpyro.plate("components", 2, dim=-1):
        loc = numpyro.param("loc", jnp.arange(2.0 * d).reshape(2, d), event_dim=1)
        scale = numpyro.param("scale", jnp.ones((2, d)), constraint=constraints.positive, event_dim=1)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)


def deterministic_between(x, y):
    """A regression mixture whose mean passes through a `deterministic` site; slopes differ, the noise is shared."""
    share = numpyro.sample("share", dist.Beta(2, 2))
    slope = numpyro.param("slope", jnp.array([-1.0, 1.0]))
    level = numpyro.param("level", jnp.array([0.0, 0.5]))
    noise = numpyro.param("noise", 1.0, constraint=constraints.positive)
    with numpyro.plate("n", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(share))
        mean = numpyro.deterministic("mean", level[z] + slope[z] * x)
        numpyro.sample("y", dist.Normal(mean, noise), obs=y)


def events_and_expansion(x):
    """No plate at all for the columns: one rate expanded over them, rows as an event of the plate."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 0.5).expand([2]).to_event(1))
    share = numpyro.sample("share", dist.Dirichlet(jnp.ones(2)))
    with numpyro.plate("rows", x.shape[0]):
        z = numpyro.sample("z", dist.Categorical(share))
        numpyro.sample("x", dist.Poisson(rate[z][..., None]).expand([*jnp.shape(z), x.shape[1]]).to_event(1), obs=x)


def data_by_keyword(*, y=None, num=None, sizes=(2, 3)):
    """Everything by keyword; a tuple option decides the number of states of two latents that share one row."""
    a = numpyro.param("a", jnp.full(sizes[0], 1.0 / sizes[0]), constraint=constraints.simplex)
    b = numpyro.param("b", jnp.full(sizes[1], 1.0 / sizes[1]), constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.arange(float(sizes[0] * sizes[1])).reshape(sizes))
    with numpyro.plate("n", len(y) if y is not None else num):
        za = numpyro.sample("za", dist.Categorical(a))
        zb = numpyro.sample("zb", dist.Categorical(b))
        numpyro.sample("y", dist.Normal(loc[za, zb], 1.0), obs=y)


def data_in_a_dict(data):
    """Columns in a dict, one of them a list of arrays; an unused column; a branch on what is there."""
    loc = numpyro.param("loc", jnp.array([-1.0, 1.0]))
    with numpyro.plate("n", len(data["y"][0])):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        for j, column in enumerate(data["y"]):
            numpyro.sample(f"y{j}", dist.Normal(loc[z] * (j + 1), 1.0), obs=column)
        if "t" in data:
            numpyro.sample("t", dist.Exponential(jnp.exp(0.2 * loc[z])), obs=data["t"])


def scoped(x, y):
    """One submodel used twice under two scopes."""
    for side, column in (("left", x), ("right", y)):
        with handlers.scope(prefix=side):
            _pair(column)


def _pair(column):
    share = numpyro.param("share", 0.4, constraint=constraints.unit_interval)
    rate = numpyro.param("rate", jnp.array([0.5, 3.0]), constraint=constraints.positive)
    with numpyro.plate("n", len(column)):
        z = numpyro.sample("z", dist.Bernoulli(share))
        numpyro.sample("y", dist.Poisson(rate[z]), obs=column)


def helpers_that_sample(answers):
    """Sites made by helper functions and a loop over columns; a list of parameters, one a column."""

    def item(j, z, column):
        p = numpyro.sample(f"p_{j}", dist.Beta(1.5, 1.5).expand([2]).to_event(1))
        with numpyro.plate("rows", len(column)):
            return numpyro.sample(f"item_{j}", dist.Bernoulli(p[z]), obs=column)

    share = numpyro.sample("share", dist.Beta(2, 2))
    z = _latent_in_rows(len(answers), share)
    for j in range(answers.shape[1]):
        item(j, z, answers[:, j])


def _latent_in_rows(n, share):
    with numpyro.plate("rows", n):
        return numpyro.sample("z", dist.Bernoulli(share))


def short_chains(y):
    """A chain of three by a Python loop, and a deterministic count along it."""
    start = numpyro.param("start", jnp.array([0.6, 0.4]), constraint=constraints.simplex)
    move = numpyro.sample("move", dist.Dirichlet(jnp.full(2, 2.0)).expand([2]).to_event(1))
    loc = numpyro.param("loc", jnp.array([0.0, 3.0]))
    with numpyro.plate("people", len(y)):
        z, visits = None, 0
        for t in range(y.shape[1]):
            z = numpyro.sample(f"z_{t}", dist.Categorical(start if z is None else move[z]))
            visits = visits + z
            numpyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[:, t])
        numpyro.deterministic("visits", visits)


def chosen_by_where(y):
    """Components picked by `where` and by arithmetic, in place of an index; ordered locations."""
    loc = numpyro.param("loc", jnp.array([-1.0, 1.0]), constraint=constraints.ordered_vector)
    log_scale = numpyro.param("log_scale", jnp.zeros(2))
    p = numpyro.param("p", jnp.array(0.5), constraint=constraints.unit_interval)
    with numpyro.plate("n", y.shape[0]):
        z = numpyro.sample("z", dist.Bernoulli(probs=p))
        mean = jnp.where(z == 0, loc[0], loc[1])
        scale = jnp.exp(log_scale[0] * (1 - z) + log_scale[1] * z)
        numpyro.sample("y", dist.Normal(mean, scale), obs=y)


def reads_its_shape(x, y):
    """Model code that works at the plate's full shape only."""
    beta = numpyro.param("beta", jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    with numpyro.plate("n", len(y)):
        z = numpyro.sample("z", dist.Categorical(probs=jnp.array([0.5, 0.5])))
        mean = jax.vmap(jnp.dot)(x, beta[z])
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@config_enumerate
def marked_whole(school, score):
    """The whole model under `config_enumerate`; the group's latent is read by each row's index, twice."""
    mean = numpyro.sample("mean", dist.Normal(0, 5).expand([2]).to_event(1))
    with numpyro.plate("schools", int(np.max(school)) + 1):
        kind = numpyro.sample("kind", dist.Bernoulli(0.4))
    with numpyro.plate("pupils", len(score)):
        luck = numpyro.sample("luck", dist.Bernoulli(0.2 + 0.3 * kind[school]))
        numpyro.sample("score", dist.Normal(mean[kind[school]] + 2.0 * luck, 1.0), obs=score)


def one_state(y):
    """A mixture of one component."""
    weights = numpyro.param("weights", jnp.ones(1), constraint=constraints.simplex)
    rate = numpyro.param("rate", jnp.ones(1), constraint=constraints.positive)
    with numpyro.plate("n", len(y)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("y", dist.Poisson(rate[z]), obs=y)


def no_latents(x, y):
    """A plain regression with priors."""
    beta = numpyro.sample("beta", dist.Normal(0, 2).expand([x.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def ragged_visits(y, length):
    """Visits as a second plate, padded; a mask takes the padding out, its latents with it."""
    p = numpyro.sample("p", dist.Beta(2, 2))
    rate = numpyro.sample("rate", dist.Gamma(2, 1).expand([2, 2]).to_event(2))
    people, visits = y.shape
    with numpyro.plate("people", people, dim=-2):
        kind = numpyro.sample("kind", dist.Bernoulli(p))
        with numpyro.plate("visits", visits, dim=-1), handlers.mask(mask=np.arange(visits) < length[:, None]):
            mood = numpyro.sample("mood", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Poisson(rate[kind, mood]), obs=y)


def mixed_support(x, y):
    """Two latents of different kinds, one a count that enters a regression as a number."""
    probs = numpyro.param("probs", 0.4, constraint=constraints.unit_interval)
    slope = numpyro.param("slope", 0.5)
    with numpyro.plate("n", len(y)):
        hits = numpyro.sample("hits", dist.Binomial(2, probs))
        up = numpyro.sample("up", dist.Bernoulli(logits=slope * x + hits - 1.0))
        numpyro.sample("y", dist.Normal(hits * slope + 2.0 * up, 1.0), obs=y)


def _regression(rng: Rng, n: int) -> tuple[tuple, dict]:
    x = rng.normal(size=n)
    return (x, np.where(rng.random(n) < 0.5, 2 * x + 1, -2 * x) + 0.3 * rng.normal(size=n)), {}


def _plane(rng: Rng, n: int) -> tuple[tuple, dict]:
    x = rng.normal(size=(n, 2))
    return (x, x[:, rng.integers(2)] + 0.5 * rng.normal(size=n)), {}


def _keywords(rng: Rng, n: int) -> tuple[tuple, dict]:
    return (), {"y": rng.normal(size=n) * 2 + 2, "sizes": (2, 3)}


def _columns(rng: Rng, n: int) -> tuple[tuple, dict]:
    y = _mixture_rows(rng, n)
    return ({"y": [y[:, 0] - 1, y[:, 1]], "t": rng.exponential(size=n), "name": "unused"},), {}


def _two_counts(rng: Rng, n: int) -> tuple[tuple, dict]:
    return (_counts(rng, n)[0][0], _counts(rng, n)[0][0]), {}


def _visits(rng: Rng, n: int) -> tuple[tuple, dict]:
    return (rng.poisson(2.0, (n, 3)), rng.integers(1, 4, n)), {}


CASES = {
    "params in plates": Case(params_in_plates, lambda rng, n: ((_mixture_rows(rng, n),), {}), 60, 6),
    "deterministic between": Case(deterministic_between, _regression, 60, 8),
    "events and expansion": Case(events_and_expansion, lambda rng, n: ((rng.poisson(3.0, (n, 3)),), {}), 60, 8),
    "data by keyword": Case(data_by_keyword, _keywords, 60, 5),
    "data in a dict": Case(data_in_a_dict, _columns, 60, 8),
    "scoped": Case(scoped, _two_counts, 60, 5),
    "helpers that sample": Case(helpers_that_sample, _binary(4, 0.5), 60, 8),
    "short chains": Case(short_chains, lambda rng, n: ((_mixture_rows(rng, n, 3),), {}), 60, 4),
    "chosen by where": Case(chosen_by_where, lambda rng, n: ((_mixture_rows(rng, n, 1)[:, 0],), {}), 60, 8),
    "reads its shape": Case(reads_its_shape, _plane, 60, 8),
    "marked whole": Case(marked_whole, _school_rows, 60, 8),
    "one state": Case(one_state, lambda rng, n: (_counts(rng, n)[0][:1], {}), 60, 6),
    "no latents": Case(no_latents, _plane, 60, 8),
    "ragged visits": Case(ragged_visits, _visits, 60, 3),
    "mixed support": Case(mixed_support, _regression, 60, 5),
}

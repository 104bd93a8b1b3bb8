"""Small chains as users write them with `scan`, each with the same chain as a Python loop: no number here is autoem's.

`unrolled(model)` runs the body of every `scan` step by step and calls its sites `z_0, z_1, ...`: what `scan` means, in
a form that can be added up by brute force. A case is a model, its data, and what may be asked of it.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.primitives import Messenger

LISTS: dict[str, Any] = {
    "start": [0.6, 0.4],
    "trans": [[0.7, 0.3], [0.2, 0.8]],
    "trans3": [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]],
    "forward": [[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]],
    "trans_of_pair": [[[0.7, 0.3], [0.2, 0.8]], [[0.9, 0.1], [0.4, 0.6]]],
    "stay": [0.6, 0.7],
    "odds": [[[0.5, -0.3], [0.2, 0.4]], [[-0.6, 0.1], [0.3, -0.8]]],
    "p": [[0.2, 0.6], [0.5, 0.9]],
    "q": [[0.7, 0.3], [0.4, 0.1]],
    "shares": [0.3, 0.7],
    "duration": [[0.4, 0.6], [0.8, 0.2]],
    "loc": [-0.5, 1.5],
    "loc3": [-1.0, 0.4, 2.0],
    "locs": [[-0.5, 0.3], [1.5, 1.0]],
    "sd": [0.8, 1.3],
    "one_sd": 0.9,
    "rho": [0.4, -0.3],
    "slope": 0.25,
    "effect": [0.0, 2.0],
    "emit": [[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]],
    "emit3": [[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]],
    "rate": [0.7, 4.0],
    "gate": [0.3, 0.6],
    "rows": [[0.7, 0.3], [0.2, 0.8]],
    "means": [-0.5, 1.5],
    "keys": [[0.2, 0.7], [0.8, 0.4]],
}
VALUES = {name: jnp.array(value, float) for name, value in LISTS.items()}
POSITIVE, SIMPLEX, UNIT = constraints.positive, constraints.simplex, constraints.unit_interval
Y = np.array([0.3, -1.2, 2.1, 1.4, 0.2])
X = np.array([[1.0, 0.3], [1.0, -0.8], [1.0, 1.1], [1.0, 0.4]])
SYMBOLS = np.array([0, 2, 1, 2, 0])
COUNTS = np.array([0, 3, 1, 6, 0])
ROWS = np.array([[0.3, 1.2], [-1.2, 2.0], [2.1, -0.4], [1.4, 0.5]])  # (steps, sequences), or (steps, dimensions)
CUBE = np.array([[[0.3, 1.2], [-1.2, 2.0]], [[2.1, -0.4], [1.4, 0.5]], [[0.1, 0.9], [2.2, 1.7]]])
BITS = (CUBE > 0.6).astype(int)


class Case(NamedTuple):
    """A chain and its data.

    `chain` names the latents of the body and `paired` those with a table of neighbours; `truth` is the model to
    add up where it is not `model` itself; `exact_step` says that the M-step has closed forms alone, inside its domain.
    """

    model: Callable
    args: tuple
    chain: tuple[str, ...] = ("z",)
    paired: tuple[str, ...] = ("z",)
    exact_step: bool = True
    truth: Callable | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 (nobody writes to it)

    @property
    def loop(self) -> Callable:
        return unrolled(self.truth or self.model)

    @property
    def params(self) -> dict[str, jax.Array]:
        """A value for every parameter, and for every continuous site that stands for one."""
        given = handlers.substitute(handlers.seed(self.loop, jax.random.key(0)), data=VALUES)
        recorder = handlers.trace(given)
        jax.eval_shape(lambda: recorder(*self.args))  # names alone are wanted: nothing is computed
        sites = recorder.trace.items()
        names = [n for n, s in sites if s["type"] == "param" or (n in VALUES and not s["is_observed"])]
        return {name: VALUES[name] for name in names}


class Unroll(Messenger):
    """Runs a `scan` as a Python loop whose sites carry the step's number; observations after step `last` are masked."""

    def __init__(self, last: Any = None):
        super().__init__()
        self.last = last

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "control_flow":
            msg["fn"], msg["stop"] = self.run, True

    def run(self, f, carry, xs, length, reverse, **_: Any) -> tuple:
        steps = length if xs is None else len(jax.tree.leaves(xs)[0])
        ys: list = [None] * steps
        for t in reversed(range(steps)) if reverse else range(steps):
            with _Step(t, self.last):
                carry, ys[t] = f(carry, jax.tree.map(lambda x, t=t: x[t], xs))
        return (steps, None, carry), (SimpleNamespace(trace={}), jax.tree.map(lambda *y: jnp.stack(y), *ys))


class _Step(Messenger):
    def __init__(self, step: int, last: Any):
        super().__init__()
        self.step, self.last = step, last

    def process_message(self, msg: Any) -> None:
        if msg["type"] in ("sample", "deterministic"):
            msg["name"] = f"{msg['name']}_{self.step}"
        if msg["type"] == "sample" and msg["is_observed"] and self.last is not None:
            msg["fn"] = msg["fn"].mask(self.step <= self.last)


def unrolled(model: Callable) -> Callable:
    def loop(*args: Any) -> None:
        with Unroll():
            model(*args)

    return loop


def seen_until(model: Callable) -> Callable:
    """`unrolled`, with a parameter `last`: what the steps after it observe is not seen."""

    def loop(*args: Any) -> None:
        with Unroll(numpyro.param("last", jnp.inf)):
            model(*args)

    return loop


def param(name: str, constraint: Any = constraints.real) -> Any:
    """A parameter whose start in the model is not the value that the tests give it."""
    shape = np.shape(VALUES[name])
    value = 1 / shape[-1] if constraint is SIMPLEX else 0.0 if constraint is constraints.real else 0.5
    return numpyro.param(name, jnp.full(shape, value), constraint=constraint)


def state(probs: Any, name: str = "z") -> Any:
    return numpyro.sample(name, dist.Categorical(probs))


def normal(mean: Any, x: Any, sd: Any = 1.0, name: str = "y") -> None:
    numpyro.sample(name, dist.Normal(mean, sd), obs=x)


def constant_start(y):
    trans, loc, sd = param("trans", SIMPLEX), param("loc"), param("sd", POSITIVE)

    def step(z, x):
        z = state(trans[z])
        normal(loc[z], x, sd[z])
        return z, None

    scan(step, 0, y)


def start_by_where(y):
    start, trans, emit = param("start", SIMPLEX), param("trans", SIMPLEX), param("emit", SIMPLEX)

    def step(z, tx):
        t, x = tx
        z = state(jnp.where(t == 0, start, trans[z]))
        numpyro.sample("y", dist.Categorical(emit[z]), obs=x)
        return z, None

    scan(step, jnp.array(0), (jnp.arange(len(y)), y))


def start_outside(y):
    start, trans, rate = param("start", SIMPLEX), param("trans", SIMPLEX), param("rate", POSITIVE)
    first = state(start, "first")
    numpyro.sample("y_first", dist.Poisson(rate[first]), obs=y[0])

    def step(z, x):
        z = state(trans[z])
        numpyro.sample("y", dist.Poisson(rate[z]), obs=x)
        return z, None

    scan(step, first, y[1:])


def extra_row(y):
    """The start is one more row of the table, read from the state before the first."""
    rows = jnp.concatenate([param("trans", SIMPLEX), param("start", SIMPLEX)[None]])
    loc = param("loc")

    def step(z, x):
        z = state(rows[z])
        normal(loc[z], x)
        return z, None

    scan(step, jnp.array(2), y)


def stationary_start(y):
    trans, loc = param("trans3", SIMPLEX), param("loc3")
    stationary = jnp.linalg.solve((jnp.eye(3) - trans + 1.0).T, jnp.ones(3))
    first = state(stationary, "first")
    normal(loc[first], y[0], name="y_first")

    def step(z, x):
        z = state(trans[z])
        normal(loc[z], x)
        return z, None

    scan(step, first, y[1:])


def previous_observation(y):
    trans, loc, rho = param("trans", SIMPLEX), param("loc"), param("rho")

    def step(carry, x):
        z, before = carry
        z = state(trans[z])
        normal(loc[z] + rho[z] * before, x)
        return (z, x), None

    scan(step, (0, 0.0), y)


def counts_time(y):
    """The carry counts the steps: the start, the transitions and the drift depend on it; the data are read by it."""
    start, tables, loc, slope = param("start", SIMPLEX), param("trans_of_pair", SIMPLEX), param("loc"), param("slope")

    def step(carry, _):
        z, t = carry
        z = state(jnp.where(t == 0, start, tables[t % 2, z]))
        normal(loc[z] + slope * t, jnp.asarray(y)[t])
        return (z, t + 1), None

    scan(step, (0, 0), None, length=len(y))


def input_driven(u, y):
    """The next state is a softmax of covariates, with weights that the state before selects."""
    odds, loc = param("odds"), param("loc")

    def step(z, ux):
        u, x = ux
        z = numpyro.sample("z", dist.Categorical(logits=u @ odds[z]))
        normal(loc[z], x)
        return z, None

    scan(step, 0, (u, y))


def second_order(y):
    trans, emit = param("trans_of_pair", SIMPLEX), param("emit", SIMPLEX)

    def step(carry, x):
        older, old = carry
        z = state(trans[older, old])
        numpyro.sample("y", dist.Categorical(emit[z]), obs=x)
        return (old, z), None

    scan(step, (0, 1), y, history=2)


def lag_two(y):
    """Odd and even steps do not touch."""
    trans, loc = param("trans", SIMPLEX), param("loc")

    def step(carry, x):
        older, old = carry
        z = state(trans[older])
        normal(loc[z], x)
        return (old, z), None

    scan(step, (0, 0), y)


def factorial(y):
    trans, other, loc, effect = param("trans", SIMPLEX), param("rows", SIMPLEX), param("loc"), param("effect")

    def step(carry, x):
        a, b = carry
        a, b = state(trans[a], "a"), state(other[b], "b")
        normal(loc[a] + effect[b], x)
        return (a, b), None

    scan(step, (0, 1), y)


def coupled(y):
    """Each chain reads both of the states before."""
    p, q, keys = param("p", UNIT), param("q", UNIT), param("keys", UNIT)

    def step(carry, x):
        a, b = carry["a"], carry["b"]
        new = {"a": numpyro.sample("a", dist.Bernoulli(p[a, b])), "b": numpyro.sample("b", dist.Bernoulli(q[a, b]))}
        numpyro.sample("y", dist.Bernoulli(keys[new["a"], new["b"]]), obs=x)
        return new, None

    scan(step, {"a": 0, "b": 1}, y)


def dynamic_network(y):
    """The second chain reads the first one's new state, the emission both."""
    p, q, keys = param("trans", SIMPLEX), param("q", UNIT), param("keys", UNIT)

    def step(carry, x):
        a, b = carry
        a = state(p[a], "a")
        b = numpyro.sample("b", dist.Bernoulli(q[a, b]))
        numpyro.sample("y", dist.Bernoulli(keys[a, b]), obs=x)
        return (a, b), None

    scan(step, (0, 0), y)


CASES = {
    "constant start": Case(constant_start, (Y,)),
    "start by where": Case(start_by_where, (SYMBOLS,)),
    "start outside": Case(start_outside, (COUNTS,)),
    "extra row": Case(extra_row, (Y[:4],)),
    "one step": Case(extra_row, (Y[:1],)),
    "stationary start": Case(stationary_start, (Y[:4],), exact_step=False),
    "previous observation": Case(previous_observation, (Y[:4],)),
    "counts time": Case(counts_time, (Y,)),
    "input driven": Case(input_driven, (X, Y[:4]), exact_step=False),
    "second order": Case(second_order, (SYMBOLS,)),
    "second order, short": Case(second_order, (SYMBOLS[:2],)),
    "lag two": Case(lag_two, (Y,)),
    "factorial": Case(factorial, (Y[:4],), ("a", "b"), ("a", "b")),
    "coupled": Case(coupled, (np.array([0, 1, 1, 0]),), ("a", "b"), ("a", "b")),
    "dynamic network": Case(dynamic_network, (np.array([1, 1, 0, 1]),), ("a", "b"), ()),
}

"""The parts that random models are put together from: parameters, links from parameters to arguments, families.

A `Sketch` collects what one random model declares. A *link* is a closure from (parameter values, index, data) to one
argument of a distribution, where the index is a tuple of integer arrays: the latents that the argument reads.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.ops.indexing import Vindex

Values = Mapping[str, Any]
Index = tuple[Any, ...]
Link = Callable[[Values, Index, Values], Any]

EVENT_DIM = {"real": 0, "positive": 0, "unit": 0, "simplex": 1, "covariance": 2, "lower": 2}
CONSTRAINTS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "unit": constraints.unit_interval,
    "simplex": constraints.simplex,
    "covariance": constraints.positive_definite,
    "lower": constraints.lower_cholesky,
}


class Parameter(NamedTuple):
    """A parameter to declare: as a `param`, or as a sample site with a prior ("event": whole, or "plates")."""

    name: str
    kind: str
    shape: tuple[int, ...]
    how: str


class Reads(NamedTuple):
    """Which latents an argument reads, the sizes of their supports, and how they become the index of a table."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    index: Callable[..., Index]


@dataclasses.dataclass
class Sketch:
    """What one random model declares: its parameters, the arrays it takes as data, and words that describe it."""

    rng: np.random.Generator
    parameters: list[Parameter] = dataclasses.field(default_factory=list)
    inputs: dict[str, tuple[str, Callable]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, options: Any) -> Any:
        options = list(options)
        return options[self.rng.integers(len(options))]

    def parameter(self, kind: str, shape: tuple[int, ...]) -> str:
        """The name of a parameter of this kind and shape: now and then one that another site has already (tied)."""
        same = [p.name for p in self.parameters if (p.kind, p.shape) == (kind, shape)]
        if same and self.chance(0.12):
            self.notes.append(f"tied {same[0]}")
            return self.pick(same)
        how = "param" if kind in ("covariance", "lower") else self.pick(["param"] * 6 + ["event", "plates"])
        self.parameters.append(Parameter(f"p{len(self.parameters)}", kind, shape, how))
        return self.parameters[-1].name

    def input(self, level: str, make: Callable) -> str:
        """The name of a new data array: `make(rng, shape)`, where shape is the shape of the level's cells."""
        name = f"x{len(self.inputs)}"
        self.inputs[name] = (level, make)
        return name


def draw_parameter(rng: np.random.Generator, parameter: Parameter) -> np.ndarray:
    """A value well inside the parameter's constraint."""
    shape = parameter.shape
    match parameter.kind:
        case "real":
            return rng.normal(0.0, 1.0, shape)
        case "positive":
            return np.exp(rng.normal(0.2, 0.5, shape))
        case "unit":
            return rng.uniform(0.15, 0.85, shape)
        case "simplex":
            return rng.dirichlet(np.full(shape[-1], 3.0), shape[:-1])
    root = rng.normal(size=shape)
    covariance = root @ np.swapaxes(root, -1, -2) + np.eye(shape[-1])
    return covariance if parameter.kind == "covariance" else np.linalg.cholesky(covariance)


def declare(parameter: Parameter) -> Any:
    """Write the parameter's line of the model."""
    name, kind, shape, how = parameter
    batch = shape[: len(shape) - EVENT_DIM[kind]]
    if how == "param":
        start = draw_parameter(np.random.default_rng(7), parameter)
        return numpyro.param(name, jnp.asarray(start), constraint=CONSTRAINTS[kind])
    prior = _prior(kind, shape[-1] if EVENT_DIM[kind] else 0)
    if how == "event" or not batch:
        return numpyro.sample(name, prior.expand(batch).to_event(len(batch)))
    return _in_plates(name, prior, batch)


def _in_plates(name: str, prior: dist.Distribution, batch: tuple[int, ...]) -> Any:
    plates = [numpyro.plate(f"{name}_{axis}", size, dim=axis - len(batch)) for axis, size in enumerate(batch)]
    with plates[0]:
        if len(plates) == 1:
            return numpyro.sample(name, prior)
        with plates[1]:
            if len(plates) == 2:
                return numpyro.sample(name, prior)
            with plates[2]:
                return numpyro.sample(name, prior)


def _prior(kind: str, size: int) -> dist.Distribution:
    return {
        "real": lambda: dist.Normal(0.0, 3.0),
        "positive": lambda: dist.Gamma(2.0, 1.0),
        "unit": lambda: dist.Beta(2.0, 2.0),
        "simplex": lambda: dist.Dirichlet(jnp.full(size, 2.0)),
    }[kind]()


def select(sketch: Sketch, kind: str, event: tuple[int, ...], reads: Reads) -> Link:
    """`table[z]`, plain or by Vindex."""
    name = sketch.parameter(kind, reads.sizes + event)
    if reads.sizes and sketch.chance(0.25):
        tail = (slice(None),) * len(event)
        return lambda v, i, d: Vindex(v[name])[i + tail if len(i + tail) > 1 else i[0]]
    return lambda v, i, d: v[name][i]


def with_fixed_row(sketch: Sketch, kind: str, event: tuple[int, ...], reads: Reads) -> Link:
    """`stack([constant, free, ...])[z]`: the first state's value is not free."""
    if len(reads.sizes) != 1:
        return select(sketch, kind, event, reads)
    name = sketch.parameter(kind, (reads.sizes[0] - 1, *event))
    constant = {"real": 0.3, "positive": 1.0, "unit": 0.5, "simplex": 1.0 / max(event, default=1)}[kind]
    first = jnp.full(event, constant)
    return lambda v, i, d: jnp.concatenate([first[None], v[name]])[i]


def affine(sketch: Sketch, level: str, reads: Reads) -> Link:
    """`b[z] + x @ beta[z]` with covariates x of the level, or an arithmetic function of the latents themselves."""
    beta = sketch.parameter("real", (*reads.sizes, 2))
    x = sketch.input(level, lambda rng, shape: rng.normal(size=(*shape, 2)))
    if sketch.chance(0.5):
        return lambda v, i, d: (d[x] * v[beta][i]).sum(-1)
    intercept = sketch.parameter("real", ())
    return lambda v, i, d: v[intercept] + jnp.einsum("...p,...p->...", d[x], v[beta][i])


def arithmetic(sketch: Sketch, reads: Reads) -> Link:
    """`a + b * z + c * w`: the latents' values as numbers."""
    base = sketch.parameter("real", ())
    slopes = [sketch.parameter("real", ()) for _ in reads.sizes]
    return lambda v, i, d: v[base] + sum((v[s] * z for s, z in zip(slopes, i, strict=True)), 0.0)


def real_link(sketch: Sketch, level: str, event: tuple[int, ...], reads: Reads) -> tuple[str, Link]:
    options = ["select"] * 4 + ["fixed", "tanh"] + ([] if event else ["affine"] * 2 + ["arithmetic"])
    how = sketch.pick(options)
    if how == "affine":
        return how, affine(sketch, level, reads)
    if how == "arithmetic":
        return how, arithmetic(sketch, reads)
    if how == "fixed":
        return how, with_fixed_row(sketch, "real", event, reads)
    table = select(sketch, "real", event, reads)
    return how, table if how == "select" else lambda v, i, d: 2 * jnp.tanh(table(v, i, d))


def positive_link(sketch: Sketch, level: str, event: tuple[int, ...], reads: Reads) -> tuple[str, Link]:
    how = sketch.pick(["select"] * 4 + ["fixed", "square", "exp"] + ([] if event else ["exp affine"]))
    if how in ("select", "square"):
        table = select(sketch, "positive", event, reads)
        return how, table if how == "select" else lambda v, i, d: table(v, i, d) ** 2
    if how == "fixed":
        return how, with_fixed_row(sketch, "positive", event, reads)
    inner = affine(sketch, level, reads) if how == "exp affine" else select(sketch, "real", event, reads)
    return how, lambda v, i, d: jnp.exp(0.5 * inner(v, i, d))


def unit_link(sketch: Sketch, level: str, event: tuple[int, ...], reads: Reads) -> tuple[str, Link]:
    options = ["select"] * 4 + ["fixed", "sigmoid", "squared", "two p q"]
    options += [] if event else ["sigmoid affine"] + ["noisy-or"] * (set(reads.sizes) == {2})
    how = sketch.pick(options)
    if how == "fixed":
        return how, with_fixed_row(sketch, "unit", event, reads)
    if how == "noisy-or":
        return how, _noisy_or(sketch, reads)
    if how.startswith("sigmoid"):
        inner = affine(sketch, level, reads) if "affine" in how else select(sketch, "real", event, reads)
        return how, lambda v, i, d: jax.nn.sigmoid(inner(v, i, d))
    table = select(sketch, "unit", event, reads)
    shape = {"select": lambda p: p, "squared": lambda p: p * p, "two p q": lambda p: 2 * p * (1 - p)}[how]
    return how, lambda v, i, d: shape(table(v, i, d))


def _noisy_or(sketch: Sketch, reads: Reads) -> Link:
    leak, fail = sketch.parameter("unit", ()), sketch.parameter("unit", (len(reads.sizes),))

    def link(v: Values, i: Index, d: Values) -> Any:
        silent = 1 - v[leak] / 2
        for cause, z in enumerate(i):
            silent = silent * v[fail][cause] ** z
        return 1 - silent

    return link


def simplex_link(sketch: Sketch, level: str, event: tuple[int, ...], reads: Reads) -> tuple[str, Link]:
    how = sketch.pick(["select"] * 4 + ["fixed", "softmax"] + ["hardy-weinberg", "linkage"] * (event == (3,)))
    if how == "select":
        return how, select(sketch, "simplex", event, reads)
    if how == "fixed":
        return how, with_fixed_row(sketch, "simplex", event, reads)
    if how == "softmax":
        logits = select(sketch, "real", event, reads)
        return how, lambda v, i, d: jax.nn.softmax(logits(v, i, d), axis=-1)
    table = select(sketch, "unit", (), reads)

    def genotypes(v: Values, i: Index, d: Values) -> Any:
        p = table(v, i, d)
        rows = [p * p, 2 * p * (1 - p), (1 - p) ** 2] if how == "hardy-weinberg" else [jnp.ones_like(p), p, 1 - p]
        return jnp.stack(rows, axis=-1) / (1 if how == "hardy-weinberg" else 2)

    return how, genotypes


def other_link(kind: str) -> Callable:
    return lambda sketch, level, event, reads: ("select", select(sketch, kind, event, reads))


LINKS = {
    "real": real_link,
    "positive": positive_link,
    "unit": unit_link,
    "simplex": simplex_link,
    "covariance": other_link("covariance"),
    "lower": other_link("lower"),
}


class Maker(NamedTuple):
    """A distribution made from arguments, each of a kind and an event shape."""

    make: Callable[..., dist.Distribution]
    arguments: tuple[tuple[str, tuple[int, ...]], ...]


def _of(make: Callable, *arguments: str | tuple[str, tuple[int, ...]]) -> Maker:
    return Maker(make, tuple((each, ()) if isinstance(each, str) else each for each in arguments))


LATENTS = {
    "categorical probs": lambda k: _of(lambda p: dist.Categorical(probs=p), ("simplex", (k,))),
    "categorical logits": lambda k: _of(lambda a: dist.Categorical(logits=a), ("real", (k,))),
    "bernoulli probs": lambda k: _of(lambda p: dist.Bernoulli(probs=p), "unit"),
    "bernoulli logits": lambda k: _of(lambda a: dist.Bernoulli(logits=a), "real"),
    "binomial": lambda k: _of(lambda p: dist.Binomial(k - 1, probs=p), "unit"),
    "beta-binomial": lambda k: _of(lambda a, b: dist.BetaBinomial(a, b, k - 1), "positive", "positive"),
    "discrete uniform": lambda k: _of(lambda: dist.DiscreteUniform(0, k - 1)),
    "ordered": lambda k: _of(lambda a: dist.OrderedLogistic(a, jnp.linspace(-1.0, 1.0, k - 1)), "real"),
}

FAMILIES = {
    "normal": _of(dist.Normal, "real", "positive"),
    "normal scale": _of(lambda s: dist.Normal(0.0, s), "positive"),
    "lognormal": _of(dist.LogNormal, "real", "positive"),
    "half-normal": _of(dist.HalfNormal, "positive"),
    "laplace": _of(dist.Laplace, "real", "positive"),
    "student": _of(lambda m, s: dist.StudentT(4.0, m, s), "real", "positive"),
    "von mises": _of(lambda m, c: dist.VonMises(m, c), "real", "positive"),
    "bernoulli probs": _of(lambda p: dist.Bernoulli(probs=p), "unit"),
    "bernoulli logits": _of(lambda a: dist.Bernoulli(logits=a), "real"),
    "binomial probs": _of(lambda p: dist.Binomial(4, probs=p), "unit"),
    "binomial logits": _of(lambda a: dist.Binomial(4, logits=a), "real"),
    "beta-binomial": _of(lambda a, b: dist.BetaBinomial(a, b, 4), "positive", "positive"),
    "categorical probs": _of(lambda p: dist.Categorical(probs=p), ("simplex", (3,))),
    "categorical logits": _of(lambda a: dist.Categorical(logits=a), ("real", (3,))),
    "multinomial": _of(lambda p: dist.Multinomial(5, probs=p), ("simplex", (3,))),
    "poisson": _of(dist.Poisson, "positive"),
    "zip": _of(dist.ZeroInflatedPoisson, "unit", "positive"),
    "negative binomial": _of(dist.NegativeBinomial2, "positive", "positive"),
    "geometric": _of(lambda a: dist.Geometric(logits=a), "real"),  # by probs, NumPyro has no density at 1
    "exponential": _of(dist.Exponential, "positive"),
    "gamma": _of(dist.Gamma, "positive", "positive"),
    "inverse gamma": _of(dist.InverseGamma, "positive", "positive"),
    "weibull": _of(lambda s, c: dist.Weibull(s, c), "positive", "positive"),
    "beta": _of(dist.Beta, "positive", "positive"),
    "dirichlet": _of(dist.Dirichlet, ("positive", (3,))),
    "mvn covariance": _of(dist.MultivariateNormal, ("real", (2,)), ("covariance", (2, 2))),
    "mvn precision": _of(
        lambda m, p: dist.MultivariateNormal(m, precision_matrix=p), ("real", (2,)), ("covariance", (2, 2))
    ),
    "mvn tril": _of(lambda m, t: dist.MultivariateNormal(m, scale_tril=t), ("real", (2,)), ("lower", (2, 2))),
    "normals": _of(lambda m, s: dist.Normal(m, s[..., None]).to_event(1), ("real", (2,)), "positive"),
    "diagonal normals": _of(lambda m, s: dist.Normal(m, s).to_event(1), ("real", (2,)), ("positive", (2,))),
    "bernoullis": _of(lambda p: dist.Bernoulli(probs=p).to_event(1), ("unit", (3,))),
    "categoricals": _of(lambda p: dist.Categorical(probs=p).to_event(1), ("simplex", (2, 3))),
    "poissons": _of(lambda r: dist.Poisson(r[..., None]).expand((*r.shape, 2)).to_event(1), "positive"),
}

# families whose likelihood stays bounded when there is but one datum
FOR_FEW = [
    "normal scale", "half-normal", "poisson", "bernoulli probs", "bernoulli logits", "binomial probs", "multinomial",
    "binomial logits", "categorical probs", "categorical logits", "geometric", "exponential", "bernoullis", "poissons",
]  # fmt: skip

"""Linear-Gaussian models drawn at random: rows with factors and effects of groups, or the steps of a chain.

In: a seed. Out: a `Drawn` model with its data and parameters, in words what it is. Loadings, intercepts and noise come
in the forms that people write: free, by known multiples, tied, with fixed zeros, by class, by covariates.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

OUTPUTS, WIDTH, GROUPS = 3, 2, 2
Params = dict[str, jax.Array]


@dataclasses.dataclass
class Drawn:
    """A model, its data, and where its parameters start."""

    model: Callable
    args: tuple
    params: Params
    constraints: dict[str, constraints.Constraint]
    text: str


class Sketch:
    """Choices made so far: parameters, and what they are in words."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.params: Params = {}
        self.constraints: dict[str, constraints.Constraint] = {}
        self.words: list[str] = []

    def pick(self, what: str, *forms: str) -> str:
        form = forms[self.rng.integers(len(forms))]
        self.words.append(f"{what}: {form}")
        return form

    def param(self, name: str, value: Any, constraint: constraints.Constraint = constraints.real) -> None:
        self.params[name], self.constraints[name] = jnp.asarray(value, float), constraint

    def covariance(self, size: int) -> np.ndarray:
        root = self.rng.normal(size=(size, size))
        return root @ root.T / size + 0.5 * np.eye(size)

    def read(self) -> Params:
        """The parameters, as a model declares them."""
        return {n: numpyro.param(n, v, constraint=self.constraints[n]) for n, v in self.params.items()}

    def drawn(self, model: Callable, *args: np.ndarray) -> Drawn:
        return Drawn(model, args, self.params, self.constraints, "; ".join(self.words))


def loadings(sketch: Sketch, name: str, outputs: int, classes: bool = False, small: float = 1.0) -> Callable:
    """A matrix `(..., outputs, WIDTH)` of the parameters and of a class."""
    forms = ("free", "free", "known multiples", "known multiples of columns", "tied", "zeros", "known")
    form = sketch.pick(name, *forms, *(("by class",) if classes else ()))
    shape = (outputs, WIDTH)
    value = small * sketch.rng.normal(size=(2, *shape))
    known = sketch.rng.uniform(0.3, 3.0, shape) * sketch.rng.choice([-1.0, 1.0], shape)
    if form == "known":
        return lambda p, z: jnp.asarray(value[0])
    if form == "by class":
        sketch.param(name, value)
        return lambda p, z: p[name][z]
    if form == "tied":  # outputs take turns with two rows
        sketch.param(name, value[0, :2])
        return lambda p, z: p[name][jnp.arange(outputs) % 2]
    if form == "zeros":
        sketch.param(name, value[0].ravel()[1:])
        return lambda p, z: jnp.concatenate([jnp.zeros(1), p[name]]).reshape(shape)
    times = {"known multiples": small * known, "known multiples of columns": np.array([1.0, 0.1])}.get(form, 1.0)
    sketch.param(name, value[0])
    return lambda p, z: p[name] * times


def intercept(sketch: Sketch, classes: bool = False) -> Callable:
    """A vector `(..., OUTPUTS)` of the parameters, a class and a covariate."""
    form = sketch.pick("centre", "none", "free", "line", *(("by class",) if classes else ()))
    value = sketch.rng.normal(size=(2, OUTPUTS))
    if form == "none":
        return lambda p, z, x: jnp.zeros(OUTPUTS)
    if form == "by class":
        sketch.param("centre", value)
        return lambda p, z, x: p["centre"][z]
    sketch.param("centre", value[0])
    if form == "free":
        return lambda p, z, x: p["centre"]
    sketch.param("slope", value[1])
    return lambda p, z, x: p["centre"] + jnp.asarray(x)[..., None] * p["slope"]


def noise(sketch: Sketch, name: str, size: int, classes: bool = False) -> Callable:
    """A law of vectors about their mean, of the parameters and a class."""
    forms = ("one scale", "scales", "variances", "log scale", "covariance", "scale_tril", "precision")
    form = sketch.pick(name, *forms, *(("scale by class", "covariance by class") if classes else ()))
    matrices = np.stack([sketch.covariance(size), 2 * sketch.covariance(size)])
    scales, positive = sketch.rng.uniform(0.4, 1.2, (2, size)), constraints.positive
    if "covariance" in form or form in ("scale_tril", "precision"):
        kept = constraints.lower_cholesky if form == "scale_tril" else constraints.positive_definite
        value = np.linalg.cholesky(matrices) if form == "scale_tril" else matrices
        sketch.param(name, value if form == "covariance by class" else value[0], kept)
        keyword = {"scale_tril": "scale_tril", "precision": "precision_matrix"}.get(form, "covariance_matrix")
        chosen = (lambda p, z: p[name][z]) if form == "covariance by class" else (lambda p, z: p[name])
        return lambda p, z, loc: dist.MultivariateNormal(loc, **{keyword: chosen(p, z)})
    value = {"scales": scales[0], "variances": scales[1], "scale by class": scales[:, 0]}.get(form, scales[0, 0])
    sketch.param(name, value, constraints.real if form == "log scale" else positive)
    scale = {
        "variances": lambda p, z: jnp.sqrt(p[name]),
        "log scale": lambda p, z: jnp.exp(p[name]),
        "scale by class": lambda p, z: p[name][z][..., None],
    }.get(form, lambda p, z: p[name])
    return lambda p, z, loc: dist.Normal(loc, scale(p, z)).to_event(1)


def random_rows(seed: int) -> Drawn:
    """Rows with a factor and perhaps a class, an effect of their group, or both; plain, masked or weighted."""
    sketch = Sketch(seed)
    latents = sketch.pick("latents", "factor", "factor", "effect", "both")
    # an effect that rows of unknown classes share has no Gaussian posterior
    classes = latents == "factor" and sketch.pick("classes", "none", "two") == "two"
    around = sketch.pick("rows", "plain", "plain", "masked", "weighted")
    count = 5 if classes else 14
    centre, law = intercept(sketch, classes), noise(sketch, "noise", OUTPUTS, classes)
    loads = loadings(sketch, "loads", OUTPUTS, classes) if latents != "effect" else None
    prior = (
        noise(sketch, "prior", WIDTH) if loads and sketch.pick("factors", "standard", "own law") == "own law" else None
    )
    if latents != "factor":
        sketch.param("spread", 0.8, constraints.positive)
        sketch.param("effects", sketch.rng.normal(size=OUTPUTS))
    if classes:
        sketch.param("weights", [0.4, 0.6], constraints.simplex)
    x, group = sketch.rng.normal(size=count), sketch.rng.permutation(np.arange(count) % GROUPS)
    seen, weight = np.arange(count) != 2, sketch.rng.uniform(0.5, 2.0, count)

    def model(y, x, group):
        p, z, loc = sketch.read(), None, jnp.zeros(OUTPUTS)
        if latents != "factor":
            with numpyro.plate("groups", GROUPS):
                effect = numpyro.sample("effect", dist.Normal(0.0, p["spread"]))
            loc = loc + effect[group][:, None] * p["effects"]
        with numpyro.plate("rows", count):
            if classes:
                z = numpyro.sample("z", dist.Categorical(p["weights"]))
            if loads is not None:
                zero = jnp.zeros(WIDTH)
                own = prior(p, z, zero) if prior else dist.Normal(zero, 1.0).to_event(1)
                factor = numpyro.sample("factor", own)
                loc = loc + jnp.einsum("...ij,...j->...i", loads(p, z), factor)
            with {
                "plain": handlers.mask(mask=True),
                "masked": handlers.mask(mask=jnp.asarray(seen)),
                "weighted": handlers.scale(scale=jnp.asarray(weight)),
            }[around]:
                numpyro.sample("y", law(p, z, loc + centre(p, z, x)), obs=y)

    return sketch.drawn(model, 1.5 * sketch.rng.normal(size=(count, OUTPUTS)) + 0.5, x, group)


def random_chain(seed: int) -> Drawn:
    """A state that moves and is read; the first step stands alone, with an observation or without, or in the scan."""
    sketch = Sketch(seed)
    begin = sketch.pick("first state", "own mean", "seen", "in the scan")
    move, read = loadings(sketch, "move", WIDTH, small=0.4), loadings(sketch, "read", OUTPUTS)
    jolt, law, centre = noise(sketch, "jolt", WIDTH), noise(sketch, "noise", OUTPUTS), intercept(sketch)
    if begin != "in the scan":
        sketch.param("begin", sketch.rng.normal(size=WIDTH))
    count = 12

    def model(y, x):
        p = sketch.read()

        def observe(name, state, y, x):
            numpyro.sample(name, law(p, None, read(p, None) @ state + centre(p, None, x)), obs=y)

        def step(state, now):
            state = numpyro.sample("state", jolt(p, None, move(p, None) @ state))
            observe("y", state, *now)
            return state, None

        state, later = jnp.zeros(WIDTH), (y, x)
        if begin != "in the scan":
            state = numpyro.sample("first", dist.Normal(p["begin"], 1.0).to_event(1))
        if begin == "seen":
            observe("first_y", state, y[0], x[0])
            later = (y[1:], x[1:])
        scan(step, state, later)

    y, x = 1.5 * sketch.rng.normal(size=(count, OUTPUTS)) + 1.0, sketch.rng.normal(size=count)
    return sketch.drawn(model, y, x)

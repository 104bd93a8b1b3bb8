"""Where an augmentation takes hold: the value inside a site that would be a location, a utility or a log-odds.

In: a factor and a parameter. Out: `Place`, the factor with that value among its outputs and the law of what is not in
the text; or `Declined`. The value is found in the data flow: of a distribution that has it as an argument by name, of a
probability as the last value that is affine in the parameter and from which all else is computed. What is computed from
it is then evaluated, and held against the cumulative normal and the logistic function.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import ndtr

from autoem.e_step.tables.tabulate import Factor
from autoem.families import Counting, Location
from autoem.graph.jaxpr import Atom, Graph, Variable
from autoem.graph.programs import jit_once
from autoem.m_step.closed_form.laws import BY_SITE, LOGISTIC, PROBIT, QUADRATIC, Law
from autoem.passes.gaussian import affine_atom
from autoem.passes.link import Declined

PLACE = "place"  # the argument's name, among the outputs of the site
NEAR = 1e-6  # clamps of a probability closer than this to 0 or 1 leave it what it is
NARROW, SPREAD = 0.5, 8.0  # utilities up to which probabilities are compared; beyond, they are 0 or 1 to most digits
# what a probability may be of the place, and its slope at zero
FUNCTIONS = ((PROBIT, ndtr, 1 / math.sqrt(2 * math.pi)), (LOGISTIC, jax.nn.sigmoid, 0.25))


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """A value of a factor, `slope` times which is what `law` augments."""

    factor: Factor
    law: Law
    slope: float = 1.0

    @property
    def atom(self) -> Atom:
        return self.factor.graph.outputs[self.factor.name, f"arg:{PLACE}"]

    def affine_in(self, names: tuple[str, ...]) -> bool:
        """Whether the value is affine in all of the parameters together."""
        read = self.factor.graph.needs_of([self.atom])
        return not affine_atom(self.factor.graph, self.atom, [k for n in names if (k := ("param", n)) in read])

    def value(self, values: dict) -> Array:
        """It, at every state of the latents and in every row."""
        return self.factor.argument(f"arg:{PLACE}", values)


def with_output(factor: Factor, name: str, atom: Atom) -> Factor:
    """The factor with one more value of its data flow as an argument."""
    graph = factor.graph
    return dataclasses.replace(
        factor, graph=dataclasses.replace(graph, outputs={**graph.outputs, (factor.name, f"arg:{name}"): atom})
    )


def place_of(factor: Factor, name: str) -> Place:
    """The value of `factor` that an augmentation makes a location, affine in the parameter `name`.

    Raises:
        Declined: there is none, or the parameter enters elsewhere too.
    """
    graph, key = factor.graph, ("param", name)
    if factor.completions is not None or factor.site.role != "observed":
        raise Declined(f"it enters '{factor.name}', which is not observed, or reads a continuous latent")
    place = by_name(factor) or in_probability(factor, name)
    if key in graph.needs_of([graph.outputs[factor.name, "elem"]]) and key in read_beside(graph, factor, place.atom):
        raise Declined(f"it enters '{factor.name}' otherwise than through {place.law.what}")
    if not place.affine_in((name,)):
        raise Declined(f"{place.law.what} of '{factor.name}' is not affine in it")
    return place


def read_beside(graph: Graph, factor: Factor, atom: Atom) -> set:
    """The inputs that the density reads otherwise than through a value."""
    given = [atom] if isinstance(atom, Variable) else []
    reached = graph.reach([graph.outputs[factor.name, "elem"]], given)[1] - set(given)
    return {graph.keys[v] for v in reached if v in graph.keys}


def by_name(factor: Factor) -> Place | None:
    """The place that the distribution has as an argument; None where it may be inside a probability."""
    graph, name, family = factor.graph, factor.site.distribution, factor.family
    quadratic = [a for a, rule in family.rules.items() if isinstance(rule, Location)] if family else []
    if quadratic:
        argument, law = quadratic[0], QUADRATIC
    elif name in BY_SITE:
        argument, law = BY_SITE[name]
        if (factor.name, f"arg:{argument}") not in graph.outputs:
            raise Declined(f"'{factor.name}' is {name} of another base than a Normal or a LogNormal")
    elif is_counted(factor, "logits"):
        argument, law = "logits", LOGISTIC
    elif is_counted(factor, "probs"):
        return None
    else:
        raise Declined(f"no augmentation is known for {name}, of which '{factor.name}' is one")
    return Place(with_output(factor, PLACE, graph.outputs[factor.name, f"arg:{argument}"]), law)


def is_counted(factor: Factor, argument: str) -> bool:
    """Whether an argument is the probability, or the log-odds, of one of two outcomes that are counted."""
    family = factor.family
    rule = family.rules.get(argument) if family else None
    return isinstance(rule, Counting) and family is not None and family.arg_dims == (0,)


def in_probability(factor: Factor, name: str) -> Place:
    """The utility, or the log-odds, inside a probability."""
    graph, site = factor.graph, factor.name
    found = graph.known.get(("place", site, name))
    if found is None:
        found = graph.known["place", site, name] = inside(graph, graph.outputs[site, "arg:probs"], name) or ()
    if not found:
        raise Declined(f"the probability of '{site}' is no cumulative normal, nor logistic function of a sum")
    atom, law, slope = found
    return Place(with_output(factor, PLACE, atom), law, slope)


def inside(graph: Graph, probs: Atom, name: str) -> tuple[Variable, Law, float] | None:
    """The last value affine in a parameter from which alone a probability is computed, with its law and slope."""
    key = ("param", name)
    values = [v for equation in reversed(graph.slice([probs])) for v in equation.outputs]
    for value in (*values, graph.inputs[key]):
        real = jnp.issubdtype(value.aval.dtype, jnp.floating)
        if value is probs or not real or graph.reach([probs], [value])[1] & graph.keys.keys() - {value}:
            continue
        if key in graph.needs_of([value]) and not affine_atom(graph, value, [key]):
            law = law_between(graph, value, probs)
            return law and (value, *law)
    return None


def law_between(graph: Graph, value: Variable, probs: Atom) -> tuple[Law, float] | None:
    """Which function of a value a probability is, element by element, and of what multiple of it; None if of none."""
    if not isinstance(probs, Variable) or probs.shape != value.shape or not np.prod(value.shape, dtype=int):
        return None
    kind = value.aval.dtype
    drawn = np.random.default_rng(0).uniform(-1, 1, value.shape).astype(kind)

    def compared(drawn: Array) -> tuple[Array, Array]:
        """The slope at zero, and the largest error of each law with that slope, near zero and all over."""

        def probability(v: Array) -> Array:
            return graph.evaluate_atoms([probs], {}, {value: v})[0]

        rise = jax.jvp(probability, (jnp.zeros_like(drawn),), (jnp.ones_like(drawn),))[1].min()
        errors = []
        for spread in (NARROW, SPREAD):
            found = probability(spread * drawn)
            errors += [jnp.abs(found - f(spread * drawn * rise / d)).max() for _, f, d in FUNCTIONS]
        return rise, jnp.stack(errors)

    rise, errors = (np.asarray(x) for x in jit_once(compared)(drawn))
    digits = 1e2 * float(np.finfo(kind).eps)
    for i, (law, _, steepness) in enumerate(FUNCTIONS):
        near, far = errors[i], errors[i + len(FUNCTIONS)]
        if rise and near <= digits and far <= max(NEAR, digits):
            return law, float(rise) / steepness
    return None


__all__ = ["PLACE", "Place", "place_of", "with_output"]

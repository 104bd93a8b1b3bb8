r"""Rates that are sums of positive parameters: of Poisson counts, and of counts whose rate a Gamma variable multiplies.

In: a factor and a parameter. Out: `AbstractRate`, a rate with the two numbers of every cell that the multiplicative
update needs: the counts by unit of the rate, and the exposure; or `Declined`. A count that is Poisson has
:math:`y / \lambda` and 1. A negative binomial one is Poisson of rate :math:`\mu g` given
:math:`g \sim \mathrm{Gamma}(r, c)`, which is :math:`(r + y) / (c + \mu)` in expectation, so it has

.. math:: \frac{y}{\mu} \qquad\text{and}\qquad \frac{r + y}{c + \mu}.

References:
    Shepp and Vardi 1982; Dempster, Laird and Rubin 1977.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from autoem.graph.jaxpr import Atom, Equation, Graph, Variable
from autoem.m_step.closed_form.counting import fit
from autoem.m_step.closed_form.places import with_output
from autoem.m_step.problem import Params, Statistics, Use, cells_of
from autoem.passes.link import Declined
from autoem.passes.signs import refuse_curved

MIXED = ("NegativeBinomial2", "GammaPoisson")
KEEPS = ("reshape", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type", "copy", "copy_p")


@dataclasses.dataclass(frozen=True, eq=False)
class AbstractRate(abc.ABC):
    """A rate of a site's counts, which is an argument of its factor."""

    use: Use

    @property
    def key(self) -> str:
        return f"arg:{self.use.argument}"

    @property
    @abc.abstractmethod
    def fields(self) -> tuple[str, ...]:
        """The outputs of the site that it reads."""

    def value(self, values: Mapping[Any, Any]) -> Array:
        """The rate at every state and in every row."""
        return self.use.factor.argument(self.key, values)

    def known(self, params: Params, statistics: Statistics) -> Array | None:
        """The rate, if the E-step has handed it on."""
        del params, statistics
        return None

    def split(self, rate: Array, statistics: Any, values: Mapping[Any, Any]) -> tuple[Array, Array]:
        """Expected counts by unit of the rate, and the exposure, of every cell."""
        counts, times = self.counted(rate, statistics, values)
        # a count of zero asks for nothing, and one that no source may bring must not make the others infinite
        possible = (counts > 0) & (rate > 4 * jnp.finfo(rate.dtype).tiny * counts)
        share = jnp.where(possible, counts / jnp.where(possible, rate, 1), 0)
        return share, jnp.broadcast_to(times, rate.shape)

    @abc.abstractmethod
    def counted(self, rate: Array, statistics: Any, values: Mapping[Any, Any]) -> tuple[Array, Array]:
        """Expected counts and the exposure of every cell."""


@dataclasses.dataclass(frozen=True, eq=False)
class PoissonRate(AbstractRate):
    """The rate of a Poisson count."""

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.key,)

    def known(self, params: Params, statistics: Statistics) -> Array | None:
        """The rate is the log-normaliser of a Poisson site's cells."""
        cells = cells_of(self.use.factor, params, statistics)
        return None if cells is None else cells[1]

    def counted(self, rate: Array, statistics: Any, values: Mapping[Any, Any]) -> tuple[Array, Array]:
        t, n = statistics
        return fit(t[..., 0], rate.shape), fit(-n, rate.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class MixedRate(AbstractRate):
    """The mean of a negative binomial count, whose Gamma variable has the shape `concentration` and the rate `over`."""

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.key, "arg:over", "arg:concentration", "value")

    def counted(self, rate: Array, statistics: Any, values: Mapping[Any, Any]) -> tuple[Array, Array]:
        factor = self.use.factor
        shape, over = (factor.argument(f"arg:{a}", values) for a in ("concentration", "over"))
        y = jnp.asarray(factor.graph.evaluate([(factor.name, "value")], values)[0], rate.dtype)
        weight = jnp.broadcast_to(statistics, jnp.broadcast_shapes(jnp.shape(statistics), rate.shape, y.shape))
        times = weight * (shape + y) / (over + rate)
        return fit(weight * y, rate.shape), fit(times, rate.shape)


def rate_of(use: Use, name: str, values: Mapping[Any, Any]) -> AbstractRate:
    """The rate in which a parameter stands at the place `use`, affine in it by any JAX code.

    Raises:
        Declined: there is none.
    """
    factor = use.factor
    if factor.completions is not None:
        raise Declined(f"it enters {use} beside a continuous latent")
    if use.argument is not None and factor._family.name == "Poisson":
        rate: AbstractRate = PoissonRate(use)
    elif use.argument is None and factor.site.distribution in MIXED:
        rate = mixed_rate(use, name)
    elif use.argument is None:
        raise Declined(f"it enters the density of {use} as a whole")
    else:
        raise Declined(f"it enters {use}, which is no rate of a Poisson count")
    refuse_curved(lambda v: rate.value({**values, ("param", name): v}), jnp.asarray(values["param", name]))
    return rate


def mixed_rate(use: Use, name: str) -> MixedRate:
    """The mean that a negative binomial's `rate` divides something by.

    Raises:
        Declined: its rate is no such quotient, or the parameter enters elsewhere too.
    """
    factor, key = use.factor, ("param", name)
    graph = factor.graph
    if any(k[0] not in ("data", "key") for k in graph.needs((factor.name, "value"))):
        raise Declined(f"it enters {use}, whose counts are not data")
    found = quotient(graph, graph.outputs[factor.name, "arg:rate"])
    if found is None:
        raise Declined(
            f"it enters {use}, whose mean is not written out: NegativeBinomial2(mean=..., concentration=...)"
        )
    graph, mean, over = found
    factor = dataclasses.replace(factor, graph=graph)
    factor = with_output(with_output(factor, "mean", mean), "over", over)
    if key in factor.graph.needs((factor.name, "arg:over"), (factor.name, "arg:concentration")):
        raise Declined(f"it enters {use} elsewhere than in its mean")
    return MixedRate(Use(factor, "mean"))


def quotient(graph: Graph, atom: Atom) -> tuple[Graph, Atom, Atom] | None:
    """The divisor and the dividend of a value, brought to its shape as it was itself; None where it is no quotient."""
    equations: list[Equation] = []
    while isinstance(atom, Variable) and atom in graph.makers:
        equation = graph.equations[graph.makers[atom]]
        if equation.primitive.name == "div":
            over, under = equation.inputs
            if not isinstance(under, Variable) or under.shape != atom.shape:
                return None
            added, (over, under) = repeated(equations, (over, under), equation.outputs[0].shape)
            return dataclasses.replace(graph, equations=(*graph.equations, *added)), under, over
        if equation.primitive.name not in KEEPS:
            return None
        equations.insert(0, equation)
        atom = equation.inputs[0]
    return None


def repeated(
    equations: list[Equation], atoms: tuple[Atom, ...], shape: tuple[int, ...]
) -> tuple[list[Equation], tuple[Atom, ...]]:
    """The same equations on other values; those that are one number stay as they are."""
    added, out = [], []
    for atom in atoms:
        now = atom.shape if isinstance(atom, Variable) else jnp.shape(atom.value)
        for equation in equations if now == shape else ():
            result = Variable(equation.outputs[0].aval)
            added.append(Equation(equation.primitive, (atom, *equation.inputs[1:]), (result,), equation.params))
            atom = result
        out.append(atom)
    return added, tuple(out)


__all__ = ["AbstractRate", "MixedRate", "PoissonRate", "rate_of"]

r"""The laws of a mean field's continuous latents, found from slopes of the expected log joint.

Under the other groups' laws the log joint of one cell is :math:`J(u) = \sum_j a_j\, t_j(u) + c` with the statistics `t`
of a conjugate form (see `conjugate`), plus the scalar Gaussian's. In: slopes `J'(u)` at one or two points, which are
linear in the coefficients `a`. Out: the law, its nodes, and its entropy

.. math:: H = \log \int \exp(a \cdot t(u))\, du - a \cdot \mathrm{E}[t(u)].

References:
    Diaconis and Ylvisaker 1979; Winn and Bishop 2005, "Variational message passing".
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from autoem.e_step.cells.conjugate import (
    BetaForm,
    BetaNatural,
    DirichletForm,
    DirichletNatural,
    GammaForm,
    GammaNatural,
    matrix,
)


class NormalNatural(NamedTuple):
    """Mean and precision."""

    mean: Array
    precision: Array


@dataclasses.dataclass(frozen=True)
class NormalForm:
    """`h u - P u^2 / 2` on the real numbers, in the terms of `conjugate.AbstractForm`."""

    name = "Normal"

    def value(self, natural: NormalNatural, x: Array, axis: int) -> Array:
        mean, precision = (jnp.expand_dims(a, axis) for a in natural)
        return -0.5 * precision * (x - mean) ** 2

    def log_integral(self, natural: NormalNatural) -> Array:
        return 0.5 * (math.log(2 * math.pi) - jnp.log(natural.precision))

    def nodes(self, natural: NormalNatural, axis: int) -> Array:
        spread = 1 / jnp.sqrt(natural.precision)
        return jnp.stack([natural.mean - spread, natural.mean + spread], axis)

    def moments(self, natural: NormalNatural) -> tuple[Array, Array]:
        return natural.mean, matrix(1 / natural.precision)

    def sample(self, key: Array, natural: NormalNatural) -> Array:
        return natural.mean + jax.random.normal(key, natural.mean.shape) / jnp.sqrt(natural.precision)


class AbstractLaw(abc.ABC):
    """A family of laws `q(u)` of every cell; arrays are `(*cells, *event)`."""

    support = ""
    event_dim = 0
    form: Any

    @abc.abstractmethod
    def start(self, key: Array, shape: tuple[int, ...]) -> Any:
        """A broad law, a little different in every cell."""

    @abc.abstractmethod
    def points(self, natural: Any) -> tuple[Array, ...]:
        """Where the slopes are taken, near the law that was."""

    @abc.abstractmethod
    def solve(self, points: tuple[Array, ...], slopes: tuple[Array, ...]) -> Any:
        """The law whose log density has these slopes at these points."""

    def nodes(self, natural: Any) -> Array:
        """Equally weighted values, along the first axis, at which the statistics average to their expectations."""
        return self.form.nodes(natural, 0)

    def value(self, natural: Any, x: Array) -> Array:
        """Log density at `x`, up to a constant for each cell."""
        return self.form.value(natural, x[None], 0)[0]

    def entropy(self, natural: Any) -> Array:
        """Sum of the entropies of all cells, in nats."""
        expected = self.form.value(natural, self.nodes(natural), 0).mean(0)
        return (self.form.log_integral(natural) - expected).sum()

    def proper(self, natural: Any) -> Array:
        """Whether every cell's law has a finite integral."""
        return jnp.all(jnp.isfinite(self.form.log_integral(natural)))


def noise(key: Array, shape: tuple[int, ...]) -> Array:
    """Numbers about one."""
    return jax.random.gamma(key, 100.0, shape) / 100


@dataclasses.dataclass(frozen=True)
class GammaLaw(AbstractLaw):
    """Gamma; with `inverse`, inverse Gamma."""

    inverse: bool = False
    support = "positive"

    @property
    def form(self) -> GammaForm:  # type: ignore[override]
        return GammaForm(self.inverse)

    def start(self, key: Array, shape: tuple[int, ...]) -> GammaNatural:
        one = jnp.ones(shape)
        return GammaNatural(2 * noise(key, shape), one, one, 0 * one)

    def points(self, natural: GammaNatural) -> tuple[Array, ...]:
        shape, rate = natural.shape, natural.rate
        centre = rate / shape if self.inverse else shape / rate
        centre = jnp.where(jnp.isfinite(centre) & (centre > 0), centre, 1.0)
        return centre, 2 * centre

    def solve(self, points: tuple[Array, ...], slopes: tuple[Array, ...]) -> GammaNatural:
        first, second = (u * g for u, g in zip(points, slopes, strict=True))  # by log u: a - b u, or b / u - a
        one = jnp.ones_like(first)
        if self.inverse:
            scaled = 2 * (first - second)
            return GammaNatural(scaled - first - 1, scaled * points[0], one, 0 * one)
        scaled = first - second
        return GammaNatural(first + scaled + 1, scaled / points[0], one, 0 * one)

    def proper(self, natural: GammaNatural) -> Array:
        return jnp.all((natural.shape > 0) & (natural.rate > 0))


@dataclasses.dataclass(frozen=True)
class BetaLaw(AbstractLaw):
    """Beta."""

    support = "unit"
    form = BetaForm()

    def start(self, key: Array, shape: tuple[int, ...]) -> BetaNatural:
        first, second = (noise(k, shape) for k in jax.random.split(key))
        return BetaNatural(first, second, jnp.zeros(shape))

    def points(self, natural: BetaNatural) -> tuple[Array, ...]:
        return jnp.full_like(natural.first, 0.25), jnp.full_like(natural.first, 0.75)

    def solve(self, points: tuple[Array, ...], slopes: tuple[Array, ...]) -> BetaNatural:
        low, high = slopes  # 4 a - 4 b / 3, and 4 a / 3 - 4 b
        scale = 16 - 16 / 9
        first, second = (4 * low - 4 / 3 * high) / scale, (4 / 3 * low - 4 * high) / scale
        return BetaNatural(first + 1, second + 1, jnp.zeros_like(first))

    def proper(self, natural: BetaNatural) -> Array:
        return jnp.all((natural.first > 0) & (natural.second > 0))


@dataclasses.dataclass(frozen=True)
class DirichletLaw(AbstractLaw):
    """Dirichlet."""

    support = "simplex"
    event_dim = 1
    form = DirichletForm()

    def start(self, key: Array, shape: tuple[int, ...]) -> DirichletNatural:
        return DirichletNatural(noise(key, shape), jnp.zeros(shape[:-1]))

    def points(self, natural: DirichletNatural) -> tuple[Array, ...]:
        return (jnp.full_like(natural.concentration, 1 / natural.concentration.shape[-1]),)

    def solve(self, points: tuple[Array, ...], slopes: tuple[Array, ...]) -> DirichletNatural:
        powers = points[0] * slopes[0]
        return DirichletNatural(powers + 1, jnp.zeros_like(powers[..., 0]))

    def proper(self, natural: DirichletNatural) -> Array:
        return jnp.all(natural.concentration > 0)


@dataclasses.dataclass(frozen=True)
class NormalLaw(AbstractLaw):
    """Normal, of numbers."""

    support = "real"
    form = NormalForm()

    def start(self, key: Array, shape: tuple[int, ...]) -> NormalNatural:
        return NormalNatural(0.1 * jax.random.normal(key, shape), jnp.ones(shape))

    def points(self, natural: NormalNatural) -> tuple[Array, ...]:
        return natural.mean, natural.mean + 1 / jnp.sqrt(natural.precision)

    def solve(self, points: tuple[Array, ...], slopes: tuple[Array, ...]) -> NormalNatural:
        precision = (slopes[0] - slopes[1]) / (points[1] - points[0])
        return NormalNatural(points[0] + slopes[0] / precision, precision)

    def proper(self, natural: NormalNatural) -> Array:
        return jnp.all(natural.precision > 0)


LAWS: tuple[AbstractLaw, ...] = (GammaLaw(), GammaLaw(inverse=True), BetaLaw(), DirichletLaw(), NormalLaw())

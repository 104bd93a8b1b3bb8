r"""Conjugate forms: log joints of one latent whose integral is the normaliser of a known law.

A form is recognised by what the log joint *is*, not by the names of its sites: it is evaluated at a few points, which
give its coefficients, and at others, which must agree. So a Gamma latent may be read by a Poisson, an Exponential, a
Gamma or a Normal through its precision, with any arguments beside it:

=========== ==================================== =======================
form        log joint                            nodes reproduce
=========== ==================================== =======================
Gamma       :math:`a \log u - b u + c`           E[u], E[log u]
InverseGamma :math:`-a \log v - b / v + c`       E[1/v], E[log v]
Beta        :math:`a \log p + b \log(1 - p) + c` E[log p], E[log(1 - p)]
Dirichlet   :math:`\sum_k a_k \log p_k + c`      E[log p]
=========== ==================================== =======================

The nodes are those values, equally likely, at which the statistics average to their posterior expectations, so that the
M-step is exact.

References:
    Diaconis and Ylvisaker 1979, "Conjugate priors for exponential families".
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import gammaln

from autoem.e_step.cells.local import AbstractMethod, CellPosterior, Cells, LocalBlock, Points
from autoem.ir import Continuous

SOURCE = "Diaconis and Ylvisaker 1979 (conjugate posteriors)"
LOG2, LOG3_2 = math.log(2), math.log(1.5)


@functools.partial(jax.jit, inline=True)
def gap(x: Array) -> Array:
    """`digamma(x) - log(x)`, which cancels for large `x`: its recurrence eight times, then Stirling's series."""
    y = x + 8
    square = 1 / (y * y)
    series = square * (1 / 240 - square * (1 / 132 - square * (691 / 32760 - square / 12)))
    series = square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - series)))
    steps = sum((2 * x + 7) / ((x + i) * (x + 7 - i)) for i in range(4))  # 1 / (x + i), in pairs
    return jnp.log1p(8 / x) - steps - 0.5 / y - series


def matrix(variance: Array) -> Array:
    return variance[..., None, None]


class AbstractForm(abc.ABC):
    """A parametric shape of the log joint; `natural` are its coefficients, arrays `(*states or 1s, *cells)`."""

    name = ""
    support = ""

    @abc.abstractmethod
    def points(self, anchor: Array, event: tuple[int, ...]) -> Array:
        """Where the log joint is evaluated, `(*states or 1s, points, *cells, *event)`."""

    @abc.abstractmethod
    def solve(self, anchor: Array, joint: Array, axis: int) -> Any:
        """The coefficients, from the log joint at the points, which lie along `axis`."""

    @abc.abstractmethod
    def value(self, natural: Any, x: Array, axis: int) -> Array:
        """The log joint at any points."""

    @abc.abstractmethod
    def log_integral(self, natural: Any) -> Array: ...

    @abc.abstractmethod
    def nodes(self, natural: Any, axis: int) -> Array:
        """Equally weighted values, along `axis`."""

    @abc.abstractmethod
    def reference(self, anchor: Array, x: Array) -> Array:
        """The log density of some law of this form, for cells that a mask takes out."""

    @abc.abstractmethod
    def moments(self, natural: Any) -> tuple[Array, Array]:
        """Posterior mean, and covariance `(..., d, d)`."""

    @abc.abstractmethod
    def sample(self, key: Array, natural: Any) -> Array: ...


class GammaNatural(NamedTuple):
    """Shape and rate of `u / anchor`, and the log joint's constant."""

    shape: Array
    rate: Array
    anchor: Array
    constant: Array


@dataclasses.dataclass(frozen=True)
class GammaForm(AbstractForm):
    """`a log u - b u + c` on the positive numbers; with `inverse`, of `u = 1 / v`."""

    inverse: bool = False
    support = "positive"

    @property
    def name(self) -> str:  # type: ignore[override]
        return "InverseGamma" if self.inverse else "Gamma"

    def points(self, anchor: Array, event: tuple[int, ...]) -> Array:
        return jnp.stack([anchor, 2 * anchor, 0.5 * anchor])

    def solve(self, anchor: Array, joint: Array, axis: int) -> GammaNatural:
        at, double, half = (jnp.take(joint, i, axis) for i in ((0, 2, 1) if self.inverse else (0, 1, 2)))
        rate = -2 * ((double - at) + (half - at))
        power = ((double - at) + rate) / LOG2
        return GammaNatural(power - 1 if self.inverse else power + 1, rate, anchor, at + rate)

    def _power(self, natural: Any) -> Array:
        return natural.shape + 1 if self.inverse else natural.shape - 1

    def value(self, natural: Any, x: Array, axis: int) -> Array:
        power, rate, anchor, constant = (
            jnp.expand_dims(a, axis) for a in (self._power(natural), natural.rate, natural.anchor, natural.constant)
        )
        u = anchor / x if self.inverse else x / anchor
        return power * jnp.log(u) - rate * u + constant

    def log_integral(self, natural: Any) -> Array:
        # of u / anchor against du, or against dv = anchor du / u^2
        volume = gammaln(natural.shape) - natural.shape * jnp.log(natural.rate)
        return natural.constant + volume + jnp.log(natural.anchor)

    def nodes(self, natural: Any, axis: int) -> Array:
        shape = natural.shape
        mean = shape / natural.rate
        double_gap = 2 * gap(shape)  # log of (geometric mean over mean) squared
        spread = jnp.sqrt(-jnp.expm1(double_gap))
        far = 1 + spread
        near = jnp.exp(double_gap) / far  # 1 - spread, without cancellation
        tiny = jnp.finfo(shape.dtype).tiny
        u = [jnp.maximum(mean * f, tiny) for f in (far, near)]
        x = [natural.anchor / v if self.inverse else natural.anchor * v for v in u]
        return jnp.stack(x, axis)

    def reference(self, anchor: Array, x: Array) -> Array:
        u = anchor / x if self.inverse else x / anchor
        return 2 * jnp.log(u) - u

    def moments(self, natural: Any) -> tuple[Array, Array]:
        shape, rate, anchor = natural.shape, natural.rate, natural.anchor
        if not self.inverse:
            return anchor * shape / rate, matrix(anchor**2 * shape / rate**2)
        mean = jnp.where(shape > 1, anchor * rate / jnp.where(shape > 1, shape - 1, 1), jnp.inf)
        return mean, matrix(jnp.where(shape > 2, mean**2 / jnp.where(shape > 2, shape - 2, 1), jnp.inf))

    def sample(self, key: Array, natural: Any) -> Array:
        u = jax.random.gamma(key, natural.shape) / natural.rate
        return natural.anchor / u if self.inverse else natural.anchor * u


class BetaNatural(NamedTuple):
    first: Array
    second: Array
    constant: Array


@dataclasses.dataclass(frozen=True)
class BetaForm(AbstractForm):
    """`a log p + b log(1 - p) + c` between zero and one."""

    name = "Beta"
    support = "unit"

    def points(self, anchor: Array, event: tuple[int, ...]) -> Array:
        return jnp.stack([jnp.full_like(anchor, p) for p in (0.25, 0.5, 0.75)])

    def solve(self, anchor: Array, joint: Array, axis: int) -> BetaNatural:
        low, half, high = (jnp.take(joint, i, axis) for i in range(3))
        low, high = low - half, high - half  # -a log 2 + b log 1.5, and the reverse
        scale = 1 / (LOG2**2 - LOG3_2**2)
        first, second = -scale * (LOG2 * low + LOG3_2 * high), -scale * (LOG3_2 * low + LOG2 * high)
        return BetaNatural(first + 1, second + 1, half + (first + second) * LOG2)

    def value(self, natural: Any, x: Array, axis: int) -> Array:
        first, second, constant = (jnp.expand_dims(a, axis) for a in natural)
        return (first - 1) * jnp.log(x) + (second - 1) * jnp.log1p(-x) + constant

    def log_integral(self, natural: Any) -> Array:
        a, b, constant = natural
        return constant + gammaln(a) + gammaln(b) - gammaln(a + b)

    def nodes(self, natural: Any, axis: int) -> Array:
        r"""Roots of :math:`p^2 - (1 + P - R) p + P` with `log P = 2 E[log p]` and `log R = 2 E[log(1 - p)]`.

        Written about the mean, so that nothing cancels where the posterior is narrow.
        """
        a, b, _ = natural
        mean, rest, total = a / (a + b), b / (a + b), gap(a + b)
        left, right = 2 * (gap(a) - total), 2 * (gap(b) - total)
        e, f = jnp.expm1(left), jnp.expm1(right)
        shift = mean**2 * e - rest**2 * f
        spread = jnp.sqrt(jnp.maximum(shift**2 - 4 * mean * rest * (mean * e + rest * f), 0))
        product, other = mean**2 * jnp.exp(left), rest**2 * jnp.exp(right)
        info = jnp.finfo(a.dtype)
        far, far_rest = 0.5 * (2 * mean + shift + spread), 0.5 * (2 * rest - shift + spread)
        # each root from the side on which it does not cancel: the near one is the product over the far one
        low = jnp.clip(jnp.where(far > 0, product / far, 0), info.tiny, 1 - info.epsneg)
        high = jnp.where(far < 0.5, far, 1 - other / jnp.maximum(far_rest, info.tiny))
        return jnp.stack([low, jnp.clip(high, info.tiny, 1 - info.epsneg)], axis)

    def reference(self, anchor: Array, x: Array) -> Array:
        return jnp.log(x) + jnp.log1p(-x)

    def moments(self, natural: Any) -> tuple[Array, Array]:
        a, b, _ = natural
        mean = a / (a + b)
        return mean, matrix(mean * (1 - mean) / (a + b + 1))

    def sample(self, key: Array, natural: Any) -> Array:
        return jax.random.beta(key, natural.first, natural.second)


class DirichletNatural(NamedTuple):
    """Concentrations along the last axis."""

    concentration: Array
    constant: Array


@dataclasses.dataclass(frozen=True)
class DirichletForm(AbstractForm):
    """`sum_k a_k log p_k + c` on the simplex."""

    name = "Dirichlet"
    support = "simplex"

    def points(self, anchor: Array, event: tuple[int, ...]) -> Array:
        (k,) = event
        weights = jnp.concatenate([jnp.ones((1, k)), jnp.ones((k, k)) + jnp.eye(k)])
        shares = weights / weights.sum(-1, keepdims=True)
        return jnp.broadcast_to(shares.reshape(k + 1, *(1,) * anchor.ndim, k), (k + 1, *anchor.shape, k))

    def solve(self, anchor: Array, joint: Array, axis: int) -> DirichletNatural:
        moved = jnp.moveaxis(joint, axis, 0)
        centre, rises, k = moved[0], moved[1:] - moved[0], moved.shape[0] - 1
        # doubling one weight of k raises a_k log 2, and lowers all by log((k + 1) / k)
        drop = math.log((k + 1) / k)
        total = rises.sum(0) / (LOG2 - k * drop)
        powers = jnp.moveaxis((rises + drop * total) / LOG2, 0, -1)
        return DirichletNatural(powers + 1, centre + total * math.log(k))

    def value(self, natural: Any, x: Array, axis: int) -> Array:
        powers = jnp.expand_dims(natural.concentration - 1, axis)
        return (powers * jnp.log(x)).sum(-1) + jnp.expand_dims(natural.constant, axis)

    def log_integral(self, natural: Any) -> Array:
        a = natural.concentration
        return natural.constant + gammaln(a).sum(-1) - gammaln(a.sum(-1))

    def nodes(self, natural: Any, axis: int) -> Array:
        a = natural.concentration
        total = a.sum(-1, keepdims=True)
        share = a / total * jnp.exp(gap(a) - gap(total))  # sums to less than one, which no site's logarithms mind
        return jnp.expand_dims(jnp.maximum(share, jnp.finfo(a.dtype).tiny), axis)

    def reference(self, anchor: Array, x: Array) -> Array:
        return jnp.log(x).sum(-1)

    def moments(self, natural: Any) -> tuple[Array, Array]:
        a = natural.concentration
        mean, total = a / a.sum(-1, keepdims=True), a.sum(-1)[..., None, None]
        spread = jnp.eye(a.shape[-1]) * mean[..., :, None] - mean[..., :, None] * mean[..., None, :]
        return mean, spread / (total + 1)

    def sample(self, key: Array, natural: Any) -> Array:
        return jax.random.dirichlet(key, natural.concentration)


FORMS: tuple[AbstractForm, ...] = (GammaForm(), GammaForm(inverse=True), BetaForm(), DirichletForm())


@dataclasses.dataclass(frozen=True)
class Conjugate(AbstractMethod):
    """One latent whose log joint in every cell has a form."""

    form: AbstractForm
    source = SOURCE

    def found(self, cells: Cells) -> Any:
        """The coefficients of every cell."""
        (member,) = cells.block.members
        anchor = jnp.squeeze(anchor_of(cells, member), cells.count)
        points = jnp.moveaxis(self.form.points(anchor, member.event), 0, cells.count)
        joint = cells.joint({member.name: points})
        if (present := cells.present) is not None:
            joint = jnp.where(present, joint, self.form.reference(jnp.expand_dims(anchor, cells.count), points))
        return self.form.solve(anchor, joint, cells.count)

    def integrate(self, cells: Cells) -> CellPosterior:
        (member,), at = cells.block.members, cells.count
        natural = self.found(cells)
        nodes = self.form.nodes(natural, at)
        integral = self.form.log_integral(natural)
        if (present := cells.present) is not None:
            anchor = anchor_of(cells, member)
            alone = jnp.moveaxis(self.form.points(jnp.squeeze(anchor, at), member.event)[:1], 0, at)
            flat = cells.joint({member.name: alone})
            integral = jnp.where(jnp.squeeze(present, at), integral, jnp.squeeze(flat, at))
        count = nodes.shape[at]
        weights = jnp.full((*(1,) * at, count, *(1,) * len(cells.block.shape)), 1 / count)
        return CellPosterior(integral, {member.name: nodes}, weights, natural, at)

    def value(self, cells: Cells, points: Points) -> Array:
        (member,) = cells.block.members
        value = self.form.value(self.found(cells), points[member.name], cells.count)
        present = cells.present
        return value if present is None else jnp.where(present, value, cells.joint(points))

    def reason(self, block: LocalBlock) -> str:
        readers = [f for f in block.factors if f.name not in block.names]
        names = ", ".join(dict.fromkeys(f"{f.site.distribution} '{f.name}'" for f in readers))
        return f"conjugate: given {names or 'nothing but its prior'}, its posterior in every cell is {self.form.name}"

    def mean(self, posterior: CellPosterior) -> dict[str, Array]:
        return {n: self.form.moments(posterior.natural)[0] for n in posterior.nodes}

    def covariance(self, posterior: CellPosterior) -> dict[str, Array]:
        return {n: self.form.moments(posterior.natural)[1] for n in posterior.nodes}

    def sample(self, key: Array, posterior: CellPosterior) -> dict[str, Array]:
        return {n: self.form.sample(key, posterior.natural) for n in posterior.nodes}


def anchor_of(cells: Cells, member: Continuous) -> Array:
    """A typical positive value of each cell under the prior, `(*states or 1s, 1, *cells)`; one where none is known."""
    concentration, rate = cells.argument(member, "concentration"), cells.argument(member, "rate")
    anchor = cells.argument(member, "df")
    if rate is not None:
        anchor = 1 / rate if concentration is None else concentration / rate
        if concentration is not None and is_inverse(cells, member):
            anchor = rate / concentration
    anchor = jnp.ones((1,) * (cells.count + 1 + len(cells.block.shape))) if anchor is None else anchor
    anchor = jnp.where(jnp.isfinite(anchor) & (anchor > 0), anchor, 1.0)
    lead = anchor.shape[: cells.count + 1]
    return jnp.broadcast_to(anchor, (*lead, *cells.block.shape))


def is_inverse(cells: Cells, member: Continuous) -> bool:
    return next(f for f in cells.block.factors if f.name == member.name).site.distribution == "InverseGamma"

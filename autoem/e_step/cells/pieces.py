r"""Truncated and censored latents: a known law cut at thresholds.

Where a site reads a latent through comparisons alone, its density is a step function: constant, :math:`s_i`, between
the thresholds :math:`t_1 \le \dots \le t_m` of a cell. All else that is known of the latent is a `Base`, whose masses
:math:`M_i` between thresholds, and moments there, have formulas, so that the integral is
:math:`\log \sum_i e^{s_i} M_i`. Censoring, rounding, interval censoring and the latent utility of a probit are of this
kind. Nodes are two for every piece, at its mean plus and minus its standard deviation.

References:
    Tobin 1958; Turnbull 1976 (censored data); Johnson, Kotz and Balakrishnan 1994, section 10.1 (truncated moments).
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import log_ndtr

from autoem.e_step.cells.local import AbstractMethod, CellPosterior, Cells, LocalBlock, Points
from autoem.e_step.elimination.reductions import log_sum_exp
from autoem.ir import Continuous
from autoem.passes.thresholds import Comparison

LOG_2PI = math.log(2 * math.pi)
TAIL = 80.0  # twice the logarithm of what is left out beyond a bounded piece
GAUSS = np.polynomial.legendre.leggauss(64)
PLACES, SHARES = 0.5 * (GAUSS[0] + 1), 0.5 * GAUSS[1]
FAR = 1e8


class Slice(NamedTuple):
    """Log mass of a piece, its mean and its standard deviation."""

    log_mass: Array
    mean: Array
    deviation: Array


@jax.custom_jvp
def tail(z: Array) -> tuple[Array, Array]:
    """Log mass of the standard normal above `z`, and the hazard there minus `z`; nothing cancels at any distance.

    Derivatives of every order are made of the two again: those of the continued fraction are long programs.
    """
    far = jnp.maximum(z, 5.0)
    rest = jnp.zeros_like(far)
    for n in range(60, 1, -1):  # the continued fraction of Mills' ratio, 1 / (z + 1 / (z + 2 / (z + ...)))
        rest = n / (far + rest)
    excess_far = 1 / (far + rest)
    mass_far = -0.5 * far**2 - 0.5 * LOG_2PI - jnp.log(far + excess_far)
    near = jnp.clip(z, -FAR, 5.0)
    mass_near = log_ndtr(-near)
    excess_near = jnp.exp(-0.5 * near**2 - 0.5 * LOG_2PI - mass_near) - near
    return jnp.where(z > 5, mass_far, mass_near), jnp.where(z > 5, excess_far, excess_near)


@tail.defjvp
def _(primals, tangents):
    (z,), (dz,) = primals, tangents
    log_mass, excess = tail(z)
    hazard = z + excess
    return (log_mass, excess), (-hazard * dz, (hazard * excess - 1) * dz)


def upper_tail(z: Array) -> Slice:
    """The standard normal above `z`."""
    log_mass, excess = tail(z)
    mean = z + excess
    return Slice(log_mass, mean, jnp.sqrt(jnp.maximum(1 - mean * excess, 0)))


def between(low: Array, high: Array) -> Slice:
    """The standard normal between two bounds, by a rule on that part of it that has any mass to speak of."""
    turned = low + high < 0
    a, b = jnp.where(turned, -high, low), jnp.where(turned, -low, high)
    a = jnp.clip(a, -math.sqrt(TAIL), FAR)
    top = jnp.maximum(a, 0)
    reach = jnp.where(a > 0, TAIL / (top + jnp.sqrt(top**2 + TAIL)), math.sqrt(TAIL) - a)
    empty = b <= a  # of which all that is told must have derivatives
    width = jnp.where(empty, 1.0, jnp.minimum(b - a, reach))
    shape = (-1, *(1,) * a.ndim)
    at, share = jnp.asarray(PLACES, a.dtype).reshape(shape), jnp.asarray(SHARES, a.dtype).reshape(shape)
    z = a + width * at
    density = share * jnp.exp(-0.5 * (z - top) * (z + top))
    total = density.sum(0)
    offset = (density * at).sum(0) / total
    spread = (density * (at - offset) ** 2).sum(0) / total
    mean = a + width * offset
    log_mass = jnp.log(width) + jnp.log(total) - 0.5 * top**2 - 0.5 * LOG_2PI
    log_mass = jnp.where(empty, -jnp.inf, log_mass)
    return Slice(log_mass, jnp.where(turned, -mean, mean), width * jnp.sqrt(spread))


class AbstractBase(abc.ABC):
    """What is known of the latent but for the comparisons; `natural` are its coefficients, a cell each."""

    name = ""
    prior = ""

    @abc.abstractmethod
    def points(self, anchor: Array, scale: Array, axis: int) -> Array:
        """Where the smooth part is evaluated, along `axis`."""

    @abc.abstractmethod
    def solve(self, anchor: Array, scale: Array, joint: Array, axis: int) -> Any: ...

    @abc.abstractmethod
    def value(self, natural: Any, x: Array) -> Array: ...

    @abc.abstractmethod
    def slices(self, natural: Any, edges: list[Array]) -> Slice:
        """The pieces between thresholds, stacked along the first axis."""

    @abc.abstractmethod
    def inner(self, edges: list[Array], scale: Array) -> list[Array]:
        """A point inside every piece."""

    def reference(self, anchor: Array, scale: Array, x: Array) -> Array:
        """The log density of some law of this form, for cells that a mask takes out."""
        return -0.5 * ((x - anchor) / scale) ** 2

    def draw(self, natural: Any, low: Array, high: Array, uniform: Array) -> Array:
        raise NotImplementedError


class NormalNatural(NamedTuple):
    loc: Array
    scale: Array
    peak: Array


class NormalBase(AbstractBase):
    """A quadratic on the real line."""

    name, prior = "Normal", "Normal"

    def points(self, anchor: Array, scale: Array, axis: int) -> Array:
        return jnp.concatenate([anchor - scale, anchor, anchor + scale], axis)

    def solve(self, anchor: Array, scale: Array, joint: Array, axis: int) -> NormalNatural:
        low, at, high = (jnp.take(joint, jnp.arange(i, i + 1), axis) for i in range(3))
        precision, slope = (at - low) + (at - high), 0.5 * (high - low)
        loc = anchor + scale * slope / precision
        return NormalNatural(loc, scale / jnp.sqrt(precision), at + 0.5 * slope**2 / precision)

    def value(self, natural: NormalNatural, x: Array) -> Array:
        return natural.peak - 0.5 * ((x - natural.loc) / natural.scale) ** 2

    def slices(self, natural: NormalNatural, edges: list[Array]) -> Slice:
        z = [jnp.clip((e - natural.loc) / natural.scale, -FAR, FAR) for e in edges]
        below = upper_tail(-z[0])
        parts = [Slice(below.log_mass, -below.mean, below.deviation)]
        parts += [between(a, b) for a, b in itertools.pairwise(z)]
        mass, mean, deviation = (jnp.stack(p) for p in zip(*parts, upper_tail(z[-1]), strict=True))
        whole = natural.peak + jnp.log(natural.scale) + 0.5 * LOG_2PI
        return Slice(mass + whole, natural.loc + natural.scale * mean, natural.scale * deviation)

    def inner(self, edges: list[Array], scale: Array) -> list[Array]:
        ends = [e + sign * (scale + jnp.abs(e)) for e, sign in ((edges[0], -1), (edges[-1], 1))]
        middle = [0.5 * a + 0.5 * b for a, b in itertools.pairwise(edges)]
        return [ends[0], *middle, ends[1]]

    def draw(self, natural: NormalNatural, low: Array, high: Array, uniform: Array) -> Array:
        """By the distribution function between two bounds, tabulated where there is mass."""
        a, b = (jnp.clip((e - natural.loc) / natural.scale, -FAR, FAR) for e in (low, high))
        turned = a + b < 0
        a, b = jnp.where(turned, -b, a), jnp.where(turned, -a, b)
        a = jnp.maximum(a, -math.sqrt(TAIL))
        top = jnp.maximum(a, 0)
        reach = jnp.where(a > 0, TAIL / (top + jnp.sqrt(top**2 + TAIL)), math.sqrt(TAIL) - a)
        width = jnp.minimum(b - a, reach)[..., None]
        at = jnp.linspace(0, 1, 2001)
        z = a[..., None] + width * at
        density = jnp.exp(-0.5 * (z - top[..., None]) * (z + top[..., None]))
        steps = 0.5 * (density[..., 1:] + density[..., :-1])
        total = jnp.concatenate([jnp.zeros_like(steps[..., :1]), jnp.cumsum(steps, -1)], -1)
        share = jnp.vectorize(lambda u, t: jnp.interp(u * t[-1], t, at), signature="(),(k)->()")(uniform, total)
        x = a + width[..., 0] * share
        return natural.loc + natural.scale * jnp.where(turned, -x, x)


class ExponentialNatural(NamedTuple):
    rate: Array
    constant: Array


class ExponentialBase(AbstractBase):
    """A falling line on the positive numbers."""

    name, prior = "Exponential", "Exponential"

    def points(self, anchor: Array, scale: Array, axis: int) -> Array:
        return jnp.concatenate([scale, 2 * scale], axis)

    def solve(self, anchor: Array, scale: Array, joint: Array, axis: int) -> ExponentialNatural:
        once, twice = (jnp.take(joint, jnp.arange(i, i + 1), axis) for i in range(2))
        fall = once - twice
        return ExponentialNatural(fall / scale, once + fall)

    def value(self, natural: ExponentialNatural, x: Array) -> Array:
        return natural.constant - natural.rate * x

    def slices(self, natural: ExponentialNatural, edges: list[Array]) -> Slice:
        rate = natural.rate
        starts = [jnp.zeros_like(edges[0]), *(jnp.maximum(e, 0) for e in edges)]
        parts = []
        for a, b in itertools.pairwise(starts):
            empty = b <= a
            w = rate * jnp.where(empty, 1.0, b - a)
            small = w < 1e-2
            safe = jnp.where(small, 1.0, jnp.minimum(w, 700.0))
            mean = jnp.where(small, w * (0.5 - w / 12 * (1 - w**2 / 60)), 1 - safe / jnp.expm1(safe))
            square = jnp.where(small, w**2 / 12 * (1 - w**2 / 20), 1 - safe**2 / (4 * jnp.sinh(safe / 2) ** 2))
            log_mass = jnp.where(empty, -jnp.inf, -rate * a + jnp.log(-jnp.expm1(-w)))
            parts.append(Slice(log_mass, a + mean / rate, jnp.sqrt(square) / rate))
        last = starts[-1]
        parts.append(Slice(-rate * last, last + 1 / rate, jnp.broadcast_to(1 / rate, jnp.shape(last + rate))))
        mass, mean, deviation = (jnp.stack(jnp.broadcast_arrays(*p)) for p in zip(*parts, strict=True))
        return Slice(mass + natural.constant - jnp.log(rate), mean, deviation)

    def inner(self, edges: list[Array], scale: Array) -> list[Array]:
        starts = [jnp.zeros_like(edges[0]), *(jnp.maximum(e, 0) for e in edges)]
        middle = [0.5 * a + 0.5 * b for a, b in itertools.pairwise(starts)]
        return [*middle, 2 * starts[-1] + scale]

    def reference(self, anchor: Array, scale: Array, x: Array) -> Array:
        return -x / scale

    def draw(self, natural: ExponentialNatural, low: Array, high: Array, uniform: Array) -> Array:
        low = jnp.maximum(low, 0)
        return low - jnp.log1p(uniform * jnp.expm1(-natural.rate * (high - low))) / natural.rate


BASES: dict[str, AbstractBase] = {b.prior: b for b in (NormalBase(), ExponentialBase())}


class Cut(NamedTuple):
    """What the integral was found to be made of."""

    natural: Any
    slices: Slice
    edges: tuple[Array, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces(AbstractMethod):
    """A `base` cut by comparisons; `order[i]` names the index that sorts the i-th comparison's elements by cell."""

    base: AbstractBase
    comparisons: tuple[Comparison, ...]
    order: tuple[str, ...]
    source = "Tobin 1958; Turnbull 1976; Johnson, Kotz and Balakrishnan 1994, section 10.1 (truncated moments)"

    @property
    def stepped(self) -> frozenset[str]:
        """Sites that read the latent through comparisons alone."""
        return frozenset(c.site for c in self.comparisons)

    def edges(self, cells: Cells) -> list[Array]:
        """Thresholds of every cell in ascending order, each `(*1s, 1, *cells)`."""
        (member,) = cells.block.members
        pairs = zip(self.comparisons, self.order, strict=True)
        found = [t for c, name in pairs for t in self.of(c, name, member, cells)]
        ordered = jnp.sort(jnp.stack(found), 0) if len(found) > 1 else jnp.stack(found)
        return [e.reshape(*(1,) * (cells.count + 1), *cells.block.shape) for e in ordered]

    def of(self, c: Comparison, name: str, member: Continuous, cells: Cells) -> list[Array]:
        """Where one comparison changes its mind: the root of the difference of its sides."""
        f = next(f for f in cells.block.factors if f.name == c.site)
        shape, dtype = f.graph.inputs["latent", member.name].shape, jnp.result_type(float)
        trials = [{**cells.values, ("latent", member.name): jnp.full(shape, v, dtype)} for v in (0.0, 1.0)]
        sides = [f.graph.evaluate_atoms([c.left, c.right], t) for t in trials]
        left, right = zip(*sides, strict=True)
        slope = (left[1] - left[0]) - (right[1] - right[0])
        root = (right[0] - left[0]) / slope
        big = float(jnp.finfo(dtype).max) ** 0.5
        root = jnp.clip(jnp.where(jnp.isnan(root), 0.0, root), -big, big)
        flat = jnp.broadcast_to(root, c.output.shape).ravel()[cells.index[name]]
        return list(jnp.moveaxis(flat, -1, 0))

    def found(self, cells: Cells) -> tuple[Any, list[Array], Array, Array, Array]:
        """The base's coefficients, the edges, points inside the pieces, the step there; and the anchor."""
        (member,), at = cells.block.members, cells.count
        anchor, scale = anchors(cells, member)
        edges = self.edges(cells)
        points = self.base.points(anchor, scale, at)
        joint = cells.joint({member.name: points}, self.stepped)
        inner = self.base.inner(edges, scale)
        inside = jnp.concatenate([jnp.broadcast_to(x, inner[0].shape) for x in inner], at)
        smooth = frozenset(f.name for f in cells.block.factors) - self.stepped
        step = cells.joint({member.name: inside}, smooth)
        if (present := cells.present) is not None:
            joint = jnp.where(present, joint, self.base.reference(anchor, scale, points))
            step = jnp.where(present, step, 0.0)
        return self.base.solve(anchor, scale, joint, at), edges, inside, step, anchor

    def integrate(self, cells: Cells) -> CellPosterior:
        (member,), at = cells.block.members, cells.count
        natural, edges, inside, step, anchor = self.found(cells)
        slices = self.base.slices(natural, edges)
        log_mass = jnp.squeeze(slices.log_mass, at + 1) + jnp.moveaxis(step, at, 0)
        integral = log_sum_exp(log_mass)
        share = jnp.exp(log_mass - jnp.where(jnp.isfinite(integral), integral, 0))
        share = jnp.where(log_mass == -jnp.inf, 0.0, share)
        weights = jnp.moveaxis(0.5 * jnp.concatenate([share, share]), 0, at)
        mean, deviation = (jnp.squeeze(x, at + 1) for x in slices[1:])
        # a piece without mass may lie anywhere: its nodes must be numbers all the same
        calm = jnp.squeeze(anchor, at)
        mean, deviation = jnp.where(share > 0, mean, calm), jnp.where(share > 0, deviation, 0)
        nodes = jnp.moveaxis(jnp.concatenate([mean - deviation, mean + deviation]), 0, at)
        if (present := cells.present) is not None:
            flat = cells.joint({member.name: anchor})
            integral = jnp.where(jnp.squeeze(present, at), integral, jnp.squeeze(flat, at))
        twice = jnp.concatenate([inside, inside], at)
        found = Cut(natural, slices, tuple(edges))
        return CellPosterior(integral, {member.name: nodes}, weights, found, at, {member.name: twice}, self.stepped)

    def value(self, cells: Cells, points: Points) -> Array:
        (member,), at = cells.block.members, cells.count
        natural, edges, _, step, _ = self.found(cells)
        x = points[member.name]
        piece = sum((e < x).astype(int) for e in edges)
        lead = jnp.broadcast_shapes(step.shape[:at], jnp.shape(piece)[:at])
        step = jnp.broadcast_to(step, (*lead, *step.shape[at:]))
        piece = jnp.broadcast_to(piece, (*lead, *jnp.shape(piece)[at:]))
        value = self.base.value(natural, x) + jnp.take_along_axis(step, piece, at)
        present = cells.present
        return value if present is None else jnp.where(present, value, cells.joint(points))

    def reason(self, block: LocalBlock) -> str:
        names = ", ".join(f"'{n}'" for n in sorted(self.stepped))
        return f"{names} reads it through comparisons alone: {self.base.name} between thresholds"

    def sample(self, key: Array, posterior: CellPosterior) -> dict[str, Array]:
        (name,), cut, at = posterior.nodes, posterior.natural, posterior.lead
        count = posterior.weights.shape[at] // 2
        one, two = jax.random.split(key)
        share = jnp.take(posterior.weights, jnp.arange(count), at)
        piece = jax.random.categorical(one, jnp.log(share), axis=at)
        lead = jnp.full_like(cut.edges[0], -jnp.inf), jnp.full_like(cut.edges[0], jnp.inf)
        edges = jnp.concatenate([lead[0], *cut.edges, lead[1]], at)
        edges = jnp.broadcast_to(edges, (*share.shape[:at], *edges.shape[at:]))
        low, high = (
            jnp.squeeze(jnp.take_along_axis(edges, jnp.expand_dims(piece + i, at), at), at) for i in (0, 1)
        )  # fmt: skip
        natural = type(cut.natural)(*(jnp.squeeze(n, at) for n in cut.natural))
        return {name: self.base.draw(natural, low, high, jax.random.uniform(two, low.shape, low.dtype))}


def anchors(cells: Cells, member: Continuous) -> tuple[Array, Array]:
    """A typical value and a typical scale of each cell under the prior, `(*states or 1s, 1, *cells)`."""
    shape = (*(1,) * (cells.count + 1), *cells.block.shape)
    rate, loc, scale = (cells.argument(member, a) for a in ("rate", "loc", "scale"))
    if rate is not None:
        loc, scale = 1 / rate, 1 / rate
    loc = jnp.zeros(shape) if loc is None else loc
    scale = jnp.ones(shape) if scale is None else scale
    lead = jnp.broadcast_shapes(loc.shape[: cells.count + 1], scale.shape[: cells.count + 1])
    return jnp.broadcast_to(loc, (*lead, *cells.block.shape)), jnp.broadcast_to(scale, (*lead, *cells.block.shape))

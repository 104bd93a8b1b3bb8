r"""Adaptive Gauss-Hermite quadrature, for latents of few dimensions a cell whose integral has no formula.

Nodes are placed anew at every step, by the mean :math:`\bar x` of each cell's posterior and a root `L` of its
covariance, in free coordinates (of a positive latent its logarithm, of a share its log-odds):

.. math:: x_s = \bar x + \sqrt2\, L z_s, \qquad
   \log \int e^{J} \approx \log \sum_s e^{J(x_s) + |z_s|^2 + \log w_s} + \log|L| + \tfrac d2 \log 2

These moments are found by the same rule about the mode and its curvature, which alone would tell too little of a
posterior that is skewed, or narrow at its mode and wide elsewhere (an item that some answer by guessing).

Given the nodes, the M-step maximises what the rule says of the likelihood, exactly; the rule itself is exact for a
Gaussian times a polynomial of degree `2 points - 1`.

References:
    Naylor and Smith 1982; Liu and Pierce 1994, "A note on Gauss-Hermite quadrature"; Bock and Aitkin 1981.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import log_sigmoid, sigmoid, softmax

from autoem.e_step.cells.local import AbstractMethod, CellPosterior, Cells, LocalBlock, Points
from autoem.e_step.elimination.reductions import log_sum_exp
from autoem.ir import Continuous

MAX_DIMENSIONS = 3
DEFAULT = {1: 21, 2: 11, 3: 7}
ROUNDS, CLOSE = 40, 1e-7
PROPOSALS = 128
LEAST = 0.01  # variance, relative to that by the curvature, that is left where all the weight is one node's


class Climb(NamedTuple):
    """The search for every cell's mode: where it is, the log joint, its slope and its curvature there."""

    at: Array
    value: Array
    slope: Array
    curvature: Array
    stride: Array
    step: Array
    moved: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Gauss(AbstractMethod):
    """Quadrature with `points` nodes a dimension; `kinds` are the latents' supports, `why` is the plan's reason."""

    points: int
    kinds: tuple[str, ...]
    why: str
    strategy = "quadrature"
    smooth = True
    source = "Naylor and Smith 1982; Liu and Pierce 1994 (adaptive quadrature); Bock and Aitkin 1981"

    def from_free(self, cells: Cells, x: Array) -> tuple[Points, Array]:
        """Values of the latents at free coordinates `(*states, points, *cells, d)`, and the log Jacobian."""
        out, start, jacobian = {}, 0, jnp.zeros(x.shape[:-1])
        for m, kind in zip(cells.block.members, self.kinds, strict=True):
            part = x[..., start : start + m.dim]
            start += m.dim
            if kind == "positive":
                value, log_slope = jnp.exp(part), part
            elif kind == "unit":
                value, log_slope = sigmoid(part), log_sigmoid(part) + log_sigmoid(-part)
            else:
                value, log_slope = part, jnp.zeros_like(part)
            out[m.name] = value.reshape(*x.shape[:-1], *m.event)
            jacobian = jacobian + log_slope.sum(-1)
        return out, jacobian

    def joint(self, cells: Cells, x: Array) -> Array:
        """The log joint in free coordinates, `(*states, points, *cells)`; standard normal where a mask takes it out."""
        points, jacobian = self.from_free(cells, x)
        value = cells.joint(points) + jacobian
        present = cells.present
        return value if present is None else jnp.where(present, value, -0.5 * (x**2).sum(-1))

    def start(self, cells: Cells) -> Array:
        """The prior's location where it tells one, `(*states, *cells, d)`."""
        parts = []
        for m, kind in zip(cells.block.members, self.kinds, strict=True):
            loc = cells.argument(m, "loc") if kind == "real" and not m.event else None
            size = (*(1,) * (cells.count + 1), *cells.block.shape)
            loc = (
                jnp.zeros(size)
                if loc is None
                else jnp.broadcast_to(loc, (*loc.shape[: cells.count + 1], *size[cells.count + 1 :]))
            )
            parts.append(jnp.broadcast_to(loc[..., None].astype(float), (*loc.shape, m.dim)))
        lead = jnp.broadcast_shapes(*(p.shape[:-1] for p in parts))
        x = jnp.concatenate([jnp.broadcast_to(p, (*lead, p.shape[-1])) for p in parts], -1)
        states = self.joint(cells, x).shape[: cells.count]
        return jnp.broadcast_to(jnp.squeeze(x, cells.count), (*states, *cells.block.shape, x.shape[-1]))

    def scattered(self, cells: Cells) -> Points:
        """A few points of every cell."""
        begin = jnp.expand_dims(self.start(cells), cells.count)
        return self.from_free(cells, jnp.concatenate([begin + s for s in (0.0, 0.7, -1.1)], cells.count))[0]

    def place(self, cells: Cells) -> tuple[Array, Array, Array]:
        """Mode `(*states, *cells, d)`, root of the inverse curvature, and log of its determinant, of every cell."""
        still = dataclasses.replace(cells, values=held(cells.values), rows=held(cells.rows))
        begin = self.start(still)

        def value(x: Array) -> Array:
            return jnp.squeeze(self.joint(still, jnp.expand_dims(x, cells.count)), cells.count)

        slope = jax.grad(lambda x: value(x).sum())  # cells stand apart, so each has its own

        def look(x: Array) -> tuple[Array, Array, Array]:
            return value(x), *slope_and_curvature(slope, x)

        def step(s: Climb) -> Climb:
            length, axes = principal(s.curvature)
            along = jnp.einsum("...ji,...j->...i", axes, s.slope) / length
            jump = jnp.einsum("...ij,...j->...i", axes, along)
            new = s.at + s.stride[..., None] * jump
            v, g, h = look(new)
            better = v >= s.value - 1e-12 * (1 + jnp.abs(s.value))
            keep = lambda a, b: jnp.where(better.reshape(better.shape + (1,) * (a.ndim - better.ndim)), a, b)  # noqa: E731
            far = jnp.sqrt((along**2 * length).sum(-1))  # in posterior standard deviations
            stride = jnp.where(better, jnp.minimum(2 * s.stride, 1.0), 0.5 * s.stride)
            going = (far * jnp.minimum(s.stride, 1.0)).max() > CLOSE
            return Climb(
                keep(new, s.at), keep(v, s.value), keep(g, s.slope), keep(h, s.curvature), stride, s.step + 1, going
            )

        v, g, h = look(begin)
        first = Climb(begin, v, g, h, jnp.ones(v.shape), jnp.zeros((), int), jnp.array(True))
        end = jax.lax.while_loop(lambda s: s.moved & (s.step < ROUNDS), step, first)
        length, axes = principal(end.curvature)
        return end.at, axes / jnp.sqrt(length)[..., None, :], -0.5 * jnp.log(length).sum(-1)

    def centre(self, cells: Cells) -> tuple[Array, Array, Array]:
        """The posterior mean, a root of the covariance and log of its determinant, by the rule about the mode."""
        mode, root, log_det = self.place(cells)
        at, d = cells.count, mode.shape[-1]
        still = dataclasses.replace(cells, values=held(cells.values), rows=held(cells.rows))
        x, log_w = self.nodes(mode, root, at)
        weights = softmax(self.joint(still, x) + log_w, at)
        weights = jnp.moveaxis(weights, at, -1)
        z = math.sqrt(2) * jnp.asarray(self.rule(d)[0], mode.dtype)
        mean = weights @ z
        square = (weights @ (z[:, :, None] * z[:, None, :]).reshape(len(z), -1)).reshape(*mean.shape, d)
        spread = square - mean[..., :, None] * mean[..., None, :]
        turn = jnp.linalg.cholesky((1 - LEAST) * spread + LEAST * jnp.eye(d))
        log_turn = jnp.log(jnp.diagonal(turn, axis1=-2, axis2=-1)).sum(-1)
        return mode + (root @ mean[..., None])[..., 0], root @ turn, log_det + log_turn

    def rule(self, d: int) -> tuple[np.ndarray, np.ndarray]:
        """Nodes `(points^d, d)` of the product rule, and the logarithms of their weights."""
        z, w = np.polynomial.hermite.hermgauss(self.points)
        grid = np.stack(np.meshgrid(*[z] * d, indexing="ij"), -1).reshape(-1, d)
        log_w = np.stack(np.meshgrid(*[np.log(w) + z**2] * d, indexing="ij"), -1).reshape(-1, d).sum(-1)
        return grid, log_w

    def nodes(self, mode: Array, root: Array, at: int) -> tuple[Array, Array]:
        """Free coordinates `(*states, nodes, *cells, d)`, and log weights `(*states or 1s, nodes, *cells or 1s)`."""
        z, log_w = self.rule(mode.shape[-1])
        x = over(lambda s: mode + math.sqrt(2) * (root @ s), jnp.asarray(z, mode.dtype), at)
        return x, jnp.asarray(log_w, mode.dtype).reshape(-1, *(1,) * (mode.ndim - 1 - at))

    def integrate(self, cells: Cells) -> CellPosterior:
        at = cells.count
        mode, root, log_det = self.centre(cells)
        d = mode.shape[-1]
        x, log_w = self.nodes(mode, root, at)
        terms = self.joint(cells, x) + log_w
        integral = log_sum_exp(jnp.moveaxis(terms, at, 0)) + log_det + 0.5 * d * math.log(2)
        if (present := cells.present) is not None:
            flat = jnp.squeeze(cells.joint(self.from_free(cells, jnp.expand_dims(mode, at))[0]), at)
            integral = jnp.where(jnp.squeeze(present, at), integral, flat)
        nodes, _ = self.from_free(cells, x)
        return CellPosterior(integral, nodes, softmax(terms, at), (mode, root, cells), at)

    def value(self, cells: Cells, points: Points) -> Array:
        return cells.joint(points)

    def reason(self, block: LocalBlock) -> str:
        d = sum(m.dim for m in block.members)
        count = f"{self.points:,} points" if d == 1 else f"{self.points} points along each of {d} dimensions"
        return (
            f"approximate: adaptive Gauss-Hermite quadrature with {count}, since {block.refusal}, and {self.why}; "
            "the objective is the log-likelihood by this rule"
        )

    def sample(self, key: Array, posterior: CellPosterior) -> dict[str, Array]:
        """By importance: one of many draws about the mode, in proportion to its density over that of the draw."""
        mode, root, cells = posterior.natural
        one, two = jax.random.split(key)
        z = jax.random.normal(one, (PROPOSALS, *mode.shape))
        x = jnp.moveaxis(mode + 1.2 * jnp.einsum("...ij,s...j->s...i", root, z), 0, posterior.lead)
        log_weight = self.joint(cells, x) + 0.5 * jnp.moveaxis((z**2).sum(-1), 0, posterior.lead)
        chosen = jax.random.categorical(two, log_weight, axis=posterior.lead)
        index = jnp.expand_dims(chosen, (posterior.lead, chosen.ndim + 1))
        return self.values(cells, jnp.take_along_axis(x, index, posterior.lead), posterior.lead)

    def values(self, cells: Cells, x: Array, axis: int) -> dict[str, Array]:
        return {n: jnp.squeeze(v, axis) for n, v in self.from_free(cells, x)[0].items()}


def slope_and_curvature(slope: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """The slope `(*cells, d)` of the sum of all cells' log joints, and minus its derivatives, `(*cells, d, d)`."""
    here, along = jax.linearize(slope, x)
    return here, -over(lambda e: along(jnp.broadcast_to(e, x.shape)), jnp.eye(x.shape[-1], dtype=x.dtype), -1)


def over(each: Callable[[Array], Array], points: Array, axis: int) -> Array:
    """`each` of the points, stacked along `axis`: one by one where a cell has few dimensions.

    Batched products of tiny matrices are slow, and hundreds of single ones are slow to compile.
    """
    if points.shape[-1] <= MAX_DIMENSIONS:
        return jnp.stack([each(p) for p in points], axis)
    return jax.vmap(each, out_axes=axis)(points)


def principal(curvature: Array) -> tuple[Array, Array]:
    """Curvatures along the principal axes, made positive, and the axes."""
    if curvature.shape[-1] == 1:
        length, axes = curvature[..., 0], jnp.ones_like(curvature)
    else:
        length, axes = jnp.linalg.eigh(0.5 * (curvature + jnp.swapaxes(curvature, -1, -2)))
    length = jnp.abs(length)
    top = jnp.maximum(length.max(-1, keepdims=True), 1e-8)
    return jnp.maximum(length, 1e-8 * top), axes


def held(tree):
    """The same numbers, through which no derivative is taken."""
    real = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if real(x) else x, dict(tree))


def dimensions(members: tuple[Continuous, ...]) -> int:
    return sum(m.dim for m in members)

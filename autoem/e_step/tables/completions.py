r"""Continuous latents as weighted completions, which is how one M-step serves every E-step.

An E-step over continuous latents ends in a few values for them, *nodes*, with weights, chosen so that every expectation
that `Q` holds is exact. For a Gaussian posterior of mean `m` and covariance `C` in `d` dimensions these are

.. math:: w_s = m + C^{1/2} z_s, \qquad s = 0, \dots, d,

with `z` the corners of a regular simplex: equal weights reproduce mean and covariance, and so every quadratic. A factor
then has one more axis, `NODES`, and expected statistics along it, like those of a discrete latent.

References:
    Stroud 1971, "Approximate calculation of multiple integrals", degree 2 formulas.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.graph.jaxpr import Graph
from autoem.ir import Continuous

NODES = "·node"
OPAQUE_FROM = 64  # coordinates from which unit vectors are no constant to the compiler, which would multiply them out


class At(NamedTuple):
    """Points of evaluation, along the first axis after one for each discrete latent that they are `apart` for."""

    value: Any
    apart: list[bool]


@dataclasses.dataclass(frozen=True, eq=False)
class Completions:
    """The continuous latents that a factor reads, in the order in which nodes hold them.

    With `affine`, what reads them is affine in them: it is evaluated where all are zero and at each unit vector, the
    same for all cells, and combined by the coordinates of each row's own nodes. Otherwise it is evaluated at the nodes;
    where they are `fixed`, the table is not differentiated in them, only averaged over them.
    """

    members: tuple[Continuous, ...]
    affine: bool = True
    fixed: bool = False

    @property
    def dim(self) -> int:
        return sum(m.dim for m in self.members)

    def within(self, whole: tuple[Continuous, ...]) -> np.ndarray:
        """Positions of these latents' coordinates among those of `whole`."""
        every = Completions(whole)
        return np.concatenate([every.span(m.name) for m in self.members])

    def span(self, name: str) -> np.ndarray:
        """Positions of one latent's coordinates."""
        start = sum(m.dim for m in self.members[: [m.name for m in self.members].index(name)])
        return np.arange(start, start + next(m.dim for m in self.members if m.name == name))

    def points(self, nodes: Any, states: int) -> At:
        """Where the factor is evaluated, along the first axis: a matrix of coordinates, or arrays by latent.

        Arrays by latent have one axis more for each of so many discrete latents, before that of the nodes.
        """
        if self.affine:
            value: Any = np.concatenate([np.zeros((1, self.dim)), np.eye(self.dim)])
            if self.dim >= OPAQUE_FROM:
                value = jax.lax.optimization_barrier(jnp.asarray(value))
            return At(value, [False] * states)
        arrays = [nodes[m.name] for m in self.members]
        sizes = jnp.broadcast_shapes(*(a.shape[:states] for a in arrays))
        apart = [int(s) > 1 for s in sizes]
        once = [i for i, a in enumerate(apart) if not a]
        kept = {
            m.name: jnp.squeeze(jnp.broadcast_to(a, (*sizes, *a.shape[states:])), tuple(once))
            for m, a in zip(self.members, arrays, strict=True)
        }
        return At(kept, apart)

    def placed(self, graph: Graph, point: Any) -> dict:
        """One of those points as inputs of the model's graph."""
        out, start = {}, 0
        for m in self.members:
            shape = graph.inputs["latent", m.name].shape
            if self.affine:
                value = jnp.asarray(point)[start : start + m.dim].reshape(m.event)
                out["latent", m.name] = jnp.broadcast_to(value, shape)
            else:
                out["latent", m.name] = jnp.broadcast_to(point[m.name], shape)
            start += m.dim
        return out

    def combined(self, parts: Array, axis: int, event_dim: int, nodes: Array) -> Array:
        """The value at every node, from the values at the points, which lie along `axis`.

        `nodes` is `(*states, nodes, dim, *batch)`, where `parts` is `(*states, points, *batch, *event)`.
        """
        first = jnp.take(parts, jnp.arange(1), axis)
        slopes = jnp.moveaxis(parts, axis, 0)[1:] - jnp.moveaxis(first, axis, 0)
        if all(s == 1 for s in nodes.shape[axis + 2 :]):  # all rows have the same nodes: one product of matrices
            rows = jnp.moveaxis(slopes, 0, axis).reshape(*parts.shape[:axis], self.dim, -1)
            moved = nodes.reshape(*nodes.shape[: axis + 2]) @ rows
            return first + moved.reshape(*moved.shape[: axis + 1], *parts.shape[axis + 1 :])
        slopes = jnp.expand_dims(slopes, axis + 1)  # one axis for the nodes
        weights = jnp.moveaxis(nodes, axis + 1, 0)
        weights = weights.reshape(weights.shape + (1,) * event_dim)
        return first + (weights * slopes).sum(0)


def rows_of(where: np.ndarray) -> slice | np.ndarray:
    """Positions as a slice where they follow each other, which copies less than a gather."""
    start = int(where[0]) if len(where) else 0
    return slice(start, start + len(where)) if np.array_equal(where, start + np.arange(len(where))) else where


def square_of(matrices: Array, where: np.ndarray) -> Array:
    """The rows and columns `where` of each of the matrices."""
    rows = rows_of(where)
    if isinstance(rows, slice):
        return matrices[..., rows, rows]
    return matrices[..., where[:, None], where[None, :]]


def simplex(dim: int) -> np.ndarray:
    """Corners `(dim + 1, dim)` of a regular simplex about zero, scaled to the identity as covariance."""
    corners = np.zeros((dim + 1, dim))
    for j in range(dim):  # corner j differs from the later ones in coordinate j alone
        height = np.sqrt((dim + 1) * (dim - j) / (dim - j + 1))
        corners[j, j] = height
        corners[j + 1 :, j] = -height / (dim - j)
    return corners


def standard_nodes(dim: int, pairs: int) -> np.ndarray:
    """Points `(2 pairs, dim)` that stand for a standard normal law: symmetric, with the identity as covariance.

    Normal draws, always the same, with their mirror images: their marginal laws come out about right, unlike those of a
    simplex in many dimensions, whose corners are far out. Up to `pairs` dimensions the covariance is exact, beyond that
    the variances are.
    """
    z = np.random.default_rng(50).normal(size=(pairs, dim))
    if dim <= pairs:
        z = z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / pairs)).T
    else:
        z /= np.sqrt((z**2).mean(0))
    return np.concatenate([z, -z])


def root(covariance: Array) -> Array:
    """A Cholesky factor; of a matrix with zero or rounded-off variances as well."""
    deviation = jnp.sqrt(jnp.maximum(jnp.diagonal(covariance, axis1=-2, axis2=-1), 0))
    safe = jnp.where(deviation > 0, deviation, 1)
    correlation = covariance / safe[..., :, None] / safe[..., None, :]
    eye = jnp.eye(covariance.shape[-1], dtype=covariance.dtype)
    flat = (deviation <= 0)[..., None] & (eye > 0)
    eps = 4 * covariance.shape[-1] * jnp.finfo(covariance.dtype).eps
    factor = jnp.linalg.cholesky(correlation * (1 - eps * (1 - eye)) + jnp.where(flat, 1.0, eps * eye))
    return factor * deviation[..., :, None]


def gaussian_nodes(mean: Array, covariance: Array) -> Array:
    """Nodes `(dim + 1, *batch, dim)` of equal weight with this mean `(*batch, dim)` and covariance."""
    corners = jnp.asarray(simplex(mean.shape[-1]), mean.dtype)
    return mean + jnp.einsum("...ij,sj->s...i", root(covariance), corners)

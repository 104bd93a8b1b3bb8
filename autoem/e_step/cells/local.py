r"""Continuous latents whose cells are integrated one by one, whatever their law.

Where every site reads a latent in one cell, given the discrete latents beside it, the log joint is a sum over cells of

.. math:: J_c(u_c) = \log p(u_c) + \sum_{\text{rows of } c} \log p(y \mid u_c)

and each cell is an integral of few dimensions. In: the factors of such latents, and a *method*, which looks at `J` at
points of its choice and knows the integral of what it finds: a conjugate form, a truncated law, a quadrature rule. Out:
the integrals as a table over the discrete latents, and nodes with weights, which the M-step takes as completions.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.elimination.layout import Table
from autoem.e_step.gaussian.block import index_name
from autoem.e_step.tables.completions import NODES
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.families import Family
from autoem.graph.named import Named, add, multiply, named, pick
from autoem.ir import Continuous, Latent

Points = Mapping[str, Array]  # by latent, `(*states or 1s, points, *cells, *event)`


@dataclasses.dataclass(frozen=True)
class CellPosterior:
    """What a method found: `(*states, *cells)` log integrals, and the posterior of each cell as nodes.

    `nodes` are by latent `(*states or 1s, nodes, *cells, *event)`, `weights` `(*states or 1s, nodes, *cells or 1s)` and
    sum to one. `inside`, where it is given, stands in for the nodes in the sites `stepped`, which read the latent
    through comparisons alone. `natural` is what the method answers questions from; `lead` counts the axes of states.
    """

    log_integral: Array
    nodes: Points
    weights: Array
    natural: Any
    lead: int
    inside: Points | None = None
    stepped: frozenset[str] = frozenset()


class AbstractMethod(abc.ABC):
    """How the integral over one cell is done; where it is `smooth`, that rests on a density without jumps."""

    strategy = "exact"
    source = ""
    smooth = False

    @abc.abstractmethod
    def integrate(self, cells: Cells) -> CellPosterior:
        """The integral and the posterior of every cell."""

    @abc.abstractmethod
    def value(self, cells: Cells, points: Points) -> Array:
        """The log joint `(*states, points, *cells)` that is integrated, by its form."""

    @abc.abstractmethod
    def reason(self, block: LocalBlock) -> str:
        """Why this method, as one clause for the plan."""

    def mean(self, posterior: CellPosterior) -> dict[str, Array]:
        """Posterior means by latent, `(*states or 1s, *cells, *event)`."""
        return {n: average(posterior, x) for n, x in posterior.nodes.items()}

    def covariance(self, posterior: CellPosterior) -> dict[str, Array]:
        """Posterior covariances by latent, `(*states or 1s, *cells, d, d)`."""
        out = {}
        for name, mean in self.mean(posterior).items():
            apart = posterior.nodes[name] - jnp.expand_dims(mean, posterior.lead)
            flat = apart.reshape(*apart.shape[: posterior.weights.ndim], -1)
            out[name] = average(posterior, flat[..., :, None] * flat[..., None, :])
        return out

    @abc.abstractmethod
    def sample(self, key: Array, posterior: CellPosterior) -> dict[str, Array]:
        """One draw of every cell for each state of the discrete latents, `(*states or 1s, *cells, *event)`."""


def average(posterior: CellPosterior, x: Array) -> Array:
    """Posterior expectation of a quantity of the nodes."""
    weights = posterior.weights
    return (weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim)) * x).sum(posterior.lead)


@dataclasses.dataclass(frozen=True, eq=False)
class LocalBlock:
    """Continuous latents of the same cells, integrated cell by cell; attributes as those of `GaussianBlock`.

    `method` is None until the data have been asked; `refusal` says why their posterior is not Gaussian.
    """

    members: tuple[Continuous, ...]
    discrete: tuple[Latent, ...]
    factors: tuple[Factor, ...]
    plates: tuple[str, ...]
    shape: tuple[int, ...]
    routed: frozenset[str]
    sizes: Mapping[str, int]
    refusal: str
    method: AbstractMethod | None = None

    @property
    def how(self) -> AbstractMethod:
        assert self.method is not None
        return self.method

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.members)

    @property
    def states(self) -> tuple[str, ...]:
        return tuple(z.name for z in self.discrete)

    def integrate(self, values: Mapping[Any, Any], rows: Mapping[str, Rows], index: Mapping[str, Array]):
        """`(table, posterior)`: the integral over the latents, and the posterior of each cell."""
        cells = Cells(self, values, rows, index)
        found = self.how.integrate(cells)
        value = named(found.log_integral, (*self.states, *self.plates))
        if (scale := self.scale(rows)) is not None:
            value = multiply(value, scale)
        return Table(value, frozenset(self.states), frozenset(self.plates)), found

    def scale(self, rows: Mapping[str, Rows]) -> Named | None:
        """How often each cell counts."""
        return rows[self.names[0]].scale

    def by_row(self, f: Factor, value: Named, index: Mapping[str, Array]) -> Named:
        """A quantity of the cells as the rows of a factor see it."""
        if f.name not in self.routed or not set(value.axes) & set(self.plates):
            return value
        rest = tuple(a for a in value.axes if a not in self.plates)
        flat = value.to((*self.plates, *rest))
        flat = jnp.broadcast_to(flat, (*self.shape, *flat.shape[len(self.shape) :]))
        flat = flat.reshape(-1, *flat.shape[len(self.shape) :])
        at = index[index_name(f, self.members[0])].ravel()
        sizes = [self.sizes[p] for p in f.site.plates]
        return named(flat[at].reshape(*sizes, *flat.shape[1:]), (*f.site.plates, *rest))

    def home(self, f: Factor, value: Named, index: Mapping[str, Array]) -> Named:
        """A quantity of a factor's rows, summed over those of each cell."""
        source = f.site.plates
        if f.name not in self.routed:
            inner = [p for p in source if p not in self.plates]
            absent = [self.sizes[p] for p in inner if p not in value.axes]
            out = value.sum(inner)
            return Named(out.array * float(np.prod(absent, dtype=float)), out.axes) if absent else out
        lead = tuple(a for a in value.axes if a not in source)
        array = value.to((*source, *lead))
        array = jnp.broadcast_to(array, (*(self.sizes[p] for p in source), *array.shape[len(source) :]))
        flat = array.reshape(-1, *array.shape[len(source) :])
        at = index[index_name(f, self.members[0])].ravel()
        out = jax.ops.segment_sum(flat, at, int(np.prod(self.shape, dtype=int)))
        return named(out.reshape(*self.shape, *out.shape[1:]), (*self.plates, *lead))

    def complete(self, f: Factor, found: CellPosterior, index: Any) -> tuple[dict[str, Array], Named | None]:
        """The factor's nodes, and its own latent's values there."""
        del index
        return self.filled(f, found.inside if found.inside is not None and f.name in found.stepped else found.nodes)

    def at(self, f: Factor, latents: Mapping[str, Array], index: Any) -> tuple[dict[str, Array], Named | None]:
        """The same with one node, where the latents have given values."""
        del index
        return self.filled(f, self.as_points(latents))

    def as_points(self, latents: Mapping[str, Array]) -> dict[str, Array]:
        """Values of the latents as one point a cell."""
        lead = (1,) * (len(self.discrete) + 1)
        return {m.name: jnp.reshape(latents[m.name], (*lead, *self.shape, *m.event)) for m in self.members}

    def filled(self, f: Factor, points: Points) -> tuple[dict[str, Array], Named | None]:
        assert f.completions is not None
        chosen = {m.name: self.shaped(m, points[m.name]) for m in f.completions.members}
        if f.name not in self.names or f.family is None:
            return chosen, None
        base = tuple(f"event{i}" for i in range(f.family.event_dim))
        own = next(m for m in self.members if m.name == f.name).axes
        axes = (*own, *(a for a in f.site.axes if a not in own))  # as `shaped` has them: cells first
        value = named(chosen[f.name], (*self.states, NODES, *axes, *base))
        order = (*base, *(a for a in value.axes if a not in base))
        return chosen, Named(value.to(order), order)

    def shaped(self, m: Continuous, points: Array) -> Array:
        """Points with the batch axes of the latent as the model has them."""
        lead = points.shape[: len(self.discrete) + 1]
        return jnp.broadcast_to(points, (*lead, *self.shape, *m.event)).reshape(*lead, *m.shape, *m.event)

    def node_weights(self, f: Factor, weight: Named, found: CellPosterior, index: Mapping[str, Array]) -> Named:
        """How often every node of a factor's rows counts, given the weight of each discrete state."""
        here = named(found.weights, (*self.states, NODES, *self.plates))
        return self.by_row(f, multiply(weight, here), index)

    def density_at(self, latents: Mapping[str, Array], values, rows, index) -> Named:
        """The log density of all sites by the form that is integrated."""
        value = self.how.value(Cells(self, values, rows, index), self.as_points(latents))
        whole, scale = named(value, (*self.states, NODES, *self.plates)), self.scale(rows)
        return whole if scale is None else multiply(whole, scale)

    def constant(self, f: Factor, value: Named, index: Mapping[str, Array]) -> Named:
        """A quantity of the rows of a factor, summed over those of each cell."""
        events = [a for a in value.axes if a not in f.site.plates]
        return self.home(f, value.sum(events), index)

    def mixed(self, found: CellPosterior, weight: Named) -> dict[str, tuple[Array, Array]]:
        """Means and covariances with the discrete latents summed out, whose probabilities are `weight`."""
        means, covariances = self.how.mean(found), self.how.covariance(found)
        share = weight.to((*self.states, *self.plates))
        over, out = tuple(range(len(self.discrete))), {}
        for m in self.members:
            mean = means[m.name].reshape(*means[m.name].shape[: share.ndim], -1)
            w = share.reshape(*share.shape, 1)
            centre = (w * mean).sum(over)
            apart = mean - centre
            second = covariances[m.name] + apart[..., :, None] * apart[..., None, :]
            out[m.name] = centre, (w[..., None] * second).sum(over)
        return out

    def marginal(self, m: Continuous, mixed: Mapping[str, tuple[Array, Array]]) -> tuple[Array, Array]:
        """Mean `(*shape, *event)` and covariance `(*shape, dim, dim)` of one latent in every of its cells."""
        mean, covariance = mixed[m.name]
        mean = jnp.broadcast_to(mean, (*self.shape, m.dim)).reshape(*m.shape, *m.event)
        return mean, jnp.broadcast_to(covariance, (*self.shape, m.dim, m.dim)).reshape(*m.shape, m.dim, m.dim)

    def draw(self, found: CellPosterior, chosen: Mapping[str, Array], key: Array | None) -> dict[str, Array]:
        """Values of the latents given those of the discrete ones: drawn with `key`, or their mean without."""
        values, out = self.how.mean(found) if key is None else self.how.sample(key, found), {}
        for m in self.members:
            event = tuple(f"event{i}" for i in range(len(m.event)))
            value = named(values[m.name], (*self.states, *self.plates, *event))
            for z in self.discrete:
                value = pick(value, z.name, named(jnp.asarray(chosen[z.name]), z.axes))
            whole = jnp.broadcast_to(value.to((*self.plates, *event)), (*self.shape, *m.event))
            out[m.name] = whole.reshape(*m.shape, *m.event)
        return out

    @property
    def strategy(self) -> str:
        return self.how.strategy

    @property
    def source(self) -> str:
        return self.how.source

    def reason(self, m: Continuous) -> str:
        """How the latent is treated, in words."""
        cells = int(np.prod(self.shape, dtype=int))
        reason = self.how.reason(self)
        reason += f"; {cells:,} cells, each on its own" if cells > 1 else ""
        if len(self.members) > 1:
            reason += f", together with {', '.join(n for n in self.names if n != m.name)}"
        if self.discrete:
            reason += f"; one posterior for each state of {', '.join(self.states)}"
        return reason + "; rows find their cell by index" * bool(self.routed)


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """The log joint of every cell at given parameters and data."""

    block: LocalBlock
    values: Mapping[Any, Any]
    rows: Mapping[str, Rows]
    index: Mapping[str, Array]

    @property
    def count(self) -> int:
        """Leading axes: one for each discrete latent."""
        return len(self.block.discrete)

    def joint(self, points: Points, without: frozenset[str] = frozenset()) -> Array:
        """The log joint at the points, `(*states, points, *cells)`, of all sites but some."""
        parts = [self.density(f, points) for f in self.block.factors if f.name not in without]
        whole = add(*parts).to((*self.block.states, NODES, *self.block.plates))
        size = next(iter(points.values())).shape[self.count]
        lead = whole.shape[: self.count]
        return jnp.broadcast_to(whole, (*lead, size, *self.block.shape))

    def density(self, f: Factor, points: Points) -> Named:
        """What one site adds to it."""
        own = f.name in self.block.names
        plain = dataclasses.replace(f, kept=f.site.plates, family=None if own else f.family)
        rows = self.rows[f.name]
        nodes, _ = self.block.filled(plain, points)
        bare = dataclasses.replace(rows, scale=None)
        value = plain.table(plain.cells({**self.values, ("nodes", f.name): nodes}, bare), bare).value
        if rows.scale is not None or self.block.scale(self.rows) is not None:
            value = multiply(value, self.relative(f))
        return self.block.home(f, value, self.index)

    def relative(self, f: Factor) -> Named:
        """How often a row counts for once that its cell does."""
        one = Named(jnp.ones(()), ())
        mine = self.rows[f.name].scale or one
        theirs = self.block.by_row(f, self.block.scale(self.rows) or one, self.index)
        axes = tuple(dict.fromkeys((*mine.axes, *theirs.axes)))
        lower = theirs.to(axes)
        return Named(jnp.where(lower == 0, 1.0, mine.to(axes) / jnp.where(lower == 0, 1, lower)), axes)

    def argument(self, member: Continuous, name: str) -> Array | None:
        """An argument of a latent's own distribution, `(*states or 1s, 1, *cells or 1s)`; None where it has no such."""
        f = next(f for f in self.block.factors if f.name == member.name)
        family = f.site.family
        if not isinstance(family, Family) or name not in family.args:
            return None
        plain = dataclasses.replace(f, family=None)
        value = plain.argument(f"arg:{name}", self.values, family.arg_dims[family.args.index(name)])
        axes, known = (*self.block.states, NODES, *f.site.axes), (*self.block.states, NODES, *self.block.plates)
        if value.ndim > len(axes) or any(a not in known and value.shape[i] > 1 for i, a in enumerate(axes)):
            return None
        return jax.lax.stop_gradient(named(value, axes).to(known))

    @property
    def present(self) -> Array | None:
        """Which cells no mask takes out, `(*1s, 1, *cells or 1s)`; None where there is no mask."""
        masks = [self.rows[n].mask for n in self.block.names]
        known = [named(m.array > 0, m.axes) for m in masks if m is not None]
        if not known:
            return None
        whole = known[0]
        for other in known[1:]:
            whole = multiply(whole, other)
        return whole.to((*self.block.states, NODES, *self.block.plates)) > 0

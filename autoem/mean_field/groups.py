"""What a mean field is made of: groups of latents, and the pieces in which factors read them.

In: tables of factors, with named axes. Out: records, and the sums that every update needs: the expected table of a
piece under the laws of all others, and the expectation of a table under all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.elimination.eliminate import eliminate
from autoem.e_step.elimination.layout import Layout, Route, Table, route_to_rows
from autoem.e_step.tables.completions import NODES
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named, add, contract, made_once, multiply, named, union
from autoem.ir import Chain, Continuous
from autoem.mean_field.laws import AbstractLaw

HALVINGS = 12  # of a step towards the new laws of cells that read one another, before the old ones are kept


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """What one factor reads of one group: `latents` as the table names them, `own` as the group does.

    `axes` are the plates along which its law varies in the factor's rows; `crossing` tells that the factor reads other
    groups beside it, so that the law is kept as probabilities, not as counts.
    """

    key: str
    factor: str
    group: str
    latents: tuple[str, ...]
    own: tuple[str, ...]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    route: Route | None
    crossing: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Discrete latents whose joint law is kept, with the chains among them; with `cellwise`, a law for each cell."""

    name: str
    latents: tuple[str, ...]
    chains: tuple[Chain, ...]
    pieces: tuple[Piece, ...]
    cellwise: bool = False

    @property
    def simple(self) -> bool:
        """Whether it is one latent whose cells stand apart, and every factor reads it row by row."""
        first = self.pieces[0]
        alike = all(p.own == first.own and p.axes == first.axes and p.route is None for p in self.pieces)
        return alike and len(first.own) == 1 and not self.chains and bool(first.axes)


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A continuous latent with a law of its own in every cell; `factors` are those that read it.

    `shared` says that it is no row's own: it has one cell, or rows find their cell by a discrete latent.
    """

    member: Continuous
    law: AbstractLaw
    factors: tuple[str, ...]
    shared: bool = False

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def size(self) -> tuple[int, ...]:
        return self.member.shape + self.member.event


def finite(value: Named) -> Named:
    """A table in which what is impossible has a finite number, so that no share of it is NaN."""
    lowest = -(float(jnp.finfo(value.array.dtype).max) ** 0.5)
    return Named(jnp.maximum(value.array, lowest), value.axes)


def over_nodes(value: Named) -> Named:
    """Mean over equally weighted nodes."""
    if NODES not in value.axes:
        return value
    return Named(value.array.mean(value.axes.index(NODES)), tuple(a for a in value.axes if a != NODES))


def repeats(factor: Factor, present: Sequence[str], summed: Sequence[str]) -> float:
    """How many equal terms a sum over `summed` plates has along those that nothing present varies on."""
    return float(np.prod([factor.sizes[p] for p in summed if p not in present], dtype=float))


def count_of(factor: Factor, latents: Sequence[str], layout: Layout) -> Named | None:
    """How often each row counts, by the innermost of some latents; None where once."""
    inside = [z for z in factor.latents if z.name in latents]
    if not inside:
        return None
    inner = max(inside, key=lambda z: (factor.route_to(z.name) is None, sum(not a.startswith("#") for a in z.axes)))
    scale = layout.scales.get(factor.latent_of(inner.name))
    return None if scale is None else route_to_rows(scale, factor.route_to(inner.name), layout.cells)


def expected_table(
    factor: Factor, piece: Piece, table: Named, others: Sequence[Named], layout: Layout, simple: bool
) -> Table:
    """The table of a piece: the factor's, averaged over the laws of all other pieces."""
    terms = [table, *others]
    inner = factor.inner
    if inner is not None and inner.name not in piece.latents:
        mine = count_of(factor, [inner.name], layout)
        theirs = count_of(factor, piece.latents, layout)
        if mine is not None:
            terms.append(mine)
        if theirs is not None:
            terms.append(Named(1 / jnp.where(theirs.array == 0, 1, theirs.array), theirs.axes))
    keep = (*piece.latents, *piece.axes)
    value = contract(keep, *terms) if len(terms) > 1 or set(table.axes) - set(keep) else table
    times = repeats(factor, union(*(t.axes for t in terms)), [p for p in factor.kept if p not in piece.axes])
    value = Named(value.array * times, value.axes) if times != 1 else value
    names = dict(zip(piece.latents, piece.own, strict=True))
    value = Named(value.array, tuple(names.get(a, a) for a in value.axes))
    if piece.crossing or simple:
        whole = (*piece.axes, *piece.own) if simple else (*piece.own, *piece.axes)
        shape = piece.shape[1:] + piece.shape[:1] if simple else piece.shape
        value = Named(jnp.broadcast_to(value.to(whole), shape), whole)
    return Table(value, frozenset(piece.own), frozenset(piece.axes), piece.route)


def solved(group: Group, tables: Sequence[Table], layout: Layout) -> tuple[Array, list[Named]]:
    """`log Z` of a group's expected tables, and its derivative by each: how often every state is expected there."""
    if group.simple:
        return each_cell(tables, layout)

    def log_z(values: list[Named]) -> Array:
        return eliminate([dataclasses.replace(t, value=v) for t, v in zip(tables, values, strict=True)], layout)

    return jax.value_and_grad(log_z)([t.value for t in tables])


def each_cell(tables: Sequence[Table], layout: Layout) -> tuple[Array, list[Named]]:
    """The same for one latent whose cells stand apart: states along the last axis, as rows are gathered and summed."""
    name = next(iter(tables[0].latents))
    plates = tuple(a for a in tables[0].value.axes if a != name)
    joint = sum((t.value.to((*plates, name)) for t in tables[1:]), start=tables[0].value.to((*plates, name)))
    top = joint.max(-1, keepdims=True)
    weight = jnp.exp(joint - top)
    total = weight.sum(-1, keepdims=True)
    log_z = (jnp.log(total) + top)[..., 0]
    scale, share = layout.scales.get(name), 1 / total
    if scale is not None:
        times = scale.to(plates)
        log_z, share = log_z * times, share * times[..., None]
    counts = Named(weight * share, (*plates, name))
    return log_z.sum(), [counts for _ in tables]


def used_by(tables: Sequence[Table], counts: Sequence[Named]) -> Array:
    """Expectation of a group's tables under its own law."""
    pairs = [(t.value, c) for t, c in zip(tables, counts, strict=True)]
    return sum(((c.to(v.axes) * v.array).sum() for v, c in pairs), start=jnp.zeros(()))


def as_read(piece: Piece, counts: Named) -> Named:
    """Counts of a group's latents, as probabilities where another group is read beside them, by the factor's names."""
    names = dict(zip(piece.own, piece.latents, strict=True))
    if piece.crossing:
        lead = tuple(i for i, a in enumerate(counts.axes) if a in piece.own)
        total = counts.array.sum(lead, keepdims=True)
        states = float(np.prod([counts.array.shape[i] for i in lead], dtype=float))
        counts = Named(jnp.where(total > 0, counts.array / jnp.where(total > 0, total, 1), 1 / states), counts.axes)
    return Named(counts.array, tuple(names.get(a, a) for a in counts.axes))


def weight_of(
    factor: Factor, pieces: Sequence[Piece], shares: Mapping[str, Named], layout: Layout
) -> tuple[Named, ...]:
    """What a factor's table is contracted with for its expectation: laws of its pieces, and how often rows count."""
    laws = tuple(shares[p.key] for p in pieces)
    if not pieces or not pieces[0].crossing:
        return laws
    count = count_of(factor, [z.name for z in factor.latents], layout)
    return laws if count is None else (*laws, count)


def expectation(factor: Factor, table: Named, weight: Sequence[Named], counted: bool) -> Array:
    """Expectation of a factor's log density over all rows; `counted` weights hold repeated rows already."""
    if len(weight) == 1 and set(weight[0].axes) == set(table.axes):
        total = (weight[0].array * table.to(weight[0].axes)).sum()
    else:
        total = contract((), table, *weight).array if weight else table.array.sum()
    times = 1.0 if counted else repeats(factor, union(table.axes, *(w.axes for w in weight)), factor.kept)
    return total * times


def cell_law(group: Group, scores: Named, layout: Layout) -> tuple[dict[str, Named], Array]:
    """The same of a group with a law for each cell, from its log probabilities up to a constant."""
    (name,) = group.latents
    log_p = jax.nn.log_softmax(scores.array, axis=0)
    p = Named(jnp.exp(log_p), scores.axes)
    entropy = -(p.array * log_p).sum(0)
    scale = layout.scales.get(name)
    if scale is not None:
        entropy = entropy * jnp.broadcast_to(scale.to(scores.axes[1:]), entropy.shape)
    shares = {}
    for piece in group.pieces:
        rows = route_to_rows(p, piece.route, layout.cells)
        axes = tuple(piece.latents[0] if a == name else a for a in rows.axes)
        shares[piece.key] = Named(rows.array, axes)
        if not piece.crossing and (count := scale) is not None:
            shares[piece.key] = multiply(shares[piece.key], route_to_rows(count, piece.route, layout.cells))
    return shares, entropy.sum()


def damped(
    group: Group, old: Named, wanted: Array, worth: Callable[[Mapping[str, Named]], Array], layout: Layout
) -> tuple[Named, dict[str, Named], Array]:
    """Log probabilities by cell on the way from `old` to `wanted`, their shares and entropy: as far as no bound falls.

    `worth` is the expectation of the factors that the shares move.
    """
    log_old, log_new = (jax.nn.log_softmax(x, axis=0) for x in (old.array, wanted))

    def at(share: Array) -> tuple[Named, dict[str, Named], Array]:
        scores = Named((1 - share) * log_old + share * log_new, old.axes)
        return scores, *cell_law(group, scores, layout)

    def value(share: Array) -> Array:
        _, shares, entropy = at(share)
        return entropy + worth(shares)

    shares, entropy = cell_law(group, old, layout)
    before = entropy + worth(shares)
    lowest = before - 8 * jnp.finfo(before.dtype).eps * jnp.abs(before)

    def halve(carry):
        share, _, count = carry
        return share / 2, value(share / 2), count + 1

    start = (jnp.ones(()), value(jnp.ones(())), 0)
    share, after, _ = jax.lax.while_loop(lambda c: ~(c[1] >= lowest) & (c[2] < HALVINGS), halve, start)
    return at(jnp.where(after >= lowest, share, 0.0))


def with_base(factor: Factor, rows: Rows, value: Named) -> Named:
    """A continuous latent's own table with the part of its density that no parameter moves."""
    if not factor.is_hidden or factor.family is None or rows.value is None:
        return value
    axes = rows.value.axes[factor.family.event_dim :]
    fixed = {k: f.to(axes) for k, f in (rows.fixed or {}).items()}
    return add(value, Named(factor.family.base(rows.value.array, fixed), axes))


def picked_table(factor: Factor, nodes: Mapping[str, Array], cells: Mapping[str, Array]) -> Named:
    """The expected log probabilities of a discrete latent whose probabilities are a cell of a simplex, by index."""
    assert factor.completions is not None
    (member,) = factor.completions.members
    route = factor.routes[member.name]
    scores = made_once(log_probabilities(factor, nodes[member.name]))
    return Named(scores[cells[route.site]], (*route.source, factor.name))


def log_probabilities(factor: Factor, nodes: Array) -> Array:
    """Expected log probabilities of such a latent by cell of the simplex, `(cells, states)`, over nodes of it."""
    assert factor.completions is not None
    (member,), family = factor.completions.members, factor._family
    x = nodes.reshape(-1, int(np.prod(member.shape, dtype=int)), *member.event)
    eta = family.natural({family.args[0]: x})[0].mean(0)
    return finite(Named(eta, ("", factor.name))).array


def nodes_of(f: Factor, points: Mapping[str, Array]) -> tuple[dict[str, Array], Named | None]:
    """Nodes of a factor, every combination of those of the latents that it reads; and its own latent's values there."""
    assert f.completions is not None
    members = f.completions.members
    counts = [points[m.name].shape[0] for m in members]
    lead = (1,) * len(f.parents if f.family else f.latents)
    chosen = {}
    for i, m in enumerate(members):
        x = points[m.name].reshape(*(1,) * i, counts[i], *(1,) * (len(counts) - 1 - i), *m.shape, *m.event)
        x = jnp.broadcast_to(x, (*counts, *m.shape, *m.event))
        chosen[m.name] = x.reshape(*lead, -1, *m.shape, *m.event)
    if not f.is_hidden or f.family is None:
        return chosen, None
    events = tuple(f"event{i}" for i in range(f.family.event_dim))
    own = chosen[f.name].reshape(-1, *f.site.shape, *chosen[f.name].shape[len(lead) + 1 + len(f.site.shape) :])
    value = named(own, (NODES, *f.site.axes, *events))
    order = (*events, *(a for a in value.axes if a not in events))
    return chosen, Named(value.to(order), order)

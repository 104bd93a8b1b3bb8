"""Sum latents out of a product of tables: plated variable elimination, the one kernel of every exact E-step.

In: tables of log densities with named axes, each in the innermost plates of its latents. Out: the log of their sum over
all completions, `log Z`. Its gradient with respect to a table is that table's posterior marginal (Darwiche 2003), so
nothing else is needed for responsibilities and expected statistics. With `max` in place of log-sum-exp the same program
finds the joint mode, and the recorded steps, read backwards, give the mode or exact posterior samples.

Order: innermost plates first; within them, the latent whose removal makes the smallest table (greedy).

References:
    Obermeyer et al. 2019, "Tensor variable elimination for plated factor graphs". Darwiche 2003, "A differential
    approach to inference in Bayesian networks".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import PlanError
from autoem.e_step.elimination.along_time import ChainStep, close, opened, renamed_ends
from autoem.e_step.elimination.layout import Held, Layout, Route, Step, Table, route_to_rows
from autoem.e_step.elimination.reductions import Reduction, log_sum_exp, maximum, removing, total_log_sum_exp
from autoem.graph.named import Named, add, multiply, union

SOURCE = "Obermeyer et al. 2019 (plated variable elimination); Darwiche 2003 (marginals as derivatives)"


def eliminate(
    tables: Sequence[Table],
    layout: Layout,
    reduce: Callable[[Array], Array] = log_sum_exp,
    steps: list[Step | ChainStep] | None = None,
    parts: list[Table] | None = None,
) -> Array:
    """Log of the sum over all completions of the exponential of the sum of `tables`.

    Args:
        tables: the factors' tables.
        layout: where the latents live.
        reduce: `log_sum_exp` for the sum, `maximum` for the mode; see `reductions`.
        steps: filled with what backward reading needs, if given.
        parts: filled with the independent contributions before their sum over plates, if given.

    Raises:
        PlanError: latents of crossed plates meet in one table, which has no exact elimination of bounded cost.
    """
    pending = [renamed_ends(t, layout) for t in tables]
    held: dict[str, list[Table]] = {}
    total = jnp.zeros(())
    whole = reduce is log_sum_exp and steps is None and parts is None
    while pending:
        leaf = innermost(pending)
        group = [t for t in pending if t.plates == leaf]
        pending = [t for t in pending if t.plates != leaf]
        for component in components(group, layout, leaf):
            remaining = sum_out(component, layout, leaf, reduce, steps, whole)
            if chain := layout.chain_at(leaf):
                held.setdefault(chain.time, []).extend(t for t in remaining if t.latents & chain.names)
                remaining = [t for t in remaining if not t.latents & chain.names]
            pending += [lift(t, layout, leaf) for t in remaining if t.latents]
            ended = [t for t in remaining if not t.latents]
            for table in ended:
                total = total + total_of(table, layout)
            if parts is not None:
                parts += ended
        for chain in layout.chains:
            if chain.time in held and not any({chain.time, chain.bulk} & t.plates for t in pending):
                pending += opened(chain, held.pop(chain.time), layout)
    return total


def innermost(tables: Sequence[Table]) -> frozenset[str]:
    """Plates to be treated next: no other table's plates contain them, and no route leads into them."""
    ordinals = {t.plates for t in tables}
    targets = [frozenset(t.route.target) for t in tables if t.route]
    free = [o for o in ordinals if not any(o < p for p in ordinals)]
    unreached = [o for o in free if not any(o <= t or t <= o for t in targets if t)]
    sources = [o for o in unreached if any(t.route and t.plates == o for t in tables)]
    return min(sources or unreached or free, key=lambda o: (-len(o), sorted(o)))


def components(group: Sequence[Table], layout: Layout, leaf: frozenset[str]) -> list[list[Table]]:
    """Split the tables of one plate context into sets that share a latent of that context."""
    parts: list[tuple[set[str], list[Table]]] = []
    for table in group:
        local = {z for z in table.latents if layout.plates_of[z] == leaf}
        touching = [p for p in parts if p[0] & local]
        parts = [p for p in parts if not p[0] & local]
        merged = [t for p in touching for t in p[1]]
        parts.append((local.union(*(p[0] for p in touching)), [*merged, table]))
    return [tables for _, tables in parts]


def sum_out(tables, layout: Layout, leaf: frozenset[str], reduce, steps, whole: bool = False) -> list[Table]:
    """Remove every latent that lives in `leaf` itself from the tables of one component.

    With `whole` nobody asks for its cells one by one, and what is left without latents may be one number.
    What is carried along a chain stays while its steps are apart, and is removed with the whole chain once they are
    together; whatever else stands beside the chain's first steps is removed before it.
    """
    chain = layout.chain_at(leaf)
    carried = chain.names if chain else frozenset()
    local = {z for t in tables for z in t.latents if layout.plates_of[z] == leaf} - carried
    if not local:
        return list(tables)
    removed = sorted(local)
    whole = whole and chain is None and all(layout.scales.get(z) is None for z in removed)
    while local:
        waiting = [t for t in tables if t.held]
        free = local - frozenset().union(*(t.latents for t in waiting))
        free = {z for z in free if not waiting or not is_late(reduce, z)}
        if not free:
            tables, done = close(tables, waiting[0], reduce, steps, layout)
            local -= done
            continue
        late = {z for z in free if is_late(reduce, z)}
        latent = min(free - late or late, key=lambda z: (joint_size(tables, z), z))
        local.remove(latent)
        holding = [t for t in tables if latent in t.latents]
        if whole and not local and all(t.latents == {latent} for t in holding):
            return [t for t in tables if latent not in t.latents] + [total_without(holding, latent, layout)]
        if isinstance(reduce, Reduction) and reduce.apart:
            holding.append(one_by_one(latent, leaf, layout))
        tables = [t for t in tables if latent not in t.latents] + [remove(holding, latent, reduce, steps)]
    scale = multiplicity(tables, layout, removed)
    if scale is None:
        return tables
    return [dataclasses.replace(t, value=multiply(t.value, scale)) for t in tables]


def is_late(reduce, latent: str) -> bool:
    return isinstance(reduce, Reduction) and reduce.is_late(latent)


def one_by_one(latent: str, leaf: frozenset[str], layout: Layout) -> Table:
    """A table of zeros with an axis for every plate, so that no two cells are reduced as one."""
    plates = tuple(sorted(p for p in leaf if layout.sizes[p] > 1))
    return Table(Named(jnp.zeros([layout.sizes[p] for p in plates]), plates), frozenset((latent,)), leaf)


def joint_size(tables: Sequence[Table], latent: str) -> int:
    """Entries of the table that removing `latent` would make."""
    sizes = {a: t.value.size(a) for t in tables if latent in t.latents for a in t.value.axes}
    return int(np.prod([s for a, s in sizes.items() if a != latent], dtype=float))


def remove(tables: Sequence[Table], latent: str, reduce, steps: list[Step | ChainStep] | None) -> Table:
    """Sum `latent` out of the product of `tables`."""
    joint = add(*(t.value for t in tables))
    latents = frozenset().union(*(t.latents for t in tables)) - {latent}
    rest = tuple(a for a in joint.axes if a != latent)
    joint = Named(joint.to((latent, *rest)), (latent, *rest))
    if steps is not None:
        steps.append(Step(latent, joint, latents, tables[0].plates, shared_route(tables, latents)))
    value = removing(reduce, (latent,), latents)(joint.array)
    return Table(Named(value, rest), latents, tables[0].plates, shared_route(tables, latents))


def total_without(tables: Sequence[Table], latent: str, layout: Layout) -> Table:
    """Sum `latent`, the last one, out of the product of `tables`, and add the logarithms of all cells up."""
    joint = add(*(t.value for t in tables))
    rest = tuple(a for a in joint.axes if a != latent)
    value = total_log_sum_exp(joint.to((latent, *rest))) * repeats_of(tables[0].plates, rest, layout)
    return Table(Named(value, ()), frozenset(), frozenset())


def shared_route(tables: Sequence[Table], latents: frozenset[str]) -> Route | None:
    routes = {t.route.site: t.route for t in tables if t.route}
    if len(routes) <= 1 or not latents:
        return next(iter(routes.values()), None)
    first, *others = routes.values()
    if any(o.source != first.source or o.target != first.target for o in others):
        names = sorted(routes)
        raise PlanError(
            names[0],
            problem=f"'{names[0]}' and '{names[1]}' tie the rows of one plate to cells of different plates",
            mend="no exact elimination of bounded cost exists; put the latents in one plate, or fix one of them",
        )
    return dataclasses.replace(first, latents=frozenset().union(*(r.latents for r in routes.values())))


def multiplicity(tables, layout: Layout, removed: Sequence[str]) -> Named | None:
    """How often each row of the component counts, relative to the latents that remain."""
    names = [z for z in removed if layout.scales.get(z) is not None]
    if not names:
        return None
    own = layout.scales[names[0]]
    above = [(z, t.route) for t in tables for z in t.latents if layout.scales.get(z) is not None]
    if own is None or not above:
        return own
    inner, route = max(above, key=lambda pair: len(layout.plates_of[pair[0]]))
    scale = route_to_rows(layout.scales[inner], route, layout.cells)  # type: ignore[arg-type]
    axes = union(own.axes, scale.axes)
    lower = scale.to(axes)
    return Named(own.to(axes) / jnp.where(lower == 0, 1, lower), axes)


def total_of(table: Table, layout: Layout) -> Array:
    """Sum over all plates; a plate without an axis repeats the value."""
    return table.value.array.sum() * repeats_of(table.plates, table.value.axes, layout)


def repeats_of(plates: Iterable[str], axes: Sequence[str], layout: Layout) -> float:
    """How often a value counts that has no axis for some of its plates."""
    return float(np.prod([layout.sizes[p] for p in plates if p not in axes], dtype=float))


def lift(table: Table, layout: Layout, leaf: frozenset[str]) -> Table:
    """Bring a table home to the plates of its remaining latents, summing over the others."""
    route = table.route
    if route is not None and route.latents & table.latents:
        return follow_route(table, layout, route)
    target = frozenset().union(*(layout.plates_of[z] for z in table.latents))
    if target == leaf or not target < leaf:
        raise PlanError(
            min(table.latents),
            problem=f"latents {sorted(table.latents)} of crossed plates {sorted(leaf)} meet in one factor",
            mend="no exact elimination of bounded cost exists; nest the plates, or fix one of the latents by data",
        )
    gone = leaf - target
    repeats = repeats_of(gone, table.value.axes, layout)
    value = table.value.sum(gone)
    value = value if repeats == 1 else Named(value.array * repeats, value.axes)
    return Table(value, table.latents, target)


def follow_route(table: Table, layout: Layout, route: Route) -> Table:
    """Add each row of the table to the cell of the latents that it reads."""
    target = frozenset(route.target)
    others = {z for z in table.latents - route.latents if not layout.plates_of[z] <= target}
    if others:
        raise PlanError(
            min(others),
            problem=f"latents {sorted(table.latents)} of different plates meet in '{route.site}'",
            mend="no exact elimination of bounded cost exists; put them in one plate, or fix one of them by data",
        )
    states = tuple(sorted(table.latents))
    rows = table.value.to(states + route.source)
    sizes = [layout.sizes[p] for p in route.source]
    rows = jnp.broadcast_to(rows, rows.shape[: len(states)] + tuple(sizes))
    flat = jnp.moveaxis(rows.reshape(*rows.shape[: len(states)], -1), -1, 0)
    cells = jax.ops.segment_sum(flat, layout.cells[route.site].ravel(), int(np.prod(route.shape)))
    value = jnp.moveaxis(cells, 0, -1).reshape(*rows.shape[: len(states)], *route.shape)
    return Table(Named(value, states + route.target), table.latents, target)


__all__ = [
    "ChainStep", "Held", "Layout", "Route", "Step", "Table", "eliminate", "log_sum_exp", "maximum", "route_to_rows",
]  # fmt: skip

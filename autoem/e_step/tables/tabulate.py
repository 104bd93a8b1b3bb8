"""Tabulate each factor of a program over the latents that it reads.

In: a Program. Out: one `Factor` a site, which turns parameters into *cells* (what the site's density needs of the
parameters: natural parameters where its family is in the table, the log densities themselves elsewhere) and cells into
a log-density table with named axes. The table is linear in the cells, so the gradient of `log Z` with respect to the
cells is the expected sufficient statistics: with `Q = <statistics, cells(parameters)>` the M-step needs nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.elimination.eliminate import Route, Table
from autoem.e_step.tables.completions import NODES, Completions
from autoem.e_step.tables.regression import on_latents, squared_residuals
from autoem.e_step.tables.selected import selected
from autoem.families import Family
from autoem.families._arrays import as_float
from autoem.graph.jaxpr import Graph, Variable
from autoem.graph.named import Named, add, choose, contract, contract_sum, looked_up, multiply, named, turned, union
from autoem.ir import Latent, Site

FEATURE = "·"  # axis of the sufficient statistics
LOOK_UP_FROM = 256  # categories from which a row's log density is looked up, not multiplied out of a column of zeros


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What a factor needs of the data, made once: values, mask, constants.

    `weight` says how often each row counts; `scale` the same relative to the factor's innermost latent. `ready` says
    that the value is standardised and turned already, once for all steps; `features` and `base` are statistics and `log
    h(x)` of rows that differ with the states of latents, summed as far as they can be.
    """

    value: Named | None = None
    mask: Named | None = None
    fixed: dict[str, Named] | None = None
    scale: Named | None = None
    weight: Named | None = None
    inside: Named | None = None
    base: Named | None = None
    features: Named | None = None
    centre: Array | None = None
    spread: Array | None = None
    ready: bool = False


jax.tree_util.register_dataclass(Rows, [f.name for f in dataclasses.fields(Rows) if f.name != "ready"], ["ready"])


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """One site as a function of latents and parameters.

    Attributes:
        site: the site.
        latents: the latents that it reads, in the order of the table's axes; its own comes first where it is one.
        own: whether the site is itself a latent.
        kept: plates whose axis the table keeps; the others are summed at once, since no latent of the factor varies
            along them.
        plates: plates of the factor's latents: the context that the table stands in.
        route: how rows find cells, where a latent lives in other plates.
        family: set where the natural form is used.
        params: names of the parameters that the factor reads.
        is_prior: whether it is the prior of a parameter, no part of the data's likelihood.
        direct: why the natural form is not used, for the plan.
        times: those of `kept` that are the steps of a chain, whose messages read a table step by step.
        coefficients: of a regression in natural form, the variables that hold its coefficients; see `regression`.
        completions: the continuous latents that it reads, its own among them; see `completions`.
        gaps: whether its vectors are seen in part, which is integrated; see `missing`.
        pooled: whether it is a regression on its continuous latents, the same for all rows, as the M-step sees it.
        routes: under mean field, how rows find cells, for each latent of other plates.
        aliases: names of a latent at its further reads, to its own.
        moving: what of its rows differs with the states of latents that it reads: "value", "mask", "arg:total_count".
    """

    site: Site
    latents: tuple[Latent, ...]
    own: bool
    kept: tuple[str, ...]
    plates: frozenset[str]
    route: Route | None
    family: Family | None
    params: tuple[str, ...]
    is_prior: bool
    sizes: Mapping[str, int]
    graph: Graph
    compact: bool
    direct: str = ""
    coefficients: tuple[Variable, ...] = ()
    times: tuple[str, ...] = ()
    completions: Completions | None = None
    gaps: bool = False
    pooled: bool = False
    routes: Mapping[str, Route] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    moving: tuple[str, ...] = ()

    def route_to(self, latent: str) -> Route | None:
        """How the rows find their cell of a latent; None where it stands in their own plates."""
        if latent in self.routes:
            return self.routes[latent]
        return self.route if self.route and latent in self.route.latents else None

    def latent_of(self, read: str) -> str:
        """The latent that is read under a name."""
        return self.aliases.get(read, read)

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def is_hidden(self) -> bool:
        """Whether the site is itself a continuous latent."""
        return self.site.role == "continuous"

    @property
    def inner(self) -> Latent | None:
        """The innermost latent that it reads, by which its rows count: one of its own plates before any by index."""

        def depth(z: Latent) -> tuple[bool, int]:
            return self.route_to(z.name) is None, sum(not a.startswith("#") for a in z.axes)

        return max(self.latents, key=depth, default=None)

    @property
    def integrated(self) -> bool:
        """Whether its part of the likelihood comes from an integral."""
        return self.gaps or self.completions is not None

    @property
    def value_hidden(self) -> bool:
        """Whether continuous latents stand in its observed value: cells that were not seen, put in by the model."""
        if self.completions is None or self.site.role != "observed":
            return False
        return any(k[0] == "latent" for k in self.graph.needs((self.name, "value")))

    @property
    def parents(self) -> tuple[Latent, ...]:
        """Latents that the arguments of the distribution read."""
        return tuple(z for z in self.latents if z.name != self.name)

    @property
    def cell_axes(self) -> tuple[str, ...]:
        """Names of the axes of the cells, before the feature axis."""
        latents = self.parents if self.family else self.latents
        return tuple(z.name for z in latents) + ((NODES,) if self.completions else ()) + self.site.axes

    def argument(self, key: str, values: Mapping[Any, Any], event_dim: int = 0, at_points: bool = False) -> Array:
        """An output of the site, `(*states, *batch, *event)`, of size one along every axis that it does not vary on.

        With `at_points` the axis of continuous latents holds the points that nodes are combined of, not the nodes.
        """
        output = (self.name, key)

        def at(states: Mapping) -> tuple[Array]:
            return (jnp.asarray(self.graph.evaluate([output], {**values, **states})[0]),)

        return self.over_states(output, at, event_dim, values, at_points)[0]

    def over_states(
        self,
        output: tuple,
        function: Callable[[Mapping], tuple],
        event_dim: int,
        values: Mapping[Any, Any],
        at_points: bool = False,
    ) -> tuple[Array, ...]:
        """Apply `function` of the latents' values under `vmap` over all states of those that `output` reads.

        The others get an axis of size one. Continuous latents come after the discrete ones, on one axis for all.
        """
        read = self.graph.needs(output)
        latents = self.parents if self.family else self.latents
        group = self.completions
        if group is not None and not any(("latent", m.name) in read for m in group.members):
            group = None
        points = group.points(values.get(("nodes", self.name)), len(latents)) if group else None
        apart = points.apart if points else [False] * len(latents)  # nodes of their own for every state
        here = [("latent", z.name) in read or a for z, a in zip(latents, apart, strict=True)]
        varying = [(z, a) for z, a, h in zip(latents, apart, here, strict=True) if h]
        over: list = [jnp.asarray(z.states) for z, _ in varying] + ([points.value] if points else [])
        found = selected(self.graph, output, [z for z, _ in varying])
        rows = [s.rows(self.graph, values) for s in found]

        def at(states: list, rows: list) -> tuple:
            shapes = [self.graph.inputs["latent", z.name].shape for z, _ in varying]
            given: dict[Any, Any] = {s.output: r for s, r in zip(found, rows, strict=True)}
            given |= {("latent", z.name): jnp.broadcast_to(s, n) for (z, _), s, n in zip(varying, states, shapes)}  # noqa: B905
            return function({**given, **group.placed(self.graph, states[-1])} if group else given)

        for i in reversed(range(len(over))):
            along = points is not None and i < len(varying) and varying[i][1]
            mapped = [0 if j == i or (along and j == len(varying)) else None for j in range(len(over))]
            at = jax.vmap(at, in_axes=(mapped, [0 if s.latent == i else None for s in found]))
        parts = tuple(
            self._padded(o, here + ([group is not None] if self.completions else []), event_dim) for o in at(over, rows)
        )
        if group is None or not group.affine or at_points or self.pooled:
            return parts
        nodes: Any = values.get(("nodes", self.name))
        return tuple(group.combined(p, len(latents), event_dim, nodes) for p in parts)

    def _padded(self, array: Array, varying: list[bool], event_dim: int) -> Array:
        """Give `array` an axis for every latent and every batch axis."""
        sizes = iter(array.shape[: sum(varying)])
        states = [next(sizes) if v else 1 for v in varying]
        batch = array.shape[sum(varying) : array.ndim - event_dim]
        padding = (1,) * (len(self.site.axes) - len(batch))
        return array.reshape(*states, *padding, *batch, *array.shape[array.ndim - event_dim :])

    def arguments(self, values: Mapping[Any, Any], rows: Rows) -> dict[str, Array]:
        """Arguments of the family at every state, standardised as the rows are."""
        family = self._family
        if self.pooled:
            return on_latents(self, values, rows)
        dims = dict(zip(family.args, family.arg_dims, strict=True))
        args = {
            a: self.argument(f"arg:{a}", values, d) for a, d in dims.items() if not (self.coefficients and a == "loc")
        }
        if self.coefficients:
            args["loc"] = self._coefficients(values)
        if family.standardise is not None and rows.centre is not None and rows.spread is not None:
            args = family.standardise(args, rows.centre, rows.spread)
        return args

    def _coefficients(self, values: Mapping[Any, Any]) -> Array:
        """Coefficients of a regression at every state, `(*states, 1..., p)`."""

        def at(states: Mapping) -> tuple[Array]:
            parts = self.graph.evaluate_atoms(self.coefficients, {**values, **states})
            return (jnp.concatenate([jnp.ravel(p) for p in parts]),)

        return self.over_states((self.name, "arg:loc"), at, 1, values)[0]

    @property
    def _differentiated_twice(self) -> bool:
        """Whether the table's derivative in nodes of latents is differentiated in turn."""
        return self.completions is not None and not self.completions.fixed

    @property
    def _family(self) -> Family:
        assert self.family is not None
        return self.family

    def cells(self, values: Mapping[Any, Any], rows: Rows) -> Any:
        """What the parameters are to this factor: `(eta, A)`, or the table itself."""
        if self.family is None:
            return self.argument("elem", self._inside(values) if self.is_prior else values)
        eta, log_normalizer = self.family.natural(self.arguments(values, rows))
        if self.pooled:  # statistics of what is the same for all outputs are there once
            sizes = [s if a.startswith("#") else 1 for a, s in zip(self.site.axes, self.site.shape, strict=True)]
            eta = jax.tree.map(lambda x: jnp.broadcast_to(x, (*x.shape[: -len(sizes) - 2], *sizes, *x.shape[-2:])), eta)
        return eta, log_normalizer

    def _inside(self, values: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """A probability of zero or one, taken a hair inside: its prior's density would be 0 times log 0."""
        if not self.site.support.startswith(("Simplex", "UnitInterval")):
            return values
        value = values["param", self.name]
        info = jnp.finfo(value.dtype)
        return {**values, ("param", self.name): jnp.clip(value, info.tiny, 1 - info.eps)}

    def table(self, cells: Any, rows: Rows) -> Table:
        """Log density over the factor's latents and kept plates; linear in `cells`."""
        value = self._natural_table(cells, rows) if self.family else self._direct_table(cells, rows)
        if rows.base is not None and not self.own:
            value = add(value, rows.base)
        if rows.scale is not None:
            value = multiply(value, rows.scale)
        gone = [a for a in value.axes if a not in self.kept and a not in {NODES, *(z.name for z in self.latents)}]
        return Table(value.sum(gone), frozenset(z.name for z in self.latents), self.plates, self.route)

    def _natural_table(self, cells: tuple[Array, Array], rows: Rows) -> Named:
        eta = named(cells[0][..., None, :], (*self.cell_axes, "", FEATURE))
        if FEATURE not in eta.axes:
            eta = Named(eta.array[..., None], (*eta.axes, FEATURE))
        constants = named(-cells[1], self.cell_axes)
        keep = self.keep(rows)
        if self.own:
            out = add(contract(keep, eta, self.features(rows)), self.constants(keep, constants))
            return self._bounded(out if rows.base is None else add(out, rows.base), rows)
        x = Named(jnp.zeros(()), ("",)) if rows.features else self.observations(rows)
        if self.coefficients and rows.mask is None and set(x.axes[1:]) <= set(keep):
            value = squared_residuals(keep, eta, x, lambda: self.features(rows), FEATURE)
            return add(value, self.constants(keep, constants))
        many = self.times or eta.size(FEATURE) >= LOOK_UP_FROM
        looked = self._family.looks_up and many and not self._differentiated_twice
        if looked and set(x.axes) <= set(keep) - set(eta.axes):
            value = looked_up(eta, FEATURE, x)
            value = value if rows.mask is None else multiply(value, rows.mask)
            return add(value, contract_sum(keep, self._counted(keep, constants, x, rows)))
        features = self.features(rows)
        counted = self._counted(keep, constants, features, rows)
        return contract_sum(keep, (eta, features), counted, twice=self._differentiated_twice)

    def constants(self, keep: tuple[str, ...], value: Named) -> Named:
        """A term of every cell, summed over what is not kept."""
        return repeated(contract(keep, value), self._repeats({*value.axes, *keep}))

    def _counted(self, keep: tuple[str, ...], value: Named, features: Named, rows: Rows) -> tuple[Named, Named]:
        """A term of every cell and how often each row has it: a pair to contract beside the features."""
        if rows.mask is not None:
            count = Named(as_float(rows.mask.array), rows.mask.axes)
            return repeated(value, self._repeats({*value.axes, *keep, *count.axes})), count
        once = set(value.axes).isdisjoint(features.axes)
        plates = tuple(a for a in features.axes if a in keep) if once else ()
        return self.constants(keep, value), Named(jnp.ones([features.size(a) for a in plates]), plates)

    def keep(self, rows: Rows) -> tuple[str, ...]:
        scaled = rows.scale.axes if rows.scale is not None else ()
        nodes = (NODES,) if self.completions else ()
        return union(self.times, [z.name for z in self.latents], nodes, self.kept, scaled)

    def _repeats(self, present: set[str]) -> float:
        """Number of equal terms along the axes that are summed but that nothing varies on."""
        axes = zip(self.site.axes, self.site.shape, strict=True)
        return float(np.prod([s for a, s in axes if a not in present], dtype=float))

    def features(self, rows: Rows) -> Named:
        """Sufficient statistics of the rows, masked."""
        if rows.features is not None:
            return rows.features
        value = self.observations(rows)
        batch = value.axes[self._family.event_dim :]
        fixed: dict[str, Any] = {k: f.to(batch) for k, f in (rows.fixed or {}).items()}
        if self._family.sized_by:
            fixed["size"] = self.graph.shape((self.name, f"arg:{self._family.sized_by}"))[-1]
        out = Named(self._family.features(value.array, fixed), (FEATURE, *batch))
        if rows.mask is None or self.own:
            return out
        axes = (FEATURE, *(a for a in rows.mask.axes if a not in out.axes), *batch)
        return Named(out.to(axes) * rows.mask.to(axes), axes)

    def observations(self, rows: Rows) -> Named:
        """Values with event axes first and the longest kept plate last, standardised."""
        value, events = rows.value, self._family.event_dim
        assert value is not None
        if self.own or rows.ready:
            return value
        batch, moments = value.axes[: len(value.axes) - events], self.moments(rows)
        size = dict(zip(self.site.axes, self.site.shape, strict=True))
        order = sorted(batch, key=lambda a: (a in self.kept, size[a]))
        names = value.axes[len(batch) :]
        return Named(turned(value.array, [value.axes.index(a) for a in (*names, *order)], moments), (*names, *order))

    def moments(self, rows: Rows) -> tuple[Array, ...]:
        """Mean and standard deviation by which values are standardised, aligned with them; none where they are not."""
        if rows.ready or rows.centre is None or rows.spread is None:
            return ()
        if self._family.event_dim:
            return rows.centre, rows.spread
        assert rows.value is not None
        return tuple(named(m, self.site.axes).to(rows.value.axes) for m in (rows.centre, rows.spread))

    def _direct_table(self, cells: Array, rows: Rows) -> Named:
        value = named(cells, self.cell_axes)
        if self.own:
            value = self._bounded(value, rows)
        elif rows.mask is not None:
            value = choose(rows.mask, value, 0.0)
        return repeated(value, self._repeats({*value.axes, *self.keep(rows)}))

    def _bounded(self, value: Named, rows: Rows) -> Named:
        """A latent's own table: impossible states have no density, and a cell that a mask takes out counts once."""
        own = self.latents[0]
        if own.name not in value.axes and own.num_states > 1:  # a flat density still has a term for every state
            flat = jnp.broadcast_to(value.array, (own.num_states, *value.array.shape))
            value = Named(flat, (own.name, *value.axes))
        if rows.inside is not None:
            value = choose(rows.inside, value, -jnp.inf)
        if rows.mask is not None:
            value = choose(rows.mask, value, -float(np.log(self.latents[0].num_states)))
        return value


def repeated(value: Named, times: float) -> Named:
    return value if times == 1 else Named(value.array * times, value.axes)

"""What the M-step sees: the factors, the data's rows, and `Q`, linear in the expected statistics.

In: factors and a `Bundle` of data. Out: cells and
`Q(parameters) = sum over factors of <statistics, cells(parameters)>`, of which every M-step is an exact or approximate
maximiser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from autoem.e_step.elimination.eliminate import Layout
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named
from autoem.ir import Param
from autoem.passes.link import Declined, Known, Linear, Monomial, Value, interpret

Params = Mapping[str, Array]
Statistics = Mapping[str, Any]
CELLS = "·cells"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """All arrays that a kernel takes besides the parameters; `nodes` are those of continuous latents, by factor.

    `moments` are the mean and the covariance of the rows, where a fit needs no more of them.
    """

    data: dict[int, Array]
    key: Array
    rows: dict[str, Rows]
    scales: Mapping[str, Named | None]
    cells: dict[str, Array]
    constant: Array
    tail: dict[str, Rows] | None = None
    nodes: dict[str, Any] = dataclasses.field(default_factory=dict)
    moments: tuple[Array, Array] | None = None


jax.tree_util.register_dataclass(Bundle, [f.name for f in dataclasses.fields(Bundle)], [])


def graph_values(bundle: Bundle, params: Params) -> dict:
    """Inputs of the model's graph."""
    values: dict = {("data", i): x for i, x in bundle.data.items()}
    values["key", 0] = bundle.key
    values.update({("param", n): v for n, v in params.items()})
    values.update({("nodes", n): v for n, v in bundle.nodes.items()})
    return values


def with_cells(statistics: Statistics, params: Params, cells: Mapping[str, Any]) -> dict[str, Any]:
    """Expected statistics beside the cells that they were taken from, and the parameters of those."""
    return {**statistics, CELLS: (dict(params), dict(cells))}


def cells_of(factor: Factor, params: Params, statistics: Statistics) -> Any:
    """The E-step's cells of a factor at `params`; None where it had others, or did not hand them on.

    What the E-step has computed need not be computed again. That the parameters are the same is seen by identity: a
    block that follows another has others, if that moved what the factor reads.
    """
    then, cells = statistics.get(CELLS, ({}, {}))
    same = all(then.get(n) is params[n] for n in factor.params)
    return cells.get(factor.name) if same else None


def make_layout(layout: Layout, bundle: Bundle) -> Layout:
    return dataclasses.replace(layout, scales=bundle.scales, cells=bundle.cells)


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a parameter enters: an argument of a natural factor, or (argument None) a density as a whole."""

    factor: Factor
    argument: str | None

    @property
    def key(self) -> tuple[str, str]:
        return (self.factor.name, f"arg:{self.argument}" if self.argument else "elem")

    @property
    def event_dim(self) -> int:
        family = self.factor.family
        return family.arg_dims[family.args.index(self.argument)] if family and self.argument else 0

    def __str__(self) -> str:
        site = self.factor.site
        return f"{site.distribution}({self.argument}) of '{site.name}'" if self.argument else f"'{site.name}'"


def listed(uses: Sequence[Use]) -> str:
    """Places in a sentence, a few of them where they are many."""
    named = [str(u) for u in uses]
    return ", ".join(named if len(named) <= 6 else [*named[:4], f"... {len(named) - 4} more"])


def uses_of(param: str, factors: Sequence[Factor]) -> list[Use]:
    """Every place where `param` enters the density, its own prior excepted."""
    uses = []
    for factor in factors:
        if param not in factor.params or (factor.is_prior and factor.name == param):
            continue
        family = factor.family
        if family is None:
            uses.append(Use(factor, None))
            continue
        for arg in family.args:
            if ("param", param) in factor.graph.needs((factor.name, f"arg:{arg}")):
                uses.append(Use(factor, arg))
    return uses


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The M-step's view of a plan: factors by name, the parameters, and which of the data are 0 or 1 throughout."""

    factors: Mapping[str, Factor]
    params: Mapping[str, Param]
    binary: frozenset[int] = frozenset()

    def cells(self, params: Params, bundle: Bundle, names: Sequence[str] | None = None) -> dict[str, Any]:
        values = graph_values(bundle, params)
        if names is None:  # those of continuous latents only where they are asked for: their nodes are the E-step's
            names = [n for n, f in self.factors.items() if f.completions is None]
        return {n: self.factors[n].cells(values, bundle.rows[n]) for n in names}

    def touched(self, names: Sequence[str]) -> tuple[str, ...]:
        """Factors that read any of the parameters `names`."""
        return tuple(f.name for f in self.factors.values() if set(names) & set(f.params))

    def q(self, params: Params, statistics: Statistics, bundle: Bundle, names: Sequence[str]) -> Array:
        """Expected complete-data log density, in nats, of the factors `names`, up to a constant."""
        cells = self.cells(params, bundle, names)
        return sum((inner(statistics[n], cells[n]) for n in names), start=jnp.zeros(()))

    def arguments(self, use: Use, params: Params, bundle: Bundle) -> dict[str, Array]:
        return use.factor.arguments(graph_values(bundle, params), bundle.rows[use.factor.name])

    def statistics(self, use: Use, statistics: Statistics) -> tuple[Any, Array]:
        """`(t, n)` of a natural factor: expected sufficient statistics and counts of every cell."""
        t, n = statistics[use.factor.name]
        return t, -n

    def link(self, use: Use, start: Callable[[], Mapping[Any, Value]], params: Params, bundle: Bundle) -> Linked:
        """Interpret the place `use` as a function of the targets that `start` makes.

        Raises:
            Declined: it is not of a form that the algebra of `link` holds.
        """
        factor, values = use.factor, graph_values(bundle, params)
        kind: list[Value] = []
        switches: set[Any] = {("latent", z.name) for z in factor.latents if set(z.states.ravel().tolist()) <= {0, 1}}
        switches |= {("data", i) for i in self.binary}

        def parts(states: Mapping) -> tuple[Array, ...]:
            given = {**values, **states}
            out = interpret(factor.graph, factor.graph.outputs[use.key], start(), given, switches)
            kind[:] = [dataclasses.replace(out) if not isinstance(out, Known) else out]
            return _parts(out)

        # a regression's family takes its coefficients, but the place in the model is the location of each row
        rows = (bool(factor.coefficients) or factor.pooled) and use.argument == "loc"
        arrays = factor.over_states(use.key, parts, factor.site.event_dim if rows else use.event_dim, values)
        return Linked(kind[0], arrays)


@dataclasses.dataclass(frozen=True)
class Linked:
    """The form of a place, with its arrays over all latent states: `(value,)` if linear, `(log, co)` if a monomial."""

    form: Value
    arrays: tuple[Array, ...]


def _parts(out: Value) -> tuple[Array, ...]:
    if isinstance(out, Linear):
        return (out.value, *(out.pair or ()))
    if isinstance(out, Monomial):
        return (out.log,) if out.co is None else (out.log, out.co)
    if isinstance(out, Known):
        return (jnp.asarray(out.value),)
    raise Declined("it enters with a negative sign")


def inner(statistics: Any, cells: Any) -> Array:
    """`<statistics, cells>`; a state that is never visited may have density zero."""
    products = jax.tree.map(lambda s, c: jnp.where(s == 0, 0, s * jnp.where(s == 0, 0, c)).sum(), statistics, cells)
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))

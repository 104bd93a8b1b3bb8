"""From the data of a call to the arrays that a kernel takes.

In: a classified program, its factors and the data. Out: a `Bundle`, without a copy of what is large and can be passed
on as it stands.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import DataError
from autoem.e_step.elimination.places import build_layout
from autoem.e_step.groups import build_blocks, with_gaps
from autoem.e_step.tables.constants import log_density_constant
from autoem.e_step.tables.factors import build_factors
from autoem.e_step.tables.prepared import TURN_UP_TO, prepare
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.jaxpr import Variable
from autoem.graph.named import Named
from autoem.ir import Program
from autoem.lowering.chunks import Chunks, shardings, spread_data, spread_rows
from autoem.lowering.moments import by_entry, moments_along
from autoem.m_step.problem import Bundle

EMPTY: Mapping = types.MappingProxyType({})
REMEMBERED = 64 * 2**20  # bytes of the data up to which their routes are kept for the next call


class Watched(Mapping):
    """Data and key of a call as inputs of a graph; `read` holds the names of those that were looked at."""

    def __init__(self, data: Mapping[int, Array], key: Array):
        self.given = {**{("data", i): x for i, x in data.items()}, ("key", 0): key}
        self.read: set[Any] = set()

    def __getitem__(self, name: Any) -> Array:
        self.read.add(name)
        return self.given[name]

    def __iter__(self) -> Iterator:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)

    def __contains__(self, name: object) -> bool:
        return name in self.given


@dataclasses.dataclass(eq=False)
class Routes:
    """Cells that rows read, with the data that told so: the next call finds them again if these are the same.

    `names` are those of the cells that the plan was made with.
    """

    names: frozenset[str] | None = None
    told: dict[int, np.ndarray] | None = None
    cells: dict[str, Array] = dataclasses.field(default_factory=dict)

    def of(self, find: Callable, program: Program, factors: tuple[Factor, ...], data: Mapping, key: Array):
        """The cells of a call's data.

        Raises:
            DataError: latents nest, or are crossed, in another way than in the data that the plan was made for.
        """
        if self.told is not None and all(agree(x, data[i]) for i, x in self.told.items()):
            return self.cells
        values = Watched(data, key)
        cells = find(program, factors, values)
        if self.names is not None and cells.keys() != self.names:
            problem = (
                "rows read their latents by other indices than those that the plan was made for: they nest otherwise"
            )
            mend = "a new EM(model) for these data"
            raise DataError("the data", problem=problem, mend=mend, kind="argument")
        numbers = [n[1] for n in values.read if n[0] == "data"]
        small = sum(data[i].nbytes for i in numbers) <= REMEMBERED
        # copies, since an array of NumPy may be written to before the next call
        self.told = {i: np.array(data[i]) for i in numbers} if small and ("key", 0) not in values.read else None
        self.cells = cells
        return cells


def agree(a: np.ndarray, b: Array) -> bool:
    """Whether arrays hold the same numbers, and NaN in the same places."""
    other = np.asarray(b)
    return a.shape == other.shape and np.array_equal(a, other, equal_nan=a.dtype.kind == "f")


def route_cells(program: Program, factors: tuple[Factor, ...], values: Mapping) -> dict[str, Array]:
    """The cells of every site whose rows find them through the model's data flow."""
    known, cells = build_factors(program, values)
    cells.update(build_blocks(program, known, values)[1])
    cells.update(with_gaps(program, known, values)[2])
    return {n: jnp.asarray(c) for n, c in cells.items()}


class Preparation:
    """`make_bundle` for one structure, compiled by `compiled` at the first call.

    Large arrays are passed on as they are; others are copied, turned as the kernel reads them. All are passed on where
    a fit sees the rows of a plate through moments alone: `by_moments` are the plate and the sites observed along it.
    """

    def __init__(
        self,
        program: Program,
        factors: tuple[Factor, ...],
        compiled: Callable,
        by_moments: tuple[str, tuple[str, ...]] | None,
    ):
        self._program, self._factors, self._compiled = program, factors, compiled
        self._passed = passed_on(program, factors, 0 if by_moments else TURN_UP_TO)
        self._by_moments = by_moments if by_moments and set(by_moments[1]) <= set(self._passed) else None
        self._whole = compiled(self._make)
        self._spread = None

    def whole(self, data: Mapping[int, Array], key: Array, cells: Mapping[str, Array], fitted: bool = False) -> Bundle:
        """The data in one piece; with moments where they are to be `fitted` by them."""
        moments = None
        if fitted and self._by_moments:
            plate, names = self._by_moments
            moments = moments_along(plate)([self._value(n, data) for n in names])
        return self._with_passed_on(self._whole(data, key, cells, moments), data)

    def spread(self, data: Mapping[int, Any], key: Array, chunks: Chunks) -> Bundle:
        """The data over all devices, each of which prepares rows of its own."""
        placed = spread_data(data, chunks)
        if self._spread is None:
            out = shardings(jax.eval_shape(self._make, placed, key, {}), chunks)
            self._spread = self._compiled(self._make, out_shardings=out)
        return spread_rows(self._with_passed_on(self._spread(placed, key, {}), placed), chunks)

    def _make(
        self, data: Mapping[int, Array], key: Array, cells: Mapping[str, Array], moments: tuple | None = None
    ) -> Bundle:
        known = {}
        if moments is not None and self._by_moments:
            plate, names = self._by_moments
            known = dict(zip(names, by_entry([self._value(n, data) for n in names], plate, moments), strict=True))
        bundle = make_bundle(self._program, self._factors, data, key, cells, self._passed, known)
        return dataclasses.replace(bundle, moments=moments)

    def _with_passed_on(self, bundle: Bundle, data: Mapping[int, Array]) -> Bundle:
        """Put the call's own arrays where rows are no more than them, so that no copy is made."""
        rows = {n: dataclasses.replace(bundle.rows[n], value=self._value(n, data)) for n in self._passed}
        return dataclasses.replace(bundle, rows={**bundle.rows, **rows})

    def _value(self, name: str, data: Mapping[int, Array]) -> Named:
        """Rows of a site that are an argument of the call as it stands."""
        array, site = data[self._passed[name]], self._program.sites[name]
        return Named(array, (*site.axes, *(f"event{j}" for j in range(array.ndim - len(site.shape)))))


def make_bundle(
    program: Program,
    factors: tuple[Factor, ...],
    data: Mapping[int, Array],
    key: Array,
    cells: Mapping[str, Array],
    passed: Collection[str] = (),
    known: Mapping[str, tuple[Array, Array]] = EMPTY,
) -> Bundle:
    """Everything that the kernel takes besides parameters, and besides the rows of the sites that are `passed` on.

    Of some sites the mean and the variance of every entry over the rows are `known`.
    """
    values = {**{("data", i): x for i, x in data.items()}, ("key", 0): key}
    rows = {f.name: prepare(f, program, values, cells, known.get(f.name)) for f in factors}
    layout = build_layout(program, values, cells)
    constant = jnp.zeros(())
    for f in factors:
        constant = constant + whole_constant(f, rows[f.name])
    rows = {n: dataclasses.replace(r, value=None, ready=False) if n in passed else r for n, r in rows.items()}
    kept = {i: data[i] for i in data_of_cells(program, factors)} if data else {}
    return Bundle(kept, key, rows, layout.scales, dict(cells), constant)


def whole_constant(f: Factor, rows: Rows) -> Array | float:
    """`log h(x)` of a site, summed over its rows; the spread's part of it once for all, where every row counts once."""
    spread = rows.spread if rows.mask is None and rows.weight is None else None
    part = log_density_constant(f, rows if spread is None else dataclasses.replace(rows, spread=None))
    if part is None:
        return 0.0
    if spread is None:
        return part.array.sum()
    times = part.array.size if f._family.event_dim else part.array.size / spread.size
    return part.array.sum() - times * jnp.log(spread).sum()


def passed_on(program: Program, factors: tuple[Factor, ...], turned: int) -> dict[str, int]:
    """Sites whose rows are an argument of the call as it stands, of more than `turned` bytes: name -> number of it."""
    by_variable = {v: k[1] for k, v in program.full.inputs.items() if k[0] == "data"}
    out = {}
    for f in factors:
        atom = program.full.outputs.get((f.name, "value"))
        plain = f.family is not None and f.site.role == "observed" and not f.site.masked and not f.coefficients
        if plain and isinstance(atom, Variable) and atom in by_variable and all(s > 1 for s in f.site.shape):
            events = len(atom.shape) - f.family.event_dim  # type: ignore[union-attr]
            large = atom.aval.size * atom.aval.dtype.itemsize > turned
            if large and atom.shape[:events] == f.site.shape:
                out[f.name] = by_variable[atom]
    return out


def data_of_cells(program: Program, factors: tuple[Factor, ...]) -> list[int]:
    """Numbers of the data that the cells themselves are computed from; the other data live on in the rows alone."""
    keys = set()
    for f in factors:
        fields = [f"arg:{a}" for a in f.family.args] if f.family else ["elem"]
        fields += ["value"] if f.value_hidden else []
        atoms = [f.graph.outputs[f.name, a] for a in fields if not (f.coefficients and a == "arg:loc")]
        keys |= f.graph.needs_of([*atoms, *f.coefficients])
    for name in program.latents:
        if masks := program.outputs_along(name, "mask"):
            seen = name.removesuffix("_unobserved") + "_observed"
            parts = [k for field in ("value", "mask") for k in program.outputs_along(seen, field)]
            keys |= program.full.needs(*masks, *parts)
    return sorted(k[1] for k in keys if k[0] == "data")

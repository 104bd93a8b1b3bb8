"""From the data of a call to the arrays that a kernel takes.

In: a classified program, its factors and the data. Out: a `Bundle`, without a copy of what is large and can be passed
on as it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from autoem._chunks import Chunks, shardings, spread_data, spread_rows
from autoem._jaxpr import Variable
from autoem._named import Named
from autoem.e_step.factors import TURN_UP_TO, build_factors, prepare
from autoem.e_step.groups import build_blocks, with_gaps
from autoem.e_step.places import build_layout
from autoem.e_step.tables import Factor, log_density_constant
from autoem.ir import Program
from autoem.m_step.problem import Bundle


def route_cells(program: Program, factors: tuple[Factor, ...], data: Mapping, key: Array) -> dict[str, Array]:
    values = {**{("data", i): x for i, x in data.items()}, ("key", 0): key}
    known, cells = build_factors(program, values)
    cells.update(build_blocks(program, known, values)[1])
    cells.update(with_gaps(program, known, values)[2])
    return {n: jnp.asarray(c) for n, c in cells.items()}


class Preparation:
    """`make_bundle` for one structure, compiled by `compiled` at the first call."""

    def __init__(self, program: Program, factors: tuple[Factor, ...], compiled: Callable):
        self._program, self._factors, self._compiled = program, factors, compiled
        self._whole = compiled(self._make)
        self._spread = None

    def whole(self, data: Mapping[int, Array], key: Array, cells: Mapping[str, Array]) -> Bundle:
        """The data in one piece."""
        return with_passed_on(self._program, self._factors, self._whole(data, key, cells), data)

    def spread(self, data: Mapping[int, Any], key: Array, chunks: Chunks) -> Bundle:
        """The data over all devices, each of which prepares rows of its own."""
        placed = spread_data(data, chunks)
        if self._spread is None:
            out = shardings(jax.eval_shape(self._make, placed, key, {}), chunks)
            self._spread = self._compiled(self._make, out_shardings=out)
        return spread_rows(with_passed_on(self._program, self._factors, self._spread(placed, key, {}), placed), chunks)

    def _make(self, data: Mapping[int, Array], key: Array, cells: Mapping[str, Array]) -> Bundle:
        return make_bundle(self._program, self._factors, data, key, cells)


def make_bundle(program: Program, factors: tuple[Factor, ...], data: Mapping[int, Array], key: Array, cells) -> Bundle:
    """Everything that the kernel takes besides parameters."""
    values = {**{("data", i): x for i, x in data.items()}, ("key", 0): key}
    rows = {f.name: prepare(f, program, values, cells) for f in factors}
    layout = build_layout(program, values, cells)
    constant = jnp.zeros(())
    for f in factors:
        part = log_density_constant(f, rows[f.name])
        constant = constant if part is None else constant + part.array.sum()
    passed = passed_on(program, factors)
    rows = {n: dataclasses.replace(r, value=None) if n in passed else r for n, r in rows.items()}
    kept = {i: data[i] for i in data_of_cells(program, factors)} if data else {}
    return Bundle(kept, key, rows, layout.scales, dict(cells), constant)


def passed_on(program: Program, factors: tuple[Factor, ...]) -> dict[str, int]:
    """Sites whose rows are an argument of the call as it stands: site name -> number of the data."""
    by_variable = {v: k[1] for k, v in program.full.inputs.items() if k[0] == "data"}
    out = {}
    for f in factors:
        atom = program.full.outputs.get((f.name, "value"))
        plain = f.family is not None and f.site.role == "observed" and not f.site.masked and not f.coefficients
        if plain and isinstance(atom, Variable) and atom in by_variable and all(s > 1 for s in f.site.shape):
            events = len(atom.shape) - f.family.event_dim  # type: ignore[union-attr]
            large = atom.aval.size * atom.aval.dtype.itemsize > TURN_UP_TO  # smaller data are turned, which copies them
            if large and atom.shape[:events] == f.site.shape:
                out[f.name] = by_variable[atom]
    return out


def with_passed_on(program: Program, factors: tuple[Factor, ...], bundle: Bundle, data: Mapping[int, Array]) -> Bundle:
    """Put the call's own arrays where rows are no more than them, so that no copy is made."""
    rows = dict(bundle.rows)
    for name, i in passed_on(program, factors).items():
        site = program.sites[name]
        events = tuple(f"event{j}" for j in range(data[i].ndim - len(site.shape)))
        rows[name] = dataclasses.replace(rows[name], value=Named(data[i], (*site.axes, *events)))
    return dataclasses.replace(bundle, rows=rows)


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

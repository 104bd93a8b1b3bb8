"""Rows in pieces: chunks that fit the cache, spread over the devices that JAX has.

Statistics are sums over rows, so a plate's rows may be taken piece by piece when every latent lives in the plate and
every cell is the same for all of its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from autoem.e_step.elimination.eliminate import Layout
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named
from autoem.ir import Program
from autoem.m_step.problem import Bundle, Params, Problem

CHUNK_BYTES = 256 * 1024  # features and tables of one chunk: they should stay in a core's second-level cache
MIN_CHUNK, MAX_CHUNK = 256, 2048
SHARD_FROM = 32_768  # rows: below this the exchange between devices costs more than it saves


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Rows of `plate` are taken `size` at a time, on `devices` devices.

    `main` of them are spread evenly, the rest is a tail.
    """

    plate: str
    rows: int
    size: int
    devices: int

    @property
    def main(self) -> int:
        return self.rows - self.rows % self.devices


def resized(factor: Factor, plate: str, size: int) -> Factor:
    """The factor of `size` rows of `plate`."""
    site = factor.site
    shape = tuple(size if a == plate else s for a, s in zip(site.axes, site.shape, strict=True))
    return dataclasses.replace(factor, site=dataclasses.replace(site, shape=shape))


def slice_named(x: Named | None, plate: str, start, length: int) -> Named | None:
    if x is None or plate not in x.axes:
        return x
    return Named(jax.lax.dynamic_slice_in_dim(x.array, start, length, x.axes.index(plate)), x.axes)


def is_named(x: Any) -> bool:
    return isinstance(x, Named)


def slice_rows(rows: Rows, plate: str, start, length: int) -> Rows:
    """Rows `start : start + length` of everything that has an axis for `plate`."""
    return jax.tree.map(lambda x: slice_named(x, plate, start, length) if is_named(x) else x, rows, is_leaf=is_named)


def row_specs(rows: Mapping[str, Rows], plate: str):
    """How the rows are spread over devices."""

    def spec(x):
        if not is_named(x):
            return P()
        return Named(P(*("rows" if a == plate else None for a in x.axes)), x.axes)  # type: ignore[arg-type]

    return jax.tree.map(spec, dict(rows), is_leaf=is_named)


def device_mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.local_devices()[:devices]), ("rows",))


def spread_rows(bundle: Bundle, chunks: Chunks | None) -> Bundle:
    """Place the rows on their devices, keeping aside the few that do not divide evenly."""
    if chunks is None or (chunks.devices == 1 and chunks.main == chunks.rows):
        return bundle
    main, tail = bundle.rows, None
    if chunks.main < chunks.rows:
        main = {n: slice_rows(r, chunks.plate, 0, chunks.main) for n, r in bundle.rows.items()}
        tail = {n: slice_rows(r, chunks.plate, chunks.main, chunks.rows - chunks.main) for n, r in bundle.rows.items()}
    bundle = dataclasses.replace(bundle, rows=main, tail=tail)
    return jax.tree.map(jax.device_put, bundle, shardings(bundle, chunks))


def shardings(bundle: Bundle, chunks: Chunks) -> Bundle:
    """Where each array of a bundle lies: its rows spread over the devices, all else on every one."""
    mesh = device_mesh(chunks.devices)
    rest = jax.tree.map(lambda _: NamedSharding(mesh, P()), dataclasses.replace(bundle, rows={}))
    rows = jax.tree.map(lambda s: NamedSharding(mesh, s), row_specs(bundle.rows, chunks.plate))
    return dataclasses.replace(rest, rows=rows)


def spread_data(data: Mapping[int, Any], chunks: Chunks) -> dict[int, Array]:
    """Data of a call on the devices, so that each prepares rows of its own."""
    mesh = device_mesh(chunks.devices)

    def spread(x) -> Array:
        along = np.ndim(x) > 0 and np.shape(x)[0] == chunks.rows
        if isinstance(x, Array) and jax.default_backend() == "cpu":
            x = np.asarray(x)  # a view, slices of which need no copy either
        return jax.device_put(x, NamedSharding(mesh, P("rows") if along else P()))

    return {i: spread(x) for i, x in data.items()}


def plan_chunks(program: Program, problem: Problem, layout: Layout, params: Params, bundle: Bundle) -> Chunks | None:
    """Whether rows may be taken in chunks: every latent in the plate, every cell the same for all of its rows.

    Sequences are rows too: they go to the devices, but are not cut into smaller chunks, whose steps would do little.
    """
    factors = [f for f in problem.factors.values() if not f.is_prior]
    times = {t: c.length for c in program.chains for t in (c.time, c.bulk)}
    length, found = max(times.values(), default=1), len(jax.local_devices())
    least = max(found, SHARD_FROM // length) if times else MAX_CHUNK + 1
    plates = [p for p in program.plates.values() if p.size >= least and p.name not in times]
    if not plates or bundle.cells or any(s is not None for s in bundle.scales.values()) or (times and found == 1):
        return None
    plate = max(plates, key=lambda p: p.size)
    if any(plate.name not in layout.plates_of[n] for n in program.every_latent):
        return None
    if any(plate.name not in f.site.axes for f in factors):
        return None
    cells = jax.eval_shape(lambda p, b: problem.cells(p, b), dict(params), bundle)
    if any(varies_over(plate.name, f, cells[f.name]) for f in factors):
        return None
    if times:
        return Chunks(plate.name, plate.size, plate.size // found, found)
    devices = found if plate.size >= SHARD_FROM else 1
    itemsize = jnp.result_type(float).itemsize
    rows = CHUNK_BYTES / itemsize / sum(entries_of(f, cells[f.name]) for f in factors)
    size = int(np.clip(2 ** round(np.log2(rows)), MIN_CHUNK, MAX_CHUNK))
    return Chunks(plate.name, plate.size, size, devices)


def varies_over(plate: str, factor: Factor, cells: Any) -> bool:
    """Whether what the parameters are to a factor differs between the rows of a plate."""
    where = len(factor.parents if factor.family else factor.latents) + factor.site.axes.index(plate)
    return any(leaf.ndim > where and leaf.shape[where] > 1 for leaf in jax.tree.leaves(cells))


def entries_of(factor: Factor, cells: Any) -> int:
    """Numbers that one row needs while a chunk is worked on: its features, and its table over the latents."""
    states = int(np.prod([z.num_states for z in factor.latents], dtype=int))
    if factor.family is None or factor.own:
        return states
    eta = cells[0]
    counts = int(np.prod(eta.shape[len(factor.parents) : -1], dtype=int)) if factor.site.masked else 1
    return states + counts + int(np.prod(eta.shape[len(factor.parents) :], dtype=int))

"""Rows of which a fit sees the mean and the covariance alone, replaced by the mean row.

In a block of Gaussian latents whose cells are rows, with loadings and scales that are the same in every row (factor
analysis, principal components, canonical correlation, balanced random effects), the log-likelihood of a row is one
quadratic in what was observed of it, and so are all expected statistics. Their sums over rows are those of the mean
row, and of the covariance about it: see `e_step.gaussian.spread`. An iteration costs nothing in the rows then.

In: a kernel and its data. Out: the same, smaller; questions to the fitted model go to the rows themselves.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.elimination.layout import Table
from autoem.e_step.gaussian.block import GaussianBlock
from autoem.e_step.gaussian.missing import MissingEntries
from autoem.e_step.gaussian.quadratic import EVENT
from autoem.e_step.gaussian.spread import COVARIANCE, SpreadBlock, own_name
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named
from autoem.graph.programs import Program, jit_well
from autoem.lowering.chunks import resized
from autoem.lowering.integrals import Integral
from autoem.lowering.kernel import Kernel
from autoem.lowering.moments import entries_of, joint_moments
from autoem.m_step.problem import Bundle, Params

FEWER = 4  # times fewer rows, from which it is done
MAX_WIDTH = 2_000  # entries of a row, up to which their covariance is taken


@dataclasses.dataclass(frozen=True, eq=False)
class Repeated(Integral):
    """An integral over a cell that counts `times` times."""

    times: float = 1.0

    def integrate(self, params: Params, bundle: Bundle) -> tuple[Table, Any]:
        """The integral over the latents as a table, and the moments of their posterior."""
        table, moments = super().integrate(params, bundle)
        return dataclasses.replace(table, value=Named(table.value.array * self.times, table.value.axes)), moments

    def weights(self, slope: Named) -> Named:
        """How often every cell counts."""
        return Named(jnp.full((), self.times), ())


def plate_of_moments(kernel: Kernel) -> str | None:
    """The plate whose rows enter through their moments alone; None where there is none."""
    if kernel.treatment is not None or kernel.chunks or len(kernel.integrals) != 1:
        return None
    if kernel.program.latents or kernel.program.chains:
        return None
    integral = kernel.integrals[0]
    block = integral.block
    if type(block) is not GaussianBlock or block.dense or block.discrete or block.routed or len(block.plates) != 1:
        return None
    plate = block.plates[0]
    if any(plate in f.site.axes for f in kernel.likelihood_factors):
        return None
    observed = [f for f in block.factors if not f.is_hidden]
    alike = all(f.name in integral.pooled for f in observed) and all(same_law(f, plate) for f in block.factors)
    width = sum(entries(f, plate) for f in observed)
    rows = block.sizes[plate]
    return plate if observed and alike and width < MAX_WIDTH and rows >= FEWER * (width + 1) else None


def seen_by_moments(kernel: Kernel) -> tuple[str, tuple[str, ...]] | None:
    """That plate, and the sites that are observed along it."""
    plate = plate_of_moments(kernel)
    return None if plate is None else (plate, tuple(f.name for f in kernel.integrals[0].factors if not f.is_hidden))


def note_of(kernel: Kernel, accelerated: bool) -> tuple[str, ...]:
    """What the plan says of it; and how to need fewer steps, where EM is known to be slow for such latents."""
    plate, out = plate_of_moments(kernel), ()
    if plate:
        out = (f"'{plate}': the fit sees its rows through their mean and covariance alone, taken once",)
    slow = [n for i in kernel.integrals if i.is_gaussian and i.has_nodes for n in i.block.names]
    if kernel.treatment is not None and kernel.treatment.slow:
        slow += [row.name for row in kernel.treatment.rows()]
    if slow and kernel.blocks and not accelerated and not any(b.remembers for b in kernel.blocks):
        names = ", ".join(f"'{n}'" for n in slow)
        out += (
            f"EM is slow where rows say little of {names}: accelerate=autoem.accelerate.Anderson() needs fewer steps",
        )
    return out


def same_law(f: Factor, plate: str) -> bool:
    """Whether a site says the same of every row of a plate, whose rows it stands in once."""
    if f.site.axes.count(plate) != 1 or f.site.masked or f.site.scaled or f.value_hidden or f.family is None:
        return False
    for arg, events in zip(f.family.args, f.family.arg_dims, strict=True):
        shape = f.graph.shape((f.name, f"arg:{arg}"))
        batch = shape[: len(shape) - events]
        names = f.site.axes[len(f.site.axes) - len(batch) :]
        if any(size > 1 and name == plate for name, size in zip(names, batch, strict=True)):
            return False
    return True


def entries(f: Factor, plate: str) -> int:
    """Numbers that a site observes in one row."""
    events = f.graph.shape((f.name, "value"))
    own = events[len(events) - f._family.event_dim :] if f._family.event_dim else ()
    others = [s for a, s in zip(f.site.axes, f.site.shape, strict=True) if a != plate]
    return int(np.prod([*others, *own], dtype=int))


def condensed(kernel: Kernel, bundle: Bundle) -> tuple[Kernel, Bundle]:
    """The kernel and its data with one row for many, where that changes nothing; as they came where it would."""
    plate = plate_of_moments(kernel)
    if plate is None:
        return kernel, with_sums(kernel, bundle)
    observed = [f for f in kernel.integrals[0].factors if not f.is_hidden]
    values = [bundle.rows[f.name].value for f in observed]
    if not all(v is not None and plate in v.axes for v in values):
        return kernel, bundle
    if any(lies_along(rows, plate) for rows in bundle.rows.values()):
        return kernel, bundle
    form = tuple((v.axes, v.array.shape) for v in values)  # type: ignore[union-attr]
    made = _condensations.setdefault(kernel, {})
    if form not in made:
        made[form] = condensation(kernel, plate, observed, [v for v in values if v is not None])
    small, run = made[form]
    rows, cells = run({f.name: bundle.rows[f.name] for f in observed}, bundle.moments)
    rows, cells = {**bundle.rows, **rows}, {**bundle.cells, **cells}
    return small, dataclasses.replace(bundle, rows=rows, cells=cells, moments=None)


_condensations: weakref.WeakKeyDictionary[Kernel, dict[tuple, tuple[Kernel, Program]]] = weakref.WeakKeyDictionary()


def condensation(
    kernel: Kernel, plate: str, observed: Sequence[Factor], values: Sequence[Named]
) -> tuple[Kernel, Program]:
    """The kernel of one row in place of many, and what makes its row and cells of theirs."""
    sizes = {f.name: {a: v.size(a) for a in entries_of(v, plate)} for f, v in zip(observed, values, strict=True)}

    def run(given: Mapping[str, Rows], moments: Any) -> tuple[dict[str, Rows], dict[str, Array]]:
        rows, cells, units, start = {}, {}, [], 0
        mean, covariance = moments or joint_moments([r.value for r in given.values() if r.value is not None], plate)
        for f in observed:
            of_row = sizes[f.name]
            own = slice(start, start := start + int(np.prod([*of_row.values()], dtype=int)))
            rows[f.name], unit = mean_row(f, given[f.name], plate, mean[own].reshape([*of_row.values()]))
            units.append(unit)
            cells[own_name(f)] = own_covariance(f, covariance[own, own] / jnp.outer(unit, unit), of_row)
        unit = jnp.concatenate(units)
        return rows, {COVARIANCE: covariance / jnp.outer(unit, unit), **cells}

    entries = {n: {EVENT if a == "event0" else a: size for a, size in s.items()} for n, s in sizes.items()}
    return shrunk(kernel, plate, entries), jit_well(run)


def with_sums(kernel: Kernel, bundle: Bundle) -> Bundle:
    """The data with sums over the rows of every pattern of missing entries, where a fit needs no more of them."""
    if kernel.treatment is not None or kernel.chunks:
        return bundle
    blocks = [i.block for i in kernel.integrals if isinstance(i.block, MissingEntries)]
    taken = [b.taken(bundle.rows[b.factor.name], bundle.cells) for b in blocks]
    return dataclasses.replace(bundle, cells={k: v for part in (bundle.cells, *taken) for k, v in part.items()})


def lies_along(rows: Rows, plate: str) -> bool:
    """Whether anything but the observations differs from row to row."""
    rest = jax.tree.leaves(dataclasses.replace(rows, value=None), is_leaf=lambda x: isinstance(x, Named))
    return any(isinstance(x, Named) and plate in x.axes for x in rest)


def mean_row(factor: Factor, rows: Rows, plate: str, mean: Array) -> tuple[Rows, Array]:
    """A site's one row in place of many, standardised if those are; and the unit of every entry."""
    value = rows.value
    assert value is not None
    entries, unit = entries_of(value, plate), jnp.ones_like(mean)
    if moments := factor.moments(rows):
        shape = [1 if a == plate else value.size(a) for a in value.axes]
        centre, unit = (Named(jnp.broadcast_to(m, shape), value.axes).to((plate, *entries))[0] for m in moments)
        mean = (mean - centre) / unit
    turned = tuple(sorted(entries, key="event0".__ne__))  # as `Factor.observations` turns them
    row = Named(jnp.transpose(mean, [entries.index(a) for a in turned]), turned)
    return dataclasses.replace(rows, value=row, ready=True), unit.ravel()


def own_covariance(factor: Factor, covariance: Array, sizes: Mapping[str, int]) -> Array:
    """Of the covariance of a site's entries that of each vector, or the variances of numbers."""
    if not factor._family.event_dim:
        return jnp.diagonal(covariance).reshape([*sizes.values()])
    *others, events = sizes.values()
    count = int(np.prod(others, dtype=int))
    blocks = jnp.diagonal(covariance.reshape(count, events, count, events), axis1=0, axis2=2)
    return jnp.moveaxis(blocks, -1, 0).reshape(*others, events, events)


def shrunk(kernel: Kernel, plate: str, entries: Mapping[str, Mapping[str, int]]) -> Kernel:
    """The kernel with one row in a plate, which stands for all of them."""
    integral = kernel.integrals[0]
    block, times = integral.block, float(integral.block.sizes[plate])
    sizes = {**block.sizes, plate: 1}

    def smaller(f: Factor) -> Factor:
        return dataclasses.replace(resized(f, plate, 1), sizes={**f.sizes, plate: 1})

    small = SpreadBlock(
        members=tuple(dataclasses.replace(m, shape=(1,)) for m in block.members),
        discrete=block.discrete, factors=tuple(map(smaller, block.factors)), plates=block.plates, shape=(1,),
        dense=False, routed=block.routed, sizes=sizes, base=block.base, entries=entries,
    )  # fmt: skip
    factors = {n: smaller(f) for n, f in kernel.problem.factors.items()}
    return dataclasses.replace(
        kernel,
        problem=dataclasses.replace(kernel.problem, factors=factors),
        layout=dataclasses.replace(kernel.layout, sizes={**kernel.layout.sizes, plate: 1}),
        integrals=(Repeated(small, times),),
    )


__all__ = ["condensed", "note_of", "seen_by_moments"]

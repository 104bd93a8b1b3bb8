r"""Rows of which a fit sees the mean and the covariance alone, replaced by a few that have the same.

In a block of Gaussian latents whose cells are rows, with loadings and scales that are the same in every row (factor
analysis, principal components, canonical correlation, balanced random effects), the log-likelihood of a row is one
quadratic in what was observed of it, and so are all expected statistics. Sums over `n` rows `x_i` of dimension `e` are
then those over :math:`e + 1` points

.. math:: x^*_s = \bar x + C^{1/2} z_s, \qquad s = 0, \dots, e,

that count :math:`n / (e + 1)` times each, with `z` the corners of a regular simplex. An iteration costs nothing in the
rows then. In: a kernel and its data. Out: the same, smaller; questions to the fitted model go to the rows themselves.

References:
    Rubin and Thayer 1982, "EM algorithms for ML factor analysis", whose E-step reads the data's covariance alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoem.e_step.elimination.layout import Table
from autoem.e_step.gaussian.block import GaussianBlock
from autoem.e_step.gaussian.missing import MissingEntries
from autoem.e_step.tables.completions import simplex
from autoem.e_step.tables.prepared import TURN_UP_TO
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named
from autoem.lowering.chunks import resized
from autoem.lowering.integrals import Integral
from autoem.lowering.kernel import Kernel
from autoem.m_step.problem import Bundle, Params

FEWER = 4  # times fewer rows, from which it is done
AT_ONCE = 1024  # rows whose products are taken together: what they are copied to stays in the cache
MAX_WIDTH = 2_000  # entries of a row, up to which their covariance is taken


@dataclasses.dataclass(frozen=True, eq=False)
class Repeated(Integral):
    """An integral over cells each of which counts `times` times."""

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


def turned_up_to(kernel: Kernel) -> int:
    """Bytes up to which data are copied, turned as the kernel reads them; moments are taken from the call's own."""
    return 0 if plate_of_moments(kernel) else TURN_UP_TO


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
    """The kernel and its data with few rows for many, where that changes nothing; as they came where it would."""
    plate = plate_of_moments(kernel)
    if plate is None:
        return kernel, with_sums(kernel, bundle)
    integral = kernel.integrals[0]
    names = [f.name for f in integral.factors if not f.is_hidden]
    tables = {n: table_of(bundle.rows[n], plate) for n in names}
    if any(t is None for t in tables.values()) or any(lies_along(r, plate) for r in bundle.rows.values()):
        return kernel, bundle
    columns = [t for t in tables.values() if t is not None]
    together = [c.reshape(-1, c.shape[-1]) for c in columns]
    mean, few = points(together[0] if len(together) == 1 else np.concatenate(together))
    rows, start = dict(bundle.rows), 0
    for f, table in zip((f for f in integral.factors if f.name in tables), columns, strict=True):
        width = int(np.prod(table.shape[:-1], dtype=int))
        own = slice(start, start + width)
        shape = (len(few), *table.shape[:-1])
        rows[f.name] = with_points(f, rows[f.name], plate, mean[own].reshape(shape[1:]), few[:, own].reshape(shape))
        start += width
    times = integral.block.sizes[plate] / len(few)
    return shrunk(kernel, plate, len(few), times), dataclasses.replace(bundle, rows=rows)


def with_sums(kernel: Kernel, bundle: Bundle) -> Bundle:
    """The data with sums over the rows of every pattern of missing entries, where a fit needs no more of them."""
    if kernel.treatment is not None or kernel.chunks:
        return bundle
    blocks = [i.block for i in kernel.integrals if isinstance(i.block, MissingEntries)]
    taken = [b.taken(bundle.rows[b.factor.name], bundle.cells) for b in blocks]
    return dataclasses.replace(bundle, cells={k: v for part in (bundle.cells, *taken) for k, v in part.items()})


def table_of(rows: Rows, plate: str) -> np.ndarray | None:
    """What a site observes, its rows last."""
    value = rows.value
    if value is None or plate not in value.axes:
        return None
    return np.moveaxis(np.asarray(value.array, float), value.axes.index(plate), -1)


def lies_along(rows: Rows, plate: str) -> bool:
    """Whether anything but the observations differs from row to row."""
    rest = jax.tree.leaves(dataclasses.replace(rows, value=None), is_leaf=lambda x: isinstance(x, Named))
    return any(isinstance(x, Named) and plate in x.axes for x in rest)


def points(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the columns of `x`, and rows, one more than `x` has lines, of mean zero and of their covariance."""
    mean = x.mean(1)
    covariance = np.zeros((len(x), len(x)))
    for first in range(0, x.shape[1], AT_ONCE):
        off = x[:, first : first + AT_ONCE] - mean[:, None]
        covariance += off @ off.T
    covariance /= x.shape[1]
    try:
        root = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:  # columns that are constant, or sums of others
        size, directions = np.linalg.eigh(covariance)
        root = directions * np.sqrt(np.maximum(size, 0))
    return mean, simplex(len(x)) @ root.T


def with_points(factor: Factor, rows: Rows, plate: str, mean: np.ndarray, off: np.ndarray) -> Rows:
    """Rows of a site in place of its own, at `mean` and `off` from it, standardised if it is.

    The mean is standardised before they are put together, lest a large one swallow the digits of what lies around it.
    """
    assert rows.value is not None
    axes, shape = rows.value.axes, list(rows.value.array.shape)
    at = axes.index(plate)
    shape[at] = 1
    if moments := factor.moments(rows):
        centre, spread = (np.moveaxis(np.broadcast_to(np.asarray(m, float), shape), at, 0)[0] for m in moments)
        mean, off = (mean - centre) / spread, off / spread
    value = Named(jnp.asarray(np.moveaxis(mean + off, 0, at), rows.value.array.dtype), axes)
    if rows.ready:
        return dataclasses.replace(rows, value=value)
    bare = dataclasses.replace(rows, value=value, centre=None, spread=None)
    return dataclasses.replace(rows, value=factor.observations(bare), ready=True)


def shrunk(kernel: Kernel, plate: str, count: int, times: float) -> Kernel:
    """The kernel with `count` rows in a plate, each of which counts `times` times."""
    integral = kernel.integrals[0]
    block = integral.block
    sizes = {**block.sizes, plate: count}

    def smaller(f: Factor) -> Factor:
        return dataclasses.replace(resized(f, plate, count), sizes={**f.sizes, plate: count})

    members = tuple(dataclasses.replace(m, shape=(count,)) for m in block.members)
    small = dataclasses.replace(
        block, members=members, factors=tuple(map(smaller, block.factors)), shape=(count,), sizes=sizes
    )
    factors = {n: smaller(f) for n, f in kernel.problem.factors.items()}
    return dataclasses.replace(
        kernel,
        problem=dataclasses.replace(kernel.problem, factors=factors),
        layout=dataclasses.replace(kernel.layout, sizes={**kernel.layout.sizes, plate: count}),
        integrals=(Repeated(small, times),),
    )


__all__ = ["condensed", "note_of", "turned_up_to"]

"""What a chain is made of, and how one message passes through the tables of one step.

In: tables of log densities, or probabilities, that repeat along a time axis. Out: the records that `chains` sums along
time, and the one small product that its loops repeat, in the form that the compiler makes fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from autoem.graph.named import Named, union

TIME = "·t"  # the axis that the messages run along


@dataclasses.dataclass(frozen=True)
class Frame:
    """Names of the axes: `previous` and `current` states are aligned, `kept` are plates and latents of all time.

    The plates come last, where sequences lie side by side in memory and one instruction serves several of them.
    """

    kept: tuple[str, ...]
    previous: tuple[str, ...]
    current: tuple[str, ...]

    @property
    def before(self) -> tuple[str, ...]:
        return self.previous + self.kept

    @property
    def after(self) -> tuple[str, ...]:
        return self.current + self.kept

    @property
    def gone(self) -> tuple[str, ...]:
        """States of the step before that the next message no longer holds."""
        return tuple(a for a in self.previous if a not in self.current)


@dataclasses.dataclass(frozen=True)
class ChainTables:
    """What a chain is made of: `head` over `previous`; `single` over `current`; `pairs` over both."""

    frame: Frame
    head: Named
    single: Named
    pairs: tuple[Named, ...]
    steps: int


def arrays_of(chain: ChainTables) -> tuple[Array, Array, tuple[Array, ...]]:
    """The tables as arrays: the head at full size, the single table with every axis, if of size one."""
    frame = chain.frame
    sizes = {a: t.size(a) for t in (chain.head, chain.single, *chain.pairs) for a in t.axes}
    head = jnp.broadcast_to(chain.head.to(frame.before), [sizes.get(a, 1) for a in frame.before])
    return head, chain.single.to((TIME, *frame.after)), tuple(p.array for p in chain.pairs)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the compiled recursion needs to know besides the arrays."""

    frame: Frame
    pair_axes: tuple[tuple[str, ...], ...]
    steps: int

    @property
    def varying(self) -> tuple[bool, ...]:
        return tuple(TIME in axes for axes in self.pair_axes)

    @property
    def states(self) -> tuple[int, ...]:
        """Axes of a message that are states."""
        return tuple(range(len(self.frame.current)))

    def forth(self, pairs: Sequence[Array]) -> Callable[[Array, Array, Sequence[Array]], Array]:
        return self.through(self.frame.before, self.frame.after, pairs)

    def back(self, pairs: Sequence[Array]) -> Callable[[Array, Array, Sequence[Array]], Array]:
        return self.through(self.frame.after, self.frame.before, pairs)

    def through(
        self, axes: Sequence[str], out: Sequence[str], pairs: Sequence[Array]
    ) -> Callable[[Array, Array, Sequence[Array]], Array]:
        """How a message, times a scale, passes through the tables of one step, given those that vary in time."""
        tables = [Named(p, tuple(a for a in x if a != TIME)) for p, x in zip(pairs, self.pair_axes, strict=True)]
        if len(tables) == len(axes) == 1 and not self.varying[0] and tables[0].axes in ((*axes, *out), (*out, *axes)):
            table = tables[0].to((*axes, *out))
            if fits(table):  # turned here, once, and not at every step
                table = jax.lax.optimization_barrier(table)
                return lambda message, scale, _: small_product(message, jnp.squeeze(scale), table)

        def step(message: Array, scale: Array, varying: Sequence[Array]) -> Array:
            now = [Named(p, t.axes) for p, t in zip(merged(self, pairs, varying), tables, strict=True)]
            return einsum(out, Named(message * scale, tuple(axes)), *now)

        return step


# XLA runs a loop whose step touches less than about 1,000 bytes as one piece of machine code, three times as fast as
# one that calls a kernel for each operation. It counts an inner loop once, so tables between these sizes are taken
# a few rows at a time.
WHOLE, IN_ROWS, ROWS = 256, 576, 200  # bytes: tables taken whole up to, by rows up to, and as many rows as these hold


def fits(table: Array) -> bool:
    """Whether a product with this table, a few rows at a time, makes the loop that it stands in small."""
    return table.ndim == 2 and WHOLE < table.nbytes <= IN_ROWS and jax.default_backend() == "cpu"


@jax.custom_batching.custom_vmap
def small_product(message: Array, scale: Array, table: Array) -> Array:
    """`(message * scale) @ table`, a few rows of the table at a time."""
    rows, columns = table.shape
    size = max(r for r in range(1, rows + 1) if rows % r == 0 and (r == 1 or r * columns * table.itemsize <= ROWS))

    def add_rows(i: int, total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(message, i * size, size) * scale
        return total + (part[:, None] * jax.lax.dynamic_slice_in_dim(table, i * size, size)).sum(0)

    return jax.lax.fori_loop(0, rows // size, add_rows, jnp.zeros(columns, table.dtype))


@small_product.def_vmap
def _(size: int, batched: Sequence[bool], message: Array, scale: Array, table: Array) -> tuple[Array, bool]:
    """Several at once are no longer small. (Where tangents alone are several, JAX asks for the values of one.)"""
    if not any(batched):
        return (message * scale) @ table, False
    axes = tuple(0 if b else None for b in batched)
    return jax.vmap(lambda m, s, t: (m * s) @ t, axes, axis_size=size)(message, scale, table), True


def einsum(out: Sequence[str], *factors: Named) -> Array:
    """Product of `factors` summed over what is not in `out`, in the cheapest order (found by `opt_einsum`)."""
    letters = {a: chr(ord("a") + i) for i, a in enumerate(union(*(f.axes for f in factors), tuple(out)))}
    present = union(*(f.axes for f in factors))
    kept = [a for a in out if a in present]
    spec = ",".join("".join(letters[a] for a in f.axes) for f in factors) + "->" + "".join(letters[a] for a in kept)
    result = Named(jnp.einsum(spec, *(f.array for f in factors), optimize="optimal"), tuple(kept))
    return result.to(tuple(out))


def in_time(spec: Spec, pairs: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(p for p, v in zip(pairs, spec.varying, strict=True) if v)


def merged(spec: Spec, pairs: Sequence[Array], varying: Sequence[Array]) -> list[Array]:
    """The tables of one step: those that vary in time at that step, the others as they are."""
    now = iter(varying)
    return [next(now) if v else p for p, v in zip(pairs, spec.varying, strict=True)]

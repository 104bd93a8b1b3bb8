"""Arrays with named axes: what lets a table be built for any latents and plates without counting dimensions.

Axes of size one are dropped on entry (they broadcast), so a missing axis means "the same along it".
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Named:
    """An array and the name of each of its axes."""

    array: Array
    axes: tuple[str, ...]

    def size(self, axis: str) -> int:
        return self.array.shape[self.axes.index(axis)]

    def to(self, axes: Sequence[str]) -> Array:
        """The array with exactly `axes`, in order; those that are missing get size one."""
        present = [a for a in axes if a in self.axes]
        moved = jnp.transpose(self.array, [self.axes.index(a) for a in present])
        sizes = iter(moved.shape)
        return moved.reshape([next(sizes) if a in self.axes else 1 for a in axes])

    def sum(self, axes: Iterable[str]) -> Named:
        gone = [a for a in axes if a in self.axes]
        kept = tuple(a for a in self.axes if a not in gone)
        return Named(self.array.sum([self.axes.index(a) for a in gone]), kept) if gone else self


def named(array: Array, axes: Sequence[str]) -> Named:
    """Name the axes of `array`, dropping those of size one."""
    kept = [i for i, s in enumerate(array.shape) if s != 1]
    return Named(array.reshape([array.shape[i] for i in kept]), tuple(axes[i] for i in kept))


def union(*axes: Sequence[str]) -> tuple[str, ...]:
    """All names, in order of first appearance."""
    return tuple(dict.fromkeys(a for group in axes for a in group))


def add(*terms: Named) -> Named:
    """Sum with broadcasting by name."""
    axes = union(*(t.axes for t in terms))
    return Named(functools.reduce(jnp.add, [t.to(axes) for t in terms]), axes)


def multiply(a: Named, b: Named) -> Named:
    axes = union(a.axes, b.axes)
    return Named(a.to(axes) * b.to(axes), axes)


def choose(where: Named, value: Named, otherwise: float) -> Named:
    axes = union(value.axes, where.axes)
    return Named(jnp.where(where.to(axes) > 0, value.to(axes), otherwise), axes)


def arranged(x: Named, axes: Sequence[str]) -> Named:
    """`x` with those of its axes that are in `axes` last and in that order."""
    order = tuple(a for a in x.axes if a not in axes) + tuple(a for a in axes if a in x.axes)
    return Named(x.to(order), order)


TURNED_AT_ONCE = 128  # rows, whose lines of the cache are all still there when their second column is read


def turned(array: Array, order: Sequence[int], moments: Sequence[Array] = ()) -> Array:
    """`array`, less the first of `moments` and divided by the second where they are given, with its axes in `order`.

    Where long rows become columns, that is done in blocks that fit the cache: the CPU's compiler reads column by column
    from the start to the end, which takes five times as long.
    """

    def standardised(x: Array) -> Array:
        if moments:
            x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)
            x = (x - moments[0]) / moments[1]
        return jnp.transpose(x, order)

    alike = all(m.ndim < array.ndim or m.shape[0] == 1 for m in moments)
    blocks, rest = divmod(array.shape[0] if array.ndim else 0, TURNED_AT_ONCE)
    simple = array.ndim > 1 and list(order) == [*range(1, array.ndim), 0] and alike
    if (
        not simple or blocks < 2 or jax.default_backend() != "cpu" or jax.device_count() > 1
    ):  # which turn rows of their own
        return standardised(array)
    out = jnp.zeros((*array.shape[1:], array.shape[0]), jax.eval_shape(standardised, array).dtype)

    def put(out: Array, start, size: int) -> Array:
        block = standardised(jax.lax.dynamic_slice_in_dim(array, start, size))
        return jax.lax.dynamic_update_slice_in_dim(out, block, start, out.ndim - 1)

    out = jax.lax.fori_loop(0, blocks, lambda i, out: put(out, i * TURNED_AT_ONCE, TURNED_AT_ONCE), out)
    return put(out, blocks * TURNED_AT_ONCE, rest) if rest else out


@dataclasses.dataclass(frozen=True)
class Product:
    """A contraction of two factors as `left @ right`: rows and columns of the result have names."""

    left: Array
    right: Array
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    shape: tuple[int, ...]

    def result(self, keep: Sequence[str], value: Array) -> Named:
        order = tuple(x for x in keep if x in self.rows + self.columns)
        return Named(Named(value.reshape(self.shape), self.rows + self.columns).to(order), order)


def as_product(keep: Sequence[str], a: Named, b: Named, turned: bool = True) -> Product | None:
    """The contraction of `a` and `b` as a matrix product, where the axes of `b` need not be transposed for it.

    Those of `a` are, unless it is not to be `turned`.
    """
    a = arranged(a, b.axes) if turned else a
    shared = [x for x in a.axes if x in b.axes]
    rows, columns = (tuple(x for x in f.axes if x not in shared) for f in (a, b))
    if set(shared) & set(keep) or not {*rows, *columns} <= set(keep):
        return None
    if a.axes != (*rows, *shared) or b.axes != (*shared, *columns):
        return None
    inner = int(np.prod([b.size(x) for x in shared], dtype=int))
    shape = (*(a.size(x) for x in rows), *(b.size(x) for x in columns))
    return Product(a.array.reshape(-1, inner), b.array.reshape(inner, -1), rows, columns, shape)


def contract_sum(keep: Sequence[str], *pairs: tuple[Named, Named], twice: bool = False) -> Named:
    """Sum of the contractions of `pairs`: one matrix product for all where they have the same rows and columns.

    Its derivative is given by hand and has none in turn; with `twice` it is left to JAX, which differentiates on.
    """
    products = [p for p in (as_product(keep, a, b) for a, b in pairs) if p is not None]
    if twice or len(products) < len(pairs) or len({(p.rows, p.columns, p.shape) for p in products}) > 1:
        return add(*(contract(keep, a, b) for a, b in pairs))
    left = jnp.concatenate([p.left for p in products], 1)
    right = jnp.concatenate([p.right for p in products], 0)
    first = products[0]
    if list(keep)[: len(first.columns)] == list(first.columns):  # asked for along the columns first
        tall = Product(
            left, right, first.columns, first.rows, first.shape[len(first.rows) :] + first.shape[: len(first.rows)]
        )
        return tall.result(keep, tall_product(left, right))
    wide = right.shape[1] >= WIDE and right.shape[0] >= 4 * left.shape[0]
    return products[0].result(keep, wide_product(left, right) if wide else left @ right)


AT_ONCE = 4096  # terms that are summed one by one in single precision: sums of sums keep its digits


def long_product(left: Array, right: Array) -> Array:
    """`left @ right` whose inner axis may be long: its terms are not all added to one number in single precision."""
    parts = left.shape[1] // AT_ONCE
    if left.dtype == jnp.float64 or parts < 4:
        return left @ right

    def add_part(i: Array, total: Array) -> Array:
        a, b = (jax.lax.dynamic_slice_in_dim(x, i * AT_ONCE, AT_ONCE, 1 - n) for n, x in enumerate((left, right)))
        return total + a @ b

    rest = left[:, parts * AT_ONCE :] @ right[parts * AT_ONCE :]
    return jax.lax.fori_loop(0, parts, add_part, rest)


WIDE = 8192  # columns from which a product's derivative is taken in the order that reads memory along rows


@jax.custom_vjp
def wide_product(left: Array, right: Array) -> Array:
    """`left @ right` of many columns, whose derivative by `left` is up to eight times faster than as JAX orders it."""
    return left @ right


def _wide_forward(left: Array, right: Array):
    return left @ right, (left, right)


def _wide_backward(saved, slope: Array):
    left, right = saved
    return long_product(right, jax.lax.optimization_barrier(slope.T)).T, left.T @ slope


wide_product.defvjp(_wide_forward, _wide_backward)


@jax.custom_vjp
def tall_product(left: Array, right: Array) -> Array:
    """`(left @ right).T`, made in that order; and so are its derivatives."""
    return right.T @ left.T


def _tall_forward(left: Array, right: Array):
    return right.T @ left.T, (left, right)  # in the open, so that it has derivatives of its own


def _tall_backward(saved, slope: Array):
    left, right = saved
    return long_product(right, slope).T, (slope @ left).T


tall_product.defvjp(_tall_forward, _tall_backward)


def contract(keep: Sequence[str], *factors: Named) -> Named:
    """Product of `factors`, summed over every axis not in `keep`; of `keep` those axes remain that some factor has."""
    numbers, factors = [f for f in factors if not f.axes], tuple(f for f in factors if f.axes)
    if numbers:
        times = functools.reduce(jnp.multiply, [f.array for f in numbers])
        out = contract(keep, *factors) if factors else Named(jnp.ones((), times.dtype), ())
        return Named(out.array * times, out.axes)
    for pair in itertools.permutations(factors) if len(factors) == 2 else ():
        if (product := as_product(keep, *pair, turned=False)) is not None:
            return product.result(keep, product.left @ product.right)
    # the largest factor stays as it lies: the others are transposed to the order of its axes, which costs nothing
    largest = max(factors, key=lambda f: f.array.size)
    factors = tuple(f if f is largest else arranged(f, largest.axes) for f in factors)
    if len(factors) == 2 and largest is factors[1] and (product := as_product(keep, *factors)) is not None:
        return product.result(keep, product.left @ product.right)
    letters = {a: chr(ord("a") + i) for i, a in enumerate(union(*(f.axes for f in factors)))}
    out = tuple(a for a in keep if a in letters)
    spec = ",".join("".join(letters[a] for a in f.axes) for f in factors)
    result = jnp.einsum(f"{spec}->{''.join(letters[a] for a in out)}", *(f.array for f in factors))
    return Named(result, out)


def looked_up(table: Named, axis: str, index: Named) -> Named:
    """The entries of `table` along `axis` that `index` names, the index's axes first."""
    rest = tuple(a for a in table.axes if a != axis)
    rows = table.to((axis, *rest))
    numbers = index.array if jnp.issubdtype(index.array.dtype, jnp.integer) else index.array.astype(int)
    return Named(read_rows(rows, numbers), (*index.axes, *rest))


def made_once(x: Array) -> Array:
    """`x` as an array of its own, not computed anew for every row that reads it.

    A compiler would put what makes a small table into the loop of the gather that reads it, and undoes a plain barrier;
    it does not look through a choice between two branches.
    """
    if not x.size:
        return x
    first = x.ravel()[0]
    return jax.lax.cond(first == first, lambda y: y, lambda y: y + first, x)  # not a number stays so


@jax.custom_vjp
def read_rows(table: Array, index: Array) -> Array:
    """Rows of `table` by number, whose derivative is summed row by row."""
    return jnp.take(table, index.astype(int), 0, mode="clip")


def _read_forward(table: Array, index: Array):
    return jnp.take(table, index.astype(int), 0, mode="clip"), (table, index)


def _read_backward(saved, slope: Array):
    table, index = saved
    size, flat = len(table), index.astype(int).ravel()
    part = jnp.arange(flat.size) // AT_ONCE
    parts = -(-flat.size // AT_ONCE)
    slope = slope.reshape(-1, *table.shape[1:])
    if slope.dtype == jnp.float64:  # has digits to spare
        return jax.ops.segment_sum(slope, flat, size), np.zeros(index.shape, jax.dtypes.float0)
    sums = jax.ops.segment_sum(slope, flat + size * part, size * parts)
    return sums.reshape(parts, *table.shape).sum(0), np.zeros(index.shape, jax.dtypes.float0)


read_rows.defvjp(_read_forward, _read_backward)


def pick(scores: Named, axis: str, chosen: Named) -> Named:
    """Fix one axis of `scores` at the chosen entries."""
    if axis not in scores.axes:
        return scores
    rest = tuple(dict.fromkeys((*(a for a in scores.axes if a != axis), *chosen.axes)))
    table, index = scores.to((axis, *rest)), chosen.to(rest)[None]
    shape = jnp.broadcast_shapes(table.shape[1:], index.shape[1:])
    table = jnp.broadcast_to(table, (table.shape[0], *shape))
    return Named(jnp.take_along_axis(table, jnp.broadcast_to(index, (1, *shape)).astype(int), axis=0)[0], rest)

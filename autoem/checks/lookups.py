"""Refuse indices that point past the end of what they index: JAX clamps them, and a row would read another's entry.

In: a build and the data of a call. Lookups whose indices are computed from the data alone are looked at; these indices
are worked out in NumPy, which compiles nothing. Where one lies outside, the densities are computed twice, with other
numbers in the place of what it read: a site is refused if a row of it that counts has moved. So padding under a mask, a
weight of zero or `jnp.where(seen, b[index], 0)` pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import GatherScatterMode
from numpyro.distributions import biject_to

from autoem._errors import DataError
from autoem.graph.jaxpr import Atom, Constant, Equation, Graph, Variable, fills
from autoem.graph.on_host import on_host
from autoem.graph.programs import jit_once
from autoem.ir import Program
from autoem.planning.build import Build
from autoem.reading.trace import Source

FIELDS = ("elem", "scale")


def refuse_far_indices(built: Build, source: Source) -> None:
    r"""Check every lookup of the model by an index that the data tell.

    An index `i` into an axis of size `n` may be `-n` to `n - 1`, as in Python; JAX reads entry
    :math:`\min(\max(i, 0), n - 1)` for any other, and says nothing.

    Raises:
        DataError: an index lies outside, in a row that counts; names the site, the argument, the index and its row.
    """
    graph = built.program.full
    if "lookups" not in built.reading:
        built.reading["lookups"] = lookups(built.program)
    inputs = {("data", i): x for i, x in enumerate(source.data)} if not source.concrete else {}
    known: dict[Variable, np.ndarray] = {}
    for lookup in built.reading["lookups"]:
        plain = lookup.counted
        if plain is not None and lookup.holds(on_host(graph, plain, inputs, known, built.reading)):
            continue
        outside = lookup.outside(on_host(graph, lookup.index, inputs, known, built.reading))
        if outside.any():
            refuse_if_read(built, source, lookup, outside, inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup:
    """A part of an index that the data alone tell: `index` runs along `axes` of what equation `number` reads.

    Parts stand along the last axis of `index`, except where it is one number (a dynamic slice); 0 to
    `last` is inside. `counted` is the index before negative numbers were counted from the end, where it is known.
    """

    number: int
    index: Atom
    axes: tuple[int, ...]
    last: tuple[int, ...]
    scalar: bool
    counted: Variable | None = None

    def outside(self, index: np.ndarray) -> np.ndarray:
        """Which of the indices point past the end; an axis less than `index` has."""
        parts = self.parts(index)
        return np.asarray(((parts < 0) | (parts > np.array(self.last))).any(-1))

    def holds(self, counted: np.ndarray) -> bool:
        """Whether all of `counted` is inside as it is, which its least and its largest entry tell."""
        return counted.size == 0 or bool(counted.min() >= 0 and counted.max() <= self.last[0])

    def parts(self, index: np.ndarray) -> np.ndarray:
        return index[..., None] if self.scalar else index


def lookups(program: Program) -> tuple[Lookup, ...]:
    """The parts of indices that the data alone tell, of all lookups that would clamp them."""
    graph, kinds = program.full, program.full.kinds
    outputs = [a for k, a in graph.outputs.items() if k[1] in FIELDS]
    numbers = [i for i in sorted(graph.reach(outputs)[0]) if clamps(graph.equations[i])]
    parts = [lookup for i in numbers for lookup in parts_of(graph, i)]
    return tuple(p for p in parts if isinstance(p.index, Constant) or kinds.get(p.index, frozenset()) <= {"data"})


def parts_of(graph: Graph, number: int) -> list[Lookup]:
    """The index of a lookup as it was put together: some of its parts may be latents, others data."""
    equation = graph.equations[number]
    shape, sizes = shape_of(equation.inputs[0]), equation.params["slice_sizes"]
    if equation.primitive.name == "dynamic_slice":
        ends = [n - s for n, s in zip(shape, sizes, strict=True)]
        return [Lookup(number, a, (d,), (ends[d],), True) for d, a in enumerate(equation.inputs[1:])]
    axes = [int(d) for d in equation.params["dimension_numbers"].start_index_map]
    index = equation.inputs[1]
    pieces: tuple[Atom, ...] = (index,)
    maker = graph.makers.get(index) if isinstance(index, Variable) else None
    if maker is not None and graph.equations[maker].primitive.name == "concatenate":
        joined = graph.equations[maker]
        if joined.params["dimension"] == len(shape_of(index)) - 1:
            pieces = joined.inputs
    out, first = [], 0
    for piece in pieces:
        own = tuple(axes[first : first + shape_of(piece)[-1]])
        counted = counted_from_the_start(graph, piece) if len(own) == 1 else None
        out.append(Lookup(number, piece, own, tuple(shape[d] - sizes[d] for d in own), False, counted))
        first += len(own)
    return out


def counted_from_the_start(graph: Graph, atom: Atom) -> Variable | None:
    """The `i` of which an index is `where(i < 0, i + n, i)`, as JAX makes it; None where it is something else."""
    while isinstance(atom, Variable) and atom in graph.makers:
        equation = graph.equations[graph.makers[atom]]
        if equation.primitive.name == "select_n" and len(equation.inputs) == 3:
            which, index, wrapped = equation.inputs
            makers = [graph.makers.get(a) if isinstance(a, Variable) else None for a in (which, wrapped)]
            if None in makers or not isinstance(index, Variable):
                return None
            below, moved = (graph.equations[m] for m in makers if m is not None)
            zero = below.inputs[1] if below.primitive.name == "lt" and below.inputs[0] is index else None
            is_zero = isinstance(zero, Constant) and np.ndim(zero.value) == 0 and zero.value == 0
            return index if is_zero and moved.primitive.name == "add" and index in moved.inputs else None
        if equation.primitive.name not in ("reshape", "broadcast_in_dim", "squeeze", "expand_dims"):
            return None
        atom = equation.inputs[0]
    return None


def shape_of(atom: Atom) -> tuple[int, ...]:
    return np.shape(atom.value) if isinstance(atom, Constant) else atom.shape


def clamps(equation: Equation) -> bool:
    """Whether it is a lookup without a word on what an index past the end should read.

    `b.at[i].get(mode="clip")`, or with a `fill_value`, has one.
    """
    name, params = equation.primitive.name, equation.params
    if name == "dynamic_slice":
        return True
    if name != "gather":
        return False
    if params["mode"] == GatherScatterMode.FILL_OR_DROP:
        return not fills(params)
    numbers = params["dimension_numbers"]
    said = params["mode"] == GatherScatterMode.CLIP and set(numbers.start_index_map) <= set(
        numbers.collapsed_slice_dims
    )
    return not said


def refuse_if_read(built: Build, source: Source, lookup: Lookup, outside: np.ndarray, inputs: Mapping) -> None:
    """Raise where a row that counts depends on what the indices `outside` read."""
    program, number = built.program, lookup.number
    if number not in built.reading:
        built.reading[number] = jit_once(lambda v, o: moved(program, number, v, o))
    for site, rows in built.reading[number](some_values(built, source), jnp.asarray(outside)).items():
        if (rows := np.asarray(rows)).any():
            raise far_index(built, source, site, lookup, outside, rows, inputs)


def moved(program: Program, number: int, values: Mapping[Any, Array], outside: Array) -> dict[str, Array]:
    """For each site the rows that count and whose density, or weight, depends on what the lookup read `outside`."""
    graph, out = program.full, {}
    atoms = {k: a for k, a in graph.outputs.items() if k[1] in FIELDS}
    here = graph.equations[number].outputs[0]
    whole, other = looked_up(graph, number, values, outside)
    for site in dict.fromkeys(k[0] for k in atoms):
        keys = [k for k in atoms if k[0] == site and number in graph.reach([atoms[k]])[0]]
        if not keys:
            continue
        before, after = (graph.evaluate_atoms([atoms[k] for k in keys], values, {here: v}) for v in (whole, other))
        differs = [(b != a) & ~(jnp.isnan(b) & jnp.isnan(a)) for b, a in zip(before, after, strict=True)]
        rows = differs[0] if len(differs) == 1 else differs[0] | differs[1]
        for field in ("mask", "scale"):
            if (site, field) in graph.outputs and (site, field) not in keys:
                rows = rows & (graph.evaluate([(site, field)], values)[0] != 0)
        out[site] = rows
    return out


def looked_up(graph: Graph, number: int, values: Mapping[Any, Array], outside: Array) -> tuple[Array, Array]:
    """What the equation gives with its indices clamped, and the same with other numbers where they lie outside."""
    equation = graph.equations[number]
    if equation.primitive.name == "gather":
        clamped = {**equation.params, "mode": GatherScatterMode.CLIP, "fill_value": None}
        offset = set(equation.params["dimension_numbers"].offset_dims)
        equation = dataclasses.replace(equation, params=clamped)
        rows = [d for d in range(len(equation.outputs[0].shape)) if d not in offset]
        spread = [outside.shape[rows.index(d)] if d in rows else 1 for d in range(len(equation.outputs[0].shape))]
        outside = outside.reshape(spread)
    value = equation.apply(graph.evaluate_atoms(equation.inputs, values))[0]
    if value.dtype == bool:
        return value, jnp.where(outside, ~value, value)
    step = 1 if jnp.issubdtype(value.dtype, jnp.integer) else 0.37 * value + 0.11
    return value, jnp.where(outside, value + step, value).astype(value.dtype)


def some_values(built: Build, source: Source) -> dict[Any, Array]:
    """Values of all inputs: parameters a little off the model's start, where no two of their entries are equal."""
    rng, key = np.random.default_rng(40), jax.random.key(0)
    values: dict[Any, Any] = {**{("data", i): x for i, x in built.data(source).items()}, ("key", 0): key}
    for name, v in built.start(source, key).items():
        values["param", name] = jnp.asarray(v * (1 + 1e-3 * rng.random(v.shape)) + 1e-3 * rng.random(v.shape))
    full = built.program.full
    for kind, name in full.inputs:
        if kind != "latent":
            continue
        like = full.inputs[kind, name].aval
        if name in built.program.every_latent:
            values[kind, name] = jnp.zeros(like.shape, like.dtype) + built.program.every_latent[name].states[0]
        else:
            transform = biject_to(built.program.every_continuous[name].support)
            values[kind, name] = transform(jnp.asarray(rng.normal(size=transform.inverse_shape(like.shape))))
    return values


def far_index(built: Build, source: Source, site: str, lookup: Lookup, outside, rows, inputs: Mapping) -> DataError:
    """What to say of the first index that lies outside and is read."""
    graph = built.program.full
    read = outside & rows if rows.shape == outside.shape else outside
    first = tuple(int(i) for i in np.argwhere(read if read.any() else outside)[0])
    parts = lookup.parts(on_host(graph, lookup.index, inputs, {}, built.reading))[first]
    which = next(j for j, last in enumerate(lookup.last) if not 0 <= parts[j] <= last)
    axis, operand = lookup.axes[which], shape_of(graph.equations[lookup.number].inputs[0])
    size = operand[axis]
    index = int(parts[which]) - (size if parts[which] < 0 else 0)  # a negative one was counted from the end already
    needs = sorted(k[1] for k in graph.needs_of([lookup.index]))
    exact = [(i, at) for i in needs for at in [holding(source.data[i], index, first, outside.shape)] if at is not None]
    names = [f"'{source.argument(i)}'" for i in ([i for i, _ in exact] or needs)[:3]]
    if exact:
        first, what = exact[0][1], f"{names[0]} holds {index}"
    else:
        what = f"an index computed from {' and '.join(names) or 'constants'} is {index}"
    row = f" ({place(first)})" if first else ""
    along = f" along axis {axis}" if len(operand) > 1 else ""
    mend = "correct the index, or make the array longer; rows that only fill up a shape belong under a mask: "
    mend += "with numpyro.handlers.mask(mask=...)"
    if exact and index == size and np.asarray(source.data[exact[0][0]]).min() == 1:
        mend = f"what counts from 1 is meant to count from 0: pass {names[0][1:-1]} - 1"
    problem = f"{what}{row}, but the array that it indexes has {size} entries{along}, 0 to {size - 1}"
    return DataError(
        built.program.base_of(site), problem=f"{problem}; JAX would read another entry in silence", mend=mend
    )


def holding(data: Any, index: int, first: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where an argument holds the index as it stands: in the same row if it has such rows, otherwise anywhere."""
    data = np.asarray(data)
    if data.shape == shape and data[first] == index:
        return first
    found = np.argwhere(data == index) if data.shape != shape else []
    return tuple(int(i) for i in found[0]) if len(found) else None


def place(index: tuple[int, ...]) -> str:
    """An index as a person reads it; counted from 0, as Python does."""
    return f"row {index[0]}" if len(index) == 1 else f"entry {list(index)}"


__all__ = ["refuse_far_indices"]

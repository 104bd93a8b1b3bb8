"""Sum the states of a chain out along time: forward and backward messages, once, for sums, modes and draws.

In: tables of log densities that repeat along a time axis, over the states of one step (`current`) and of the step
before (`previous`), and a table over the states that precede the first such step (`head`). Out: the log of their sum
over all paths, whose gradient is every marginal; or the best path, or exact draws of it.

The messages are probabilities, scaled at every step, which costs one small product a step; what they cannot hold
(a path whose probability at some time is below the smallest number, and which is needed later) `log_sum` finds in
logarithms. Tables that do not vary in time stay as they are: their marginals are one product over all steps at once.

References:
    Baum, Petrie, Soules and Weiss 1970. Rabiner 1989, "A tutorial on hidden Markov models", section III (scaling).
    Viterbi 1967. Chib 1996, "Calculating posterior distributions and modal estimates in Markov mixture models".
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from autoem._named import Named, add, pick, union
from autoem.e_step.reductions import log_sum_exp

TIME = "·t"  # the axis that the messages run along
SOURCE = "Baum, Petrie, Soules and Weiss 1970 (forward-backward); Rabiner 1989 (scaling)"


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


def total(chain: ChainTables) -> Named:
    """Log of the sum over all paths, an axis for each of `kept`."""
    head, single, pairs = arrays_of(chain)
    spec = Spec(chain.frame, tuple(p.axes for p in chain.pairs), chain.steps)
    return Named(_total(spec, head, single, pairs), chain.frame.kept)


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
        if len(tables) == 1 and len(axes) == 1 and tables[0].axes in ((*axes, *out), (*out, *axes)):
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
    """Several at once are no longer small."""
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


def scaled(table: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """`exp(table - top)` and `top`, the largest entry along `axes`."""
    top = jnp.max(table, axis=axes, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.exp(table - top), jnp.squeeze(top, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(spec: Spec, head: Array, single: Array, pairs: tuple[Array, ...]) -> Array:
    return _forward(spec, head, single, pairs)[0]


@dataclasses.dataclass(frozen=True)
class Scaled:
    """The tables as probabilities, and the logarithms taken out of them, summed."""

    head: Array
    single: Array
    pairs: tuple[Array, ...]
    taken: Array


jax.tree_util.register_dataclass(Scaled, ["head", "single", "pairs", "taken"], [])


def _scale(spec: Spec, head: Array, single: Array, pairs: tuple[Array, ...]) -> Scaled:
    states = spec.states
    head, top = scaled(head, states)
    total = head.sum(states, keepdims=True)
    head = head / jnp.where(total > 0, total, 1)
    taken = top + jnp.log(jnp.squeeze(total, states))
    single, top = scaled(single, tuple(s + 1 for s in states))
    taken = taken + top.sum(0) * (spec.steps // top.shape[0])
    probabilities = []
    for pair, varying in zip(pairs, spec.varying, strict=True):
        table, top = scaled(pair, tuple(range(int(varying), pair.ndim)))
        taken = taken + (top.sum() if varying else top * spec.steps)
        probabilities.append(table)
    return Scaled(head, single, tuple(probabilities), taken)


def _forward(spec: Spec, head: Array, single: Array, pairs: tuple[Array, ...]):
    """Log of the sum; the scaled tables; the weight of every step's states given all before it, and its norm."""
    s, states = _scale(spec, head, single, pairs), spec.states
    through = spec.forth(s.pairs)

    def step(before, at):
        single, varying = at
        return (through(before, one_over(before, states), varying) * single,) * 2

    over = jnp.broadcast_to(s.single, (spec.steps, *s.single.shape[1:]))
    shape = jnp.broadcast_shapes(s.head.shape, over.shape[1:])
    _, weights = jax.lax.scan(step, jnp.broadcast_to(s.head, shape), (over, in_time(spec, s.pairs)))
    norms = weights.sum(tuple(a + 1 for a in states))
    return s.taken + jnp.log(norms).sum(0), (s, weights, norms)


def one_over(weight: Array, states: tuple[int, ...]) -> Array:
    """One over the sum along `states`; what vanished altogether stays zero."""
    norm = weight.sum(states, keepdims=True)
    return 1 / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)


def in_time(spec: Spec, pairs: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(p for p, v in zip(pairs, spec.varying, strict=True) if v)


def merged(spec: Spec, pairs: Sequence[Array], varying: Sequence[Array]) -> list[Array]:
    """The tables of one step: those that vary in time at that step, the others as they are."""
    now = iter(varying)
    return [next(now) if v else p for p, v in zip(pairs, spec.varying, strict=True)]


def _backward(spec: Spec, s: Scaled) -> Array:
    """What every step and those after it say of its states, up to a factor."""
    over = jnp.broadcast_to(s.single, (spec.steps, *s.single.shape[1:]))
    last = jnp.broadcast_to(over[-1], jnp.broadcast_shapes(s.head.shape, over.shape[1:]))
    through, varying = spec.back(s.pairs), in_time(spec, s.pairs)

    def step(state):
        # a loop of our own: the tables are read where they lie, one step apart, and not cut to equal lengths first
        t, ahead, messages = state
        later = [jax.lax.dynamic_index_in_dim(p, t + 1, keepdims=False, allow_negative_indices=False) for p in varying]
        arrived = through(ahead, one_over(ahead, spec.states), later)
        ahead = arrived * jax.lax.dynamic_index_in_dim(over, t, keepdims=False, allow_negative_indices=False)
        return t - 1, ahead, jax.lax.dynamic_update_index_in_dim(messages, ahead, t, 0, allow_negative_indices=False)

    messages = jnp.zeros((spec.steps, *last.shape), last.dtype).at[-1].set(last)
    start = jnp.asarray(spec.steps - 2), last, messages
    return jax.lax.while_loop(lambda state: state[0] >= 0, step, start)[2]


def _total_fwd(spec: Spec, head: Array, single: Array, pairs: tuple[Array, ...]):
    value, (s, weights, norms) = _forward(spec, head, single, pairs)
    return value, (s, weights, norms, _backward(spec, s))


def _total_bwd(spec: Spec, residuals, slope: Array):
    s, weights, norms, ahead = residuals
    frame = spec.frame
    later = tuple(a + 1 for a in spec.states)
    norms = jnp.expand_dims(norms, later)
    over = 1 / jnp.where(norms > 0, norms, 1)
    filtered = weights * over
    # a state that cannot have been seen has no weight either, whatever follows it
    joint = filtered * jnp.where(s.single > 0, ahead / s.single, 0)
    total = joint.sum(later, keepdims=True)
    total = 1 / jnp.where(total > 0, total, 1)
    marginal = joint * (total * slope)
    ahead = ahead * over * (total * slope)
    tables = [Named(p, axes) for p, axes in zip(s.pairs, spec.pair_axes, strict=True)]
    pairs = tuple(pair_marginals(spec, i, s.head, filtered, ahead, tables) for i in range(len(tables)))
    first = [Named(p[0] if v else p, tuple(a for a in x if a != TIME)) for p, v, x in
             zip(s.pairs, spec.varying, spec.pair_axes, strict=True)]  # fmt: skip
    head = einsum(frame.before, Named(ahead[0], frame.after), *first) * s.head
    return summed_to(head, s.head.shape), summed_to(marginal, s.single.shape), pairs


def pair_marginals(
    spec: Spec, which: int, head: Array, filtered: Array, ahead: Array, tables: Sequence[Named]
) -> Array:
    """Expected counts of neighbours for one of the tables of pairs: a single product over all steps."""
    frame, table = spec.frame, tables[which]
    others = tables[:which] + tables[which + 1 :]
    head = jnp.broadcast_to(head, filtered.shape[1:])
    if any(spec.varying):
        before = Named(jnp.concatenate([head[None], filtered[:-1]]), (TIME, *frame.before))
        return einsum(table.axes, before, Named(ahead, (TIME, *frame.after)), *others) * table.array
    # the first step apart, so that the product over the others reads the messages where they lie
    before, after = Named(filtered[:-1], (TIME, *frame.before)), Named(ahead[1:], (TIME, *frame.after))
    first = einsum(table.axes, Named(head, frame.before), Named(ahead[0], frame.after), *others)
    return (first + einsum(table.axes, before, after, *others)) * table.array


_total.defvjp(_total_fwd, _total_bwd)


def summed_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes along which `shape` has size one."""
    axes = tuple(i for i, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if a != b)
    return x.sum(axes, keepdims=True) if axes else x


def filtered(chain: ChainTables, logs: bool) -> Named:
    """Probabilities of the states of every step given what was seen up to it, with the time axis first."""
    if logs:
        messages = log_messages(chain, log_sum_exp)[1]
        states = tuple(range(1, 1 + len(chain.frame.current)))
        weight = jax.nn.softmax(messages, axis=states)
        return Named(weight, (TIME, *chain.frame.after))
    head, single, pairs = arrays_of(chain)
    spec = Spec(chain.frame, tuple(p.axes for p in chain.pairs), chain.steps)
    _, (_, weights, norms) = _forward(spec, head, single, pairs)
    over = jnp.expand_dims(norms, tuple(a + 1 for a in spec.states))
    return Named(weights / jnp.where(over > 0, over, 1), (TIME, *chain.frame.after))


def log_messages(chain: ChainTables, reduce: Callable[[Array], Array]) -> tuple[Array, Array, Array]:
    """Messages in logarithms, by sum or maximum: the first, those after every step, and what was taken out of each.

    Their largest entries are taken out, so that the digits of a long chain's messages are not those of its likelihood.
    """
    frame, spec = chain.frame, Spec(chain.frame, tuple(p.axes for p in chain.pairs), chain.steps)
    head, single, pairs = arrays_of(chain)
    states = spec.states

    def step(message, at):
        single, varying = at
        joint = joint_of(spec, message, merged(spec, pairs, varying))
        flat = joint.to((*frame.gone, *frame.after))
        flat = flat.reshape(-1, *flat.shape[len(frame.gone) :])
        new = jnp.broadcast_to(reduce(flat) + single, jnp.broadcast_shapes(message.shape, single.shape))
        top = jnp.max(new, axis=states, keepdims=True)
        top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
        return new - top, (new - top, jnp.squeeze(top, states))

    over = jnp.broadcast_to(single, (spec.steps, *single.shape[1:]))
    head = jnp.broadcast_to(head, jnp.broadcast_shapes(head.shape, single.shape[1:]))
    messages, taken = jax.lax.scan(step, head, (over, in_time(spec, pairs)))[1]
    return head, messages, taken


def joint_of(spec: Spec, message: Array, pairs: Sequence[Array]) -> Named:
    named = [Named(p, tuple(a for a in x if a != TIME)) for p, x in zip(pairs, spec.pair_axes, strict=True)]
    return add(Named(message, spec.frame.before), *named)


def log_sum(chain: ChainTables, reduce: Callable[[Array], Array]) -> Named:
    """The log of the sum over all paths (or the largest), every message in logarithms: slower, and never underflows."""
    frame = chain.frame
    _, messages, taken = log_messages(chain, reduce)
    last = messages[-1]
    flat = last.reshape(-1, *last.shape[len(frame.current) :])
    return Named(reduce(flat) + taken.sum(0), frame.kept)


def robust(chain: ChainTables) -> Array:
    """Whether scaled messages lose nothing that counts.

    They lose a state whose probability falls below the smallest number. Where no transition is nearly impossible the
    other states restore it at the next step, up to the share that was lost.
    """
    tiny = float(jnp.finfo(chain.head.array.dtype).tiny)
    least = [jnp.min(p.array - jnp.max(p.array)) for p in chain.pairs]  # without pairs there is one state only
    return jnp.all(jnp.stack(least) > math.log(tiny) / 3) if least else jnp.asarray(True)


def proven(chain: ChainTables) -> Named:
    """The log of the sum over all paths, in logarithms where scaled messages could have lost something."""
    if not chain.pairs:
        return total(chain)
    shapes = [jax.eval_shape(f).array.shape for f in (lambda: total(chain), lambda: log_sum(chain, log_sum_exp))]
    shape = jnp.broadcast_shapes(*shapes)
    value = jax.lax.cond(
        robust(chain),
        lambda: jnp.broadcast_to(total(chain).array, shape),
        lambda: jnp.broadcast_to(log_sum(chain, log_sum_exp).array, shape),
    )
    return Named(value, chain.frame.kept)


def read_back(
    chain: ChainTables, reduce: Callable[[Array], Array], choose: Callable[[Array, Array], Array]
) -> tuple[dict[str, Named], dict[str, Named]]:
    """One path: for each of `current` its states along time, and for each of `previous` its state before the first.

    `choose(step, scores)` picks along the first axis: the largest for the mode, at random for a draw.
    """
    frame, spec = chain.frame, Spec(chain.frame, tuple(p.axes for p in chain.pairs), chain.steps)
    head, messages, _ = log_messages(chain, reduce)
    _, _, pairs = arrays_of(chain)
    before = jnp.concatenate([head[None], messages[:-1]])
    now = draw(Named(messages[-1], frame.after), frame.current, lambda s: choose(jnp.asarray(chain.steps), s))

    def step(states, at):
        i, message, varying = at
        joint = joint_of(spec, message, merged(spec, pairs, varying))
        for name in frame.current:
            joint = pick(joint, name, Named(states[name], frame.kept))
        gone = draw(joint, frame.gone, lambda s: choose(i, s))
        old = {p: gone[p] if p in gone else states[p] for p in frame.previous}
        back = {c: old[p] for c, p in zip(frame.current, frame.previous, strict=True)}
        return back, states

    times = jnp.arange(chain.steps)
    first, path = jax.lax.scan(step, now, (times, before, in_time(spec, pairs)), reverse=True)
    heads = {p: Named(first[c], frame.kept) for c, p in zip(frame.current, frame.previous, strict=True)}
    return {c: Named(v, (TIME, *frame.kept)) for c, v in path.items()}, heads


def draw(scores: Named, names: tuple[str, ...], choose: Callable[[Array], Array]) -> dict[str, Array]:
    """A joint choice of the states `names`, given scores over them and over the other axes."""
    rest = tuple(a for a in scores.axes if a not in names)
    table = scores.to((*names, *rest))
    chosen = choose(table.reshape(-1, *table.shape[len(names) :]))
    states = jnp.unravel_index(chosen, table.shape[: len(names)])
    return dict(zip(names, states, strict=True))

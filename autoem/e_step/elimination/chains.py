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

from autoem.e_step.elimination.chain_tables import TIME, ChainTables, Spec, arrays_of, einsum, in_time, merged
from autoem.e_step.elimination.reductions import log_sum_exp, numbered
from autoem.graph.named import Named, add, pick

SOURCE = "Baum, Petrie, Soules and Weiss 1970 (forward-backward); Rabiner 1989 (scaling)"


def total(chain: ChainTables) -> Named:
    """Log of the sum over all paths, an axis for each of `kept`."""
    head, single, pairs = arrays_of(chain)
    spec = Spec(chain.frame, tuple(p.axes for p in chain.pairs), chain.steps)
    return Named(_total(spec, head, single, pairs), chain.frame.kept)


def scaled(table: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """`exp(table - top)` and `top`, the largest entry along `axes`.

    What is made of both does not depend on `top`, which is held fixed: the derivative of a maximum compares it with the
    entries, and a program that computes them twice need not round them alike.
    """
    top = jnp.max(table, axis=axes, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
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


def _backward(spec: Spec, s: Scaled) -> Array:
    """What the steps after each say of its states, up to a factor."""
    over = jnp.broadcast_to(s.single, (spec.steps, *s.single.shape[1:]))
    last = jnp.broadcast_to(over[-1], jnp.broadcast_shapes(s.head.shape, over.shape[1:]))
    through, varying = spec.back(s.pairs), in_time(spec, s.pairs)

    def step(state):
        # a loop of our own: the tables are read where they lie, one step apart, and not cut to equal lengths first
        t, ahead, messages = state
        later = [jax.lax.dynamic_index_in_dim(p, t + 1, keepdims=False, allow_negative_indices=False) for p in varying]
        arrived = through(ahead, one_over(ahead, spec.states), later)
        ahead = arrived * jax.lax.dynamic_index_in_dim(over, t, keepdims=False, allow_negative_indices=False)
        return t - 1, ahead, jax.lax.dynamic_update_index_in_dim(messages, arrived, t, 0, allow_negative_indices=False)

    messages = jnp.zeros((spec.steps, *last.shape), last.dtype).at[-1].set(1)
    start = jnp.asarray(spec.steps - 2), last, messages
    return jax.lax.while_loop(lambda state: state[0] >= 0, step, start)[2]


def _total_fwd(spec: Spec, head: Array, single: Array, pairs: tuple[Array, ...]):
    value, (s, weights, norms) = _forward(spec, head, single, pairs)
    return value, (s, weights, norms, _backward(spec, s))


def _total_bwd(spec: Spec, residuals, slope: Array):
    s, weights, norms, arrived = residuals
    frame = spec.frame
    later = tuple(a + 1 for a in spec.states)
    norms = jnp.expand_dims(norms, later)
    over = 1 / jnp.where(norms > 0, norms, 1)
    filtered = weights * over
    joint = filtered * arrived
    total = joint.sum(later, keepdims=True)
    total = 1 / jnp.where(total > 0, total, 1)
    marginal = joint * (total * slope)
    ahead = arrived * s.single * over * (total * slope)
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
    others = [t for i, t in enumerate(tables) if i != which]
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
        i, single, varying = at
        joint = joint_of(spec, message, merged(spec, pairs, varying))
        flat = joint.to((*frame.gone, *frame.after))
        flat = flat.reshape(-1, *flat.shape[len(frame.gone) :])
        new = jnp.broadcast_to(numbered(reduce, i)(flat) + single, jnp.broadcast_shapes(message.shape, single.shape))
        top = jnp.max(new, axis=states, keepdims=True)
        top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
        return new - top, (new - top, jnp.squeeze(top, states))

    over = jnp.broadcast_to(single, (spec.steps, *single.shape[1:]))
    head = jnp.broadcast_to(head, jnp.broadcast_shapes(head.shape, single.shape[1:]))
    messages, taken = jax.lax.scan(step, head, (jnp.arange(spec.steps), over, in_time(spec, pairs)))[1]
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
    return Named(numbered(reduce, chain.steps)(flat) + taken.sum(0), frame.kept)


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

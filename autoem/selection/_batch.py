"""Many fits of one structure at once: the same model on data sets of the same shapes, in one compiled loop.

In: an `EM`, and the calls whose data differ in their values alone. Out: `Ends`, the best end point for each data set.
Data sets and starts are two axes of one program: it is compiled once, however many data sets there are. What cannot be
stacked (data whose derivation differs), or would not fit in memory, is fitted one after the other, each by the same
compiled program where the shapes agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._em import EM, ONE_THREAD_UP_TO, VMAP_UP_TO, underflowed
from autoem.fitting.loop import State, em_step, initial_state
from autoem.fitting.starts import seeded, starts
from autoem.fitting.stop import DIVERGED, FELL, RUNNING, Stop
from autoem.graph.programs import jit_small, jit_well
from autoem.lowering.kernel import Kernel
from autoem.m_step.problem import Bundle
from autoem.planning.build import Build
from autoem.reading.trace import Source

Call = tuple[tuple, dict[str, Any]]
Params = Mapping[str, Array]
SPAN = 64  # steps between two looks at which fits have ended
FEWEST = 16  # fits of one program; fewer are not worth a smaller one


@dataclasses.dataclass(frozen=True, eq=False)
class Ends:
    """The best end point of each data set.

    Attributes:
        objective, log_likelihood: `(data sets,)`, in nats; NaN where every start broke down.
        params: by name, `(data sets, *shape)`.
        num_steps: `(data sets,)`.
        status: `(data sets,)`, as in `autoem.fitting.stop`.
        together: whether they ran as one compiled program.
    """

    objective: np.ndarray
    log_likelihood: np.ndarray
    params: dict[str, np.ndarray]
    num_steps: np.ndarray
    status: np.ndarray
    together: bool

    def __len__(self) -> int:
        return len(self.objective)


def fit_many(em: EM, calls: Sequence[Call], rng_key: Array, also: Sequence[Params] = ()) -> Ends:
    """Fit the model of `em` to each data set, from its own starts and from the parameters `also`.

    Raises:
        ModelError, PlanError, DataError: as `EM.plan`, of the first data set that has one.
    """
    derived = [em._derive(args, kwargs) for args, kwargs in calls]
    keys = jax.random.split(rng_key, len(calls))
    builds = {id(built): built for built, _ in derived}
    ends: list[State | None] = [None] * len(calls)
    together = len(builds) == 1
    for number, built in builds.items():
        members = [i for i, (b, _) in enumerate(derived) if id(b) == number]
        sources = [derived[i][1] for i in members]
        bundles = [built.plain_bundle(source, keys[i]) for i, source in zip(members, sources, strict=True)]
        begin = starts_of(em, built, sources, bundles, keys[np.asarray(members)], also)
        stacked = len(members) > 1 and stackable(bundles) and entries(bundles[0]) * len(begin[0]) <= VMAP_UP_TO
        stacked &= built.kernel.treatment is None  # which remembers something of each data set
        together &= stacked
        best = in_batches(em, built, bundles, begin) if stacked else in_turn(em, built, sources, begin, keys)
        for i, state in zip(members, best, strict=True):
            ends[i] = state
    return gathered([s for s in ends if s is not None], together)


def starts_of(
    em: EM, built: Build, sources: Sequence[Source], bundles: Sequence[Bundle], keys: Array, also: Sequence[Params]
) -> list[list[Params]]:
    """The starts of every data set: the same number for each."""
    first = [
        starts(built, source, bundle, em.init, 1, key)[0]
        for source, bundle, key in zip(sources, bundles, keys, strict=True)
    ]
    known = [{n: jnp.asarray(v) for n, v in p.items()} for p in also]
    out: list[list[Params]] = [[*known, *start] for start in first]
    for i in range(1, em.restarts):
        few = i % 2 == 1
        for start, bundle, key in zip(out, bundles, keys, strict=True):
            start.append(seeded(built, start[len(known)], bundle, jax.random.fold_in(key, i), few=few))
    return out


def stackable(bundles: Sequence[Bundle]) -> bool:
    """Whether the data of all calls have one structure and one shape."""
    first = jax.tree.structure(bundles[0]), [np.shape(x) for x in jax.tree.leaves(bundles[0])]
    return all((jax.tree.structure(b), [np.shape(x) for x in jax.tree.leaves(b)]) == first for b in bundles[1:])


def entries(bundle: Bundle) -> int:
    """Numbers that an E-step reads of a data set."""
    return max(1, sum(x.size for x in jax.tree.leaves(bundle.rows)))


def stack(trees: Sequence[Any]) -> Any:
    """Trees of arrays as one tree with a leading axis; in NumPy, which compiles nothing."""

    def together(*leaves: Any) -> Any:
        if jnp.issubdtype(getattr(leaves[0], "dtype", float), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(np.stack([np.asarray(jax.random.key_data(k)) for k in leaves])))
        return np.stack([np.asarray(x) for x in leaves])

    return jax.tree.map(together, *trees)


def in_turn(em: EM, built: Build, sources: Sequence[Source], begin: list[list[Params]], keys: Array) -> list[State]:
    """One data set after the other."""
    quiet, em.progress = em.progress, False
    try:
        return [
            em._fit(built, built.bundle(source, key), [dict(p) for p in start], key)[0]
            for source, start, key in zip(sources, begin, keys, strict=False)
        ]
    finally:
        em.progress = quiet


def in_batches(em: EM, built: Build, bundles: Sequence[Bundle], begin: list[list[Params]]) -> list[State]:
    """As many at once as fit in memory; each batch of the same size, so that one program serves all."""
    count = int(np.clip(VMAP_UP_TO // (entries(bundles[0]) * len(begin[0])), 1, len(bundles)))
    count = -(-len(bundles) // -(-len(bundles) // count))  # equal shares
    out: list[State] = []
    loop = ("many", id(built))
    if loop not in em._batches:
        read = 8 * entries(bundles[0]) * len(begin[0]) * count
        em._batches[loop] = batched_loop(built, em.stop, small=read <= ONE_THREAD_UP_TO)
    advance = em._batches[loop]
    for first in range(0, len(bundles), count):
        chosen = list(range(first, min(first + count, len(bundles))))
        padded = chosen + [chosen[-1]] * (count - len(chosen))
        states = run_batch(em, built, [bundles[i] for i in padded], [begin[i] for i in padded], advance)
        out += states[: len(chosen)]
    if built.kernel.layout.chains and any(lost(built, *one) for one in zip(out, bundles, strict=True)):
        built.kernel = built.kernel.in_logs
        em._batches.pop(loop)
        return in_batches(em, built, bundles, begin)
    return out


def lost(built: Build, state: State, bundle: Bundle) -> bool:
    """Whether the scaled messages of a chain underflowed where the fit ended."""
    return underflowed(built, state.params, state._replace(history=state.objective[None]), bundle)


def batched_loop(built: Build, stop: Stop, small: bool) -> Callable:
    """`advance(states, bundles, which, limit)`: steps of many fits, each on the data set that `which` names."""
    kernel = plain(built.kernel)

    def advance(state: State, bundle: Bundle, limit) -> State:
        return jax.lax.while_loop(
            lambda s: (s.status == RUNNING) & (s.step < limit),
            lambda s: em_step(kernel, stop, s, bundle, built.accelerator),
            state,
        )

    def many(states: State, bundles: Bundle, which: Array, limit) -> State:
        rows = jax.tree.map(lambda x: x[which], bundles)
        return jax.vmap(advance, in_axes=(0, 0, None))(states, rows, limit)

    return jit_small(many) if small else jit_well(many)


def plain(kernel: Kernel) -> Kernel:
    """The kernel over the rows in one piece."""
    return dataclasses.replace(kernel, chunks=None)


def run_batch(
    em: EM, built: Build, bundles: Sequence[Bundle], begin: list[list[Params]], advance: Callable
) -> list[State]:
    """Every start of every data set to its end; the best state of each data set.

    The loop looks up now and then, and goes on with the fits that have not ended: a slow one does not hold the others'
    work up.
    """
    kernel, width = plain(built.kernel), len(begin[0])
    every = [dict(p) for start in begin for p in start]
    states = stack([initial_state(kernel, p, em.stop, accelerator=built.accelerator) for p in every])
    data = stack(bundles)
    which = np.repeat(np.arange(len(begin)), width)
    running, limit = np.arange(len(which)), 0
    ended = jax.tree.map(np.array, states)
    while running.size:
        limit = min(limit + SPAN, em.stop.max_steps + 1)
        states = jax.tree.map(np.asarray, advance(states, data, which[running], limit))
        status = np.asarray(states.status)
        going = status == RUNNING
        size = smaller(int(going.sum()), len(going))
        if size == len(going) and going.any():
            continue
        ended = jax.tree.map(partial(put, running), ended, states)
        # the first of those kept are still running; the others fill the batch up, and do not move
        kept = np.argsort(~going, kind="stable")[:size] if going.any() else np.zeros(0, int)
        running = running[kept]
        states = jax.tree.map(lambda x, kept=kept: x[kept], states)
    return [best_of(ended, range(i * width, (i + 1) * width)) for i in range(len(begin))]


def put(where: np.ndarray, old: np.ndarray, new: Any) -> np.ndarray:
    old[where] = np.asarray(new)
    return old


def smaller(count: int, size: int) -> int:
    """Size of the batch that goes on: a quarter again and again, so that few programs are compiled."""
    while size // 4 >= max(count, FEWEST):
        size //= 4
    return size


def best_of(states: State, of: Sequence[int]) -> State:
    """The best end point among some fits; of those that broke down only where all did."""
    objective, status = np.asarray(states.objective), np.asarray(states.status)

    def worth(i: int) -> tuple[bool, float]:
        return status[i] not in (FELL, DIVERGED), float(np.nan_to_num(objective[i], nan=-np.inf))

    best = max(of, key=worth)
    return jax.tree.map(lambda x: x[best], states)


def gathered(states: Sequence[State], together: bool) -> Ends:
    broken = np.array([int(s.status) in (FELL, DIVERGED) for s in states])

    def told(name: str) -> np.ndarray:
        return np.where(broken, np.nan, np.array([float(getattr(s, name)) for s in states]))

    return Ends(
        told("objective"),
        told("log_likelihood"),
        {n: np.stack([np.asarray(s.params[n]) for s in states]) for n in states[0].params},
        np.array([int(s.step) for s in states]),
        np.array([int(s.status) for s in states]),
        together,
    )

"""The loop: E-step and M-step until nothing moves, guarded, in one compiled `while_loop`.

In: a kernel, a start and the data. Out: the `State` at the end, the best parameters in it. The compiled loop returns to
the host only now and then, to show progress and to let an interrupt through; the number of steps between is set by
their measured time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.accelerate import Accelerator
from autoem.e_step.treatment import Expectation
from autoem.fitting.stop import CONVERGED, DIVERGED, FELL, INTERRUPTED, LIMIT, ROUNDED, RUNNING, SETTLED, Stop
from autoem.graph.programs import Program, jit_once, jit_small, jit_well
from autoem.lowering.kernel import Kernel
from autoem.m_step.problem import Bundle, Params

SECONDS_BETWEEN_LOOKS = 0.25
WINDOW = 20  # steps whose mean is compared with that of as many before, where the objective is noisy
RULE = 1e-5  # a fall, relative to the objective, that the error of an approximate E-step may cause
SMALL_GAIN = 1e-4  # relative gain of a map (or one nat) from which on extrapolating is unlikely to land on another hill


class State(NamedTuple):
    """Everything that an interrupted fit needs to go on.

    `params` are the current point, `previous` the one before it, `best` the largest objective so far.
    """

    params: dict[str, Array]
    previous: dict[str, Array]
    objective: Array
    log_likelihood: Array
    history: Array
    best: Array
    step: Array
    flat: Array
    status: Array
    optimizer: Any
    e_step: Any = None
    ahead: Any = None


class Ahead(NamedTuple):
    """Of an accelerated fit: whether the current point is an extrapolation, and the plain image to go back to if so."""

    trial: Array
    plain: dict[str, Array]
    method: Any


def initial_state(
    kernel: Kernel, params: Params, stop: Stop, e_step: Any = None, accelerator: Accelerator | None = None
) -> State:
    """The state before the first E-step; `e_step` is what that remembers, see `Kernel.init_e_step`."""
    real, whole = jnp.result_type(float), jnp.result_type(int)
    # in NumPy, which compiles and dispatches nothing
    history: Any = np.full(stop.max_steps + 1, np.nan, real)
    nothing: Any = np.array(-np.inf, real)
    zero: Any = np.zeros((), whole)
    params = dict(params)
    ahead = accelerator and Ahead(jnp.zeros((), bool), params, accelerator.init(params))
    return State(
        params, params, nothing, nothing, history, nothing, zero, zero, zero, kernel.init_states(params), e_step, ahead
    )


def em_step(
    kernel: Kernel,
    stop: Stop,
    state: State,
    bundle: Bundle,
    accelerator: Accelerator | None = None,
    last: bool = False,
) -> State:
    """Evaluate the current point; unless that ends the fit, move to the next: never where it is the `last` step.

    An extrapolated point that is no better than the one before it is left for that one's plain image, and the map that
    was spent on it tells nothing of convergence. Nor does a small gain by an extrapolation, which may have gone too
    far: a plain step follows it, and tells.
    """
    likelihood, prior, statistics, e_step = evaluated(kernel, state, bundle, last)
    value = likelihood + prior
    eps = jnp.finfo(value.dtype).eps
    size = jnp.maximum(jnp.abs(value), 1.0)
    first, warm = state.step == 0, state.step <= kernel.warmup
    trial = state.ahead.trial if accelerator else jnp.zeros((), bool)
    # a finite stand-in for log 0 is as good as minus infinity here
    bad = ~jnp.isfinite(value) | (value < -jnp.sqrt(jnp.finfo(value.dtype).max) / 2)
    refused = trial & (bad | (value < state.objective))
    bad = bad & ~refused
    slack = jnp.maximum(stop.fall * eps, RULE) if kernel.approximate else stop.fall * eps
    fell = ~warm & ~refused & (value < state.objective - slack * size) & (not kernel.may_fall)
    # against the best value so far: at the limit of single precision the objective wavers without rising
    change = value - state.best
    if kernel.may_fall:  # then a step down is a step, not rest
        change = jnp.abs(value - state.objective)
    # terms of either sign may cancel in the objective, but not in its rounding error
    rounding = 4 * eps * (size + kernel.num_rows)
    if kernel.noisy:
        still = settled(state.history.at[state.step].set(value), state.step, stop.tol * size)
        still = still & (stop.tol > 0) & (state.step >= kernel.least)
    else:
        still = ~warm & (change <= jnp.maximum(stop.tol * size, rounding)) & (stop.tol > 0)
    still, optimizer = at_rest(kernel, state.optimizer, still)
    flat = jnp.where(still, state.flat + ~trial, jnp.where(refused, state.flat, 0))
    status = jnp.where(state.step >= stop.max_steps, LIMIT, RUNNING)
    end = SETTLED if kernel.noisy else jnp.where(rounding > stop.tol * size, ROUNDED, CONVERGED)
    status = jnp.where(flat >= stop.patience, end, status)
    status = jnp.where(fell, FELL, status)
    status = jnp.where(bad, DIVERGED, status)
    back = (fell | bad) & ~first
    value, likelihood = (
        jnp.where(back | refused, old, new)
        for old, new in ((state.objective, value), (state.log_likelihood, likelihood))
    )
    history = state.history.at[state.step].set(jnp.where(back, jnp.nan, value))
    counts = ~back & (state.step >= min(kernel.warmup, stop.max_steps))
    moved = state.params
    if kernel.blocks and not last:
        moved, optimizer = kernel.maximise(state.params, statistics, bundle, optimizer)
    ahead = state.ahead
    if accelerator and not last:
        unsettled = first | (change > jnp.maximum(1, SMALL_GAIN * size))
        moved, ahead = onwards(accelerator, state, moved, refused, still | unsettled)
    going = status == RUNNING
    here = {n: jnp.where(back | refused, state.previous[n], v) for n, v in state.params.items()}
    return State(
        params={n: jnp.where(going, moved[n], here[n]) for n in here},
        previous=here,
        objective=value,
        log_likelihood=likelihood,
        history=history,
        best=jnp.where(counts, jnp.fmax(state.best, value), state.best),
        step=state.step + going - back,
        flat=flat,
        status=status.astype(state.status.dtype),
        optimizer=optimizer,
        e_step=unless(refused, e_step, state.e_step) if accelerator else e_step,
        ahead=ahead,
    )


def at_rest(kernel: Kernel, states: tuple, still: Array) -> tuple[Array, tuple]:
    """Whether the fit may end where it is still, and the states of the blocks to go on with if not."""
    ends, after = still, []
    for block, state in zip(kernel.blocks, states, strict=True):
        may_end, onward = block.rest(state)
        if onward is not state:
            ends = ends & may_end
            state = jax.tree.map(lambda now, then: jnp.where(still, then, now), state, onward)
        after.append(state)
    return ends, tuple(after)


def evaluated(kernel: Kernel, state: State, bundle: Bundle, last: bool) -> Expectation:
    """The E-step; at the `last` point without what an M-step would read."""
    if not last:
        return kernel.expect(state.params, bundle, state.e_step)
    likelihood, prior = kernel.objective(state.params, bundle)[1]
    return Expectation(likelihood, prior, {}, state.e_step)


def unless(refused: Array, new: Any, old: Any) -> Any:
    """What the E-step remembers: a point that is refused is no place to go on from."""
    return jax.tree.map(lambda n, o: jnp.where(refused, o, n), new, old)


def settled(history: Array, step: Array, tolerance: Array) -> Array:
    """Whether the mean of the last steps is no better than that of as many before, up to twice its random error."""
    before, recent = (
        jax.lax.dynamic_slice(history, (jnp.maximum(step + 1 - i * WINDOW, 0),), (min(WINDOW, history.size),))
        for i in (2, 1)
    )
    error = jnp.sqrt((jnp.var(before) + jnp.var(recent)) / WINDOW)
    return (step >= 2 * WINDOW) & (recent.mean() - before.mean() <= jnp.maximum(tolerance, 2 * error))


def onwards(accelerator: Accelerator, state: State, image: Params, refused: Array, wait: Array) -> tuple[dict, Ahead]:
    """Where an accelerated fit goes next from a point with its plain image; to that where it is to `wait`."""
    trial, plain, method = state.ahead
    point, go, after = accelerator.propose(method, state.params, image, trial)
    go = go & ~refused & ~wait
    plain = {n: jnp.where(refused, plain[n], v) for n, v in image.items()}
    point = {n: jnp.where(go, point[n], v) for n, v in plain.items()}
    after = jax.tree.map(lambda r, a: jnp.where(refused, r, a), accelerator.method.refused(method), after)
    return point, Ahead(go, plain, after)


def ended(kernel: Kernel, state: State, bundle: Bundle) -> State:
    """The state with what the E-step makes of its end: the best point where it wandered, exact values where it can."""
    treatment = kernel.treatment
    if treatment is None or not treatment.sums_exactly:
        return state

    def run(params, bundle, memory, value, likelihood):
        return treatment.ended(kernel, params, bundle, memory, value, likelihood)

    end = jit_once(run)(state.params, bundle, state.e_step, state.objective, state.log_likelihood)
    return state._replace(params=dict(end.params), objective=end.objective, log_likelihood=end.likelihood)


class Loop(NamedTuple):
    """A compiled fit.

    `advance(state, bundle, limit)` makes steps until the fit ends or `limit` of them are done. `judge(state, bundle)`
    evaluates the point where the steps ran out; None where `advance` does that too.
    """

    advance: Program
    judge: Program | None


def compile_loop(
    kernel: Kernel, stop: Stop, vmapped: bool, small: bool, apart: bool, accelerator: Accelerator | None = None
) -> Loop:
    """The loop of one fit, or of several side by side; `apart` has the last step judged by a program of its own."""

    def advance(state: State, bundle: Bundle, limit) -> State:
        return jax.lax.while_loop(
            lambda s: (s.status == RUNNING) & (s.step < limit),
            lambda s: em_step(kernel, stop, s, bundle, accelerator),
            state,
        )

    def judge(state: State, bundle: Bundle) -> State:
        last = em_step(kernel, stop, state, bundle, accelerator, last=True)
        return jax.tree.map(lambda new, old: jnp.where(state.status == RUNNING, new, old), last, state)

    compiled = jit_small if small else jit_well
    if vmapped:
        advance, judge = jax.vmap(advance, in_axes=(0, None, None)), jax.vmap(judge, in_axes=(0, None))
    return Loop(compiled(advance), compiled(judge) if apart else None)


def run_loop(loop: Loop, state: State, bundle: Bundle, stop: Stop, first: int, report: Callable) -> State:
    """Run to the end, reporting progress; an interrupt keeps what has been reached."""
    limit, span = 0, max(1, first)
    end = stop.max_steps + (loop.judge is None)
    try:
        while True:
            began = time.perf_counter()
            limit = min(limit + span, end)
            state = jax.block_until_ready(loop.advance(state, bundle, limit))
            if not np.any(np.asarray(state.status) == RUNNING):
                return state
            if loop.judge is not None and limit == end:
                return jax.block_until_ready(loop.judge(state, bundle))
            spent = time.perf_counter() - began
            report(state)
            span = int(np.clip(span * SECONDS_BETWEEN_LOOKS / max(spent, 1e-6), 1, 10 * span))
    except KeyboardInterrupt:
        return interrupted(state)


def interrupted(state: State) -> State:
    """The state where a fit was broken off; of an extrapolated point nobody knows yet what it is worth."""
    running = jnp.asarray(state.status == RUNNING)
    params = dict(state.params)
    if state.ahead is not None:
        trial = running & state.ahead.trial
        for n, v in params.items():
            wide = trial.reshape(trial.shape + (1,) * (v.ndim - trial.ndim))
            params[n] = jnp.where(wide, state.previous[n], v)
    return state._replace(params=params, status=jnp.where(running, INTERRUPTED, state.status))

"""Compiled programs, shared by all that say the same: `jit_once`, `jit_small` and `jit_well`.

In: a function of arrays. Out: the same function, compiled at its first call for each structure and shapes of its
arguments. A program is known by its text after lowering, constants included: where two functions lower to one text, as
those of two `EM` objects of one model do, it is compiled once in a process. Compiling may begin before the first call
and go on beside other work: see `Program.prepare`.
"""

from __future__ import annotations

import collections
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex
from jax.sharding import SingleDeviceSharding

from autoem.graph.grouping import grouped, spec

KEPT = 256  # programs that are kept, the last used ones
LARGE = 1_000_000  # numbers that a program goes over again and again, beyond which it is worth compiling well
CONSTANTS_UP_TO = 4 << 20  # bytes of constants in a program, beyond which its text is too long to compare

# one-shot programs: what compiling saves by optimising them is less than what it costs
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
# kernels one after the other: over small data the waking of threads costs more than what they do
IN_TURN = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

ARRAYS = jax.Array, np.ndarray, np.generic
_known: collections.OrderedDict[tuple, Future] = collections.OrderedDict()
_lock = threading.Lock()
_beside = ThreadPoolExecutor(2, "autoem-compile")


class Program:
    """A function compiled with options of its own; use `jit_once`, `jit_small` or `jit_well`."""

    def __init__(self, function: Callable, options: Mapping[str, Any] | None = None, **placed: Any):
        self._on_cpu = jax.default_backend() == "cpu"
        self._options = dict(options) if options and self._on_cpu else None
        self._placed = placed
        # arguments that go unused stay: two programs that differ in what they leave unread would else have one text
        self._jit = jax.jit(function, compiler_options=self._options, keep_unused=True, **placed)
        self._compiled: dict[tuple, Future] = {}

    def __call__(self, *args: Any) -> Any:
        signature = self._signature(args)
        if signature is None:
            return self._jit(*args)
        if signature not in self._compiled:
            self._compile(signature, args, beside=False)
        return self._compiled[signature].result()(*args)

    def prepare(self, *args: Any) -> None:
        """Begin to compile for arguments of these shapes, beside what this thread does next."""
        signature = self._signature(args)
        if signature is not None and signature not in self._compiled:
            self._compile(signature, args, beside=True)

    def _signature(self, args: tuple) -> tuple | None:
        """What a compiled program is specific to; None where the call is left to JAX."""
        leaves, tree = jax.tree.flatten(args)
        config: Any = jax.config
        if self._placed:
            return None
        odd = config.jax_disable_jit, config.jax_debug_nans, config.jax_debug_infs, config.jax_default_device
        if any(odd) or config.jax_use_simplified_jaxpr_constants or not all(map(is_plain, leaves)):
            return None
        return tree, tuple(map(kind, leaves)), config.jax_enable_x64, config.jax_default_matmul_precision

    def _compile(self, signature: tuple, args: tuple, beside: bool) -> None:
        traced = self._jit.trace(*args)
        parts = grouped(traced.jaxpr)
        as_it_came = parts[0] is traced.jaxpr
        if as_it_came:
            lowered = [traced.lower()]
        else:
            quick = QUICK if self._on_cpu else None  # before and after a loop, arrays are but put together and cut
            options: list[dict[str, Any] | None] = [self._options] if len(parts) == 1 else [quick, self._options, quick]
            lowered = [lower(part, of_part) for part, of_part in zip(parts, options, strict=True)]

        def finish() -> Callable:
            compiled = [part.compile() for part in lowered]
            return compiled[0] if as_it_came else chained(compiled, traced.out_tree)

        size = sum(c.size * c.dtype.itemsize for c in traced.jaxpr.consts if isinstance(c, ARRAYS))
        if size <= CONSTANTS_UP_TO:
            text = hashlib.sha256("".join(part.as_text() for part in lowered).encode()).digest()
            program, is_new = shared((text, signature, traced.out_tree, tuple((self._options or {}).items())))
        else:
            program, is_new = Future(), True
        if is_new:
            settle(program, finish, beside)
        self._compiled[signature] = program


def shared(key: tuple) -> tuple[Future, bool]:
    """The program that `key` tells, and whether it is still to be compiled."""
    with _lock:
        program = _known.get(key)
        is_new = program is None or (program.done() and program.exception() is not None)
        if program is None or is_new:
            program = _known[key] = Future()
        _known.move_to_end(key)
        while len(_known) > KEPT:
            _known.popitem(last=False)
    return program, is_new


def forget() -> None:
    """Forget all programs, so that what is timed next compiles its own."""
    with _lock:
        _known.clear()


def lower(part: Any, options: dict[str, Any] | None) -> Any:
    """A closed jaxpr, lowered."""
    whole = jax.jit(jex.jaxpr_as_fun(part), compiler_options=options, keep_unused=True)
    return whole.trace(*map(spec, part.in_avals)).lower()


def chained(parts: Sequence[Callable], tree: Any) -> Callable:
    """The parts of a program as one function of its arguments, whose outputs have the structure `tree`."""

    def run(*args: Any) -> Any:
        values = jax.tree.leaves(args)
        for part in parts:
            values = part(*values)
        return jax.tree.unflatten(tree, values)

    return run


def is_plain(x: Any) -> bool:
    """Whether a value is an array or a number that lies on the one device which programs run on by default."""
    if isinstance(x, Tracer):
        return False
    if isinstance(x, jax.Array):
        where = x.sharding
        return isinstance(where, SingleDeviceSharding) and where.device_set == {jax.local_devices()[0]}
    return isinstance(x, (*ARRAYS, int, float))


def kind(x: Any) -> tuple:
    """What a program depends on of an argument."""
    if isinstance(x, jax.Array):
        return x.shape, x.dtype, bool(getattr(x, "weak_type", False))  # a random key has none
    return (x.shape, x.dtype, False) if isinstance(x, np.ndarray | np.generic) else ((), type(x), True)


def settle(future: Future, work: Callable, beside: bool) -> None:
    """Give `future` what `work` returns or raises, now or in a thread of its own."""

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whoever asks for the result is told
            future.set_exception(error)

    if beside:
        _beside.submit(run)
    else:
        run()


def jit_well(function: Callable, **placed: Any) -> Program:
    """`jax.jit` for a program that runs many times, over large data; `placed` says on which devices."""
    return Program(function, **placed)


def jit_once(function: Callable, **placed: Any) -> Program:
    """`jax.jit` for a program that runs about once: compiled fast rather than well."""
    return Program(function, QUICK, **placed)


def jit_small(function: Callable) -> Program:
    """`jax.jit` for a program whose every kernel is small, compiled to run in one thread."""
    return Program(function, IN_TURN)


def jit_loop(function: Callable, size: int) -> Program:
    """`jax.jit` for a loop over `size` numbers that runs about once."""
    return jit_well(function) if size > LARGE else jit_once(function)

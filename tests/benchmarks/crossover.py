"""Where another form of a chain's messages overtakes autoem's own, in length, states and devices; prints a table.

Run by `__main__`, which sets the environment first: `python -m tests.benchmarks.crossover 10000`. Each cell is the
milliseconds of the log-likelihood with all its derivatives (marginals and pairs of neighbours) from tables of
logarithms: by `total` of `autoem.e_step.elimination.chains`, one scan each way, and by the blocked and the associative
form of `chain_messages`. A cell is left empty where its products are too many or too large to be a choice, or where the
time is up.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from . import chain_messages

_LIMIT = 30.0  # seconds from the first measurement of a length to the start of its last
_PRODUCTS = 1e9  # multiplications above which a form that multiplies matrices is not tried
_ENTRIES = 2**22  # numbers in its matrices, likewise
LENGTHS = (1_000, 10_000, 100_000)
STATES = (2, 4, 8, 16, 32, 64)


def tables(steps: int, k: int) -> tuple[Any, Any, Any]:
    """Log densities of a chain with states that last: the first state, every step, and neighbours."""
    rng = np.random.default_rng(0)
    trans = np.full((k, k), 0.3 / max(k - 1, 1))
    np.fill_diagonal(trans, 0.7)
    trans = trans / trans.sum(1, keepdims=True)
    return np.log(np.full(k, 1.0 / k)), rng.normal(size=(steps, k)), np.log(trans)


def own(start, single, trans):
    """autoem's: the state before the first step follows `start`, so that every step has the same tables."""
    import jax

    from autoem.e_step.elimination import chain_tables, chains
    from autoem.graph.named import Named

    frame = chain_tables.Frame((), ("p",), ("c",))

    def value(start, single, trans):
        pairs = (Named(trans, ("p", "c")),)
        tables = chain_tables.ChainTables(
            frame, Named(start, ("p",)), Named(single, (chain_tables.TIME, "c")), pairs, len(single)
        )
        return chains.total(tables).array

    return jax.value_and_grad(value, (0, 1, 2))(start, single, trans)


def _likelihoods(start, single, trans):
    """Probabilities of the first step, of what is seen there, of neighbours; and the logarithm taken out."""
    import jax.numpy as jnp

    top = single.max(1)
    trans = jnp.exp(trans)
    return jnp.exp(start) @ trans, jnp.exp(single - top[:, None]), trans, top.sum()


def _derivatives(start, trans, posterior, pairs):
    """Those by the head, every step and the neighbours, of which the head and the first step are a pair too."""
    first = start[:, None] * trans * (posterior[0] / (start @ trans))
    return first.sum(1), posterior, pairs + first


def associative(start, single, trans):
    """By prefix and suffix products on one device."""
    import jax.numpy as jnp

    first, b, trans, top = _likelihoods(start, single, trans)
    follows = jnp.ones(len(b)).at[-1].set(0.0)
    messages = chain_messages.associative(first, trans, b)
    posterior, pairs, value = chain_messages.counts(trans, b, messages, follows)
    return value + top, _derivatives(jnp.exp(start), trans, posterior, pairs)


def blocked(devices: int) -> Callable:
    """In blocks over so many devices; steps that only fill the last block are seen with probability one."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array(jax.devices()[:devices]), ("d",))

    def local(first, trans, b, follows):
        messages = chain_messages.blocked(first, trans, b)
        posterior, pairs, value = chain_messages.counts(trans, b, messages, follows)
        return posterior, *jax.lax.psum((pairs, value), "d")

    lanes = P(None, None, "d")
    shared = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(), lanes, P(None, "d")), out_specs=(lanes, P(), P()), check_vma=False
    )

    def all_derivatives(start, single, trans):
        first, b, trans, top = _likelihoods(start, single, trans)
        steps, k = b.shape
        length = max(8, round(0.4 * math.sqrt(steps)))
        blocks = devices * -(-steps // (length * devices))
        b = jnp.ones((length * blocks, k)).at[:steps].set(b).reshape(blocks, length, k).transpose(1, 2, 0)
        follows = jnp.where(jnp.arange(length * blocks) < steps - 1, 1.0, 0.0).reshape(blocks, length).T
        posterior, pairs, value = shared(first, trans, b, follows)
        posterior = posterior.transpose(2, 0, 1).reshape(-1, k)[:steps]
        return value + top, _derivatives(jnp.exp(start), trans, posterior, pairs)

    return all_derivatives


def _seconds(run: Callable[[], Any]) -> float:
    """Median of a few runs, for about a third of a second."""
    import jax

    spent: list[float] = []
    while len(spent) < 7 and sum(spent) < 0.3:
        begin = time.perf_counter()
        jax.block_until_ready(run())
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent)


def _pays(name: str, steps: int, k: int) -> bool:
    """Whether a form is worth its compilation at this size."""
    rounds = {"sequential": 0.0, "associative": 2 * math.log2(steps)}.get(name, 1.0)
    entries = steps * k * k if name == "associative" else 0
    return rounds * steps * k**3 <= _PRODUCTS and entries <= _ENTRIES


def _same(found: Any, known: Any) -> bool:
    """Whether the log-likelihood and every derivative agree."""
    pairs = zip((found[0], *found[1]), (known[0], *known[1]), strict=True)
    return all(np.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in pairs)


def _row(steps: int, k: int, forms: dict[str, Callable], until: float) -> list[str]:
    import jax

    arguments = [jax.numpy.asarray(x) for x in tables(steps, k)]
    known, cells = None, []
    for name, form in forms.items():
        if time.perf_counter() > until or not _pays(name, steps, k):
            cells.append("")
            continue
        run = functools.partial(jax.jit(form), *arguments)
        found = jax.block_until_ready(run())
        known = found if known is None else known
        cells.append(f"{_seconds(run) * 1e3:.3f}" if _same(found, known) else "WRONG")
    return cells


def crossover(steps: int) -> None:
    """Measure chains of `steps` steps and print, row by row."""
    import jax

    devices = jax.device_count()
    forms = {"sequential": own, "associative": associative, "blocked, 1": blocked(1)}
    if devices > 1:
        forms[f"blocked, {devices}"] = blocked(devices)
    print(f"  {'T':>8s} {'k':>4s}" + "".join(f" {name:>12s}" for name in forms) + "   fastest", flush=True)
    until = time.perf_counter() + _LIMIT
    for k in STATES:
        cells = _row(steps, k, forms, until)
        measured = {n: float(c) for n, c in zip(forms, cells, strict=True) if c not in ("", "WRONG")}
        best = min(measured, key=measured.__getitem__, default="")
        print(f"  {steps:8,d} {k:4d}" + "".join(f" {c:>12s}" for c in cells) + f"   {best}", flush=True)


if __name__ == "__main__":
    crossover(int(sys.argv[1]))

"""Baum-Welch written by hand in JAX: what the fastest and the plain form take for a hidden Markov model.

- `jax-plain`: one device, one scan forward and one backward, scaled probabilities, closed-form M-step;
- `jax-best`: a long chain in blocks over all devices, one of many states forward on one device and backward on
  another, many sequences spread over all devices.

Emissions are one matrix product with features of the data, expected statistics another; `chain_messages` has the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import chain_messages
from ._contender import CORES, Contender, Outcome
from .workloads import Arrays, Workload

_LOG_2PI = float(np.log(2 * np.pi))
_BLOCK = 125  # steps of a block, 800 of them where a chain is 100,000 long
_MANY_STATES = 32  # from here on a block's k x k product costs more than its blocks save


class Emission(NamedTuple):
    """What is seen at a step, given its state.

    Attributes:
        columns: what the data are read as, `(..., steps, lanes)`; lanes are sequences, or blocks of one.
        start: its parameters in the coordinates of `columns`.
        log_density: parameters and columns to `(steps, k, lanes)`; zero at steps that only fill a block.
        statistics: columns and the posterior to sums over steps and lanes.
        maximise: these sums to parameters.
        restore: parameters back to the coordinates of the workload.
    """

    columns: np.ndarray
    start: Arrays
    log_density: Callable[[Any, Any], Any]
    statistics: Callable[[Any, Any], Any]
    maximise: Callable[[Any], Any]
    restore: Callable[[Arrays], Arrays]


def gaussian(w: Workload, lay: Callable[[np.ndarray, float], np.ndarray]) -> Emission:
    """Features [1, x, x^2] of data centred and scaled once."""
    import jax.numpy as jnp

    x = w.data["x"].reshape(w.num_sequences, -1, w.data["x"].shape[-1])
    d = x.shape[-1]
    centre, unit = x.mean((0, 1)), x.std((0, 1))
    x = (x - centre) / unit

    def natural(p):
        precision = p["scale"] ** -2
        squares = (p["loc"] ** 2 * precision).sum(1)
        constant = -jnp.log(p["scale"]).sum(1) - 0.5 * (d * _LOG_2PI + squares) - np.log(unit).sum()
        return jnp.concatenate([constant[:, None], p["loc"] * precision, -0.5 * precision], 1)

    def maximise(sums):
        total = sums[:, :1]
        mean, square = sums[:, 1 : 1 + d] / total, sums[:, 1 + d :] / total
        return {"loc": mean, "scale": jnp.sqrt(square - mean**2)}

    return Emission(
        lay(np.concatenate([np.ones_like(x[..., :1]), x, x * x], 2), 0.0),
        {"loc": (w.start["loc"] - centre) / unit, "scale": w.start["scale"] / unit},
        lambda p, features: jnp.einsum("kf,ftn->tkn", natural(p), features),
        lambda features, posterior: jnp.einsum("ftn,tkn->kf", features, posterior),
        maximise,
        lambda p: {"loc": p["loc"] * unit + centre, "scale": p["scale"] * unit},
    )


def categorical(w: Workload, lay: Callable[[np.ndarray, float], np.ndarray]) -> Emission:
    """Symbols read from the table of emissions; what fills a block is a symbol that every state emits."""
    import jax.numpy as jnp

    num_symbols = w.start["emit"].shape[1]
    symbols = lay(w.data["x"].reshape(w.num_sequences, -1, 1), num_symbols)[0].astype(np.int32)

    def log_density(p, symbols):
        # a symbol that a state never emits: the scorer reads its probability the same way
        table = jnp.log(jnp.maximum(p["emit"], 1e-300))
        return jnp.pad(table, ((0, 0), (0, 1))).T[symbols].swapaxes(1, 2)

    def statistics(symbols, posterior):
        seen = symbols[..., None] == jnp.arange(num_symbols)
        return jnp.einsum("tnv,tkn->kv", seen.astype(posterior.dtype), posterior)

    return Emission(
        symbols,
        {"emit": w.start["emit"]},
        log_density,
        statistics,
        lambda sums: {"emit": sums / sums.sum(1, keepdims=True)},
        lambda p: p,
    )


class Layout(NamedTuple):
    """How the steps of a workload lie: `columns` (s, t, f) to (f, steps, lanes); `follows` and `opens` as arrays.

    `axis` is the one of steps (-2) or lanes (-1) that is spread over devices, None where there is one device.
    """

    columns: Callable[[np.ndarray, float], np.ndarray]
    follows: np.ndarray
    opens: np.ndarray
    axis: int | None
    devices: int
    messages: Callable


def as_it_is(w: Workload, axis: int | None, devices: int, messages: Callable) -> Layout:
    """Steps as steps, sequences side by side."""
    steps = w.data["x"].shape[0 if w.num_sequences == 1 else 1]
    follows = np.ones((steps, w.num_sequences))
    follows[-1] = 0.0
    opens = np.zeros_like(follows)
    opens[0] = 1.0
    return Layout(lambda x, _: np.ascontiguousarray(x.transpose(2, 1, 0)), follows, opens, axis, devices, messages)


def in_blocks(w: Workload, devices: int) -> Layout:
    """One sequence cut into blocks, which lie side by side, as many on each device; the last are filled up."""
    steps = len(w.data["x"])
    lanes = devices * -(-steps // (_BLOCK * devices))

    def cut(x: np.ndarray, fill: float) -> np.ndarray:
        rows = np.full((lanes * _BLOCK, x.shape[2]), fill)
        rows[:steps] = x[0]
        return np.ascontiguousarray(rows.reshape(lanes, _BLOCK, -1).transpose(2, 1, 0))

    times = np.arange(lanes * _BLOCK).reshape(lanes, _BLOCK).T
    return Layout(cut, 1.0 * (times < steps - 1), 1.0 * (times == 0), -1, devices, chain_messages.blocked)


def plain_layout(w: Workload) -> Layout:
    return as_it_is(w, None, 1, chain_messages.plain)


def best_layout(w: Workload) -> Layout:
    """The form that is fastest for so many sequences and states."""
    import jax

    devices = jax.device_count()
    if w.num_sequences > 1:
        return as_it_is(w, -1, devices, chain_messages.side_by_side)
    if w.num_states >= _MANY_STATES and devices > 1:
        return as_it_is(w, -2, 2, chain_messages.two_way)
    return in_blocks(w, devices)


def e_step(emission: Emission, layout: Layout, params, columns, follows, opens):
    """Sums over the steps at hand: first states, pairs of neighbours, the emission's own, and the log-likelihood."""
    import jax.numpy as jnp

    log_density = emission.log_density(params, columns)
    top = log_density.max(1)
    b = jnp.exp(log_density - top[:, None])
    if b.shape[2] == 1 and layout.messages is not chain_messages.blocked:  # one chain: its messages are vectors
        squeezed, single = b[..., 0], follows[..., 0]
        messages = layout.messages(params["start"], params["trans"], squeezed)
        posterior, pairs, log_norms = chain_messages.counts(params["trans"], squeezed, messages, single)
        posterior = posterior[..., None]
    else:
        messages = layout.messages(params["start"], params["trans"], b)
        posterior, pairs, log_norms = chain_messages.counts(params["trans"], b, messages, follows)
    first = jnp.einsum("n,kn->k", opens[0], posterior[0])
    return first, pairs, emission.statistics(columns, posterior), log_norms + top.sum()


def spread(e: Callable, layout: Layout, arrays: tuple[np.ndarray, ...]):
    """The data on their devices, and the E-step summed over these; plain arrays where there is one device."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    if layout.axis is None:
        return tuple(jnp.asarray(a) for a in arrays), e, jnp.asarray
    mesh = Mesh(np.array(jax.devices()[: layout.devices]), ("d",))
    specs = tuple(P(*("d" if i == a.ndim + layout.axis else None for i in range(a.ndim))) for a in arrays)
    placed = tuple(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True))
    shared = jax.shard_map(
        lambda params, *arrays: jax.lax.psum(e(params, *arrays), "d"),
        mesh=mesh,
        in_specs=(P(), *specs),
        out_specs=P(),
        check_vma=False,
    )
    return placed, shared, lambda a: jax.device_put(jnp.asarray(a), NamedSharding(mesh, P()))


def prepare(layout_of: Callable[[Workload], Layout], w: Workload) -> Callable[[], Outcome]:
    """The whole fit as one compiled loop, the log-likelihood carried so that the compiler cannot leave it out."""
    import jax
    from jax import lax

    layout = layout_of(w)
    emission = (gaussian if "loc" in w.start else categorical)(w, layout.columns)
    e = functools.partial(e_step, emission, layout)
    arrays, sums, put = spread(e, layout, (emission.columns, layout.follows, layout.opens))

    @jax.jit
    def fit(params, log_likelihood, *arrays):
        def step(_, carry):
            first, pairs, own, log_likelihood = sums(carry[0], *arrays)
            trans = pairs / pairs.sum(1, keepdims=True)
            return {"start": first / first.sum(), "trans": trans, **emission.maximise(own)}, log_likelihood

        return lax.fori_loop(0, w.num_steps, step, (params, log_likelihood))

    chain = {"start": w.start["start"], "trans": w.start["trans"]}
    start, zero = jax.tree.map(put, {**chain, **emission.start}), put(np.zeros(()))

    def run() -> Outcome:
        params, _ = jax.block_until_ready(fit(start, zero, *arrays))
        found = {name: np.asarray(value) for name, value in params.items()}
        own = emission.restore({name: found[name] for name in emission.start})
        return Outcome({"start": found["start"], "trans": found["trans"], **own})

    return run


_FORMS = (("jax-best", CORES, best_layout, "best"), ("jax-plain", 1, plain_layout, "plain"))
CONTENDERS = tuple(
    Contender(name, family, functools.partial(prepare, layout), ("jax.numpy",), devices, role)
    for family in ("chain", "chains", "symbols")
    for name, devices, layout, role in _FORMS
)

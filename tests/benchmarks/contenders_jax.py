"""EM written by hand in JAX for each workload: the speed that a compiler can be asked to reach.

Each family is stated once as three pure functions and run in three ways:

- `jax-best`: rows in chunks that fit the cache, sharded over as many virtual devices as there are cores;
- `jax-chunked`: the same chunks on one device;
- `jax-plain`: one device, all rows at once. This is the plain form that a careful author writes first.

The fourth, `jax-textbook`, writes the densities as a book does (`contenders_textbook`).

What makes them fast is the form: the log density of every component is one matrix product of natural parameters with
features of the data, the expected statistics are one product of the same features with the responsibilities, and rows
lie along the last axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ._contender import CORES, Contender, Outcome
from .workloads import Arrays, Workload

_LOG_2PI = float(np.log(2 * np.pi))
_CHUNK = 1024  # rows: the features and weights of one chunk stay in a core's cache


@dataclasses.dataclass(frozen=True)
class HandEM:
    """One EM, rows along the last axis of every array of `columns`.

    Attributes:
        columns: the data as the E-step reads them.
        start: parameters in the coordinates of `columns`.
        derive: parameters to whatever the E-step wants, once a step.
        statistics: a slice of `columns` and the derived to sums over its rows; the last entry is the log-likelihood.
        maximise: the sums to new parameters.
        restore: parameters back to the coordinates of the workload.
    """

    columns: tuple[np.ndarray, ...]
    start: Arrays
    derive: Callable[[Any], Any]
    statistics: Callable[[tuple, Any], tuple]
    maximise: Callable[[tuple], Any]
    restore: Callable[[Arrays], Arrays] = lambda params: params


def _softmax(log_joint):
    """Responsibilities over the first axis, and the total log-likelihood."""
    import jax.numpy as jnp

    top = log_joint.max(0, keepdims=True)
    weight = jnp.exp(log_joint - top)
    total = weight.sum(0, keepdims=True)
    return weight / total, (top + jnp.log(total)).sum()


def _symmetric(packed, d: int):
    """Upper triangles, packed along the last axis, to symmetric matrices."""
    import jax.numpy as jnp

    rows, columns = np.triu_indices(d)
    upper = jnp.zeros((*packed.shape[:-1], d, d), packed.dtype).at[..., rows, columns].set(packed)
    return upper + jnp.triu(upper, 1).swapaxes(-1, -2)


def gaussian_full(w: Workload) -> HandEM:
    """Features [1, x, vech(xx')] of data centred and scaled once, so that the quadratic form does not cancel."""
    import jax
    import jax.numpy as jnp

    x = w.data["x"]
    d = x.shape[1]
    rows, columns = np.triu_indices(d)
    halves = np.where(rows == columns, -0.5, -1.0)
    centre, unit = x.mean(0), x.std(0)

    def derive(p):
        factors = jnp.linalg.cholesky(p["cov"])
        log_det = jnp.log(jnp.diagonal(factors, axis1=1, axis2=2)).sum(1)
        eye = jnp.broadcast_to(jnp.eye(d), factors.shape)
        inverses = jax.scipy.linalg.solve_triangular(factors, eye, lower=True)
        precision = jnp.einsum("kji,kjl->kil", inverses, inverses)
        linear = jnp.einsum("kij,kj->ki", precision, p["loc"])
        constant = jnp.log(p["weights"]) - log_det - 0.5 * d * _LOG_2PI - 0.5 * (linear * p["loc"]).sum(1)
        return jnp.concatenate([constant[:, None], linear, halves * precision[:, rows, columns]], 1)

    def statistics(data, natural):
        (x,) = data
        features = jnp.concatenate([jnp.ones((1, x.shape[1])), x, x[rows] * x[columns]], 0)
        responsibility, log_likelihood = _softmax(natural @ features)
        return responsibility @ features.T, log_likelihood

    def maximise(sums):
        counts = sums[0][:, :1]
        mean, square = sums[0][:, 1 : 1 + d] / counts, sums[0][:, 1 + d :] / counts
        cov = _symmetric(square, d) - mean[:, :, None] * mean[:, None, :]
        return {"weights": counts[:, 0] / counts.sum(), "loc": mean, "cov": cov}

    def restore(p):
        return {"weights": p["weights"], "loc": p["loc"] * unit + centre, "cov": p["cov"] * np.outer(unit, unit)}

    start = {
        "weights": w.start["weights"],
        "loc": (w.start["loc"] - centre) / unit,
        "cov": w.start["cov"] / np.outer(unit, unit),
    }
    scaled = np.ascontiguousarray(((x - centre) / unit).T)
    return HandEM((scaled,), start, derive, statistics, maximise, restore)


def gaussian_diagonal(w: Workload) -> HandEM:
    """Features [1, x, x^2] of data centred and scaled once."""
    import jax.numpy as jnp

    x = w.data["x"]
    d = x.shape[1]
    centre, unit = x.mean(0), x.std(0)

    def derive(p):
        precision = p["scale"] ** -2
        squares = (p["loc"] ** 2 * precision).sum(1)
        constant = jnp.log(p["weights"]) - jnp.log(p["scale"]).sum(1) - 0.5 * (d * _LOG_2PI + squares)
        return jnp.concatenate([constant[:, None], p["loc"] * precision, -0.5 * precision], 1)

    def statistics(data, natural):
        (x,) = data
        features = jnp.concatenate([jnp.ones((1, x.shape[1])), x, x * x], 0)
        responsibility, log_likelihood = _softmax(natural @ features)
        return responsibility @ features.T, log_likelihood

    def maximise(sums):
        counts = sums[0][:, :1]
        mean, square = sums[0][:, 1 : 1 + d] / counts, sums[0][:, 1 + d :] / counts
        return {"weights": counts[:, 0] / counts.sum(), "loc": mean, "scale": jnp.sqrt(square - mean**2)}

    def restore(p):
        return {"weights": p["weights"], "loc": p["loc"] * unit + centre, "scale": p["scale"] * unit}

    start = {
        "weights": w.start["weights"],
        "loc": (w.start["loc"] - centre) / unit,
        "scale": w.start["scale"] / unit,
    }
    scaled = np.ascontiguousarray(((x - centre) / unit).T)
    return HandEM((scaled,), start, derive, statistics, maximise, restore)


def latent_classes(w: Workload) -> HandEM:
    """Features [1, says yes, says no] as int8, cast inside the chunk; a missing answer is neither."""
    import jax.numpy as jnp

    x = w.data["x"]
    items = x.shape[1]
    answers = np.ascontiguousarray(np.concatenate([x == 1.0, x == 0.0], 1).T.astype(np.int8))

    def derive(p):
        return jnp.concatenate([jnp.log(p["weights"])[:, None], jnp.log(p["theta"]), jnp.log1p(-p["theta"])], 1)

    def statistics(data, natural):
        answered = data[0].astype(natural.dtype)
        features = jnp.concatenate([jnp.ones((1, answered.shape[1])), answered], 0)
        responsibility, log_likelihood = _softmax(natural @ features)
        return responsibility @ features.T, log_likelihood

    def maximise(sums):
        counts, yes, no = sums[0][:, 0], sums[0][:, 1 : 1 + items], sums[0][:, 1 + items :]
        return {"weights": counts / counts.sum(), "theta": yes / (yes + no)}

    return HandEM((answers,), w.start, derive, statistics, maximise)


def regressions(w: Workload) -> HandEM:
    """Residuals by one product, weighted normal equations by another with features vech([x, y][x, y]')."""
    import jax.numpy as jnp

    p_columns = w.data["x"].shape[1]
    joint = np.ascontiguousarray(np.concatenate([w.data["x"], w.data["y"][:, None]], 1).T)
    rows, columns = np.triu_indices(p_columns + 1)

    def statistics(data, q):
        (z,) = data
        residual = (z[p_columns] - q["beta"] @ z[:p_columns]) / q["scale"][:, None]
        constant = jnp.log(q["weights"]) - jnp.log(q["scale"]) - 0.5 * _LOG_2PI
        responsibility, log_likelihood = _softmax(constant[:, None] - 0.5 * residual**2)
        return responsibility @ (z[rows] * z[columns]).T, responsibility.sum(1), log_likelihood

    def maximise(sums):
        moments, counts = _symmetric(sums[0], p_columns + 1), sums[1]
        gram, cross, square = moments[:, :-1, :-1], moments[:, :-1, -1], moments[:, -1, -1]
        beta = jnp.linalg.solve(gram, cross[..., None])[..., 0]
        rss = square - 2 * (beta * cross).sum(1) + jnp.einsum("ki,kij,kj->k", beta, gram, beta)
        return {"weights": counts / counts.sum(), "beta": beta, "scale": jnp.sqrt(rss / counts)}

    return HandEM((joint,), w.start, lambda q: q, statistics, maximise)


def _in_chunks(em: HandEM, columns, derived, chunk: int | None):
    """The sums over all rows, `chunk` rows at a time (None: all at once)."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    n = columns[0].shape[-1]
    if chunk is None or n <= chunk:
        return em.statistics(columns, derived)

    def block(start, size):
        return em.statistics(tuple(lax.dynamic_slice_in_dim(a, start, size, axis=-1) for a in columns), derived)

    def add(i, sums):
        return jax.tree.map(jnp.add, sums, block(i * chunk, chunk))

    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda: block(0, chunk)))
    sums = lax.fori_loop(0, n // chunk, add, blank)
    return jax.tree.map(jnp.add, sums, block(n - n % chunk, n % chunk)) if n % chunk else sums


def _over_devices(em: HandEM, chunk: int | None):
    """The data on all devices, and the function that sums over them; plain arrays where there is one device."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    def sums(columns, derived):
        return _in_chunks(em, columns, derived, chunk)

    if jax.device_count() == 1:
        return tuple(jnp.asarray(a) for a in em.columns), sums, jnp.asarray
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    specs = tuple(P(*[None] * (a.ndim - 1), "rows") for a in em.columns)
    columns = tuple(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(em.columns, specs, strict=True))
    shared = jax.shard_map(
        lambda columns, derived: jax.lax.psum(sums(columns, derived), "rows"),
        mesh=mesh,
        in_specs=(specs, P()),
        out_specs=P(),
        check_vma=False,
    )
    return columns, shared, lambda a: jax.device_put(jnp.asarray(a), NamedSharding(mesh, P()))


def prepare(make: Callable[[Workload], HandEM], w: Workload, chunk: int | None) -> Callable[[], Outcome]:
    """The whole fit as one compiled loop, the log-likelihood carried so that the compiler cannot leave it out."""
    import jax
    from jax import lax

    em = make(w)
    columns, sums, put = _over_devices(em, chunk)

    @jax.jit
    def fit(columns, params, log_likelihood):
        def step(_, carry):
            total = sums(columns, em.derive(carry[0]))
            return em.maximise(total), total[-1]

        return lax.fori_loop(0, w.num_steps, step, (params, log_likelihood))

    start, zero = jax.tree.map(put, em.start), put(np.zeros(()))

    def run() -> Outcome:
        params, _ = jax.block_until_ready(fit(columns, start, zero))
        return Outcome(em.restore({name: np.asarray(value) for name, value in params.items()}))

    return run


_FAMILIES = {
    "full": gaussian_full,
    "diagonal": gaussian_diagonal,
    "classes": latent_classes,
    "regressions": regressions,
}
_FORMS = (("jax-best", CORES, _CHUNK, "best"), ("jax-chunked", 1, _CHUNK, "best"), ("jax-plain", 1, None, "plain"))


def _contender(family: str, name: str, devices: int, chunk: int | None, role: str) -> Contender:
    make = _FAMILIES[family]
    return Contender(name, family, lambda w: prepare(make, w, chunk), ("jax.numpy", "jax.scipy"), devices, role)


CONTENDERS = tuple(_contender(family, *form) for family in _FAMILIES for form in _FORMS)

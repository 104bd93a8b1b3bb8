"""EM in JAX by hand on the workloads with continuous latents, and on tomography: the best that we know, and plainly.

`plain` is what one writes after reading a book: passes over all rows, a filter with LAPACK's small inverses, a sparse
matrix of JAX. `best` uses what never changes: moments of the data once, patterns of holes, gains that settle.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._contender import CORES, Contender, Outcome
from .workloads import Workload

_LOG_2PI = float(np.log(2 * np.pi))
_SETTLED = 200  # steps after which the covariances of this system no longer move (1e-13)


def _looped(w: Workload, step: Callable, *data) -> Callable[[], Outcome]:
    """All steps as one compiled loop over `step(data, params)`, the likelihood carried under the name `value`."""
    import jax
    import jax.numpy as jnp

    start = {name: jnp.asarray(value) for name, value in {**w.start, "value": 0.0}.items()}
    fit = jax.jit(lambda p, data: jax.lax.fori_loop(0, w.num_steps, lambda _, p: step(data, p), p))

    def run() -> Outcome:
        found = fit(start, data)
        return Outcome({name: np.asarray(found[name]) for name in w.start})

    return run


def _factor_step(n: int, moments: Callable, data, p):
    import jax
    import jax.numpy as jnp

    loadings, variance = p["loadings"], p["variance"]
    k = loadings.shape[1]
    weighed = loadings / variance[:, None]
    inner = jnp.eye(k) + loadings.T @ weighed
    root = jnp.linalg.cholesky(inner)
    gain = jax.scipy.linalg.cho_solve((root, True), weighed.T)
    cross, diagonal = moments(data, gain)  # E[x f'], and the variances of x
    second = jnp.eye(k) - gain @ loadings + gain @ cross
    new = jnp.linalg.solve(second, cross.T).T
    log_det = 2 * jnp.log(jnp.diagonal(root)).sum() + jnp.log(variance).sum()
    square = (diagonal / variance).sum() - (cross * weighed).sum()
    value = -0.5 * n * (len(variance) * _LOG_2PI + log_det + square)
    return {**p, "loadings": new, "variance": diagonal - (new * cross).sum(1), "value": value}


def factors_best(w: Workload) -> Callable[[], Outcome]:
    """From the covariance of the data, which is taken once a fit."""
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(w.data["x"])
    n = len(x)
    step = lambda s, p: _factor_step(n, lambda s, gain: (s @ gain.T, jnp.diag(s)), s, p)  # noqa: E731

    def whole(x, p):
        off = x - p["centre"]
        moment = off.T @ off / n
        return jax.lax.fori_loop(0, w.num_steps, lambda _, p: step(moment, p), p)

    fit = jax.jit(whole)
    start = {name: jnp.asarray(value) for name, value in {**w.start, "value": 0.0}.items()}

    def run() -> Outcome:
        found = fit(x, start)
        return Outcome({name: np.asarray(found[name]) for name in w.start})

    return run


def factors_plain(w: Workload) -> Callable[[], Outcome]:
    """Two passes over all rows a step."""
    import jax.numpy as jnp

    def moments(x, gain):
        return x.T @ (x @ gain.T) / len(x), (x**2).mean(0)

    x = jnp.asarray(w.data["x"] - w.start["centre"])
    return _looped(w, lambda data, p: _factor_step(len(x), moments, data[0], p), x)


def holes_best(w: Workload) -> Callable[[], Outcome]:
    """Moments of each pattern once, then a sweep of the scatter matrix for all patterns together."""
    import jax.numpy as jnp

    x = w.data["x"]
    n, d = x.shape
    patterns, which = np.unique(~np.isnan(x), axis=0, return_inverse=True)
    seen, filled = patterns.T, np.nan_to_num(x - w.start["centre"])
    member = np.eye(len(patterns))[which.ravel()]
    count, total = member.sum(0), filled.T @ member
    square = np.einsum("ni,nj,np->ijp", filled, filled, member, optimize=True)

    def step(data, p):
        count, total, square = data
        centre, both = p["centre"] - w.start["centre"], seen[:, None] & seen[None]
        swept = jnp.broadcast_to(p["scatter"][:, :, None], (d, d, len(patterns)))
        for j in range(d):
            pivot = 1.0 / swept[j, j]
            row = swept[j] * pivot
            new = swept - swept[:, j][:, None] * row[None]
            new = new.at[j].set(row).at[:, j].set(row).at[j, j].set(-pivot)
            swept = jnp.where(seen[j], new, swept)
        gain = jnp.where(both, jnp.eye(d)[:, :, None], jnp.where(seen[None] & ~seen[:, None], swept, 0.0))
        left = jnp.where(~seen[:, None] & ~seen[None], swept, 0.0)
        own = centre[:, None] * seen
        off = total - count * own
        about = square - total[:, None] * own[None] - own[:, None] * total[None] + count * own[:, None] * own[None]
        shift = jnp.einsum("ijp,jp->i", gain, off) / n
        second = jnp.einsum("ijp,jkp,lkp->il", gain, about, gain, optimize=True) + (count * left).sum(2)
        scatter = second / n - jnp.outer(shift, shift)
        return {**p, "centre": p["centre"] + shift, "scatter": scatter}

    return _looped(w, step, *map(jnp.asarray, (count, total, square)))


def _small_inverse(matrix):
    """Gauss-Jordan written out, which stays inside one kernel; and the determinant."""
    import jax.numpy as jnp

    det = jnp.ones(())
    for j in range(len(matrix)):
        det = det * matrix[j, j]
        pivot = 1.0 / matrix[j, j]
        row = matrix[j] * pivot
        new = matrix - matrix[:, j][:, None] * row[None]
        matrix = new.at[j].set(row).at[:, j].set(-matrix[:, j] * pivot).at[j, j].set(pivot)
    return matrix, det


def _lapack_inverse(matrix):
    import jax.numpy as jnp

    return jnp.linalg.inv(matrix), jnp.linalg.det(matrix)


def _read(p, x):
    """What observations tell of the state: `C' R^-1 C`, and `C' R^-1 x` of all steps at once."""
    import jax.numpy as jnp

    weighed = jnp.linalg.inv(p["noise"]) @ p["read"]
    return weighed.T @ p["read"], x @ weighed


def _value(p, x, means, log_det, removed):
    import jax.numpy as jnp

    off = x - means @ p["read"].T
    squares = (off @ jnp.linalg.inv(p["noise"]) * off).sum() - removed
    return -0.5 * (squares + log_det + len(x) * (jnp.linalg.slogdet(p["noise"])[1] + x.shape[1] * _LOG_2PI))


def state_updates(np_like, x, mean, first, last, total, across):
    """The M-step from smoothed means, and sums of smoothed covariances and of those with the step before.

    `np_like` is NumPy, or JAX's.
    """
    every = mean.T @ mean + total
    before = every - np_like.outer(mean[-1], mean[-1]) - last
    after = every - np_like.outer(mean[0], mean[0]) - first
    pairs = mean[1:].T @ mean[:-1] + across
    move = np_like.linalg.solve(before, pairs.T).T
    jolt = (after - move @ pairs.T) / (len(x) - 1)
    seen = x.T @ mean
    read = np_like.linalg.solve(every, seen.T).T
    noise = (x.T @ x - read @ seen.T) / len(x)
    return {
        "first_mean": mean[0], "first_cov": first, "move": move, "jolt": (jolt + jolt.T) / 2, "read": read,
        "noise": (noise + noise.T) / 2,
    }  # fmt: skip


def states_in_turn(w: Workload, inverse: Callable) -> Callable[[], Outcome]:
    """A filter in information form and a smoother, every step its own covariances."""
    import jax.numpy as jnp
    from jax import lax

    eye = jnp.eye(len(w.start["move"]))

    def step(data, p):
        (x,), move = data, p["move"]
        known, told = _read(p, x)

        def forward(carry, h):
            mean, cov = carry
            inv, det = inverse(eye + cov @ known)
            own = inv @ cov
            new = mean + own @ (h - known @ mean)
            return (move @ new, move @ own @ move.T + p["jolt"]), (mean, cov, new, own, det)

        _, (ahead, cov_ahead, mean, cov, det) = lax.scan(forward, (p["first_mean"], p["first_cov"]), told)

        def backward(carry, at):
            later, cov_later = carry
            ahead, cov_ahead, mean, cov = at
            gain = cov @ move.T @ inverse(cov_ahead)[0]
            new, cov_new = mean + gain @ (later - ahead), cov + gain @ (cov_later - cov_ahead) @ gain.T
            return (new, cov_new), (new, cov_new, cov_later @ gain.T)

        past = (ahead[1:], cov_ahead[1:], mean[:-1], cov[:-1])
        _, (smooth, covs, across) = lax.scan(backward, (mean[-1], cov[-1]), past, reverse=True)
        smooth = jnp.concatenate([smooth, mean[-1:]])
        off = told - ahead @ known
        removed = jnp.einsum("ti,tij,tj->", off, cov, off)
        value = _value(p, x, ahead, jnp.log(det).sum(), removed)
        new = state_updates(jnp, x, smooth, covs[0], cov[-1], covs.sum(0) + cov[-1], across.sum(0))
        return {**new, "value": value}

    return _looped(w, step, jnp.asarray(w.data["x"]))


def states_settled(w: Workload) -> Callable[[], Outcome]:
    """Covariances for the first and the last steps alone; between them they have settled, and gains are constant."""
    import jax.numpy as jnp
    from jax import lax

    eye, head = jnp.eye(len(w.start["move"])), _SETTLED

    def means(first, move, inputs):
        return lax.scan(lambda m, h: ((new := move @ m + h), new), first, inputs)[1]

    def varying(first, moves, inputs, **options):
        return lax.scan(lambda m, at: ((new := at[0] @ m + at[1]), new), first, (moves, inputs), **options)[1]

    def step(data, p):
        (x,), move = data, p["move"]
        known, told = _read(p, x)

        def ahead(cov, _):
            inv, det = _small_inverse(eye + cov @ known)
            own = inv @ cov
            new = move @ own @ move.T + p["jolt"]
            return new, (own, own @ move.T @ _small_inverse(new)[0], new, det)

        _, (cov, gain, cov_ahead, det) = lax.scan(ahead, p["first_cov"], None, length=head)
        keep, own, back, next_cov = eye - cov @ known, cov[-1], gain[-1], cov_ahead[-1]
        pushed = jnp.einsum("tij,tj->ti", cov, told[:head])
        begin = keep[0] @ p["first_mean"] + pushed[0]
        early = jnp.concatenate([begin[None], varying(begin, keep[1:] @ move, pushed[1:])])
        mean = jnp.concatenate([early, means(early[-1], keep[-1] @ move, told[head:] @ own.T)])
        late = mean[head:-1] @ (eye - back @ move).T
        late = lax.scan(lambda m, h: ((new := back @ m + h), new), mean[-1], late, reverse=True)[1]
        inputs = jnp.einsum("tij,tj->ti", eye - gain @ move, mean[:head])
        smooth = jnp.concatenate([varying(late[0], gain, inputs, reverse=True), late, mean[-1:]])

        def tail(later, _):
            new = own + back @ (later - next_cov) @ back.T
            return new, (new, later @ back.T)

        settled, (cov_tail, across_tail) = lax.scan(tail, own, None, length=head)

        def start(later, at):
            own, back, next_cov = at
            new = own + back @ (later - next_cov) @ back.T
            return new, (new, later @ back.T)

        first, (cov_head, across_head) = lax.scan(start, settled, (cov, gain, cov_ahead), reverse=True)
        between = len(x) - 1 - 2 * head
        total = own + cov_tail.sum(0) + between * settled + cov_head.sum(0)
        across = across_tail.sum(0) + between * settled @ back.T + across_head.sum(0)
        predicted = jnp.concatenate([p["first_mean"][None], mean[:-1] @ move.T])
        off = told - predicted @ known
        removed = jnp.einsum("ti,tij,tj->", off[:head], cov, off[:head]) + ((off[head:] @ own) * off[head:]).sum()
        log_det = jnp.log(det).sum() + (len(x) - head) * jnp.log(det[-1])
        value = _value(p, x, predicted, log_det, removed)
        return {**state_updates(jnp, x, smooth, first, own, total, across), "value": value}

    return _looped(w, step, jnp.asarray(w.data["x"]))


def tomography_best(w: Workload) -> Callable[[], Outcome]:
    """Both products as gathers, of the rows and of the columns, over every device."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P

    from .contenders_continuous import sparse_rows

    def padded(matrix):
        matrix = matrix.tocsr()
        sizes = np.diff(matrix.indptr)
        index, weight = (np.zeros((sizes.max(), len(sizes)), t) for t in (np.int32, float))
        row = np.repeat(np.arange(len(sizes)), sizes)
        at = np.arange(matrix.nnz) - matrix.indptr[row]
        index[at, row], weight[at, row] = matrix.indices, matrix.data
        return index, weight

    system = sparse_rows(w.data)
    seen = np.asarray(system.sum(0)).ravel()
    arrays = (*padded(system), *padded(system.T), w.data["y"])
    own = len(w.start["activity"]) // jax.device_count()

    def fit(x, index, weight, index_back, weight_back, y, seen):
        def step(_, x):
            ratio = lax.all_gather(y / (weight * x[index]).sum(0), "rows", tiled=True)
            mine = lax.dynamic_slice_in_dim(x / seen, lax.axis_index("rows") * own, own)
            return lax.all_gather(mine * (weight_back * ratio[index_back]).sum(0), "rows", tiled=True)

        return lax.fori_loop(0, w.num_steps, step, x)

    mesh, table = Mesh(np.array(jax.devices()), ("rows",)), P(None, "rows")
    specs = (P(), table, table, table, table, P("rows"), P())
    shared = jax.jit(jax.shard_map(fit, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))
    inputs = [jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in zip(arrays, specs[1:], strict=False)]
    start, seen = jnp.asarray(w.start["activity"]), jnp.asarray(seen)
    return lambda: Outcome({"activity": np.asarray(shared(start, *inputs, seen))})


def tomography_plain(w: Workload) -> Callable[[], Outcome]:
    """A sparse matrix of JAX, and its transpose."""
    import jax.numpy as jnp
    from jax.experimental import sparse

    from .contenders_continuous import sparse_rows

    system = sparse_rows(w.data)
    seen, y = jnp.asarray(np.asarray(system.sum(0)).ravel()), jnp.asarray(w.data["y"])
    forward = sparse.BCOO.from_scipy_sparse(system)

    def step(data, p):
        forward, backward = data
        x = p["activity"]
        return {**p, "activity": x / seen * (backward @ (y / (forward @ x)))}

    return _looped(w, step, forward, forward.T)


_IMPORTS = ("jax.numpy", "jax.scipy")
CONTENDERS = (
    Contender("jax-best", "factors", factors_best, _IMPORTS, 1, "best"),
    Contender("jax-plain", "factors", factors_plain, _IMPORTS, 1, "plain"),
    Contender("jax-best", "holes", holes_best, _IMPORTS, 1, "best"),
    Contender("jax-settled", "states", states_settled, _IMPORTS, 1, "best"),
    Contender("jax-in-turn", "states", lambda w: states_in_turn(w, _small_inverse), _IMPORTS, 1, "in turn"),
    Contender("jax-plain", "states", lambda w: states_in_turn(w, _lapack_inverse), _IMPORTS, 1, "plain"),
    Contender("jax-best", "tomography", tomography_best, _IMPORTS, CORES, "best"),
    Contender("jax-plain", "tomography", tomography_plain, _IMPORTS, 1, "plain"),
)

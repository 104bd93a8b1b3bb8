"""What is odd about the end of a fit: collapsed scales, empty components, parameters on their boundary, and the cause.

In: a build, parameters and data. Out: sentences that name the site, the component and the mend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.answers.posterior import Posterior
from autoem.answers.stderr import on_boundary
from autoem.e_step.tables.tabulate import Rows
from autoem.fitting.loop import State
from autoem.m_step.choose import kind_of
from autoem.m_step.closed_form.power import Scale
from autoem.m_step.problem import Bundle
from autoem.planning.build import Build
from autoem.reading.trace import Source


def impossible(built: Build, source: Source, params: dict[str, Array]) -> str:
    """The status of a fit whose start gives the data no probability."""
    rows = np.atleast_1d(
        np.asarray(Posterior(built, params, built.plain_bundle(source, jax.random.key(0))).log_likelihood)
    )
    where = f" (row {int(np.argmin(rows))})" if rows.size > 1 else ""
    return f"stopped at the start: the data have probability zero there{where}; correct them or start elsewhere"


PRIOR = "give it a prior (a sample site in place of numpyro.param)"


def oddities(built: Build, params: Mapping[str, Array], bundle: Bundle, bounded: bool = True) -> tuple[str, ...]:
    """Collapsed scales and empty components, by site and component; of an unfinished step, what has no bound too."""
    out = []
    mend = f"{PRIOR}, use fewer components, or other starts (restarts=)" if built.program.latents else PRIOR
    for name, value in params.items():
        param, v = built.program.params[name], np.asarray(value)
        kind, tiny = kind_of(param.constraint), np.finfo(v.dtype).eps
        collapsed: Any = np.zeros(v.shape, bool)
        lost: Any = ~np.isfinite(v) | ((np.abs(v) > 1e12) & (not bounded))
        if kind == "matrix" and np.isfinite(v).all():
            symmetric = np.allclose(v, np.swapaxes(v, -1, -2), atol=0)
            spread = np.linalg.eigvalsh(v) if symmetric else np.linalg.svd(v, compute_uv=False)[..., ::-1]
            # a step that broke the fit may leave rounding errors of the other components where a matrix was
            largest = spread[..., -1] if bounded else np.sqrt(tiny) / (50 * tiny) * spread.max()
            collapsed = np.asarray(spread[..., 0] <= 50 * tiny * np.maximum(largest, np.finfo(v.dtype).tiny))
        elif (block := scale_block(built, name)) is not None:
            collapsed = sunk(block, v, bundle) | (not bounded and kind == "positive" and v < np.sqrt(tiny) * v.max())
        if kind == "matrix" and not bounded and lost.any():
            collapsed = lost.any((-2, -1))
        if collapsed.any():
            what = "collapsed to a singular matrix" if kind == "matrix" else "collapsed to zero"
            out.append(f"'{name}' {what}{component(built, name, collapsed)}, onto too few distinct data: {mend}")
        elif lost.any():
            out.append(f"'{name}' has no finite value{component(built, name, lost)}: {mend}")
        if kind == "simplex" and name in mixing_weights(built) and v.ndim == 1 and (v < 1e-10).any():
            out.append(
                f"component {where(np.asarray(v < 1e-10))} of '{name}' is empty: use fewer states or other starts"
            )
    return tuple(out)


def above_zero(built: Build, likelihood: float) -> tuple[str, ...]:
    """Of discrete data, whose probabilities are at most one, a log-likelihood above zero: a density lost its digits."""
    kernel, records = built.kernel, built.found.records
    seen = [s for s in built.program.sites.values() if s.role in ("observed", "factor")]
    if not seen or not likelihood > 1e-6 * kernel.num_rows or kernel.treatment is not None or kernel.approximate:
        return ()
    found = [records.get(built.program.base_of(s.name)) for s in seen]
    if not all(r is not None and getattr(r.base.support, "is_discrete", False) for r in found):
        return ()
    if any(f.site.role == "parameter" for f in kernel.likelihood_factors):
        return ()
    names = ", ".join(dict.fromkeys(f"{s.distribution} '{s.name}'" for s in seen))
    return (
        "the log-likelihood is above zero, which no probability of discrete data is: the density of "
        f"{names} has lost its digits at these parameters, or is none; a prior would keep them in range",
    )


def boundaries(built: Build, params: Mapping[str, Array], odd: Sequence[str]) -> tuple[str, ...]:
    """Parameters with entries on the boundary of their domain, often rightly; those that are odd already excepted."""
    out = []
    for name in (n for b in built.kernel.blocks for n in b.names):
        v = np.asarray(params[name])
        edge = np.asarray(on_boundary(built.program.params[name], v))
        if edge.any() and not any(f"'{name}'" in w for w in odd):
            at = component(built, name, edge)
            out.append(f"'{name}' is on its boundary{at}: no standard errors there; a prior would keep it off")
    return tuple(out)


def cause(built: Build, state: State, bundle: Bundle) -> tuple[str, ...]:
    """What the step that ended the fit, made once more, did to the parameters or to the data's density."""
    try:
        statistics = jax.jit(built.kernel.expect)(state.params, bundle, state.e_step).statistics
        moved = jax.jit(built.kernel.maximise)(state.params, statistics, bundle, state.optimizer)[0]
    except (FloatingPointError, jax.errors.JaxRuntimeError):
        return ()
    return oddities(built, moved, bundle, bounded=False)


def component(built: Build, name: str, mask: np.ndarray) -> str:
    """Where a parameter is odd: the states of the latent that chooses among its entries, or the entries."""
    if mask.ndim == 0:
        return ""
    readers = [f for f in built.kernel.likelihood_factors if name in f.params]
    if mask.shape[0] not in {z.num_states for f in readers for z in f.latents}:
        return f" in entry {where(mask)}"
    states = np.asarray(mask.any(tuple(range(1, mask.ndim))))
    return f" in component {where(states)}" + (f" (entry {where(mask)})" if mask.ndim > 1 else "")


def where(mask: np.ndarray) -> str:
    """Indices of what is true, the first few."""
    found = np.argwhere(mask)
    more = ", ..." if len(found) > 5 else ""
    return ", ".join(str([int(j) for j in i]) if mask.ndim > 1 else str(int(i[0])) for i in found[:5]) + more


def scale_block(built: Build, name: str) -> Scale | None:
    """The block of a parameter that is a spread, or the logarithm of one."""
    block = next((b for b in built.kernel.blocks if name in b.names), None)
    return block if isinstance(block, Scale) and block.degree < 0 else None


def sunk(block: Scale, v: np.ndarray, bundle: Bundle) -> np.ndarray:
    """Which spreads are no larger than what rounding leaves of squared deviations of the data."""
    spread = np.exp(v * block.degree / -2) if block.real else np.maximum(v, 0) ** (block.degree / -2)
    if not v.size or spread.min() > 1e-3 * spread.max() > 0 < v.ndim:
        return np.zeros(v.shape, bool)
    largest = max((magnitude(bundle.rows[u.factor.name]) for u in block.uses), default=0.0)
    return np.asarray(spread < max(1e-12, 3 * np.sqrt(np.finfo(v.dtype).eps) * largest))


def magnitude(rows: Rows) -> float:
    """The largest deviation of a site's values from their centre; zero where its family does not standardise them."""
    if rows.value is None or not rows.value.array.size or not rows.ready or rows.spread is None:
        return 0.0
    return float(jnp.abs(rows.value.array).max()) * float(jnp.max(rows.spread))


def mixing_weights(built: Build) -> set[str]:
    """Parameters that are the prior of a latent without parents."""
    factors = built.kernel.likelihood_factors
    return {f.params[0] for f in factors if f.own and len(f.params) == 1 and len(f.latents) == 1}

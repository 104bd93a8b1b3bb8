"""`em.check`: is the derivation right on this model? Four tests, each against something independent.

Tables against the model's own density; likelihood and marginals against enumeration of every completion on a shrunken
copy; the gradient of `Q` after an M-step; the gradient of the log-likelihood at convergence.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._build import Build
from autoem._errors import ModelError
from autoem._posterior import Posterior
from autoem._stderr import free_entries, move
from autoem._trace import Source
from autoem._verify import by_model, host_params, noise_for, verify
from autoem.m_step._base import CLOSED_FORM
from autoem.m_step.problem import Bundle, graph_values

if TYPE_CHECKING:
    from autoem._em import EM

MAX_COMPLETIONS = 20_000


@dataclasses.dataclass(frozen=True)
class Check:
    """One test: what was compared, whether it holds, and the figure."""

    name: str
    ok: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Outcome of `em.check`; prints a line a test."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.checks)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join(f"[{'ok' if c.ok else 'FAILED'}] {c.name}: {c.detail}" for c in self.checks)


def eps() -> float:
    """Machine precision of the floats in use."""
    return float(jnp.finfo(jnp.result_type(float)).eps)


def run_checks(em: EM, built: Build, source: Source, key: Array, args: tuple, kwargs: dict) -> Report:
    """Run every test."""
    bundle = built.whole_bundle(source, key)
    start = built.start(source, key)
    params = host_params(built, start, noise_for(built, start))
    checks = [check_tables(built), check_brute_force(built, params, bundle), *check_m_step(built, params, bundle)]
    checks.append(check_stationary(em, built, key, args, kwargs))
    return Report(tuple(checks))


def check_tables(built: Build) -> Check:
    try:
        verify(built)
    except ModelError as error:
        return Check("tables equal the model's own density", False, str(error))
    return Check("tables equal the model's own density", True, "at a random completion and random parameters")


def check_brute_force(built: Build, params, bundle: Bundle) -> Check:
    """Sum over every completion, where there are few enough cells; the elimination must give the same."""
    name = "likelihood equals the sum over all completions"
    program = built.program
    cells = [(n, i) for n, z in program.latents.items() for i in np.ndindex(*z.shape)]
    digits = float(np.sum([np.log10(program.latents[n].num_states) for n, _ in cells])) if cells else 0.0
    if digits > np.log10(MAX_COMPLETIONS):
        return Check(name, True, f"not tried: 10^{digits:.1f} completions (give fewer rows to em.check)")
    if any(s is not None for s in bundle.scales.values()) or any(
        z.masked or z.bounded for z in program.latents.values()
    ):
        return Check(name, True, "not tried: weighted, masked or bounded latents have no plain sum")
    grids = np.stack(np.meshgrid(*[np.arange(program.latents[n].num_states) for n, _ in cells], indexing="ij"), -1)
    flat = jnp.asarray(grids.reshape(-1, len(cells)))

    def density(row):
        values = graph_values(bundle, params)
        for n, z in program.latents.items():
            at = jnp.asarray([j for j, (m, _) in enumerate(cells) if m == n])
            values["latent", n] = jnp.asarray(z.states)[row[at]].reshape(z.shape + z.states.shape[1:])
        return sum(site_density(built, f, values) for f in built.kernel.likelihood_factors)

    brute = float(jax.jit(lambda rows: jax.nn.logsumexp(jax.lax.map(density, rows)))(flat))
    ours = Posterior(built, params, bundle).total
    agree = abs(brute - ours) <= max(1e-10, 300 * eps()) * (1 + abs(brute))
    return Check(name, agree, f"{ours:.10g} against {brute:.10g} over {len(flat):,} completions")


def site_density(built: Build, factor, values) -> Array:
    return by_model(built, factor, values)[0]


def check_m_step(built: Build, params, bundle: Bundle) -> list[Check]:
    """After a block's closed form the gradient of `Q` in the block's free coordinates is zero."""
    kernel = built.kernel
    _, _, statistics = (
        jax.jit(kernel.expect)(params, dataclasses.replace(bundle))
        if not kernel.chunks
        else jax.jit(dataclasses.replace(kernel, chunks=None).expect)(params, bundle)
    )
    checks, current = [], dict(params)
    for block in kernel.blocks:
        solve = jax.jit(lambda p, s, b, block=block: block.solve(p, s, b, block.init(p))[0])
        current.update(solve(current, statistics, bundle))
        if block.strategy != CLOSED_FORM:
            continue
        touched = kernel.problem.touched(block.names)
        for n in block.names:
            param = built.program.params[n]

            def objective(shift, n=n, param=param, touched=touched):
                moved = {**current, n: move(param, current[n], shift)}
                return kernel.problem.q(moved, statistics, bundle, touched)

            free = free_entries(param, np.asarray(current[n]))
            slope = np.asarray(jax.jit(jax.grad(objective))(jnp.zeros(free.shape)))[free]
            size = abs(float(kernel.problem.q(current, statistics, bundle, touched))) + 1
            worst = float(np.abs(slope).max()) if slope.size else 0.0
            checks.append(
                Check(
                    f"gradient of Q is zero after the closed form of '{n}'",
                    worst <= max(1e-7, 1e3 * eps()) * size,
                    f"{worst:.2g}",
                )
            )
    return checks


def check_stationary(em: EM, built: Build, key: Array, args: tuple, kwargs: dict) -> Check:
    """At a converged fit the gradient of the objective vanishes, in the interior."""
    name = "gradient of the log-likelihood is zero at convergence"
    result = em.run(key, *args, **kwargs)
    if not result.converged:
        return Check(name, True, f"not tried: the fit did not converge ({result.status})")
    bundle = built.plain_bundle(result._context.source, key)
    kernel = dataclasses.replace(built.kernel, chunks=None)
    worst = 0.0
    for n in (m for b in kernel.blocks for m in b.names):
        param = built.program.params[n]
        free = free_entries(param, np.asarray(result.params[n]))

        def objective(shift, n=n, param=param):
            return kernel.objective({**result.params, n: move(param, result.params[n], shift)}, bundle)[0]

        zero, one = jnp.zeros(free.shape), jnp.ones(free.shape)
        slope, bend = jax.jit(lambda z, o, f=objective: jax.jvp(jax.grad(f), (z,), (o,)))(zero, one)
        # a slope in units of the curvature's root is a distance in standard errors
        slope, bend = np.asarray(slope)[free], np.abs(np.asarray(bend)[free])
        worst = max(worst, float((np.abs(slope) / np.sqrt(bend + 1)).max()) if slope.size else 0.0)
    return Check(name, worst <= 0.05, f"at most {worst:.2g} standard errors away after {result.num_steps} steps")

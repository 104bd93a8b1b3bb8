"""What is to be said of an end point because of how its latents were treated.

In: a build and the parameters at the end. Out: sentences, each naming a latent: states that annealing has merged,
mass of the prior or of the posterior that a truncated sum leaves out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.answers.posterior import Posterior
from autoem.e_step.strategies import Importance
from autoem.fitting.loop import State
from autoem.fitting.starts import state_spreads, tables_at
from autoem.graph.named import Named, multiply, named
from autoem.graph.programs import jit_once
from autoem.m_step.problem import Bundle
from autoem.planning.build import Build
from autoem.planning.options import ranges_of
from autoem.reading.trace import Source
from autoem.treatments.discrete import SparseTreatment
from autoem.treatments.importance import JointImportance

ALIKE = 1e-6  # relative difference of two states' densities below which nothing will tell them apart
ENOUGH, SHARE = 30.0, 0.1  # draws of equal weight that weighted ones have to be worth, and as a share of them
LEFT_OUT = 1e-6  # prior mass beyond a truncated sum that is worth a word


def remarks(built: Build, source: Source, state: State, truncated: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """What a user should know of the end point; `truncated` names the latents that are summed over a range only."""
    params, warmup, truncated = state.params, built.kernel.warmup, ranges_of(built.program, truncated)
    if warmup > int(state.step):
        return (f"the posterior was still flattened, for it sharpens until step {warmup}: give a larger max_steps",)
    sparse = isinstance(built.kernel.treatment, SparseTreatment)
    if not (warmup or truncated or sparse):
        return ()
    bundle = built.plain_bundle(source, jax.random.key(0))
    out = merged(built, params, bundle) if warmup else ()
    out = (*out, *not_best(built, state, bundle)) if sparse else out
    if truncated:
        out = (*out, *left_out(built, params, bundle, truncated), *cut_off(built, source, params, bundle, truncated))
    return out


def merged(built: Build, params, bundle) -> tuple[str, ...]:
    """Latents whose states have become one under a flat posterior, and have stayed so."""
    spreads = jit_once(lambda p, b: state_spreads(built, tables_at(built, p, b)))(dict(params), bundle)
    names = sorted(n for n, v in spreads.items() if float(v) < ALIKE)
    mend = (
        "anneal from nearer to one, as Annealed(start=0.8, steps=10), or with the spreads held, m_step={...: Fixed()}, "
        "and fit all from there by init=result.params"
    )
    return tuple(f"the states of '{n}' have merged, a saddle point that no step leaves: {mend}" for n in names)


def not_best(built: Build, state: State, bundle: Bundle) -> tuple[str, ...]:
    """What a sum over the best states leaves out of the log-likelihood, and of the posterior's mass."""
    kernel, latents = built.kernel, built.program.latents
    prior = jit_once(lambda p, b: kernel.log_prior(kernel.problem.cells(p, b), b))(dict(state.params), bundle)
    left = float(state.log_likelihood + prior - state.objective)
    if left <= LEFT_OUT:
        return ()
    most = max(latents.values(), key=lambda z: int(np.prod(z.shape, dtype=int)))
    share = 1 - np.exp(-left / np.prod(most.shape))
    cell = f"{share:.2g} of the posterior mass of a cell of '{most.name}' on average"
    return (f"the states that are not among the best hold {left:.3g} nats of the log-likelihood, {cell}",)


def left_out(built: Build, params, bundle, truncated: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Truncated latents of which some cell's prior holds more outside the range than may be overlooked."""
    masses = jit_once(lambda p, b: prior_masses(built, p, b, frozenset(truncated)))(dict(params), bundle)
    least = max(LEFT_OUT, 50 * float(jnp.finfo(jnp.result_type(float)).eps))
    worst: dict[str, float] = {}
    for piece, mass in masses.items():
        name = built.program.base_of(piece)
        worst[name] = max(worst.get(name, 0.0), 1 - float(mass))
    return tuple(
        f"up to {out:.1e} of the prior mass of a cell of '{n}' lies outside {range_of(truncated[n])}, "
        "and is left out: give Truncated a wider range"
        for n, out in worst.items()
        if out > least
    )


def cut_off(built: Build, source: Source, params, bundle, truncated: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    r"""Truncated latents of which some cell's posterior goes on beyond an end of the range.

    With :math:`p_u` the posterior's share of the last state and :math:`r = p_u / p_{u-1} < 1`, at most

    .. math:: \sum_{i > u} p_i \le p_u \, \frac{r}{1 - r}

    lies beyond it where the posterior is log-concave, relative to what lies within. Of an outlier among the data the
    prior's own tail tells nothing.
    """
    treatment = built.kernel.treatment
    if treatment is not None and not treatment.sums_exactly:
        return ()
    marginals, out = Posterior(built, params, bundle, source).marginals, []
    for name, (low, high) in truncated.items():
        share = np.asarray(marginals[name])
        supports = [s.support for s in built.program.sites.values() if built.program.base_of(s.name) == name]
        ends = [(high, share[..., -1], share[..., -2])] * (not supports[0].startswith("IntegerInterval"))
        ends += [(low, share[..., 0], share[..., 1])] * (low > 0)
        for end, last, before in ends:
            with np.errstate(divide="ignore", invalid="ignore"):
                beyond = np.where(last < before, last * last / (before - last), np.where(last > 0, 1.0, 0.0)).max()
            if (most := min(float(beyond), 1.0)) > LEFT_OUT:
                side = "above" if end == high else "below"
                out.append(
                    f"up to {most:.1e} of the posterior mass of a cell of '{name}' lies {side} {end}, and is left out: "
                    "give Truncated a wider range"
                )
    return tuple(out)


def range_of(limits) -> str:
    return f"{limits[0]} ... {limits[1]}"


def prior_masses(built: Build, params, bundle, names: frozenset[str]) -> dict[str, Array]:
    """By latent, or piece of a path: the least sum of its prior over the range, of all cells and parents' states."""
    problem, out = built.kernel.problem, {}
    cells = problem.cells(params, bundle)
    for f in built.kernel.likelihood_factors:
        if f.own and built.program.base_of(f.name) in names and f.name in cells:
            rows = dataclasses.replace(bundle.rows[f.name], scale=None)
            table: Named = f.table(cells[f.name], rows).value
            out[f.name] = jnp.min(jax.nn.logsumexp(table.array, axis=table.axes.index(f.name)))
    return {n: jnp.exp(jnp.minimum(v, 0.0)) for n, v in out.items()}


def weighted_draws(built: Build, state: State, bundle: Bundle) -> tuple[float, float | None]:
    """Of importance sampling, the standard error of the log-likelihood and the worth of its draws; else zero and None.

    Of latents beside, with the weights `w` of a cell's draws and the gradient `g` by the log of its integral, by the
    delta method the variance is the sum over cells of `g^2 (sum w^2 - 1 / S)`.
    """
    kernel = built.kernel
    if isinstance(kernel.treatment, JointImportance):
        return float(state.e_step.error), float(state.e_step.worth)
    sampled = [i for i, b in enumerate(kernel.integrals) if b.block.strategy == "importance"]
    if not sampled:
        return 0.0, None

    def errors(params, bundle: Bundle) -> tuple[Array, Array]:
        cells = kernel.problem.cells(params, bundle)
        integrals = [b.integrate(params, bundle) for b in kernel.integrals]

        def total(values: list[Named]) -> Array:
            known = [dataclasses.replace(t, value=v) for (t, _), v in zip(integrals, values, strict=True)]
            return kernel._whole(cells, known, bundle)

        slopes = jax.grad(total)([t.value for t, _ in integrals])
        variance, least = jnp.zeros(()), jnp.asarray(jnp.inf)
        for i in sampled:
            block, found = kernel.integrals[i].block, integrals[i][1]
            square = (found.weights**2).sum(found.lead)
            scatter = named(
                jnp.maximum(square - 1 / found.weights.shape[found.lead], 0), (*block.states, *block.plates)
            )
            slope = slopes[i] if (scale := block.scale(bundle.rows)) is None else multiply(slopes[i], scale)
            variance = variance + multiply(multiply(slope, slope), scatter).array.sum()
            least = jnp.minimum(least, (1 / square).min())
        return jnp.sqrt(variance), least

    error, least = jit_once(errors)(dict(state.params), bundle)
    return float(error), float(least)


def few_draws(built: Build, worth: float) -> tuple[str, ...]:
    """What is to be said of weighted draws that are worth few, in number or as a share of them."""
    wishes = [z.wish for z in built.program.continuous.values() if isinstance(z.wish, Importance)]
    count = min(w.num_samples for w in wishes)
    if worth >= max(ENOUGH, SHARE * count):
        return ()
    return (
        f"the {count:,} draws of importance sampling are worth {worth:.0f} of equal weight, too few to rely on: the "
        "posterior is far from a t law about its mode; give Importance a larger num_samples, or e_step=MonteCarlo()",
    )

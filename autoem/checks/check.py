"""`em.check`: is the derivation right on this model? Five tests, each against something independent.

Tables against the model's own density; the likelihood against enumeration of every completion, on few enough rows; the
gradient of `Q` after an M-step; the gradient of the log-likelihood at convergence; data that NumPyro draws from the
fitted model, refitted. Of many rows a few thousand are taken.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.flatten_util import ravel_pytree
from numpyro import handlers

from autoem._errors import DataError, ModelError, PlanError
from autoem.answers.mean_field import FieldPosterior
from autoem.answers.posterior import Posterior
from autoem.answers.result import EMResult
from autoem.answers.stderr import free_entries, move
from autoem.checks.verify import by_model, host_params, model_fields, noise_for, verify
from autoem.e_step.cells.local import LocalBlock
from autoem.e_step.tables.completions import NODES
from autoem.e_step.tables.factors import tied_to_states
from autoem.graph.programs import jit_once
from autoem.lowering.kernel import with_nodes
from autoem.m_step.block import CLOSED_FORM
from autoem.m_step.problem import Bundle, graph_values
from autoem.mean_field.field import Field
from autoem.planning.build import Build
from autoem.reading.reader import AtObserved, holds_nan, unwrap
from autoem.reading.trace import Source

if TYPE_CHECKING:
    from autoem._em import EM

MAX_COMPLETIONS = 20_000
MAX_ROWS = 2_000
MAX_COORDINATES = 400
TAIL = 14.0  # a statistic beyond the bound comes by chance once in exp(14), about a million


@dataclasses.dataclass(frozen=True)
class Check:
    """One test: what was compared, whether it holds, and the figure; `tried` is False where it does not apply."""

    name: str
    ok: bool
    detail: str
    tried: bool = True

    def __str__(self) -> str:
        mark = "--" if not self.tried else "ok" if self.ok else "FAILED"
        return f"[{mark}] {self.name}: {self.detail}"


def not_tried(name: str, why: str) -> Check:
    return Check(name, True, f"not tried: {why}", tried=False)


@dataclasses.dataclass(frozen=True)
class Report:
    """Outcome of `em.check`; prints a line a test: `[ok]`, `[FAILED]`, or `[--]` where a test could not be tried.

    Attributes:
        checks: the tests, each with `name`, `ok`, `detail` (the figure) and `tried`.
        rows: what part of the data was used, where it was not all of it.
        ok: whether no test failed; one that was not tried has not failed.
        tried: how many tests were tried.
    """

    checks: tuple[Check, ...]
    rows: str = ""

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.checks)

    @property
    def tried(self) -> int:
        return sum(c.tried for c in self.checks)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.checks), *([f"({self.rows})"] if self.rows else [])])


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A derivation and the arguments it was made for."""

    built: Build
    source: Source
    args: tuple
    kwargs: dict[str, Any]


def eps() -> float:
    """Machine precision of the floats in use."""
    return float(jnp.finfo(jnp.result_type(float)).eps)


def run_checks(em: EM, built: Build, source: Source, key: Array, args: tuple, kwargs: dict) -> Report:
    """Run every test."""
    whole = Call(built, source, args, kwargs)
    call = on_fewer_rows(em, whole, MAX_ROWS) or whole
    built, source = call.built, call.source
    bundle = built.whole_bundle(source, key)
    params = random_params(built, source, key)
    checks = [check_tables(built), check_brute_force(em, call, key), *check_m_step(built, params, bundle)]
    result = em.run(key, *call.args, **call.kwargs)
    checks += [check_stationary(built, result, key), check_refit(em, call, result, key)]
    return Report(tuple(checks), "" if call is whole else f"on {MAX_ROWS:,} of {largest_plate(whole.built):,} rows")


def random_params(built: Build, source: Source, key: Array) -> dict[str, np.ndarray]:
    start = built.start(source, key)
    return host_params(built, start, noise_for(built, start))


def largest_plate(built: Build) -> int:
    return max((p.size for p in built.program.plates.values()), default=0)


def on_fewer_rows(em: EM, call: Call, rows: int) -> Call | None:
    """The same on `rows` rows of the largest plate, spread over the data; None where that cannot be."""
    size = largest_plate(call.built)
    if size <= rows or call.source.concrete:
        return None
    chosen = np.linspace(0, size - 1, rows).astype(int)
    data = []
    for x in call.source.data:
        axes = [i for i, s in enumerate(np.shape(x)) if s == size]
        data.append(np.take(np.asarray(x), chosen, axes[0]) if axes else x)
    args, kwargs = call.source.call(data)
    try:
        built, source = em._derive(args, kwargs)
    except (ModelError, PlanError, DataError):
        return None
    same = set(built.program.sites) == set(call.built.program.sites) and largest_plate(built) < size
    return Call(built, source, args, kwargs) if same else None


def check_tables(built: Build) -> Check:
    try:
        verify(built)
    except ModelError as error:
        return Check("tables equal the model's own density", False, str(error))
    return Check("tables equal the model's own density", True, "at a random completion and random parameters")


def cells_of(built: Build) -> list[tuple[str, tuple[int, ...]]]:
    return [(n, i) for n, z in built.program.latents.items() for i in np.ndindex(*z.shape)]


def digits_of(built: Build) -> float:
    """Decimal digits of the number of completions; a cell of one state counts as one of two, being a dimension too."""
    latents = built.program.latents.values()
    return float(sum(np.log10(max(z.num_states, 2)) * np.prod(z.shape) for z in latents))


def check_brute_force(em: EM, call: Call, key: Array) -> Check:
    """Sum over every completion of few enough cells; the elimination must give the same."""
    name = "likelihood equals the sum over all completions"
    latents = call.built.program.latents
    if call.built.program.continuous:
        return check_integral(em, call, key)
    if any(f.gaps for f in call.built.factors):
        return not_tried(name, "entries of vectors are missing")
    if not latents:
        return not_tried(name, "no latents")
    most, digits, size = float(np.log10(MAX_COMPLETIONS)), digits_of(call.built), largest_plate(call.built)
    if digits > most and (fewer := on_fewer_rows(em, call, max(1, int(size * most / digits)))):
        call = fewer
    if (digits := digits_of(call.built)) > most:
        return not_tried(name, f"10^{digits:.1f} completions (give fewer rows to em.check)")
    built, bundle = call.built, call.built.whole_bundle(call.source, key)
    if any(s is not None for s in bundle.scales.values()) or any(z.masked or z.bounded for z in latents.values()):
        return not_tried(name, "weighted, masked or bounded latents have no plain sum")
    ours, brute, count = summed(built, random_params(built, call.source, key), bundle)
    slack = max(1e-10, 300 * eps()) * (1 + abs(brute))
    agree, rows = abs(brute - ours) <= slack, largest_plate(built)
    if isinstance(built.kernel.treatment, Field):
        name, agree = "the ELBO is below the sum over all completions", ours <= brute + slack
    return Check(name, agree, f"{ours:.10g} against {brute:.10g} over {count:,} completions of {rows} rows")


def check_integral(em: EM, call: Call, key: Array) -> Check:
    """Integrate the model's own log density as one Gaussian over all cells of all continuous latents."""
    name = "likelihood equals the integral over all latents at once"
    if call.built.kernel.treatment is not None:
        return not_tried(name, f"the objective is the {call.built.kernel.objective_name}")
    if call.built.program.latents:
        return not_tried(name, "discrete latents are beside the continuous ones")
    if any(isinstance(i.block, LocalBlock) for i in call.built.kernel.integrals):
        return not_tried(name, "the posterior is not Gaussian")
    size, rows = coordinates(call.built), largest_plate(call.built)
    if size > MAX_COORDINATES and (fewer := on_fewer_rows(em, call, max(2, rows * MAX_COORDINATES // size))):
        call = fewer
    if (size := coordinates(call.built)) > MAX_COORDINATES:
        return not_tried(name, f"{size:,} coordinates (give fewer rows to em.check)")
    built, bundle = call.built, call.built.whole_bundle(call.source, key)
    if any(s.scaled or s.masked for s in built.program.sites.values()):
        return not_tried(name, "weighted or masked sites have no plain integral")
    params: Any = random_params(built, call.source, key)
    flat, unravel = ravel_pytree({n: jnp.zeros(z.shape + z.event) for n, z in built.program.continuous.items()})

    def density(v: Array) -> Array:
        values = graph_values(bundle, params) | {("latent", n): u for n, u in unravel(v).items()}
        fields, factors = model_fields(built, values), built.kernel.problem.factors.values()
        return sum((by_model(f, fields)[0] for f in factors), jnp.zeros(()))

    @jax.jit
    def integral() -> Array:
        precision, slope = -jax.hessian(density)(flat), jax.grad(density)(flat)
        fit = 0.5 * slope @ jnp.linalg.solve(precision, slope)
        return density(flat) + fit - 0.5 * jnp.linalg.slogdet(precision / (2 * jnp.pi))[1]

    ours, dense = Posterior(built, params, bundle).total, float(integral())
    priors = float(built.kernel.log_prior(built.kernel.problem.cells(dict(params), bundle), bundle))
    agree = abs(dense - priors - ours) <= max(1e-8, 1e4 * eps()) * (1 + abs(dense))
    return Check(name, agree, f"{ours:.10g} against {dense - priors:.10g} over {size} coordinates")


def coordinates(built: Build) -> int:
    """How many numbers the continuous latents hold in all."""
    return sum(int(np.prod(z.shape + z.event, dtype=int)) for z in built.program.continuous.values())


def summed(built: Build, params, bundle: Bundle) -> tuple[float, float, int]:
    """The log-likelihood by elimination and by enumeration, and the number of completions."""
    program, cells = built.program, cells_of(built)
    grids = np.stack(np.meshgrid(*[np.arange(program.latents[n].num_states) for n, _ in cells], indexing="ij"), -1)
    flat = jnp.asarray(grids.reshape(-1, len(cells)))

    def density(row):
        values = graph_values(bundle, params)
        for n, z in program.latents.items():
            at = jnp.asarray([j for j, (m, _) in enumerate(cells) if m == n])
            values["latent", n] = jnp.asarray(z.states)[row[at]].reshape(z.shape + z.states.shape[1:])
        return sum(site_density(built, f, values) for f in built.kernel.likelihood_factors)

    brute = float(jit_once(lambda rows: jax.nn.logsumexp(jax.lax.map(density, rows)))(flat))
    posterior = FieldPosterior if isinstance(built.kernel.treatment, Field) else Posterior
    return posterior(built, params, bundle).total, brute, len(flat)


def site_density(built: Build, factor, values) -> Array:
    return by_model(factor, model_fields(built, values, [factor.name]))[0]


def check_m_step(built: Build, params, bundle: Bundle) -> list[Check]:
    """After a block's closed form the gradient of `Q` in the block's free coordinates is zero."""
    kernel = built.kernel
    state = built.e_state(params, bundle, jax.random.key(0), 0)
    statistics = jit_once(dataclasses.replace(kernel, chunks=None).expect)(params, bundle, state).statistics
    checks, current = [], dict(params)
    bundle = with_nodes(bundle, statistics.get(NODES, {}))
    for block in kernel.blocks:
        solve = jit_once(lambda p, s, b, block=block: block.solve(p, s, b, block.init(p))[0])
        current.update(solve(current, statistics, bundle))
        if block.strategy != CLOSED_FORM or not block.maximises:
            continue
        touched = kernel.problem.touched(block.names)
        for n in block.names:
            param = built.program.params[n]

            def objective(shift, n=n, param=param, touched=touched):
                moved = {**current, n: move(param, current[n], shift)}
                return kernel.problem.q(moved, statistics, bundle, touched)

            free = free_entries(param, np.asarray(current[n]))
            value, slopes = jit_once(jax.value_and_grad(objective))(jnp.zeros(free.shape))
            slope, size = np.asarray(slopes)[free], abs(float(value)) + 1
            worst = float(np.abs(slope).max()) if slope.size else 0.0
            checks.append(
                Check(
                    f"gradient of Q is zero after the closed form of '{n}'",
                    worst <= max(1e-7, 1e3 * eps()) * size,
                    f"{worst:.2g}",
                )
            )
    return checks


def check_stationary(built: Build, result: EMResult, key: Array) -> Check:
    """At a converged fit the gradient of the objective vanishes, in the interior."""
    name = "gradient of the log-likelihood is zero at convergence"
    if (treatment := built.kernel.treatment) is not None and not treatment.is_likelihood:
        return not_tried(name, f"the fit is one of the {built.kernel.objective_name}, to no maximum of the likelihood")
    if not result.converged:
        return not_tried(name, f"the fit did not converge ({result.status.partition(':')[0]})")
    bundle = built.plain_bundle(result._context.source, key)
    kernel = dataclasses.replace(built.kernel, chunks=None)
    worst = 0.0
    for n in (m for b in kernel.blocks for m in b.names):
        param = built.program.params[n]
        free = free_entries(param, np.asarray(result.params[n]))

        def objective(shift, n=n, param=param):
            return kernel.objective({**result.params, n: move(param, result.params[n], shift)}, bundle)[0]

        zero, one = jnp.zeros(free.shape), jnp.ones(free.shape)
        slope, bend = jit_once(lambda z, o, f=objective: jax.jvp(jax.grad(f), (z,), (o,)))(zero, one)
        # a slope in units of the curvature's root is a distance in standard errors
        slope, bend = np.asarray(slope)[free], np.abs(np.asarray(bend)[free])
        if np.isnan(slope).any():
            return not_tried(name, f"the objective has no slope in '{n}'")
        bend = np.where(np.isfinite(bend), bend, 0)  # a rate of zero has none
        worst = max(worst, float((np.abs(slope) / np.sqrt(bend + 1)).max()) if slope.size else 0.0)
    # in single precision the objective does not tell points apart that are this many standard errors from each other
    blind = np.sqrt(2 * 4 * eps() * (abs(result.objective) + kernel.num_rows))
    return Check(
        name,
        worst <= max(0.05, 5 * float(blind)),
        f"at most {worst:.2g} standard errors away after {result.num_steps} steps",
    )


def check_refit(em: EM, call: Call, result: EMResult, key: Array) -> Check:
    """Data drawn from the fitted model, fitted from its parameters: the objective rises, by no more than chance allows.

    Twice the rise of the log-likelihood is about chi-square with as many degrees of freedom as there are parameters.
    """
    name = "data simulated from the fit lead back to it"
    if why := no_simulation(call.built, result):
        return not_tried(name, why)
    try:
        once = jax.random.fold_in(key, 1)
        drawn = jit_once(lambda p, k: simulate(em.model, p, k, call))(dict(result.params), once)
        again = copy.copy(em)
        again.model, again.init, again.restarts, again.progress = observing(em.model), dict(result.params), 1, False
        again._builds, again._loops, again._batches = {}, {}, {}
        refit = again.run(key, drawn, *call.args, **call.kwargs)
    except (ModelError, PlanError, DataError, NotImplementedError, TypeError) as error:
        return not_tried(name, f"NumPyro cannot draw data of this kind ({type(error).__name__}: {error})")
    if "collapsed" in refit.status:
        return not_tried(name, f"the fit of the simulated data broke down ({refit.status.partition(':')[0]})")
    free = result.num_params
    bound = free + 2 * np.sqrt(free * TAIL) + 2 * TAIL
    rise = 2 * (refit.objective - float(refit.history[0]))
    least = -1e3 * eps() * (1 + abs(refit.objective))
    detail = f"twice the log-likelihood rises by {rise:.4g}, at most {bound:.3g} by chance for {free} free parameters"
    return Check(name, bool(least <= rise <= bound), detail)


def no_simulation(built: Build, result: EMResult) -> str:
    """Why the fitted model cannot be simulated, or what would come of it not be judged; empty where it can."""
    sites = built.program.sites.values()
    if (treatment := built.kernel.treatment) is not None and not treatment.is_likelihood:
        return f"the fit is one of the {built.kernel.objective_name}, to no maximum of the likelihood"
    if any(s.role == "factor" for s in sites):
        return "a numpyro.factor has no distribution to draw from"
    if any(s.scaled for s in sites):
        return "weighted rows are no sample"
    if why := tied_to_states(built.factors):
        return why[1]
    if not result.converged or "collapsed" in result.status:
        return f"the fit did not converge ({result.status.partition(':')[0]})"
    if 5 * result.num_params > result.num_data:
        return f"{result.num_data} rows are few for {result.num_params} free parameters"
    return ""


def simulate(model: Callable, params: dict[str, Array], key: Array, call: Call) -> dict[str, Array]:
    """A draw of every observed site by NumPyro, NaN where the data are."""
    observed = {s.name for s in call.built.program.sites.values() if s.role == "observed"}

    def draw(msg: dict) -> None:
        """In a scan too, so that what a step carries on of its own site is what was drawn."""
        if isinstance(unwrap(msg["fn"])[0], dist.Unit):
            return
        given, drawn = msg["value"], msg["fn"].sample(numpyro.prng_key())
        msg["value"] = jnp.where(jnp.isnan(given), jnp.nan, drawn) if holds_nan(given) else drawn

    with handlers.trace() as trace, handlers.seed(rng_seed=key), handlers.substitute(data=params), AtObserved(draw):
        model(*call.args, **call.kwargs)
    return {name: jnp.asarray(trace[name]["value"]) for name in observed}


def observing(model: Callable) -> Callable:
    """The model with other data: a dict of them by site comes first among its arguments."""

    def again(data, *args, **kwargs):
        with handlers.condition(data=data):
            return model(*args, **kwargs)

    again.__name__ = getattr(model, "__name__", "model")
    return again

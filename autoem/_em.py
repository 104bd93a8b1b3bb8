"""`EM`: the front door. Options at construction; a key and the model's own arguments at `run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import DataError, ModelError, PlanError
from autoem.accelerate import AbstractAcceleration
from autoem.answers.result import EMResult, Restarts, make_result
from autoem.checks.check import Report, run_checks
from autoem.checks.improper import refuse_improper
from autoem.checks.replay import refuse_misread
from autoem.checks.validate import validate
from autoem.checks.verify import LARGE, shrunken, verify
from autoem.e_step.strategies import AbstractEStep
from autoem.fitting.loop import Loop, State, compile_loop, ended, initial_state, run_loop
from autoem.fitting.progress import Progress
from autoem.fitting.starts import given_start, starts
from autoem.fitting.stop import DIVERGED, FELL, INTERRUPTED, LIMIT, RUNNING, SETTLED, Stop
from autoem.graph.programs import jit_once
from autoem.lowering.condense import condensed
from autoem.lowering.kernel import Kernel, disagree
from autoem.m_step.problem import Bundle
from autoem.m_step.strategies import AbstractMStep
from autoem.planning.build import Build
from autoem.planning.derive import derive
from autoem.planning.options import Options
from autoem.planning.plan import Plan
from autoem.reading.trace import Source

ONE_THREAD_UP_TO = 4 << 20  # bytes of the rows: below, one kernel after the other is faster than several at once
APART_FROM = 50_000  # entries of the rows: beyond, a last step without an M-step is worth a program of its own
BESIDE_UP_TO = 1_000_000  # entries of the data: beyond, preparing them once more costs more than is gained
GAIN = 0.02  # nats by which going on with a noisy fit has to raise its estimated objective to be gone on with again
VMAP_UP_TO = 4_000_000  # entries of the rows times restarts: beyond, restarts run one after the other


class EM:
    """Expectation maximisation, derived from a NumPyro model.

    Maximises :math:`\\log p(x \\mid \\theta) + \\log p(\\theta)` over the parameters :math:`\\theta`, the latents
    summed out or integrated exactly where that is possible; where it is not, or another E-step was asked for, what
    stands in its place, which the plan and `EMResult.objective_name` tell.

    Args:
        model: a NumPyro model, called as `model(*args, **kwargs)`.
        e_step: None (choose and say why), a strategy from `autoem.e_step`, or a dict of them by latent.
        m_step: None (choose and say why), a strategy from `autoem.m_step`, or a dict of them by parameter.
        latent: names of continuous sites to integrate rather than maximise.
        maximize: names of continuous sites to maximise whatever their place in the model.
        restarts: number of starts, at least 1; the best end point is the result, and every one is kept in it. A start
            that broke down (a likelihood without bound) is the result only where all did.
        init: where to start. "auto": the model's own values, unless they treat the states of a latent alike (a saddle
            point of EM), then responsibilities seeded from the data. "model": the model's own values. "random": seeded
            from the data. A dict: values by parameter name (the others as in "auto"), or, by latent name,
            responsibilities of shape `(*plates, states)`, from which the first M-step starts.
        max_steps: M-steps at most.
        tol: relative change of the objective below which a step counts as flat.
        patience: flat steps in a row that end the fit.
        accelerate: None (plain EM), `autoem.accelerate.Squarem()` or `autoem.accelerate.Anderson()`. A step is one EM
            map, an E-step and an M-step, so that `num_steps` compares with plain EM; one that was spent on a point
            that is then refused counts too.
        missing: "error", or "marginalize" to drop NaN entries of observed sites exactly.
        progress: show a bar for fits that take longer than about two seconds.

    Raises:
        ValueError: an option is out of its range.

    References:
        Dempster, Laird and Rubin 1977, "Maximum likelihood from incomplete data via the EM algorithm".
    """

    def __init__(
        self,
        model: Callable,
        *,
        e_step: AbstractEStep | Mapping[str, AbstractEStep] | None = None,
        m_step: AbstractMStep | Mapping[str, AbstractMStep] | None = None,
        latent: Sequence[str] = (),
        maximize: Sequence[str] = (),
        restarts: int = 1,
        init: str | Mapping[str, Any] = "auto",
        max_steps: int = 1000,
        tol: float = 1e-9,
        patience: int = 2,
        accelerate: AbstractAcceleration | None = None,
        missing: str = "error",
        progress: bool = True,
    ):
        if not callable(model):
            raise TypeError(f"EM(model={model!r}): model must be a NumPyro model, a function")
        if missing not in ("error", "marginalize"):
            raise ValueError(f"EM(missing={missing!r}): missing must be 'error' or 'marginalize'")
        if isinstance(init, str) and init not in ("auto", "model", "random"):
            raise ValueError(f"EM(init={init!r}): init must be 'auto', 'model', 'random' or a dict")
        for option, number in (("restarts", restarts), ("max_steps", max_steps), ("patience", patience)):
            if not isinstance(number, int | np.integer):
                raise TypeError(f"EM({option}={number!r}): {option} must be a whole number")
        if restarts < 1:
            raise ValueError(f"EM(restarts={restarts}): restarts must be at least 1")
        names = [latent] if isinstance(latent, str) else latent, [maximize] if isinstance(maximize, str) else maximize
        self.model, self.init, self.restarts, self.progress = model, init, restarts, progress
        if accelerate is not None and not isinstance(accelerate, AbstractAcceleration):
            raise TypeError(f"EM(accelerate={accelerate!r}): use autoem.accelerate.Squarem() or Anderson()")
        self.options = Options(e_step, m_step, tuple(names[0]), tuple(names[1]), missing, accelerate)
        self.stop = Stop(tol, patience, max_steps)
        self._builds: dict[tuple, Build] = {}
        self._loops: dict[tuple, Loop] = {}
        self._batches: dict[tuple, Callable] = {}

    def __repr__(self) -> str:
        return f"EM({getattr(self.model, '__name__', self.model)})"

    def plan(self, *args, **kwargs) -> Plan:
        """What will be done with the model on these arguments, and why; nothing is fitted.

        Raises:
            ModelError: the model cannot be read or derived.
            PlanError: what is asked cannot be done.
            DataError: bad data.
        """
        built = self._derive(args, kwargs)[0]
        given_start(built, self.init)
        return built.plan

    def run(self, rng_key: Array, *args, **kwargs) -> EMResult:
        """Fit the model to data.

        Args:
            rng_key: `jax.random.key(seed)`; decides random starts.
            args, kwargs: the model's own arguments.

        Returns:
            The best of all starts, with a status that says how it ended.

        Raises:
            ModelError, PlanError, DataError: as `plan`. Numerical failure is no error: see `EMResult.status`.
        """
        rng_key = as_key(rng_key)
        built, source = self._derive(args, kwargs, rng_key)
        bundle = built.bundle(source, rng_key)
        begin, notes = starts(built, source, bundle, self.init, self.restarts, rng_key)
        state = self._fit(built, bundle, begin, rng_key)
        return make_result(self, built, source, bundle, state, notes, args, kwargs)

    def check(self, rng_key: Array, *args, **kwargs) -> Report:
        """Test the derivation on this model and data: tables, marginals and gradients.

        Raises:
            ModelError, PlanError, DataError: as `plan`.
        """
        rng_key = as_key(rng_key)
        built, source = self._derive(args, kwargs)
        return run_checks(self, built, source, rng_key, args, kwargs)

    def _derive(self, args: tuple, kwargs: dict, fitted_with: Array | None = None) -> tuple[Build, Source]:
        """The derivation for arguments of this structure, made once; the loop is begun where it is to be fitted."""
        drop_nan = self.options.missing == "marginalize"
        source = Source(self.model, args, kwargs, self.options.truncated(), drop_nan)
        for concrete in (False, *({True} & {b.source.concrete for b in self._builds.values()})):
            source.concrete = concrete
            built = self._builds.get(source.signature())
            if built is not None and built.fits(source):
                validate(built, source, self.options.missing)
                return built, source
        built = derive(self.model, args, kwargs, self.options, jax.random.key(0))
        validate(built, built.source, self.options.missing)
        if fitted_with is not None:
            self._begin(built, fitted_with)
        small = self._small(built) or built
        built.alike = verify(small)
        if built.program.chains:
            refuse_misread(small, small.source)
        refuse_improper(built)
        self._builds[built.source.signature()] = built
        return built, built.source

    def _small(self, built: Build) -> Build | None:
        """The same derivation on a few rows, where there are too many to verify at full shape.

        None where that fails.
        """
        largest = max((p.size for p in built.program.plates.values()), default=0)
        if largest < LARGE or built.source.concrete or (arguments := shrunken(built.source, largest)) is None:
            return None
        try:
            small = derive(self.model, *arguments, self.options, jax.random.key(0))
        except (ModelError, PlanError, DataError):
            return None
        return small if set(small.program.sites) == set(built.program.sites) else None

    def _loop(self, built: Build, kernel: Kernel, bundle: Bundle, count: int) -> tuple[Loop, bool, tuple]:
        """The compiled loop for `count` starts, whether they run together in it, and its key in `_loops`."""
        leaves = jax.tree.leaves(bundle.rows)
        together = count > 1 and sum(x.size for x in leaves) * count <= VMAP_UP_TO
        loop = (id(built), together, kernel is built.kernel)
        if loop not in self._loops:
            several = kernel.chunks is not None and kernel.chunks.devices > 1
            small = not several and sum(x.nbytes for x in leaves) * (count if together else 1) <= ONE_THREAD_UP_TO
            apart = kernel.treatment is None and sum(x.size for x in leaves) > APART_FROM
            self._loops[loop] = compile_loop(kernel, self.stop, together, small, apart, built.accelerator)
        return self._loops[loop], together, loop

    def _begin(self, built: Build, key: Array) -> None:
        """Have the loop compiled beside what comes before it: the verification and the search for a start."""
        if built.kernel.treatment is not None or sum(np.size(x) for x in built.source.data) > BESIDE_UP_TO:
            return
        kernel, bundle = condensed(built.kernel, built.bundle(built.source, key))
        loop, together, _ = self._loop(built, kernel, bundle, self.restarts)
        state = initial_state(kernel, built.start(built.source, key), self.stop, None, built.accelerator)
        loop.advance.prepare(stacked([state] * self.restarts) if together else state, bundle, first_steps(bundle))

    def _fit(self, built: Build, bundle: Bundle, begin: list[dict[str, Array]], key: Array) -> tuple[State, Restarts]:
        """Run every start to its end; the best state, and all end points."""
        plain = bundle
        kernel, bundle = condensed(built.kernel, bundle)
        loop, together, known = self._loop(built, kernel, bundle, len(begin))
        first = first_steps(bundle)
        states = [
            initial_state(kernel, p, self.stop, built.e_state(p, bundle, key, i), built.accelerator)
            for i, p in enumerate(begin)
        ]
        with Progress(self.progress, self.stop.max_steps, len(begin)) as bar:
            if together:
                last = run_loop(loop, stacked(states), bundle, self.stop, first, bar.report)
                states = [jax.tree.map(lambda x, i=i: x[i], last) for i in range(len(begin))]
            else:
                states = list(one_by_one(loop, states, bundle, self.stop, first, bar.report))
        states = [ended(built.kernel, s, bundle) for s in states]
        if kernel.noisy and len(states) > 1:  # the path of each has an error of its own, which grows with its steps
            states = [estimated(built, s, plain) for s in states]
        best = max(range(len(states)), key=lambda i: merit(states[i]))
        if kernel.noisy and not kernel.treatment.sums_exactly:  # type: ignore[union-attr]
            states[best] = pursued(built, states[best], plain, self._again(loop, bundle, len(begin) * together))
        if underflowed(built, begin[best], states[best], bundle):
            built.kernel = built.kernel.in_logs
            self._loops.pop(known)
            return self._fit(built, bundle, begin, key)
        return states[best], Restarts.of(states, best)

    def _again(self, loop: Loop, bundle: Bundle, together: int) -> Callable[[State], State]:
        """What goes on with one fit, by the program that ran it: for so many at once, or for one."""

        def again(state: State) -> State:
            with Progress(self.progress, self.stop.max_steps, 1) as bar:
                if not together:
                    return run_loop(loop, state, bundle, self.stop, int(state.step) + 1, bar.report)
                last = run_loop(loop, stacked([state] * together), bundle, self.stop, int(state.step) + 1, bar.report)
            return jax.tree.map(lambda x: x[0], last)

        return again


def pursued(built: Build, state: State, bundle: Bundle, again: Callable[[State], State]) -> State:
    """The end of a noisy fit gone on with from where it settled, as long as that raises the estimated objective.

    What ends a stretch is a path with random error, which hides a drift that is slower. Two ends are compared by the
    same random numbers: the difference of their estimates is known far better than either. The better one is kept.

    References:
        Caffo, Jank and Jones 2005, "Ascent-based Monte Carlo expectation-maximization": go on while there is a gain.
    """
    if int(state.status) != SETTLED:
        return state
    best = state
    try:
        best = at_rest(built, state, bundle)
        if best is state:  # two ends cannot be compared
            return state
        while int(state.status) == SETTLED:
            old, count = state, int(state.step) + 1
            unseen = old.history.at[:count].set(jnp.nan)  # windows that hold them tell of no rest
            running, zero = jnp.full_like(old.status, RUNNING), jnp.zeros_like(old.flat)
            new = again(old._replace(history=unseen, flat=zero, status=running))
            state = new._replace(history=new.history.at[:count].set(old.history[:count]))
            if int(state.status) not in (SETTLED, LIMIT):
                break
            found = at_rest(built, state, bundle)
            gain = float(found.objective - best.objective)
            best = found if gain > 0 else best
            if not gain > GAIN:
                break
    except KeyboardInterrupt:  # what had settled is an end point
        pass
    return best._replace(status=jnp.full_like(best.status, SETTLED)) if best.step < state.step else best


def first_steps(bundle: Bundle) -> int:
    """Steps before a fit first looks how far it has come."""
    return int(np.clip(2e7 / max(sum(x.size for x in jax.tree.leaves(bundle.rows)), 1), 1, 200))


def stacked(states: list[State]) -> State:
    return jax.tree.map(lambda *x: jnp.stack(x), *states)


def at_rest(built: Build, state: State, bundle: Bundle) -> State:
    """The last point of a noisy fit or the mean of its last ones, whichever is estimated to be the better.

    References:
        Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging".
    """
    kernel = built.kernel
    last = estimated(built, state, bundle)
    mean = kernel.treatment.averaged(kernel, state.e_step)  # type: ignore[union-attr]
    if mean is None or last is state:
        return last
    prior = kernel.prior_run(dict(mean), bundle)
    likelihood, _ = built.final(mean, bundle, state.e_step)
    if not likelihood + prior > float(last.objective):
        return last
    return last._replace(params=dict(mean), objective=likelihood + prior, log_likelihood=jnp.asarray(likelihood))


def estimated(built: Build, state: State, bundle: Bundle) -> State:
    """The end of a noisy fit with the objective estimated there, by draws of its own; as it is where none can tell."""
    if not np.isfinite(float(state.log_likelihood)):
        return state
    likelihood, _ = built.final(state.params, bundle, state.e_step)
    if np.isnan(likelihood):
        return state
    return state._replace(
        objective=state.objective - state.log_likelihood + likelihood, log_likelihood=jnp.asarray(likelihood)
    )


def merit(state: State) -> tuple[bool, float]:
    """What a start's end point is worth: a likelihood that grew without bound until it broke is worth least."""
    value = float(state.objective)
    return int(state.status) not in (FELL, DIVERGED), -np.inf if np.isnan(value) else value


def underflowed(built: Build, begin: Mapping[str, Array], state: State, bundle: Bundle) -> bool:
    """Whether messages of a chain lost, as scaled probabilities, what a later step needed.

    Asked where the fit began and where it ended: messages in logarithms give another likelihood there. Where the
    transitions alone tell that nothing was lost, no likelihood is computed.
    """
    if built.kernel.treatment is not None:  # its messages are logarithms throughout
        return False
    if built.kernel.layout.logs or not any(c.lag for c in built.kernel.layout.chains):
        return False
    if built.robust is None:
        built.robust = jit_once(lambda p, b: built.kernel.robust(p, b))
    if all(bool(built.robust(params, bundle)) for params in (begin, state.params)):
        return False
    if built.proof is None:
        built.proof = jit_once(lambda p, b: built.kernel.proof.objective(p, b)[0])
    ends = ((begin, state.history[0]), (state.params, state.objective))
    return any(disagree(float(scaled), float(built.proof(params, bundle))) for params, scaled in ends)


def one_by_one(loop: Loop, states: list[State], bundle: Bundle, stop: Stop, first: int, report: Callable):
    """Run each start to its end; an interrupt ends the fit, not the start alone."""
    for state in states:
        last = run_loop(loop, state, bundle, stop, first, report)
        yield last
        if int(last.status) == INTERRUPTED:
            return


def as_key(key: Any) -> Array:
    """A JAX random key, or a clear refusal."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and not key.shape:
        return key
    if isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.shape == (2,):
        return jax.random.wrap_key_data(key)
    found = f"an array of shape {key.shape}" if isinstance(key, jax.Array) else type(key).__name__
    raise DataError(
        "rng_key", problem=f"the first argument must be one JAX random key, not {found}",
        mend="em.run(jax.random.key(0), *args)", kind="argument",
    )  # fmt: skip

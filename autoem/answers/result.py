"""What a fit returns: the parameters, how it ended, and everything that may be asked of the fitted model."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array
from numpyro.infer import Predictive

from autoem._errors import DataError, PlanError
from autoem.answers.drawn import DrawnPosterior
from autoem.answers.ending import few_draws, remarks, weighted_draws
from autoem.answers.mean_field import FieldPosterior
from autoem.answers.oddities import above_zero, boundaries, cause, impossible, oddities
from autoem.answers.posterior import Posterior
from autoem.answers.stderr import StandardErrors, standard_errors
from autoem.fitting.loop import State
from autoem.fitting.stop import CONVERGED, DIVERGED, FELL, ROUNDED, SENTENCES, SETTLED
from autoem.m_step.choose import kind_of
from autoem.m_step.problem import Bundle
from autoem.mean_field.field import Field
from autoem.planning.build import Build
from autoem.planning.plan import Plan
from autoem.reading.trace import Source
from autoem.treatments import AbstractDrawn

if TYPE_CHECKING:
    from autoem._em import EM

SHOWN, MANY_PARAMS = 12, 20  # starts, and parameters, that are printed


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Restarts:
    """End point of every start.

    Attributes:
        objective: `(restarts,)`, in nats.
        num_steps: `(restarts,)`.
        status: a sentence each.
        params: parameters of each.
        best: number of the one that the result holds.
    """

    objective: np.ndarray
    num_steps: np.ndarray
    status: tuple[str, ...]
    params: tuple[dict[str, Array], ...]
    best: int

    @staticmethod
    def of(states: Sequence[State], best: int) -> Restarts:
        return Restarts(
            np.array([float(s.objective) for s in states]),
            np.array([int(s.step) for s in states]),
            tuple(SENTENCES[int(s.status)] for s in states),
            tuple(s.params for s in states),
            best,
        )

    def __len__(self) -> int:
        return len(self.status)

    def __repr__(self) -> str:
        """A line a start, the best marked; of many, the best ones."""
        ranked = sorted(
            range(len(self)), key=lambda i: (i != self.best, -np.nan_to_num(self.objective[i], nan=-np.inf))
        )
        lines = [f"Restarts: {len(self)}, the best is start {self.best}", "   start       objective  steps  status"]
        for i in sorted(ranked[:SHOWN]):
            mark = "*" if i == self.best else " "
            steps = self.num_steps[i]
            lines += [f" {mark} {i:>5}  {self.objective[i]:>14.6f}  {steps:>5}  {self.status[i].partition(':')[0]}"]
        rest = len(self) - SHOWN
        return "\n".join([*lines, f"   ... {rest} more"] if rest > 0 else lines)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=[
    "log_likelihood", "objective", "history", "num_steps", "converged", "status", "restarts", "warnings", "plan",
    "standard_error", "effective_sample_size", "_context",
])  # fmt: skip
@dataclasses.dataclass(frozen=True, eq=False)
class EMResult:
    """A fitted model.

    Attributes:
        params: value of every parameter, by site name, on its constrained scale; maximised sample sites included.
        log_likelihood: log density of the observed data at `params`, latents summed out, in nats; or a bound of it.
        objective: what was maximised, see `objective_name`, plus the log density of the parameters' priors.
        standard_error: of `log_likelihood`, where it is estimated from random draws; otherwise zero.
        effective_sample_size: of importance sampling, the draws of equal weight that its draws are worth, in the cell
            where they are worth least; otherwise None.
        history: objective at the start and after every step, `(num_steps + 1,)`.
        num_steps: M-steps that led to `params`.
        converged: whether the objective stopped moving; hitting `max_steps` is not converging.
        status: one sentence on how the fit ended, and what is odd about its end point.
        restarts: the end point of every start.
        warnings: oddities of the end point, each naming site and component.
        plan: the plan that was carried out.
    """

    params: dict[str, Array]
    log_likelihood: float
    objective: float
    history: np.ndarray
    num_steps: int
    converged: bool
    status: str
    restarts: Restarts
    warnings: tuple[str, ...]
    plan: Plan
    standard_error: float
    effective_sample_size: float | None
    _context: Context

    def __str__(self) -> str:
        steps = f"{self.num_steps} step" + ("" if self.num_steps == 1 else "s")
        both = self.objective_name != "log-likelihood" and getattr(self.plan.treatment, "sums_exactly", False)
        error = f" (standard error {self.standard_error:.2g})" if self.standard_error else ""
        value = (
            f"{self.objective:.6f}, log-likelihood {self.log_likelihood:.6f}" if both else f"{self.log_likelihood:.6f}"
        )
        lines = [f"EM: {self.status}", f"{self.objective_name} {value}{error} after {steps}"]
        with np.printoptions(precision=5, suppress=True, threshold=24):
            entries = []
            for name, value in self.params.items():
                text = str(np.asarray(value)).replace("\n", "\n" + " " * (len(name) + 3))
                entries.append(f"  {name} {text}".split("\n"))
        more = len(entries) - MANY_PARAMS
        lines += [line for entry in entries[:MANY_PARAMS] for line in entry]
        lines += [f"  ... {more} more parameters"] if more > 0 else []
        lines += [f"  note: {w}" for w in self.warnings if w not in self.status]
        return "\n".join(lines)

    def __repr__(self) -> str:
        shapes = [f"{n} {list(np.shape(v))}" for n, v in self.params.items()]
        more = [f"... {len(shapes) - MANY_PARAMS} more"] if len(shapes) > MANY_PARAMS else []
        return (
            f"EMResult(log_likelihood={self.log_likelihood:.6f}, num_steps={self.num_steps}, "
            f"params: {', '.join([*shapes[:MANY_PARAMS], *more]) or 'none'}, status={self.status!r})"
        )

    def posterior(self, *args, **kwargs) -> Posterior:
        """Posterior of the latents on the data given, or on the data of the fit where none are given.

        Raises:
            ModelError, PlanError, DataError: as `EM.plan`.
        """
        context = self._context
        if same := not args and not kwargs:
            args, kwargs = context.args, context.kwargs
        built, source = context.em._derive(args, kwargs)
        for name, param in built.program.params.items():
            if param.shape != np.shape(self.params[name]):
                raise DataError(
                    name,
                    problem=f"these data give it shape {param.shape}, the fit had {np.shape(self.params[name])}",
                    mend="pass data with the columns, and the model the options, of the fit",
                )
        if isinstance(built.kernel.treatment, AbstractDrawn):
            # of a guide of the user's the parameters hold for any data
            state = context.e_step if same or built.kernel.treatment.needs_data else None
            bundle = built.bundle(source, jax.random.key(0))
            return DrawnPosterior(built, self.params, bundle, source, state)
        if isinstance(built.kernel.treatment, Field):
            bundle = built.plain_bundle(source, jax.random.key(0))
            same = same or alike(source.data, context.source.data)
            return FieldPosterior(built, self.params, bundle, source, context.e_step if same else None)
        return Posterior(built, self.params, built.plain_bundle(source, jax.random.key(0)), source)

    def score(self, *args, **kwargs) -> Array:
        """Log density of each datum under the fitted model, in nats; of new data, or of the data of the fit."""
        return self.posterior(*args, **kwargs).log_likelihood

    def predictive(self, rng_key: Array, *args, num_samples: int = 1, **kwargs) -> dict[str, Array]:
        """Draws from the model at the fitted parameters, by `numpyro.infer.Predictive`.

        Give the model arguments with `None` for the data where it accepts that; otherwise observed sites keep their
        data.
        """
        return Predictive(self._context.em.model, params=self.params, num_samples=num_samples)(rng_key, *args, **kwargs)

    def standard_errors(self) -> StandardErrors:
        """Standard error of every parameter, from the observed information; NaN on the boundary."""
        context = self._context
        if isinstance(context.built.kernel.treatment, Field):
            raise refused_errors(next(iter(self.params), "model"))
        kernel = dataclasses.replace(context.built.kernel, chunks=one_device(context.built.kernel.chunks))
        drawn = isinstance(kernel.treatment, AbstractDrawn)
        bundle = (context.built.bundle if drawn else context.built.plain_bundle)(context.source, jax.random.key(0))
        errors = standard_errors(kernel, self.params, bundle, context.e_step)
        if errors.singular:
            message = (
                "the observed information is singular: some parameters are not identified; all standard errors are NaN"
            )
            warnings.warn(message, stacklevel=2)
        return errors

    @property
    def objective_name(self) -> str:
        """What `objective` is, but for priors: the log-likelihood, or what an approximate E-step has in its place."""
        return self._context.built.kernel.objective_name

    @property
    def num_params(self) -> int:
        """Free parameters: a point of a simplex of k entries counts k - 1, a symmetric matrix its lower triangle."""
        return count_params(self._context.built)

    @property
    def num_data(self) -> int:
        """Rows of the data's plate: the number of independent data; of one series, its steps."""
        program = self._context.built.program
        plate = self.posterior().datum_plate
        if plate is not None:
            return program.plates[plate].size
        sites = [s for s in program.sites.values() if s.role in ("observed", "factor")]
        rows = max((int(np.prod(s.shape, dtype=int)) for s in sites), default=1)
        # first steps that the model states outside its scan, and those of it that look further back than the series
        alone = sum(s.shape == () for s in sites) if program.chains else 0
        return rows + -(-alone // max(1, len(sites) - alone))

    @property
    def num_values(self) -> int:
        """Rows of the largest observed site, independent or not; those that a mask takes out are counted."""
        observed = (s for s in self._context.built.program.sites.values() if s.role == "observed")
        return max((int(np.prod(s.shape, dtype=int)) for s in observed), default=1)

    @property
    def aic(self) -> float:
        """Akaike's criterion, `2 p - 2 log L`; smaller is better (Akaike 1974)."""
        return 2 * self.num_params - 2 * self.log_likelihood

    @property
    def bic(self) -> float:
        """Schwarz's criterion, `p log n - 2 log L`; smaller is better (Schwarz 1978).

        `n` is `num_data`: with random effects the groups. lme4 and statsmodels count rows: theirs has `num_values`.
        """
        return self.num_params * float(np.log(self.num_data)) - 2 * self.log_likelihood

    @property
    def icl(self) -> float:
        """Integrated completed likelihood: BIC plus twice the entropy of the latents.

        References:
            Biernacki, Celeux and Govaert 2000.
        """
        entropy = 0.0
        posterior = self.posterior()
        for name in self._context.built.program.latents:
            p = np.asarray(posterior.marginals[name])
            entropy -= float(np.sum(p * np.log(np.where(p > 0, p, 1))))
        return self.bic + 2 * entropy


def refused_errors(name: str) -> PlanError:
    """What a fit by mean field says when it is asked for standard errors."""
    return PlanError(
        name,
        problem="the curvature of a bound is not the observed information: standard errors from it would be too small",
        mend="refit on resampled data (the bootstrap)",
    )


def alike(data: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two calls hold the same numbers."""
    return len(data) == len(others) and all(map(np.array_equal, data, others))


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What a result needs to answer questions later."""

    em: EM
    built: Build
    source: Source
    args: tuple
    kwargs: dict[str, Any]
    e_step: Any = None


def one_device(chunks):
    return None if chunks is None else dataclasses.replace(chunks, devices=1)


def count_params(built: Build) -> int:
    total = 0
    for name in (n for b in built.kernel.blocks for n in b.names):
        param = built.program.params[name]
        size = int(np.prod(param.shape, dtype=int))
        kind = kind_of(param.constraint)
        if kind == "simplex":
            size -= size // param.shape[-1]
        elif kind == "matrix":
            d = param.shape[-1]
            size = size // (d * d) * (d * (d + 1) // 2)
        total += size
    return total


def make_result(
    em: EM, built: Build, source: Source, bundle: Bundle, ended, notes: tuple[str, ...], args, kwargs
) -> EMResult:
    """The result of the best start."""
    state, restarts = ended
    odd: tuple[str, ...] = ()
    if np.isfinite(float(state.objective)):
        odd = oddities(built, state.params, bundle) + remarks(built, source, state, em.options.truncated())
    if int(state.status) in (DIVERGED, FELL):
        odd = tuple(dict.fromkeys((*odd, *cause(built, state, bundle))))
    sentence = SENTENCES[int(state.status)]
    likelihood = float(state.log_likelihood)
    if likelihood < -1e15:  # the finite stand-in for log 0
        likelihood, sentence = float("-inf"), impossible(built, source, state.params)
    history = np.asarray(state.history)[: int(state.step) + 1]
    error, worth = weighted_draws(built, state, bundle)
    odd = odd if worth is None else (*odd, *few_draws(built, worth))
    odd = (*odd, *above_zero(built, likelihood))
    status = "; ".join([sentence, *odd])
    objective = float(state.objective) if np.isfinite(likelihood) else likelihood
    if built.kernel.estimated and np.isfinite(likelihood):
        better, error = built.final(state.params, bundle, state.e_step)
        objective, likelihood = objective - likelihood + better, better
        if why := built.kernel.treatment.not_estimated:  # type: ignore[union-attr]
            status += f"; its log-likelihood is not estimated: {why}"
    return EMResult(
        dict(state.params),
        likelihood,
        objective,
        history,
        int(state.step),
        int(state.status) in (CONVERGED, ROUNDED, SETTLED),
        status,
        restarts,
        (*notes, *odd, *boundaries(built, state.params, odd)),
        built.plan,
        error,
        worth,
        Context(em, built, source, args, kwargs, state.e_step),
    )

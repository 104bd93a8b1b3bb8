r"""Discrete latents otherwise than by their exact sum: at their best or few best, at a draw, or tempered.

In: a kernel, parameters, data. Out: an `Expectation`. Each is the exact E-step with another reduction in place of the
sum over a latent (`e_step.reductions`), of which the statistics are the derivative as ever: so whatever the exact
E-step can do (plates, chains, groups by index, weights, continuous latents within) these can do too.

A cell that a mask takes out counts as uniform and adds nothing to a sum; to a maximum or a tempered sum it would add a
constant, which is taken out again.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import PlanError
from autoem.accelerate import AbstractAcceleration
from autoem.e_step.elimination.reductions import Best, Drawn, Partly, Reduce, Tempered, largest, removing
from autoem.e_step.strategies import AbstractEStep, Annealed, Hard, Sparse, Stochastic
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.e_step.treatment import AbstractTreatment, Ending, Expectation
from autoem.graph.named import Named, multiply
from autoem.ir import Program
from autoem.lowering.kernel import Kernel
from autoem.m_step.problem import Bundle, Params

STRATEGIES = (Hard, Sparse, Stochastic, Annealed)


@dataclasses.dataclass(frozen=True)
class AbstractBest(AbstractTreatment):
    """The best states of the latents `names`, pieces of paths among them; of all discrete ones where it is empty."""

    names: frozenset[str] = frozenset()

    sums_exactly = True

    @property
    @abc.abstractmethod
    def reduce(self) -> Reduce:
        """What stands in place of the sum."""

    def init(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> None:
        return None

    def expect(self, kernel: Kernel, params: Params, bundle: Bundle, state: Any) -> Expectation:
        return reduced(kernel, params, bundle, self.reduce)

    def ended(
        self, kernel: Kernel, params: Params, bundle: Bundle, state: Any, value: Array, likelihood: Array
    ) -> Ending:
        return Ending(params, value, kernel.proof.log_likelihood(params, bundle))


@dataclasses.dataclass(frozen=True)
class HardTreatment(AbstractBest):
    """The best value alone."""

    objective_name = "classification log-likelihood"
    source = "Celeux and Govaert 1992 (classification EM); Juang and Rabiner 1990 (along a chain)"

    @property
    def reduce(self) -> Reduce:
        return Partly(self.names) if self.names else largest

    def described(self, latent: str) -> tuple[str, str] | None:
        if self.names and latent not in self.names:
            return "exact", "summed out within the maximum over the others"
        return "hard", "its best joint value alone is counted, and the classification log-likelihood rises"


@dataclasses.dataclass(frozen=True)
class SparseTreatment(AbstractBest):
    """The `top` best states."""

    top: int = 1

    objective_name = "log-likelihood of the best states"
    source = "Neal and Hinton 1998 (sparse EM); Lücke and Eggert 2010"

    @property
    def reduce(self) -> Reduce:
        return Best(self.top, self.names)

    def described(self, latent: str) -> tuple[str, str] | None:
        if self.names and latent not in self.names:
            return None
        best = "best state alone is" if self.top == 1 else f"{self.top} best states alone are"
        return "sparse", f"its {best} counted, given what it depends on, and a bound of the log-likelihood rises"


class Drawing(NamedTuple):
    """What a stochastic E-step remembers: its key, the number of draws, and the best point so far."""

    key: Array
    draws: Array
    objective: Array
    likelihood: Array
    params: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class StochasticTreatment(AbstractTreatment):
    """One exact draw of all discrete latents a step."""

    noisy = True
    sums_exactly = True
    source = "Celeux and Diebolt 1985 (stochastic EM); Chib 1996 (draws of a path)"

    def init(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> Drawing:
        low = jnp.asarray(-jnp.inf, jnp.result_type(float))
        return Drawing(key, jnp.zeros((), int), low, low, {n: jnp.asarray(v) for n, v in params.items()})

    def expect(self, kernel: Kernel, params: Params, bundle: Bundle, state: Drawing) -> Expectation:
        out = kernel.exactly(params, bundle, Drawn(jax.random.fold_in(state.key, state.draws)))
        value = out.likelihood + out.prior
        better = value > state.objective
        best = {n: jnp.where(better, v, state.params[n]) for n, v in params.items()}
        memory = Drawing(
            state.key,
            state.draws + 1,
            jnp.where(better, value, state.objective),
            jnp.where(better, out.likelihood, state.likelihood),
            best,
        )
        return out._replace(state=memory)

    def ended(
        self, kernel: Kernel, params: Params, bundle: Bundle, state: Drawing, value: Array, likelihood: Array
    ) -> Ending:
        return Ending(state.params, state.objective, state.likelihood)

    def final(self, kernel: Kernel, params: Params, bundle: Bundle, state: Any, key: Array) -> tuple[Array, Array]:
        return state.likelihood, jnp.zeros(())

    def described(self, latent: str) -> tuple[str, str] | None:
        return "stochastic", "one exact draw of it, jointly with the others, is counted at every step"


@dataclasses.dataclass(frozen=True)
class AnnealedTreatment(AbstractTreatment):
    """Tempered sums, until the inverse temperature is one."""

    start: float
    steps: int

    is_likelihood = True
    comparable = True
    sums_exactly = True
    source = "Ueda and Nakano 1998 (deterministic annealing)"

    @property
    def warmup(self) -> int:  # type: ignore[override]
        return self.steps

    def init(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> Array:
        return jnp.zeros((), int)

    def beta(self, count: Array) -> Array:
        """The inverse temperature of a step by its number: equal ratios from `start` to one."""
        return self.start ** (1 - jnp.minimum(count / self.steps, 1.0))

    def expect(self, kernel: Kernel, params: Params, bundle: Bundle, state: Array) -> Expectation:
        return reduced(kernel, params, bundle, Tempered(self.beta(state)))._replace(state=state + 1)

    def ended(
        self, kernel: Kernel, params: Params, bundle: Bundle, state: Any, value: Array, likelihood: Array
    ) -> Ending:
        objective, (exact, _) = kernel.proof.objective(params, bundle)
        return Ending(params, objective, exact)

    def described(self, latent: str) -> tuple[str, str] | None:
        return "annealed", f"tempered sums at first: inverse temperature {self.start:g} to 1 over {self.steps} steps"


def reduced(kernel: Kernel, params: Params, bundle: Bundle, reduce: Reduce) -> Expectation:
    """The E-step with `reduce` in place of the sum, without what masked cells add to it."""
    out = kernel.exactly(params, bundle, reduce)
    extra = [of_masked(f, r, bundle, reduce) for f, r in masked_cells(kernel, bundle)]
    return out._replace(likelihood=out.likelihood - sum(extra, start=jnp.zeros(())))


def masked_cells(kernel: Kernel, bundle: Bundle) -> list[tuple[Factor, Rows]]:
    """Discrete latents with cells that a mask takes out, and their rows; those set aside by chunks apart."""
    own = [f for f in kernel.likelihood_factors if f.own]
    out = [(f, bundle.rows[f.name]) for f in own]
    chunks = kernel.chunks
    if bundle.tail is not None and chunks is not None:
        apart = [(f, bundle.tail[f.name]) for f in own]
        out += [(f, r) for f, r in apart if r.mask is not None and chunks.plate in r.mask.axes]
    return [(f, r) for f, r in out if r.mask is not None]


def of_masked(factor: Factor, rows: Rows, bundle: Bundle, reduce: Reduce) -> Array:
    """What the masked cells of a latent add to the objective: each `reduce` of a uniform law."""
    latent, mask = factor.latents[0], rows.mask
    assert mask is not None
    uniform = jnp.full((latent.num_states,), -float(np.log(latent.num_states)))
    each = removing(reduce, (latent.name,), ())(uniform)
    out = Named(jnp.where(mask.array > 0, 0.0, 1.0), mask.axes)
    scale = bundle.scales.get(latent.name)
    out = out if scale is None else multiply(out, scale)
    repeats = [s for a, s in zip(factor.site.axes, factor.site.shape, strict=True) if a not in out.axes]
    return out.array.sum() * float(np.prod(repeats, dtype=float)) * each


def discrete_treatment(
    wish: AbstractEStep | Mapping[str, AbstractEStep] | None, program: Program, accelerate: AbstractAcceleration | None
) -> AbstractTreatment | None:
    """The treatment of the discrete latents that is asked for, by one strategy for all or by name.

    Raises:
        PlanError: there are no discrete latents, not the right ones are named, or `accelerate=` cannot go with it.
    """
    named = dict(wish) if isinstance(wish, Mapping) else dict.fromkeys(program.latents, wish)
    asked = {n: w for n, w in named.items() if isinstance(w, STRATEGIES)}
    if isinstance(wish, STRATEGIES) and not program.latents:
        raise PlanError(
            "e_step",
            kind="option",
            problem=f"{wish} is for discrete latents, and the model has none",
            mend="leave e_step= out",
        )
    if not asked:
        return None
    strategy = next(iter(asked.values()))
    refuse_mixtures(asked, program)
    if accelerate is not None and not isinstance(strategy, Sparse):
        why = "settles after a few steps" if isinstance(strategy, Hard) else "makes every step another map"
        raise PlanError(
            "accelerate",
            kind="option",
            problem=f"{strategy} {why}, which leaves nothing to extrapolate",
            mend="accelerate=None",
        )
    names = frozenset() if program.latents.keys() <= asked.keys() else with_pieces(program, asked)
    if isinstance(strategy, Hard):
        return HardTreatment(names)
    if isinstance(strategy, Sparse):
        return SparseTreatment(names, strategy.top)
    return (
        StochasticTreatment() if isinstance(strategy, Stochastic) else AnnealedTreatment(strategy.start, strategy.steps)
    )


def with_pieces(program: Program, names: Iterable[str]) -> frozenset[str]:
    """The latents, and what tables call their values at one step or another of a chain."""
    chains = [c for c in program.chains if c.lag]
    every = {*program.every_latent, *(n for c in chains for n in (*c.names, *c.start, *c.end))}
    return frozenset(z for z in every if {z, program.base_of(z)} & set(names))


def refuse_mixtures(asked: Mapping[str, AbstractEStep], program: Program) -> None:
    """Raise where the latents are asked to be treated in several ways that do not go together."""
    first, strategy = next(iter(asked.items()))
    other = next((n for n, w in asked.items() if w != strategy), None)
    mend = f"autoem.EM(model, e_step=autoem.e_step.{strategy})"
    if other is not None:
        raise PlanError(other, problem=f"{asked[other]} does not go with {strategy} of '{first}'", mend=mend)
    left = next((n for n in program.latents if n not in asked), None)
    if left is not None and not isinstance(strategy, Hard | Sparse):
        problem = f"{strategy} is for all discrete latents together, and '{left}' is not named"
        raise PlanError(first, problem=problem, mend=mend)

"""Run every strategy on the same data from the same starts, and measure the end points by one yardstick.

In: a model, strategies, a key and the model's arguments. Out: `Comparison`. What fails is a row that says so; an
interrupt ends the strategy at hand and leaves out those after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from autoem._em import EM, as_key
from autoem._errors import DataError, PlanError
from autoem.answers.result import EMResult
from autoem.baselines import AbstractBaseline, Fit
from autoem.baselines._base import INTERRUPTED
from autoem.baselines._target import objective_name
from autoem.comparison.comparison import Comparison
from autoem.comparison.match import distance, relabelled, shift, symmetries, variation
from autoem.comparison.row import Latents, Row, replaced
from autoem.comparison.strategies import base_of, resolved
from autoem.comparison.yardstick import Yardstick, find, latents_of
from autoem.graph.programs import forget

SOON = 0.1  # seconds below which a run is so short that its time is taken thrice
SAME = 1e-3  # nats up to which an objective at the end point is the yardstick's own
Result = EMResult | Fit


def compare(
    model: Callable | EM,
    strategies: Mapping[str, Any],
    rng_key: Array,
    *args,
    starts: int = 1,
    held_out: Any = None,
    reference: str | None = None,
    **kwargs,
) -> Comparison:
    r"""Fit one model by several strategies, on the same data from the same starts, and set them side by side.

    Each strategy runs twice: the first run less the second is what compilation took. (Below a tenth of a second, the
    second is the best of three.) All end points are then measured by one yardstick, :math:`\log p(x \mid \theta)` with
    the latents summed out exactly where any of the plans can.

    Args:
        model: a NumPyro model; or an `autoem.EM`, whose options all strategies have unless they set their own.
        strategies: by label: None (EM as it stands), a strategy of `autoem.e_step`, `autoem.m_step` or
            `autoem.accelerate`, a dict of EM's options, an `autoem.EM` of the same model, or a baseline of
            `autoem.baselines`.
        rng_key: `jax.random.key(seed)`; decides the starts, and the draws of those that draw.
        args, kwargs: the model's own arguments. One named `starts`, `held_out` or `reference` is passed by position.
        starts: number of starts, at least 1; those that `EM` makes for this key. Each strategy runs from all of them,
            one after the other, and keeps its best.
        held_out: data that are not fitted, a tuple of the model's arguments or a dict of them by name; None for none.
        reference: label of the strategy that the others' parameters and posteriors are held against; None for the
            first that ends.

    Returns:
        A row a strategy; see `Comparison`. One that fails has its error in its row.

    Raises:
        PlanError: no strategies, or no such reference.
        DataError: bad data, or a bad key.
        ModelError: the model itself fails, or no plan at all can be derived.
        ValueError: `starts` is below 1.

    References:
        Salakhutdinov, Roweis and Ghahramani 2003, on EM against gradients; Wu 1983, on what either converges to.
    """
    rng_key = as_key(rng_key)
    if not isinstance(starts, int | np.integer) or starts < 1:
        raise ValueError(f"compare(starts={starts!r}): starts must be a whole number, at least 1")
    check_labels(strategies, reference)
    base = base_of(model)
    rows, resolvable = [], {}
    for label, strategy in strategies.items():
        try:
            resolvable[label] = resolved(label, strategy, base)
        except (ValueError, TypeError) as error:
            rows.append(failed(Row(label, ""), error))
    ems = [s for s in resolvable.values() if isinstance(s, EM)]
    yardstick = find(base, ems, int(starts), rng_key, args, kwargs, split(held_out))
    rows += run_all(resolvable, yardstick, rng_key)
    rows = sorted(rows, key=lambda r: list(strategies).index(r.label))
    rows = [measured(row, yardstick) if row.ended else row for row in rows]
    rows, chosen, labels = agreed(rows, yardstick, reference)
    return Comparison(tuple(rows), chosen, yardstick.name, yardstick.has_priors, yardstick.exact, labels)


def check_labels(strategies: Any, reference: str | None) -> None:
    """Refuse what is no dict of strategies by label."""
    mend = 'compare(model, {"exact": None, "by gradient": autoem.baselines.GradientAscent()}, key, *args)'
    if not isinstance(strategies, Mapping) or not strategies:
        problem = f"strategies must be a dict by label, with at least one, not {strategies!r}"
        raise PlanError("strategies", problem=problem, mend=mend, kind="argument")
    if odd := [n for n in strategies if not isinstance(n, str)]:
        raise PlanError("strategies", problem=f"the label {odd[0]!r} is no string", mend=mend, kind="argument")
    if reference is not None and reference not in strategies:
        mend = f"one of {', '.join(map(repr, strategies))}"
        raise PlanError("reference", problem=f"{reference!r} is none of the strategies", mend=mend, kind="argument")


def split(held_out: Any) -> tuple[tuple, dict[str, Any]] | None:
    """Held-out arguments by position and by name."""
    if held_out is None:
        return None
    if isinstance(held_out, Mapping):
        return (), dict(held_out)
    if isinstance(held_out, tuple | list):
        return tuple(held_out), {}
    raise DataError(
        "held_out", problem=f"held_out must be the model's arguments, not {type(held_out).__name__}",
        mend="held_out=(x_new,), a tuple, or held_out={'x': x_new}", kind="argument",
    )  # fmt: skip


def run_all(strategies: Mapping[str, EM | AbstractBaseline], yardstick: Yardstick, rng_key: Array) -> list[Row]:
    """A row for each strategy, in turn; after an interrupt, rows that were not run."""
    rows, interrupted = [], False
    for label, strategy in strategies.items():
        row = Row(label, "EM" if isinstance(strategy, EM) else "baseline")
        if interrupted:
            rows.append(replaced(row, status="not run: interrupted before"))
            continue
        try:
            row = timed(row, prepared(strategy, yardstick), rng_key)
            interrupted = row.status.startswith(INTERRUPTED)
        except KeyboardInterrupt:
            row, interrupted = replaced(row, status=f"{INTERRUPTED} before it had an end point"), True
        except Exception as error:  # of whatever kind: it is this row's, and the other rows are not to be lost
            row = failed(row, error)
        rows.append(row)
    return rows


def failed(row: Row, error: BaseException) -> Row:
    first = f"{type(error).__name__}: {error}".splitlines()[0]
    return replaced(row, error=error, status=f"failed: {first}")


def prepared(strategy: EM | AbstractBaseline, yardstick: Yardstick) -> Callable[[Array], Result]:
    """What runs a strategy from every start and returns its best end."""
    if isinstance(strategy, AbstractBaseline):
        return strategy.prepare(yardstick.target)
    args, kwargs = yardstick.args, yardstick.kwargs

    def run(rng_key: Array) -> EMResult:
        results: list[EMResult] = []
        for start in yardstick.target.starts:
            own = strategy._derive(args, kwargs)[0].program.params
            strategy.init = {n: v for n, v in start.items() if n in own and np.shape(v) == own[n].shape}
            results.append(strategy.run(rng_key, *args, **kwargs))
            if results[-1].status.startswith(INTERRUPTED):
                break
        best = max(results, key=lambda r: (bool(np.isfinite(r.objective)), r.objective))
        return results[-1] if results[-1].status.startswith(INTERRUPTED) and best is not results[-1] else best

    return run


def timed(row: Row, run: Callable[[Array], Result], rng_key: Array) -> Row:
    """Run twice, or four times where that is soon done; what happens after the first run does not lose its end."""
    forget()  # what another strategy, or an earlier comparison, compiled
    began = time.perf_counter()
    result = jax.block_until_ready(run(rng_key))
    first = time.perf_counter() - began
    row = replaced(ended(row, result), seconds=first)
    if row.status.startswith(INTERRUPTED):
        return row
    try:
        second = warm(run, rng_key)
        if second < SOON:
            second = min(second, warm(run, rng_key), warm(run, rng_key))
    except KeyboardInterrupt:
        return replaced(row, status=f"{INTERRUPTED} as its time was taken again; {row.status}")
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return replaced(row, notes=(*row.notes, f"a second run failed, so that its seconds are the first's: {said}"))
    return replaced(row, seconds=second, compilation=max(first - second, 0.0))


def warm(run: Callable[[Array], Result], rng_key: Array) -> float:
    """Seconds of a run for which everything was compiled.

    Raises:
        KeyboardInterrupt: it was broken off.
    """
    began = time.perf_counter()
    again = jax.block_until_ready(run(rng_key))
    if again.status.startswith(INTERRUPTED):
        raise KeyboardInterrupt
    return time.perf_counter() - began


def ended(row: Row, result: Result) -> Row:
    """The row of an end point, not yet measured."""
    if isinstance(result, Fit):
        name, notes = result.objective_name, result.notes
    else:
        name, notes = objective_name(result._context.built), result.warnings
        if result.standard_error:
            notes = (*notes, f"the objective is estimated, with a standard error of {result.standard_error:.2g}")
    params = {n: np.asarray(v) for n, v in result.params.items()}
    return replaced(
        row, result=result, params=params, objective=float(result.objective), objective_name=name,
        num_steps=int(result.num_steps), history=np.asarray(result.history), status=result.status, notes=tuple(notes),
    )  # fmt: skip


def measured(row: Row, yardstick: Yardstick) -> Row:
    """The row with what the yardstick says of its end point; what cannot be had is said in a note."""
    notes = list(row.notes)
    likelihood = joint = held_out = float("nan")
    fits = yardstick.fits(row.params)
    if fits:
        likelihood, joint = yardstick.measure(row.params)
        if np.isnan(joint):
            notes.append(
                "no plan can evaluate the likelihood without random error, so that end points are not measured"
            )
        try:
            held_out = yardstick.score(row.params)
        except ValueError as error:
            notes.append(f"no held-out score: {str(error).splitlines()[0]}")
    else:
        notes.append("it has other parameters than the yardstick's plan, so that its end point is not measured")
    try:
        latents = latents_at(row, yardstick, fits)
    except (ValueError, NotImplementedError) as error:
        latents = Latents()
        notes.append(f"no posterior: {str(error).splitlines()[0]}")
    own = row.objective_name == yardstick.target.name and abs(joint - row.objective) <= SAME
    return replaced(
        row, log_likelihood=likelihood, log_joint=joint, held_out=held_out, comparable=bool(own), latents=latents,
        notes=tuple(notes),
    )  # fmt: skip


def latents_at(row: Row, yardstick: Yardstick, fits: bool) -> Latents:
    """The posterior of a strategy: of EM its own, of a baseline the yardstick's but for what its guide has."""
    if isinstance(row.result, EMResult):
        return latents_of(row.result.posterior(), row.result._context.built)
    if row.result is None or not fits:
        return Latents()
    found = yardstick.latents(row.params)
    own = {n: (np.asarray(mean), np.asarray(sd)) for n, (mean, sd) in row.result.latents.items()}
    return Latents(found.marginals, {**found.moments, **own})


def agreed(
    rows: Sequence[Row], yardstick: Yardstick, reference: str | None
) -> tuple[list[Row], str | None, tuple[str, ...]]:
    """The rows with labels matched to the reference's, and how far they are from it; the latents that were matched."""
    finite = [r for r in rows if r.ended and all(np.isfinite(v).all() for v in r.params.values())]
    chosen = next((r for r in finite if reference in (None, r.label)), None)
    if chosen is None:
        return list(rows), None, ()
    found = symmetries(yardstick, chosen.params) if yardstick.fits(chosen.params) else ()
    out = []
    for row in rows:
        same = row in finite and {n: v.shape for n, v in row.params.items()} == {
            n: v.shape for n, v in chosen.params.items()
        }
        if not same:
            out.append(row)
            continue
        params, latents, orders = relabelled(found, row.params, row.latents, chosen.params)
        notes = [f"states of '{n}' relabelled as {list(o)} to match '{chosen.label}'" for n, o in orders.items()]
        row = replaced(row, params=params, latents=latents, notes=(*row.notes, *notes))
        figures = {
            "distance": distance(params, chosen.params),
            "variation": variation(latents, chosen.latents),
            "shift": shift(latents, chosen.latents),
        }
        out.append(replaced(row, **figures))
    return out, chosen.label, tuple(n for s in found for n in s.latents)

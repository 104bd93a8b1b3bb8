"""`select`: fit every structure of a grid, and say which to prefer.

In: a model, a grid of its keyword arguments, data. Out: `Selection`. A structure that cannot be derived or fitted is a
row of the table with its reason, and does not stop the sweep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from autoem._em import EM, as_key
from autoem._errors import DataError, ModelError, PlanError
from autoem.answers.result import EMResult
from autoem.fitting.stop import DIVERGED, FELL, SENTENCES
from autoem.selection._grid import Structure, structures
from autoem.selection._rows import deal, held_out, row_plate
from autoem.selection._selection import CRITERIA, Entry, Selection

DEFAULTS = {"restarts": 10, "progress": False}
BROKEN = (SENTENCES[FELL], SENTENCES[DIVERGED])


def select(
    model: Callable | Mapping[str, Callable],
    grid: Mapping[str, Iterable[Any]] | None,
    rng_key: Array,
    *args: Any,
    criterion: str = "bic",
    em: Mapping[str, Any] | None = None,
    folds: int | None = None,
    test: Sequence[Any] | None = None,
    rows: Sequence[str] | None = None,
    **kwargs: Any,
) -> Selection:
    r"""Fit a model under every structure of a grid, and rank them.

    With :math:`p` free parameters, :math:`n` rows and latents :math:`z`,

    .. math::
        \mathrm{AIC} = 2p - 2\log L, \quad \mathrm{BIC} = p\log n - 2\log L, \quad
        \mathrm{ICL} = \mathrm{BIC} - 2\,\mathbb{E}[\log p(z \mid x)],

    all smaller for the better, and the held-out log-likelihood :math:`\frac1n\sum_i \log p(x_i \mid \hat\theta_{-i})`,
    in nats a row, larger for the better, where :math:`\hat\theta_{-i}` has not seen the fold of row i.

    Args:
        model: a NumPyro model, or several by label.
        grid: values for each keyword argument of the model to vary, `{"k": range(1, 7), "shared": [False, True]}`;
            every combination is fitted. None where there are several models and nothing else varies.
        rng_key: `jax.random.key(seed)`; starts and folds.
        args, kwargs: the model's own arguments, the same for every structure.
        criterion: "bic", "aic", "icl", or "heldout", which needs `folds` or `test`.
        em: options of `autoem.EM` for all structures; 10 restarts, unless it says otherwise.
        folds: deal the rows into so many folds, at least 2, and hold each out in turn. The training sets of a structure
            have one size and are fitted as one compiled program.
        test: arguments of a call to `model` on other data, in the place of `args`, to score instead.
        rows: names of the arguments that have a row for each datum, for `folds`; None takes every array whose leading
            axis has the size of the plate whose rows are independent.

    Returns:
        The ranked structures. One that cannot be fitted, or whose likelihood has no bound, is a row with its reason.

    Raises:
        DataError: the grid is empty or names what the model does not take.
        PlanError: no structure could be fitted, the structures observe different amounts of data, or nothing tells
            which arguments have rows.

    References:
        Akaike 1974; Schwarz 1978; Biernacki, Celeux and Govaert 2000 (ICL). Smyth 2000, "Model selection for
        probabilistic clustering using cross-validated likelihood".
    """
    if criterion not in CRITERIA:
        raise ValueError(f"select(criterion={criterion!r}): choose among {list(CRITERIA)}")
    if folds is not None and test is not None:
        raise ValueError("select(folds=, test=): rows are held out by folds or by a test set, not by both")
    if criterion == "heldout" and folds is None and test is None:
        raise ValueError('select(criterion="heldout"): give folds=10, or test= with data of their own')
    key = as_key(rng_key)
    options = {**DEFAULTS, **(em or {})}
    entries = []
    for i, structure in enumerate(structures(model, grid)):
        # the starts of a structure depend on its place in the grid, the folds are the same for all
        entries += [fitted(structure, options, jax.random.fold_in(key, i), args, kwargs)]
    refuse_none(entries)
    refuse_other_data(entries)
    refuse_other_objectives(entries)
    if folds is not None:
        entries = crossed(entries, folds, jax.random.fold_in(key, len(entries)), rows)
    elif test is not None:
        entries = [tested(e, tuple(test), kwargs) for e in entries]
    selection = Selection(tuple(entries), criterion, notes_of(entries))
    if not selection.ranked:
        refuse_none([Entry(e.structure, e.result, e.reason or "no finite criterion", e.seconds) for e in entries])
    return selection


def fitted(structure: Structure, options: Mapping[str, Any], key: Array, args: tuple, kwargs: dict) -> Entry:
    """One structure, fitted, or the reason why it cannot be."""
    began = time.perf_counter()
    result, reason = None, ""
    try:
        result = EM(structure.model, **options).run(key, *args, **kwargs)
        reason = broken(result)
    except (ModelError, PlanError, DataError) as error:
        reason = f"{type(error).__name__}: {error}"
    return Entry(structure, result, reason, time.perf_counter() - began)


def broken(result: EMResult) -> str:
    """Why the likelihood at the end of a fit says nothing of the structure; empty where it does."""
    if not np.isfinite(result.log_likelihood):
        return result.status
    unbounded = result.status.startswith(BROKEN) or "collapsed" in result.status
    return f"a likelihood without bound: {result.status}" if unbounded else ""


def refuse_none(entries: Sequence[Entry]) -> None:
    """Raise where no structure could be fitted."""
    if all(e.reason for e in entries):
        first = entries[0]
        problem = f"none of the {len(entries)} structures could be fitted; of {first.label}: {first.reason}"
        raise PlanError("grid", problem=problem, mend="mend what that says, or try other structures", kind="argument")


def refuse_other_data(entries: Sequence[Entry]) -> None:
    """Raise where structures observe different amounts of data: their likelihoods cannot be compared."""
    counts = {e.label: observed(e.result) for e in entries if e.result is not None and not e.reason}
    if len(set(counts.values())) > 1:
        a = next(iter(counts))
        b = next(n for n in counts if counts[n] != counts[a])
        problem = f"{a} observes {counts[a]} numbers and {b} observes {counts[b]}: their likelihoods do not compare"
        raise PlanError("grid", problem=problem, mend="observe the same data in every structure", kind="argument")


def refuse_other_objectives(entries: Sequence[Entry]) -> None:
    """Raise where a likelihood would be compared with a bound of another."""
    names = {e.label: e.result.objective_name for e in entries if e.result is not None and not e.reason}
    if len(set(names.values())) > 1 and "ELBO" in names.values():
        a = next(iter(names))
        b = next(n for n in names if names[n] != names[a])
        problem = f"of {a} the {names[a]} is known, of {b} the {names[b]}: the two do not compare"
        mend = 'em={"e_step": ...} with one strategy for all structures'
        raise PlanError("grid", problem=problem, mend=mend, kind="argument")


def observed(result: EMResult) -> int:
    """How many numbers the model observes, a site of `factor` counting its terms."""
    program, source = result._context.built.program, result._context.source
    if source.concrete:
        return -1
    keys = [(s.name, "value") for s in program.sites.values() if s.role == "observed"]
    return sum(int(np.prod(program.full.shape(k), dtype=int)) for k in keys if k in program.full.outputs)


def crossed(entries: Sequence[Entry], folds: int, key: Array, rows: Sequence[str] | None) -> list[Entry]:
    """The entries with the held-out log density of each row; the folds are the same for all of them."""
    to_deal, to_fit = jax.random.split(key)
    out, errors = [], []
    for i, e in enumerate(entries):
        if e.result is None or e.reason:
            out += [e]
            continue
        began = time.perf_counter()
        try:
            fold, training = deal(row_plate(e.result)[1], folds, to_deal)
            scores = held_out(e.result, jax.random.fold_in(to_fit, i), fold, training, rows)
            worst = sorted({int(f) for f in fold[~np.isfinite(scores)]})
            reason = f"no finite held-out score: the fit without fold {worst[0]}, or a row of it" if worst else ""
        except (ModelError, PlanError, DataError) as error:
            scores, reason = None, f"{type(error).__name__}: {error}"
            errors += [error]
        seconds = e.seconds + time.perf_counter() - began
        out += [Entry(e.structure, e.result, reason, seconds, None if reason else scores)]
    if errors and all(e.held_out is None for e in out):
        raise errors[0]
    return out


def tested(entry: Entry, test: tuple, kwargs: dict) -> Entry:
    """An entry with the log density of each row of a test set."""
    if entry.result is None or entry.reason:
        return entry
    scores = np.atleast_1d(np.asarray(entry.result.score(*test, **kwargs)))
    reason = "" if np.isfinite(scores).all() else "the test set has probability zero"
    return Entry(entry.structure, entry.result, reason, entry.seconds, None if reason else scores)


def notes_of(entries: Sequence[Entry]) -> tuple[str, ...]:
    notes = []
    failed = sum(bool(e.reason) for e in entries)
    if failed:
        notes += [f"{failed} of {len(entries)} structures have no score; the table says why"]
    known = [e.result for e in entries if e.result is not None]
    if name := next((r.objective_name for r in known if r.objective_name != "log-likelihood"), ""):
        error = max(r.standard_error for r in known)
        told = f" (standard errors up to {error:.2g} nats)" if error else ""
        notes += [f"the {name}{told} stands in for the log-likelihood of some structures"]
    priors = [p.name for r in known for p in r._context.built.program.params.values() if p.prior]
    if priors:
        notes += [f"parameters have priors ('{priors[0]}'): likelihoods are those at the mode, not at their maximum"]
    return tuple(notes)

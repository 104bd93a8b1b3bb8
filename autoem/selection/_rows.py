"""Which arguments hold the rows of the data, and what a model that did not see some rows says of them.

In: a fit of all data. Out: folds of its rows whose training sets have one size, and the log density of each row under
the parameters fitted without it. The rows are those of the plate whose rows are independent given the parameters, so
a row's log density is a term of the likelihood of all data: the training sets need one more compiled program, the
held-out scores none. That a row's density depends on no other row is not assumed but tested, on the rows of a training
set.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import DataError, PlanError
from autoem.answers.per_datum import datum_plate, per_datum
from autoem.answers.result import EMResult
from autoem.graph.programs import jit_once
from autoem.reading.source import path_name
from autoem.selection._batch import Call, fit_many, plain
from autoem.selection._simulate import refuse_approximate
from autoem.treatments import AbstractDrawn


def row_plate(result: EMResult) -> tuple[str, int]:
    """The plate whose rows are the independent data, and its size.

    Raises:
        PlanError: the data have no plate of independent rows, or the fit no exact likelihood.
    """
    refuse_approximate(result, "held-out scores")
    treatment = result._context.built.kernel.treatment
    if isinstance(treatment, AbstractDrawn):
        problem = "its latents are integrated all at once, which gives no row a density of its own"
        mend = 'criterion="bic", or latents of which each row reads one cell'
        raise PlanError(treatment.hidden.names[0], problem=problem, mend=mend)
    plate = result.posterior().datum_plate
    if plate is None:
        name, problem = result.plan.program.name, "its data have no plate of rows that are independent of each other"
        raise PlanError(name, problem=problem, mend='criterion="bic", or test= with data of their own', kind="model")
    return plate, result.plan.program.plates[plate].size


def row_arguments(result: EMResult, rows: Sequence[str] | None) -> list[int]:
    """Numbers of the argument leaves that have a row for each datum.

    Args:
        result: a fit of all data.
        rows: names of the model's arguments (`"x"`, or `"d['y']"` for a leaf of a dict); None takes every array whose
            leading axis has the size of the data's plate.

    Raises:
        PlanError: nothing tells which they are, or an argument named has not that many rows.
    """
    context, (plate, size) = result._context, row_plate(result)
    leaves = jax.tree.leaves((context.args, context.kwargs))
    names = [path_name(context.em.model, path) for path in context.source.paths]
    shapes = {n: np.shape(x) for n, x in zip(names, leaves, strict=True) if np.ndim(x)}
    if rows is None:
        found = [i for i, n in enumerate(names) if shapes.get(n, (0,))[0] == size]
        if not found:
            problem = f"no argument has a leading axis of its size, {size} (they have {shapes})"
            raise PlanError(plate, problem=problem, mend="test= with data of their own", kind="plate")
        square = [n for i, n in enumerate(names) if i in found and shapes[n].count(size) > 1]
        if square:
            problem = f"{square} have several axes of its size, {size}, so that nothing tells which is the rows'"
            raise PlanError(plate, problem=problem, mend=f"rows={square}, if their leading axis is it", kind="plate")
        return found
    chosen = []
    for name in [rows] if isinstance(rows, str) else rows:
        at = [i for i, n in enumerate(names) if n == name or n.startswith((f"{name}[", f"{name}."))]
        if not at:
            raise PlanError(
                name, problem="rows= names it, but it is no argument", mend=f"choose among {names}", kind="argument"
            )
        if wrong := [names[i] for i in at if shapes.get(names[i], (0,))[0] != size]:
            problem = f"rows= names it, but its leading axis is not that of plate '{plate}', of size {size}"
            raise PlanError(wrong[0], problem=problem, mend="name arguments with a row for each datum", kind="argument")
        chosen += at
    return chosen


def taken(result: EMResult, leaves: Sequence[int], rows: np.ndarray) -> Call:
    """The arguments of a fit with some of their rows alone."""
    context = result._context
    flat, tree = jax.tree.flatten((context.args, context.kwargs))
    flat = [np.asarray(x)[rows] if i in leaves else x for i, x in enumerate(flat)]
    return jax.tree.unflatten(tree, flat)


def deal(size: int, folds: int, rng_key: Array) -> tuple[np.ndarray, list[np.ndarray]]:
    """The fold of each row, and the rows of each training set.

    Where `folds` does not divide `size`, a larger training set leaves a row out, drawn by chance, so that all have the
    same size and share one program; every row is held out once all the same.

    Raises:
        DataError: fewer than two folds, or more than rows.
    """
    if not 2 <= folds <= size:
        mend = "folds=10, or less than the rows"
        raise DataError("folds", problem=f"{size} rows cannot be dealt into {folds} folds", mend=mend, kind="argument")
    order = np.asarray(jax.random.permutation(rng_key, size))
    fold = np.empty(size, int)
    fold[order] = np.arange(size) % folds
    train = size - -(-size // folds)
    return fold, [np.sort(order[fold[order] != f][:train]) for f in range(folds)]


def held_out(
    result: EMResult, rng_key: Array, fold: np.ndarray, training: Sequence[np.ndarray], rows: Sequence[str] | None
) -> np.ndarray:
    """Log density of each row under the parameters fitted to the training set of its fold, in nats, `(rows,)`.

    Raises:
        PlanError: rows cannot be left out: nothing tells which arguments hold them, a parameter has an entry for each
            row, or a row's density depends on other rows.
        DataError: a training set cannot be fitted.
    """
    context, (plate, size) = result._context, row_plate(result)
    leaves = row_arguments(result, rows)
    calls = [taken(result, leaves, chosen) for chosen in training]
    em, built = context.em, context.built
    ends = fit_many(em, calls, rng_key)  # not from the estimates, which have seen the rows that are held out
    for name, value in ends.params.items():
        if value.shape[1:] != np.shape(result.params[name]):
            problem = f"its shape is {value.shape[1:]} for {len(training[0])} rows, {np.shape(result.params[name])} for"
            mend = "give it a size that does not follow the rows'"
            raise PlanError(name, problem=f"{problem} {size}: it has entries for rows held out", mend=mend)
    bundle = built.plain_bundle(context.source, jax.random.key(0))
    logs = result.posterior()._logs
    score = jit_once(jax.vmap(lambda p: per_datum(plain(built.kernel), logs, p, bundle, plate)))
    params = {n: jnp.asarray(v) for n, v in ends.params.items()}
    scores = np.asarray(score(params))
    scores = np.where(np.isnan(ends.objective)[:, None], np.nan, scores)
    refuse_dependent(result, plate, calls[0], {n: v[0] for n, v in ends.params.items()}, scores[0][training[0]])
    return scores[fold, np.arange(size)]


def refuse_dependent(result: EMResult, plate: str, call: Call, params, expected: np.ndarray) -> None:
    """Raise unless the rows of a training set have alone the density that they have among all rows."""
    em = result._context.em
    built, source = em._derive(*call)
    kernel, bundle = plain(built.kernel), built.plain_bundle(source, jax.random.key(0))
    sizes = {n: p.size for n, p in built.program.plates.items()}
    params = {n: jnp.asarray(v) for n, v in params.items()}
    logs = built.kernel.layout.logs
    agrees = sizes.get(plate) == len(expected) and datum_plate(kernel, logs, params, bundle) == plate
    if agrees:
        alone = np.asarray(jit_once(lambda p, b: per_datum(kernel, logs, p, b, plate))(params, bundle))
        tolerance = np.sqrt(float(jnp.finfo(jnp.result_type(float)).eps))
        agrees = np.allclose(alone, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    if not agrees:
        problem = "the density of its rows changes with the rows around them (a mean taken in the model, say)"
        mend = "compute what depends on all rows outside the model, or name the arguments that have rows: rows="
        raise PlanError(plate, problem=problem, mend=mend, kind="plate")

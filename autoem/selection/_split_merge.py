"""Merge and split moves: out of an optimum where two states share what one could hold, and one holds what needs two.

In: a fit with a discrete latent. Out: a fit with an objective at least as high. A move merges two states and splits
one, which frees no state and needs none; it starts EM anew from responsibilities moved so, and is kept where the
objective ends higher. All moves that are tried at a time are the starts of one compiled fit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._em import as_key
from autoem._errors import PlanError
from autoem.answers.oddities import oddities
from autoem.answers.result import EMResult, Restarts, make_result
from autoem.fitting.starts import FEW, responsibilities, row_features, seeded
from autoem.fitting.stop import DIVERGED, FELL, SENTENCES
from autoem.graph.named import Named, named
from autoem.ir import Latent
from autoem.passes.classify import nearest
from autoem.selection._simulate import refuse_approximate

SOFT = 0.95  # weight of the half that a row goes to
LEAST = 1e-8  # rise of the objective, relative to its size, below which a move is not kept
FILL = 0.05  # of every row's weight is shared among all states, where one is empty
TINY = 1e-3  # weight of the rows that a split from a few rows is not seeded by


@dataclasses.dataclass(frozen=True)
class Move:
    """Merge states `one` and `other`; then split `into`, which may be `one`: the merged state, in another way."""

    one: int
    other: int
    into: int

    def __str__(self) -> str:
        what = "it" if self.into == self.one else f"state {self.into}"
        return f"merge states {self.one} and {self.other}, split {what}"


def split_merge(
    result: EMResult,
    rng_key: Array,
    *,
    latent: str | None = None,
    candidates: int = 6,
    splits: int = 4,
    max_moves: int = 20,
) -> EMResult:
    r"""Move a fit out of a poor optimum by merging two states of a latent and splitting a third.

    Of responsibilities :math:`r_{nk}` and log densities :math:`\log p(x_n)` at the fit, the pairs to merge are those
    with the most in common, :math:`r_i \cdot r_j / \lVert r_i \rVert \lVert r_j \rVert`, and the states to split those
    that describe their rows worst, :math:`-\sum_n r_{nk} \log p(x_n) / \sum_n r_{nk}`. (At a fixed point that is, but
    for a constant, the divergence of a state's density from its share of the data.) A merged pair may also be split
    again in another way, which is the only move of a latent with two states. A split is by density, by the principal
    axis of the observed values, or by chance. EM then runs to its end from each candidate; the best is kept where its
    objective is higher, no parameter collapses in it, and the search goes on from there.

    Args:
        result: a fit of a model with a discrete latent whose states exchange roles, such as a mixture.
        rng_key: `jax.random.key(seed)`, for splits by chance.
        latent: whose states to move; None where the model has one such latent.
        candidates: moves to try at a time, at least 1.
        splits: ways to try each split in, at least 1.
        max_moves: moves to keep at most.

    Returns:
        The better fit, whose `warnings` count the moves; `result` itself where none is better.

    Raises:
        PlanError: the model has no discrete latent with two states or more in a plate, or several and none is named.

    References:
        Ueda, Nakano, Ghahramani and Hinton 2000, "SMEM algorithm for mixture models".
    """
    for option, number in (("candidates", candidates), ("splits", splits), ("max_moves", max_moves)):
        if number < 1:
            raise ValueError(f"split_merge({option}={number}): {option} must be at least 1")
    refuse_approximate(result, "merge and split moves", comparable=False)
    name = latent_of(result, latent)
    key, now, made = as_key(rng_key), result, []
    for step in range(max_moves):
        better = one_move(now, name, jax.random.fold_in(key, step), candidates, splits)
        if better is None:
            break
        now, move = better
        made += [str(move)]
    if not made:
        return result
    count = "1 merge-and-split move" if len(made) == 1 else f"{len(made)} merge-and-split moves"
    note = f"{count} raised the objective from {result.objective:.6f} to {now.objective:.6f} ({'; '.join(made)})"
    return dataclasses.replace(now, warnings=(note, *now.warnings))


def latent_of(result: EMResult, asked: str | None) -> str:
    """The latent to move.

    Raises:
        PlanError: there is none such, or more than one.
    """
    latents = result._context.built.program.latents
    fit = [n for n, z in latents.items() if z.num_states > 1 and int(np.prod(z.shape)) > z.num_states]
    if asked is not None and asked not in fit:
        problem = "latent= names it, but it is no discrete latent with two states or more and a cell for many rows"
        raise PlanError(asked, problem=problem, mend=nearest(asked, fit) if fit else "fit it with more restarts")
    if asked is None and len(fit) != 1:
        problem = f"merge and split moves need one latent with two states or more; the model has {fit or 'none'}"
        mend = f'latent="{fit[0]}"' if fit else "fit it with more restarts"
        raise PlanError(result.plan.program.name, problem=problem, mend=mend, kind="model")
    return asked or fit[0]


def one_move(now: EMResult, name: str, key: Array, candidates: int, splits: int) -> tuple[EMResult, Move] | None:
    """The best of the moves from a fit, with the fit that it leads to; None where none is better."""
    context = now._context
    em, built, source = context.em, context.built, context.source
    bundle, latent = built.plain_bundle(source, key), built.program.latents[name]
    posterior = now.posterior()
    others = {n: responsibilities(built, n, posterior.marginals[n]) for n in built.program.latents if n != name}
    share = peopled(np.asarray(posterior.marginals[name]).reshape(-1, latent.num_states))
    density = densities(now, latent)
    features = row_features(built, bundle, latent)
    values = None if features is None or len(features) != len(share) else np.asarray(features)
    moves = ranked_moves(share, density, candidates)
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    repeat = -(-candidates // len(moves)) * splits  # of fewer moves, more ways to split: always as many starts
    tried = [(m, w) for m in moves for w in range(repeat)][: candidates * splits]
    begin = []
    for i, (move, way) in enumerate(tried):
        weight = moved(share, move, halves(share, move, way, density, values, random))
        given = {**others, name: in_place(built, latent, weight)}
        begin += [seeded(built, now.params, bundle, jax.random.fold_in(key, i), given)]
    placed = built.bundle(source, key)
    state, ends = em._fit(built, placed, begin, key)
    best = acceptable(now, ends)
    if best is None:
        return None
    if best != ends.best:
        state = em._fit(built, placed, [begin[best]], key)[0]
        ends = dataclasses.replace(ends, best=best)
    return make_result(em, built, source, placed, (state, ends), (), context.args, context.kwargs), tried[best][0]


def acceptable(now: EMResult, ends: Restarts) -> int | None:
    """The highest end point that is higher than the fit, and sound: nothing in it collapsed or ran out of bounds."""
    built, source = now._context.built, now._context.source
    least = now.objective + LEAST * (1 + abs(now.objective))
    bundle = built.plain_bundle(source, jax.random.key(0))
    for i in np.argsort(-np.nan_to_num(ends.objective, nan=-np.inf)):
        if not ends.objective[i] > least:
            return None
        broken = ends.status[i] in (SENTENCES[FELL], SENTENCES[DIVERGED])
        odd = [o for o in oddities(built, ends.params[i], bundle) if "is empty" not in o]
        if not broken and not odd:
            return int(i)
    return None


def in_place(built, latent: Latent, weight: np.ndarray) -> Named:
    """Responsibilities, which need not sum to one, in the shape and order that the kernel has them in."""
    array = jnp.asarray(weight.reshape(*latent.shape, latent.num_states))
    chain = built.program.chain_of(latent.name)
    array = array[::-1] if chain is not None and chain.reverse else array
    return named(array, (*latent.axes, latent.name))


def peopled(share: np.ndarray) -> np.ndarray:
    """Responsibilities with a little of every row in each state, where one has less than a row."""
    if share.sum(0).min() >= 1:
        return share
    return (1 - FILL) * share + FILL / share.shape[1]


def densities(now: EMResult, latent: Latent) -> np.ndarray | None:
    """Log density of the datum that each cell of the latent belongs to; None where the data do not fall apart so."""
    posterior = now.posterior()
    plate = posterior.datum_plate
    if plate is None or plate not in latent.axes:
        return None
    axis = latent.axes.index(plate)
    shape = [1] * len(latent.shape)
    shape[axis] = latent.shape[axis]
    rows = np.asarray(posterior.log_likelihood)
    return np.broadcast_to(rows.reshape(shape), latent.shape).reshape(-1) if rows.size == shape[axis] else None


def ranked_moves(share: np.ndarray, density: np.ndarray | None, count: int) -> list[Move]:
    """The moves to try: pairs with much in common and states that describe their rows badly come first."""
    k = share.shape[1]
    size = np.maximum(np.linalg.norm(share, axis=0), 1e-300)
    common = (share.T @ share) / np.outer(size, size)
    weight = np.maximum(share.sum(0), 1e-300)
    # a latent whose rows have no density of their own: the states with most rows
    badness = weight if density is None else -(density @ share) / weight
    pairs = sorted(itertools.combinations(range(k), 2), key=lambda p: -common[p])
    order = list(np.argsort(-badness))
    scored = []
    for rank, (i, j) in enumerate(pairs):
        scored += [(rank + place, Move(i, j, s)) for place, s in enumerate(s for s in order if s not in (i, j))]
        scored += [(rank + 1, Move(i, j, i))]
    return [m for _, m in sorted(scored, key=lambda x: x[0])[:count]]


def halves(
    share: np.ndarray,
    move: Move,
    way: int,
    density: np.ndarray | None,
    values: np.ndarray | None,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """What part of each row's weight on the state to split goes to either half, `(rows,)` each."""
    merged = share[:, move.one] + share[:, move.other]
    weight = merged if move.into == move.one else share[:, move.into]
    weight = weight + 1e-12
    first: np.ndarray | None = None
    if way == 0 and density is not None:
        first = density > weighted_median(density, weight)
    elif way == 1 and values is not None:
        centred = values - np.average(values, axis=0, weights=weight)
        axis = np.linalg.eigh(np.atleast_2d((centred * weight[:, None]).T @ centred))[1][:, -1]
        first = centred @ axis > 0
    elif way % 4 == 2 and values is not None:
        one, other = values[random.choice(len(values), 2, p=weight / weight.sum())]
        first = ((values - one) ** 2).sum(1) < ((values - other) ** 2).sum(1)
    if first is not None:
        part = np.where(first, SOFT, 1 - SOFT)
        return part, 1 - part
    count = min(2 * FEW, len(weight))
    few = random.choice(len(weight), count, replace=False, p=weight / weight.sum())
    part, rest = np.full(len(weight), TINY), np.full(len(weight), TINY)
    part[few[::2]], rest[few[1::2]] = 1.0, 1.0
    return part, rest


def weighted_median(values: np.ndarray, weight: np.ndarray) -> float:
    order = np.argsort(values)
    total = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def moved(share: np.ndarray, move: Move, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The responsibilities after a move; state `other` takes the second half of what is split."""
    out = share.copy()
    out[:, move.one] = share[:, move.one] + share[:, move.other]
    split = out[:, move.into].copy()
    out[:, move.into], out[:, move.other] = split * parts[0], split * parts[1]
    return out

r"""Label switching: which relabellings of a latent's states leave the model as it is, and the one that matches best.

A latent's states may be permuted if some axes of the parameters can be permuted with them and nothing changes. Which
axes is not guessed but tried: at a point in general position, under two permutations that generate all, the objective
must stay and the latent's marginals must be permuted. Where no choice of axes passes, the latents that share factors or
parameters with it are relabelled together (the first state of a chain and the later ones); where that does not pass
either, labels are left as they stand.

References:
    Stephens 2000, "Dealing with label switching in mixture models".
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from autoem._errors import PlanError
from autoem.comparison.row import Latents
from autoem.comparison.yardstick import Yardstick
from autoem.e_step.tables.tabulate import Factor
from autoem.fitting.starts import inside
from autoem.ir import Program

MANY = 128  # choices of axes that are tried for a latent
ALL_UP_TO = 6  # states up to which every permutation is tried
Axes = tuple[int, ...]
Values = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Symmetry:
    """Latents whose states may be relabelled together, and the parameters' axes that go with them."""

    latents: tuple[str, ...]
    states: int
    axes: Mapping[str, Axes]

    def apply(self, params: Values, order: Sequence[int]) -> dict[str, np.ndarray]:
        """The parameters with state `i` what `order[i]` was."""
        out = dict(params)
        for name, axes in self.axes.items():
            for axis in axes:
                out[name] = np.take(out[name], np.asarray(order), axis)
        return out

    def match(self, params: Values, reference: Values) -> tuple[int, ...]:
        """The order that brings the parameters nearest to the reference's."""
        mine, theirs = {n: params[n] for n in self.axes}, {n: reference[n] for n in self.axes}

        def cost(order: Sequence[int]) -> float:
            return distance(self.apply(mine, order), theirs)

        identity = tuple(range(self.states))
        if self.states <= ALL_UP_TO:
            return min(itertools.permutations(identity), key=cost)
        return swapped(cost, [identity, self._nearest(mine, theirs)])

    def _nearest(self, mine: Values, theirs: Values) -> tuple[int, ...]:
        """Each state of the reference takes the nearest that is left, by the parameters with one axis of states."""
        squares = np.zeros((self.states, self.states))
        for name, axes in self.axes.items():
            if len(axes) == 1:
                a, b = (np.moveaxis(v[name], axes[0], 0).reshape(self.states, -1) for v in (mine, theirs))
                squares += ((b[:, None] - a[None]) ** 2).sum(-1) / max(float((b**2).sum()), 1e-300)
        order: list[int] = []
        for i in range(self.states):
            order.append(min((j for j in range(self.states) if j not in order), key=lambda j: squares[i, j]))
        return tuple(order)


def swapped(cost, begins: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The best of several orders after swapping two of its entries for as long as that helps."""
    best = min(begins, key=cost)
    while True:
        pairs = itertools.combinations(range(len(best)), 2)
        near = [tuple(best[{i: j, j: i}.get(k, k)] for k in range(len(best))) for i, j in pairs]
        better = min(near, key=cost)
        if cost(better) >= cost(best):
            return best
        best = better


def distance(params: Values, reference: Values) -> float:
    """Root mean square over parameters of the distance of each from the reference's, relative to the latter's norm."""
    squares = []
    for name, b in reference.items():
        norm = float((b**2).sum())
        squares.append(float(((params[name] - b) ** 2).sum()) / (norm if norm > 0 else 1.0))
    return float(np.sqrt(np.mean(squares))) if squares else 0.0


def symmetries(yardstick: Yardstick, params: Values) -> tuple[Symmetry, ...]:
    """The latents whose states may be relabelled, near `params`."""
    try:
        point = in_general_position(yardstick, params)
    except PlanError:
        return ()
    program, kernel = yardstick.target.built.program, yardstick.target.built.kernel
    readers = {n: {f for f in kernel.problem.factors.values() if n in bases(program, f)} for n in program.latents}
    found: list[Symmetry] = []
    for together in (False, True):
        for name in program.latents:
            if any(name in s.latents for s in found):
                continue
            group = linked(yardstick, name, readers) if together else (name,)
            symmetry = symmetry_of(yardstick, group, {f for n in group for f in readers[n]}, point)
            found += [symmetry] if symmetry is not None else []
    return tuple(found)


def in_general_position(yardstick: Yardstick, params: Values) -> dict[str, np.ndarray]:
    """A point near `params` at which nothing coincides by chance; always the same."""
    target, draw = yardstick.target, np.random.default_rng(0)
    arrays = {n: jnp.asarray(v) for n, v in params.items()}
    free = target.free(arrays)
    moved = {n: u + 0.1 * draw.normal(size=np.shape(u)) for n, u in free.items()}
    return {n: np.asarray(v) for n, v in target.params(moved, arrays).items()}


def bases(program: Program, factor: Factor) -> set[str]:
    """The latents that a factor reads."""
    return {program.base_of(z.name) for z in factor.latents}


def linked(yardstick: Yardstick, name: str, readers: Mapping[str, set[Factor]]) -> tuple[str, ...]:
    """The latents of as many states that are tied to this one by factors or parameters, itself among them."""
    latents = yardstick.target.built.program.latents
    group, open_ends = {name}, [name]
    while open_ends:
        mine = readers[open_ends.pop()]
        params = {p for f in mine for p in f.params}
        for other, factors in readers.items():
            alike = other not in group and latents[other].num_states == latents[name].num_states
            if alike and (factors & mine or params & {p for f in factors for p in f.params}):
                group.add(other)
                open_ends.append(other)
    return tuple(n for n in latents if n in group)


def symmetry_of(yardstick: Yardstick, group: tuple[str, ...], readers: set[Factor], point: Values) -> Symmetry | None:
    """The axes that go with the states of these latents."""
    target = yardstick.target
    states = target.built.program.latents[group[0]].num_states
    if states < 2:
        return None
    choices = {n: choices_of(np.shape(v), states) for n, v in point.items() if any(n in f.params for f in readers)}
    orders = [(*range(1, states), 0), (1, 0, *range(2, states))]
    value = yardstick.measure(point)[1]
    eps = float(jnp.finfo(jnp.result_type(float)).eps)
    slack = 1e3 * eps * (abs(value) + target.kernel.num_rows)
    for chosen in itertools.islice(itertools.product(*choices.values()), MANY):
        symmetry = Symmetry(group, states, {n: a for n, a in zip(choices, chosen, strict=True) if a})
        if symmetry.axes and all(holds(yardstick, symmetry, point, o, value, slack) for o in orders[: states - 1]):
            return symmetry if permutes(yardstick, symmetry, point, orders[0]) else None
    return None


def choices_of(shape: tuple[int, ...], states: int) -> list[Axes]:
    """Axes of a parameter that may go with the states: the first, all of that size, the last, none."""
    fitting = tuple(i for i, s in enumerate(shape) if s == states)
    found = [fitting[:1], fitting, fitting[-1:], ()]
    return list(dict.fromkeys(found))


def holds(yardstick: Yardstick, symmetry: Symmetry, point: Values, order: Sequence[int], value, slack) -> bool:
    """Whether the objective stays when the states are relabelled."""
    moved = symmetry.apply(point, order)
    params = yardstick.target.built.program.params
    if not all(inside(params[n].constraint, moved[n]) for n in symmetry.axes):
        return False
    return bool(abs(yardstick.measure(moved)[1] - value) <= slack)


def permutes(yardstick: Yardstick, symmetry: Symmetry, point: Values, order: Sequence[int]) -> bool:
    """Whether the marginals are relabelled with the parameters, and those of no other latent change."""
    before, after = yardstick.latents(point).marginals, yardstick.latents(symmetry.apply(point, order)).marginals
    expected = {n: p[..., list(order)] if n in symmetry.latents else p for n, p in before.items()}
    tolerance = float(np.sqrt(jnp.finfo(jnp.result_type(float)).eps))
    return all(np.allclose(after[n], expected[n], atol=tolerance) for n in expected)


def relabelled(
    found: Sequence[Symmetry], params: Values, latents: Latents, reference: Values
) -> tuple[dict[str, np.ndarray], Latents, dict[str, tuple[int, ...]]]:
    """Parameters and posterior with labels as near to the reference's as can be, and the orders that were taken."""
    out, marginals, orders = dict(params), dict(latents.marginals), {}
    for symmetry in found:
        order = symmetry.match(out, reference)
        if order != tuple(range(symmetry.states)):
            orders |= dict.fromkeys(symmetry.latents, order)
            out = symmetry.apply(out, order)
            moved = {n: marginals[n][..., list(order)] for n in symmetry.latents if n in marginals}
            marginals |= moved
    sizes = {s.states for s in found if orders.keys() & set(s.latents)}
    # a continuous latent with an entry a state would have to be relabelled with it, which is not known
    moments = {n: m for n, m in latents.moments.items() if not sizes & set(np.shape(m[0]))}
    return out, Latents(marginals, moments), orders


def variation(a: Latents, b: Latents) -> float:
    r"""Total variation of the discrete marginals, :math:`\frac{1}{2} \sum_k |p_k - q_k|`, averaged over all cells."""
    shared = [n for n in a.marginals if n in b.marginals and a.marginals[n].shape == b.marginals[n].shape]
    cells = [0.5 * np.abs(a.marginals[n] - b.marginals[n]).sum(-1).ravel() for n in shared]
    return float(np.concatenate(cells).mean()) if cells else float("nan")


def shift(a: Latents, b: Latents) -> float:
    """Root mean square over cells of the difference of the continuous means, in standard deviations of `b`."""
    shared = [n for n in a.moments if n in b.moments and np.shape(a.moments[n][0]) == np.shape(b.moments[n][0])]
    squares = []
    for n in shared:
        (mean, _), (other, sd) = a.moments[n], b.moments[n]
        squares.append((((mean - other) / np.where(sd > 0, sd, 1.0)) ** 2).ravel())
    return float(np.sqrt(np.concatenate(squares).mean())) if squares else float("nan")

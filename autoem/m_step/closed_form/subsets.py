r"""Ordered subsets of the rows: several multiplicative updates for the price of one, from a share of the rows each.

In: a superposition whose rates can be had row by row. Out: a block that takes, one after the other and each at the
point that its predecessors left, the updates

.. math:: \theta_j \leftarrow \theta_j \, \frac{\sum_{i \in S_k} a_{ij} \, y_i / \lambda_i}{\sum_{i \in S_k} a_{ij}},
   \qquad k = 1, \dots, K

of `K` interleaved subsets of the rows. Far from the maximum the subsets agree, and a pass gains what `K` steps would;
near it they do not, and a pass goes round. So `Q` after a pass is compared with `Q` before; where it is not higher, the
pass is made anew with half as many subsets, and also where the fit rests: the last steps are plain EM, of one subset,
and the fit ends where plain EM does. A count of zero in one subset alone must not make an entry zero for good: it is
made at most `LEAST` times what it was.

References:
    Hudson and Larkin 1994, "Accelerated image reconstruction using ordered subsets of projection data".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from autoem.graph.jaxpr import Variable
from autoem.graph.rows import ROWS, Whole, rows_of, shared
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.counting import latex_name
from autoem.m_step.closed_form.rates import AbstractRate
from autoem.m_step.closed_form.superposition import Superposition
from autoem.m_step.problem import Bundle, Params, Statistics, graph_values
from autoem.passes.link import Declined

LEAST = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A rate on every `step`-th of its `rows`, which lie along `axis` of its site."""

    rate: AbstractRate
    axis: int
    rows: int
    step: int
    once: tuple[Variable, ...]

    def prepared(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """The inputs, with what all subsets share computed."""
        found = self.rate.use.factor.graph.evaluate_atoms(self.once, values)
        return {**values, **dict(zip(self.once, found, strict=True))}

    def numbers(self, first: Array) -> Array:
        """The numbers of the rows from `first` on; the last may lie behind the end."""
        return first + self.step * jnp.arange(-(-self.rows // self.step))

    def of(self, statistics: Any, numbers: Array) -> Any:
        """The statistics of these rows."""
        at = len(self.rate.use.factor.parents) + self.axis

        def taken(x: Array) -> Array:
            inside = (numbers < self.rows).reshape([-1 if i == at else 1 for i in range(x.ndim)])
            return jnp.where(inside, jnp.take(x, numbers, at, mode="clip"), 0)

        return jax.tree.map(taken, statistics)


def cut(rate: AbstractRate, step: int) -> Cut:
    """The rate with every `step`-th of its rows alone.

    Raises:
        Declined: an operation on the way to it mixes rows, or it has fewer.
    """
    factor = rate.use.factor
    graph, site = factor.graph, factor.site
    shape = graph.shape((factor.name, rate.key))
    size = max(shape, default=1)
    if size < step:
        raise Declined(f"{rate.use} has {size} rows, fewer than {step} subsets")
    axis = len(site.axes) - len(shape) + shape.index(size)
    axes: dict[tuple[str, Any], int | None] = {}
    for field in rate.fields:
        of_field = graph.shape((factor.name, field))
        at = axis - (len(site.axes) - len(of_field))
        axes[factor.name, field] = at if at >= 0 and of_field[at] == size else None
    count = -(-size // step)
    try:
        taken = rows_of(graph, axes, count)
    except Whole as whole:
        raise Declined(f"the rows of {rate.use} cannot be taken apart: {whole}") from None
    sizes = tuple(count if i == axis else s for i, s in enumerate(site.shape))
    fewer = dataclasses.replace(factor, graph=taken, site=dataclasses.replace(site, shape=sizes))
    use = dataclasses.replace(rate.use, factor=fewer)
    return Cut(dataclasses.replace(rate, use=use), axis, size, step, tuple(shared(taken, list(axes))))


@dataclasses.dataclass(frozen=True, eq=False)
class Subsets(AbstractBlock):
    """Multiplicative updates from subsets of the rows in turn; its state is the number of subsets in use."""

    whole: Superposition
    cuts: tuple[Cut, ...]
    num_subsets: int

    order = 2
    maximises = False
    remembers = True
    source = "Hudson and Larkin 1994"

    @property
    def augmentation(self) -> str:
        return self.whole.augmentation

    @property
    def update(self) -> str:
        return (
            f"{self.whole.update}, from {self.num_subsets} interleaved subsets of the rows in turn, fewer near the end"
        )

    @property
    def latex(self) -> str:
        name = latex_name(self.names[0])
        sums = r"\frac{\sum_{i \in S_k} a_{ij}\, y_i / \lambda_i}{\sum_{i \in S_k} a_{ij}}"
        return rf"{name}_j \leftarrow {name}_j {sums}, \quad k = 1, \dots, {self.num_subsets}"

    def init(self, params: Params) -> Array:
        """All subsets."""
        del params
        return jnp.asarray(self.num_subsets)

    def rest(self, state: Array) -> tuple[Array, Array]:
        """The fit may end where its steps are plain EM; otherwise it goes on with fewer subsets."""
        return state == 1, fewer(state)

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state: Array):
        (name,) = self.names
        touched = self.problem.touched(self.names)

        def value(at: Array) -> Array:
            return self.problem.q({**params, name: at}, statistics, bundle, touched)

        def attempt(number: Array) -> tuple[Array, Array]:
            """The point after a pass, and whether it may be taken: a plain step always."""
            at = jax.lax.cond(
                number == 1,
                lambda: self.whole.solve(params, statistics, bundle, None)[0][name],
                lambda: self.passed(number, params, statistics, bundle),
            )
            return at, jax.lax.cond(number == 1, lambda: jnp.array(True), lambda: value(at) > before)

        before = value(params[name])
        first = (state, *attempt(state))
        number, at, _ = jax.lax.while_loop(
            lambda s: ~s[2], lambda s: (fewer(s[0]), *attempt(fewer(s[0]))), first
        )  # fmt: skip
        return {name: at}, number

    def passed(self, number: Array, params: Params, statistics: Statistics, bundle: Bundle) -> Array:
        """One update after the other, from `number` interleaved subsets: of `num_subsets` pieces, as many in each."""
        (name,) = self.names
        size = self.num_subsets // number
        values = [c.prepared(graph_values(bundle, params)) for c in self.cuts]

        def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            at, seen, exposure = carry
            for c, given in zip(self.cuts, values, strict=True):
                numbers = c.numbers(i // size + (i % size) * number)
                here = {**given, ("param", name): at, ROWS: numbers}
                found = c.of(statistics[c.rate.use.factor.name], numbers)
                s, e = self.whole.sums(c.rate, found, here)
                seen, exposure = seen + s, exposure + e
            ends = (i + 1) % size == 0
            new = jnp.maximum(self.whole.moved(at, seen, exposure, params, bundle, 1 / number), LEAST * at)
            return jnp.where(ends, new, at), jnp.where(ends, 0, seen), jnp.where(ends, 0, exposure)

        zero = jnp.zeros_like(params[name])
        return jax.lax.fori_loop(0, self.num_subsets, step, (params[name], zero, zero))[0]


def fewer(number: Array) -> Array:
    """Half as many subsets, each of twice as many pieces; one where that is no whole number."""
    return jnp.where(number % 2 == 0, number // 2, 1)


def subsets_of(whole: Superposition, num_subsets: int) -> Subsets:
    """The superposition by ordered subsets.

    Raises:
        Declined: the rows of a rate cannot be taken apart.
    """
    cuts = tuple(cut(r, num_subsets) for r in whole.rates)
    return Subsets(whole.names, whole.problem, whole.reason, whole, cuts, num_subsets)


__all__ = ["Subsets", "subsets_of"]

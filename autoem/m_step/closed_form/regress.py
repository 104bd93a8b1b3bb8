r"""Regressions on latents whose coefficients are all free: the matrix of moments solved once for every output.

A Normal site whose mean is :math:`B z` for all rows, `z` holding one and the latents that it reads, has

.. math:: \hat B = \Big(\sum_n E[x_n z_n^\top \mid x]\Big) \Big(\sum_n E[z_n z_n^\top \mid x]\Big)^{-1}

whatever the noise, as long as every output reads the same columns of `z`: each entry of `B` is an entry of a parameter,
or known for a column as a whole. Loadings, transitions and intercepts are of this kind.

In: `LeastSquares` blocks, whose normal equations are built by differentiation, at a cost that the number of entries
enters. Out: the same update in the size of `z`, or normal equations in groups that no row ties together.

References:
    Rubin and Thayer 1982, "EM algorithms for ML factor analysis"; Zellner 1962 (equal regressors: noise cancels).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from autoem.e_step.tables.completions import rows_of, square_of
from autoem.e_step.tables.regression import Products
from autoem.e_step.tables.tabulate import Factor
from autoem.graph.programs import jit_once
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.location import LeastSquares, scaled_curvature
from autoem.m_step.closed_form.priors import prior_of
from autoem.m_step.problem import Bundle, Params, Statistics, Use

NOISES = {f"arg:{name}" for name in ("scale", "covariance_matrix", "precision_matrix", "scale_tril")}
MAX_INCIDENCE = 20_000_000  # entries of the table of what reads what, up to which it is made


@dataclasses.dataclass(frozen=True, eq=False)
class Regression(LeastSquares):
    """All coefficients of regressions on latents; `free` are the columns of `z`, for each site, that parameters fill.

    Several sites, as the first step of a scan and the later ones, have the same coefficients and the same noise.
    `places` has, for every entry of every parameter, the number of its coefficient, in the order of `solve`.
    """

    uses: tuple[Use, ...] = ()
    free: tuple[tuple[int, ...], ...] = ()
    places: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    source = "Rubin and Thayer 1982"

    @property
    def latex(self) -> str:
        return r"\hat{B} = \left(\sum_n E[x_n z_n^\top \mid x]\right)\left(\sum_n E[z_n z_n^\top \mid x]\right)^{-1}"

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state):
        own = {n: params[n] for n in self.names}

        def link(use: Use, free: Sequence[int], own: Params) -> Array:
            return columns_of(self.problem.arguments(use, {**params, **own}, bundle)["loc"], use, free)

        inner, slope = jnp.zeros(()), jnp.zeros(())
        units: list[Array] = []
        for use, free in zip(self.uses, self.free, strict=True):
            # what a coefficient grows by with its entry; sites of other units differ by the units of their outputs
            units.append(jax.jvp(functools.partial(link, use, free), (own,), (jax.tree.map(jnp.ones_like, own),))[1])
            old = self.problem.arguments(use, params, bundle)["loc"]
            known, residual = self.moments(use, free, old, self.problem.statistics(use, statistics)[0])
            inner, slope = inner + known, slope + residual * (units[0] / units[-1])
        step = (self.as_solved(inner, slope) / self.in_line(units[0])).ravel()
        step = jnp.where(jnp.isfinite(step).all(), step, 0)
        return {n: (v + step[self.places[n]]).astype(v.dtype) for n, v in own.items()}, state

    @property
    def alike(self) -> bool:
        """Whether every output weighs its rows the same."""
        return not any(u.factor.site.masked or u.factor.site.scaled for u in self.uses)

    def moments(self, use: Use, free: Sequence[int], old: Array, t: Products) -> tuple[Array, Array]:
        """Expected products of the free columns, for all cells or each, and of these with the residuals."""
        states = int(np.prod(old.shape[: len(use.factor.parents)], dtype=int))
        count, outputs = t.cross.shape[-2:]
        known, cross = (x.reshape(states, -1, *x.shape[-2:]) for x in (t.inner, t.cross))
        known = known[:, :1] if self.alike else jnp.broadcast_to(known, (*cross.shape[:2], count, count))
        residual = cross - known @ jnp.swapaxes(old.reshape(states, -1, outputs, count), -1, -2)
        return square_of(known, np.asarray(free)), residual[..., rows_of(np.asarray(free)), :]

    def as_solved(self, inner: Array, slope: Array) -> Array:
        """The solution of the normal equations, all outputs of one matrix together."""
        inner, slope = inner[:, 0] if self.alike else inner, self.in_line(slope)
        scaled, unit = scaled_curvature(-inner)
        return solved_by_inverse(scaled, slope / unit[..., None]) / unit[..., None]

    def in_line(self, columns: Array) -> Array:
        """Coefficients `(states, cells, free, outputs)` as columns of the matrices that they are solved with."""
        if not self.alike:
            return columns
        states, cells, free, outputs = columns.shape
        return jnp.swapaxes(columns, 1, 2).reshape(states, free, cells * outputs)

    def places_of(self, table: np.ndarray, entries: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Where every entry stands among the coefficients in line, of whose derivatives by all entries `table` is."""
        use, (free, count) = self.uses[0], table.shape[-2:]
        states = int(np.prod(table.shape[: len(use.factor.parents)], dtype=int))
        outputs = table.shape[-3] if use.event_dim == 2 else 1
        reads = np.swapaxes(np.abs(table).reshape(states, -1, outputs, free, count), 2, 3).argmax(-1)
        numbers = np.arange(reads.size)
        if self.alike:
            numbers = np.swapaxes(numbers.reshape(states, free, -1, outputs), 1, 2)
        place = np.empty(count, int)
        place[reads.ravel()] = numbers.ravel()
        return {n: place[e] for n, e in entries.items()}


def solved_by_inverse(matrix: Array, right: Array) -> Array:
    """The solution for positive definite matrices and many columns each; with pivots where rounding left none such.

    Products with the inverse of the factor take less time than substitution.
    """
    lower = jnp.linalg.cholesky(matrix, symmetrize_input=False)
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
    quick = jnp.swapaxes(inverse, -1, -2) @ (inverse @ right)
    return jax.lax.cond(jnp.isfinite(quick).all(), lambda: quick, lambda: jnp.linalg.solve(matrix, right))


def specialised(block: AbstractBlock, params: Params) -> AbstractBlock:
    """The same update at less cost, where a block's sites are regressions on latents with coefficients of its own."""
    if not isinstance(block, LeastSquares):
        return block
    factors = [block.problem.factors[n] for n in block.problem.touched(block.names)]
    if not all(is_regression(f) for f in factors):
        return block
    flat, unravel = ravel_pytree({n: jnp.asarray(params[n]) for n in block.names})
    if max(int(np.prod(f.graph.shape((f.name, "arg:loc")), dtype=int)) for f in factors) * flat.size > MAX_INCIDENCE:
        return block
    read = [jit_once(jax.jacobian(functools.partial(of_entries, f, unravel))) for f in factors]
    tables = [np.asarray(r(flat, dict(params))) for r in read]
    by_cell = [t.reshape(-1, *t.shape[-2:]) for t in tables]
    free = [columns(t) for t in by_cell]
    priors = any(prior_of(n, block.problem.factors) for n in block.names)
    if block.maximises and all(free) and not priors and all(map(states_apart, factors)):
        near = near_by(params)
        there = ravel_pytree({n: near[n] for n in block.names})[0]
        filled = [t[:, list(f)] for t, f in zip(by_cell, free, strict=True)]
        if len(factors) == 1 or (
            alike(filled) and alike([r(there, near) for r in read]) and one_noise(factors, params)
        ):
            uses = tuple(Use(f, "loc") for f in factors)
            found = Regression(block.names, block.problem, block.reason, uses=uses, free=tuple(free))
            entries = {n: np.rint(v).astype(int) for n, v in unravel(jnp.arange(flat.size, dtype=flat.dtype)).items()}
            return dataclasses.replace(found, places=found.places_of(tables[0][..., free[0], :], entries))
    if any(f.parents or f.site.event_dim for f in factors) or len({t.shape[1] for t in by_cell}) > 1:
        return block
    return dataclasses.replace(block, groups=components(np.concatenate([np.any(t, axis=1) for t in by_cell])))


def alike(tables: Sequence[Array | np.ndarray]) -> bool:
    """Whether derivatives of coefficients are the same, those that are zero for all entries left out."""
    kept = [t[t.any(-1)] for t in (np.reshape(t, (-1, np.shape(t)[-1])) for t in tables)]
    return all(np.array_equal(t, kept[0]) for t in kept)


def near_by(params: Params) -> Params:
    """Other values of the parameters, such as no place of theirs singles out."""
    rng = np.random.default_rng(5)
    return {n: v * (1 + 0.1 * rng.random(np.shape(v))) for n, v in params.items()}


def one_noise(factors: Sequence[Factor], params: Params) -> bool:
    """Whether sites have one noise, whatever the parameters: tried where they are, and at random values near by."""
    keys = [(f.name, k) for f in factors for n, k in f.graph.outputs if n == f.name and k in NOISES]
    graph = factors[0].graph
    if any(k[0] != "param" for k in graph.needs(*keys)):
        return False
    read = jit_once(lambda p: graph.evaluate(keys, {("param", n): v for n, v in p.items()}))
    for values in map(read, (dict(params), near_by(params))):
        first, *others = map(np.asarray, values)
        if any(np.any(first != v) for v in others):
            return False
    return len(keys) == len(factors)


def columns_of(table: Array, use: Use, free: Sequence[int]) -> Array:
    """The free ones of coefficients, `(states, cells, free, outputs)`: an output a cell, or all of a vector."""
    states = int(np.prod(table.shape[: len(use.factor.parents)], dtype=int))
    outputs = table.shape[-2] if use.event_dim == 2 else 1
    table = table.reshape(states, -1, outputs, table.shape[-1])
    return jnp.swapaxes(table[..., rows_of(np.asarray(free))], -1, -2)


def is_regression(f: Factor) -> bool:
    """Whether a site is one regression on its latents for all rows, with coefficients that no data enter."""
    return f.pooled and not any(k[0] in ("data", "key") for k in f.graph.needs((f.name, "arg:loc")))


def states_apart(f: Factor) -> bool:
    """Whether every state of the discrete latents has coefficients of its own, so that its noise cancels from them."""
    read = f.graph.needs((f.name, "arg:loc"))
    return all(("latent", z.name) in read for z in f.parents)


def of_entries(f: Factor, unravel: Callable, entries: Array, params: Params) -> Array:
    """The coefficients of a site as a function of the entries of a block's parameters."""
    return coefficients_of(f, {**params, **unravel(entries)})


def coefficients_of(f: Factor, params: Params) -> Array:
    """Of one and of each latent in a site's mean, the last axis; the axes before are those of states and cells."""
    at, values = len(f.parents), {("param", n): v for n, v in params.items()}
    loc = jnp.moveaxis(jnp.asarray(f.argument("arg:loc", values, f.site.event_dim)), at, -1)
    return jnp.concatenate([loc[..., :1], loc[..., 1:] - loc[..., :1]], -1)


def columns(table: np.ndarray) -> tuple[int, ...]:
    """The coefficients that are free in every cell, each one entry that is read there alone; none where it is not so.

    `table` holds the derivative of each coefficient by each entry, `(cells, coefficients, entries)`.
    """
    reads = table != 0
    free = reads[0].any(-1)
    once = (reads.sum((0, 1)) == 1).all() and (reads[:, free].sum(-1) == 1).all()
    return tuple(np.flatnonzero(free).tolist()) if once and (reads.any(-1) == free).all() else ()


def components(reads: np.ndarray) -> np.ndarray | None:
    """Entries joined where one cell reads them; None where the largest group is no smaller than a third of all."""
    label = np.arange(reads.shape[1])
    for row in reads:
        if row.any():
            joined = np.isin(label, label[row])
            label[joined] = label[joined].min()
    groups = [np.flatnonzero(label == one) for one in np.unique(label)]
    size = max(len(g) for g in groups)
    if 3 * size > reads.shape[1]:
        return None
    return np.stack([np.pad(g, (0, size - len(g)), constant_values=reads.shape[1]) for g in groups])

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
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from autoem.e_step.tables.tabulate import Factor
from autoem.graph.programs import jit_once
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.location import LeastSquares, scaled_curvature, solved
from autoem.m_step.closed_form.priors import prior_of
from autoem.m_step.problem import Bundle, Params, Statistics, Use

NOISES = {f"arg:{name}" for name in ("scale", "covariance_matrix", "precision_matrix", "scale_tril")}
MAX_INCIDENCE = 20_000_000  # entries of the table of what reads what, up to which it is made


@dataclasses.dataclass(frozen=True, eq=False)
class Regression(LeastSquares):
    """All coefficients of regressions on latents; `free` are the columns of `z`, for each site, that parameters fill.

    Several sites, as the first step of a scan and the later ones, have the same coefficients and the same noise.
    """

    uses: tuple[Use, ...] = ()
    free: tuple[tuple[int, ...], ...] = ()

    source = "Rubin and Thayer 1982"

    @property
    def latex(self) -> str:
        return r"\hat{B} = \left(\sum_n E[x_n z_n^\top \mid x]\right)\left(\sum_n E[z_n z_n^\top \mid x]\right)^{-1}"

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state):
        flat, unravel = ravel_pytree({n: params[n] for n in self.names})

        def link(use: Use, free: np.ndarray, v: Array) -> Array:
            table = self.problem.arguments(use, {**params, **unravel(v)}, bundle)["loc"]
            return columns_of(table, use, free)

        parts = []
        for use, free in zip(self.uses, map(np.asarray, self.free), strict=True):
            _, unit = jax.jvp(functools.partial(link, use, free), (flat,), (jnp.ones_like(flat),))
            old = self.problem.arguments(use, params, bundle)["loc"]
            inner, residual = self.moments(use, free, old, self.problem.statistics(use, statistics)[0])
            parts.append((inner, residual / unit))
        step = self.as_solved(*jax.tree.map(lambda *x: jnp.stack(x).sum(0), *parts))
        place = functools.partial(link, self.uses[0], np.asarray(self.free[0]))
        unit = jax.jvp(place, (flat,), (jnp.ones_like(flat),))[1]
        (step,) = jax.vjp(place, flat)[1](step / unit)
        return unravel(jnp.where(jnp.isfinite(step).all(), flat + step, flat)), state

    @property
    def alike(self) -> bool:
        """Whether every output weighs its rows the same."""
        return not any(u.factor.site.masked or u.factor.site.scaled for u in self.uses)

    def moments(self, use: Use, free: np.ndarray, old: Array, t: Array) -> tuple[Array, Array]:
        """Expected products of the free columns, for all cells or each, and of these with the residuals."""
        count, width = old.shape[-1], round(t.shape[-1] ** 0.5)
        states = int(np.prod(old.shape[: len(use.factor.parents)], dtype=int))
        table = t.reshape(states, -1, width, width)
        known = table[:, :1, :count, :count] if self.alike else table[..., :count, :count]
        outputs = width - count
        before = jnp.swapaxes(old.reshape(states, -1, outputs, count), -1, -2)
        residual = table[..., :count, count:] - known @ before
        return known[..., free[:, None], free[None, :]], residual[..., free, :]

    def as_solved(self, inner: Array, slope: Array) -> Array:
        """The solution of the normal equations, all outputs of one matrix together."""
        shape = slope.shape
        if self.alike:
            slope = jnp.swapaxes(slope, 1, 2).reshape(shape[0], 1, shape[2], -1)
        scaled, unit = scaled_curvature(-inner)
        found = solved(scaled, slope / unit[..., None]) / unit[..., None]
        if self.alike:
            found = jnp.swapaxes(found.reshape(shape[0], shape[2], shape[1], shape[3]), 1, 2)
        return found


def specialised(block: AbstractBlock, params: Params) -> AbstractBlock:
    """The same update at less cost, where a block's sites are regressions on latents with coefficients of its own."""
    if not isinstance(block, LeastSquares):
        return block
    factors = [block.problem.factors[n] for n in block.problem.touched(block.names)]
    if not all(is_regression(f) for f in factors):
        return block
    flat, unravel = ravel_pytree({n: jnp.asarray(params[n]) for n in block.names})
    tables = []
    for f in factors:
        if int(np.prod(f.graph.shape((f.name, "arg:loc")), dtype=int)) * flat.size > MAX_INCIDENCE:
            return block

        def coefficients(v: Array, f=f) -> Array:
            return coefficients_of(f, {**params, **unravel(v)})

        table = np.asarray(jit_once(jax.jacobian(coefficients))(flat))
        tables.append(table.reshape(-1, *table.shape[-2:]))
    free = [columns(t) for t in tables]
    if block.maximises and all(free) and not any(prior_of(n, block.problem.factors) for n in block.names):
        filled = [t[:, f] for t, f in zip(tables, free, strict=True)]
        same = all(np.array_equal(t, filled[0]) for t in filled)
        if same and (len(factors) == 1 or one_noise(factors, params)):
            uses = tuple(Use(f, "loc") for f in factors)
            return Regression(block.names, block.problem, block.reason, uses=uses, free=tuple(free))
    if any(f.parents or f.site.event_dim for f in factors) or len({t.shape[1] for t in tables}) > 1:
        return block
    return dataclasses.replace(block, groups=components(np.concatenate([np.any(t, axis=1) for t in tables])))


def one_noise(factors: Sequence[Factor], params: Params) -> bool:
    """Whether sites have one noise, whatever the parameters: tried where they are, and at random values near by."""
    keys = [(f.name, k) for f in factors for n, k in f.graph.outputs if n == f.name and k in NOISES]
    graph = factors[0].graph
    if any(k[0] != "param" for k in graph.needs(*keys)):
        return False
    rng = np.random.default_rng(5)
    near = {n: v * (1 + 0.1 * rng.random(np.shape(v))) for n, v in params.items()}
    read = jit_once(lambda p: graph.evaluate(keys, {("param", n): v for n, v in p.items()}))
    for values in map(read, (dict(params), near)):
        first, *others = map(np.asarray, values)
        if any(np.any(first != v) for v in others):
            return False
    return len(keys) == len(factors)


def columns_of(table: Array, use: Use, free: np.ndarray) -> Array:
    """The free ones of coefficients, `(states, cells, free, outputs)`: an output a cell, or all of a vector."""
    states = int(np.prod(table.shape[: len(use.factor.parents)], dtype=int))
    outputs = table.shape[-2] if use.event_dim == 2 else 1
    table = table.reshape(states, -1, outputs, table.shape[-1])
    return jnp.swapaxes(table[..., free], -1, -2)


def is_regression(f: Factor) -> bool:
    """Whether a site is one regression on its latents for all rows, with coefficients that no data enter."""
    return f.pooled and not any(k[0] in ("data", "key") for k in f.graph.needs((f.name, "arg:loc")))


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

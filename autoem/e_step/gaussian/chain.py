"""Gaussian latents of a scan as a block of the E-step: its sites' quadratics by step, filtered and smoothed.

In: the factors of one chain whose states are continuous, with the latents outside it that its first steps read. Out:
as for `gaussian`: the integral, the posterior's moments, and the nodes of every factor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.elimination.layout import Table
from autoem.e_step.gaussian import kalman
from autoem.e_step.gaussian.beside import at_rows, at_steps
from autoem.e_step.gaussian.pooled import pooled_statistics
from autoem.e_step.gaussian.quadratic import DIM, OTHER, Residual, filled, quadratic_terms, residuals
from autoem.e_step.gaussian.settled import FROM, backward_alike, forward_alike
from autoem.e_step.tables.completions import NODES, gaussian_nodes, rows_of, square_of
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named, add, contract, named
from autoem.ir import Chain, Continuous, Latent, at_lag, at_step


class ChainMoments(NamedTuple):
    """What the filter leaves, and what the smoother makes of it."""

    swept: kalman.Swept
    smoothed: kalman.Smoothed


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianChain:
    """Continuous latents that a scan carries from step to step.

    Attributes:
        paths: the latents of the scan, one cell a step.
        outside: latents that only its first steps read.
        factors: the sites that read any of them.
        plates: plates of the sequences, of sizes `shape`.
        sizes: sizes of all plates.
        beside: sites outside of the scan whose rows read the path by index; see `beside`.
    """

    chain: Chain
    paths: tuple[Continuous, ...]
    outside: tuple[Continuous, ...]
    factors: tuple[Factor, ...]
    plates: tuple[str, ...]
    shape: tuple[int, ...]
    sizes: Mapping[str, int]
    beside: frozenset[str] = frozenset()

    discrete: tuple[Latent, ...] = ()

    strategy = "exact"
    source = "Kalman 1960; Rauch, Tung and Striebel 1965 (Gaussian posteriors along a chain)"

    @property
    def states(self) -> tuple[str, ...]:
        return ()

    @property
    def members(self) -> tuple[Continuous, ...]:
        return (*self.outside, *self.paths)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.members)

    @property
    def dim(self) -> int:
        """Coordinates of one step."""
        return sum(m.dim for m in self.paths)

    @property
    def extra(self) -> int:
        """Coordinates outside the chain."""
        return sum(m.dim for m in self.outside)

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """Where each latent that a site reads begins: outside and first steps, in a window, or in a step."""
        out, start = {}, 0
        for m in self.outside:
            out[m.name], start = start, start + m.dim
        start = 0
        for m in self.paths:
            out[m.name] = start
            for h in range(self.chain.lag):
                out[at_step(m.name, h)] = self.extra + h * self.dim + start
            for i in range(self.chain.lag + 1):
                out[at_lag(m.name, i)] = (self.chain.lag - i) * self.dim + start
            start += m.dim
        return out

    @property
    def cells(self) -> tuple[int, ...]:
        """Steps of the path, and its sequences."""
        return (self.chain.length, *self.shape)

    def kind(self, f: Factor) -> str:
        """The plate of steps that a factor stands in, or brings its rows to; empty for what the start alone reads."""
        if f.name in self.beside:
            return self.chain.time
        times = (self.chain.time, self.chain.bulk)
        return next((a for a in f.site.axes if a in times), "")

    def where(self, f: Factor) -> np.ndarray:
        """Coordinates of a factor's latents: at the start, in a window, or in a step."""
        assert f.completions is not None
        places = self.places
        return np.concatenate([places[m.name] + np.arange(m.dim) for m in f.completions.members])

    def axes(self, f: Factor) -> tuple[str, ...]:
        """Axes of a factor along which it has terms of its own: steps and sequences, or its rows beside the chain."""
        if f.name in self.beside:
            return f.site.plates
        kind = self.kind(f)
        return (*((kind,) if kind else ()), *self.plates)

    def own_terms(self, f: Factor, r: Residual) -> tuple[Array, Array, Named]:
        """Precision and shift of a factor's latents, and its constant, along its axes; of size one where alike."""
        keep = self.axes(f)
        precision, shift, constant = quadratic_terms(f, r, keep)
        count = len(self.where(f))
        p, s = precision.to((*keep, DIM, OTHER)), shift.to((*keep, DIM))
        p = jnp.broadcast_to(p, (*p.shape[: len(keep)], count, count))
        return p, jnp.broadcast_to(s, (*s.shape[: len(keep)], count)), constant

    def terms(self, f: Factor, r: Residual, cells: Mapping[str, Array]) -> tuple[Array, Array, Named]:
        """Precision and shift of a factor's latents `(steps, *batch, ...)`, and its constant for every sequence."""
        p, s, constant = self.own_terms(f, r)
        if f.name in self.beside:
            p, s = (self.flat(f, v) for v in (p, s))
            p, s = (at_steps(f, v, self.cells, cells) for v in (p, s))
        return p, s, self.by_sequence(f, constant, cells)

    def by_sequence(self, f: Factor, value: Named, cells: Mapping[str, Array]) -> Named:
        """A quantity along a factor's axes, summed over those of each sequence."""
        if f.name in self.beside:
            home = at_steps(f, self.flat(f, value.to(f.site.plates)), self.cells, cells)
            return named(jnp.broadcast_to(home, self.cells).sum(0), self.plates)
        kind = self.kind(f)
        steps = self.sizes[kind] if kind and kind not in value.axes else 1
        return Named(value.sum((kind,)).array * steps, tuple(a for a in value.axes if a != kind))

    def integrate(self, values: Mapping[Any, Any], rows: Mapping[str, Rows], cells: Mapping[str, Array]):
        """`(table, moments)`: the integral over the latents, and their posterior.

        In single precision squares of observations would cancel: there all is done anew about the means found first.
        """
        found = residuals(self.factors, values, rows)
        value, moments = self.over(found, cells)
        if jnp.result_type(float) != jnp.float64:
            about = jax.lax.stop_gradient(moments)
            value, moments = self.over([(f, self.less(f, r, about, cells)) for f, r in found], cells)
            moments = self.moved(moments, about.smoothed)
        return Table(value, frozenset(), frozenset(self.plates)), moments

    def flat(self, f: Factor, value: Array) -> Array:
        """A quantity along the plates of a factor as one of its rows, or of one row where all are alike."""
        axes = len(f.site.plates)
        rest, sizes = value.shape[axes:], [self.sizes[p] for p in f.site.plates]
        if all(s == 1 for s in value.shape[:axes]):
            return value.reshape(1, *rest)
        return jnp.broadcast_to(value, (*sizes, *rest)).reshape(-1, *rest)

    def less(self, f: Factor, r: Residual, about: ChainMoments, cells: Mapping[str, Array]) -> Residual:
        """A site's residual where the latents are counted from their means in `about`."""
        mean, _, axes = self.of_factor(f, about, cells)
        at = named(mean, (*axes, DIM))
        keep = tuple(a for a in dict.fromkeys((*r.slope.axes, *at.axes)) if a != DIM)
        away = contract(keep, r.slope, at)
        return dataclasses.replace(r, y=add(r.y, Named(-away.array, away.axes)))

    def moved(self, moments: ChainMoments, by: kalman.Smoothed) -> ChainMoments:
        """Moments of latents that were counted from the means in `by`, counted from zero."""
        (start, steps, end, value), s, d = moments.swept, moments.smoothed, self.dim
        last = by.mean[-1][..., d:] if len(by.mean) else by.start_mean[..., self.extra :]
        swept = kalman.Swept(
            kalman.moved(start, by.start_mean), kalman.moved(steps, by.mean), kalman.moved(end, last), value
        )
        return ChainMoments(swept, s._replace(start_mean=s.start_mean + by.start_mean, mean=s.mean + by.mean))

    def over(self, sites: Sequence[tuple[Factor, Residual]], cells: Mapping[str, Array]) -> tuple[Named, ChainMoments]:
        """The integral of sites that are given by their residuals, and the posterior."""
        lag, steps = self.chain.lag, self.chain.length - self.chain.lag
        size, window = self.extra + lag * self.dim, (lag + 1) * self.dim
        real = jnp.result_type(float)
        start = jnp.zeros((*self.shape, size + 1, size + 1), real)
        found = [(f, *self.terms(f, r, cells)) for f, r in sites]
        constants = [constant for *_, constant in found]
        later: list[tuple[np.ndarray, Array, Array]] = []
        for f, p, s, _ in found:
            where, kind = self.where(f), self.kind(f)
            if not kind:
                start = added(start, where, p, s)
            elif kind == self.chain.bulk:
                later.append((where, p, s))
            else:
                for h in range(lag):
                    start = added(start, self.extra + h * self.dim + where, *(x[min(h, len(x) - 1)] for x in (p, s)))
                p, s = (x[lag:] if len(x) > 1 else x for x in (p, s))
                later.append((lag * self.dim + where, p, s))
        alike = steps >= FROM and all(len(p) == 1 for _, p, _ in later)
        shape = (1 if alike else steps, *self.shape, window, window)
        precision, shift = jnp.zeros(shape, real), jnp.zeros((steps, *self.shape, window), real)
        for where, p, s in later:
            precision = precision.at[..., where[:, None], where[None, :]].add(p)
            shift = shift.at[..., where].add(s)
        if alike:
            swept, done = forward_alike(start, precision[0], shift, self.extra, self.dim)
            smoothed = backward_alike(swept, done, self.dim)
        else:
            zero = jnp.zeros((steps, *self.shape), real)
            swept = kalman.forward(start, kalman.augmented(precision, shift, zero), self.extra, self.dim)
            smoothed = kalman.backward(swept, self.dim)
        return add(named(swept.value, self.plates), *constants), ChainMoments(swept, smoothed)

    def path(self, moments: ChainMoments) -> tuple[Array, Array]:
        """Mean `(steps, *batch, d)` and covariance of the state at every step."""
        s, lag, d = moments.smoothed, self.chain.lag, self.dim
        mean, covariance = [s.mean[..., lag * d :]], [s.covariance[..., lag * d :, lag * d :]]
        for h in reversed(range(lag)):
            span = slice(self.extra + h * d, self.extra + (h + 1) * d)
            mean.insert(0, s.start_mean[None, ..., span])
            covariance.insert(0, s.start_covariance[None, ..., span, span])
        return jnp.concatenate(mean), jnp.concatenate(covariance)

    def of_factor(
        self, f: Factor, moments: ChainMoments, cells: Mapping[str, Array]
    ) -> tuple[Array, Array, tuple[str, ...]]:
        """Mean and covariance of a factor's latents, and the axes of their cells."""
        where, kind, s = self.where(f), self.kind(f), moments.smoothed
        if f.name in self.beside:
            sizes, lead = [self.sizes[p] for p in f.site.plates], len(self.cells)
            mean, covariance = (at_rows(f, v, lead, sizes, cells) for v in self.path(moments))
            return mean[..., rows_of(where)], square_of(covariance, where), f.site.plates
        if not kind:
            mean, covariance, axes = s.start_mean, s.start_covariance, self.plates
        elif kind == self.chain.bulk:
            mean, covariance, axes = s.mean, s.covariance, (kind, *self.plates)
        else:
            (mean, covariance), axes = self.path(moments), (kind, *self.plates)
        return mean[..., rows_of(where)], square_of(covariance, where), axes

    def complete(self, f: Factor, moments: ChainMoments, cells: Mapping[str, Array]) -> tuple[Array, Named | None]:
        """The factor's nodes as its arguments want them, and its own latent's values there."""
        mean, covariance, axes = self.of_factor(f, moments, cells)
        return filled(f, named(gaussian_nodes(mean, covariance), (NODES, *axes, DIM)))

    def pooled(self, f: Factor, rows: Rows, moments: ChainMoments, weight: Named, cells: Mapping[str, Array]):
        """Expected statistics of a site that is one regression on its latents for all steps."""
        mean, covariance, axes = self.of_factor(f, moments, cells)
        kind, own = self.kind(f), (weight, rows.mask, rows.scale)
        if f.name in self.beside:
            axes_of = axes
        elif kind and all(w is None or kind not in w.axes for w in own):  # steps count alike: their sum will do
            covariance, axes_of = self.total(f, moments) / self.sizes[kind], axes[1:]
        else:
            axes_of = axes
        covariance = named(covariance, (*axes_of, DIM, OTHER))
        return pooled_statistics(f, rows, named(mean, (*axes, DIM)), covariance, weight)

    def total(self, f: Factor, moments: ChainMoments) -> Array:
        """Covariances of a factor's latents, summed over its steps."""
        s, lag, d = moments.smoothed, self.chain.lag, self.dim
        if self.kind(f) == self.chain.bulk:
            return square_of(s.total, self.where(f))
        total = s.total[..., lag * d :, lag * d :]
        for h in range(lag):
            span = slice(self.extra + h * d, self.extra + (h + 1) * d)
            total = total + s.start_covariance[..., span, span]
        return square_of(total, self.where(f))

    def coordinates(self, f: Factor, latents: Mapping[str, Array], cells: Mapping[str, Array]) -> Named:
        """Given values of the latents as the coordinates of a factor's cells."""
        assert f.completions is not None
        kind, parts = self.kind(f), []
        for m in f.completions.members:
            base = next(n for n in self.names if m.name == n or m.name.startswith((f"{n}@", f"{n}[")))
            value = latents[base]
            if f.name in self.beside:
                sizes = [self.sizes[p] for p in f.site.plates]
                parts.append(at_rows(f, jnp.reshape(value, (*self.cells, m.dim)), len(self.cells), sizes, cells))
                continue
            if m.name.startswith(f"{base}@"):
                back = int(m.name[len(base) + 1 :])
                value = value[self.chain.lag - back : self.chain.length - back]
            elif m.name.startswith(f"{base}["):
                value = value[int(m.name[len(base) + 1 : -1])]
            lead = (*((value.shape[0],) if kind else ()), *self.shape)
            parts.append(jnp.reshape(value, (*lead, m.dim)))
        return named(jnp.concatenate(parts, -1), (*self.axes(f), DIM))

    def at(self, f: Factor, latents: Mapping[str, Array], cells: Mapping[str, Array]) -> tuple[Array, Named | None]:
        """One node for the factor, where the latents have given values."""
        return filled(f, self.coordinates(f, latents, cells))

    def density_at(self, latents: Mapping[str, Array], values, rows, cells) -> Named:
        """Log density of all sites by the quadratics that are integrated."""
        total = Named(jnp.zeros(()), ())
        for f, r in residuals(self.factors, values, rows, proper=False):
            keep, (p, s, constant) = self.axes(f), self.own_terms(f, r)
            w = self.coordinates(f, latents, cells)
            other = Named(w.array, tuple(OTHER if a == DIM else a for a in w.axes))
            linear = contract(keep, named(s, (*keep, DIM)), w)
            square = contract(keep, named(p, (*keep, DIM, OTHER)), w, other)
            parts = (constant, linear, Named(-0.5 * square.array, square.axes))
            total = add(total, *(self.by_sequence(f, part, cells) for part in parts))
        return total

    def by_row(self, f: Factor, value: Named, cells: Mapping[str, Array]) -> Named:
        """A quantity of the sequences as the rows of a factor see it."""
        del f, cells
        return value

    def constant(self, f: Factor, value: Named, cells: Mapping[str, Array]) -> Named:
        """A quantity of the rows of a factor, summed over those of each sequence."""
        keep = self.axes(f)
        absent = [s for a, s in zip(f.site.axes, f.site.shape, strict=True) if a not in (*value.axes, *keep)]
        out = value.sum(a for a in value.axes if a not in keep)
        return self.by_sequence(f, Named(out.array * float(np.prod(absent, dtype=float)), out.axes), cells)

    def mixed(self, moments: ChainMoments, weight: Named) -> ChainMoments:
        """The same with the discrete latents beside it summed out: there are none."""
        del weight
        return moments

    def marginal(self, m: Continuous, moments: ChainMoments) -> tuple[Array, Array]:
        """Mean `(*shape, *event)` and covariance `(*shape, dim, dim)` of one latent in every of its cells."""
        where = self.places[m.name] + np.arange(m.dim)
        s = moments.smoothed
        mean, covariance = (s.start_mean, s.start_covariance) if m in self.outside else self.path(moments)
        return mean[..., where].reshape(*m.shape, *m.event), square_of(covariance, where)

    def draw(self, moments: ChainMoments, chosen: Mapping[str, Array], key: Array | None) -> dict[str, Array]:
        """Values of the latents: drawn with `key`, or their mean without."""
        del chosen
        if key is None:
            return {m.name: self.marginal(m, moments)[0] for m in self.members}
        start, later = kalman.draw(moments.swept, self.dim, key)
        lag, d = self.chain.lag, self.dim
        first = [start[None, ..., self.extra + h * d : self.extra + (h + 1) * d] for h in range(lag)]
        path, out = jnp.concatenate([*first, later]), {}
        for m in self.members:
            whole = start if m in self.outside else path
            where = self.places[m.name] + np.arange(m.dim)
            out[m.name] = whole[..., where].reshape(*m.shape, *m.event)
        return out

    def reason(self, m: Continuous) -> str:
        """How the latent is treated, in words."""
        if m in self.outside:
            flat = "flat over all numbers: " if m.flat else ""
            return f"Gaussian: {flat}the chain of {', '.join(p.name for p in self.paths)} starts from it"
        with_it = [p.name for p in self.paths if p is not m]
        together = f", together with {', '.join(with_it)}" if with_it else ""
        return (
            f"Gaussian, carried along {self.chain.length:,} steps{together}: every site that reads it is Normal with a "
            f"mean affine in it; Kalman filter and smoother, {self.dim} dimension{'s' * (self.dim > 1)} a step"
        )


def added(matrix: Array, where: np.ndarray, precision: Array, shift: Array) -> Array:
    """Terms of a few coordinates added to augmented quadratics."""
    last = matrix.shape[-1] - 1
    matrix = matrix.at[..., where[:, None], where[None, :]].add(precision)
    return matrix.at[..., where, last].add(shift).at[..., last, where].add(shift)

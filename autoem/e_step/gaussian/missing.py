r"""Vectors of a multivariate normal of which some entries are missing: integrated exactly, pattern by pattern.

With `o` the entries that a row shows and `m` the others,

.. math:: \hat x_m = \mu_m + \Sigma_{mo} \Sigma_{oo}^{-1} (x_o - \mu_o), \qquad
   V_{mm} = \Sigma_{mm} - \Sigma_{mo} \Sigma_{oo}^{-1} \Sigma_{om},

and the expected statistics are those of the completed rows with `V` added to their squares. Matrices are factorised
once for each pattern of missing entries, not for each row. In: one such site, its cells and its rows. Out: a table with
the density of what was seen, the completed rows, and expected statistics.

References:
    Little and Rubin 2019, "Statistical analysis with missing data", section 11.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.elimination.layout import Table
from autoem.e_step.gaussian import patterns
from autoem.e_step.tables.completions import root
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named, named, pick
from autoem.ir import Continuous, Latent

SOURCE = "Little and Rubin 2019, section 11.2 (missing entries of a multivariate normal)"
LOG_2PI = math.log(2 * math.pi)


class Completed(NamedTuple):
    """Completed rows `(*states, rows, d)`, and covariances of their patterns, or of rows where `pattern` is None.

    Both are in units of the rows, which are `spread` and counted from `centre` where these are given.
    """

    mean: Array
    covariance: Array
    pattern: Array | None
    centre: Array | None
    spread: Array | None

    @property
    def of_rows(self) -> Array:
        """Covariances of every row."""
        return self.covariance if self.pattern is None else self.covariance[..., self.pattern, :, :]


@dataclasses.dataclass(frozen=True, eq=False)
class MissingEntries:
    """A multivariate normal site some of whose vectors are seen in part.

    Attributes:
        factor: the site.
        member: its completed value, as a latent of the site's plates.
        shape: sizes of the plates of the table.
    """

    factor: Factor
    member: Continuous
    plates: tuple[str, ...]
    shape: tuple[int, ...]

    strategy = "exact"
    source = SOURCE

    @property
    def factors(self) -> tuple[Factor, ...]:
        return (self.factor,)

    @property
    def members(self) -> tuple[Continuous, ...]:
        return (self.member,)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.member.name,)

    @property
    def discrete(self) -> tuple[Latent, ...]:
        return self.factor.latents

    @property
    def states(self) -> tuple[str, ...]:
        return tuple(z.name for z in self.discrete)

    def patterns(self, cells: Mapping[str, Array]) -> tuple[Array, Array]:
        """Which entries each pattern shows `(patterns, d)`, and the pattern of every row."""
        name = self.factor.name
        return cells[f"{name}·patterns"], cells[f"{name}·pattern"].ravel()

    def arguments(self, values: Mapping[Any, Any], rows: Rows) -> tuple[Array, Array, Array]:
        """Locations `(*states, rows or 1, d)`, covariances `(*states, d, d)` and observed values `(rows, d)`."""
        f = self.factor
        args = f.arguments(values, rows)
        loc, (form, matrix) = args["loc"], next((k, v) for k, v in args.items() if k != "loc")
        lead, batch = len(f.parents), tuple(range(len(f.parents), loc.ndim - 1))
        if any(loc.shape[i] > 1 for i in batch):
            loc = jnp.broadcast_to(loc, (*loc.shape[:lead], *f.site.shape, loc.shape[-1]))
        loc = loc.reshape(*loc.shape[:lead], -1, loc.shape[-1])
        matrix = matrix.reshape(*matrix.shape[:lead], *matrix.shape[-2:])
        if form == "precision_matrix":
            matrix = jnp.linalg.inv(matrix)
        elif form == "scale_tril":
            matrix = matrix @ jnp.swapaxes(matrix, -1, -2)
        x = f.observations(rows)
        value = x.to((*f.site.axes, x.axes[0])).reshape(-1, loc.shape[-1])
        return loc, matrix, value

    def integrate(self, values: Mapping[Any, Any], rows: Mapping[str, Rows], cells: Mapping[str, Array]):
        """`(table, moments)`: the density of what was seen, and the rows completed."""
        f, own = self.factor, rows[self.factor.name]
        loc, covariance, x = self.arguments(values, own)
        if (sums := self.sums(cells)) is not None and loc.shape[:-1] == (1,) and covariance.ndim == 2:
            return self.by_pattern(loc[0], covariance, own, sums)
        seen, index = self.patterns(cells)
        here = seen[index]
        eye = jnp.eye(x.shape[-1], dtype=x.dtype)
        both = seen[:, :, None] * seen[:, None, :]
        matrix = covariance[..., None, :, :] * both + eye * (1 - seen)[:, None, :]
        lower = jnp.linalg.cholesky(matrix)
        white = jax.scipy.linalg.solve_triangular(lower, jnp.broadcast_to(eye, matrix.shape), lower=True)
        inverse = (jnp.swapaxes(white, -1, -2) @ white) * both
        log_det = 2 * jnp.log(jnp.diagonal(lower, axis1=-2, axis2=-1)).sum(-1)
        residual = (x - loc) * here
        pulled = jnp.einsum("...rij,...rj->...ri", inverse[..., index, :, :], residual)
        absent = self.absent(seen, own)
        value = -0.5 * (residual * pulled).sum(-1) - 0.5 * log_det[..., index] + absent[index]
        filled = jnp.where(here > 0, x, loc + jnp.einsum("...ij,...rj->...ri", covariance, pulled))
        wide = covariance[..., None, :, :]
        spread = (wide - wide @ inverse @ wide) * ((1 - seen)[:, :, None] * (1 - seen)[:, None, :])
        table = named(value.reshape(*value.shape[:-1], *f.site.shape), (*(z.name for z in f.parents), *f.site.axes))
        table = self._counted(table, own)
        table = table.sum(a for a in table.axes if a not in (*self.states, *self.plates))
        plates = f.plates if f.latents else frozenset(self.plates)
        moments = Completed(filled, spread, index, own.centre, own.spread)
        return Table(table, frozenset(self.states), plates), moments

    def absent(self, seen: Array, rows: Rows) -> Array:
        """What the site's constants say, for each pattern, of entries that are not there."""
        each = 0.5 * LOG_2PI + (0.0 if rows.spread is None else jnp.log(rows.spread))
        return ((1 - seen) * each).sum(-1)

    def sums(self, cells: Mapping[str, Array]) -> list[Array] | None:
        """Which entries each pattern shows and sums over its rows, where a fit has taken them."""
        names = [f"{self.factor.name}·{part}" for part in ("seen", "count", "total", "square")]
        return [cells[n] for n in names] if names[0] in cells else None

    def taken(self, rows: Rows, cells: Mapping[str, Array]) -> dict[str, Array]:
        """Those sums as cells, where the rows of the fit are all alike; nothing where they are not, or too many."""
        f = self.factor
        weighed = rows.scale is not None or rows.weight is not None
        seen, index = self.patterns(cells)
        if f.parents or weighed or len(seen) > patterns.MAX_PATTERNS or seen.shape[-1] > patterns.MAX_WIDTH:
            return {}
        x = f.observations(rows)
        value = np.asarray(x.to((*f.site.axes, x.axes[0]))).reshape(-1, seen.shape[-1])
        index = np.asarray(index)
        if rows.mask is not None:
            kept = np.broadcast_to(np.asarray(rows.mask.to(f.site.axes)) > 0, f.site.shape).ravel()
            value, index = value[kept], index[kept]
        parts = patterns.sums_of(value, np.asarray(seen), index)
        named_parts = zip(("seen", "count", "total", "square"), (np.asarray(seen).T, *parts), strict=True)
        return {f"{f.name}·{part}": jnp.asarray(v) for part, v in named_parts}

    def by_pattern(
        self, loc: Array, covariance: Array, rows: Rows, sums: list[Array]
    ) -> tuple[Table, patterns.Completed]:
        """As `integrate`, from sums over the rows of each pattern: a table with the mean over the rows."""
        seen, count, *_ = sums
        value, moments = patterns.completed(loc, covariance, *sums)
        absent = self.absent(seen.T, rows)
        cells = float(np.prod(self.shape, dtype=float))
        return Table(Named((value + (count * absent).sum()) / cells, ()), frozenset(), frozenset(self.plates)), moments

    def _counted(self, value: Named, rows: Rows) -> Named:
        for times in (rows.mask, rows.scale):
            if times is not None:
                axes = tuple(dict.fromkeys((*value.axes, *times.axes)))
                value = Named(value.to(axes) * times.to(axes), axes)
        return value

    def constant(self, f: Factor, value: Named, cells: Mapping[str, Array]) -> Named:
        """A quantity of the rows, summed over those that the table does not tell apart."""
        del f, cells
        return value.sum(a for a in value.axes if a not in self.plates)

    def filled(self, moments: Completed, rows: Rows) -> Rows:
        """The rows with expected values in place of what is missing, for each state."""
        f, d = self.factor, moments.mean.shape[-1]
        lead = moments.mean.shape[:-2]
        array = moments.mean.reshape(*lead, *f.site.shape, d)
        value = named(array, (*(z.name for z in f.parents), *f.site.axes, "event0"))
        order = ("event0", *(a for a in value.axes if a != "event0"))
        return dataclasses.replace(rows, value=Named(value.to(order), order), ready=True)

    def summed_statistics(self, shapes: tuple[Any, Any], moments: patterns.Completed) -> tuple[Array, Array]:
        """Expected statistics in the shapes of the factor's, from sums over all completed rows."""
        i, j = np.triu_indices(len(moments.first))
        features = jnp.concatenate([moments.first, moments.second[i, j]])
        t, n = shapes
        return features.reshape(t.shape), jnp.broadcast_to(-moments.rows / n.size, n.shape)

    def spread_statistics(self, shape: tuple[int, ...], weight: Named, moments: Completed, rows: Rows) -> Array:
        """What the missing entries' covariances add to expected squares, in the shape of the factor's statistics."""
        f, index = self.factor, moments.pattern
        assert index is not None
        d = moments.mean.shape[-1]
        i, j = np.triu_indices(d)
        squares = moments.covariance[..., i, j]
        features = jnp.concatenate([jnp.zeros((*squares.shape[:-1], d), squares.dtype), squares], -1)
        states = tuple(z.name for z in f.parents)
        counts = self._counted(weight, rows).to((*states, *f.site.axes))
        counts = jnp.broadcast_to(counts, (*counts.shape[: len(states)], *f.site.shape))
        lead = jnp.broadcast_shapes(counts.shape[: len(states)], features.shape[:-2])
        counts = jnp.broadcast_to(counts.reshape(*counts.shape[: len(states)], -1), (*lead, index.size))
        features = jnp.broadcast_to(features, (*lead, *features.shape[-2:]))
        if all(s == 1 for s in shape[len(states) : -1]):
            by_pattern = jax.ops.segment_sum(jnp.moveaxis(counts, -1, 0), index, features.shape[-2])
            total = jnp.einsum("p...,...pf->...f", by_pattern, features)
            return total.reshape(*lead, *(1,) * len(f.site.axes), -1)
        each = (counts[..., None] * features[..., index, :]).reshape(*lead, *f.site.shape, -1)
        gone = tuple(k for k, s in enumerate(shape[:-1]) if s == 1 and each.shape[k] > 1)
        return each.sum(gone, keepdims=True)

    def mixed(self, moments: Completed, weight: Named) -> Completed:
        """Mean and covariance of every row, the discrete latents summed out."""
        f = self.factor
        states = tuple(z.name for z in f.parents)
        lead = tuple(range(len(states)))
        w = weight.to((*states, *f.site.axes)) if states else jnp.ones((1,) * len(f.site.axes))
        w = jnp.broadcast_to(w, (*w.shape[: len(states)], *f.site.shape)).reshape(*w.shape[: len(states)], -1)
        mean = (w[..., None] * moments.mean).sum(lead)
        away = moments.mean - mean
        second = moments.of_rows + away[..., :, None] * away[..., None, :]
        whole = (w[..., None, None] * second).sum(lead)
        return Completed(mean, whole, None, moments.centre, moments.spread)

    def marginal(self, m: Continuous, moments: Completed) -> tuple[Array, Array]:
        """Mean `(*shape, d)` and covariance of every row, in the data's own units."""
        mean, covariance = moments.mean, moments.of_rows
        if moments.spread is not None and moments.centre is not None:
            mean = mean * moments.spread + moments.centre
            covariance = covariance * moments.spread[:, None] * moments.spread[None, :]
        return mean.reshape(*m.shape, *m.event), covariance.reshape(*m.shape, m.dim, m.dim)

    def draw(self, moments: Completed, chosen: Mapping[str, Array], key: Array | None) -> dict[str, Array]:
        """The rows with what is missing drawn with `key`, or at its mean without, given the discrete latents."""
        f = self.factor
        states, d = tuple(z.name for z in f.parents), moments.mean.shape[-1]
        mean = named(moments.mean.reshape(*moments.mean.shape[:-2], *f.site.shape, d), (*states, *f.site.axes, "·i"))
        full = moments.of_rows
        full = named(full.reshape(*full.shape[:-3], *f.site.shape, d, d), (*states, *f.site.axes, "·i", "·j"))
        for z in self.discrete:
            at = named(jnp.asarray(chosen[z.name]), z.axes)
            mean, full = pick(mean, z.name, at), pick(full, z.name, at)
        vector = jnp.broadcast_to(mean.to((*f.site.axes, "·i")), (*f.site.shape, d))
        if key is not None:
            noise = jax.random.normal(key, vector.shape, vector.dtype)
            vector = vector + jnp.einsum("...ij,...j->...i", root(full.to((*f.site.axes, "·i", "·j"))), noise)
        if moments.spread is not None and moments.centre is not None:
            vector = vector * moments.spread + moments.centre
        return {self.member.name: vector}

    def reason(self, m: Continuous) -> str:
        """How the missing entries are treated, in words."""
        each = f", for each state of {', '.join(self.states)}" if self.states else ""
        return f"vectors seen in part: conditional normals of the missing entries, pattern by pattern{each}"


def patterns_of(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct patterns of what is not NaN, as numbers, and the pattern of every row."""
    seen = ~np.isnan(value.reshape(-1, value.shape[-1]))
    words = np.packbits(np.pad(seen, [(0, 0), (0, -seen.shape[1] % 64)]), axis=1).view(np.uint64)
    if words.shape[1] == 1:  # rows as numbers are sorted far faster than rows as lists
        _, first, index = np.unique(words[:, 0], return_index=True, return_inverse=True)
    else:
        _, first, index = np.unique(words, axis=0, return_index=True, return_inverse=True)
    return seen[first].astype(float), index.reshape(value.shape[:-1])

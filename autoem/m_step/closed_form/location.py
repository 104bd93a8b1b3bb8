r"""Locations: `Q` is quadratic in them, so one Newton step from anywhere is the exact maximum.

`Mean` is the case in which every argument reads one entry of the parameter (a selection, possibly scaled or shifted by
data): the step separates, and is the weighted mean

.. math:: \mu_j \leftarrow \mu_j + \sum_c J_{cj} g_c \Big/ \sum_c J_{cj}^2 h_c

with `g` and `h` the slope and curvature of each cell. Statistics enter as residuals about the old value, so nothing
cancels. `LeastSquares` is the general affine case (regression): the normal equations of all jointly affine parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from autoem.families import Location
from autoem.graph.programs import jit_once
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.counting import fit, latex_name
from autoem.m_step.closed_form.domain import REAL, Domain, in_box
from autoem.m_step.closed_form.priors import prior_of, prior_slope
from autoem.m_step.problem import Bundle, Params, Statistics, Use
from autoem.passes.link import Declined, Linear
from autoem.passes.terms import terms_of

MAX_DENSE = 2048
MAX_INCIDENCE = 20_000_000  # entries of the table of what reads what, up to which it is made


@dataclasses.dataclass(frozen=True, eq=False)
class Mean(AbstractBlock):
    """Weighted mean of every entry of one location parameter, or the nearest that its `domain` allows."""

    uses: tuple[Use, ...] = ()
    domain: Domain = REAL

    order = 1

    @property
    def update(self) -> str:
        return "E[sum of observations] / E[count]" + ("" if self.domain.free else f", {self.domain}")

    @property
    def latex(self) -> str:
        name = latex_name(self.names[0])
        return rf"\hat{{{name}}}_j = \frac{{\sum_n E[w_{{nj}} \mid x]\, x_n}}{{\sum_n E[w_{{nj}} \mid x]}}"

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state):
        (name,) = self.names
        old = params[name]
        slope, curvature = self.terms(params, statistics, bundle)
        prior = prior_of(name, self.problem.factors)
        if prior is not None:
            g, h = prior_terms(prior, old, params, bundle)
            slope, curvature = slope + g, curvature + h
        step = slope / jnp.where(curvature > 0, curvature, 1)
        new = jnp.where(curvature > 0, old + step, old)
        if not self.domain.free:
            new = self.domain.nearest(new, jnp.maximum(curvature, 0))
        return {name: new.astype(old.dtype)}, state

    def terms(self, params: Params, statistics: Statistics, bundle: Bundle) -> tuple[Array, Array]:
        """Slope and curvature of `Q` along every entry of the parameter, of all places at once."""
        (name,) = self.names
        if any(use.factor.coefficients for use in self.uses):
            return self.terms_of_rows(params, statistics, bundle)
        places = [self.problem.arguments(use, params, bundle) for use in self.uses]

        def link(value: Array) -> list[Array]:
            at = {**params, name: value}
            return [self.problem.arguments(use, at, bundle)[use.argument or ""] for use in self.uses]

        _, pull = jax.vjp(link, params[name])
        jacobian = jax.jvp(link, (params[name],), (jnp.ones_like(params[name]),))[1]
        scalars = [i for i, use in enumerate(self.uses) if not use.event_dim]
        separate = self.scalar_terms([(self.uses[i], places[i]) for i in scalars], statistics)
        found = dict(zip(scalars, separate, strict=True))
        for i, use in enumerate(self.uses):
            if use.event_dim:
                found[i] = vector_terms(use, places[i], *self.problem.statistics(use, statistics))
        shapes = [place[use.argument or ""].shape for use, place in zip(self.uses, places, strict=True)]
        slopes = [fit(found[i][0], shape) for i, shape in enumerate(shapes)]
        curvatures = [fit(found[i][1], shape) * jacobian[i] for i, shape in enumerate(shapes)]
        return pull(slopes)[0], pull(curvatures)[0]

    def terms_of_rows(self, params: Params, statistics: Statistics, bundle: Bundle) -> tuple[Array, Array]:
        """The same where statistics are those of a regression whose rows read one entry each."""
        (name,) = self.names
        names = [n for n in self.problem.touched(self.names) if not self.problem.factors[n].is_prior]

        def objective(value: Array) -> Array:
            return self.problem.q({**params, name: value}, statistics, bundle, names)

        slope, curvature = jax.jvp(jax.grad(objective), (params[name],), (jnp.ones_like(params[name]),))
        return slope, -curvature

    def scalar_terms(self, places: Sequence[tuple[Use, dict]], statistics: Statistics) -> list[tuple[Array, Array]]:
        """Slope and curvature of the cells' objectives in scalar locations."""
        counts = [self.problem.statistics(use, statistics) for use, _ in places]

        def objective(values: list[Array]) -> Array:
            total = jnp.zeros(())
            for (use, args), (t, n), v in zip(places, counts, values, strict=True):
                eta, log_normalizer = use.factor._family.natural({**args, use.argument or "": v})
                total = total + (eta * t).sum() - (log_normalizer * n).sum()
            return total

        sized = zip(places, counts, strict=True)
        at = [
            jnp.broadcast_to(a := args[use.argument or ""], jnp.broadcast_shapes(a.shape, n.shape))
            for (use, args), (_, n) in sized
        ]
        slopes, curvatures = jax.jvp(jax.grad(objective), (at,), ([jnp.ones_like(x) for x in at],))
        return [(g, -h) for g, h in zip(slopes, curvatures, strict=True)]


def vector_terms(use: Use, args, t: Array, n: Array) -> tuple[Array, Array]:
    """Residual sums and counts: a common covariance, or one that each cell has to itself, cancels from the mean."""
    loc = args[use.argument or ""]
    d = loc.shape[-1]
    count = jnp.broadcast_to(n[..., None], (*n.shape, d))
    return t[..., :d] - count * loc, count


def prior_terms(prior, value: Array, params: Params, bundle: Bundle) -> tuple[Array, Array]:
    """Slope and curvature of a Normal prior."""
    g, h = jax.jvp(lambda v: prior_slope(prior, v, params, bundle), (value,), (jnp.ones_like(value),))
    return g, -h


def accept_linear(problem, use: Use, names: tuple[str, ...], params: Params, bundle: Bundle) -> Linear:
    """The place as an affine function of all of `names` together.

    Raises:
        Declined: it is not a location, or not affine.
    """
    if use.argument is None:
        accept_quadratic(use, names)
        return Linear(jnp.zeros(()), None, False, False)
    if not isinstance(use.factor._family.rules[use.argument], Location):
        raise Declined(f"it enters {use}, in which the objective is not quadratic")

    def start():
        return {("param", n): Linear(jnp.asarray(params[n], float)) for n in names}

    form = problem.link(use, start, params, bundle).form
    if not isinstance(form, Linear):
        raise Declined(f"it does not enter {use} affinely")
    return form


def accept_quadratic(use: Use, names: tuple[str, ...]) -> None:
    """Check that a density, as a whole, is a polynomial of second degree in all of `names` together.

    Raises:
        Declined: it is not.
    """
    factor = use.factor
    whole = f"it enters the density of {use} as a whole"
    if factor.is_prior or factor.completions is not None:
        raise Declined(whole)
    try:
        found = terms_of(factor.graph, factor.graph.outputs[use.key], [("param", n) for n in names], joint=True)
    except Declined as declined:
        raise Declined(f"{whole}: {declined}") from None
    if not found <= {0.0, 1.0, 2.0}:
        raise Declined(whole)


def vector_mean_applies(problem, use: Use, name: str, form: Linear, params: Params, bundle: Bundle) -> bool:
    """Whether a vector location is a plain mean.

    It is one where its matrix is shared by all cells, or every entry is read exactly once, with one matrix.
    """
    if use.factor.pooled or use.factor.coefficients:  # statistics of these are products, not sums
        return False
    shapes = jax.eval_shape(lambda p, b: problem.arguments(use, p, b), dict(params), bundle)
    loc = shapes[use.argument or ""]
    rank = loc.ndim - 1
    others = [a for k, a in shapes.items() if k != use.argument]
    if not form.pure or any(s > 1 for s in loc.shape[len(use.factor.parents) : rank]):
        return False
    if all(s == 1 for o in others for s in o.shape[:rank]):
        return True
    if any(s > 1 and s != of_loc for o in others for s, of_loc in zip(o.shape[:rank], loc.shape[:rank], strict=False)):
        return False
    needs = use.factor.graph.needs((use.factor.name, use.key[1]))
    if loc.size != np.size(params[name]) or any(k[0] in ("data", "key") for k in needs):
        return False
    tags = np.arange(1.0, loc.size + 1).reshape(np.shape(params[name]))
    given = {("param", n): v for n, v in params.items()} | {("param", name): tags}
    seen = np.asarray(jit_once(lambda g: use.factor.argument(use.key[1], g, 1))(given))
    return bool((np.sort(seen.ravel()) == tags.ravel()).all())


@dataclasses.dataclass(frozen=True, eq=False)
class LeastSquares(AbstractBlock):
    """Normal equations of all parameters that enter locations jointly affinely.

    `groups` are the entries that no normal equation ties to entries of another group, `(groups, size)`, filled up with
    the number of all entries; None where all are taken as tied.
    """

    groups: np.ndarray | None = None
    domains: tuple[Domain, ...] = ()

    order = 1
    source = "Aitken 1935 (generalised least squares)"

    @property
    def update(self) -> str:
        kept = [f", {n} {d}" for n, d in zip(self.names, self.domains, strict=False) if not d.free]
        together = f" of {', '.join(self.names)} together" if len(self.names) > 1 else ""
        return "weighted least squares" + together + "".join(kept)

    @property
    def latex(self) -> str:
        name = ",".join(latex_name(n) for n in self.names)
        return rf"\hat{{{name}}} = (X^\top W X)^{{-1}} X^\top W y,\quad W = E[w \mid x]"

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state):
        touched = self.problem.touched(self.names)
        old = {n: params[n] for n in self.names}
        flat, unravel = ravel_pytree(old)

        def objective(v: Array) -> Array:
            return self.problem.q({**params, **unravel(v)}, statistics, bundle, touched)

        slope = jax.grad(objective)
        g = slope(flat)
        if not all(d.free for d in self.domains):
            return unravel(self.in_domains(old, flat, jax.hessian(objective)(flat), g)), state
        if self.groups is not None:
            step = grouped_step(slope, flat, g, self.groups)
        elif flat.size <= MAX_DENSE:
            step = concave_direction(jax.hessian(objective)(flat), g)
        else:
            step, _ = jax.scipy.sparse.linalg.cg(
                lambda v: -jax.jvp(slope, (flat,), (v,))[1], g, tol=1e-12, maxiter=flat.size
            )
        return unravel(jnp.where(jnp.isfinite(step).all(), flat + step, flat)), state

    def in_domains(self, old: Params, flat: Array, hessian: Array, slope: Array) -> Array:
        """The maximum with every entry in its domain: that without domains where it lies there."""
        everywhere = jnp.asarray(jnp.inf, flat.dtype)
        ends = [
            {n: jnp.full(jnp.shape(old[n]), d.clipped(end)) for n, d in zip(self.names, self.domains, strict=True)}
            for end in (-everywhere, everywhere)
        ]
        low, high = (ravel_pytree(end)[0] for end in ends)
        new = flat + concave_direction(hessian, slope)
        inside = jnp.isfinite(new).all() & (new >= low).all() & (new <= high).all()
        return jax.lax.cond(inside, lambda: new, lambda: in_box(hessian, slope, flat, low, high))


def grouped_step(slope, flat: Array, g: Array, groups: np.ndarray) -> Array:
    """A Newton step where the Hessian has a block for each group: as many products with it as a group has entries."""
    probes = np.zeros((groups.shape[1], flat.size + 1))
    for q in range(groups.shape[1]):
        probes[q, groups[:, q]] = 1.0
    columns = jax.vmap(lambda v: jax.jvp(slope, (flat,), (v,))[1])(jnp.asarray(probes[:, :-1], flat.dtype))
    padded = jnp.pad(columns, [(0, 0), (0, 1)])
    blocks = jnp.moveaxis(padded[:, groups], 0, -1)
    inside = groups < flat.size
    blocks = blocks * (inside[:, :, None] & inside[:, None, :])
    steps = concave_direction(blocks, jnp.pad(g, (0, 1))[groups])
    return jnp.zeros(flat.size + 1, flat.dtype).at[groups].set(steps)[:-1]


def untied(block: LeastSquares, params: Params) -> np.ndarray | None:
    """The groups of entries of a block's parameters that no site ties together; None where that is not known.

    Known where all sites are regressions on latents with coefficients that are linear in the parameters alone.
    """
    factors = [block.problem.factors[n] for n in block.problem.touched(block.names)]
    keys = [(f.name, "arg:loc") for f in factors]
    if any(not f.pooled or f.site.event_dim for f in factors) or any(
        k[0] in ("data", "key") for f, key in zip(factors, keys, strict=True) for k in f.graph.needs(key)
    ):
        return None
    flat, unravel = ravel_pytree({n: jnp.asarray(params[n]) for n in block.names})
    cells = sum(int(np.prod(f.graph.shape(k), dtype=int)) for f, k in zip(factors, keys, strict=True))
    if any(f.parents for f in factors) or cells * flat.size > MAX_INCIDENCE:
        return None

    def coefficients(v: Array) -> Array:
        values = {("param", n): x for n, x in {**params, **unravel(v)}.items()}
        parts = [f.argument("arg:loc", values) for f in factors]
        return jnp.concatenate([jnp.moveaxis(p, 0, -1).reshape(-1, p.shape[0]) for p in map(jnp.asarray, parts)], 0)

    shapes = {jax.eval_shape(lambda f=f: f.argument("arg:loc", {("param", n): x for n, x in params.items()})).shape[0]
              for f in factors}  # fmt: skip
    if len(shapes) > 1:
        return None
    reads = np.any(np.asarray(jit_once(jax.jacobian(coefficients))(flat)), axis=1)  # (cells, entries)
    return components(np.asarray(reads))


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


def newton_direction(hessian: Array, slope: Array, damping: Array | float = 0.0) -> Array:
    """`(-H + damping I)^-1 g`, scaled to unit diagonal first; directions without curvature stay where they are."""
    scaled, unit = scaled_curvature(hessian, damping)
    return jax.scipy.linalg.solve(scaled, slope / unit, assume_a="sym") / unit


def concave_direction(hessian: Array, slope: Array) -> Array:
    """The same for objectives that are concave, `(*batch, d, d)` and `(*batch, d)`: by Cholesky, where rounding lets.

    It takes a third of the time of an elimination with pivots.
    """
    scaled, unit = scaled_curvature(hessian)
    right = (slope / unit)[..., None]
    factor = jnp.linalg.cholesky(scaled)
    half = jax.scipy.linalg.solve_triangular(factor, right, lower=True)
    quick = jax.scipy.linalg.solve_triangular(factor, half, lower=True, trans=1)
    step = jax.lax.cond(jnp.isfinite(quick).all(), lambda: quick, lambda: jnp.linalg.solve(scaled, right))
    return step[..., 0] / unit


def scaled_curvature(hessian: Array, damping: Array | float = 0.0) -> tuple[Array, Array]:
    """`-H + damping I` with unit diagonal, and the units that make it so."""
    curvature = -hessian
    diagonal = jnp.diagonal(curvature, axis1=-2, axis2=-1)
    eps, tiny = jnp.finfo(hessian.dtype).eps, jnp.finfo(hessian.dtype).tiny
    top = jnp.maximum(jnp.abs(diagonal).max(-1, keepdims=True), tiny)
    unit = jnp.sqrt(jnp.maximum(jnp.abs(diagonal), 1e-12 * top))  # damping must count where nothing is concave
    scaled = curvature / unit[..., :, None] / unit[..., None, :]
    # a direction along which nothing is observed has a zero row: give it curvature one, so its step is zero
    dead = jnp.abs(diagonal) <= 1e-14 * top
    more = jnp.where(dead, 1.0, eps * 10 + damping)
    return scaled + more[..., None] * jnp.eye(more.shape[-1], dtype=more.dtype), unit

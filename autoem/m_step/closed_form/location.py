r"""Locations: `Q` is quadratic in them, so one Newton step from anywhere is the exact maximum.

`Mean` is the case in which every argument reads one entry of the parameter (a selection, possibly scaled or shifted by
data): the step separates, and is the weighted mean

.. math:: \mu_j \leftarrow \mu_j + \sum_c J_{cj} g_c \Big/ \sum_c J_{cj}^2 h_c

with `g` and `h` the slope and curvature of each cell. Statistics enter as residuals about the old value, so nothing
cancels. `LeastSquares` is the general affine case (regression): the normal equations of all jointly affine parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from autoem.families import Location
from autoem.graph.programs import jit_once
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form import bounded
from autoem.m_step.closed_form.bounded import REAL, Domain
from autoem.m_step.closed_form.counting import fit, latex_name
from autoem.m_step.closed_form.priors import prior_of, prior_slope
from autoem.m_step.problem import Bundle, Params, Statistics, Use
from autoem.passes.link import Declined, Linear
from autoem.passes.terms import terms_of

MAX_DENSE = 2048
ALIKE = 64  # times the machine's precision, up to which scaled matrices differ by rounding alone


@dataclasses.dataclass(frozen=True, eq=False)
class Mean(AbstractBlock):
    """Weighted mean of every entry of one location parameter, or the nearest that its `domain` allows."""

    uses: tuple[Use, ...] = ()
    domain: Domain = REAL

    order = 1

    @property
    def update(self) -> str:
        return f"E[sum of observations] / E[count]{self.domain}"

    @property
    def maximises(self) -> bool:
        return self.domain.whole

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
        return {name: self.kept(old, new, curvature).astype(old.dtype)}, state

    def kept(self, old: Array, best: Array, curvature: Array) -> Array:
        """The new value, inside the parameter's domain."""
        if self.domain.whole:
            return best
        low, high = self.domain.low, self.domain.high
        if not self.domain.ordered:
            return bounded.part_way(old, jnp.clip(best, low, high), (best > low) & (best < high))
        weight = jnp.where(curvature > 0, curvature, 1e-9 * curvature.max(-1, keepdims=True))
        return bounded.in_order(old, best, weight * best, weight, lambda a, b: a / b, low)

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

    It is one where each cell reads a whole vector of entries of its own, or the same as another with the same matrix:
    with an entry in two places of a vector, or beside a known number, the matrix weighs what is seen of them.
    """
    if use.factor.pooled or use.factor.coefficients:  # statistics of these are products, not sums
        return False
    shapes = jax.eval_shape(lambda p, b: problem.arguments(use, p, b), dict(params), bundle)
    loc = shapes[use.argument or ""]
    rank = loc.ndim - 1
    others = [a for k, a in shapes.items() if k != use.argument]
    if not form.pure or any(s > 1 for s in loc.shape[len(use.factor.parents) : rank]):
        return False
    shared = all(s == 1 for o in others for s in o.shape[:rank])
    if shared and reads_rows(use, name, loc.shape[-1]):
        return True
    if any(s > 1 and s != of_loc for o in others for s, of_loc in zip(o.shape[:rank], loc.shape[:rank], strict=False)):
        return False
    needs = use.factor.graph.needs((use.factor.name, use.key[1]))
    hidden = {("latent", m.name) for m in use.factor.completions.members} if use.factor.completions else set()
    if any(k[0] in ("data", "key") or k in hidden for k in needs):
        return False
    tags = np.arange(1.0, np.size(params[name]) + 1).reshape(np.shape(params[name]))
    given = {("param", n): v for n, v in params.items()} | {("param", name): tags}
    seen = np.asarray(jit_once(lambda g: use.factor.argument(use.key[1], g, 1))(given))
    rows = {tuple(row) for row in seen.reshape(-1, loc.shape[-1]).tolist() if any(row)}
    apart = len({tag for row in rows for tag in row if tag}) == len(rows) * loc.shape[-1]
    return apart and (shared or seen.size == tags.size == len(rows) * loc.shape[-1])


def reads_rows(use: Use, name: str, size: int) -> bool:
    """Whether the way from a parameter to a vector location is seen at once to pick rows of it as they stand."""
    graph, atom = use.factor.graph, use.factor.graph.outputs[use.factor.name, use.key[1]]
    variable = graph.inputs["param", name]
    for eqn in graph.slice([atom]):
        if not any(a is variable for a in eqn.inputs):
            continue
        whole = eqn.primitive.name == "gather" and eqn.params["slice_sizes"][-1] == size == variable.shape[-1]
        if not whole or eqn.params["dimension_numbers"].offset_dims[-1] != len(eqn.outputs[0].shape) - 1:
            return False
        variable = eqn.outputs[0]
    return variable is atom and bool(variable.shape) and variable.shape[-1] == size


@dataclasses.dataclass(frozen=True, eq=False)
class LeastSquares(AbstractBlock):
    """Normal equations of all parameters that enter locations jointly affinely.

    `groups` are the entries that no normal equation ties to entries of another group, `(groups, size)`, filled up with
    the number of all entries; None where all are taken as tied.
    """

    groups: np.ndarray | None = None

    order = 1
    source = "Aitken 1935 (generalised least squares)"

    @property
    def update(self) -> str:
        kept = [n for n, d in self.domains.items() if d.bounded]
        text = "weighted least squares" + (f" of {', '.join(self.names)} together" if len(self.names) > 1 else "")
        return text + (f", {', '.join(kept)} within bounds" if kept else "")

    @property
    def domains(self) -> dict[str, Domain]:
        return {n: bounded.domain_of(self.problem.params[n].constraint) or REAL for n in self.names}

    @property
    def maximises(self) -> bool:
        return all(d.whole for d in self.domains.values())

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
        room = None if self.maximises else self.room(old)
        if self.groups is not None:
            step = grouped_step(slope, flat, self.groups, room)
        elif flat.size <= MAX_DENSE:
            g, hessian = slope(flat), jax.hessian(objective)(flat)
            step = concave_direction(hessian, g)
            step = step if room is None else bounded.on_box(-hessian, g, step, *room)
        else:
            step = by_products(slope, flat, slope(flat))
            step = step if room is None else bounded.along(step, *room)
        return unravel(jnp.where(jnp.isfinite(step).all(), flat + step, flat)), state

    def room(self, old: Params) -> tuple[Array, Array]:
        """How far every entry may go down and up."""
        low = {n: d.low - old[n] for n, d in self.domains.items()}
        high = {n: d.high - old[n] for n, d in self.domains.items()}
        return ravel_pytree(low)[0], ravel_pytree(high)[0]


def by_products(slope: Callable[[Array], Array], at: Array, g: Array) -> Array:
    """A Newton step by conjugate gradients, for many entries; `g` is what the step has to undo, the slope as a rule."""
    return jax.scipy.sparse.linalg.cg(lambda v: -jax.jvp(slope, (at,), (v,))[1], g, tol=1e-12, maxiter=at.size)[0]


def hessian_in_groups(slope: Callable[[Array], Array], at: Array, groups: np.ndarray) -> tuple[Array, Array]:
    """Slope and second derivatives of entries by groups that nothing ties, `(groups, size)`, `(groups, size, size)`.

    They take as many products with the Hessian as a group has entries. Groups may be filled up with the number of all
    entries, where both are zero.
    """
    g, product = jax.linearize(slope, at)
    probes = np.zeros((groups.shape[1], at.size + 1))
    np.put_along_axis(probes, groups.T, 1.0, axis=1)
    columns = jnp.pad(jax.vmap(product)(jnp.asarray(probes[:, :-1], at.dtype)), [(0, 0), (0, 1)])
    inside = groups < at.size
    blocks = jnp.moveaxis(columns[:, groups], 0, -1) * (inside[:, :, None] & inside[:, None, :])
    return jnp.pad(g, (0, 1))[groups], blocks


def grouped_step(
    slope: Callable[[Array], Array], flat: Array, groups: np.ndarray, room: tuple[Array, Array] | None
) -> Array:
    """A Newton step where the Hessian has a block for each group."""
    right, blocks = hessian_in_groups(slope, flat, groups)
    steps = concave_direction(blocks, right)
    if room is not None:
        low, high = (jnp.pad(x, (0, 1), constant_values=sign)[groups] for x, sign in zip(room, (-1, 1), strict=True))
        steps = bounded.on_box(-blocks, right, steps, low, high)
    return jnp.zeros(flat.size + 1, flat.dtype).at[groups].set(steps)[:-1]


def newton_direction(hessian: Array, slope: Array, damping: Array | float = 0.0) -> Array:
    """`(-H + damping I)^-1 g`, scaled to unit diagonal first; directions without curvature stay where they are."""
    scaled, unit = scaled_curvature(hessian, damping)
    return jax.scipy.linalg.solve(scaled, (slope / unit)[..., None], assume_a="sym")[..., 0] / unit


def concave_direction(hessian: Array, slope: Array) -> Array:
    """The same for objectives that are concave, `(*batch, d, d)` and `(*batch, d)`: by Cholesky, where rounding lets.

    It takes a third of the time of an elimination with pivots. Where the matrices of a batch are multiples of one, as
    in regressions of many outputs on the same latents, that one is factorised for all.
    """
    scaled, unit = scaled_curvature(hessian)
    right = (slope / unit)[..., None]
    if scaled.ndim == 3 and len(scaled) > 1:
        apart = jnp.abs(scaled - scaled[:1]).max()
        alike = apart <= ALIKE * jnp.finfo(scaled.dtype).eps
        step = jax.lax.cond(alike, lambda: solved_together(scaled, right), lambda: solved(scaled, right))
    else:
        step = solved(scaled, right)
    return step[..., 0] / unit


def solved(matrix: Array, right: Array) -> Array:
    """The solution for a positive definite matrix; by an elimination with pivots where rounding left it indefinite."""
    quick = by_factor(jnp.linalg.cholesky(matrix), right)
    return jax.lax.cond(jnp.isfinite(quick).all(), lambda: quick, lambda: jnp.linalg.solve(matrix, right))


def solved_together(matrix: Array, right: Array) -> Array:
    """The same for `(batch, d, d)` matrices that are one but for rounding, which a second pass mends."""
    factor = jnp.linalg.cholesky(matrix[0])

    def solve(right: Array) -> Array:
        return by_factor(factor, right[..., 0].T).T[..., None]

    first = solve(right)
    quick = first + solve(right - matrix @ first)
    return jax.lax.cond(jnp.isfinite(quick).all(), lambda: quick, lambda: jnp.linalg.solve(matrix, right))


def by_factor(lower: Array, right: Array) -> Array:
    half = jax.scipy.linalg.solve_triangular(lower, right, lower=True)
    return jax.scipy.linalg.solve_triangular(lower, half, lower=True, trans=1)


def scaled_curvature(hessian: Array, damping: Array | float = 0.0) -> tuple[Array, Array]:
    """`-H + damping I` with unit diagonal, and the units that make it so."""
    curvature = -hessian
    diagonal = jnp.diagonal(curvature, axis1=-2, axis2=-1)
    eps, tiny = jnp.finfo(hessian.dtype).eps, jnp.finfo(hessian.dtype).tiny
    top = jnp.maximum(jnp.abs(diagonal).max(-1, keepdims=True), tiny)
    unit = jnp.sqrt(jnp.maximum(jnp.abs(diagonal), 1e-12 * top))  # damping must count where nothing is concave
    unit = jnp.where(top > tiny, unit, 1.0)  # a group of entries that nothing reads
    scaled = curvature / unit[..., :, None] / unit[..., None, :]
    # a direction along which nothing is observed has a zero row: give it curvature one, so its step is zero
    dead = jnp.abs(diagonal) <= 1e-14 * top
    more = jnp.where(dead, 1.0, eps * 10 + damping)
    return scaled + more[..., None] * jnp.eye(more.shape[-1], dtype=more.dtype), unit

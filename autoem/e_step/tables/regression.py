r"""Regressions in natural form: a Normal whose mean is affine in a few coefficients, with a design that the data fix.

Cut the data flow of the mean where parameters meet data: above the cut stand the coefficients `v` (one vector a latent
state), below it an affine map `offset + D v` of the data alone. Then

.. math:: \log p(y \mid v, \sigma) = -\tfrac12\, b^\top (z z^\top)\, b - \log \sigma,
   \qquad z = (D, y - \mathrm{offset}),\quad b = (-v, 1) / \sigma

is an exponential family with statistics `z z'`: an iteration reads the rows twice, by two matrix products, and the
normal equations of least squares are its expected statistics.

References:
    DeSarbo and Cron 1988, "A maximum likelihood methodology for clusterwise linear regression".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.families import Args, Covariance, Family, Location, Power
from autoem.families._matrices import inverse, log_det
from autoem.graph.jaxpr import Graph, Variable
from autoem.graph.named import Named, contract
from autoem.ir import Program, Site
from autoem.passes.link import Declined, Known, Linear, Value, look_up, run

if TYPE_CHECKING:
    from autoem.e_step.tables.tabulate import Factor, Rows

MAX_COEFFICIENTS = 24
FIXED, FREE = {"data", "key"}, {"param", "latent"}  # kinds of input


def find_coefficients(program: Program, site: Site) -> tuple[Variable, ...] | None:
    """The variables above the cut of a Normal's mean; None where the site is no compact regression."""
    graph = program.graph
    loc, scale = graph.outputs.get((site.name, "arg:loc")), (site.name, "arg:scale")
    if (
        site.distribution != "Normal"
        or not isinstance(loc, Variable)
        or any(k[0] in ("data", "key") for k in graph.needs(scale))
    ):
        return None
    if jnp.result_type(float) != jnp.float64:  # squares of observations would cancel in single precision
        return None
    kinds = graph.kinds
    if kinds[loc].isdisjoint(FIXED) or kinds[loc].isdisjoint(FREE):
        return None
    cut: dict[Variable, None] = {}
    for eqn in graph.slice([loc]):
        if not kinds[eqn.outputs[0]].isdisjoint(FIXED):
            inputs = [a for a in eqn.inputs if isinstance(a, Variable)]
            cut.update(dict.fromkeys(a for a in inputs if kinds[a] & FREE and not kinds[a] & FIXED))
    if not cut or any(not jnp.issubdtype(v.aval.dtype, jnp.floating) for v in cut):
        return None
    if sum(int(np.prod(v.shape)) for v in cut) > MAX_COEFFICIENTS or not is_affine(graph, loc, tuple(cut)):
        return None
    return tuple(cut)


def is_affine(graph: Graph, loc: Variable, cut: tuple[Variable, ...]) -> bool:
    """Whether the mean is affine in the coefficients, by the data flow below the cut."""

    def interpreted(values: dict, coefficients: list) -> tuple:
        env: dict[Variable, Value] = {graph.inputs[k]: Known(v) for k, v in values.items()}
        env.update({v: Linear(c) for v, c in zip(cut, coefficients, strict=True)})
        run(graph.slice([loc], cut), env)
        if not isinstance(look_up(loc, env), Linear):
            raise Declined("the mean is not affine")
        return ()

    shapes = {k: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for k, v in graph.inputs.items()}
    try:
        jax.eval_shape(interpreted, shapes, [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in cut])
    except (Declined, KeyError):
        return False
    return True


def design(graph: Graph, site: Site, cut: tuple[Variable, ...], values: Mapping) -> tuple[Array, Array]:
    """`D` with the coefficient axis first, `(p, *batch)`, and the offset `(*batch,)`."""
    loc = graph.outputs[site.name, "arg:loc"]
    sizes = [int(np.prod(v.shape)) for v in cut]

    def mean(flat: Array) -> Array:
        parts = jnp.split(flat, np.cumsum(sizes)[:-1])
        env = {v: p.reshape(v.shape) for v, p in zip(cut, parts, strict=True)}
        out = graph.evaluate_atoms([loc], values, env)[0]
        return jnp.broadcast_to(out, jnp.broadcast_shapes(out.shape, site.shape))

    zero = jnp.zeros(sum(sizes))
    columns = jax.vmap(lambda e: jax.jvp(mean, (zero,), (e,))[1])(jnp.eye(sum(sizes)))
    return columns, mean(zero)


def _pairs(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    i, j = np.triu_indices(count)
    return i, j, np.where(i == j, 1.0, 2.0)


def _contrast(args: Args) -> Array:
    return jnp.concatenate([-args["loc"], jnp.ones((*args["loc"].shape[:-1], 1))], -1)


def _natural(args: Args) -> tuple[Array, Array]:
    b = _contrast(args) / args["scale"][..., None]
    i, j, weight = _pairs(b.shape[-1])
    return -0.5 * weight * b[..., i] * b[..., j], jnp.log(args["scale"])


def _features(z: Array, fixed: Args) -> Array:
    i, j, _ = _pairs(z.shape[0])
    return z[i] * z[j]


def _residuals(t: Array, n: Array, args: Args) -> tuple[Array, Array]:
    b = _contrast(args)
    i, j, weight = _pairs(b.shape[-1])
    squares = (weight * b[..., i] * b[..., j] * t).sum(-1)
    return -n, 0.5 * jnp.maximum(squares, 0.0)


class Products(NamedTuple):
    """Statistics of a regression on `z`, one and the latents, of `x`, or what is multiplied by them in its density.

    `inner` holds `z z'`, `(*batch, d, d)`, with batch axes of size one where all outputs have the same; `cross` holds
    `z x'`, `(*batch, d, e)`, and `square` holds `x x'`, `(*batch, e, e)`.
    """

    inner: Array
    cross: Array
    square: Array


def _products_natural(args: Args) -> tuple[Products, Array]:
    loc, precision = args["loc"][..., None], args["scale"][..., None, None] ** -2
    transposed = jnp.swapaxes(loc, -1, -2)
    return Products(-0.5 * precision * loc * transposed, precision * loc, -0.5 * precision), jnp.log(args["scale"])


def _products_residuals(t: Products, n: Array, args: Args) -> tuple[Array, Array]:
    loc = args["loc"]
    if all(s == 1 for s in t.inner.shape[:-2]):  # one product of matrices for all outputs
        fitted = (loc.reshape(-1, loc.shape[-1]) @ t.inner.reshape(t.inner.shape[-2:])).reshape(loc.shape)
    else:
        fitted = jnp.einsum("...i,...ij->...j", loc, t.inner)
    squares = t.square[..., 0, 0] + ((fitted - 2 * t.cross[..., 0]) * loc).sum(-1)
    return -n, 0.5 * jnp.maximum(squares, 0.0)


def on_vectors(normal: Family) -> Family:
    """A multivariate normal whose location is a matrix of coefficients times known numbers: `loc` is that matrix.

    Statistics are `Products` of the known numbers and the vector.
    """
    name, matrix = normal.args[1], normal.rules[normal.args[1]]
    assert isinstance(matrix, Covariance)

    def natural(args: Args) -> tuple[Products, Array]:
        if matrix.form == "precision":
            precision, log_scale = args[name], -0.5 * log_det(args[name])
        elif matrix.form == "covariance":
            precision, log_scale = inverse(args[name]), 0.5 * log_det(args[name])
        else:
            lower = args[name]
            half = jax.scipy.linalg.solve_triangular(
                lower, jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape), lower=True
            )
            precision = jnp.swapaxes(half, -1, -2) @ half
            log_scale = jnp.log(jnp.abs(jnp.diagonal(lower, axis1=-2, axis2=-1))).sum(-1)
        tied = precision @ args["loc"]  # with the location's coefficients, mostly few: nothing else is multiplied out
        inner = jnp.swapaxes(args["loc"], -1, -2) @ tied
        return Products(-0.5 * inner, jnp.swapaxes(tied, -1, -2), -0.5 * precision), log_scale

    def scatter(t: Products, n: Array, args: Args) -> Array:
        del n
        cross = args["loc"] @ t.cross
        inner = args["loc"] @ t.inner @ jnp.swapaxes(args["loc"], -1, -2)
        return inner - cross - jnp.swapaxes(cross, -1, -2) + t.square

    return dataclasses.replace(
        REGRESSION, name="multivariate regression", args=("loc", name), arg_dims=(2, 2), natural=natural,
        rules={"loc": Location(), name: Covariance(scatter, matrix.form)}, source="Anderson 2003, chapter 8",
    )  # fmt: skip


def squared_residuals(
    keep: tuple[str, ...], eta: Named, rows: Named, features: Callable[[], Named], axis: str
) -> Named:
    """The product of `eta` with the features `z z'`, computed as minus half a squared residual.

    The product of large moments would cancel where residuals are small; `b z` does not, and costs less. The derivative
    is that of the product, which the residual's own is not: the table is linear in `eta`.
    """
    event = rows.axes[0]
    axes = tuple(a for a in keep if a in (*eta.axes, *rows.axes))

    @jax.custom_jvp
    def product(eta_array: Array) -> Array:
        count = rows.size(event)
        index = [k for k, j in enumerate(np.triu_indices(count)[1]) if j == count - 1]
        last = jnp.take(jnp.moveaxis(eta_array, eta.axes.index(axis), -1), jnp.asarray(index), -1)
        inverse = jnp.sqrt(-2 * last[..., -1:])
        b = jnp.concatenate([-last[..., :-1] / inverse, inverse], -1)
        residual = contract(keep, Named(b, (*(a for a in eta.axes if a != axis), event)), rows)
        return -0.5 * residual.to(axes) ** 2

    @product.defjvp
    def _(primals, tangents):
        slope = contract(keep, Named(tangents[0], eta.axes), features()).to(axes)
        return product(primals[0]), slope

    return Named(product(eta.array), axes)


REGRESSION = Family(
    name="Normal regression",
    args=("loc", "scale"),
    rules={"loc": Location(), "scale": Power(_residuals, degree=-2)},
    features=_features,
    natural=_natural,
    base=lambda z, fixed: jnp.full(z.shape[1:], -0.5 * math.log(2 * math.pi)),
    event_dim=1,
    arg_dims=(1, 0),
    source="DeSarbo and Cron 1988",
)

POOLED = dataclasses.replace(
    REGRESSION,
    natural=_products_natural,
    rules={"loc": Location(), "scale": Power(_products_residuals, degree=-2)},
)


def on_latents(factor: Factor, values: Mapping[Any, Any], rows: Rows) -> dict[str, Array]:
    """A Normal site's arguments as those of a regression on one and the coordinates of its latents."""
    normal = factor.site.normal
    assert isinstance(normal, Family)
    dims = zip(normal.args, normal.arg_dims, strict=True)
    args = {a: factor.argument(f"arg:{a}", values, d) for a, d in dims}
    if normal.standardise is not None and rows.centre is not None and rows.spread is not None:
        args = normal.standardise(args, rows.centre, rows.spread)
    at = len(factor.parents)
    loc = jnp.moveaxis(args["loc"], at, -1)
    loc = jnp.concatenate([loc[..., :1], loc[..., 1:] - loc[..., :1]], -1)
    return {**args, "loc": jnp.expand_dims(loc, at)}

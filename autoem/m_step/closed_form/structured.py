r"""Power updates read off slope and curvature: structured covariances, and sites evaluated by their own `log_prob`.

A positive parameter may scale a whole matrix (`s2 * eye`, `lam[z] * R`, `scale_tril = s * L`), the blocks of one
(`diag(v)`), or stand in a site whose statistics depend on another parameter (the scale of a Laplace with a free
location). Its part of `Q` still is :math:`a_j \log \theta_j - b_j \theta_j^m`, with no formula for `a` and `b` in the
family table. Slope `g` and curvature `h` along :math:`\log \theta_j` give them exactly, at any value:

.. math:: g = a - m b \theta^m, \quad h = -m^2 b \theta^m
    \quad\Rightarrow\quad a = g - h / m, \quad m b \theta^m = -h / m

That a matrix falls into blocks, each a power of one entry times something free of it, is found by reading the link
(which tells the power and the entry that each element reads) and, for the elements that are zero whatever the values,
by evaluating the matrix at random ones.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import biject_to

from autoem.families import Covariance, Family, Power
from autoem.m_step.problem import Bundle, Params, Statistics, Use, graph_values
from autoem.passes.link import Declined, Linear, Monomial
from autoem.passes.terms import terms_of

DRAWS = 3
DEGREES = {"covariance": -1.0, "precision": 1.0, "tril": -2.0}


def start(name: str, real: bool, u: Array):
    """The parameter as the link interpreter's start, at the logarithm `u`."""
    return {("param", name): Linear(u) if real else Monomial(u)}


def needs_curvature(use: Use) -> bool:
    """Whether the place's coefficients are read off slope and curvature, not off the family table."""
    return use.argument is None or isinstance(use.factor._family.rules[use.argument], Covariance)


def coefficients(
    problem, use: Use, name: str, real: bool, degree: float, params: Params, statistics: Statistics, bundle: Bundle
) -> tuple[Array, Array]:
    """`a` and `m b theta^m` of every entry of the parameter, at its current value."""

    def objective(shift: Array) -> Array:
        moved = params[name] + shift if real else params[name] * jnp.exp(shift)
        return problem.q({**params, name: moved}, statistics, bundle, (use.factor.name,))

    zero = jnp.zeros_like(params[name])
    # entries do not mix, so the curvature is diagonal and one product reads it
    slope, curvature = jax.jvp(jax.grad(objective), (zero,), (jnp.ones_like(zero),))
    return slope - curvature / degree, -curvature / degree


def accept_direct(problem, use: Use, name: str, real: bool, params: Params, bundle: Bundle) -> float | None:
    """The degree of a place in a site that is evaluated as a whole: by the family table, or by its density's terms.

    None where the parameter enters through its logarithm alone, which goes with any degree.

    Raises:
        Declined: the density is no `a log s - b s^m` in any entry of the parameter.
    """
    factor, entry = use.factor, use.factor.site.family
    whole = f"it enters the density of {use} as a whole"
    if factor.is_prior:
        raise Declined(whole)
    if isinstance(entry, Family):
        fields = ["value", *(f"arg:{a}" for a in (*entry.args, *entry.fixed))]
        entered = [f for f in fields if ("param", name) in factor.graph.needs((factor.name, f))]
        rule = entry.rules.get(entered[0][4:]) if len(entered) == 1 else None
        if isinstance(rule, Power):
            place = Use(factor, entered[0][4:])
            link = problem.link(place, lambda: start(name, real, jnp.zeros(params[name].shape)), params, bundle)
            return rule.degree * power_of(link.form, use)
    if factor.completions is not None:
        raise Declined(whole)
    try:
        found = terms_of(factor.graph, factor.graph.outputs[use.key], [("param", name)], joint=False, real=real)
    except Declined as declined:
        raise Declined(f"{whole}: {declined}") from None
    powers = [p for p in found if isinstance(p, float) and p]
    if len(powers) > 1:
        raise Declined(f"{whole}, in more than one power ({', '.join(f'{p:g}' for p in sorted(powers))})")
    return powers[0] if powers else None


def power_of(form, use: Use) -> float:
    """The power of one entry of the parameter that a place is.

    Raises:
        Declined: it is no such thing.
    """
    if not isinstance(form, Monomial) or not form.power or not form.simple:
        raise Declined(f"it enters {use} as something other than a power of one of its entries")
    return form.power


def accept_matrix(problem, use: Use, name: str, real: bool, params: Params, bundle: Bundle) -> float:
    """The degree of a place in a matrix that falls into blocks, each a power of one entry times a constant matrix.

    Raises:
        Declined: it does not.
    """
    rule = use.factor._family.rules[use.argument or ""]
    assert isinstance(rule, Covariance)
    drawn = [probe(problem, use, name, real, params, bundle, seed) for seed in range(DRAWS)]
    zero = np.all([matrix == 0 for _, _, matrix in drawn], axis=0)
    joined = ~(zero & np.swapaxes(zero, -1, -2))
    for _, read, _ in drawn:
        own = np.diagonal(read, axis1=-2, axis2=-1)
        of_row, of_column = own[..., :, None], own[..., None, :]
        if not ((~joined | (of_row == of_column)) & (zero | (read == of_row))).all():
            raise Declined(f"the matrix in {use} mixes its entries, or it with something else")
    return DEGREES[rule.form] * drawn[0][0]


def probe(
    problem, use: Use, name: str, real: bool, params: Params, bundle: Bundle, seed: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """The power, the entry that every element reads (from 1; 0 for none) and the matrix, all at random values."""
    point, data = random_point(problem, use, params, bundle, seed)
    tags = jnp.arange(1.0, np.size(params[name]) + 1).reshape(np.shape(params[name]))
    forms: list = []

    @jax.jit
    def read(point, data):
        at = dataclasses.replace(bundle, data=data, key=jax.random.key(0))

        def logs(u: Array) -> Array:
            linked = problem.link(use, lambda: start(name, real, u), point, at)
            forms[:] = [linked.form]
            power_of(linked.form, use)
            return linked.arrays[0]

        entries = jax.jvp(logs, (jnp.zeros_like(tags),), (tags,))[1]
        return entries, use.factor.argument(use.key[1], graph_values(at, point), use.event_dim)

    entries, matrix = read(point, data)
    power = power_of(forms[0], use)
    return power, np.rint(np.asarray(entries) / power).astype(int), np.asarray(matrix)


def random_point(problem, use: Use, params: Params, bundle: Bundle, seed: int) -> tuple[dict, dict]:
    """Values of the parameters and data that the place reads: any that are possible, with no zeros among them."""
    rng = np.random.default_rng(seed)
    needs = use.factor.graph.needs(use.key)
    point = dict(params)
    for key in needs:
        if key[0] == "param":
            to = biject_to(problem.params[key[1]].constraint)
            free = rng.normal(size=to.inverse_shape(np.shape(params[key[1]])))
            point[key[1]] = to(jnp.asarray(free, params[key[1]].dtype))
    data = {i: random_data(rng, x) for i, x in bundle.data.items() if ("data", i) in needs}
    return point, data


def random_data(rng: np.random.Generator, like) -> Array:
    """Stand-ins for data: numbers without zeros; indices that tell neighbours apart along every axis."""
    if jnp.issubdtype(like.dtype, jnp.floating):
        return jnp.asarray(rng.normal(size=like.shape), like.dtype)
    if like.dtype == bool:
        return jnp.asarray(rng.random(like.shape) < 0.5)
    return jnp.asarray(np.indices(like.shape).sum(0) % 2, like.dtype)

r"""Standard errors from the observed information: minus the Hessian of the exact log-likelihood (and log prior).

Each parameter is moved in free coordinates around its estimate, and the covariance is carried back by the delta method.
Entries on the boundary (a probability of zero or one, a scale of zero) are held there and get NaN: their sampling
distribution is not normal.

References:
    Louis 1982; Efron and Hinkley 1978, "Assessing the accuracy of the maximum likelihood estimator: observed versus
    expected Fisher information".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import ModelError, PlanError
from autoem.graph.programs import jit_once, jit_well
from autoem.ir import Param
from autoem.lowering.kernel import Kernel
from autoem.m_step.choose import kind_of
from autoem.m_step.closed_form.bounded import Domain, domain_of
from autoem.m_step.problem import Bundle
from autoem.m_step.unconstrained import to_constrained, to_unconstrained
from autoem.treatments import AbstractDrawn
from autoem.treatments.information import drawn_information

LARGE = 20_000_000  # entries of the rows times coordinates, from which the curvature is compiled well rather than fast
BOUNDARY = 1e-7


class StandardErrors(dict):
    """Standard errors by parameter; `boundary` names the parameters with entries that have none, and `singular` tells
    whether the information had no inverse, in which case all are NaN."""

    boundary: tuple[str, ...] = ()
    singular: bool = False


def free_entries(param: Param, value: np.ndarray) -> np.ndarray:
    """Which free coordinates of the parameter move; the largest entry of a simplex is left to the others."""
    kind = kind_of(param.constraint)
    if kind == "unit":
        return (value > BOUNDARY) & (value < 1 - BOUNDARY)
    if kind == "simplex":
        largest = np.arange(value.shape[-1]) == value.argmax(-1)[..., None]
        return (value > BOUNDARY) & ~largest
    if kind == "positive":
        return value > 1e-12
    if kind == "real":
        return np.ones(value.shape, bool)
    if (domain := ends_of(param)) is not None:
        edge = BOUNDARY * domain.size
        return (value > domain.low + edge) & (value < domain.high - edge)
    return np.isfinite(np.asarray(jit_once(lambda v: to_unconstrained(param, v))(value)))


def on_boundary(param: Param, value: np.ndarray) -> np.ndarray:
    """Entries of the parameter itself that have no standard error."""
    kind = kind_of(param.constraint)
    if kind == "unit":
        return (value <= BOUNDARY) | (value >= 1 - BOUNDARY)
    if kind == "simplex":
        return value <= BOUNDARY
    if kind == "positive":
        return value <= 1e-12
    return ~free_entries(param, value) if ends_of(param) else np.zeros(value.shape, bool)


def ends_of(param: Param) -> Domain | None:
    """The interval that a parameter is kept to; None where it is kept to none, or otherwise."""
    domain = domain_of(param.constraint)
    return None if domain is None or domain.whole or domain.ordered else domain


def off_boundary(param: Param, value: Array) -> Array:
    """Probabilities a hair inside, so that derivatives through their logarithms are finite.

    Held entries do not move from there.
    """
    kind = kind_of(param.constraint)
    if kind not in ("simplex", "unit"):
        return value
    return jnp.clip(value, 1e-12, 1 - 1e-12 if kind == "unit" else None)


def move(param: Param, value: Array, shift: Array) -> Array:
    """The parameter moved by `shift` in its free coordinates."""
    kind = kind_of(param.constraint)
    if kind == "real":
        return value + shift
    if kind == "positive":
        return value * jnp.exp(shift)
    if kind == "unit":
        odds = value * jnp.exp(shift)
        return odds / (odds + 1 - value)
    if kind == "simplex":
        weight = value * jnp.exp(shift)
        return weight / weight.sum(-1, keepdims=True)
    return to_constrained(param, to_unconstrained(param, value) + shift)


def standard_errors(kernel: Kernel, params: Mapping[str, Array], bundle: Bundle, state=None) -> StandardErrors:
    """Standard error of every entry of every maximised parameter; `state` is what an E-step by draws remembers.

    Raises:
        PlanError: the fit was of an E-step that does not end at a maximum of the likelihood; latents are drawn, and
            their draws do not tell the curvature.
    """
    treatment = kernel.treatment
    if treatment is not None and treatment.sums_exactly and not treatment.is_likelihood:
        raise PlanError(
            "e_step",
            kind="option",
            problem="the E-step asked for does not end at a maximum of the likelihood, where alone its curvature tells "
            "the standard errors",
            mend="refined = autoem.EM(model, init=result.params).run(rng_key, *args); refined.standard_errors()",
        )
    names = [n for b in kernel.blocks for n in b.names]
    values = {n: np.asarray(params[n]) for n in names}
    free = {n: free_entries(kernel.program.params[n], values[n]) for n in names}
    sizes = [int(f.sum()) for f in free.values()]

    def moved(flat: Array) -> dict[str, Array]:
        out, start = dict(params), 0
        for n, size in zip(names, sizes, strict=True):
            shift = jnp.zeros(free[n].size).at[np.flatnonzero(free[n])].set(flat[start : start + size])
            inside = off_boundary(kernel.program.params[n], jnp.asarray(params[n]))
            out[n] = move(kernel.program.params[n], inside, shift.reshape(free[n].shape))
            start += size
        return out

    return carried_back(kernel, values, names, moved, sum(sizes), bundle, state)


def carried_back(
    kernel: Kernel, values, names: list[str], moved: Callable, size: int, bundle: Bundle, state=None
) -> StandardErrors:
    zero = jnp.zeros(size)
    if isinstance(kernel.treatment, AbstractDrawn):
        information = drawn_information(kernel, moved, size, bundle, state)
    else:
        entries = sum(x.size for x in jax.tree.leaves(bundle.rows))
        compiled = jit_once if entries * (size + 1) <= LARGE else jit_well  # by how long it runs
        information = -compiled(jax.hessian(lambda v, b: kernel.objective(moved(v), b)[0]))(zero, bundle)
    jacobians = jit_once(jax.jacfwd(lambda v: {n: moved(v)[n] for n in names}))(zero)
    information = np.asarray(information, float)
    out = StandardErrors()
    if size and not np.isfinite(information).all():
        raise ModelError(
            names[0],
            problem="the log-likelihood has no finite second derivatives at the estimate",
            mend="keep parameters off values where the model's own density is infinite",
        )
    # the scale of the coordinates must not decide: compare eigenvalues of the information in correlation form
    unit = np.sqrt(np.maximum(np.abs(np.diagonal(information)), 1e-300))
    eigen = np.linalg.eigvalsh(information / np.outer(unit, unit)) if size else np.ones(1)
    out.singular = bool(eigen[0] <= 1e-9)
    covariance = np.full((size, size), np.nan) if out.singular else np.linalg.inv(information)
    boundary = []
    for n in names:
        j = np.asarray(jacobians[n], float)
        variance = np.einsum("...i,ij,...j->...", j, covariance, j)
        edge = on_boundary(kernel.program.params[n], values[n])
        boundary += [n] if edge.any() else []
        out[n] = np.where(edge, np.nan, np.sqrt(np.where(variance > 0, variance, np.where(edge, 0, variance))))
    out.boundary = tuple(boundary)
    return out

r"""Locations and log-odds by an augmentation: a latent that would make the site Normal, integrated inside the M-step.

A Student t is a Normal of random precision, a Laplace one of random variance, a logistic likelihood a Normal in its
log-odds given a Polya-Gamma variable, a probit the sign of a Normal utility, and a censored value a Normal one that is
not seen. Given the old value, `Q` of the augmented site is quadratic in the location: it has the slope of `Q` itself,
and a curvature :math:`\Omega` by rows, which `laws` has, so that the update,
:math:`\beta \leftarrow \beta + (X^\top \Omega X)^{-1} \nabla Q`, is one weighted least squares and never lowers `Q`.
Newton's method needs fewer steps, and tries several lengths of each; this one needs no trial. Scale and degrees of
freedom stay with the likelihood itself, which is ECME. Sites in which a location has a quadratic objective anyway may
stand beside.

References:
    Liu and Rubin 1995, "ML estimation of the t distribution using EM and its extensions, ECM and ECME"; Boehning and
    Lindsay 1988, "Monotonicity of quadratic-approximation algorithms".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from autoem.families import Counting
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.counting import fit, latex_name
from autoem.m_step.closed_form.laws import QUADRATIC
from autoem.m_step.closed_form.location import by_products, newton_direction
from autoem.m_step.closed_form.places import Place
from autoem.m_step.problem import Bundle, Params, Problem, Statistics, graph_values

DENSE_UP_TO = 64  # entries, from which on conjugate gradients solve the normal equations


@dataclasses.dataclass(frozen=True, eq=False)
class Reweighted(AbstractBlock):
    """Weighted least squares, with the weights that latents outside the model's text would have."""

    places: tuple[Place, ...] = ()

    order = 1
    maximises = False

    @property
    def source(self) -> str:  # type: ignore[override]
        return "; ".join(dict.fromkeys(p.law.source for p in self.places))

    @property
    def augmentation(self) -> str:
        parts = [f"'{p.factor.name}' is taken as {p.law.latent}" for p in self.places]
        return f"{'; '.join(parts)}, inside the M-step"

    @property
    def update(self) -> str:
        together = f" of {', '.join(self.names)} together" if len(self.names) > 1 else ""
        return "least squares with the augmented weights" + together

    @property
    def latex(self) -> str:
        name = ",".join(latex_name(n) for n in self.names)
        return rf"{name} \leftarrow {name} + (X^\top \Omega X)^{{-1}} \nabla Q"

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state: Any):
        touched = self.problem.touched(self.names)
        flat, unravel = ravel_pytree({n: params[n] for n in self.names})
        slope = jax.grad(lambda v: self.problem.q({**params, **unravel(v)}, statistics, bundle, touched))(flat)
        here = [p.value(graph_values(bundle, params)) for p in self.places]
        weights = [
            curvature(p, at, params, statistics, bundle) for p, at in zip(self.places, here, strict=True)
        ]  # fmt: skip
        quadratic = [n for n in touched if n not in {p.factor.name for p in self.places}]

        def bound(v: Array) -> Array:
            new = {**params, **unravel(v)}
            moved = [p.value(graph_values(bundle, new)) - at for p, at in zip(self.places, here, strict=True)]
            lost = sum(-0.5 * (w * m**2).sum() for w, m in zip(weights, moved, strict=True))
            return lost + self.problem.q(new, statistics, bundle, quadratic)

        if flat.size <= DENSE_UP_TO:
            step = newton_direction(jax.hessian(bound)(flat), slope)
        else:
            step = by_products(jax.grad(bound), flat, slope)
        return unravel(jnp.where(jnp.isfinite(step).all(), flat + step, flat)), state


def curvature(place: Place, at: Array, params: Params, statistics: Statistics, bundle: Bundle) -> Array:
    """How much every row (or cell) counts, times the curvature of its augmented density in the place's value `at`."""
    factor, law = place.factor, place.law
    found, family = statistics[factor.name], factor.family
    if family is not None:
        (rule,) = family.rules.values()
        assert isinstance(rule, Counting)
        seen, others = rule.counts(found[0], -found[1])
        assert others is not None
        own = law.curvature({}, at, place.slope * at)
        return fit(seen + others, at.shape) * place.slope**2 * own
    values = graph_values(bundle, params)
    args = {a: factor.argument(f"arg:{a}", values) for a in law.reads}
    x = jnp.asarray(factor.graph.evaluate([(factor.name, "value")], values)[0])
    own = law.curvature(args, x, at)
    return jnp.broadcast_to(own, jnp.broadcast_shapes(own.shape, found.shape)) * found


def served(problem: Problem, found: Mapping[str, tuple[Place, ...]]) -> list[Reweighted]:
    """A block for parameters that enter their places together affinely, and one for each of the others."""
    groups: list[dict[str, tuple[Place, ...]]] = []
    for name, places in found.items():
        group = {name: places}
        for other in list(groups):
            if joint(both := {**other, **group}, set(other), set(group)):
                groups.remove(other)
                group = both
        groups.append(group)
    blocks = []
    for group in groups:
        by_site = {p.factor.name: p for places in group.values() for p in places if p.law is not QUADRATIC}
        blocks.append(Reweighted(tuple(group), problem, "asked for", tuple(by_site.values())))
    return blocks


def joint(group: Mapping[str, tuple[Place, ...]], some: set[str], others: set[str]) -> bool:
    """Whether two groups of parameters share a place, and all are affine together wherever two of them stand."""
    sites = [{p.factor.name for n in names for p in group[n]} for names in (some, others)]
    shared = [p for places in group.values() for p in places if p.factor.name in sites[0] & sites[1]]
    return bool(shared) and all(p.affine_in(tuple(group)) for p in shared)


__all__ = ["Reweighted", "served"]

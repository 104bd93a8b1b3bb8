r"""Locations and logits by an augmentation: a latent that would make the site Normal, integrated inside the M-step.

A Student t is a Normal of random precision, a Laplace one of random variance, and a logistic likelihood a Normal in its
logits given a Polya-Gamma variable. Given the old value, `Q` of the augmented site is quadratic in the location: it has
the slope of `Q` itself, and the curvature

.. math:: \omega_i = \frac{\nu + 1}{\nu s^2 + r_i^2}, \qquad
   \omega_i = \frac{1}{b\,|r_i|}, \qquad \omega_i = \frac{\tanh(\psi_i / 2)}{2 \psi_i}

so that the update, :math:`\beta \leftarrow \beta + (X^\top \Omega X)^{-1} \nabla Q`, is one weighted least squares and
never lowers `Q`. Newton's method needs fewer steps, and tries several lengths of each; this one needs no trial. Scale
and degrees of freedom stay with the likelihood itself, which is ECME.

References:
    Liu and Rubin 1995, "ML estimation of the t distribution using EM and its extensions, ECM and ECME"; Andrews and
    Mallows 1974, "Scale mixtures of normal distributions"; Polson, Scott and Windle 2013, "Bayesian inference for
    logistic models using Polya-Gamma latent variables"; Boehning and Lindsay 1988 (the bound).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.counting import fit, latex_name
from autoem.m_step.closed_form.location import newton_direction
from autoem.m_step.closed_form.priors import NORMAL, prior_of, readable
from autoem.m_step.problem import Bundle, Params, Problem, Statistics, Use, graph_values
from autoem.passes.link import Declined, Linear

DENSE_UP_TO = 64  # entries, from which on conjugate gradients solve the normal equations
FLAT = 1e-6  # of the mean residual: those below it would have a Laplace's curvature without bound


class Augmentation(NamedTuple):
    """The argument that is a location once the latent is there, its curvature, and what the latent is."""

    argument: str
    curvature: Callable[[Mapping[str, Array], Array, Array], Array]
    reads: tuple[str, ...]
    latent: str


def _student(args: Mapping[str, Array], x: Array, loc: Array) -> Array:
    df, scale = args.get("df", jnp.ones(())), args["scale"]
    return (df + 1) / (df * scale**2 + (x - loc) ** 2)


def _laplace(args: Mapping[str, Array], x: Array, loc: Array) -> Array:
    distance = jnp.abs(x - loc)
    return 1 / (args["scale"] * jnp.maximum(distance, FLAT * distance.mean() + jnp.finfo(distance.dtype).tiny))


def _logistic(args: Mapping[str, Array], x: Array, logits: Array) -> Array:
    del args, x
    half = 0.5 * jnp.where(jnp.abs(logits) < 1e-4, 1.0, logits)
    return jnp.where(jnp.abs(logits) < 1e-4, 0.25, 0.25 * jnp.tanh(half) / half)


AUGMENTATIONS: dict[str, Augmentation] = {
    "StudentT": Augmentation("loc", _student, ("df", "scale"), "a Normal whose precision is Gamma"),
    "Cauchy": Augmentation("loc", _student, ("scale",), "a Normal whose precision is Gamma"),
    "Laplace": Augmentation("loc", _laplace, ("scale",), "a Normal whose variance is Exponential"),
    "BernoulliLogits": Augmentation("logits", _logistic, (), "a Normal in its logits given a Polya-Gamma variable"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Reweighted(AbstractBlock):
    """Weighted least squares, with the weights that a latent outside the model's text would have."""

    order = 1
    maximises = False
    source = "Liu and Rubin 1995; Polson, Scott and Windle 2013"

    @property
    def augmentation(self) -> str:
        laws = (AUGMENTATIONS[f.site.distribution] for f in self.sites)
        parts = [f"'{f.name}' is taken as {a.latent}" for f, a in zip(self.sites, laws, strict=True)]
        return f"{'; '.join(parts)}, inside the M-step"

    @property
    def sites(self) -> list:
        """The sites that are augmented."""
        touched = (self.problem.factors[n] for n in self.problem.touched(self.names))
        return [f for f in touched if not f.is_prior]

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
        weights = [curvature_of(f, params, statistics[f.name], bundle) for f in self.sites]
        here = [place_of(f, params, bundle) for f in self.sites]

        def bound(v: Array) -> Array:
            new = {**params, **unravel(v)}
            moved = [place_of(f, new, bundle) - at for f, at in zip(self.sites, here, strict=True)]
            priors = [n for n in touched if self.problem.factors[n].is_prior]
            lost = sum(-0.5 * (w * m**2).sum() for w, m in zip(weights, moved, strict=True))
            return lost + self.problem.q(new, statistics, bundle, priors)

        if flat.size <= DENSE_UP_TO:
            step = newton_direction(jax.hessian(bound)(flat), slope)
        else:
            gradient = jax.grad(bound)
            step, _ = jax.scipy.sparse.linalg.cg(
                lambda v: -jax.jvp(gradient, (flat,), (v,))[1], slope, tol=1e-12, maxiter=flat.size
            )
        return unravel(jnp.where(jnp.isfinite(step).all(), flat + step, flat)), state


def place_of(factor, params: Params, bundle: Bundle) -> Array:
    """The location, or the logits, of every row (or cell) at every state."""
    values = graph_values(bundle, params)
    argument = AUGMENTATIONS[factor.site.distribution].argument
    if factor.family is not None and argument in factor.family.args:
        return factor.arguments(values, bundle.rows[factor.name])[argument]
    return factor.argument(f"arg:{argument}", values)


def curvature_of(factor, params: Params, statistics: Any, bundle: Bundle) -> Array:
    """How much every row (or cell) counts, times the curvature of its augmented density."""
    law, values = AUGMENTATIONS[factor.site.distribution], graph_values(bundle, params)
    place = place_of(factor, params, bundle)
    if factor.family is not None:
        return fit(-statistics[1], place.shape) * law.curvature({}, place, place)
    args = {a: factor.argument(f"arg:{a}", values) for a in law.reads}
    x = jnp.asarray(factor.graph.evaluate([(factor.name, "value")], values)[0])
    own = law.curvature(args, x, place)
    return jnp.broadcast_to(own, jnp.broadcast_shapes(own.shape, statistics.shape)) * statistics


def accept(problem: Problem, use: Use, name: str, params: Params, bundle: Bundle) -> None:
    """Check that a place is an argument that an augmentation makes a location, and affine in the parameter.

    Raises:
        Declined: it is not.
    """
    factor = use.factor
    law = AUGMENTATIONS.get(factor.site.distribution)
    if law is None:
        raise Declined(f"no augmentation is known for {factor.site.distribution}, of which '{factor.name}' is one")
    if factor.completions is not None or factor.site.role != "observed":
        raise Declined(f"it enters {use}, which is not observed, or reads a continuous latent")
    keys = [k for k in factor.graph.outputs if k[0] == factor.name and k[1] not in ("elem", f"arg:{law.argument}")]
    if any(("param", name) in factor.graph.needs(k) for k in keys):
        raise Declined(f"it enters {use} elsewhere than in {law.argument}")
    prior = prior_of(name, problem.factors)
    if prior and (prior.site.distribution != "Normal" or not readable(prior, NORMAL)):
        raise Declined(f"its prior {prior.site.distribution} is not Normal")
    start = {("param", name): Linear(jnp.asarray(params[name], float))}
    form = problem.link(Use(factor, law.argument), lambda: start, params, bundle).form
    if not isinstance(form, Linear):
        raise Declined(f"it does not enter the {law.argument} of '{factor.name}' affinely")


__all__ = ["AUGMENTATIONS", "Reweighted", "accept"]

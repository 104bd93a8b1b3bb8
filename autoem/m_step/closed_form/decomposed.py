r"""Standard deviations and a correlation matrix, two parameters that make one covariance: solved for together.

.. math:: \hat\Sigma_j = \sum_{c \to j} S_c \Big/ \sum_{c \to j} n_c, \quad \hat\sigma_j = \sqrt{\mathrm{diag}\,
   \hat\Sigma_j}, \quad \hat R_j = \mathrm{diag}(\hat\sigma_j)^{-1} \hat\Sigma_j\, \mathrm{diag}(\hat\sigma_j)^{-1}

In: a parameter that is a correlation matrix or its Cholesky factor, and another that is positive. Out: one block for
both, where every place of either is `scale_tril = sigma[:, None] * L`, or `covariance_matrix` with the correlations
between the deviations, so that any covariance can be had; or nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import biject_to, constraints

from autoem.families import Covariance
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.bounded import Domain, base_of, domain_of
from autoem.m_step.closed_form.counting import fit, latex_name
from autoem.m_step.closed_form.structured import random_point
from autoem.m_step.problem import Bundle, Params, Problem, Statistics, Use, graph_values, listed, uses_of

FORMS = {"tril": constraints.corr_cholesky, "covariance": constraints.corr_matrix}


@dataclasses.dataclass(frozen=True, eq=False)
class Decomposed(AbstractBlock):
    """Deviations and correlations of a pooled scatter matrix; `names` are those of the two, in this order."""

    uses: tuple[Use, ...] = ()
    form: str = "tril"

    order = 2
    source = "Anderson 2003, section 3.2"

    @property
    def update(self) -> str:
        factor = "cholesky of the " * (self.form == "tril")
        return f"{self.names[0]}, {self.names[1]} = deviations, {factor}correlations of E[scatter] / E[count]"

    @property
    def latex(self) -> str:
        deviations, matrix = (latex_name(n) for n in self.names)
        inner = rf"\mathrm{{diag}}({deviations})^{{-1}} \hat\Sigma\, \mathrm{{diag}}({deviations})^{{-1}}"
        right = rf"\mathrm{{chol}}\left({inner}\right)" if self.form == "tril" else inner
        return rf"\hat{{{deviations}}} = \sqrt{{\mathrm{{diag}}\,\hat\Sigma}},\quad \hat{{{matrix}}} = {right}"

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state):
        deviations, name = self.names
        old = params[name]
        scatter, count = jnp.zeros_like(old), jnp.zeros_like(old)
        for use in self.uses:
            s, n = self.pooled(use, params, statistics, bundle)
            scatter, count = scatter + s, count + n
        mean = scatter / jnp.where(count > 0, count, 1)
        mean = jnp.where(count > 0, 0.5 * (mean + jnp.swapaxes(mean, -1, -2)), jnp.eye(old.shape[-1], dtype=old.dtype))
        spread = jnp.sqrt(jnp.diagonal(mean, axis1=-2, axis2=-1))
        new = mean / spread[..., :, None] / spread[..., None, :]
        new = jnp.linalg.cholesky(new) if self.form == "tril" else new
        seen = count[..., 0] > 0
        return {
            deviations: jnp.where(seen, spread, params[deviations]).astype(old.dtype),
            name: jnp.where(count > 0, new, old).astype(old.dtype),
        }, state

    def pooled(self, use: Use, params: Params, statistics: Statistics, bundle: Bundle) -> tuple[Array, Array]:
        """Scatter and counts of the cells that each matrix reaches, in the data's own units."""
        deviations, name = self.names
        factor, rows = use.factor, bundle.rows[use.factor.name]
        rule = factor._family.rules[use.argument or ""]
        assert isinstance(rule, Covariance)
        t, n = self.problem.statistics(use, statistics)
        scatter = rule.scatter(t, n, self.problem.arguments(use, params, bundle))
        if rows.spread is not None:
            scatter = scatter * rows.spread[:, None] * rows.spread[None, :]
        values = graph_values(bundle, {**params, deviations: jnp.ones_like(params[deviations])})

        def link(value: Array) -> Array:  # with deviations of one, the matrix is copied
            return factor.argument(use.key[1], {**values, ("param", name): value}, 2)

        raw, pull = jax.vjp(link, params[name])
        count = jnp.broadcast_to(n[..., None, None], scatter.shape)
        return pull(fit(scatter, raw.shape))[0], pull(fit(count, raw.shape))[0]


def decomposed(problem: Problem, params: Params, bundle: Bundle, free: Mapping[str, object]) -> list[Decomposed]:
    """A block for every pair of the parameters `free` that make one covariance."""
    blocks: list[Decomposed] = []
    for name in free:
        for form, constraint in FORMS.items():
            if base_of(problem.params[name].constraint) is constraint and problem.params[name].prior is None:
                other = partner(problem, name, form, params, bundle)
                if other is not None and other in free:
                    reason = f"{other} times {name} is any covariance of: {listed(uses(problem, name))}"
                    blocks.append(Decomposed((other, name), problem, reason, uses(problem, name), form))
    return blocks


def uses(problem: Problem, name: str) -> tuple[Use, ...]:
    return tuple(uses_of(name, list(problem.factors.values())))


def partner(problem: Problem, name: str, form: str, params: Params, bundle: Bundle) -> str | None:
    """The parameter of the deviations that a correlation matrix stands with everywhere; None where there is none."""
    read = uses(problem, name)
    shape = np.shape(params[name])
    for other, param in problem.params.items():
        alike = domain_of(param.constraint) == Domain(0.0) and param.prior is None
        if not alike or np.shape(params[other]) != shape[:-1] or not read:
            continue
        if {u.key for u in uses(problem, other)} != {u.key for u in read}:
            continue
        if all(makes_covariance(problem, u, other, name, form, params, bundle) for u in read):
            return other
    return None


def makes_covariance(
    problem: Problem, use: Use, deviations: str, name: str, form: str, params: Params, bundle: Bundle
) -> bool:
    """Whether a place holds copies of the matrix, multiplied by the deviations of its rows (and its columns)."""
    rule = use.factor._family.rules[use.argument] if use.argument else None
    if not isinstance(rule, Covariance) or rule.form != form:
        return False
    point, data = random_point(problem, use, params, bundle, 0)
    at = dataclasses.replace(bundle, data={**bundle.data, **data})
    rng = np.random.default_rng(2)
    shape = np.shape(params[deviations])
    spread = jnp.asarray(rng.uniform(0.5, 2.0, shape), params[name].dtype)
    to = biject_to(problem.params[name].constraint)
    matrix = to(jnp.asarray(rng.normal(size=to.inverse_shape(np.shape(params[name]))), params[name].dtype))
    tags = jnp.arange(1.0, matrix.size + 1).reshape(matrix.shape).astype(matrix.dtype)

    @jax.jit
    def read(spread: Array, matrix: Array) -> Array:
        return use.factor.argument(use.key[1], graph_values(at, {**point, deviations: spread, name: matrix}), 2)

    whole = spread[..., :, None] * matrix * (spread[..., None, :] if form == "covariance" else 1)
    ones, place = jnp.ones(shape, matrix.dtype), np.arange(shape[-1] ** 2).reshape(shape[-1], -1)
    if form == "tril":
        tags, place = jnp.tril(tags), np.tril(place + 1) - 1
    copied = np.asarray(read(ones, tags))
    in_place = ((np.rint(copied) - 1) % shape[-1] ** 2 == place % shape[-1] ** 2).all()
    return bool(in_place and np.allclose(read(spread, matrix), read(ones, whole), rtol=1e-6))

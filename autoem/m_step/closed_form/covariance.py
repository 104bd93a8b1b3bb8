r"""Covariance matrices: the pooled expected scatter about the new locations.

.. math:: \hat\Sigma_j = \sum_{c \to j} S_c \Big/ \sum_{c \to j} n_c

for every matrix that is copied into the argument of a multivariate normal, in the form that the model declares
(covariance, precision, Cholesky factor). Where a cell has the matrix times a number of its own (a random scale, as in
the multivariate t), its scatter is that of the data without this number. A Wishart prior on a precision, or an inverse
Wishart prior on a covariance, adds its scale matrix and degrees of freedom.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.tables.tabulate import Factor
from autoem.families import Covariance
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.counting import fit, latex_name
from autoem.m_step.closed_form.priors import prior_of, prior_slope
from autoem.m_step.closed_form.structured import random_point
from autoem.m_step.problem import Bundle, Params, Statistics, Use, graph_values
from autoem.passes.link import Declined, Linear


@dataclasses.dataclass(frozen=True, eq=False)
class Scatter(AbstractBlock):
    """Pooled scatter matrix, mapped to the parameter's form."""

    uses: tuple[Use, ...] = ()
    form: str = "covariance"
    scaled: bool = False

    order = 2
    source = "Anderson 2003, section 3.2"

    @property
    def update(self) -> str:
        inner = "E[scaled scatter] / E[count]" if self.scaled else "E[scatter] / E[count]"
        return {"covariance": inner, "precision": f"({inner})^-1", "tril": f"cholesky({inner})"}[self.form]

    @property
    def latex(self) -> str:
        name = latex_name(self.names[0])
        inner = r"\frac{\sum_n E[w_{nj} \mid x] (x_n - \mu_j)(x_n - \mu_j)^\top}{\sum_n E[w_{nj} \mid x]}"
        wrap = {"covariance": "{}", "precision": r"\left({}\right)^{{-1}}", "tril": r"\mathrm{{chol}}\left({}\right)"}
        return rf"\hat{{{name}}}_j = " + wrap[self.form].format(inner)

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state):
        (name,) = self.names
        old = params[name]
        scatter, count = jnp.zeros_like(old), jnp.zeros_like(old)
        for use in self.uses:
            s, n = self.pooled(use, params, statistics, bundle)
            scatter, count = scatter + s, count + n
        prior = prior_of(name, self.problem.factors)
        if prior is not None:
            s, n = prior_terms(prior, self.form, old, params, bundle)
            scatter, count = scatter + s, count + n
        mean = scatter / jnp.where(count > 0, count, 1)
        mean = 0.5 * (mean + jnp.swapaxes(mean, -1, -2))
        if self.form == "precision":
            new = jnp.linalg.inv(mean)
        else:
            new = jnp.linalg.cholesky(mean) if self.form == "tril" else mean
        return {name: jnp.where(count > 0, new, old).astype(old.dtype)}, state

    def pooled(self, use: Use, params: Params, statistics: Statistics, bundle: Bundle) -> tuple[Array, Array]:
        """Scatter and counts of the cells that each matrix reaches, in the data's own units."""
        (name,) = self.names
        factor, rows = use.factor, bundle.rows[use.factor.name]
        rule = factor._family.rules[use.argument or ""]
        assert isinstance(rule, Covariance)
        args = self.problem.arguments(use, params, bundle)
        t, n = self.problem.statistics(use, statistics)
        scatter = rule.scatter(t, n, args)
        if rows.spread is not None:
            scatter = scatter * rows.spread[:, None] * rows.spread[None, :]
        values = graph_values(bundle, params)

        def link(value: Array) -> Array:
            return factor.argument(use.key[1], {**values, ("param", name): value}, 2)

        raw, pull = jax.vjp(link, params[name])
        count = jnp.broadcast_to(n[..., None, None], scatter.shape)
        if self.scaled:  # `pull` multiplies by the cell's number once
            times = link(jnp.ones_like(params[name]))[..., :1, :1]
            scatter, count = scatter / times ** {"covariance": 2, "tril": 3, "precision": 0}[self.form], count / times
        return pull(fit(scatter, raw.shape))[0], pull(fit(count, raw.shape))[0]


def prior_terms(prior: Factor, form: str, value: Array, params: Params, bundle: Bundle) -> tuple[Array, Array]:
    """Pseudo-scatter `S` and pseudo-count `n` of a conjugate prior, read off its slope at the matrix and at its double.

    The slope at a precision `P` is half of `n P^-1 - S`, that at a covariance `C` half of `C^-1 S C^-1 - n C^-1`.
    """
    once, twice = (prior_slope(prior, times * value, params, bundle) for times in (1.0, 2.0))
    inverse_count = 4 * (once - twice) if form == "precision" else 2 * (once - 4 * twice)  # n times the inverse
    count = jnp.einsum("...ij,...ji->...", inverse_count, value)[..., None, None] / value.shape[-1]
    if form == "precision":
        return inverse_count - 2 * once, count
    return value @ (2 * once + inverse_count) @ value, count


def accept(problem, use: Use, name: str, params: Params, bundle: Bundle) -> tuple[str, bool]:
    """The matrix form of the place, and whether something may multiply the matrix.

    Raises:
        Declined: it is not a matrix that is only copied, or multiplied.
    """
    if use.argument is None:
        raise Declined(f"it enters the density of {use} as a whole")
    rule = use.factor._family.rules[use.argument]
    if not isinstance(rule, Covariance):
        raise Declined(f"it enters {use}, which is no covariance")

    def start():
        return {("param", name): Linear(jnp.asarray(params[name], float))}

    form = problem.link(use, start, params, bundle).form
    if not (isinstance(form, Linear) and form.simple):
        raise Declined(f"the matrix in {use} is computed from it, not copied")
    return rule.form, not form.pure


def refuse_mixed(problem, use: Use, name: str, params: Params, bundle: Bundle) -> None:
    """Check that every cell has the matrix itself times one positive number of its own.

    Raises:
        Declined: it does not.
    """
    point, data = random_point(problem, use, params, bundle, 0)
    size = params[name].shape[-1]
    tags = jnp.arange(1.0, params[name].size + 1).reshape(params[name].shape)
    data = {i: jnp.abs(x) for i, x in data.items()}  # what multiplies a covariance is positive
    rng = np.random.default_rng(1)
    nodes = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 2.0, x.shape), x.dtype), bundle.nodes)
    at = dataclasses.replace(bundle, data={**bundle.data, **data}, nodes=nodes)

    @jax.jit
    def read(value: Array) -> Array:
        return use.factor.argument(use.key[1], graph_values(at, {**point, name: value}), 2)

    none, times, tagged = (np.asarray(read(v)) for v in (jnp.zeros_like(tags), jnp.ones_like(tags), tags))
    own = times > 0
    place = np.arange(size * size).reshape(size, size)
    in_place = own.all() and ((np.rint(tagged / times) - 1) % (size * size) == place).all()
    if not in_place or none.any() or not np.allclose(times, times[..., :1, :1], rtol=1e-6):
        raise Declined(f"the matrix in {use} is computed from it, not copied or multiplied by a number")

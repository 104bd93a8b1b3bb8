"""Answers about latents under a mean field: each group by its own law, which no other group's values move.

In: a build whose E-step is a mean field, parameters, data, and the laws of the fit. Out: `FieldPosterior`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from autoem._errors import PlanError
from autoem.answers.posterior import Marginals, Posterior
from autoem.e_step.elimination.layout import Table
from autoem.graph.programs import jit_loop, jit_once
from autoem.ir import Chain
from autoem.m_step.problem import Bundle, make_layout
from autoem.mean_field.field import Field
from autoem.mean_field.groups import Group
from autoem.mean_field.tables import Laws
from autoem.planning.build import Build
from autoem.reading.trace import Source

SETTLING, SETTLED = 500, 1e-10  # E-steps on data that are not those of the fit, at most; and the gain that ends them


class GroupPosterior(Posterior):
    """The law of one group: exact for the tables that it has under the laws of the others."""

    def __init__(self, built: Build, group: Group, tables: list[Table], bundle: Bundle, source: Source):
        program = built.program
        program = dataclasses.replace(
            program,
            latents={n: z for n, z in program.latents.items() if n in group.latents},
            pieces={n: z for n, z in program.pieces.items() if n in group.latents},
            chains=group.chains,
        )
        layout = dataclasses.replace(built.kernel.layout, chains=group.chains, logs=True)
        kernel = dataclasses.replace(built.kernel, program=program, layout=layout, treatment=None)
        own = dataclasses.replace(built, plan=dataclasses.replace(built.plan, program=program), kernel=kernel)
        self._shapes = tables
        super().__init__(own, {"·tables": [t.value for t in tables]}, bundle, source)  # type: ignore[dict-item]

    def _tables(self, params, bundle: Bundle) -> list[Table]:
        values = params["·tables"]
        return [dataclasses.replace(t, value=v) for t, v in zip(self._shapes, values, strict=True)]


class FieldPosterior(Posterior):
    r"""The product of laws :math:`q(z) = \prod_g q_g(z_g)` that stands for the posterior under a mean field.

    Marginals and moments are those of `q`, whose variances are known to be too small where groups depend on each other
    (Blei, Kucukelbir and McAuliffe 2017). There is no likelihood of each datum, nor a joint table over groups.
    """

    def __init__(
        self, built: Build, params: Mapping[str, Array], bundle: Bundle, source: Source | None = None, laws: Any = None
    ):
        super().__init__(built, params, bundle, source)
        assert isinstance(built.kernel.treatment, Field)
        self._field: Field = built.kernel.treatment
        self._laws: Laws = settle(built, self._params, bundle, laws)

    def _underflows(self) -> bool:
        return True

    @functools.cached_property
    def _groups(self) -> list[GroupPosterior]:
        out = []
        for group in self._field.groups:
            if group.cellwise:
                scores = self._laws.scores[group.name]
                tables = [Table(scores, frozenset(group.latents), frozenset(scores.axes[1:]))]
            else:
                tables = list(
                    jit_once(lambda p, b, laws, g=group: tuple(t.value for t in self._tables_of(g, p, b, laws)))(
                        self._params, self._bundle, self._laws
                    )
                )
                tables = [Field._as_table(p, v) for p, v in zip(group.pieces, tables, strict=True)]
            out.append(GroupPosterior(self._built, group, tables, self._bundle, self._source))
        return out

    def _tables_of(self, group: Group, params, bundle: Bundle, laws: Laws) -> list[Table]:
        kernel = self._built.kernel
        tables = self._field._tables(kernel, params, bundle, laws, group)
        return self._field._expected(group, tables, laws, make_layout(kernel.layout, bundle))

    @functools.cached_property
    def marginals(self) -> Marginals:
        return Marginals({n: v for g in self._groups for n, v in g.marginals.items()})

    @functools.cached_property
    def _moments(self) -> dict[str, tuple[Array, Array]]:
        out = {}
        for block in self._field.blocks:
            m = block.member
            mean, covariance = block.law.form.moments(self._laws.natural[block.name])
            out[m.name] = mean.reshape(*m.shape, *m.event), covariance.reshape(*m.shape, m.dim, m.dim)
        return out

    @functools.cached_property
    def sd(self) -> Marginals:
        """By continuous latent, its standard deviation under `q`, `(*plates, *event)`."""
        variances = {n: jnp.diagonal(c, axis1=-2, axis2=-1) for n, c in self.covariance.items()}
        return Marginals({n: jnp.sqrt(v).reshape(self.mean[n].shape) for n, v in variances.items()})

    def interval(self, name: str, level: float = 0.95) -> tuple[Array, ...]:
        """Lower and upper end of the central interval that holds a continuous latent with probability `level`.

        From the quantiles of 4,000 draws of `q`, always the same.

        Raises:
            KeyError: the model has no such continuous latent. ValueError: `level` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"interval(level={level}): level must lie between 0 and 1")
        known = self.mean[name]  # raises KeyError
        draws = self._continuous(jax.random.key(0), 4000)[name].reshape(4000, *known.shape)
        return tuple(jnp.quantile(draws, jnp.asarray([0.5 - level / 2, 0.5 + level / 2]), axis=0))

    def _continuous(self, key: Array, num: int) -> dict[str, Array]:
        out = {}
        for i, block in enumerate(self._field.blocks):
            keys = jax.random.split(jax.random.fold_in(key, i), num)
            draw = jax.vmap(lambda k, block=block: block.law.form.sample(k, self._laws.natural[block.name]))
            out[block.name] = draw(keys).reshape(num, *block.size)
        return out

    def mode(self) -> dict[str, Array]:
        """The most probable completion under `q` of the discrete latents, and the mean of the continuous ones."""
        out = {n: v for g in self._groups for n, v in g.mode().items()}
        return {**out, **dict(self.mean)}

    def sample(self, rng_key: Array, num_samples: int = 1) -> dict[str, Array]:
        """Draws of all latents from `q`, with a leading axis of `num_samples`; groups are independent in them."""
        keys = jax.random.split(rng_key, len(self._groups) + 1)
        out = self._continuous(keys[-1], num_samples)
        for k, g in zip(keys[:-1], self._groups, strict=True):
            out.update(g.sample(k, num_samples))
        return out

    def joint(self, *names: str) -> Array:
        """Probability under `q` of every combination of several latents of one group; see `Posterior.joint`.

        Raises:
            PlanError: they are of different groups, whose joint table is the product of their marginals.
        """
        return self._group_of(names).joint(*names)

    def pairs(self, name: str) -> Array:
        """Joint probabilities under `q` of a chain's latent at each step and the next; see `Posterior.pairs`."""
        return self._group_of((name,)).pairs(name)

    def _group_of(self, names: tuple[str, ...]) -> GroupPosterior:
        found = [g for g in self._groups if set(names) <= g._built.program.latents.keys()]
        if not found:
            raise self._refused(f"a joint table of {', '.join(names)}")
        return found[0]

    def filtered(self, name: str) -> Array:
        raise self._refused("filtered probabilities")

    def _chain(self, name: str) -> Chain:
        raise self._refused("probabilities along a chain")

    @property
    def datum_plate(self) -> str | None:  # type: ignore[override]
        """None: the bound has no part for each datum."""
        return None

    @property
    def log_likelihood(self) -> Array:  # type: ignore[override]
        raise self._refused("the likelihood of each datum")

    @functools.cached_property
    def total(self) -> float:
        """The ELBO at the parameters, in nats: a lower bound of the log-likelihood."""
        run = jit_once(lambda p, b, s: self._built.kernel.expect(p, b, s).likelihood)
        return float(run(self._params, self._bundle, self._laws))

    def _refused(self, what: str) -> PlanError:
        first = next(
            (g.name for g in self._field.groups), self._field.blocks[0].name if self._field.blocks else "model"
        )
        return PlanError(
            first,
            problem=f"{what} is not known under a mean field, which bounds the likelihood of all data together",
            mend="ask .marginals, .mean, .sd, .interval, .mode(), .sample(key, num) or .total (the ELBO)",
        )


def settle(built: Build, params: Mapping[str, Array], bundle: Bundle, laws: Any) -> Laws:
    """The laws at these parameters, from those of the fit or from the start, once they gain no more."""
    kernel = built.kernel
    fresh = laws is None
    laws = built.e_state(dict(params), bundle, jax.random.key(72), 0) if fresh else laws

    def again(carry):
        count, last, _, state = carry
        found = kernel.expect(params, bundle, state)
        gain = found.likelihood - last
        return count + 1, found.likelihood, gain > SETTLED * (1 + jnp.abs(found.likelihood)), found.state

    start = (jnp.zeros((), int), jnp.asarray(-jnp.inf), jnp.asarray(True), laws)
    size = sum(x.size for x in jax.tree.leaves((bundle.rows, bundle.cells)))
    most = SETTLING if fresh else 5
    run = jit_loop(lambda s: jax.lax.while_loop(lambda c: c[2] & (c[0] < most), again, s), size)
    return run(start)[3]

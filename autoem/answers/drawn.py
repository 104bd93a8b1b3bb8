"""Answers about latents of which some are drawn: averages over draws, the other latents exactly given each.

In: a build whose E-step ends in draws, parameters, data, and what that E-step remembers. Out: `DrawnPosterior`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from autoem._errors import PlanError
from autoem.answers.moments import completed, in_order
from autoem.answers.posterior import CONTINUOUS, Marginals, Posterior
from autoem.e_step.elimination.eliminate import Table
from autoem.e_step.elimination.reductions import log_sum_exp, maximum
from autoem.graph.named import Named
from autoem.graph.programs import jit_once
from autoem.ir import Chain
from autoem.lowering.kernel import with_nodes
from autoem.m_step.problem import Bundle
from autoem.planning.build import Build
from autoem.reading.trace import Source
from autoem.treatments.drawn import AbstractDrawn

DRAWS, CONDITIONED = 2000, 200  # draws behind moments of the drawn latents, and behind those of the others
SETTLING = 30  # E-steps on data that are not those of the fit


class DrawnPosterior(Posterior):
    """Posterior by draws, of which discrete latents beside are summed out exactly: every figure has a random error.

    Attributes as those of `Posterior`; no likelihood of each datum, since latents that are drawn may tie data together.
    """

    def __init__(
        self, built: Build, params: Mapping[str, Array], bundle: Bundle, source: Source | None = None, state: Any = None
    ):
        super().__init__(built, params, bundle, source)
        assert isinstance(built.kernel.treatment, AbstractDrawn)
        self._treatment: AbstractDrawn = built.kernel.treatment
        self._at: Any = None
        self._state = settle(built, self._params, bundle) if state is None else state

    def _drawn(self, key: Array, num: int) -> dict[str, Array]:
        """Draws as the kernel reads them, `(num, *shape, *event)`."""
        run = jit_once(lambda p, b, s, k: self._treatment.posterior_draws(self._built.kernel, p, b, s, k, num))
        return dict(run(self._params, self._bundle, self._state, key))

    @functools.cached_property
    def _plenty(self) -> dict[str, Array]:
        draws = self._drawn(jax.random.key(70), DRAWS)
        return {n: jax.vmap(lambda v, n=n: in_order(self._built.kernel, n, v))(v) for n, v in draws.items()}

    @functools.cached_property
    def _moments(self) -> dict[str, tuple[Array, Array]]:
        out = self._exact_moments()
        for m in self._treatment.hidden.members:
            draws = self._plenty[m.name]
            flat = draws.reshape(len(draws), *m.shape, m.dim)
            apart = flat - flat.mean(0)
            covariance = jnp.einsum("s...i,s...j->...ij", apart, apart) / (len(draws) - 1)
            out[m.name] = flat.mean(0).reshape(*m.shape, *m.event), covariance
        return out

    @functools.cached_property
    def sd(self) -> Marginals:
        """By latent that is drawn, its posterior standard deviation, `(*plates, *event)`."""
        return Marginals({**super().sd, **{n: v.std(0) for n, v in self._plenty.items()}})

    def interval(self, name: str, level: float = 0.95) -> tuple[Array, ...]:
        """Lower and upper end of the central interval that holds a latent with probability `level`, from draws.

        Raises:
            KeyError: the model has no such latent that is drawn. ValueError: `level` is not between 0 and 1.
        """
        if name not in self._plenty:
            return super().interval(name, level)
        if not 0 < level < 1:
            raise ValueError(f"interval(level={level}): level must lie between 0 and 1")
        return tuple(jnp.quantile(self._plenty[name], jnp.asarray([0.5 - level / 2, 0.5 + level / 2]), axis=0))

    def _tables(self, params, bundle: Bundle) -> list[Table]:
        """Tables of all sites where the drawn latents have the values of one draw."""
        tables = super()._tables(params, bundle)
        if self._at is None:
            return tables
        hidden = self._treatment.hidden
        nodes = hidden.nodes({n: v[None] for n, v in self._at.items()}, bundle)
        found = hidden.tables(params, with_nodes(bundle, {}), nodes)
        return [*tables, *(at_one_draw(t) for t in found.values())]

    def _given(self, draw: Mapping[str, Array]) -> Posterior:
        """The posterior of the other latents given one draw of these."""
        given = copy.copy(self)
        given._at = draw
        return given

    def _underflows(self) -> bool:
        return True  # logarithms lose nothing, whatever the draw

    @functools.cached_property
    def marginals(self) -> Marginals:
        if not self._built.program.latents:
            return Marginals()
        draws = self._drawn(jax.random.key(71), CONDITIONED)
        found = self._each(lambda given, p, b: given._slopes(p, b), draws)
        return Marginals(self._finished({n: v.mean(0) for n, v in found.items()}))

    def _each(self, ask: Callable, draws: Mapping[str, Array]) -> dict[str, Array]:
        """What is asked given every draw, stacked."""

        def run(params, bundle, draws):
            return jax.lax.map(lambda draw: ask(self._given(draw), params, bundle), draws)

        return jit_once(run)(self._params, self._bundle, dict(draws))

    def joint(self, *names: str) -> Array:
        raise self._refused("joint tables")

    def pairs(self, name: str) -> Array:
        raise self._refused("joint probabilities of neighbours")

    def filtered(self, name: str) -> Array:
        raise self._refused("filtered probabilities")

    @property
    def log_likelihood(self) -> Array:  # type: ignore[override]
        raise self._refused("the likelihood of each datum")

    @property
    def total(self) -> float:  # type: ignore[override]
        """The objective at the parameters, see `EMResult.objective_name`."""
        if self._built.kernel.estimated:
            return self._built.final(self._params, self._bundle, self._state)[0]
        run = jit_once(lambda p, b, s: self._built.kernel.expect(p, b, s).likelihood)
        return float(run(self._params, self._bundle, self._state))

    def _refused(self, what: str) -> PlanError:
        names = self._treatment.hidden.names
        return PlanError(
            names[0],
            problem=f"{what} would need a sum over draws of {', '.join(names)}, which tie the data together",
            mend="ask .sample(key, num), .marginals, .mean, .sd or .interval",
        )

    def mode(self) -> dict[str, Array]:
        """The drawn latents at their posterior mean, and the most probable completion of the others given that."""
        mean = {m.name: self._moments[m.name][0] for m in self._treatment.hidden.members}
        inner = {n: in_order(self._built.kernel, n, v) for n, v in mean.items()}

        def run(params, bundle, inner):
            choose = lambda _, scores: jnp.argmax(scores, axis=0)  # noqa: E731
            chosen = self._given(inner)._backward(params, bundle, maximum, choose)
            return {**chosen, **completed(self._built.kernel, params, bundle, chosen, None)}

        return {**self._values(jit_once(run)(self._params, self._bundle, inner)), **mean}

    def sample(self, rng_key: Array, num_samples: int = 1) -> dict[str, Array]:
        """Joint draws of all latents, with a leading axis of `num_samples`."""
        one, two = jax.random.split(rng_key)
        draws = self._drawn(one, num_samples)
        out = {n: jax.vmap(lambda v, n=n: in_order(self._built.kernel, n, v))(v) for n, v in draws.items()}
        if not self._built.program.latents and not self._built.kernel.integrals:
            return out

        def run(params, bundle, draws, keys):
            def one(pair):
                draw, key = pair
                choose = lambda i, s: jax.random.categorical(jax.random.fold_in(key, i), s, axis=0)  # noqa: E731
                chosen = self._given(draw)._backward(params, bundle, log_sum_exp, choose)
                rest = completed(self._built.kernel, params, bundle, chosen, jax.random.fold_in(key, CONTINUOUS))
                return {**chosen, **rest}

            return jax.lax.map(one, (draws, keys))

        keys = jax.random.split(two, num_samples)
        return {**out, **self._values(jit_once(run)(self._params, self._bundle, draws, keys))}

    def _chain(self, name: str) -> Chain:
        raise self._refused("probabilities along a chain")


def at_one_draw(table: Table) -> Table:
    """A table at draws of which there is one."""
    return dataclasses.replace(table, value=Named(table.value.array[0], table.value.axes[1:]))


def settle(built: Build, params: Mapping[str, Array], bundle: Bundle) -> Any:
    """What the E-step remembers after some steps at these parameters."""
    kernel, state = built.kernel, built.e_state(dict(params), bundle, jax.random.key(72), 0)
    run = jit_once(lambda p, b, s: jax.lax.fori_loop(0, SETTLING, lambda _, s: kernel.expect(p, b, s).state, s))
    return run(dict(params), bundle, state)

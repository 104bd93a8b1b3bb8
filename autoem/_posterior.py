"""Answers about the latents of a fitted model: marginals, joint tables, the mode, samples, each datum's likelihood.

In: a build, parameters and data. Out: `Posterior`. Marginals are derivatives of `log Z`; the mode and the samples read
the recorded elimination backwards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._build import Build
from autoem._errors import PlanError
from autoem._jaxpr import jit_once
from autoem._named import Named, add, named
from autoem.e_step.elimination import Layout, Step, Table, eliminate, log_sum_exp, maximum, route_to_rows
from autoem.e_step.tables import log_density_constant
from autoem.ir import Latent
from autoem.m_step.problem import Bundle, make_layout


class Marginals(dict):
    """Posterior probabilities by latent; a misspelt name is answered with the names that exist."""

    def __missing__(self, name: str):
        raise KeyError(f"no latent {name!r}; the model has {sorted(self)}")


class Posterior:
    r"""Exact posterior of the discrete latents given data and parameters, :math:`p(z \mid x, \theta)`.

    Attributes:
        marginals: by latent, probabilities of shape `(*plates, states)`; a site that `obs_mask` observes in part is
            found under its own name, with its observed cells at probability one.
        log_likelihood: log density of each datum, in nats, with the shape of the data's plate.
        total: their sum, the observed-data log-likelihood.
    """

    def __init__(self, built: Build, params: Mapping[str, Array], bundle: Bundle):
        self._built, self._params, self._bundle = built, dict(params), bundle

    def __repr__(self) -> str:
        return f"Posterior of {', '.join(self._built.program.latents) or 'no latents'}"

    @functools.cached_property
    def marginals(self) -> Marginals:
        latents = list(self._built.program.latents)
        if not latents:
            return Marginals()
        unary = {z: zeros(self._built, (z,)) for z in latents}
        slopes = jit_once(lambda u, p, b: jax.grad(lambda v: self._log_z(v, p, b))(u))(
            unary, self._params, self._bundle
        )
        out = {z: self._shaped(slopes[z], self._built.program.latents[z]) for z in latents}
        return Marginals({**out, **self._merged(out)})

    def joint(self, *names: str) -> Array:
        """Posterior probability of every combination of several latents.

        Its shape is `(*plates, states of the first, states of the second, ...)`.

        The latents must be distinct and of nested plates; those of the innermost appear.

        Raises:
            PlanError: a name is no latent, or plates are not nested.
        """
        program = self._built.program
        for name in names:
            if name not in program.latents:
                raise PlanError(
                    name, problem="is no latent of the model", mend=f"choose among {sorted(program.latents)}"
                )
        plates = [self._built.kernel.layout.plates_of[n] for n in names]
        inner = max(plates, key=len)
        if len(set(names)) < len(names) or any(not p <= inner for p in plates):
            raise PlanError(
                names[0], problem=f"{names} are not distinct latents of nested plates", mend="ask for them apart"
            )
        table = zeros(self._built, names)
        slope = jit_once(lambda u, p, b: jax.grad(lambda v: self._log_z({"": v}, p, b))(u))(
            table, self._params, self._bundle
        )
        deepest = program.latents[names[plates.index(inner)]]
        axes = tuple(a for a in deepest.axes if a in inner)
        probabilities = slope.to((*axes, *names))
        sizes = [program.plates[a].size for a in axes] + [program.latents[n].num_states for n in names]
        probabilities = jnp.broadcast_to(probabilities, sizes)
        return probabilities / probabilities.sum(tuple(range(len(axes), probabilities.ndim)), keepdims=True)

    def mode(self) -> dict[str, Array]:
        """The most probable joint completion: a value for every cell of every latent (Viterbi's, on any structure)."""

        def run(params, bundle):
            return self._backward(params, bundle, maximum, lambda _, scores: jnp.argmax(scores, axis=0))

        return self._values(jit_once(run)(self._params, self._bundle))

    def sample(self, rng_key: Array, num_samples: int = 1) -> dict[str, Array]:
        """Exact joint draws of all latents, with a leading axis of `num_samples`."""

        def run(key, params, bundle):
            return self._backward(
                params,
                bundle,
                log_sum_exp,
                lambda i, scores: jax.random.categorical(jax.random.fold_in(key, i), scores, axis=0),
            )

        keys = jax.random.split(rng_key, num_samples)
        return self._values(jit_once(jax.vmap(run, in_axes=(0, None, None)))(keys, self._params, self._bundle))

    @functools.cached_property
    def log_likelihood(self) -> Array:
        return jit_once(self._per_datum)(self._params, self._bundle)

    @functools.cached_property
    def total(self) -> float:
        """Observed-data log-likelihood, in nats."""
        return float(jit_once(lambda p, b: self._log_z({}, p, b) + b.constant)(self._params, self._bundle))

    def _tables(self, params, bundle: Bundle) -> list[Table]:
        kernel = self._built.kernel
        return kernel.tables(kernel.problem.cells(params, bundle), bundle.rows, kernel.likelihood_factors)

    def _layout(self, bundle: Bundle) -> Layout:
        return make_layout(self._built.kernel.layout, bundle)

    def _log_z(self, extra: Mapping[str, Named], params, bundle: Bundle) -> Array:
        tables = self._tables(params, bundle)
        plates_of = self._built.kernel.layout.plates_of
        for value in extra.values():
            latents = frozenset(a for a in value.axes if a in plates_of)
            tables.append(Table(value, latents, frozenset().union(*(plates_of[z] for z in latents))))
        return eliminate(tables, self._layout(bundle))

    def _shaped(self, slope: Named, latent: Latent) -> Array:
        out = jnp.broadcast_to(slope.to((*latent.axes, latent.name)), (*latent.shape, latent.num_states))
        return out / out.sum(-1, keepdims=True)

    def _partly_observed(self) -> dict[str, tuple[str, Array, Array]]:
        """Sites that `obs_mask` split.

        From the name of the latent part to the name of the whole, the observed values, and where they are hidden.
        """
        out = {}
        program, values = self._built.program, {("data", i): x for i, x in self._bundle.data.items()}
        for name, latent in program.latents.items():
            whole = name.removesuffix("_unobserved")
            if (
                name.endswith("_unobserved")
                and f"{whole}_observed" in program.sites
                and (name, "mask") in program.full.outputs
            ):
                keys = [(f"{whole}_observed", "value"), (f"{whole}_observed", "mask")]
                observed, seen = program.full.evaluate(keys, values)
                out[name] = whole, observed, ~jnp.broadcast_to(seen, latent.shape)
        return out

    def _merged(self, marginals: Mapping[str, Array]) -> dict[str, Array]:
        out = {}
        for name, (whole, observed, hidden) in self._partly_observed().items():
            states = jnp.asarray(self._built.program.latents[name].states)
            given = (observed[..., None] == states).astype(marginals[name].dtype)
            out[whole] = jnp.where(hidden[..., None], marginals[name], given)
        return out

    def _backward(self, params, bundle: Bundle, reduce: Callable, choose: Callable) -> dict[str, Array]:
        steps: list[Step] = []
        layout = self._layout(bundle)
        eliminate(self._tables(params, bundle), layout, reduce, steps)
        chosen: dict[str, Named] = {}
        for i, step in enumerate(reversed(steps)):
            scores = step.joint
            for other in sorted(step.latents):
                route = step.route if step.route and other in step.route.latents else None
                scores = pick(scores, other, route_to_rows(chosen[other], route, layout.cells))
            latent = self._built.program.latents[step.latent]
            full = jnp.broadcast_to(scores.to((step.latent, *latent.axes)), (latent.num_states, *latent.shape))
            chosen[step.latent] = named(choose(i, full), latent.axes)
        return {
            z: jnp.broadcast_to(v.to(self._built.program.latents[z].axes), self._built.program.latents[z].shape)
            for z, v in chosen.items()
        }

    def _values(self, indices: Mapping[str, Array]) -> dict[str, Array]:
        out = {z: jnp.asarray(self._built.program.latents[z].states)[i] for z, i in indices.items()}
        for name, (whole, observed, hidden) in self._partly_observed().items():
            out[whole] = jnp.where(hidden, out[name], observed)
        return out

    @functools.cached_property
    def datum_plate(self) -> str | None:
        """The plate whose rows are the independent data: the largest that all parts of the likelihood have, or None."""
        found: list[frozenset[str]] = []

        def run(params, bundle):
            found[:] = [part.plates for part in self._parts(params, bundle)]
            return ()

        jax.eval_shape(run, self._params, self._bundle)
        shared = frozenset.intersection(*found) if found else frozenset()
        sizes = self._built.kernel.layout.sizes
        return max(shared, key=lambda p: (sizes[p], p)) if shared else None

    def _parts(self, params, bundle: Bundle) -> list[Table]:
        """Independent contributions to the log-likelihood, before their sum over plates; constants included."""
        kernel, parts, tables = self._built.kernel, [], []
        cells = kernel.problem.cells(params, bundle)
        for factor in kernel.likelihood_factors:
            rows = bundle.rows[factor.name]
            if not factor.latents:  # no latent varies along its plates, but the data do
                factor = dataclasses.replace(factor, kept=factor.site.plates, plates=frozenset(factor.site.plates))
            table = factor.table(cells[factor.name], rows)
            constant = log_density_constant(factor, dataclasses.replace(rows, weight=rows.scale))
            if constant is not None:
                constant = constant.sum(a for a in constant.axes if a not in factor.kept)
                table = dataclasses.replace(table, value=add(table.value, constant))
            tables.append(table)
        eliminate(tables, self._layout(bundle), parts=parts)
        return parts

    def _per_datum(self, params, bundle: Bundle) -> Array:
        sizes, plate = self._built.kernel.layout.sizes, self.datum_plate
        total = jnp.zeros(sizes[plate] if plate else ())
        for part in self._parts(params, bundle):
            kept = part.value.sum(a for a in part.value.axes if a != plate)
            absent = [sizes[p] for p in part.plates if p not in part.value.axes and p != plate]
            total = total + (kept.to((plate,)) if plate else kept.array) * float(np.prod(absent, dtype=float))
        return total


def zeros(built: Build, names: tuple[str, ...]) -> Named:
    """A table of zeros over latents, with an axis for each of the innermost one's plates."""
    program, plates_of = built.program, built.kernel.layout.plates_of
    latents = [program.latents[n] for n in names]
    deepest = max(latents, key=lambda z: len(plates_of[z.name]))
    axes = (*names, *(a for a in deepest.axes if a in plates_of[deepest.name]))
    sizes = [z.num_states for z in latents] + [program.plates[a].size for a in axes[len(names) :]]
    return Named(jnp.zeros(sizes), axes)


def pick(scores: Named, latent: str, chosen: Named) -> Named:
    """Fix the axis `latent` of `scores` at the chosen states."""
    if latent not in scores.axes:
        return scores
    rest = tuple(dict.fromkeys((*(a for a in scores.axes if a != latent), *chosen.axes)))
    table, index = scores.to((latent, *rest)), chosen.to(rest)[None]
    shape = jnp.broadcast_shapes(table.shape[1:], index.shape[1:])
    table = jnp.broadcast_to(table, (table.shape[0], *shape))
    return Named(jnp.take_along_axis(table, jnp.broadcast_to(index, (1, *shape)).astype(int), axis=0)[0], rest)

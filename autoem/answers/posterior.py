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
from jax import Array

from autoem._errors import PlanError
from autoem.answers.impute import impute
from autoem.answers.moments import completed, flipped, mixed_moments, zeros
from autoem.answers.paths import filtered, neighbours
from autoem.answers.per_datum import datum_plate, per_datum
from autoem.e_step.elimination.along_time import add_paths, in_pieces, read_chain
from autoem.e_step.elimination.eliminate import (
    ChainStep,
    Layout,
    Step,
    Table,
    eliminate,
    log_sum_exp,
    maximum,
    route_to_rows,
)
from autoem.graph.jaxpr import Key
from autoem.graph.named import Named, named, pick
from autoem.graph.programs import jit_once
from autoem.ir import Chain, Continuous, Latent, at_lag
from autoem.lowering.kernel import Kernel, disagree
from autoem.m_step.problem import Bundle, make_layout
from autoem.passes.classify import nearest
from autoem.planning.build import Build
from autoem.reading.trace import Source

CONTINUOUS = 2**31  # a stream of random numbers apart from those of discrete latents


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

    def __init__(self, built: Build, params: Mapping[str, Array], bundle: Bundle, source: Source | None = None):
        self._built, self._params, self._bundle, self._source = built, dict(params), bundle, source or built.source
        self._logs = self._underflows()

    def __repr__(self) -> str:
        program = self._built.program
        return f"Posterior of {', '.join([*program.latents, *program.continuous]) or 'no latents'}"

    @functools.cached_property
    def mean(self) -> Marginals:
        """By continuous latent, its posterior mean, `(*plates, *event)`."""
        return Marginals({n: mean for n, (mean, _) in self._moments.items()})

    @functools.cached_property
    def covariance(self) -> Marginals:
        """By continuous latent, the posterior covariance of each of its cells, `(*plates, d, d)`."""
        return Marginals({n: self._known[n].in_model(covariance, 2) for n, (_, covariance) in self._moments.items()})

    @property
    def _known(self) -> dict[str, Continuous]:
        """The continuous latents, and vectors seen in part."""
        blocks = [m for block in self._built.kernel.integrals for m in block.block.members]
        return {m.name: m for m in (*self._built.program.continuous.values(), *blocks)}

    @functools.cached_property
    def sd(self) -> Marginals:
        """By continuous latent, its posterior standard deviation, `(*plates, *event)`."""
        known = self._known
        variances = {n: jnp.diagonal(c, axis1=-2, axis2=-1) for n, (_, c) in self._moments.items()}
        out = {n: jnp.sqrt(jnp.maximum(v, 0)).reshape(known[n].shape + known[n].event) for n, v in variances.items()}
        return Marginals({n: known[n].in_model(v) for n, v in out.items()})

    def interval(self, name: str, level: float = 0.95) -> tuple[Array, ...]:
        """Lower and upper end of the central interval that holds a continuous latent with probability `level`.

        Exact where the posterior is Gaussian; otherwise from the quantiles of 4,000 draws, always the same.

        Raises:
            KeyError: the model has no such continuous latent. ValueError: `level` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"interval(level={level}): level must lie between 0 and 1")
        block = next((b for b in self._built.kernel.integrals if name in b.block.names), None)
        if block is None or (block.is_gaussian and not block.block.discrete):
            half = jax.scipy.special.ndtri(0.5 + level / 2) * self.sd[name]
            return self.mean[name] - half, self.mean[name] + half
        ends, draws = jnp.asarray([0.5 - level / 2, 0.5 + level / 2]), self.sample(jax.random.key(0), 4000)[name]
        return tuple(jnp.quantile(draws, ends, axis=0))

    @functools.cached_property
    def _moments(self) -> dict[str, tuple[Array, Array]]:
        return self._exact_moments()

    def _exact_moments(self) -> dict[str, tuple[Array, Array]]:
        """Mean and covariance of the continuous latents that are integrated by a formula."""

        def run(params, bundle):
            tables, layout = self._plain_tables(params, bundle), self._layout(bundle)
            return mixed_moments(self._built.kernel, params, bundle, lambda t: eliminate([*tables, *t], layout))

        return jit_once(run)(self._params, self._bundle) if self._built.kernel.integrals else {}

    @functools.cached_property
    def marginals(self) -> Marginals:
        if not self._built.program.latents:
            return Marginals()
        return Marginals(self._finished(jit_once(self._slopes)(self._params, self._bundle)))

    def _slopes(self, params, bundle: Bundle) -> dict[str, Array]:
        """Probabilities of every discrete latent, as derivatives of `log Z` by its own table."""
        latents = self._built.program.latents
        slopes = jax.grad(lambda v: self._log_z(v, params, bundle))({z: zeros(self._built, (z,)) for z in latents})
        return {z: self._shaped(slopes[z], latents[z]) for z in latents}

    def _finished(self, marginals: dict[str, Array]) -> dict[str, Array]:
        """The same with sites that `obs_mask` split under their own names."""
        return {**marginals, **self._merged(marginals)}

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
                raise PlanError(name, problem="is no latent of the model", mend=nearest(name, program.latents))
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
        """The most probable joint completion: a value for every cell of every latent (Viterbi's, on any structure).

        Of continuous latents beside discrete ones: the discrete mode with the continuous integrated, then their mean.
        """

        def run(params, bundle):
            chosen = self._backward(params, bundle, maximum, lambda _, scores: jnp.argmax(scores, axis=0))
            return {**chosen, **completed(self._built.kernel, params, bundle, chosen, None)}

        return self._values(jit_once(run)(self._params, self._bundle))

    def sample(self, rng_key: Array, num_samples: int = 1) -> dict[str, Array]:
        """Exact joint draws of all latents, with a leading axis of `num_samples`."""

        def run(key, params, bundle):
            chosen = self._backward(
                params,
                bundle,
                log_sum_exp,
                lambda i, scores: jax.random.categorical(jax.random.fold_in(key, i), scores, axis=0),
            )
            return {
                **chosen,
                **completed(self._built.kernel, params, bundle, chosen, jax.random.fold_in(key, CONTINUOUS)),
            }

        keys = jax.random.split(rng_key, num_samples)
        return self._values(jit_once(jax.vmap(run, in_axes=(0, None, None)))(keys, self._params, self._bundle))

    def impute(self, rng_key: Array, num_samples: int = 1) -> dict[str, Array]:
        """Exact draws of what is missing (NaN), by observed site: its data with every hole drawn, `num_samples` times.

        Each is drawn from the site's distribution at a draw of all latents given what was seen. Steps of NaN after the
        last observation of a sequence make it a forecast.
        """
        to_latents, to_data = jax.random.split(rng_key)
        program, draws = self._built.program, self.sample(to_latents, num_samples)
        names = program.latents.keys() | program.continuous.keys()
        # of a scan in reverse, NumPyro takes the values that it is given as the steps run
        latents = {n: jax.vmap(lambda z, n=n: flipped(z, program.chain_of(n)))(draws[n]) for n in draws.keys() & names}
        return impute(program, self._source, self._params, latents, jax.random.split(to_data, num_samples))

    def pairs(self, name: str) -> Array:
        """Joint probabilities of a chain's latent at each step and the next, `(steps - 1, *plates, states, states)`.

        The first of the two state axes is the earlier step's.

        Raises:
            PlanError: the latent is not carried from one step to the next.
        """
        name, asked = self._hidden_part(name), name
        chain = self._chain(name)
        names = neighbours(chain, name)
        slopes = jit_once(lambda u, p, b: jax.grad(lambda v: self._log_z(v, p, b))(u))(
            {now: zeros(self._built, (before, now)) for before, now in names}, self._params, self._bundle
        )
        latent = self._built.program.latents[name]
        shape = (*latent.shape[1:], latent.num_states, latent.num_states)
        out = [jnp.zeros((0, *shape))]
        for pair in names:
            axes = (chain.bulk, *latent.axes[1:], *(reversed(pair) if chain.reverse else pair))
            part = slopes[pair[1]].to(axes)
            steps = chain.length - chain.lag if pair[1] == at_lag(name, 0) else 1
            out.append(jnp.broadcast_to(part, (steps, *shape)))
        pairs = jnp.concatenate(out)
        pairs = flipped(pairs / pairs.sum((-2, -1), keepdims=True), chain)
        return pairs if asked == name else self._merged_pairs(name, pairs)

    def filtered(self, name: str) -> Array:
        """Probabilities of a chain's latent at each step given what was seen up to it, `(steps, *plates, states)`.

        Of latents above the chain, all that the rest of the model tells is taken as seen.

        Raises:
            PlanError: the latent is not carried from one step to the next, or a site of the step reads no latent of it.
        """
        name, asked = self._hidden_part(name), name
        chain, kernel = self._chain(name), self._built.kernel

        def run(params, bundle) -> Array:
            tables = self._tables(params, bundle)
            return filtered(
                self._built.program, chain, name, kernel.likelihood_factors, tables, self._layout(bundle)
            ).array

        out = flipped(jit_once(run)(self._params, self._bundle), chain)
        return out if asked == name else self._merged({name: out})[asked]

    def _chain(self, name: str) -> Chain:
        """The chain that carries a latent."""
        chains = self._built.program.chains
        if chain := next((c for c in chains if name in c.variables), None):
            return chain
        names = [n for c in chains for n in c.variables]
        mend = f"choose among {names}" if names else "ask for posterior.marginals: no latent reads one of another step"
        raise PlanError(name, problem="is no latent that a scan carries on", mend=mend)

    @functools.cached_property
    def log_likelihood(self) -> Array:
        return jit_once(self._per_datum)(self._params, self._bundle)

    @functools.cached_property
    def total(self) -> float:
        """Observed-data log-likelihood, in nats."""
        return float(jit_once(lambda p, b: self._log_z({}, p, b) + b.constant)(self._params, self._bundle))

    def _plain_tables(self, params, bundle: Bundle) -> list[Table]:
        """Tables of the sites that read no continuous latent."""
        kernel = self._built.kernel
        return kernel.tables(kernel.problem.cells(params, bundle), bundle.rows, kernel.likelihood_factors)

    def _tables(self, params, bundle: Bundle) -> list[Table]:
        integrals = [block.integrate(params, bundle)[0] for block in self._built.kernel.integrals]
        return [*self._plain_tables(params, bundle), *integrals]

    def _layout(self, bundle: Bundle) -> Layout:
        return dataclasses.replace(make_layout(self._built.kernel.layout, bundle), logs=self._logs)

    def _underflows(self) -> bool:
        """Whether the messages of a chain have to be logarithms: asked of these data, which may not be those fitted."""
        kernel = self._built.kernel
        if kernel.layout.logs or not any(c.lag for c in kernel.layout.chains):
            return kernel.layout.logs
        kernels = (self._scaled, self._scaled.proof)
        scaled, exact = (float(jit_once(k.log_likelihood)(self._params, self._bundle)) for k in kernels)
        return disagree(scaled, exact)

    @property
    def _scaled(self) -> Kernel:
        """The kernel over the data in one piece, as they lie in a posterior."""
        return dataclasses.replace(self._built.kernel, chunks=None)

    def _log_z(self, extra: Mapping[str, Named], params, bundle: Bundle) -> Array:
        tables, plates_of = self._tables(params, bundle), self._built.kernel.layout.plates_of
        for value in extra.values():
            latents = frozenset(a for a in value.axes if a in plates_of)
            table = Table(value, latents, frozenset().union(*(plates_of[z] for z in latents)))
            tables += in_pieces(table, self._built.program)
        return eliminate(tables, self._layout(bundle))

    def _shaped(self, slope: Named, latent: Latent) -> Array:
        out = jnp.broadcast_to(slope.to((*latent.axes, latent.name)), (*latent.shape, latent.num_states))
        return flipped(out / out.sum(-1, keepdims=True), self._built.program.chain_of(latent.name))

    @functools.cached_property
    def _partly_observed(self) -> dict[str, tuple[str, Array, Array]]:
        """Sites that `obs_mask` split.

        From the name of the latent part to the name of the whole, the observed values, and where they are hidden.
        """
        out, program = {}, self._built.program
        for name, latent in program.latents.items():
            whole = name.removesuffix("_unobserved")
            values, masks = (program.outputs_along(f"{whole}_observed", field) for field in ("value", "mask"))
            if name.endswith("_unobserved") and values and masks and program.outputs_along(name, "mask"):
                out[name] = whole, self._data_along(values, latent), ~self._data_along(masks, latent)
        return out

    def _data_along(self, keys: list[Key], latent: Latent) -> Array:
        """A field of a site that has the latent's plates, at full shape, in the order of the data."""
        values = {("data", i): x for i, x in self._bundle.data.items()}
        parts = self._built.program.full.evaluate(keys, values)
        chain = self._built.program.chain_of(latent.name)
        if chain is None or len(keys) == 1:
            return flipped(jnp.broadcast_to(parts[0], latent.shape), chain)
        # pieces: one for each of a scan's first steps, and one for all later ones
        first = [jnp.asarray(p)[None] for p in parts[: chain.lag]]
        rows = [(p, 1) for p in first] + [(p, chain.length - chain.lag) for p in parts[chain.lag :]]
        return flipped(jnp.concatenate([jnp.broadcast_to(p, (n, *latent.shape[1:])) for p, n in rows]), chain)

    def _hidden_part(self, name: str) -> str:
        """The latent that holds what is hidden of a site that `obs_mask` split; any other is its own."""
        return next((part for part, (whole, *_) in self._partly_observed.items() if whole == name), name)

    def _merged(self, marginals: Mapping[str, Array]) -> dict[str, Array]:
        out = {}
        for name in marginals.keys() & self._partly_observed.keys():
            whole, observed, hidden = self._partly_observed[name]
            states = jnp.asarray(self._built.program.latents[name].states)
            given = (observed[..., None] == states).astype(marginals[name].dtype)
            out[whole] = jnp.where(hidden[..., None], marginals[name], given)
        return out

    def _merged_pairs(self, name: str, pairs: Array) -> Array:
        """Joint probabilities of neighbours in time: where one of the two is observed, they are independent."""
        whole, _, hidden = self._partly_observed[name]
        each = self.marginals[whole]
        product = each[:-1, ..., :, None] * each[1:, ..., None, :]
        return jnp.where((hidden[:-1] & hidden[1:])[..., None, None], pairs, product)

    def _backward(self, params, bundle: Bundle, reduce: Callable, choose: Callable) -> dict[str, Array]:
        steps: list[Step | ChainStep] = []
        layout = self._layout(bundle)
        eliminate(self._tables(params, bundle), layout, reduce, steps)
        chosen: dict[str, Named] = {}
        for i, step in enumerate(reversed(steps)):
            if isinstance(step, ChainStep):
                chosen.update(read_chain(step, chosen, reduce, lambda t, s, i=i: choose(len(steps) * (t + 1) + i, s)))
                add_paths(chosen, self._built.program.chains)
                continue
            scores = step.joint
            for other in sorted(step.latents):
                route = step.route if step.route and other in step.route.latents else None
                scores = pick(scores, other, route_to_rows(chosen[other], route, layout.cells))
            latent = self._built.program.every_latent[step.latent]
            full = jnp.broadcast_to(scores.to((step.latent, *latent.axes)), (latent.num_states, *latent.shape))
            chosen[step.latent] = named(choose(i, full), latent.axes)
            add_paths(chosen, self._built.program.chains)
        program = self._built.program
        return {
            n: flipped(jnp.broadcast_to(chosen[n].to(z.axes), z.shape), program.chain_of(n))
            for n, z in program.latents.items()
        }

    def _values(self, indices: Mapping[str, Array]) -> dict[str, Array]:
        latents = self._built.program.latents
        out = {z: jnp.asarray(latents[z].states)[i] if z in latents else i for z, i in indices.items()}
        for name, (whole, observed, hidden) in self._partly_observed.items():
            out[whole] = jnp.where(hidden, out[name], observed)
        return out

    @functools.cached_property
    def datum_plate(self) -> str | None:
        """The plate whose rows are the independent data: the largest that all parts of the likelihood have, or None."""
        return datum_plate(self._built.kernel, self._logs, self._params, self._bundle)

    def _per_datum(self, params, bundle: Bundle) -> Array:
        return per_datum(self._built.kernel, self._logs, params, bundle, self.datum_plate)

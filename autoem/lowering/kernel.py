"""Lower a plan to a kernel: a few pure functions that one compiled loop runs.

In: factors, the layout of the latents, blocks. Out: `Kernel`, with `expect` (the E-step: log-likelihood and expected
statistics), `maximise` (the M-step), `log_likelihood` and `per_row`. Everything is a function of parameters and a
`Bundle` of data, so the compiled code serves new values of the same shapes.

Where every factor's cells are the same for all rows of a plate, the rows are taken in chunks that fit the cache, and
over as many devices as JAX has: statistics are sums, so chunks and devices add up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from autoem.e_step.elimination.along_time import ChainStep
from autoem.e_step.elimination.chains import robust
from autoem.e_step.elimination.eliminate import Layout, Table, eliminate
from autoem.e_step.elimination.reductions import Reduce, log_sum_exp, numbered
from autoem.e_step.tables.completions import NODES
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.e_step.treatment import AbstractTreatment, Expectation
from autoem.graph.named import Named
from autoem.graph.programs import LARGE, jit_once, jit_well
from autoem.ir import Program
from autoem.lowering.chunks import Chunks, device_mesh, resized, row_specs, slice_named, slice_rows
from autoem.lowering.integrals import Integral
from autoem.m_step.block import AbstractBlock
from autoem.m_step.problem import Bundle, Params, Problem, make_layout, with_cells

LAPLACE = "Laplace approximation of the log-likelihood"


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A compiled model: pure functions of parameters and data."""

    program: Program
    problem: Problem
    layout: Layout
    blocks: tuple[AbstractBlock, ...]
    chunks: Chunks | None
    integrals: tuple[Integral, ...] = ()
    treatment: AbstractTreatment | None = None

    @property
    def num_rows(self) -> int:
        """Number of terms of the log-likelihood, roughly: the rows of the largest plate."""
        return max((p.size for p in self.program.plates.values()), default=1)

    @property
    def likelihood_factors(self) -> tuple[Factor, ...]:
        return tuple(f for f in self.problem.factors.values() if not f.is_prior and not f.integrated)

    @property
    def approximate(self) -> bool:
        """Whether an integral is done by a rule, whose error moves with the parameters."""
        return any(i.block.strategy != "exact" for i in self.integrals)

    @property
    def noisy(self) -> bool:
        """Whether the objective is known up to a random error only."""
        return self.treatment is not None and self.treatment.noisy

    @property
    def estimated(self) -> bool:
        """Whether the objective at the end is estimated by draws of its own."""
        return self.noisy or (self.treatment is not None and self.treatment.estimated)

    @property
    def least(self) -> int:
        """Steps before which no fit with a random objective ends."""
        return 0 if self.treatment is None else self.treatment.least

    @property
    def may_fall(self) -> bool:
        """Whether the objective may fall without anything being wrong."""
        sampled = any(i.block.strategy == "importance" for i in self.integrals)
        return sampled or (self.treatment is not None and (self.treatment.noisy or self.treatment.falls))

    @property
    def warmup(self) -> int:
        """Steps at the beginning whose objectives do not compare."""
        return 0 if self.treatment is None else self.treatment.warmup

    @property
    def objective_name(self) -> str:
        """What is maximised, but for the parameters' priors."""
        if self.treatment is not None:
            return self.treatment.objective_name
        rules = {i.block.strategy for i in self.integrals} - {"exact"}
        if not rules:
            return "log-likelihood"
        if "Laplace" in rules:
            return LAPLACE
        return "log-likelihood by " + ("importance sampling" if "importance" in rules else "quadrature")

    @property
    def in_logs(self) -> Kernel:
        """The same with the messages of chains in logarithms: slower, and nothing underflows."""
        return dataclasses.replace(self, layout=dataclasses.replace(self.layout, logs=True))

    @property
    def proof(self) -> Kernel:
        """The same with those messages in logarithms wherever scaled ones could have lost something."""
        return dataclasses.replace(self, layout=dataclasses.replace(self.layout, proof=True))

    def tables(self, cells: Mapping[str, Any], rows: Mapping[str, Rows], factors: Sequence[Factor]) -> list[Table]:
        return [f.table(cells[f.name], rows[f.name]) for f in factors]

    def log_prior(self, cells: Mapping[str, Any], bundle: Bundle) -> Array:
        """Log density of the parameters' priors, in nats."""
        priors = [f for f in self.problem.factors.values() if f.is_prior]
        return sum((t.value.array.sum() for t in self.tables(cells, bundle.rows, priors)), start=jnp.zeros(()))

    @functools.cached_property
    def prior_run(self) -> Callable:
        """The same of parameters and data, compiled once."""
        return jit_once(lambda params, bundle: self.log_prior(self.problem.cells(params, bundle), bundle))

    def log_likelihood(self, params: Params, bundle: Bundle) -> Array:
        """Observed-data log-likelihood, in nats."""
        return self.objective(params, bundle)[1][0]

    def objective(self, params: Params, bundle: Bundle) -> tuple[Array, tuple[Array, Array]]:
        """Log-likelihood plus log prior; and the two."""
        cells = self.problem.cells(params, bundle)
        if self.chunks:
            likelihood = self._in_chunks(cells, bundle, gradient=False)[0]
        else:
            integrals = [block.integrate(params, bundle)[0] for block in self.integrals]
            likelihood = self._whole(cells, integrals, bundle)
        prior = self.log_prior(cells, bundle)
        likelihood = likelihood + bundle.constant
        return likelihood + prior, (likelihood, prior)

    def _whole(self, cells, integrals: Sequence[Table], bundle: Bundle, reduce: Reduce = log_sum_exp) -> Array:
        tables = self.tables(cells, bundle.rows, self.likelihood_factors)
        return eliminate([*tables, *integrals], make_layout(self.layout, bundle), reduce)

    def robust(self, params: Params, bundle: Bundle) -> Array:
        """Whether the scaled messages of every chain lose nothing; the compiler leaves out all but the transitions."""
        factors, rows, layout = self.likelihood_factors, bundle.rows, make_layout(self.layout, bundle)
        if self.chunks:  # transitions are the same for all rows: see `plan_chunks`
            factors = [resized(f, self.chunks.plate, self.chunks.main) for f in factors]
            layout = dataclasses.replace(layout, sizes={**layout.sizes, self.chunks.plate: self.chunks.main})
        steps: list[Any] = []
        eliminate(self.tables(self.problem.cells(params, bundle), rows, factors), layout, steps=steps)
        tables = [s.tables for s in steps if isinstance(s, ChainStep)]
        return jnp.all(jnp.stack([robust(t) for t in tables])) if tables else jnp.asarray(True)

    def expect(self, params: Params, bundle: Bundle, state: Any = None) -> Expectation:
        """The E-step; `state` is what an approximate one remembers."""
        if self.treatment is not None:
            return self.treatment.expect(self, params, bundle, state)
        return self.exactly(params, bundle)

    def init_e_step(self, params: Params, bundle: Bundle, key: Array) -> Any:
        """What the E-step remembers before its first step."""
        return None if self.treatment is None else self.treatment.init(self, params, bundle, key)

    def final(self, params: Params, bundle: Bundle, state: Any, key: Array) -> tuple[Array, Array]:
        """Of an objective by draws, a better estimate at the end, and its standard error."""
        assert self.treatment is not None
        return self.treatment.final(self, params, bundle, state, key)

    def begun(self, params: Params, bundle: Bundle, key: Array) -> Any:
        """The same by a compiled program, made once for all fits."""
        size = sum(x.size for x in jax.tree.leaves((bundle.rows, bundle.cells)))
        return self._beginnings[size > LARGE](params, bundle, key)

    @functools.cached_property
    def _beginnings(self) -> tuple[Callable, Callable]:
        return jit_once(self.init_e_step), jit_well(self.init_e_step)

    def exactly(self, params: Params, bundle: Bundle, reduce: Reduce = log_sum_exp) -> Expectation:
        """The exact E-step: expected statistics are the gradient of the log-likelihood with respect to the cells.

        With another `reduce` it is the E-step whose objective has that in place of the sum over each discrete latent.
        """
        cells = self.problem.cells(params, bundle)
        if handed := {n: cells[n] for b in self.blocks if b.reads_cells for n in self.problem.touched(b.names)}:
            # a compiler that sums them along with what they are made of would make that twice
            handed = jax.lax.optimization_barrier(handed)
            cells |= handed
        prior, from_prior = jax.value_and_grad(self.log_prior)(cells, bundle)
        integrals, completed = [], {}
        if self.chunks:
            likelihood, statistics = self._in_chunks(cells, bundle, gradient=True, reduce=reduce)
        else:
            integrals = [block.integrate(params, bundle) for block in self.integrals]
            tables = [table for table, _ in integrals]

            def whole(cells, values: list[Named]) -> Array:
                known = [dataclasses.replace(t, value=v) for t, v in zip(tables, values, strict=True)]
                return self._whole(cells, known, bundle, reduce)

            likelihood, (statistics, slopes) = jax.value_and_grad(whole, (0, 1))(cells, [t.value for t in tables])
            completed = self.completed_by(params, [m for _, m in integrals], slopes, bundle)
        statistics = {n: from_prior[n] if self.problem.factors[n].is_prior else statistics[n] for n in cells}
        statistics |= completed
        statistics = with_cells(statistics, params, handed) if handed else statistics
        return Expectation(likelihood + bundle.constant, prior, statistics)

    def completed(self, params: Params, bundle: Bundle) -> Bundle:
        """The data with continuous latents at the nodes of their posterior."""
        nodes = {}
        for block in self.integrals:
            nodes.update(block.nodes_of_factors(block.integrate(params, bundle)[1], bundle))
        bundle = with_nodes(bundle, nodes)
        return bundle if self.treatment is None else self.treatment.completed(bundle)

    def completed_by(self, params: Params, moments: Sequence[Any], slopes: Sequence[Named], bundle: Bundle) -> dict:
        """Nodes for every factor that reads continuous latents, and its expected statistics under their weights."""
        nodes: dict[str, Any] = {}
        for block, moment in zip(self.integrals, moments, strict=True):
            nodes.update(block.nodes_of_factors(moment, bundle))
        filled = with_nodes(bundle, nodes)
        out: dict[str, Any] = {NODES: nodes} if nodes else {}
        for block, moment, slope in zip(self.integrals, moments, slopes, strict=True):
            weight = block.weights(slope)
            for f in block.factors:
                out[f.name] = block.expected(f, params, filled, weight, moment)
        return out

    def maximise(
        self, params: Params, statistics, bundle: Bundle, states: Sequence[Any]
    ) -> tuple[dict[str, Array], tuple]:
        """The M-step: every block in order."""
        new, after = dict(params), []
        bundle = with_nodes(bundle, statistics.get(NODES, {}))
        for block, state in zip(self.blocks, states, strict=True):
            update, state = block.solve(new, statistics, bundle, state)
            new.update(update)
            after.append(state)
        return new, tuple(after)

    def init_states(self, params: Params) -> tuple:
        return tuple(b.init(params) for b in self.blocks)

    def _in_chunks(self, cells, bundle: Bundle, gradient: bool, reduce: Reduce = log_sum_exp) -> tuple[Array, Any]:
        """Log-likelihood and statistics, summed over chunks, devices and the tail."""
        chunks = self.chunks
        assert chunks is not None

        def local(rows: Mapping[str, Rows], cells, reduce: Reduce):
            return self._loop(cells, rows, bundle, chunks.main // chunks.devices, gradient, reduce)

        main = {f.name: bundle.rows[f.name] for f in self.likelihood_factors}
        if chunks.devices > 1:
            mesh = device_mesh(chunks.devices)
            specs = jax.tree.map(lambda r: r, row_specs(main, chunks.plate))

            def spread(rows, cells):
                own = numbered(reduce, jax.lax.axis_index("rows") + 1)
                return jax.lax.psum(local(rows, cells, own), "rows")

            total = jax.shard_map(spread, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False)(main, cells)
        else:
            total = local(main, cells, numbered(reduce, 1))
        if bundle.tail is not None:
            tail = numbered(reduce, 0)
            rest = self._part(cells, bundle.tail, bundle, chunks.rows - chunks.main, gradient, tail)
            total = jax.tree.map(jnp.add, total, rest)
        return total

    def _loop(self, cells, rows: Mapping[str, Rows], bundle: Bundle, count: int, gradient: bool, reduce: Reduce):
        chunks = self.chunks
        assert chunks is not None
        size = min(chunks.size, count)

        def part(start, length: int):
            taken = {n: slice_rows(r, chunks.plate, start, length) for n, r in rows.items()}
            return self._part(cells, taken, bundle, length, gradient, numbered(reduce, start))

        whole, rest = divmod(count, size)
        total = part(0, size)
        if whole > 1:
            body = lambda i, acc: jax.tree.map(jnp.add, acc, part(i * size, size))  # noqa: E731
            zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: part(0, size)))
            total = jax.lax.fori_loop(0, whole, body, zero)
        if rest:
            total = jax.tree.map(jnp.add, total, part(whole * size, rest))
        return total

    def _part(self, cells, rows: Mapping[str, Rows], bundle: Bundle, length: int, gradient: bool, reduce: Reduce):
        chunks = self.chunks
        assert chunks is not None
        factors = [resized(f, chunks.plate, length) for f in self.likelihood_factors]
        sizes = {**self.layout.sizes, chunks.plate: length}

        def value(cells):
            tables = self.tables(cells, rows, factors)
            scales = {n: slice_named(s, chunks.plate, 0, length) for n, s in bundle.scales.items()}
            layout = dataclasses.replace(self.layout, sizes=sizes, scales=scales, cells={})
            return eliminate(tables, layout, reduce)

        if not gradient:
            return value(cells), None
        return jax.value_and_grad(value)(cells)


def with_nodes(bundle: Bundle, nodes: Mapping[str, Any]) -> Bundle:
    """The data with continuous latents at their nodes."""
    if not nodes:
        return bundle
    rows = {n: dataclasses.replace(bundle.rows[n], value=v, ready=True) for n, (_, v) in nodes.items() if v is not None}
    return dataclasses.replace(
        bundle, nodes={**bundle.nodes, **{n: points for n, (points, _) in nodes.items()}}, rows={**bundle.rows, **rows}
    )


def disagree(scaled: float, exact: float) -> bool:
    """Whether a likelihood from scaled messages has lost what the same in logarithms holds."""
    eps = float(jnp.finfo(jnp.result_type(float)).eps)
    return bool(abs(exact) < float("inf") and not abs(exact - scaled) <= 1 + 100 * eps * abs(exact))

"""What will be done, and why: a strategy for every latent and every parameter, with its cost and its reason.

In: a classified program with its data. Out: `Plan`, which prints, and which `_lower.lower` turns into a kernel. The
plan's rows are read off the very objects that run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from autoem._errors import PlanError
from autoem.accelerate import AbstractAcceleration
from autoem.e_step.elimination.eliminate import ChainStep, Layout, Step, eliminate
from autoem.e_step.treatment import AbstractTreatment
from autoem.ir import Program
from autoem.lowering.chunks import Chunks
from autoem.lowering.integrals import Integral
from autoem.m_step.block import AbstractBlock
from autoem.m_step.problem import Bundle, Params, Problem, make_layout, uses_of
from autoem.passes.classify import nearest
from autoem.planning.alternatives import Alternatives, alternatives
from autoem.planning.options import ranges_of
from autoem.planning.render import citations_of, plan_html, plan_latex, plan_text

MEMORY_LIMIT = 16 << 30


@dataclasses.dataclass(frozen=True)
class LatentRow:
    """The E-step of one latent."""

    name: str
    strategy: str
    states: int
    plates: tuple[str, ...]
    cells: int
    reason: str


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """The M-step of one parameter."""

    name: str
    strategy: str
    update: str
    reason: str
    shape: tuple[int, ...]
    prior: str | None
    source: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """Size of the E-step: table entries, those of the largest table held at once, and its bytes."""

    entries: int
    largest: int
    bytes: int
    order: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.entries:,} table entries, the largest table {human(self.bytes)}"


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What autoem will do with a model and why; printing it is the explanation.

    Attributes:
        program: the model as it was read.
        latents: a row for each latent: E-step, states, cells, reason.
        parameters: a row for each parameter: M-step, update formula, reason.
        cost: size of the E-step.
        notes: judgements, and how to turn them.
        accelerate: how the EM map is extrapolated; None where it is not.
        treatment: the E-step where it is not the exact one; its `objective_name` says what is maximised.
        asked: the options of the derivation that were given.
        derive: the plan of the same model and data with other options.
    """

    program: Program
    problem: Problem
    layout: Layout
    blocks: tuple[AbstractBlock, ...]
    chunks: Chunks | None
    latents: tuple[LatentRow, ...]
    parameters: tuple[ParameterRow, ...]
    cost: Cost
    notes: tuple[str, ...]
    integrals: tuple[Integral, ...] = ()
    accelerate: AbstractAcceleration | None = None
    treatment: AbstractTreatment | None = None
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    derive: Callable[..., Plan] | None = None

    def __str__(self) -> str:
        return plan_text(self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return plan_html(self)

    def latex(self) -> str:
        """The derived updates as a LaTeX `align` block."""
        return plan_latex(self)

    def citations(self) -> str:
        """Sources of the methods that the plan uses, one a line."""
        return citations_of(self)

    def alternatives(self, name: str | None = None) -> Alternatives:
        """What else could treat a latent or a parameter, or each of them: strategy, what it changes, and its price.

        Each is tried: what the model does not admit is not listed. A row's `options` ask for it:
        `EM(model, **row.options)`. `Truncated` is not among them, since only the user knows the range.

        Raises:
            KeyError: the model has no such latent or parameter.
        """
        return alternatives(self, name)

    def m_step(self, name: str) -> str:
        """How the parameter `name` is maximised: 'closed form', 'Newton', 'gradient' or 'fixed'.

        Raises:
            KeyError: the model has no such parameter.
        """
        return next(r.strategy for r in self.parameters if r.name == known(name, [r.name for r in self.parameters]))

    def e_step(self, name: str) -> str:
        """How the latent `name` is treated.

        Raises:
            KeyError: the model has no such latent.
        """
        return next(r.strategy for r in self.latents if r.name == known(name, [r.name for r in self.latents]))


def known(name: str, names: Sequence[str]) -> str:
    if name not in names:
        raise KeyError(f"the model has no {name!r}: {nearest(name, names)}")
    return name


def make_plan(
    program: Program,
    problem: Problem,
    layout: Layout,
    blocks: tuple[AbstractBlock, ...],
    chunks: Chunks | None,
    params: Params,
    bundle: Bundle,
    notes: tuple[str, ...] = (),
    integrals: tuple[Integral, ...] = (),
    treatment: AbstractTreatment | None = None,
) -> Plan:
    """Write the plan down.

    Raises:
        PlanError: a table would not fit in memory; crossed plates have no exact elimination.
    """
    cost = measure(problem, layout, chunks, params, bundle, integrals)
    if cost.bytes > MEMORY_LIMIT:
        latent = max(program.latents.values(), key=lambda z: z.num_states).name
        raise PlanError(
            latent,
            problem=f"summing it out exactly needs a table of {human(cost.bytes)} (order {', '.join(cost.order)})",
            mend="reduce the number of states or of parents of one site, or split the data's rows",
        )
    idle = tuple(
        f"nothing observed depends on '{n}': is a use of it forgotten?" for n in problem.params if unread(n, problem)
    )
    return Plan(
        program, problem, layout, blocks, chunks,
        (*(as_treated(r, treatment) for r in latent_rows(program, problem, layout)),
         *continuous_rows(integrals, treatment)),
        tuple(parameter_rows(program, problem, blocks)), cost, (*program.notes, *notes, *idle), integrals,
        treatment=treatment,
    )  # fmt: skip


def measure(
    problem: Problem,
    layout: Layout,
    chunks: Chunks | None,
    params: Params,
    bundle: Bundle,
    integrals: Sequence[Integral],
) -> Cost:
    """Run the elimination on shapes alone."""
    steps: list[Step | ChainStep] = []
    sizes: list[int] = []

    def run(p, b):
        steps.clear()
        cells = problem.cells(p, b)
        plain = [f for f in problem.factors.values() if not f.is_prior and not f.integrated]
        tables = [f.table(cells[f.name], b.rows[f.name]) for f in plain] + [i.integrate(p, b)[0] for i in integrals]
        sizes[:] = [t.value.array.size for t in tables]
        return eliminate(tables, make_layout(layout, b), steps=steps)

    itemsize = jax.eval_shape(run, dict(params), bundle).dtype.itemsize
    joint = [s.entries for s in steps] or sizes or [0]
    held = joint
    if chunks is not None:
        held = [int(j * chunks.size * chunks.devices / chunks.rows) for j in joint]
    return Cost(sum(joint), max(joint), max(held) * itemsize, tuple(s.latent for s in steps))


def latent_rows(program: Program, problem: Problem, layout: Layout):
    for name, latent in program.latents.items():
        plates = tuple(a for a in latent.axes if not a.startswith("#"))
        cells = int(np.prod([layout.sizes[p] for p in plates], dtype=int))
        readers = [f for f in problem.factors.values() if name in {program.base_of(z.name) for z in f.latents}]
        partners = sorted({program.base_of(z.name) for f in readers for z in f.latents} - {name})
        reason = f"{latent.num_states} states" + (f" x {cells:,} cells" if cells > 1 else "")
        if chain := next((c for c in program.chains if name in c.variables), None):
            reason += f", carried along {chain.length:,} steps: forward and backward messages in scaled probabilities"
        reason += ", summed out together with " + ", ".join(partners) if partners else ", each cell on its own"
        rows = sorted({p for f in readers for p in f.site.plates})
        if cells == 1 and rows:
            reason += f"; one value for all rows of {', '.join(rows)}"
        if any(f.route and name in f.route.latents for f in readers):
            reason += "; rows of another plate find their cell by index"
        if not all(f.compact for f in readers if f.completions is None):
            reason += "; tabulated at full shape, since the model's text does not broadcast over it"
        yield LatentRow(name, "exact", latent.num_states, plates, cells, reason)


def as_treated(row: LatentRow, treatment: AbstractTreatment | None) -> LatentRow:
    """The row of a discrete latent, with what an E-step other than the exact one makes of it."""
    said = treatment and treatment.described(row.name)
    if not said:
        return row
    return dataclasses.replace(row, strategy=said[0], reason=f"{said[1]}; {row.reason}")


def continuous_rows(integrals: Sequence[Integral], treatment: AbstractTreatment | None):
    for part in (*integrals, *([treatment] if treatment else [])):
        for row in part.rows():
            yield LatentRow(row.name, row.strategy, 0, row.plates, row.cells, row.reason)


def parameter_rows(program: Program, problem: Problem, blocks: Sequence[AbstractBlock]):
    by_name: Mapping[str, AbstractBlock] = {n: b for b in blocks for n in b.names}
    for name, param in problem.params.items():
        block = by_name.get(name)
        if unread(name, problem):
            reason = "nothing observed depends on it, so it stays at its start value"
            yield ParameterRow(name, "fixed", "", reason, param.shape, param.prior, "")
            continue
        if block is None:
            yield ParameterRow(name, "fixed", "", "held at its start value", param.shape, param.prior, "")
            continue
        prior = program.sites[param.prior].distribution if param.prior else None
        yield ParameterRow(name, block.strategy, block.update, block.reason, param.shape, prior, block.source)


def unread(name: str, problem: Problem) -> bool:
    """Whether nothing depends on a parameter, not even a prior."""
    return problem.params[name].prior is None and not uses_of(name, list(problem.factors.values()))


def human(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def notes_of(program: Program, truncated: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Judgements that the user may turn: priors maximised, sums cut off."""
    judged = [p for p in program.params.values() if p.prior and "maximize=" not in p.reason]
    read = {n for s in program.sites.values() if s.role == "continuous" for n in s.parents}
    turn = {p.name: f'; a latent is drawn from it: latent=["{p.name}"] would integrate it' for p in judged}
    notes = [f"'{p.name}' is {p.reason}{turn[p.name] if p.name in read else ''}" for p in judged]
    if flat := [f"'{n}'" for n, z in program.continuous.items() if z.flat]:
        notes.append(
            f"{', '.join(flat)} flat over all numbers: the log-likelihood is the restricted one (REML), or that of a "
            "diffuse start, and compares among models alone that are flat over the same"
        )
    for name, (low, high) in ranges_of(program, truncated).items():
        notes.append(f"'{name}' is summed over {low} ... {high} only; mass outside is left out of the likelihood")
    return tuple(notes)

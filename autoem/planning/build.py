"""All stages in order, once a structure: trace, classify, factors, blocks, plan, kernel.

In: a model, its arguments and the options. Out: `Build`, which turns new data of the same shapes into a `Bundle`
without reading the model again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import Intractable, ModelError, PlanError
from autoem.accelerate import AbstractAcceleration, Accelerator
from autoem.e_step.cells.local import LocalBlock
from autoem.e_step.elimination.places import build_layout
from autoem.e_step.gaussian.chain import GaussianChain
from autoem.e_step.groups import Block, build_blocks, partly_seen, with_gaps
from autoem.e_step.joined import Joined
from autoem.e_step.strategies import Importance, Laplace
from autoem.e_step.tables.factors import build_factors
from autoem.e_step.tables.tabulate import Factor
from autoem.e_step.treatment import AbstractTreatment
from autoem.graph.programs import jit_once, jit_well
from autoem.ir import Program
from autoem.lowering.bundle import Preparation, Routes, make_bundle
from autoem.lowering.chunks import plan_chunks, spread_rows
from autoem.lowering.condense import note_of, seen_by_moments
from autoem.lowering.integrals import Integral
from autoem.lowering.kernel import Kernel
from autoem.lowering.methods import settled
from autoem.m_step.apart import in_groups
from autoem.m_step.block import AbstractBlock
from autoem.m_step.choose import choose, kind_of
from autoem.m_step.closed_form.superposition import Superposition
from autoem.m_step.mixed_signs import mixed_signs, superpositions
from autoem.m_step.problem import Bundle, Params, Problem
from autoem.m_step.strategies import AbstractMStep
from autoem.mean_field.build import cells_by
from autoem.passes.classify import classify, continuous_latents
from autoem.planning.jumps import refuse_jumps
from autoem.planning.options import Options
from autoem.planning.plan import Plan, make_plan, notes_of
from autoem.planning.wishes import refuse_unknown_sites
from autoem.reading.support import binary_data
from autoem.reading.trace import Discovery, Source, trace
from autoem.reading.walks import walks_among
from autoem.treatments import AbstractDrawn, drawn_treatment, treatment_of, try_out
from autoem.treatments.discrete import STRATEGIES as DISCRETE

LARGE = 1_000_000  # entries of the data from which their preparation is compiled well rather than fast


@dataclasses.dataclass(eq=False)
class Build:
    """A derived model, ready for data of one structure."""

    plan: Plan
    kernel: Kernel
    found: Discovery
    source: Source
    factors: tuple[Factor, ...]
    limits: dict[str, np.ndarray]
    model_start: Callable[[dict, Array], dict[str, Array]]
    seeding: dict[bool, Callable] = dataclasses.field(default_factory=dict)
    reading: dict[Any, Any] = dataclasses.field(default_factory=dict)
    alike: tuple[str, ...] = ()
    robust: Callable | None = None
    proof: Callable | None = None
    sums: tuple[Superposition, ...] = ()
    mixed: frozenset[str] = frozenset()
    accelerator: Accelerator | None = None
    prepared: bool = False
    observed: Callable | None = None
    routes: Routes = dataclasses.field(default_factory=Routes)

    def __post_init__(self):
        large = sum(np.size(x) for x in self.source.data) >= LARGE
        self.compiled = jit_well if large else jit_once  # over many rows it runs long enough to be worth compiling well
        self._prepare = Preparation(self.program, self.factors, self.compiled, seen_by_moments(self.kernel))

    @property
    def program(self) -> Program:
        return self.plan.program

    def data(self, source: Source) -> dict[int, Array]:
        return {} if source.concrete else {i: jnp.asarray(x) for i, x in enumerate(source.data)}

    def plain_bundle(self, source: Source, key: Array, fitted: bool = False) -> Bundle:
        """The data of a call, prepared, in one piece; with moments, where they are to be `fitted` by them."""
        data, find = self.data(source), cells_by(self.kernel.treatment)
        cells = self.routes.of(find, self.program, self.factors, data, key) if self.has_routes else {}
        return self._prepare.whole(data, key, cells, fitted)

    def whole_bundle(self, source: Source, key: Array) -> Bundle:
        """The same with all the data, for questions to the model itself."""
        return dataclasses.replace(self.plain_bundle(source, key), data=self.data(source))

    def bundle(self, source: Source, key: Array) -> Bundle:
        """The data of a call, prepared and placed on the devices."""
        if self.kernel.treatment is not None and self.kernel.treatment.needs_data:
            return self.whole_bundle(source, key)
        chunks = self.plan.chunks
        if chunks is None or chunks.devices == 1 or chunks.main < chunks.rows or source.concrete:
            return spread_rows(self.plain_bundle(source, key, fitted=True), chunks)
        return self._prepare.spread(dict(enumerate(source.data)), key, chunks)

    @property
    def has_routes(self) -> bool:
        return any(f.route or f.routes or f.integrated for f in self.factors)

    def start(self, source: Source, key: Array) -> dict[str, Array]:
        """The model's own start values."""
        return self.model_start(start_data(self.found, source), key)

    def e_state(self, params: Params, bundle: Bundle, key: Array, number: int) -> Any:
        """What the E-step of a start, by its number, remembers before its first step."""
        treatment = self.kernel.treatment
        if treatment is None:
            return None
        if not self.prepared:
            treatment.prepare(self.kernel, params, bundle, key)
            self.prepared = True
        return self.kernel.begun(params, bundle, jax.random.fold_in(key, number))

    def final(self, params: Params, bundle: Bundle, state: Any) -> tuple[float, float]:
        """The objective of a noisy fit at its end, from draws of its own, and its standard error."""
        found = self.final_run(dict(params), bundle, state, jax.random.key(60))
        return float(found[0]), float(found[1])

    @functools.cached_property
    def final_run(self) -> Callable:
        """That estimate, compiled once."""
        return jit_once(self.kernel.final)

    def fits(self, source: Source) -> bool:
        """Whether supports, signs of sums, and what is 0 or 1 are those in this data that the plan was made for."""
        moved = support_limits(self.found, source)
        same = all(np.array_equal(self.limits[n], v) for n, v in moved.items())
        binary = self.kernel.problem.binary
        same = same and (not binary or binary <= binary_data(self.program, source))
        return same and self.mixed == self.signs(source).keys() and self.gaps == self.gaps_in(source)

    @property
    def gaps(self) -> frozenset[str]:
        """Sites whose vectors are seen in part."""
        return frozenset(f.name for f in self.factors if f.gaps)

    def gaps_in(self, source: Source) -> frozenset[str]:
        """The same in other data."""
        values = {("data", i): jnp.asarray(x) for i, x in enumerate(source.data)} if source.drop_nan else {}
        found = (f.name for f in self.factors if values and partly_seen(self.program, f, values) is not None)
        return frozenset(found) if not source.concrete else self.gaps

    def signs(self, source: Source) -> dict[str, str]:
        """What the signs of this data forbid; see `mixed_signs`."""
        if not self.sums:
            return {}
        key = jax.random.key(0)
        values = {**{("data", i): x for i, x in self.data(source).items()}, ("key", 0): key}
        return mixed_signs(self.sums, self.program.params, self.start(source, key), values)


def call_of(source: Source, data: Mapping[int, Array]) -> tuple[tuple, dict]:
    """The model's own arguments, the data among them taken from `data` where those are given."""
    return source.call([data.get(i, x) for i, x in enumerate(source.data)])


def support_limits(found: Discovery, source: Source) -> dict[str, np.ndarray]:
    """Bounds of the latents' supports that depend on the data."""
    out = {}
    for key in found.graph.outputs:
        if key[0] == "init" or key[1] not in ("low", "high") or not found.graph.needs(key):
            continue
        values = {("data", i): jnp.asarray(x) for i, x in enumerate(source.data)}
        v = np.asarray(found.graph.evaluate([key], values)[0])
        out[".".join(key)] = np.asarray([v.min(), v.max()])
    return out


def start_data(found: Discovery, source: Source) -> dict[int, Array]:
    """Those of the data that the model's own start values are computed from."""
    if source.concrete:
        return {}
    needs = found.graph.needs(*(k for k in found.graph.outputs if k[0] == "init"))
    return {k[1]: jnp.asarray(source.data[k[1]]) for k in needs if k[0] == "data"}


def start_values(found: Discovery, data: Mapping[int, Array], key: Array) -> dict[str, Array]:
    keys = [k for k in found.graph.outputs if k[0] == "init"]
    values = {**{("data", i): x for i, x in data.items()}, ("key", 0): key}
    start = dict(zip((k[1] for k in keys), found.graph.evaluate(keys, values), strict=True))
    weights = {n for n, (_, c) in found.params.items() if kind_of(c) == "simplex"}  # `jnp.ones(3)` sum to three
    arrays = {n: jnp.asarray(v, float) for n, v in start.items()}
    return {n: v / v.sum(-1, keepdims=True) if n in weights else v for n, v in arrays.items()}


def read(
    model: Callable,
    args: tuple,
    kwargs: dict,
    options: Options,
    joined: Mapping[str, frozenset[str]] | None = None,
    drawn: Collection[str] = (),
    stepwise: bool = False,
) -> tuple[Program, Discovery, Source]:
    """The model as a classified program.

    Of its continuous latents, those `joined` have some plates as coordinates, and those `drawn` no formula; laws of
    whole paths are read step by step where `stepwise` is set.
    """
    truncated, drop_nan = options.truncated(), options.missing == "marginalize"
    program, found, source = trace(model, args, kwargs, truncated=truncated, drop_nan=drop_nan)
    if hidden := continuous_latents(program, options.latent, options.maximize):
        walks = walks_among(found.records, hidden) if stepwise else ()
        program, found, source = trace(
            model, args, kwargs, truncated=truncated, drop_nan=drop_nan, continuous=hidden, joined=joined, walks=walks
        )
    program = with_wishes(program, options, drawn)
    supports = {n: r.fn.support for n, r in found.records.items() if not r.observed}
    program = classify(program, supports, options.latent, options.maximize)
    refuse_unknown_sites(program, options)
    return program, found, source


def build(model: Callable, args: tuple, kwargs: dict, options: Options, key: Array) -> Build:
    """Derive EM for `model` called with `args` and `kwargs`.

    Continuous latents that turn out to have no exact posterior are drawn, unless something else was asked for.

    Raises:
        ModelError, PlanError, DataError: see each stage.
    """
    drawn: dict[str, str] = {}
    while True:
        try:
            return derive(model, args, kwargs, options, key, drawn)
        except Intractable as refusal:
            if not all(n not in drawn and open_to_draws(n, options) for n in refusal.latents):
                raise
            drawn.update(dict.fromkeys(refusal.latents, refusal.problem))


def open_to_draws(name: str, options: Options) -> bool:
    """Whether a latent without an exact posterior may be drawn, for all that was asked."""
    wish = options.e_step.get(name) if isinstance(options.e_step, Mapping) else options.e_step
    return wish is None or isinstance(wish, (Laplace, Importance, *DISCRETE))


def derive(model: Callable, args: tuple, kwargs: dict, options: Options, key: Array, drawn: Mapping[str, str]) -> Build:
    """The same, where it is known which latents have to be `drawn`, and why.

    A law of a whole path is read step by step if the path then is a chain of Gaussian states, else as one vector.
    """
    try:
        reading = read(model, args, kwargs, options, drawn=drawn, stepwise=True)
    except (ModelError, PlanError):  # as a scan it may be refused for what a vector is not
        reading = read(model, args, kwargs, options, drawn=drawn)
    if walks := reading[2].walks:
        with contextlib.suppress(ModelError, PlanError):
            built = derived(model, args, kwargs, options, key, drawn, reading)
            chains = [i.block for i in built.kernel.integrals if isinstance(i.block, GaussianChain)]
            if walks <= {n for block in chains for n in block.names}:
                return built
        reading = read(model, args, kwargs, options, drawn=drawn)
    return derived(model, args, kwargs, options, key, drawn, reading)


def derived(
    model: Callable,
    args: tuple,
    kwargs: dict,
    options: Options,
    key: Array,
    drawn: Mapping[str, str],
    reading: tuple[Program, Discovery, Source],
) -> Build:
    """The same from a reading of the model."""
    program, found, source = reading
    data = {} if source.concrete else {i: jnp.asarray(x) for i, x in enumerate(source.data)}
    values = {**{("data", i): x for i, x in data.items()}, ("key", 0): key}
    joined: dict[str, frozenset[str]] = {}
    while True:
        factors, cells = build_factors(program, values)
        try:
            groups, found_cells = build_blocks(program, factors, values)
            break
        except Joined as latent:
            joined[latent.name] = joined.get(latent.name, frozenset()) | latent.axes
            program, found, source = read(model, args, kwargs, options, joined, drawn, bool(source.walks))
    factors, gaps, patterns = with_gaps(program, factors, values)
    groups = (*groups, *gaps)
    cells = {n: jnp.asarray(c) for n, c in {**cells, **found_cells, **patterns}.items()}
    problem = Problem({f.name: f for f in factors}, program.params, binary_data(program, source))

    whole = functools.partial(make_bundle, program, factors)
    shapes = jax.eval_shape(whole, data, key, cells)
    shapes = dataclasses.replace(shapes, data=jax.eval_shape(lambda d: d, data))
    model_start = jit_once(lambda data, key: start_values(found, data, key))
    params = model_start(start_data(found, source), key)
    integrals = integrals_of(groups, program, params, lambda: jit_once(whole)(data, key, cells))
    solved = {n: f for i in integrals for n, f in i.as_solved().items()}
    problem = dataclasses.replace(problem, factors={**problem.factors, **solved})
    layout = build_layout(program, values, cells)
    treatment = drawn_treatment(program, factors, lambda d: call_of(source, d), list(drawn.values()))
    drawing = treatment is not None
    refuse_jumps(program, taken_as_smooth(integrals, treatment), params, values)
    treatment = treatment_of(program, options.e_step, options.accelerate, treatment)
    # whatever a treatment makes of the tables, logarithms lose nothing
    layout = dataclasses.replace(layout, scales=dict.fromkeys(layout.scales), cells={}, logs=treatment is not None)
    kernel = Kernel(program, problem, layout, (), None, integrals, treatment)
    if integrals or drawing:  # what the M-step sees of the data has nodes in it
        shapes = jax.eval_shape(kernel.completed, params, shapes)
    wishes = asked(program, options)
    blocks = choose(problem, params, shapes, wishes)
    sums = superpositions(blocks)
    if mixed := mixed_signs(sums, program.params, params, values):
        blocks = choose(problem, params, shapes, wishes, mixed)
    concrete = functools.cache(lambda: jit_once(kernel.completed)(params, jit_once(whole)(data, key, cells)))
    blocks = tuple(in_groups(b, params, concrete) for b in blocks)
    chunks = None if integrals or drawing else plan_chunks(program, problem, layout, params, shapes)
    notes = notes_of(program, options.truncated())
    kernel = dataclasses.replace(kernel, blocks=blocks, chunks=chunks)
    plan = make_plan(program, problem, layout, blocks, chunks, params, shapes, notes, integrals, treatment)
    if treatment is not None and not drawing:
        try_out(kernel, params, shapes)
    accelerator = accelerated(options.accelerate, program, blocks, treatment)
    plan = dataclasses.replace(
        plan,
        accelerate=accelerator and accelerator.method,
        notes=(*plan.notes, *note_of(kernel, accelerator is not None)),
    )
    return Build(
        plan, kernel, found, source, factors, support_limits(found, source), model_start, sums=sums,
        mixed=frozenset(mixed), accelerator=accelerator, routes=Routes(frozenset(cells)),
    )  # fmt: skip


def taken_as_smooth(integrals: Sequence[Integral], drawn: AbstractTreatment | None) -> set[str]:
    """The continuous latents whose integral rests on derivatives, or on a rule for smooth functions."""
    blocks = [i.block for i in integrals if isinstance(i.block, LocalBlock) and i.block.how.smooth]
    names = {n for b in blocks for n in b.names}
    return names | set(drawn.hidden.names) if isinstance(drawn, AbstractDrawn) and drawn.smooth else names


def accelerated(
    method: AbstractAcceleration | None,
    program: Program,
    blocks: tuple[AbstractBlock, ...],
    treatment: AbstractTreatment | None,
) -> Accelerator | None:
    """The acceleration of the EM map that the blocks make.

    Raises:
        PlanError: that is no map, since an optimiser remembers where it was, or the E-step draws at random.
    """
    if method and treatment is not None and treatment.noisy:
        problem = "accelerate= extrapolates a map, and an E-step that draws at random is none"
        raise PlanError("accelerate", problem=problem, mend="leave accelerate out", kind="option")
    for block in blocks if method else ():
        if block.remembers:
            problem = "its optimiser's state makes every EM step another map, which accelerate= cannot extrapolate"
            mend = f'accelerate=None, or m_step={{"{block.names[0]}": autoem.m_step.Newton()}}'
            raise PlanError(block.names[0], problem=problem, mend=mend)
    names = tuple(n for b in blocks for n in b.names if np.prod(program.params[n].shape) > 0)
    return Accelerator(method, program.params, names) if method and names else None


def integrals_of(
    groups: Sequence[Block], program: Program, params: Mapping[str, Array], bundle: Callable
) -> tuple[Integral, ...]:
    """What the kernel asks of each block; the data are looked at only where a method is to be chosen by them."""
    known = functools.cache(bundle)
    return tuple(Integral(settled(g, program, params, known()) if isinstance(g, LocalBlock) else g) for g in groups)


def with_wishes(program: Program, options: Options, drawn: Collection[str] = ()) -> Program:
    """The program, each of its continuous latents with the strategy that was asked for it, and whether that draws."""
    wish = options.e_step
    whole = None if isinstance(wish, DISCRETE) else wish
    wishes = {n: wish.get(n) if isinstance(wish, Mapping) else whole for n in program.continuous}
    latents = {
        n: dataclasses.replace(z, wish=wishes[n], drawn=n in drawn or getattr(wishes[n], "drawn", False))
        for n, z in program.continuous.items()
    }
    return dataclasses.replace(program, continuous=latents)


def asked(program: Program, options: Options) -> dict[str, AbstractMStep | None]:
    wish = options.m_step
    return {n: wish.get(n) if isinstance(wish, Mapping) else wish for n in program.params}

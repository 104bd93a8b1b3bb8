"""Where a fit starts: the model's own values, the user's, or responsibilities seeded from the data.

In: a build and its data. Out: a list of parameter dicts, one a start, and notes on how they came about. A seeded start
is an M-step from responsibilities, so it works for any model: k-means++ on the observed values where a latent's rows
have some, random responsibilities elsewhere. Every other restart is seeded from a few random rows for each state: less
often good, but not blind to what distance does not show (two lines that cross).

References:
    Arthur and Vassilvitskii 2007, "k-means++: the advantages of careful seeding". McLachlan and Peel 2000, "Finite
    mixture models", section 2.12 (random starts).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import constraints

from autoem._errors import DataError, PlanError
from autoem.e_step.elimination.along_time import at, since
from autoem.e_step.elimination.eliminate import route_to_rows
from autoem.e_step.tables.completions import NODES
from autoem.e_step.tables.tabulate import Factor
from autoem.graph.named import Named, multiply, named
from autoem.graph.programs import jit_once
from autoem.ir import Latent, at_lag, at_step
from autoem.lowering.integrals import Integral
from autoem.lowering.kernel import with_nodes
from autoem.m_step.choose import kind_of
from autoem.m_step.closed_form.bounded import domain_of
from autoem.m_step.problem import Bundle, Params, make_layout
from autoem.m_step.unconstrained import to_constrained, to_unconstrained
from autoem.mean_field.field import Field
from autoem.passes.classify import nearest
from autoem.planning.build import Build
from autoem.reading.trace import Source

SOFT = 0.9  # weight of the seeded state; the rest is shared, so that no state starts empty
FEW = 3  # rows for each state where a start is seeded from a few
SEEDED = "started from seeded responsibilities"


def starts(
    built: Build, source: Source, bundle: Bundle, init: str | Mapping[str, Any], restarts: int, key: Array
) -> tuple[list[dict[str, Array]], tuple[str, ...]]:
    """`restarts` start points, and what is to be said of them.

    Raises:
        PlanError: a dict names something that the model does not have.
        DataError: a value has the wrong shape or domain.
    """
    base = built.start(source, key)
    weights, fixed = given_start(built, init)
    base.update(fixed)
    if not weights and init != "random":
        refuse_outside(built, base)
    plain = functools.cache(lambda: whole(built, source, key, bundle))
    alike = alike_at(built, base, plain, fixed) if fixed else built.alike
    notes: tuple[str, ...] = ()
    if weights or init == "random":
        first = seeded(built, base, plain(), key, weights)
    elif init != "model" and alike:
        first = {**seeded(built, base, plain(), key), **fixed}
        notes = (f"the model's own start treats the states of {', '.join(alike)} alike: {SEEDED}",)
    else:
        first = base
    if (init == "model" and alike) or (fixed and alike and alike_at(built, first, plain, fixed)):
        notes = (f"the start given treats the states of {', '.join(alike)} alike, and so does every step from there",)
    rest = [seeded(built, base, plain(), jax.random.fold_in(key, i), few=i % 2 == 1) for i in range(1, restarts)]
    return [first, *rest], notes


def given_start(built: Build, init: str | Mapping[str, Any]) -> tuple[dict[str, Named], dict[str, Array]]:
    """What the user gave to start from, checked: responsibilities by latent, and values by parameter.

    Raises:
        PlanError, DataError: as `starts`.
    """
    given = dict(init) if isinstance(init, Mapping) else {}
    weights = {n: responsibilities(built, n, v) for n, v in given.items() if n in built.program.latents}
    return weights, {n: start_value(built, n, v) for n, v in given.items() if n not in built.program.latents}


def alike_at(built: Build, params: Params, bundle: Callable[[], Bundle], given: Mapping[str, Array]) -> tuple[str, ...]:
    """Latents whose states nothing tells apart at `params`; computed only where the given values suggest it."""
    counts = {z.num_states for z in built.program.latents.values() if z.num_states > 1}
    values = [np.asarray(v) for v in given.values()]
    by_state = [same_along(v, i) for v in values for i, size in enumerate(v.shape) if size in counts]
    twins = any(np.array_equal(a, b) for i, a in enumerate(values) for b in values[:i])
    if not all(by_state) or not (by_state or twins or built.alike):
        return ()
    return no_spread(jit_once(lambda p, b: state_spreads(built, tables_at(built, p, b)))(dict(params), bundle()))


def same_along(value: np.ndarray, axis: int) -> bool:
    """Whether an axis repeats one slice."""
    return bool((value == np.take(value, [0], axis)).all())


def no_spread(spread: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the latents whose spread is no more than rounding."""
    return tuple(n for n, v in spread.items() if float(v) <= 100 * float(jnp.finfo(jnp.result_type(float)).eps))


def tables_at(built: Build, params: Params, bundle: Bundle) -> dict[str, Named]:
    """The table of every factor that reads no continuous latent."""
    problem = built.kernel.problem
    cells = problem.cells(params, bundle)
    return {n: problem.factors[n].table(cells[n], bundle.rows[n]).value for n in cells}


def state_spreads(built: Build, tables: Mapping[str, Named]) -> dict[str, Array]:
    """How far the states of each latent differ in any factor but its own prior; zero at a saddle point of EM."""
    out: dict[str, list[Array]] = {}
    for f in built.kernel.likelihood_factors:
        table = tables[f.name]
        for z in f.latents:
            if z.name == f.name or z.num_states < 2:
                continue
            rows = table.to((z.name, *(a for a in table.axes if a != z.name)))
            out.setdefault(built.program.base_of(z.name), []).append(
                jnp.max(jnp.abs(rows - rows[:1]) / (1 + jnp.abs(rows[:1])))
            )
    return {n: jnp.max(jnp.stack(s)) for n, s in out.items()}


def whole(built: Build, source: Source, key: Array, bundle: Bundle) -> Bundle:
    """The bundle as one piece on one device."""
    return built.plain_bundle(source, key) if built.plan.chunks else bundle


def start_value(built: Build, name: str, value: Any) -> Any:
    """A user's start value, checked."""
    if name not in built.program.params:
        names = [*built.program.params, *built.program.latents]
        problem = "init= names it, but the model has no such parameter or latent"
        raise PlanError(name, problem=problem, mend=nearest(name, names))
    param = built.program.params[name]
    try:
        array = np.asarray(value, dtype=param.dtype)
    except (TypeError, ValueError):
        mend = f"give an array of shape {param.shape}"
        raise DataError(name, problem=f"its start value {value!r} is no array of numbers", mend=mend) from None
    if array.shape != param.shape:
        try:
            array = np.broadcast_to(array, param.shape)
        except ValueError:
            raise DataError(
                name, problem=f"its start value has shape {array.shape}", mend=f"give an array of shape {param.shape}"
            ) from None
    if not np.isfinite(array).all():
        raise DataError(name, problem="its start value is not finite", mend="give finite numbers")
    # a file holds seven digits: a simplex that misses one by that much is meant as one
    if "Simplex" in str(param.constraint) and np.allclose(array.sum(-1), 1, atol=1e-4):
        array = array / array.sum(-1, keepdims=True)
    if not inside(param.constraint, array):
        raise DataError(
            name, problem=f"its start value lies outside {param.constraint}", mend="give a value inside its constraint"
        )
    return array


def refuse_outside(built: Build, start: Params) -> None:
    """Raise where the model starts a parameter outside of what its own constraint allows."""
    for name, param in built.program.params.items():
        kind, value = kind_of(param.constraint), np.asarray(start[name])
        if param.prior or (kind != "simplex" and domain_of(param.constraint) is None):
            continue
        if inside(param.constraint, value) and np.isfinite(value).all():
            continue
        shown = np.array2string(value, precision=4, threshold=6)
        raise DataError(
            name,
            problem=f"the model starts it outside {param.constraint}, at {shown}",
            mend=f'numpyro.param("{name}", ..., constraint=...) with an initial value that the constraint allows',
            kind="parameter",
        )


def inside(constraint: Any, array: np.ndarray) -> bool:
    """Whether a value satisfies a constraint; the usual ones in NumPy, since each JAX operation would be compiled."""
    kind = kind_of(constraint)
    domain = domain_of(constraint)
    if domain is not None and kind == "other":
        rising = not domain.ordered or bool((np.diff(array, axis=-1) > 0).all())
        return rising and bool((array >= domain.low).all() and (array <= domain.high).all())
    if kind == "real":
        return True
    if kind in ("positive", "unit"):
        return bool((array >= 0).all() and (kind == "positive" or (array <= 1).all()))
    if kind == "simplex":
        return bool((array >= 0).all() and np.allclose(array.sum(-1), 1, atol=1e-6))
    if constraint is constraints.positive_definite:
        symmetric = np.allclose(array, np.swapaxes(array, -1, -2), atol=1e-6)
        return bool(symmetric and (np.linalg.eigvalsh(array) > 0).all())
    return bool(np.all(np.asarray(constraint(jnp.asarray(array)))))


def responsibilities(built: Build, name: str, value: Any) -> Named:
    """A user's responsibilities of one latent, checked."""
    latent = built.program.latents[name]
    shape = (*latent.shape, latent.num_states)
    array = jnp.asarray(value, float)
    if array.shape != shape:
        raise DataError(
            name, problem=f"its responsibilities have shape {array.shape}", mend=f"give an array of shape {shape}"
        )
    if not bool((array >= 0).all()) or not bool(jnp.allclose(array.sum(-1), 1, atol=1e-4)):
        raise DataError(
            name, problem="its responsibilities do not sum to one over the last axis", mend="normalise them"
        )
    chain = built.program.chain_of(name)
    array = array[::-1] if chain is not None and chain.reverse else array
    return named(array / array.sum(-1, keepdims=True), (*latent.axes, name))


def seeded(
    built: Build,
    params: Params,
    bundle: Bundle,
    key: Array,
    given: Mapping[str, Named] | None = None,
    few: bool = False,
) -> dict[str, Array]:
    """Parameters after an M-step from seeded responsibilities; jittered instead where the model has no latents."""
    if not built.program.latents:
        return jittered(built, params, key)
    if few not in built.seeding:

        def run(params, bundle, key, given):
            weights = {**random_weights(built, bundle, key, few), **given}
            statistics = {**by_field(built, params, bundle, key), **expected_under(built, params, bundle, weights)}
            states = built.kernel.init_states(params)
            first, states = built.kernel.maximise(params, statistics, bundle, states)
            new = built.kernel.maximise(first, statistics, bundle, states)[0]
            return {n: jnp.where(jnp.isfinite(v).all(), v, params[n]) for n, v in new.items()}

        built.seeding[few] = built.compiled(run)
    return built.seeding[few](dict(params), bundle, key, dict(given or {}))


def jittered(built: Build, params: Params, key: Array) -> dict[str, Array]:
    out = {}
    for i, (name, value) in enumerate(params.items()):
        free = to_unconstrained(built.program.params[name], value)
        noise = jax.random.normal(jax.random.fold_in(key, i), free.shape)
        out[name] = to_constrained(built.program.params[name], free + noise)
    return out


def random_weights(built: Build, bundle: Bundle, key: Array, few: bool) -> dict[str, Named]:
    """Responsibilities of every latent.

    k-means++ where rows have values, random where they have none; or, with `few`, weight on a few random rows alone.
    """
    out = {}
    for i, latent in enumerate(built.program.latents.values()):
        own, k, cells = jax.random.fold_in(key, i), latent.num_states, int(np.prod(latent.shape))
        features = None if few else row_features(built, bundle, latent)
        if few and cells >= 2 * FEW * k:
            chosen = jax.random.choice(own, cells, (FEW * k,), replace=False)
            weight = jnp.full((cells, k), 1e-3 / k).at[chosen, jnp.arange(FEW * k) % k].set(1.0)
        elif features is not None and cells > k:
            weight = SOFT * jax.nn.one_hot(plus_plus(own, features, k), k) + (1 - SOFT) / k
        else:
            weight = jax.random.dirichlet(own, jnp.ones(k), latent.shape)
        out[latent.name] = named(weight.reshape(*latent.shape, k), (*latent.axes, latent.name))
    return out


def row_features(built: Build, bundle: Bundle, latent: Latent) -> Array | None:
    """Standardised observed values beside each cell of a latent, `(cells, features)`; None where there are none."""
    plates = [a for a, s in zip(latent.axes, latent.shape, strict=True) if s > 1]
    if not plates or latent.num_states < 2:
        return None
    columns = [
        column for f in built.kernel.likelihood_factors for column in factor_columns(f, bundle, latent.name, plates)
    ]
    if not columns:
        return None
    matrix = jnp.concatenate(columns, 1)
    spread = matrix.std(0)
    return (matrix - matrix.mean(0)) / jnp.where(spread > 0, spread, 1)


def factor_columns(factor: Factor, bundle: Bundle, latent: str, plates: Sequence[str]) -> list[Array]:
    rows = bundle.rows[factor.name]
    reads = latent in {z.name for z in factor.latents}
    if not reads or factor.own or factor.route or factor.moving or factor.family is None or rows.value is None:
        return []
    value = factor.observations(rows) if factor.family.standardise else factor.features(rows)
    cells = int(np.prod([value.size(p) for p in plates if p in value.axes], dtype=int))
    if not set(plates) <= set(value.axes) or value.array.size > 64 * cells:
        return []
    rest = [a for a in value.axes if a not in plates]
    array = jnp.transpose(value.array, [value.axes.index(a) for a in (*plates, *rest)])
    return [array.reshape(cells, -1).astype(float)]


def plus_plus(key: Array, points: Array, count: int) -> Array:
    """Labels of the nearest of `count` points drawn with probability proportional to their squared distance."""
    first = points[jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(points))]
    distance = ((points - first) ** 2).sum(1)

    def draw(i, carry):
        nearest, labels = carry
        chosen = jax.random.categorical(jax.random.fold_in(key, i), jnp.log(nearest + 1e-30))
        away = ((points - points[chosen]) ** 2).sum(1)
        return jnp.minimum(nearest, away), jnp.where(away < nearest, i, labels)

    return jax.lax.fori_loop(1, count, draw, (distance, jnp.zeros(len(points), int)))[1]


def expected_under(built: Build, params: Params, bundle: Bundle, weights: Mapping[str, Named]) -> dict[str, Any]:
    """Expected statistics if the latents were independent with probabilities `weights`."""
    problem, layout = built.kernel.problem, make_layout(built.kernel.layout, bundle)
    cells = problem.cells(params, bundle)
    weights = {**weights, **weights_in_pieces(built, weights)}
    out = {}
    for block in built.kernel.integrals:
        more = completed_under(block, params, bundle, weights)
        out.update({**more, NODES: {**out.get(NODES, {}), **more[NODES]}})
    for name in cells.keys() - out.keys():
        factor = problem.factors[name]

        def table(c, factor=factor, name=name) -> Array:
            return factor.table(c, bundle.rows[name]).value.array

        value = factor.table(cells[name], bundle.rows[name]).value
        weight = Named(jnp.ones(()), ())
        for z in factor.latents:
            read = route_to_rows(weights[factor.latent_of(z.name)], factor.route_to(z.name), layout.cells)
            axes = tuple(z.name if a == factor.latent_of(z.name) else a for a in read.axes)
            weight = multiply(weight, Named(read.array, axes))
        inner = factor.inner
        if inner is not None and (scale := layout.scales[factor.latent_of(inner.name)]) is not None:
            weight = multiply(weight, route_to_rows(scale, factor.route_to(inner.name), layout.cells))
        absent = [p for p in factor.kept if p not in weight.axes and p not in value.axes]
        repeats = float(np.prod([layout.sizes[p] for p in absent], dtype=float))
        cotangent = weight.sum(a for a in weight.axes if a not in value.axes).to(value.axes) * repeats
        _, pull = jax.vjp(table, cells[name])
        out[name] = pull(jnp.broadcast_to(cotangent, value.array.shape).astype(value.array.dtype))[0]
    return out


def by_field(built: Build, params: Params, bundle: Bundle, key: Array) -> dict[str, Any]:
    """Expected statistics under the laws that a mean field with continuous latents starts from."""
    kernel, field = built.kernel, built.kernel.treatment
    if not isinstance(field, Field) or not field.blocks:
        return {}
    return field.expect(kernel, params, bundle, field.init(kernel, params, bundle, key)).statistics


def completed_under(block: Integral, params: Params, bundle: Bundle, weights: Mapping[str, Named]) -> dict[str, Any]:
    """The same of the sites of continuous latents, whose posterior is that of the parameters given."""
    moments = block.integrate(params, bundle)[1]
    weight = Named(jnp.ones(()), ())
    for z in block.block.discrete:
        weight = multiply(weight, weights[z.name])
    nodes = block.nodes_of_factors(moments, bundle)
    filled = with_nodes(bundle, nodes)
    out: dict[str, Any] = {f.name: block.expected(f, params, filled, weight, moments) for f in block.factors}
    return {**out, NODES: nodes}


def weights_in_pieces(built: Build, weights: Mapping[str, Named]) -> dict[str, Named]:
    """Responsibilities along a chain, for each of the pieces that its sites read."""
    out = {}
    for chain in built.program.chains:
        for name in (n for n in chain.lags if n in weights):
            whole = weights[name]
            steps = [h for h in range(-chain.ending, chain.lag) if -chain.length <= h < chain.length]
            out |= {at_step(name, h): at(whole, chain.time, h) for h in steps}
            for i in range(chain.lag + 1):
                later = since(whole, chain.time, chain.lag - i)
                count = chain.length - chain.lag
                axes = tuple(chain.bulk if a == chain.time else a for a in later.axes)
                cut = [slice(0, count) if a == chain.bulk else slice(None) for a in axes]
                out[at_lag(name, i)] = Named(later.array[tuple(cut)], axes)
    return out

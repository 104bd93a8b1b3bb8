"""Check the derivation against the model's own density, before anything is fitted.

At random parameters and a random completion of the latents every factor's table must equal what the model itself says.
What does not agree is refused with the site's name, so that a silent wrong answer cannot come of a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import biject_to, constraints

from autoem._errors import ModelError, PlanError
from autoem.e_step.elimination.along_time import pieces_of_paths
from autoem.e_step.elimination.eliminate import route_to_rows
from autoem.e_step.elimination.places import pad, scale_of
from autoem.e_step.tables.constants import log_density_constant
from autoem.e_step.tables.tabulate import Factor
from autoem.fitting.starts import no_spread, state_spreads, tables_at
from autoem.graph.named import Named, multiply, named, pick
from autoem.graph.programs import jit_once
from autoem.ir import Program
from autoem.lowering.integrals import Integral
from autoem.lowering.kernel import with_nodes
from autoem.m_step.choose import kind_of
from autoem.m_step.problem import Bundle, graph_values
from autoem.m_step.unconstrained import to_constrained, to_unconstrained
from autoem.mean_field.field import Field
from autoem.planning.build import Build
from autoem.reading.scan_checks import REGISTER, RUNNING
from autoem.reading.trace import Source
from autoem.treatments import AbstractDrawn


def verify(built: Build) -> tuple[str, ...]:
    """Compare every table with the model's own log density at a random completion.

    Returns:
        The latents whose states no factor tells apart at the model's own start (found on the way).

    Raises:
        ModelError: a site's table differs; names the site and a rewrite.
    """
    key, source = jax.random.key(20), built.source
    bundle = built.whole_bundle(source, key)
    start = built.start(source, key)
    # the same program at two points: at random parameters for the densities, at the start for what tells states apart
    program = jit_once(lambda *a: compare(built, *a))
    chosen = random_states(built, source)
    noise = noise_for(built, start)
    ours, theirs, size, _ = program(host_params(built, start, noise), noise, bundle, chosen)
    still = jax.tree.map(np.zeros_like, noise)
    _, at_start, _, spread = program({n: np.asarray(v) for n, v in start.items()}, still, bundle, chosen)
    refuse_without_density(built, theirs, at_start)
    eps = float(jnp.finfo(jnp.result_type(float)).eps)
    for name in ours:
        a, b, s = float(ours[name]), float(theirs[name]), float(size[name])
        # JAX's own special functions (betaln, igamma) are good to seven digits or so
        agree = abs(a - b) <= max(1e5 * eps, 1e-7) * (1 + s) or (
            not np.isfinite(b) and (a < -1e15 or not np.isfinite(a))
        )
        if not agree and b > -1e15:
            raise ModelError(
                name,
                problem=f"its table does not reproduce the model's own density ({a:.6g} against {b:.6g})",
                mend="let the site read each latent only at its own row (z, or z[group]), without z.shape or mixing "
                "rows; a site whose rows are vectors ends in .to_event(1)",
            )
    refuse_misread_masks(built, start, bundle)
    return no_spread(spread)


def refuse_without_density(built: Build, *found: Mapping[str, Array]) -> None:
    """Raise where a state's own density, or that of what reads it, is no number: its law has no spread somewhere."""
    for name in built.program.strands:
        if all(name in densities and bool(jnp.isnan(densities[name])) for densities in found):
            raise ModelError(
                built.program.base_of(name),
                problem="its own density is not a number at the model's start, nor elsewhere: a scale is zero, or a "
                "covariance has not full rank",
                mend=f"sample what has noise of its own, and nothing else; {RUNNING}; and of {REGISTER}",
            )
    for name in (f.name for b in built.kernel.integrals if b.is_gaussian for f in b.factors):
        if all(not bool(jnp.isfinite(densities.get(name, 0.0))) for densities in found):
            raise ModelError(
                name,
                problem="its density is not finite at the model's start, nor elsewhere: a scale is zero or a "
                "covariance has not full rank, and a Gaussian latent is integrated by densities",
                mend="give it a scale above zero; or where it is seen without noise, observe the latent itself: "
                "numpyro.sample(..., obs=y)",
            )


def refuse_misread_masks(built: Build, start: Mapping[str, Array], bundle: Bundle) -> None:
    """Raise where sites read cells of a drawn latent that a mask takes out."""
    treatment = built.kernel.treatment
    if not isinstance(treatment, AbstractDrawn) or not any(f.is_hidden and f.site.masked for f in treatment.factors):
        return
    draws = {n: v[None] for n, v in random_values(built.program).items() if n in treatment.hidden.names}
    found = jit_once(lambda p, b, d: treatment.hidden.misread(built.kernel, p, b, d))(dict(start), bundle, draws)
    for name in (n for n, read in found.items() if bool(read)):
        raise PlanError(
            built.program.base_of(name),
            problem="a mask takes out cells of it that other sites read, so that these have no law",
            mend="put the mask around those sites as well, or leave it off the latent",
        )


def compare(built: Build, params, noise, bundle: Bundle, chosen):
    """Densities at `params`, and how far the states differ there; one compiled program."""
    params = {n: moved(built.program.params[n], v, noise[n]) for n, v in params.items()}
    tables = tables_at(built, params, bundle)
    return *densities(built, params, bundle, chosen, tables), state_spreads(built, tables)


def moved(param, value: Array, noise: Array) -> Array:
    """Parameters whose constraint is none of the usual ones are moved in free coordinates, inside the program."""
    value = jnp.asarray(value)
    if kind_of(param.constraint) != "other":
        return value
    new = to_constrained(param, to_unconstrained(param, value) + 0.1 * noise)
    return jnp.where(jnp.isfinite(new).all(), new, value)


def host_params(built: Build, start: Mapping[str, Array], noise: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters away from the start, so that no symmetry of it hides an error; in NumPy, which compiles nothing."""
    return {n: away(built.program.params[n].constraint, np.asarray(v), noise[n]) for n, v in start.items()}


def away(constraint, value: np.ndarray, noise: np.ndarray) -> np.ndarray:
    kind = kind_of(constraint)
    if kind == "real":
        return (value + 0.3 * noise).astype(value.dtype)
    if kind == "positive":
        return (np.where(value > 0, value, 1) * np.exp(0.3 * noise)).astype(value.dtype)
    if kind == "unit":
        return (1 / (1 + np.exp(-noise))).astype(value.dtype)
    if kind == "simplex":
        weight = np.exp(noise)
        return (weight / weight.sum(-1, keepdims=True)).astype(value.dtype)
    if kind == "matrix":
        d = value.shape[-1]
        stretch = np.exp(0.1 * noise[..., :d])[..., :, None]
        # rows (and for a positive definite matrix columns) stretched at random: it stays what it is
        return (
            value * stretch * (np.swapaxes(stretch, -1, -2) if constraint is constraints.positive_definite else 1)
        ).astype(value.dtype)
    return value


def noise_for(built: Build, start: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Standard normal draws for the free coordinates of every parameter."""
    rng = np.random.default_rng(20)
    out = {}
    for name, value in start.items():
        param, kind = built.program.params[name], kind_of(built.program.params[name].constraint)
        shape = value.shape
        if kind == "matrix":
            shape = shape[:-1]
        if kind == "other":
            shape = jax.eval_shape(lambda v, param=param: to_unconstrained(param, v), value).shape
        out[name] = rng.normal(size=shape)
    return out


SMALL = 64
LARGE = 20_000


def shrunken(source: Source, plate_size: int) -> tuple[tuple, dict] | None:
    """The call's arguments with `SMALL` rows of the plate, spread over the data.

    None where no array has such an axis.
    """
    data, cut = [], False
    rows = np.linspace(0, plate_size - 1, SMALL).astype(int)
    for x in source.data:
        axes = [i for i, s in enumerate(np.shape(x)) if s == plate_size]
        data.append(np.take(np.asarray(x), rows, axes[0]) if axes else x)
        cut = cut or bool(axes)
    return source.call(data) if cut else None


def densities(
    built: Build, params, bundle: Bundle, chosen: Mapping[str, Array], tables: Mapping[str, Named]
) -> tuple[dict, dict, dict]:
    """Log density of every site by its table and by the model.

    With it comes the sum of absolute values that sets the rounding.
    """
    program, values = built.program, graph_values(bundle, params)
    for n, index in chosen.items():
        latent = program.latents[n]
        values["latent", n] = jnp.asarray(latent.states)[index]
    chosen = {**chosen, **pieces_of_paths(program, chosen)}
    drawn = random_values(program)
    values.update({("latent", n): v for n, v in drawn.items()})
    treatment = built.kernel.treatment
    drawers: list[Any] = [
        *built.kernel.integrals,
        *([treatment] if isinstance(treatment, AbstractDrawn | Field) else []),
    ]
    nodes = {k: v for block in drawers for k, v in block.nodes_at(drawn, bundle).items()}
    bundle = with_nodes(bundle, nodes)
    ours, theirs, size = {}, {}, {}
    fields, given = model_fields(built, values), graph_values(bundle, params)
    hidden = {f.name: f for block in drawers for f in block.factors if f.completions}
    at = {n: f.table(f.cells(given, bundle.rows[n]), bundle.rows[n]).value for n, f in hidden.items()}
    tables = {**tables, **at}
    for name, factor in built.kernel.problem.factors.items():
        theirs[name], size[name] = by_model(factor, fields)
        ours[name] = by_table(built, hidden.get(name, factor), tables[name], bundle, chosen)
    for block in (
        b for b in built.kernel.integrals if b.has_nodes
    ):  # and what is integrated, against the sum of its sites
        sites = [f.name for f in block.factors]
        name = block.block.names[0]
        whole = by_form(built, block, drawn, params, bundle, chosen)
        constants = [
            log_density_constant(f, bundle.rows[f.name])
            for f in block.factors
            if not f.is_hidden and not f.value_hidden
        ]
        ours[name] = whole + sum((c.array.sum() for c in constants if c is not None), start=jnp.zeros(()))
        theirs[name], size[name] = sum(theirs[s] for s in sites), sum(size[s] for s in sites)
    return ours, theirs, size


def by_form(built: Build, block: Integral, drawn, params, bundle: Bundle, chosen: Mapping[str, Array]) -> Array:
    """Log density of all sites of a block of continuous latents, by the form that is integrated over them."""
    value = block.density_at(drawn, params, bundle)
    for z in block.block.discrete:
        value = pick(value, z.name, named(chosen[z.name], z.axes))
    absent = [built.program.plates[p].size for p in block.block.plates if p not in value.axes]
    return value.array.sum() * float(np.prod(absent, dtype=float))


def random_values(program: Program) -> dict[str, Array]:
    """A value for every cell of every continuous latent, inside its support, the same at every call."""
    rng, out = np.random.default_rng(30), {}
    for name, latent in program.continuous.items():
        transform = biject_to(latent.support)
        out[name] = transform(jnp.asarray(rng.normal(size=transform.inverse_shape(latent.shape + latent.event))))
    return out


def random_states(built: Build, source: Source) -> dict[str, np.ndarray]:
    """A state for every cell of every latent, inside its own bounds."""
    rng, out = np.random.default_rng(20), {}
    values: dict[Any, Any] = {("data", i): x for i, x in built.data(source).items()}
    for name, latent in built.program.latents.items():
        out[name] = rng.integers(0, latent.num_states, latent.shape)
        if latent.bounded and (name, "low") in built.program.full.outputs:
            low, high = built.program.full.evaluate([(name, "low"), (name, "high")], values)
            first = latent.states.ravel()[0]
            out[name] = np.clip(out[name], np.asarray(low) - first, np.asarray(high) - first)
        values["latent", name] = jnp.asarray(latent.states[out[name]])
    return out


def model_fields(built: Build, values: Mapping[Any, Any], names: Iterable[str] | None = None) -> dict[tuple, Array]:
    """Log density, mask and scale of every factor's site, from the model at full shape: one evaluation for all."""
    full = built.program.full
    names = built.kernel.problem.factors if names is None else names
    keys = [(n, f) for n in names for f in ("elem", "mask", "scale") if (n, f) in full.outputs]
    return dict(zip(keys, full.evaluate(keys, values), strict=True))


def by_model(factor: Factor, fields: Mapping[tuple, Array], once: bool = True) -> tuple[Array, Array]:
    """Masked and scaled log density of the site, from its `fields`.

    A latent that a mask takes out counts `once` over all its states, as in the tables; NumPyro leaves it out.
    """
    rank, name = len(factor.site.axes), factor.name
    got = {field: fields[name, field] for field in ("elem", "mask", "scale") if (name, field) in fields}
    elem = jnp.broadcast_to(pad(got["elem"], rank), factor.site.shape)
    if "mask" in got:
        otherwise = -jnp.log(float(factor.latents[0].num_states)) if factor.own and once else 0.0
        mask = pad(got["mask"], rank)
        if factor.own:
            events = tuple(i for i, a in enumerate(factor.site.axes) if a.startswith("#") and not a.startswith("#unit"))
            elem, mask = elem.sum(events, keepdims=True), mask.any(events, keepdims=True) if events else mask
        elem = jnp.where(mask, elem, otherwise)
    if "scale" in got:
        elem = elem * scale_of(got["scale"], factor.site).to(factor.site.axes)
    return elem.sum(), jnp.abs(elem).sum()


def by_table(built: Build, factor: Factor, value: Named, bundle: Bundle, chosen: Mapping[str, Array]) -> Array:
    """The same from the factor's table, read at the chosen states."""
    layout, rows = built.kernel.layout, bundle.rows[factor.name]
    for z in factor.latents:
        states = named(chosen[factor.latent_of(z.name)], z.axes)
        value = pick(value, z.name, route_to_rows(states, factor.route_to(z.name), bundle.cells))
    inner = factor.inner
    scale = bundle.scales[factor.latent_of(inner.name)] if inner is not None else None
    if inner is not None and scale is not None:
        value = multiply(value, route_to_rows(scale, factor.route_to(inner.name), bundle.cells))
    absent = [layout.sizes[a] for a in factor.kept if a not in value.axes]
    total = value.array.sum() * float(np.prod(absent, dtype=float))
    constant = log_density_constant(factor, rows)
    return total if constant is None else total + constant.array.sum()

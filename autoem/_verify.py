"""Check the derivation against the model's own density, before anything is fitted.

At random parameters and a random completion of the latents every factor's table must equal what the model itself says.
What does not agree is refused with the site's name, so that a silent wrong answer cannot come of a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._build import Build
from autoem._errors import ModelError
from autoem._jaxpr import jit_once
from autoem._named import multiply, named
from autoem._posterior import pick
from autoem._trace import Source
from autoem.e_step.elimination import route_to_rows
from autoem.e_step.factors import pad, scale_of
from autoem.e_step.tables import Factor, log_density_constant
from autoem.m_step.choose import kind_of
from autoem.m_step.problem import Bundle, graph_values
from autoem.m_step.unconstrained import to_constrained, to_unconstrained


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
    ours, theirs, size, spread = jit_once(lambda *a: compare(built, *a))(start, noise_for(built, start), bundle, key)
    eps = float(jnp.finfo(jnp.result_type(float)).eps)
    for name in ours:
        a, b, s = float(ours[name]), float(theirs[name]), float(size[name])
        agree = abs(a - b) <= 1e5 * eps * (1 + s) or (not np.isfinite(b) and (a < -1e15 or not np.isfinite(a)))
        if not agree and b > -1e15:
            raise ModelError(
                name,
                problem=f"its table does not reproduce the model's own density ({a:.6g} against {b:.6g})",
                mend="let the site read each latent only at its own row (z, or z[group]), "
                "without z.shape or mixing rows",
            )
    return tuple(n for n, v in spread.items() if float(v) <= 100 * eps)


def compare(built: Build, start, noise, bundle: Bundle, key: Array):
    """Densities at random parameters, and how far the states differ at the start; one compiled program."""
    params = random_params(built, start, noise)
    return *densities(built, params, bundle, key), state_spreads(built, start, bundle)


def noise_for(built: Build, start: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Standard normal draws for the free coordinates of every parameter."""
    rng = np.random.default_rng(20)
    out = {}
    for name, value in start.items():
        free = jax.eval_shape(lambda v, name=name: to_unconstrained(built.program.params[name], v), value)
        kind = kind_of(built.program.params[name].constraint)
        out[name] = rng.normal(size=free.shape if kind in ("matrix", "other") else value.shape)
    return out


def random_params(built: Build, start: Mapping[str, Array], noise: Mapping[str, Any]) -> dict[str, Array]:
    """Parameters away from the start, so that no symmetry of it hides an error."""
    out = {}
    for name, value in start.items():
        param = built.program.params[name]
        shift, kind = jnp.asarray(noise[name], value.dtype), kind_of(param.constraint)
        if kind == "real":
            out[name] = value + 0.3 * shift
        elif kind == "positive":
            out[name] = jnp.where(value > 0, value, 1) * jnp.exp(0.3 * shift)
        elif kind == "unit":
            out[name] = jax.nn.sigmoid(shift)
        elif kind == "simplex":
            out[name] = jax.nn.softmax(shift, axis=-1)
        else:
            moved = to_constrained(param, to_unconstrained(param, value) + 0.1 * shift)
            out[name] = jnp.where(jnp.isfinite(moved).all(), moved, value)
    return out


def state_spreads(built: Build, params, bundle: Bundle) -> dict[str, Array]:
    """How far the states of each latent differ in any factor but its own prior; zero at a saddle point of EM."""
    cells = built.kernel.problem.cells(params, bundle)
    out: dict[str, list[Array]] = {}
    for f in built.kernel.likelihood_factors:
        table = f.table(cells[f.name], bundle.rows[f.name]).value
        for z in f.latents:
            if z.name == f.name or z.num_states < 2:
                continue
            rows = table.to((z.name, *(a for a in table.axes if a != z.name)))
            out.setdefault(z.name, []).append(jnp.max(jnp.abs(rows - rows[:1]) / (1 + jnp.abs(rows[:1]))))
    return {n: jnp.max(jnp.stack(s)) for n, s in out.items()}


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


def densities(built: Build, params, bundle: Bundle, key: Array) -> tuple[dict, dict, dict]:
    """Log density of every site by its table and by the model.

    With it comes the sum of absolute values that sets the rounding.
    """
    program, values = built.program, graph_values(bundle, params)
    chosen = {n: random_states(built, n, values, jax.random.fold_in(key, i)) for i, n in enumerate(program.latents)}
    for n, index in chosen.items():
        latent = program.latents[n]
        values["latent", n] = jnp.asarray(latent.states)[index]
    ours, theirs, size = {}, {}, {}
    for name, factor in built.kernel.problem.factors.items():
        theirs[name], size[name] = by_model(built, factor, values)
        ours[name] = by_table(built, factor, params, bundle, chosen)
    return ours, theirs, size


def random_states(built: Build, name: str, values: Mapping, key: Array) -> Array:
    """A state for every cell of a latent, inside its own bounds."""
    latent = built.program.latents[name]
    index = jax.random.randint(key, latent.shape, 0, latent.num_states)
    if not latent.bounded:
        return index
    low, high = built.program.full.evaluate([(name, "low"), (name, "high")], values)
    first = latent.states.ravel()[0]
    return jnp.clip(index, low - first, high - first)


def by_model(built: Build, factor: Factor, values: Mapping[Any, Any]) -> tuple[Array, Array]:
    """Masked and scaled log density of the site, from the model at full shape."""
    program, name = built.program, factor.name
    rank = len(factor.site.axes)
    fields = [f for f in ("elem", "mask", "scale") if (name, f) in program.full.outputs]
    got = dict(zip(fields, program.full.evaluate([(name, f) for f in fields], values), strict=True))
    elem = jnp.broadcast_to(pad(got["elem"], rank), factor.site.shape)
    if "mask" in got:
        otherwise = -jnp.log(float(factor.latents[0].num_states)) if factor.own else 0.0
        mask = pad(got["mask"], rank)
        if factor.own:
            events = tuple(i for i, a in enumerate(factor.site.axes) if a.startswith("#") and not a.startswith("#unit"))
            elem, mask = elem.sum(events, keepdims=True), mask.any(events, keepdims=True) if events else mask
        elem = jnp.where(mask, elem, otherwise)
    if "scale" in got:
        elem = elem * scale_of(got["scale"], factor.site).to(factor.site.axes)
    return elem.sum(), jnp.abs(elem).sum()


def by_table(built: Build, factor: Factor, params, bundle: Bundle, chosen: Mapping[str, Array]) -> Array:
    """The same from the factor's table, read at the chosen states."""
    layout, rows = built.kernel.layout, bundle.rows[factor.name]
    cells = factor.cells(graph_values(bundle, params), rows)
    value = factor.table(cells, rows).value
    for z in factor.latents:
        route = factor.route if factor.route and z.name in factor.route.latents else None
        value = pick(value, z.name, route_to_rows(named(chosen[z.name], z.axes), route, bundle.cells))
    inner = max(factor.latents, key=lambda z: len(layout.plates_of[z.name]), default=None)
    scale = bundle.scales[inner.name] if inner is not None else None
    if scale is not None:
        value = multiply(value, route_to_rows(scale, factor.route, bundle.cells))
    absent = [layout.sizes[a] for a in factor.kept if a not in value.axes]
    total = value.array.sum() * float(np.prod(absent, dtype=float))
    constant = log_density_constant(factor, rows)
    return total if constant is None else total + constant.array.sum()

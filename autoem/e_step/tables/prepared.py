"""What a factor needs of the data, made once: its values, masks and counts as arrays with named axes.

In: a factor and the data. Out: its `Rows`. Values, numbers of trials and masks may read discrete latents (`x - z`
observed, trials that nobody counted, a mask for one component): such rows have an axis for every state, and with it
all that does not depend on parameters is computed here, once for all steps.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.e_step.elimination.eliminate import route_to_rows
from autoem.e_step.elimination.places import pad, scale_of, scaled_site
from autoem.e_step.tables.constants import log_base
from autoem.e_step.tables.regression import design
from autoem.e_step.tables.tabulate import FEATURE, Factor, Rows
from autoem.families._arrays import as_float
from autoem.graph.jaxpr import Constant, Graph
from autoem.graph.named import Named, arranged, named, union
from autoem.ir import Program, Site

TURN_UP_TO = 256 * 2**20  # bytes: larger data are not copied but turned chunk by chunk, which costs up to a fifth
Moments = tuple[Array, Array]


def prepare(factor: Factor, program: Program, values: Mapping, cells: Mapping, known: Moments | None = None) -> Rows:
    """Make what `factor` needs of the data, the mean and the variance over rows of whose entries may be `known`."""
    graph = program.full
    rows = Rows(
        mask=mask_of(factor, graph, values),
        scale=relative_scale(factor, program, values, cells),
        weight=output(factor, graph, "scale", values),
        inside=bounds_mask(factor, values) if factor.own and factor.latents[0].bounded else None,
    )
    if factor.family is None:
        return rows
    rows = dataclasses.replace(rows, fixed={a: fixed_of(factor, graph, a, values) for a in factor.family.fixed})
    if factor.is_hidden or factor.value_hidden:
        return rows
    if factor.own:
        return own_rows(factor, rows)
    rows = (
        moving_rows(factor, values, rows)
        if set(factor.moving) - {"mask"}
        else observed_rows(factor, graph, values, rows, known)
    )
    if not factor.moving:
        return rows
    base = log_base(factor, rows)
    base = base and factor.constants(factor.keep(rows), base)
    return dataclasses.replace(summed(factor, rows), base=base, value=None)


def summed(factor: Factor, rows: Rows) -> Rows:
    """Statistics in place of values, summed over rows that are the same to the parameters."""
    features, differ = factor.features(rows), {*factor.keep(rows), FEATURE}
    for argument, events in zip(factor._family.args, factor._family.arg_dims, strict=True):
        shape = factor.graph.shape((factor.name, f"arg:{argument}"))
        batch = shape[: len(shape) - events]
        names = factor.site.axes[len(factor.site.axes) - len(batch) :]
        differ.update(a for a, s in zip(names, batch, strict=True) if s > 1)
    return dataclasses.replace(rows, features=features.sum(a for a in features.axes if a not in differ))


def mask_of(factor: Factor, graph: Graph, values: Mapping) -> Named | None:
    """Which rows count, for every state where latents decide."""
    mask = over_states(factor, "mask", values) if "mask" in factor.moving else output(factor, graph, "mask", values)
    if mask is None:
        return None
    mask = Named(mask.array.astype(jnp.int8), mask.axes)
    return mask.sum([a for a in mask.axes if a.startswith("#")]) if factor.own else mask


def fixed_of(factor: Factor, graph: Graph, argument: str, values: Mapping) -> Named:
    """An argument that holds data: of each row, and of every state where it reads latents."""
    if f"arg:{argument}" in factor.moving:
        return over_states(factor, f"arg:{argument}", values)
    value = graph.evaluate([(factor.name, f"arg:{argument}")], values)[0]
    return named(pad(value, len(factor.site.axes)), factor.site.axes)


def over_states(factor: Factor, field: str, values: Mapping) -> Named:
    """An output of a site that reads no parameters, for all states of the latents that it reads."""
    names = (*(z.name for z in (factor.parents if factor.family else factor.latents)), *factor.site.axes)
    return named(factor.argument(field, values), names)


def output(factor: Factor, graph, field: str, values) -> Named | None:
    key = (factor.name, field)
    if key not in graph.outputs:
        return None
    array = graph.evaluate([key], values)[0]
    return (
        scale_of(array, factor.site) if field == "scale" else named(pad(array, len(factor.site.axes)), factor.site.axes)
    )


def relative_scale(factor: Factor, program: Program, values, cells: Mapping) -> Named | None:
    """Multiplicity of the factor relative to its innermost latent; None where they agree."""
    graph, own = program.full, (factor.name, "scale")
    inner = factor.inner
    mine = output(factor, graph, "scale", values)
    if inner is None or (site := scaled_site(program, factor.latent_of(inner.name))) is None:
        return mine
    above = (site, "scale")
    if own in graph.outputs and same(graph.outputs[own], graph.outputs[above]):
        return None
    mine = mine or Named(jnp.ones(()), ())
    theirs = scale_of(graph.evaluate([above], values)[0], program.sites[site])
    theirs = route_to_rows(theirs, factor.route_to(inner.name), cells)
    both = tuple(dict.fromkeys((*mine.axes, *theirs.axes)))
    lower = theirs.to(both)
    return Named(jnp.where(lower == 0, 1.0, mine.to(both) / jnp.where(lower == 0, 1, lower)), both)


def same(a, b) -> bool:
    both = isinstance(a, Constant) and isinstance(b, Constant)
    return a is b or (both and np.array_equal(a.value, b.value))


def bounds_mask(factor: Factor, values) -> Named:
    """Which states of a latent each of its cells may take, for every state of the latents that decide."""
    low, high = (over_states(factor, end, values) for end in ("low", "high"))
    axes = (factor.name, *union(low.axes, high.axes))
    states = Named(jnp.asarray(factor.latents[0].states), axes[:1]).to(axes)
    return Named(((states >= low.to(axes)) & (states <= high.to(axes))).astype(float), axes)


def own_rows(factor: Factor, rows: Rows) -> Rows:
    """The 'data' of a latent's own site: its states."""
    latent, family = factor.latents[0], factor.family
    assert family is not None
    events = tuple(a for a in factor.site.axes if a.startswith("#") and not a.startswith("#unit"))
    fixed = rows.fixed or {}
    axes = union((latent.name, *events), *(f.axes for f in fixed.values()))
    states = Named(jnp.asarray(latent.states), (latent.name, *events)).to(axes)
    sizes = {a: f.size(a) for f in fixed.values() for a in f.axes}
    states = jnp.broadcast_to(states, [sizes.get(a, n) for a, n in zip(axes, states.shape, strict=True)])
    base = Named(family.base(states, {k: f.to(axes) for k, f in fixed.items()}), axes)
    rows = dataclasses.replace(rows, value=Named(states, axes), base=base.sum(events))
    return summed(factor, rows) if factor.moving else rows


def moving_rows(factor: Factor, values: Mapping, rows: Rows) -> Rows:
    """Values of every state of the latents that they, or numbers of trials, read; as they are, not standardised."""
    family, fixed = factor.family, rows.fixed or {}
    assert family is not None
    raw = jnp.asarray(factor.argument("value", values, family.event_dim))
    batch, events = raw.shape[: raw.ndim - family.event_dim], raw.shape[raw.ndim - family.event_dim :]
    size = dict(zip(factor.cell_axes, batch, strict=True))
    for other in (*fixed.values(), *([rows.mask] if rows.mask else [])):
        size.update((a, other.size(a)) for a in other.axes)
    size.update(zip(factor.site.axes, factor.site.shape, strict=True))
    order = [a for a in factor.cell_axes if size[a] > 1]
    order.sort(key=lambda a: (a in factor.kept, size[a]))
    names = tuple(f"event{i}" for i in range(len(events)))
    value = named(raw.reshape(*batch, *events, 1), (*factor.cell_axes, *names, ""))
    array = jnp.broadcast_to(value.to((*names, *order)), (*events, *(size[a] for a in order)))
    if rows.mask is not None:  # what is hidden may be NaN or outside the support
        seen = jnp.broadcast_to(rows.mask.to(order) > 0, array.shape[len(events) :])
        array = jnp.where(seen, array, first_seen(array, seen))
    return dataclasses.replace(rows, value=Named(array, (*names, *order)), ready=True)


def first_seen(array: Array, seen: Array) -> Array:
    """The first event that is seen, `array` holding the events' axes first."""
    events = array.shape[: array.ndim - seen.ndim]
    example = jnp.take(array.reshape(*events, -1), jnp.argmax(seen.ravel()), axis=len(events))
    return example.reshape(*events, *(1,) * seen.ndim)


def observed_rows(factor: Factor, graph: Graph, values: Mapping, rows: Rows, known: Moments | None = None) -> Rows:
    """The values as the data hold them, and the moments that `Factor.observations` standardises them by."""
    site, family = factor.site, factor.family
    assert family is not None
    raw, rank = observed_values(factor, graph, values), len(site.shape)
    if rows.mask is not None:
        in_any = rows.mask.sum(a for a in rows.mask.axes if a not in site.axes)
        seen = jnp.broadcast_to(in_any.to(site.axes) > 0, site.shape)
        raw = without_hidden(raw, seen.reshape(site.shape + (1,) * family.event_dim), rank)
    if family.standardise is not None and any(
        s > 1 and not a.startswith("#") for a, s in zip(site.axes, site.shape, strict=True)
    ):
        centre, spread = (m.reshape(m.shape[rank:] if family.event_dim else m.shape) for m in moments(raw, site, known))
        rows = dataclasses.replace(rows, centre=centre, spread=spread)
    kept = [i for i, s in enumerate(site.shape) if s > 1]
    shape = tuple(site.shape[i] for i in kept) + raw.shape[rank:]
    value = raw if raw.shape == shape else raw.reshape(shape)  # what is not touched is passed on without a copy
    axes = (*(site.axes[i] for i in kept), *(f"event{i}" for i in range(raw.ndim - rank)))
    value, small = narrow(value, site.support)
    rows = dataclasses.replace(rows, value=Named(value, axes))
    if value.nbytes > TURN_UP_TO:
        return rows
    turned = factor.observations(rows)
    if small:
        turned = Named(turned.array.astype(jnp.int8), turned.axes)
    mask = None if rows.mask is None else arranged(rows.mask, turned.axes)
    fixed = {k: arranged(f, turned.axes) for k, f in (rows.fixed or {}).items()}
    return dataclasses.replace(rows, value=turned, mask=mask, fixed=fixed, ready=True)


def narrow(values: Array, support: str) -> tuple[Array, bool]:
    """Small whole numbers as bytes: every step reads them all, and memory is what it waits for."""
    bounds = re.fullmatch(r"IntegerInterval\(lower_bound=0, upper_bound=(\d{1,2})\)", support)
    small = support == "Boolean()" or bounds is not None
    return (values.astype(jnp.int8), True) if small else (values, False)


def observed_values(factor: Factor, graph: Graph, values: Mapping) -> Array:
    """The observed value, `(*batch, *event)` at full shape; of a regression, design and residual side by side."""
    site, family = factor.site, factor.family
    assert family is not None
    raw = jnp.asarray(graph.evaluate([(site.name, "value")], values)[0])
    if factor.coefficients:
        columns, offset = design(factor.graph, site, factor.coefficients, values)
        raw = jnp.broadcast_to(raw, site.shape) - offset
        return jnp.moveaxis(jnp.concatenate([columns, raw[None]]), 0, -1)
    shape = site.shape + raw.shape[raw.ndim - family.event_dim :]
    return raw if raw.shape == shape else jnp.broadcast_to(raw, shape)


def without_hidden(raw: Array, seen: Array, rank: int) -> Array:
    """Put a value that is seen where a mask hides one: what is hidden may be NaN or outside the support."""
    first = jnp.argmax(seen.reshape(-1))
    example = jnp.take(raw.reshape(-1, *raw.shape[rank:]), first, 0)
    return jnp.where(seen, raw, example)


def moments(raw: Array, site: Site, known: Moments | None = None) -> tuple[Array, Array]:
    """Mean and standard deviation over the plates, element by element of the event; a constant has spread one."""
    over = tuple(i for i, a in enumerate(site.axes) if not a.startswith("#"))
    if known is None:
        raw = as_float(raw)
        centre, variance = raw.mean(over, keepdims=True), raw.var(over, keepdims=True)
    else:  # over the rows, to be joined over other plates
        mean, within = known
        centre = mean.mean(over, keepdims=True)
        variance = within.mean(over, keepdims=True) + mean.var(over, keepdims=True)
    return centre, jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 1.0)

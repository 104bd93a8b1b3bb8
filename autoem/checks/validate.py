"""Refuse bad data before anything is fitted: NaN, infinite, outside the support, indices past the end.

In: a build and the data of a call. Raises `DataError`, which names the site, how many entries are wrong and where the
first is. Checks run in NumPy on the host, so they compile nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.core import Tracer
from numpyro.distributions import constraints

from autoem._errors import DataError
from autoem.checks.lookups import place, refuse_far_indices
from autoem.graph.jaxpr import Variable
from autoem.graph.programs import jit_once
from autoem.planning.build import Build
from autoem.reading.trace import Record, Source

OPEN = (dist.Beta, dist.BetaProportion, dist.Dirichlet, dist.Kumaraswamy)  # of shares strictly between 0 and 1
INTEGRAL = ("b", "i", "u")
MULTINOMIAL = (dist.MultinomialProbs, dist.MultinomialLogits, dist.DirichletMultinomial)


def validate(built: Build, source: Source, missing: str) -> None:
    """Check every observed value.

    Raises:
        DataError: a value is NaN or infinite where that has no meaning, or outside its distribution's support;
            or an index of a row that counts lies past the end of what it indexes.
    """
    program = built.program
    observed = [s for s in program.sites.values() if s.role == "observed"]
    outputs = program.full.outputs
    shown = {s.name: "given" if (s.name, "given") in outputs else "value" for s in observed}
    keys = [(s.name, f) for s in observed for f in (shown[s.name], "mask") if (s.name, f) in outputs]
    moving = [k for k in keys if k[1] != "mask" and any(n[0] == "latent" for n in program.full.needs(k))]
    keys = [k for k in keys if all(n[0] == "data" for n in program.full.needs(k))]
    values = host_values(built, keys, source)
    for key in moving:
        check_moving(built, key, source, missing)
    for site in observed:
        if (site.name, shown[site.name]) not in values:
            continue
        if missing == "marginalize" and (site.name, "mask") in outputs and (site.name, "mask") not in values:
            value = values[site.name, shown[site.name]]  # NaN is masked, and so is more by latents
            values[site.name, "mask"] = np.asarray(~np.isnan(value).any(tuple(range(-site.event_dim, 0))))
        record = built.found.records[site.name]
        value, mask = values[site.name, shown[site.name]], values.get((site.name, "mask"))
        if site.name in built.gaps:
            value = np.where(np.isnan(value), 0.0, value)  # what is not seen is integrated
            check_finite(site.name, value, np.zeros(value.shape[:-1], bool), 1)
            continue
        check_site(site.name, record, value, mask, source, missing, site.shape)
    refuse_far_indices(built, source)


def host_values(built: Build, keys: list, source: Source) -> dict[Any, np.ndarray]:
    """Outputs as NumPy arrays; those that are the data themselves are not computed, the others compiled once."""
    graph = built.program.full
    by_var = {v: k[1] for k, v in graph.inputs.items() if k[0] == "data"}
    out: dict[Any, np.ndarray] = {}
    rest = []
    for key in keys:
        atom = graph.outputs[key]
        if isinstance(atom, Variable) and atom in by_var:
            out[key] = np.asarray(source.data[by_var[atom]])
        else:
            rest.append(key)
    if rest:
        data = {("data", i): jnp.asarray(x) for i, x in enumerate(source.data)} if not source.concrete else {}
        built.observed = built.observed or jit_once(lambda d: graph.evaluate(rest, d))
        out.update(zip(rest, map(np.asarray, built.observed(data)), strict=True))
    return out


def check_moving(built: Build, key: tuple[str, str], source: Source, missing: str) -> None:
    """Check what is observed as computed from latents: NaN, and whole numbers, are the same whatever their states."""
    program, (name, _) = built.program, key
    record = built.found.records.get(name)
    needs = program.full.needs(key)
    if record is None or source.concrete or any(n[0] == "param" or n[1] in program.continuous for n in needs):
        return
    given = {("data", i): jnp.asarray(x) for i, x in enumerate(source.data)}
    for n in (n for n in needs if n[0] == "latent"):
        states = program.latents[n[1]].states
        given[n] = jnp.broadcast_to(jnp.asarray(states[0]), program.full.inputs[n].shape)
    value = np.asarray(jit_once(lambda g: program.full.evaluate([key], g)[0])(given))
    events = record.base.event_dim
    hidden = np.zeros(np.shape(value)[: np.ndim(value) - events], bool)
    if missing == "marginalize":
        hidden = hidden | np.isnan(value).any(tuple(range(-events, 0)))
    check_finite(name, value, hidden, events)
    whole = value % 1 == 0 if getattr(record.base.support, "is_discrete", False) else np.ones(value.shape, bool)
    wrong = ~(whole.all(tuple(range(-events, 0))) if events else whole) & ~hidden
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise DataError(
            name,
            problem=f"{type(record.base).__name__} observes whole numbers; first otherwise in {place(first)}",
            mend="correct the data, or choose a distribution that can produce them",
        )


def check_site(name: str, record: Record, value, mask, source: Source, missing: str, shape: tuple[int, ...]) -> None:
    events = record.base.event_dim
    hidden = np.zeros(np.broadcast_shapes(np.shape(value)[: np.ndim(value) - events], shape), bool)
    if mask is not None:
        hidden = hidden | ~np.broadcast_to(np.asarray(mask, bool), hidden.shape)
    if missing == "marginalize":
        refuse_partly_missing(name, events, source_value(name, value, source))
    if isinstance(record.base, dist.IntervalCensoredDistribution):  # pairs of bounds, of which one may be infinite
        check_finite(name, np.where(np.isinf(value), 0.0, value), hidden, events)
        return
    check_finite(name, value, hidden, events)
    check_support(name, record, value, hidden, events)
    check_edges(name, record, value, hidden, events)


def source_value(name: str, value, source: Source) -> list[np.ndarray]:
    """The call's float arrays of the value's shape: where NaN came from before it was dropped."""
    return [np.asarray(x) for x in source.data if np.shape(x) == np.shape(value) and np.asarray(x).dtype.kind == "f"]


def refuse_partly_missing(name: str, events: int, arrays: list[np.ndarray]) -> None:
    for x in arrays:
        gone = np.isnan(x)
        if events and (gone.any(-1) & ~gone.all(-1)).any():
            rows = int((gone.any(-1) & ~gone.all(-1)).sum())
            raise DataError(
                name,
                problem=f"{rows} of its vectors are partly NaN, "
                "and entries of a joint distribution cannot be dropped one by one yet",
                mend="use independent elements (Normal(...).to_event(1)), or set the whole vector to NaN",
            )


def check_finite(name: str, value: np.ndarray, hidden: np.ndarray, events: int) -> None:
    if value.dtype.kind != "f":
        return
    with np.errstate(all="ignore"):
        if np.isfinite(value.sum()):  # one look at large data: a sum is finite only if all of its terms are
            return
    bad = ~np.isfinite(value)
    per_row = bad.any(tuple(range(bad.ndim - events, bad.ndim))) if events else bad
    wrong = np.broadcast_to(per_row, hidden.shape) & ~hidden
    if not wrong.any():
        return
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    nan = int(np.isnan(value).sum())
    what = f"{counted(nan)} NaN" if nan else f"{counted(int(wrong.sum()))} infinite"
    mend = (
        'EM(model, missing="marginalize") to leave them out exactly, or drop those rows'
        if nan
        else "drop or correct them"
    )
    where = f"first in {place(first)}" + ("" if nan else f": {value_at(value, first, hidden, events)}")
    raise DataError(name, problem=f"{what} ({where})", mend=mend)


def value_at(value: np.ndarray, index: tuple[int, ...], hidden: np.ndarray, events: int) -> Any:
    return np.broadcast_to(value, hidden.shape + value.shape[value.ndim - events :])[index]


def counted(count: int) -> str:
    return "1 entry is" if count == 1 else f"{count:,} entries are"


def check_support(name: str, record: Record, value: np.ndarray, hidden: np.ndarray, events: int) -> None:
    support = record.base.support
    if support in (constraints.real, constraints.real_vector):  # `check_finite` has looked already
        return
    try:
        inside = np.asarray(host_constraint(support, record)(value))
    except (TypeError, ValueError, AttributeError, jax.errors.JAXTypeError):
        return
    wrong = np.broadcast_to(~inside, hidden.shape) & ~hidden
    if not wrong.any():
        return
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    count = int(wrong.sum())
    mend = "correct the data, or choose a distribution that can produce them"
    if isinstance(record.base, MULTINOMIAL):
        mend += "; the counts of a value add up to total_count, which is 1 unless it is given: total_count=x.sum(-1)"
    raise DataError(
        name,
        problem=("1 of its values lies" if count == 1 else f"{count:,} of its values lie")
        + f" outside the support of {type(record.base).__name__} ({describe(support)}); "
        f"first in {place(first)}: {value_at(value, first, hidden, events)}",
        mend=mend,
    )


def check_edges(name: str, record: Record, value: np.ndarray, hidden: np.ndarray, events: int) -> None:
    """Refuse shares of exactly 0 or 1 where the density there is zero or infinite whatever the parameters."""
    if not isinstance(record.base, OPEN):
        return
    edge = (value == 0) | (value == 1)
    wrong = np.broadcast_to(edge.any(-1) if events else edge, hidden.shape) & ~hidden
    if not wrong.any():
        return
    first, count = tuple(int(i) for i in np.argwhere(wrong)[0]), int(wrong.sum())
    raise DataError(
        name,
        problem=("1 of its values is" if count == 1 else f"{count:,} of its values are")
        + f" exactly 0 or 1, where a {type(record.base).__name__} density is zero or infinite; "
        f"first in {place(first)}: {value_at(value, first, hidden, events)}",
        mend="move all n values a little inside, (x * (n - 1) + 0.5) / n, or model exact zeros and ones apart",
    )


def host_constraint(support: Any, record: Record):
    """The constraint on NumPy arrays; bounds that are traced (a total count) are left to the density itself."""
    bounds = [getattr(support, b, None) for b in ("lower_bound", "upper_bound")]
    if any(isinstance(b, Tracer) for b in bounds):
        low = bounds[0]
        if isinstance(low, Tracer):
            return lambda x: np.ones(np.shape(x), bool)
        return lambda x: (x >= low) & (x % 1 == 0)
    if support is constraints.boolean:
        return lambda x: (x == 0) | (x == 1)
    if low_high_integer(support):
        return lambda x: (x >= support.lower_bound) & (x <= support.upper_bound) & (x % 1 == 0)
    return support


def low_high_integer(support: Any) -> bool:
    return (
        bool(getattr(support, "is_discrete", False))
        and hasattr(support, "lower_bound")
        and hasattr(support, "upper_bound")
    )


def describe(support: Any) -> str:
    """A support in words."""
    whole = "whole numbers" if getattr(support, "is_discrete", False) else "numbers"
    limits: list[Any] = [getattr(support, b, None) for b in ("lower_bound", "upper_bound")]
    if support is constraints.boolean:
        return "0 or 1"
    if support is constraints.positive:
        return "numbers above 0"
    if isinstance(limits[1], Tracer) and isinstance(limits[0], int | float):
        return f"{whole} from {limits[0]}"
    if all(b is None for b in limits) or any(isinstance(b, Tracer) or np.ndim(b) for b in limits):
        return str(support)
    low, high = limits
    if low is None:
        return f"vectors of whole numbers that add up to {high}" if support.event_dim else f"{whole} up to {high}"
    return f"{whole} from {low}" + ("" if high is None else f" to {high}")


__all__ = ["INTEGRAL", "validate"]

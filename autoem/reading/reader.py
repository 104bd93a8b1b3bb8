"""Run a NumPyro model once and record what each of its sites says, by a handler of its own.

In: a model, the values of its parameters and latents (numbers or tracers), and where NaN means "not seen". Out: a
`Reader` with one `Record` a `sample` statement, the parameters and the plates; outputs are arrays by (site, field).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.core import Tracer
from numpyro.primitives import Messenger

from autoem._errors import DataError, ModelError
from autoem.families import Family, family_of
from autoem.families.densities import log_density
from autoem.families.laws import Law, law_of
from autoem.reading.paths import laws_of_steps, path_of
from autoem.reading.support import bounds

CATEGORIES = (dist.CategoricalProbs, dist.CategoricalLogits)  # their density reads the value as an index
BOUNDS = ("lower_bound", "upper_bound")
WORDS = {"sample": "sample site", "param": "parameter", "plate": "plate", "deterministic": "deterministic site"}
NOT_CONCRETE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@dataclasses.dataclass
class Record:
    """What one `sample` message said, before anything is decided.

    `given` is an observed value as the model passed it, where `value` is another array than that. `law` is the normal
    law that the site has by another name.
    """

    name: str
    fn: Any
    base: Any
    mask: Any
    num_event: int
    value: Any
    observed: bool
    auxiliary: bool
    scale: Any
    frames: tuple[Any, ...]
    given: Any = None
    law: Law | None = None

    @property
    def event_dim(self) -> int:
        """Event axes of the unwrapped distribution, as its law and all later stages see them."""
        return min(self.base.event_dim, 1) if self.law else self.base.event_dim

    def vector(self, value: Any) -> Any:
        """A value of the site with one axis of event at most."""
        return self.law.flat(value) if self.law else value

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes of the unwrapped distribution."""
        return tuple(self.fn.batch_shape) + tuple(self.fn.event_shape[: self.num_event])

    @property
    def axes(self) -> tuple[str, ...]:
        batch = self.fn.batch_shape
        by_dim = {f.dim: f.name for f in self.frames}
        labels = [by_dim.get(i - len(batch)) or implicit(i - len(batch), s) for i, s in enumerate(batch)]
        return tuple(labels) + tuple(f"#{i}" for i in range(self.num_event))


def implicit(dim: int, size: int) -> str:
    """Label of a batch axis that no plate covers."""
    return f"dim{dim}:{size}" if size > 1 else f"#unit{dim}"


def unwrap(fn: Any) -> tuple[Any, Any, int]:
    """The distribution under `expand`, `mask` and `to_event`; its mask (or None), and how many axes `to_event` took."""
    masks, taken = [], 0
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, taken))
        elif isinstance(fn, dist.Independent):
            taken += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    mask = None
    for m, before in masks:
        m = jnp.reshape(m, jnp.shape(m) + (1,) * (taken - before))
        mask = m if mask is None else mask & m
    return fn, mask, taken


class Reader(Messenger):
    """Records every site, giving parameters and latents the values in `inputs`, or placeholders."""

    def __init__(
        self,
        inputs: Mapping,
        truncated: Mapping[str, tuple[int, int]],
        drop_nan: bool,
        concrete: bool = False,
        compact: bool = False,
        read_scan: Callable[[Reader, dict], None] | None = None,
    ):
        self.inputs, self.truncated, self.drop_nan = inputs, truncated, drop_nan
        self.compact, self.read_scan = compact, read_scan
        # where the model reads the data's values in Python, what does not depend on parameters is computed at once
        self.context = jax.ensure_compile_time_eval if concrete else contextlib.nullcontext
        self.records: dict[str, Record] = {}
        self.params: dict[str, tuple[Any, Any]] = {}
        self.frames: dict[str, tuple[int, int]] = {}
        self.kinds: dict[str, str] = {}
        self.chains: list[Any] = []
        self.given: dict[tuple[str, str, int], Any] = {}  # what scans start from and run over: (time, which, leaf)
        self.numbers: Mapping[tuple[str, str, int], np.ndarray] = {}  # those of them that the model's text tells
        self.last = ""
        self.walks: Collection[str] = ()  # sites that are read as scans, by `read_walk`
        self.read_walk: Callable[[Reader, dict], None] | None = None
        super().__init__(None)

    def process_message(self, msg):
        kind, name = msg["type"], msg.get("name") or ""
        self.last = name or self.last
        if kind == "control_flow":
            self.control_flow(msg)
            return
        if kind == "sample" and msg["is_observed"]:
            refuse_odd(name, msg["value"])
        if kind == "param":
            refuse_unstarted(msg)
        if kind == "param" and ("param", name) in self.inputs:
            msg["value"] = self.inputs["param", name]
        if name in self.walks and self.read_walk and kind == "sample" and msg["value"] is None:
            self.read_walk(self, msg)
            return
        if kind == "sample" and msg["value"] is None and not msg["is_observed"]:
            for key in (("latent", name), ("param", name)):
                if key in self.inputs:
                    msg["value"] = self.inputs[key]
                    return
            value = placeholder(name, msg["fn"], self.truncated)
            if jnp.issubdtype(jnp.result_type(value), jnp.floating) and ("key", 0) in self.inputs:
                value = value + 0 * jax.random.key_data(self.inputs["key", 0]).sum()  # not to be taken for a number
            msg["value"] = value

    def postprocess_message(self, msg):
        kind, name = msg["type"], msg.get("name") or ""
        self.refuse_twofold(kind, name)
        if kind == "param":
            constraint = msg["kwargs"].get("constraint", dist.constraints.real)
            self.params[name] = (msg["value"], constraint)
        elif kind == "plate":
            size = (msg["args"][0], msg["args"][1] or msg["args"][0])
            if self.frames.setdefault(name, size) != size:
                sizes = f"{self.frames[name][1]} and {size[1]}"
                mend = "give each of the plates its own name"
                raise ModelError(name, problem=f"two plates of different sizes ({sizes}) have this name", mend=mend)
        elif kind == "sample":
            self.records[name] = self.record(msg)

    def control_flow(self, msg: dict) -> None:
        """A scan is read by `read_scan`; other control flow, and a scan inside a scan, are refused."""
        body = getattr(msg["args"][0], "__name__", "scan")
        if self.read_scan is None or len(msg["args"]) < 5:
            raise ModelError(
                body,
                problem="sites inside a scan within a scan, or inside cond, are not read",
                mend="write the inner steps as separate sites in a Python loop, or as a plate where they are "
                "independent; for cond, jnp.where on the arguments of one site",
            )
        self.read_scan(self, msg)

    def new_label(self, stem: str) -> str:
        """A plate's name that no plate has yet."""
        number = len(self.chains)
        label = stem if not number else f"{stem}{number + 1}"
        return label if label not in self.frames else f"{label}'"

    def add(self, record: Record) -> None:
        """Enter a site that was read elsewhere."""
        self.refuse_twofold("sample", record.name)
        self.records[record.name] = record

    def refuse_twofold(self, kind: str, name: str) -> None:
        """Raise where a site takes a name that another one has; a parameter or a plate may be entered again."""
        if kind not in ("sample", "param", "plate", "deterministic"):
            return
        other = self.kinds.setdefault(name, kind)
        if name in self.records or other != kind:
            other = "two sample sites" if other == kind else f"a {WORDS[other]} and a {WORDS[kind]}"
            raise ModelError(name, problem=f"{other} have this name", mend="give each site its own name")

    def record(self, msg) -> Record:
        base, mask, taken = unwrap(msg["fn"])
        auxiliary = bool(msg["infer"].get("is_auxiliary")) and isinstance(base, dist.Unit)
        value, observed = msg["value"], bool(msg["is_observed"])
        given = value
        if observed and not self.drop_nan and (path := path_of(base)) is not None:
            base, taken = laws_of_steps(path, value), taken + 1
            mask = None if mask is None else jnp.expand_dims(mask, -1)
        if observed and not auxiliary:
            value, seen = as_read(base, value, self.drop_nan)
            mask = seen if mask is None else mask if seen is None else mask & seen
        if observed and not auxiliary:
            refuse_misshapen(msg["name"], jnp.shape(value), msg["fn"].shape())
        frames = tuple(msg["cond_indep_stack"])
        return Record(
            msg["name"], msg["fn"], base, mask, taken, value, observed, auxiliary, msg["scale"], frames,
            None if given is value else given, None if auxiliary else law_of(base),
        )  # fmt: skip


class AtObserved(Messenger):
    """Lets `change` alter what observed sites say while NumPyro runs the model, inside scans too.

    No handler outside of a scan sees its sites before they have their values. Afterwards NumPyro sends each out once
    more, the laws of all steps stacked, by which they can no longer be drawn from: that message is left alone.
    """

    def __init__(self, change: Callable[[dict], None]):
        super().__init__(None)
        self.change = change
        self.seen_inside: set[str] = set()

    def process_message(self, msg):
        if msg["type"] == "control_flow":
            step, *rest = msg["args"]
            msg["args"] = (self.around(step), *rest)
        elif msg["type"] == "sample" and msg["is_observed"] and msg["name"] not in self.seen_inside:
            self.change(msg)

    def around(self, step: Callable) -> Callable:
        def change(msg: dict) -> None:
            self.seen_inside.add(msg["name"])
            self.change(msg)

        def inside(*args):
            with AtObserved(change):
                return step(*args)

        return inside


def refuse_odd(name: str, value: Any) -> None:
    """Raise where an observed value is nothing that a density can be taken of."""
    kind = getattr(getattr(value, "dtype", None), "kind", "?")
    if isinstance(value, jax.Array | int | float) or kind in "biuf":
        return
    mend = f'numpyro.sample("{name}", ..., obs=jnp.asarray(...)), or pass the model an array of numbers'
    if kind in "USM" or (kind == "O" and isinstance(np.ravel(value)[0], str)):
        mend = "encode them as numbers, for instance np.unique(values, return_inverse=True)[1] for labels"
    elif kind == "O":
        mend = "make them numbers, with NaN for what is missing: np.asarray(values, float)"
    raise DataError(name, problem=f"its data are no array of numbers but {described(value)}", mend=mend)


def refuse_unstarted(msg: Mapping) -> None:
    """Raise where a parameter has no start value, or a constraint that is none."""
    name, constraint = msg["name"], msg["kwargs"].get("constraint", dist.constraints.real)
    if not isinstance(constraint, dist.constraints.Constraint):
        raise ModelError(
            name,
            problem=f"constraint={constraint!r} is no constraint of NumPyro",
            mend=f'numpyro.param("{name}", ..., constraint=numpyro.distributions.constraints.positive), or another',
        )
    if msg["args"] and msg["args"][0] is None:
        raise ModelError(
            name,
            problem="this parameter has no initial value, which is what tells its shape",
            mend=f'numpyro.param("{name}", jnp.ones(shape), constraint=...)',
        )


def refuse_misshapen(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise where an observed value does not fit the plates and events of its site."""
    try:
        fits = jnp.broadcast_shapes(shape, expected) == tuple(expected)
    except ValueError:
        fits = False
    if fits and 0 not in expected:
        return
    mend = "make the plate's size the number of rows (numpyro.plate(name, len(data))), and check the data's axes"
    if 0 in expected:
        mend = "pass at least one row, and one column"
    elif not expected:
        mend = f'put the site, and the latents of its rows, in a plate: with numpyro.plate("data", {shape[0]})'
    elif shape == (*expected, 1):
        mend = "the data are a column: pass data[:, 0]" if len(expected) == 1 else "pass data[..., 0]"
    elif len(shape) == len(expected) + 1 and shape[:-1] == tuple(expected):
        mend = f"give the site parameters for its {shape[-1]} columns and .to_event(1), or pass one column"
    problem = f"its data have shape {shape}, its plates and event have shape {tuple(expected)}"
    raise DataError(name, problem=problem, mend=mend)


def as_read(base: Any, value: Any, drop_nan: bool) -> tuple[Any, Any]:
    """An observed value as its density reads it, and which of it is seen (None for all)."""
    seen = None
    if drop_nan and holds_nan(value):
        value, seen = without_nan(base, value)
    if isinstance(base, CATEGORIES) and holds_nan(value):
        value = jnp.asarray(value).astype(int)  # whole numbers out of a table with NaN; checked to be whole later
    return value, seen


def holds_nan(value: Any) -> bool:
    """Whether NaN is among the numbers that such an array could hold."""
    return bool(jnp.issubdtype(jnp.result_type(value), jnp.floating))


def without_nan(base: Any, value: Any) -> tuple[Any, Any]:
    """A value with something possible in place of NaN, and which of its events are seen in part at least."""
    missing = jnp.isnan(value)
    seen = ~missing.all(tuple(range(-base.event_dim, 0))) if base.event_dim else ~missing
    fill = base.support.feasible_like(value)
    if base.event_dim == 1 and jnp.ndim(value) > 1 and base.support is dist.constraints.real_vector:
        here = jnp.where(missing, 0, value).sum(tuple(range(jnp.ndim(value) - 1)))
        fill = here / jnp.maximum((~missing).sum(tuple(range(jnp.ndim(value) - 1))), 1)  # means of what is seen
    return jnp.where(missing, fill, value), seen


def placeholder(name: str, fn: Any, truncated) -> Any:
    """A value that the site could take, of its shape."""
    base = unwrap(fn)[0]
    if base.support.is_discrete:
        low, _ = bounds(name, base, truncated)
        return jnp.broadcast_to(jnp.asarray(low, int), fn.shape())
    try:
        return fn.support.feasible_like(jnp.zeros(fn.shape()))
    except NotImplementedError:
        return fn.sample(jax.random.key(0))


def described(x: Any) -> str:
    """A value in a few words."""
    kind = type(x).__name__
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}[{', '.join(map(str, x.shape))}]"
    if isinstance(x, list | tuple | dict):
        return f"a {kind} of {len(x)}"
    return repr(x) if x is None or (isinstance(x, int | float | str) and len(repr(x)) < 30) else f"a {kind}"


def moving_bounds(r: Record) -> dict[str, Any]:
    """Bounds of an observed site's support that are computed from something."""
    support = r.base.support if r.observed and not r.auxiliary else None
    bounds = {b: getattr(support, b, None) for b in BOUNDS}
    return {b: v for b, v in bounds.items() if isinstance(v, Tracer)}


def outputs_of(
    records: Mapping[str, Record], latents: Container[str], truncated: Mapping[str, tuple[int, int]]
) -> dict:
    """Everything that later stages ask of a site, as arrays."""
    out = {}
    for name, r in records.items():
        if (ready := getattr(r, "ready", None)) is not None:
            out.update({(name, field): array for field, array in ready.items()})
            continue
        if r.auxiliary:
            out[name, "elem"] = jnp.asarray(r.base.log_factor)
        else:
            out[name, "elem"] = log_density(r.base, r.value)
            out[name, "value"] = jnp.asarray(r.vector(r.value))
        if isinstance(r.base, dist.Delta):
            out[name, "arg:v"] = jnp.asarray(r.base.v)
        family = family_of(r.base)
        if isinstance(family, Family):
            for arg in (*family.args, *family.fixed):
                out[name, f"arg:{arg}"] = jnp.asarray(getattr(r.base, arg))
        elif r.law:
            out.update({(name, f"arg:{arg}"): jnp.asarray(v) for arg, v in r.law.args.items()})
        elif family is not None:
            out.update({(name, f"arg:{part}"): jnp.asarray(v) for part, v in family.parts(r.base).items()})
        out.update({(name, b): v for b, v in moving_bounds(r).items()})
        if name in latents:
            out[name, "low"], out[name, "high"] = (jnp.asarray(b) for b in bounds(name, r.base, truncated))
        if r.given is not None:
            out[name, "given"] = jnp.asarray(r.vector(r.given))
        if r.mask is not None:
            out[name, "mask"] = jnp.asarray(r.mask)
        if r.scale is not None:
            out[name, "scale"] = jnp.asarray(r.scale)
    return out

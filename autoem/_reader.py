"""Run a NumPyro model once and record what each of its sites says. The only module that touches `numpyro.handlers`.

In: a model, the values of its parameters and latents (numbers or tracers), and where NaN means "not seen". Out: a
`Reader` with one `Record` a `sample` statement, the parameters and the plates; outputs are arrays by (site, field).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger

from autoem._errors import DataError, ModelError, PlanError
from autoem._support import bounds
from autoem.families import Family, family_of

NOT_CONCRETE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@dataclasses.dataclass
class Record:
    """What one `sample` message said, before anything is decided."""

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
        self, inputs: Mapping, truncated: Mapping[str, tuple[int, int]], drop_nan: bool, concrete: bool = False
    ):
        self.inputs, self.truncated, self.drop_nan = inputs, truncated, drop_nan
        # where the model reads the data's values in Python, what does not depend on parameters is computed at once
        self.context = jax.ensure_compile_time_eval if concrete else contextlib.nullcontext
        self.records: dict[str, Record] = {}
        self.params: dict[str, tuple[Any, Any]] = {}
        self.frames: dict[str, tuple[int, int]] = {}
        self.last = "(before the first site)"
        super().__init__(None)

    def process_message(self, msg):
        kind, name = msg["type"], msg.get("name") or ""
        self.last = name or self.last
        if kind == "control_flow":
            body = getattr(msg["args"][0], "__name__", "scan")
            raise ModelError(
                body,
                problem="sites inside control flow (scan, cond) are not read yet",
                mend="write the steps as separate sites in a Python loop, or as a plate where they are independent",
            )
        if kind == "param" and ("param", name) in self.inputs:
            msg["value"] = self.inputs["param", name]
        if kind == "sample" and msg["value"] is None and not msg["is_observed"]:
            for key in (("latent", name), ("param", name)):
                if key in self.inputs:
                    msg["value"] = self.inputs[key]
                    return
            msg["value"] = placeholder(name, msg["fn"], self.truncated)

    def postprocess_message(self, msg):
        kind, name = msg["type"], msg.get("name") or ""
        if kind == "param":
            constraint = msg["kwargs"].get("constraint", dist.constraints.real)
            self.params[name] = (msg["value"], constraint)
        elif kind == "plate":
            self.frames[name] = (msg["args"][0], msg["args"][1] or msg["args"][0])
        elif kind == "sample":
            if name in self.records:
                raise ModelError(name, problem="two sample sites have this name", mend="give each site its own name")
            self.records[name] = self.record(msg)

    def record(self, msg) -> Record:
        base, mask, taken = unwrap(msg["fn"])
        auxiliary = bool(msg["infer"].get("is_auxiliary")) and isinstance(base, dist.Unit)
        value, observed = msg["value"], bool(msg["is_observed"])
        if self.drop_nan and observed and not auxiliary and jnp.issubdtype(jnp.result_type(value), jnp.floating):
            value, seen = without_nan(base, value)
            mask = seen if mask is None else mask & seen
        if observed and not auxiliary:
            refuse_misshapen(msg["name"], jnp.shape(value), msg["fn"].shape())
        frames = tuple(msg["cond_indep_stack"])
        return Record(msg["name"], msg["fn"], base, mask, taken, value, observed, auxiliary, msg["scale"], frames)


def refuse_misshapen(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise where an observed value does not fit the plates and events of its site."""
    try:
        fits = jnp.broadcast_shapes(shape, expected) == tuple(expected)
    except ValueError:
        fits = False
    if not fits:
        raise DataError(
            name,
            problem=f"its data have shape {shape}, its plates and event have shape {tuple(expected)}",
            mend="make the plate's size the number of rows (numpyro.plate(name, len(data))), and check the data's axes",
        )


def without_nan(base: Any, value: Any) -> tuple[Any, Any]:
    """A value with something possible in place of NaN, and which of its events are seen in part at least."""
    missing = jnp.isnan(value)
    seen = ~missing.all(tuple(range(-base.event_dim, 0))) if base.event_dim else ~missing
    return jnp.where(missing, base.support.feasible_like(value), value), seen


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


def run_model(
    model: Callable, call: Callable, reader: Reader, inputs: Mapping, outputs: Callable[[Reader], dict]
) -> dict:
    """Run the model under the reader and return its `outputs`; the model's failures become errors naming the site."""
    args, kwargs = call([inputs[k] for k in inputs if k[0] == "data"])
    try:
        # what NumPyro would validate is checked on the host, where it compiles nothing
        with numpyro.validation_enabled(False), handlers.seed(rng_seed=inputs["key", 0]), reader, reader.context():
            model(*args, **kwargs)
            return outputs(reader)
    except (*NOT_CONCRETE, ModelError, PlanError, DataError):
        raise
    except (TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        raise _explain(error, reader.last, args, kwargs) from error


def _explain(error: Exception, where: str, args, kwargs) -> ValueError:
    listed = [i for i, a in enumerate(args) if isinstance(a, list)] + [
        k for k, a in kwargs.items() if isinstance(a, list)
    ]
    if listed:
        which = ", ".join(map(str, listed))
        return DataError(
            where,
            problem=f"the model fails here: {error}; argument {which} is a Python list",
            mend="pass jnp.asarray(...)",
        )
    if "size of plate" in str(error):
        return DataError(where, problem="a plate here has no rows", mend="pass at least one row of data")
    if "truth value" in str(error).lower():
        return ModelError(
            where,
            problem=f"Python code at or after this site branches on an array ({error})",
            mend="use jnp.where, or index a table by the latent, instead of `if` on its value",
        )
    return ModelError(
        where,
        problem=f"the model itself fails at or after this site: {type(error).__name__}: {error}",
        mend="check that the arguments' shapes fit the plates; the model must also run as model(*args, **kwargs) alone",
    )


def outputs_of(
    records: Mapping[str, Record], latents: Container[str], truncated: Mapping[str, tuple[int, int]]
) -> dict:
    """Everything that later stages ask of a site, as arrays."""
    out = {}
    for name, r in records.items():
        if r.auxiliary:
            out[name, "elem"] = jnp.asarray(r.base.log_factor)
        else:
            out[name, "elem"] = r.base.log_prob(r.value)
            out[name, "value"] = jnp.asarray(r.value)
        family = family_of(r.base)
        if isinstance(family, Family):
            for arg in (*family.args, *family.fixed):
                out[name, f"arg:{arg}"] = jnp.asarray(getattr(r.base, arg))
        if name in latents:
            out[name, "low"], out[name, "high"] = (jnp.asarray(b) for b in bounds(name, r.base, truncated))
        if r.mask is not None:
            out[name, "mask"] = jnp.asarray(r.mask)
        if r.scale is not None:
            out[name, "scale"] = jnp.asarray(r.scale)
    return out

"""Model and guide for NumPyro's SVI, and who sums out the discrete latents.

NumPyro's own enumeration asks for funsor, for free dimensions, and for model code that bears them; where it does not
get them it may fail, or be wrong. So its loss is held against autoem's objective at the start before it is used.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import Array
from numpyro import handlers
from numpyro.infer import Trace_ELBO, init_to_median, init_to_value
from numpyro.infer.autoguide import AutoContinuous, AutoDelta, AutoGuide, AutoGuideList, AutoNormal
from numpyro.primitives import Messenger

from autoem._em import EM
from autoem._errors import DataError, ModelError, PlanError
from autoem.baselines._target import Target


@dataclasses.dataclass(frozen=True, eq=False)
class Guided:
    """What SVI runs.

    Attributes:
        call: data to the arguments of model and guide.
        sampled: sites that the guide draws.
        tight: whether the bound is the objective of EM itself, without noise.
    """

    model: Callable
    guide: Callable
    loss: Any
    call: Callable[[list], tuple[tuple, dict]]
    params: frozenset[str]
    sampled: tuple[str, ...]
    tight: bool
    notes: tuple[str, ...]

    def is_param(self, name: str) -> bool:
        return name in self.params


def guided(target: Target, guide: Any, num_particles: int, which: int = 0) -> Guided:
    """Model and guide, from start number `which`.

    Raises:
        PlanError: discrete latents beside continuous ones, or beside a guide of the user's own, that NumPyro cannot
            sum out.
    """
    program, start = target.built.program, target.starts[which]
    if target.has_holes or target.em.options.truncated():
        why = "the data hold NaN" if target.has_holes else "a latent is truncated"
        return summed_by_autoem(target, guide, start, f"{why}, which NumPyro's model does not leave out")
    model = with_fixed(target, start)
    if not program.latents:
        return on_the_model(target, model, guide, Trace_ELBO(num_particles), start, ())
    loss, why = enumerated(target, model, start, num_particles)
    if loss is None:
        return summed_by_autoem(target, guide, start, f"NumPyro cannot sum out {', '.join(program.latents)}: {why}")
    summed = handlers_for_enumeration(model)
    notes = (f"{', '.join(program.latents)} summed out by NumPyro's TraceEnum_ELBO",)
    return on_the_model(target, summed, guide, loss, start, notes)


def with_fixed(target: Target, start: Mapping[str, Array]) -> Callable:
    """The model, with parameters that do not move held at their start."""
    fixed = {n: start[n] for n in target.built.program.params if n not in target.names}
    return Held(target.em.model, fixed) if fixed else target.em.model


class Held(Messenger):
    """Parameters as constants, and sites as data, so that SVI leaves them alone."""

    def __init__(self, fn: Callable, values: Mapping[str, Array]):
        self.values = dict(values)
        super().__init__(fn)

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "param" and msg["name"] in self.values:
            msg["type"], msg["value"] = "held", self.values[msg["name"]]
        elif msg["type"] == "sample" and msg["name"] in self.values:
            msg["value"], msg["is_observed"] = self.values[msg["name"]], True


def on_the_model(
    target: Target, model: Callable, guide: Any, loss: Any, start: Mapping[str, Array], notes: tuple[str, ...]
) -> Guided:
    """SVI of the model itself."""
    program = target.built.program
    priors, continuous = target.with_prior, list(program.continuous)
    if guide is None or (isinstance(guide, type) and issubclass(guide, AutoGuide)):
        if guide is not None and issubclass(guide, AutoContinuous) and program.latents and continuous:
            problem = f"{guide.__name__} draws it outside its plates, where NumPyro cannot sum out {[*program.latents]}"
            raise PlanError(continuous[0], problem=problem, mend="SVI(), with AutoNormal, or a guide of your own")
        guide = points_and(model, guide or AutoNormal, priors, continuous, list(program.latents), start)
    else:
        refuse_incomplete(guide, target, [*priors, *continuous])
    own = {n for n in program.params if not program.params[n].prior and n in target.names}
    sampled = (*priors, *continuous)
    return Guided(model, guide, loss, target.call, frozenset(own), sampled, not continuous, notes)


def refuse_incomplete(guide: Callable, target: Target, names: list[str]) -> None:
    """Refuse a guide of the user's that leaves a site out, for which NumPyro would draw from the prior."""
    args, kwargs = target.call(target.data)
    found = handlers.trace(handlers.seed(guide, rng_seed=0)).get_trace(*args, **kwargs)
    for name in names:
        if name not in found or found[name]["type"] != "sample":
            mend = f'numpyro.sample("{name}", ...) in the guide, or leave guide= out'
            raise PlanError(name, problem="the guide does not sample it", mend=mend)


def points_and(
    model: Callable, kind: type[AutoGuide], points: list[str], spread: list[str], summed: list[str], start: Mapping
) -> Callable:
    """A guide with a point at each parameter that has a prior, and NumPyro's automatic one for the other latents."""
    if not points and not spread:
        return nothing
    seeded = handlers.seed(model, rng_seed=0)
    guide = AutoGuideList(handlers.block(seeded, hide=summed))
    if points:
        at = init_to_value(values={n: start[n] for n in points})
        guide.append(AutoDelta(handlers.block(seeded, hide=[*spread, *summed]), init_loc_fn=at))
    if spread:
        hidden = handlers.block(seeded, hide=[*points, *summed])
        guide.append(kind(hidden, init_loc_fn=init_to_median(num_samples=15)))  # type: ignore[call-arg]
    return guide


def nothing(*args, **kwargs) -> None:
    """The guide of a model without anything left to guess."""


def summed_by_autoem(target: Target, guide: Any, start: Mapping[str, Array], why: str) -> Guided:
    """A surrogate: the model's parameters, and its log density with the latents summed out, as one factor."""
    program = target.built.program
    if program.continuous or guide is not None:
        name = next(iter(program.latents or program.continuous))
        whom = "beside continuous latents" if program.continuous else "below a guide of your own"
        mend = "autoem.baselines.GradientAscent(), which climbs what autoem sums out"
        raise PlanError(name, problem=f"{why}; {whom} autoem does not do it for SVI", mend=mend)

    def surrogate(bundle) -> None:
        params: dict[str, Any] = {n: start[n] for n in program.params}
        for n in target.names:
            params[n] = numpyro.param(n, start[n], constraint=program.params[n].constraint)
        numpyro.factor("log_density", target.kernel.objective(params, bundle)[0])

    notes = (f"the latents are summed out by autoem: {why}",)
    call = lambda data: ((target.bundle,), {})  # noqa: E731
    return Guided(surrogate, nothing, Trace_ELBO(), call, frozenset(target.names), (), True, notes)


def handlers_for_enumeration(model: Callable) -> Callable:
    from numpyro.contrib.funsor import config_enumerate

    return config_enumerate(model, default="parallel")


def enumerated(target: Target, model: Callable, start: Mapping[str, Array], num_particles: int) -> tuple[Any, str]:
    """NumPyro's enumerating loss where it gives the density that autoem finds at the start; else None, and why not."""
    try:
        from numpyro.infer import TraceEnum_ELBO

        found, expected = density_by_numpyro(target, model, start)
    except ImportError:
        return None, "funsor is not installed"
    except (PlanError, ModelError, DataError):
        raise
    except Exception as error:  # whatever NumPyro and funsor make of the model
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    eps = float(jnp.finfo(jnp.result_type(float)).eps)
    if not abs(found - expected) <= 1e4 * eps * (abs(expected) + target.kernel.num_rows):
        return None, f"its density at the start is {found:.6g}, the model's is {expected:.6g}"
    return TraceEnum_ELBO(num_particles=num_particles), ""


def density_by_numpyro(target: Target, model: Callable, start: Mapping[str, Array]) -> tuple[float, float]:
    """Log density at the start by NumPyro's enumeration and by autoem, any continuous latents given."""
    from numpyro.infer import SVI, TraceEnum_ELBO

    program, (args, kwargs) = target.built.program, target.call(target.data)
    if program.continuous:
        with handlers.substitute(data=dict(start)):
            drawn = handlers.trace(handlers.seed(target.em.model, rng_seed=0)).get_trace(*args, **kwargs)
        given = {n: drawn[n]["value"] for n in program.continuous}
        model, expected = handlers.condition(model, given), conditioned(target, start, given, args, kwargs)
    else:
        expected = float(jax.jit(target.kernel.objective)(dict(start), target.bundle)[0])
    points: Any = {n: start[n] for n in target.with_prior}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summed = handlers_for_enumeration(handlers.condition(model, points))
        svi = SVI(summed, nothing, numpyro.optim.Adam(0.1), TraceEnum_ELBO())
        own = {n: start[n] for n in target.names if n not in points}
        state = svi.init(jax.random.key(0), *args, init_params=own, **kwargs)
        return -float(svi.evaluate(state, *args, **kwargs)), expected


def conditioned(target: Target, start: Mapping[str, Array], given: Mapping[str, Array], args, kwargs) -> float:
    """Log density at the start with the continuous latents given, by a derivation of its own."""
    em = EM(handlers.condition(target.em.model, {**given}), maximize=target.with_prior, init="model", progress=False)
    built, source = em._derive(args, kwargs)
    params = {n: start[n] for n in built.program.params}
    return float(jax.jit(built.kernel.proof.objective)(params, built.plain_bundle(source, jax.random.key(0)))[0])

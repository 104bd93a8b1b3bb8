"""The whole model run by NumPyro itself, on a random completion, against the sites as they were read.

In: a build and its call. Out: nothing, or a refusal. What `_verify` compares with the tables comes from one reading of
the model; here the model runs as its author wrote it, scans and all, so that the reading itself is tested.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer.util import log_density

from autoem._errors import DataError, ModelError
from autoem.checks.verify import by_model, host_params, model_fields, noise_for, random_states, random_values
from autoem.graph.programs import jit_once
from autoem.planning.build import Build
from autoem.reading.reader import AtObserved, as_read, unwrap
from autoem.reading.trace import Source


def replay(built: Build, source: Source) -> tuple[dict[str, float], float]:
    """Log density of the data and a random completion at random parameters: as read, by site, and by NumPyro."""
    key = jax.random.key(20)
    start = built.start(source, key)
    noise = noise_for(built, start)
    params = host_params(built, start, noise)
    chosen = random_states(built, source)
    latents: dict = {n: np.asarray(z.states)[chosen[n]] for n, z in built.program.latents.items()}
    latents |= random_values(built.program)

    def read(params, latents, data):
        values = {("data", i): x for i, x in data.items()} | {("key", 0): key}
        values |= {("param", n): v for n, v in params.items()} | {("latent", n): v for n, v in latents.items()}
        fields = model_fields(built, values)
        return {n: by_model(f, fields, once=False)[0] for n, f in built.kernel.problem.factors.items()}

    ours = jit_once(read)(params, latents, built.data(source))

    def change(msg: dict) -> None:
        """Data with holes, and codes among floats, as they were read: NumPyro's density knows neither."""
        if not isinstance(base := unwrap(msg["fn"])[0], dist.Unit):
            msg["value"], seen = as_read(base, msg["value"], source.drop_nan)
            msg["fn"] = msg["fn"] if seen is None else msg["fn"].mask(seen)

    def whole(values, data):
        args, kwargs = source.call(data)
        with numpyro.validation_enabled(False), AtObserved(change):
            return log_density(handlers.seed(source.model, 0), args, kwargs, values)[0]

    shown = {n: z.in_model(latents[n]) for n, z in built.program.continuous.items()}
    theirs = jit_once(whole)({**params, **latents, **shown}, list(source.data))
    return {n: float(x) for n, x in ours.items()}, float(theirs)


def refuse_misread(built: Build, source: Source) -> None:
    """Raise where the model that NumPyro runs is not the one that was read.

    Raises:
        ModelError: the two densities differ. DataError: a site reads another step's observation, which is missing.
    """
    by_site, theirs = replay(built, source)
    ours = sum(by_site.values())
    eps = float(jnp.finfo(jnp.result_type(float)).eps)
    size = max((p.size for p in built.program.plates.values()), default=1)
    if source.drop_nan and (nan := [n for n, x in by_site.items() if math.isnan(x)]):
        raise DataError(
            nan[0],
            problem="its density reads an observation of another step that is missing (NaN), so it cannot be left out",
            mend="fill that observation in, or start a new sequence after it",
        )
    if math.isnan(theirs):
        return
    if abs(ours - theirs) <= max(1e4 * eps, 1e-7) * (abs(theirs) + size) or (theirs < -1e30 and ours < -1e15):
        return
    raise ModelError(
        built.program.name,
        problem=f"its scans were not read right: density {ours:.8g} as read, {theirs:.8g} as NumPyro runs it",
        mend="keep to the forms of scan that the documentation lists, or write the steps in a Python loop",
        kind="model",
    )

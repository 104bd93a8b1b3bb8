"""Sites whose density is a sum over a hidden component, rewritten with that component as a latent of its own.

In: a site of `MixtureSameFamily`, or a zero-inflated Poisson. Out: the same law as a discrete latent and a site of the
component, so that an E-step sums over it and the component's parameters have closed forms.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer.reparam import Reparam

from autoem._errors import ModelError

MATRICES = ("covariance_matrix", "precision_matrix", "scale_tril")


class Components(Reparam):
    r"""Writes the hidden component of an observed mixture out: a reparametrisation, for `numpyro.handlers.reparam`.

    A site `x` of `MixtureSameFamily` becomes

    .. math:: z \sim \mathrm{mixing}, \qquad x \mid z \sim \mathrm{component}_z

    with `z` a latent named `x_component`; the likelihood is the same::

        em = autoem.EM(handlers.reparam(model, config={"x": autoem.Components()}))

    A `ZeroInflatedPoisson` becomes `z ~ Bernoulli(gate)` and `x ~ Poisson(rate * (1 - z))`.

    Raises:
        ModelError: the site is none of these, or is not observed.

    References:
        Dempster, Laird and Rubin 1977, section 4.3; Lambert 1992, "Zero-inflated Poisson regression".
    """

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[Any, Any]:
        """The law of the site given its component, and its value."""
        events = fn.event_dim
        while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
            fn = fn.base_dist
        mixed = isinstance(getattr(fn, "component_distribution", None), dist.Distribution)
        known = mixed or isinstance(fn, dist.ZeroInflatedPoisson)
        if not known or obs is None or fn.event_dim != events:
            raise ModelError(
                name,
                problem="Components() rewrites an observed MixtureSameFamily or ZeroInflatedPoisson, "
                f"not this {type(fn).__name__}",
                mend="leave the site out of handlers.reparam, or write its component by hand",
            )
        latent = f"{name}_component"
        if isinstance(fn, dist.ZeroInflatedPoisson):
            z = numpyro.sample(latent, dist.BernoulliProbs(fn.gate), infer={"enumerate": "parallel"})
            base: Any = fn.base_dist
            return dist.Poisson(base.rate * (1 - z)), obs
        z = numpyro.sample(latent, fn.mixing_distribution, infer={"enumerate": "parallel"})
        return picked(fn.component_distribution, z), obs


def picked(components: Any, z: Any, events: int = 0) -> Any:
    """The component of number `z`; components run along the last batch axis but `events`."""
    if isinstance(components, dist.Independent):
        taken = components.reinterpreted_batch_ndims
        return picked(components.base_dist, z, events + taken).to_event(taken)
    count = components.batch_shape[len(components.batch_shape) - 1 - events]
    if isinstance(components, dist.ExpandedDistribution):
        components = components.base_dist
    own = {n: c for n, c in components.arg_constraints.items() if n not in MATRICES or n in vars(components)}
    given = [n for n in MATRICES if n in own]
    kept = {n: c for n, c in own.items() if n not in given[1:]}
    args = {n: entry(jnp.asarray(getattr(components, n)), z, c.event_dim + events, count) for n, c in kept.items()}
    return type(components)(**args)


def entry(array: jax.Array, z: Any, events: int, count: int) -> jax.Array:
    """What an argument is for component `z`: an entry of the axis before its last `events`."""
    batch = array.ndim - events
    if batch < 1 or array.shape[batch - 1] == 1 < count:  # the same for all components
        return array if batch < 1 else jnp.squeeze(array, batch - 1)
    z = jnp.asarray(z)
    if batch == 1:
        return jnp.take(array, z, axis=0)
    index = z.reshape(*(1,) * max(batch - 1 - z.ndim, 0), *z.shape, *(1,) * (events + 1))
    array = array.reshape(*(1,) * max(z.ndim - batch + 1, 0), *array.shape)
    return jnp.squeeze(jnp.take_along_axis(array, index, axis=-1 - events), -1 - events)


__all__ = ["Components"]

"""Sites whose density is a sum over a hidden component, rewritten with that component as a latent of its own.

In: a site of `MixtureSameFamily` or `MixtureGeneral`, or a zero-inflated one. Out: the same law as a discrete latent
and a site of the component, or a masked site for each, so that an E-step sums over it and the components' parameters
have closed forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer.reparam import Reparam

from autoem._errors import ModelError

MATRICES = ("covariance_matrix", "precision_matrix", "scale_tril")


class Components(Reparam):
    r"""Writes the hidden component of an observed mixture out: a reparametrisation, for `numpyro.handlers.reparam`.

    A site `x` of `MixtureSameFamily` becomes

    .. math:: z \sim \mathrm{mixing}, \qquad x \mid z \sim \mathrm{component}_z

    with `z` a latent named `x_component`; the likelihood is the same::

        em = autoem.EM(handlers.reparam(model, config={"x": autoem.Components()}))

    A `ZeroInflatedPoisson` becomes `z ~ Bernoulli(gate)` and `x ~ Poisson(rate * (1 - z))`. Of a `MixtureGeneral`, and
    of other zero-inflated laws, each component is a site of its own, `x_0`, `x_1` and so on, which counts where `z` is
    its number.

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
        known = mixed or isinstance(fn, dist.MixtureGeneral | dist.ZeroInflatedProbs)
        if not known or obs is None or fn.event_dim != events:
            raise ModelError(
                name,
                problem="Components() rewrites an observed MixtureSameFamily, MixtureGeneral or zero-inflated site, "
                f"not this {type(fn).__name__}",
                mend="leave the site out of handlers.reparam, or write its component by hand",
            )
        latent, infer = f"{name}_component", {"enumerate": "parallel"}
        if isinstance(fn, dist.ZeroInflatedProbs):
            gate: Any = {"logits": fn.gate_logits} if isinstance(fn, dist.ZeroInflatedLogits) else {"probs": fn.gate}
            z = numpyro.sample(latent, dist.Bernoulli(**gate), infer=infer)
            base: Any = fn.base_dist
            if isinstance(fn, dist.ZeroInflatedPoisson):
                return dist.Poisson(base.rate * (1 - z)), obs
            return one_by_one(name, z, [base, dist.Delta(jnp.zeros(()))], obs)
        mixture: Any = fn
        z = numpyro.sample(latent, mixture.mixing_distribution, infer=infer)
        if mixed:
            return picked(mixture.component_distribution, z), obs
        return one_by_one(name, z, mixture.component_distributions, obs)


def one_by_one(name: str, z: Any, components: Sequence[Any], obs: Any) -> tuple[None, Any]:
    """A site for each component, which counts where `z` is its number; the site itself holds the data alone.

    Where supports differ, what lies outside of a component's is impossible there, whatever its density would say.
    """
    apart = len({str(c.support) for c in components}) > 1
    for k, component in enumerate(components):
        chosen, site, support = z == k, f"{name}_{k}", component.support
        value = obs
        if apart and "real" not in str(support).lower():
            inside = jnp.asarray(support(obs))
            with handlers.mask(mask=chosen & ~inside):
                numpyro.factor(f"{site}_outside", jnp.where(inside, 0.0, -jnp.inf))
            chosen = chosen & inside
            whole = inside.reshape(*inside.shape, *(1,) * component.event_dim)
            value = jnp.where(whole, obs, support.feasible_like(jnp.asarray(obs)))
        with handlers.mask(mask=chosen):
            numpyro.sample(site, component, obs=value)
    return None, obs


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

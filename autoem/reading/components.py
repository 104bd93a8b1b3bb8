"""Sites whose density is a sum over a hidden component, rewritten with that component as a latent of its own.

In: a site of a mixture, or one with zeros of two kinds. Out: the same law as a discrete latent and a site of the
component, so that an E-step sums over it and the component's parameters have closed forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer.reparam import Reparam

from autoem._errors import ModelError
from autoem.families import Opaque, register_family
from autoem.families.densities import log_density

MATRICES = ("covariance_matrix", "precision_matrix", "scale_tril")


class Components(Reparam):
    r"""Writes the hidden component of an observed mixture out: a reparametrisation, for `numpyro.handlers.reparam`.

    A site `x` of `MixtureSameFamily` or `MixtureGeneral` becomes

    .. math:: z \sim \mathrm{mixing}, \qquad x \mid z \sim \mathrm{component}_z

    with `z` a latent named `x_component`; the likelihood is the same::

        em = autoem.EM(handlers.reparam(model, config={"x": autoem.Components()}))

    A site with zeros of two kinds (`ZeroInflatedPoisson`, `ZeroInflatedDistribution`, `ZeroInflatedNegativeBinomial2`)
    becomes `z ~ Bernoulli(gate)` and a law that is certain of zero where `z` is 1, as `x ~ Poisson(rate * (1 - z))`.
    The mixing weights and the gate then have closed forms; so have the parameters of components of one family, and of
    a Poisson, Binomial, Geometric or negative binomial (of known size) with zeros, where that family has them.

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
        mixture = isinstance(fn, dist.MixtureSameFamily | dist.MixtureGeneral)
        if not (mixture or isinstance(fn, dist.ZeroInflatedProbs)) or obs is None or fn.event_dim != events:
            raise ModelError(
                name,
                problem="Components() rewrites an observed mixture or zero-inflated distribution, "
                f"not this {type(fn).__name__}",
                mend="leave the site out of handlers.reparam, or write its component by hand",
            )
        law = fn.mixing_distribution if mixture else gate_of(fn)
        z = numpyro.sample(f"{name}_component", law, infer={"enumerate": "parallel"})
        if not mixture:
            return zero_where(fn.base_dist, z), obs
        if isinstance(fn, dist.MixtureSameFamily):
            return picked(fn.component_distribution, z), obs
        return one_of(list(fn.component_distributions), z, fn._support), obs


def gate_of(fn: Any) -> Any:
    """The law of whether a zero is one for certain."""
    if isinstance(fn, dist.ZeroInflatedLogits):
        return dist.BernoulliLogits(fn.gate_logits)
    return dist.BernoulliProbs(fn.gate)


# what makes a distribution certain of zero: an argument, and its value there, or as near to that as has a density
CERTAIN: dict[type, tuple[str, Callable[[], float]]] = {
    dist.Poisson: ("rate", lambda: 0.0),
    dist.BinomialProbs: ("probs", lambda: 0.0),
    dist.NegativeBinomialProbs: ("probs", lambda: 1e-30),
    dist.GeometricProbs: ("probs", lambda: 1 - float(jnp.finfo(jnp.result_type(float)).eps)),
}


def zero_where(base: Any, z: Any) -> Any:
    """The law that is `base` where `z` is 0, and certain of zero where it is 1."""
    while isinstance(base, dist.ExpandedDistribution):
        base = base.base_dist
    if type(base) in CERTAIN:
        argument, value = CERTAIN[type(base)]
        args = {n: getattr(base, n) for n in base.arg_constraints}
        args[argument] = args[argument] * (1 - z)
        if (there := value()) > 0:
            args[argument] = args[argument] + there * z
        return type(base)(**args)
    return OneOf([base, dist.Delta(jnp.zeros(()))], z, base.support)


def one_of(components: list[Any], z: Any, support: Any) -> Any:
    """The component of number `z` of a list; of one family, with its arguments indexed by `z`."""
    parts = [parted(c) for c in components]
    (kind, taken, _), names = parts[0], [list(arguments(b)) for _, _, b in parts]
    alike = all((k, t) == (kind, taken) for k, t, _ in parts) and all(n == names[0] for n in names)
    if not alike or not names[0] or support is not None:
        return OneOf(components, z, support)
    args = {}
    for name, constraint in arguments(parts[0][2]).items():
        arrays = jnp.broadcast_arrays(*(jnp.asarray(getattr(b, name)) for _, _, b in parts))
        events = constraint.event_dim + taken
        args[name] = entry(jnp.stack(arrays, axis=-1 - events), z, events, len(components))
    return kind(**args).to_event(taken)


def parted(component: Any) -> tuple[type, int, Any]:
    """The kind of a component under `expand` and `to_event`, how many axes that took, and itself."""
    taken = 0
    while isinstance(component, dist.ExpandedDistribution | dist.Independent):
        taken += getattr(component, "reinterpreted_batch_ndims", 0)
        component = component.base_dist
    return type(component), taken, component


class OneOf(dist.Distribution):
    """The distribution of number `which` of several, each of its own family; `support` is that of all, or None."""

    pytree_data_fields = ("components", "which")
    pytree_aux_fields = ("common",)

    def __init__(self, components: Sequence[Any], which: Any, support: Any = None, *, validate_args: Any = None):
        self.components, self.which, self.common = tuple(components), jnp.asarray(which), support
        shapes = (jnp.shape(self.which), *(c.batch_shape for c in components))
        batch = tuple(int(s) for s in jnp.broadcast_shapes(*shapes))
        super().__init__(batch, components[0].event_shape, validate_args=validate_args)

    @dist.constraints.dependent_property
    def support(self) -> Any:
        """That of all components."""
        return self.common or self.components[0].support

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """A draw of the component of each cell."""
        keys = jax.random.split(key, len(self.components))
        drawn = [c.expand(self.batch_shape).sample(k, sample_shape) for k, c in zip(keys, self.components, strict=True)]
        wide = jnp.broadcast_to(self.which, self.batch_shape).reshape(self.batch_shape + (1,) * self.event_dim)
        return self.chosen(drawn, wide)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """The log density of the component of each cell."""
        del intermediates
        found = []
        for component in self.components:
            own = log_density(component, value)
            inside = True if self.common is None else component.support(value)
            found.append(jnp.where(inside, own, -jnp.inf))
        return self.chosen(found, self.which)

    @staticmethod
    def chosen(arrays: Sequence[Any], which: Any) -> Any:
        """The entry of the array of number `which`."""
        out = arrays[0]
        for i, array in enumerate(arrays[1:], 1):
            out = jnp.where(which == i, array, out)
        return out


register_family(
    OneOf,
    Opaque("OneOf", "its components are of different families, each known by its own density alone"),
)


def picked(components: Any, z: Any, events: int = 0) -> Any:
    """The component of number `z`; components run along the last batch axis but `events`."""
    if isinstance(components, dist.Independent):
        taken = components.reinterpreted_batch_ndims
        return picked(components.base_dist, z, events + taken).to_event(taken)
    count = components.batch_shape[len(components.batch_shape) - 1 - events]
    if isinstance(components, dist.ExpandedDistribution):
        components = components.base_dist
    own = arguments(components)
    args = {n: entry(jnp.asarray(getattr(components, n)), z, c.event_dim + events, count) for n, c in own.items()}
    return type(components)(**args)


def arguments(distribution: Any) -> dict[str, Any]:
    """The constraints of the arguments that a distribution is made of, of its matrices that alone which was given."""
    own = {n: c for n, c in distribution.arg_constraints.items() if n not in MATRICES or n in vars(distribution)}
    given = [n for n in MATRICES if n in own]
    return {n: c for n, c in own.items() if n not in given[1:]}


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

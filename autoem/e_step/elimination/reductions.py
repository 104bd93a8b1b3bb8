"""How a latent's axis is removed from a table of logarithms: by sum, by maximum, or by what lies between.

In: a table, the latent's axis first. Out: the table without it. What an elimination's derivative says of the latents is
that of the reduction: with a sum their probabilities, with a maximum the indicator of the best completion, with a draw
that of an exact sample.

References:
    Ueda and Nakano 1998 (tempered sums). Chib 1996 (draws backwards along a recursion).
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem._errors import PlanError
from autoem.graph.derivatives import log

MOST_FACTORS = 32  # of one product, whose rounding errors add up


@jax.custom_jvp
def _log_sum_exp(x: Array) -> Array:
    return _log_sum_exp_jvp((x,), (x,))[0]


@_log_sum_exp.defjvp
def _log_sum_exp_jvp(primals, tangents):
    top, total, slope = _parts(primals[0], tangents[0])
    return (log(total) + top)[0], slope


@jax.custom_jvp
def _total(x: Array) -> Array:
    return _total_jvp((x,), (x,))[0]


@_total.defjvp
def _total_jvp(primals, tangents):
    top, total, slope = _parts(primals[0], tangents[0])
    return _sum_of_logs(total, len(primals[0])) + top.sum(), slope.sum()


def _parts(x: Array, dx: Array) -> tuple[Array, Array, Array]:
    """The largest entry, the sum of exponentials about it, and the derivative along `dx`, of every column.

    The derivative is written so that a column without any density has derivative zero rather than NaN, and so that the
    exponentials of the forward pass serve the backward pass.
    """
    top = jnp.max(x, axis=0, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    weight = jnp.exp(x - top)
    total = weight.sum(axis=0, keepdims=True)
    share = weight / jnp.where(total > 0, total, 1)
    return top, total, jnp.sum(share * jnp.where(weight > 0, dx, 0), axis=0)


def _sum_of_logs(x: Array, most: int) -> Array:
    """The sum of `log(x)` for entries between 1 and `most` (or zero), as logarithms of products.

    Logarithms cost more than all else in a mixture of few components; a product of entries cannot overflow here.
    """
    flat = x.ravel()
    digits = np.log(float(jnp.finfo(x.dtype).max)) - 1
    count = int(np.clip(digits / np.log(max(most, 2)), 1, MOST_FACTORS))
    whole = flat.size - flat.size % count
    products = jnp.prod(flat[:whole].reshape(count, -1), axis=0)
    return log(products).sum() + log(jnp.prod(flat[whole:]))


def log_sum_exp(x: Array) -> Array:
    """`log sum exp` along the first axis, in nats; `-inf` entries and all-`-inf` columns are safe."""
    return _log_sum_exp(x)


def total_log_sum_exp(x: Array) -> Array:
    """The sum of `log_sum_exp(x)` over all columns."""
    return _total(x)


def maximum(x: Array) -> Array:
    """Largest entry along the first axis."""
    return jnp.max(x, axis=0)


def largest(x: Array) -> Array:
    """The same, whose derivative is one at a single largest entry, the first, where several are as large."""
    return jnp.take_along_axis(x, jnp.argmax(x, axis=0)[None], axis=0)[0]


class Reduction:
    """A reduction that needs to know what it reduces; a plain function stands for one that does not.

    Attributes:
        apart: whether every cell is to be reduced on its own, even where the table is the same for all.
    """

    apart = False

    def of(self, latents: frozenset[str], beside: frozenset[str]) -> Callable[[Array], Array]:
        """The one for removing `latents` from a table that holds `beside` too."""
        return self

    def at(self, number: Array | int) -> Reduction:
        """Another of its kind, for one step of a loop."""
        return self

    def is_late(self, latent: str) -> bool:
        """Whether other latents are to be removed before this one."""
        return False

    def __call__(self, x: Array) -> Array:
        raise NotImplementedError


Reduce = Callable[[Array], Array]


def numbered(reduce: Reduce, number: Array | int) -> Reduce:
    """What `reduce` is at one step of a loop."""
    return reduce.at(number) if isinstance(reduce, Reduction) else reduce


def removing(reduce: Reduce, latents: Iterable[str], beside: Iterable[str]) -> Reduce:
    """What `reduce` is for removing `latents` from a table that holds `beside` too."""
    return reduce.of(frozenset(latents), frozenset(beside)) if isinstance(reduce, Reduction) else reduce


@dataclasses.dataclass(frozen=True, eq=False)
class Tempered(Reduction):
    r""":math:`\frac{1}{\beta} \log \sum_i e^{\beta x_i}`: the sum where `beta` is one, the maximum as it grows.

    Nested it stays of its form, so that an elimination with it gives :math:`\frac{1}{\beta} \log \sum_z p(x, z)^\beta`.
    """

    beta: Array

    def __call__(self, x: Array) -> Array:
        return log_sum_exp(self.beta * x) / self.beta


@dataclasses.dataclass(frozen=True, eq=False)
class Best(Reduction):
    """`log_sum_exp` of the `top` largest entries alone, for the latents `names` (all, where it is empty).

    However it is nested, it is the log of a sum over some set of completions; and no set of the same kind has more.
    """

    top: int
    names: frozenset[str] = frozenset()

    def of(self, latents: frozenset[str], beside: frozenset[str]) -> Reduce:
        return self if not self.names or latents & self.names else log_sum_exp

    def __call__(self, x: Array) -> Array:
        if len(x) <= self.top:
            return log_sum_exp(x)
        best, _ = jax.lax.top_k(jnp.moveaxis(x, 0, -1), self.top)
        return log_sum_exp(jnp.moveaxis(best, -1, 0))


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn(Reduction):
    """`log_sum_exp`, whose derivative is one at a single entry, drawn in proportion to the exponentials.

    The derivative of an elimination then runs backwards through the latents and draws each given those drawn before it:
    the indicator of an exact draw of all latents, where the value is still the log of the sum.
    """

    key: Array
    apart = True

    def of(self, latents: frozenset[str], beside: frozenset[str]) -> Drawn:
        return self.at(zlib.crc32(" ".join(sorted(latents)).encode()))

    def at(self, number: Array | int) -> Drawn:
        return Drawn(jax.random.fold_in(self.key, number))

    def __call__(self, x: Array) -> Array:
        fixed = jax.lax.stop_gradient(x)
        top = jnp.max(fixed, axis=0, keepdims=True)
        below = jnp.cumsum(jnp.exp(fixed - jnp.where(jnp.isfinite(top), top, 0)), axis=0)
        # never the end of an interval of length zero, which is an impossible state
        level = jax.random.uniform(self.key, x.shape[1:], below.dtype) * below[-1]
        chosen = jnp.minimum((below <= level).sum(0), len(x) - 1)
        entry = jnp.take_along_axis(x, chosen[None], axis=0)[0]
        entry = jnp.where(jnp.isfinite(entry), entry, 0)
        return log_sum_exp(fixed) + (entry - jax.lax.stop_gradient(entry))


@dataclasses.dataclass(frozen=True, eq=False)
class Partly(Reduction):
    """`largest` for the latents `names`, `log_sum_exp` for the others, which are all to be removed before."""

    names: frozenset[str]

    def of(self, latents: frozenset[str], beside: frozenset[str]) -> Reduce:
        taken = latents & self.names
        if not taken:
            return log_sum_exp
        if summed := (latents | beside) - self.names:
            one, other = (re.split(r"[@\[]", min(names))[0] for names in (taken, summed))
            raise PlanError(
                one,
                problem=f"its maximum would have to be taken before '{other}' is summed out, which is another function",
                mend="autoem.EM(model, e_step=autoem.e_step.Hard()), which maximises over all latents",
            )
        return largest

    def is_late(self, latent: str) -> bool:
        return latent in self.names

    def __call__(self, x: Array) -> Array:
        raise AssertionError("which latents are removed decides")

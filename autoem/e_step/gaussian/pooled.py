"""Normal sites that are one regression on their latents for all rows: expected statistics as moments summed over rows.

With `z` made of one, the latents that the site reads and its observation, `Q` needs the sum of `E[z z']` alone: no
nodes, and an M-step whose cost no row enters. In: such a site and the moments of its latents as its rows see them. Out:
statistics of the families in `regression`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from autoem.e_step.gaussian.quadratic import DIM, EVENT, EVENT_TOO, OTHER, event_of, member_of, summed
from autoem.e_step.tables.completions import NODES
from autoem.e_step.tables.regression import Products
from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named, add

ONCE = {OTHER: DIM, EVENT_TOO: EVENT}  # axes that are others' a second time
WIDE = 64  # coordinates of one cell from which nodes for a latent's own law cost more than its moments


def is_pooled(f: Factor) -> bool:
    """Whether a site's coefficients on its latents, and its scale, are the same for all rows."""
    if f.family is None or f.family.name not in ("Normal", "MultivariateNormal") or f.value_hidden:
        return False
    if f.is_hidden and (f.site.masked or f.site.scaled):
        return False
    if jnp.result_type(float) != jnp.float64:  # sums of squares would cancel in single precision
        return False
    if f.is_hidden and any(not a.startswith("#") for a in own_axes(f)):
        return False
    if not reads_others(f) and not (f.is_hidden and member_of(f).dim >= WIDE):
        return False
    for arg, events in zip(f.family.args, f.family.arg_dims, strict=True):
        shape = f.graph.shape((f.name, f"arg:{arg}"))
        batch = shape[: len(shape) - events]
        names = f.site.axes[len(f.site.axes) - len(batch) :]
        if any(size > 1 and not a.startswith("#") for a, size in zip(names, batch, strict=True)):
            return False
    return True


def reads_others(f: Factor) -> bool:
    """Whether the location reads latents, the site's own excepted."""
    others = {("latent", m.name) for m in f.completions.members if m.name != f.name} if f.completions else set()
    return bool(others & f.graph.needs((f.name, "arg:loc")))


def own_axes(f: Factor) -> tuple[str, ...]:
    """Axes of a latent's own site that are part of one of its cells."""
    return tuple(a for a in f.site.axes if a not in member_of(f).axes)


def pooled_statistics(
    f: Factor, rows: Rows, mean: Named, covariance: Named, weight: Named, about: tuple[Named, Named] | None = None
) -> tuple[Products, Array]:
    """Expected statistics of a pooled site: moments of one, its latents and its observations, summed over rows.

    `mean` and `covariance` of the latents are as the rows see them, and so is the `weight` of the discrete ones. Where
    one row stands for several, `about` is how observations go with posterior means, and with each other.
    """
    assert f.completions is not None and f.family is not None
    states = tuple(z.name for z in f.parents)
    keep = (*states, *(a for a in f.site.axes if a.startswith("#")))
    times = [weight]
    times += [Named(w.array.astype(mean.array.dtype), w.axes) for w in (rows.mask, rows.scale) if w is not None]
    other = Named(mean.array, tuple(OTHER if a == DIM else a for a in mean.axes))
    pairs = (*keep, DIM, OTHER)
    second = add(summed(f, pairs, covariance, *times), summed(f, pairs, mean, other, *times))
    first, count = summed(f, (*keep, DIM), mean, *times), summed(f, keep, *times)
    if f.is_hidden:
        total, cross, square = of_own(f, first, second)
    else:
        x = f.observations(rows)
        x = Named(x.array, tuple(EVENT if a == "event0" else a for a in x.axes))
        again = Named(x.array, tuple(EVENT_TOO if a == EVENT else a for a in x.axes))
        total = summed(f, (*keep, EVENT), x, *times)
        cross = summed(f, (*keep, EVENT, DIM), x, mean, *times)
        square = summed(f, (*keep, EVENT, EVENT_TOO), x, again, *times)
        if about is not None:
            cross = add(cross, summed(f, (*keep, EVENT, DIM), about[0], *times))
            square = add(square, summed(f, (*keep, EVENT, EVENT_TOO), about[1], *times))
    whole = (*states, NODES, *f.site.axes)
    sizes = {DIM: f.completions.dim, EVENT: f.graph.shape((f.name, "value"))[-1] if f.family.event_dim else 1}

    def block(value: Named, down: str = "", across: str = "") -> Array:
        """A part of a matrix, after the axes of cells; of size one along those that it does not vary on."""
        array = value.to((*whole, *filter(None, (down, across))))
        lead, axes = array.shape[: len(whole)], [sizes.get(ONCE.get(a, a), 1) for a in (down, across)]
        own = [1 if not a else value.size(a) if a in value.axes else 1 for a in (down, across)]
        return jnp.broadcast_to(array.reshape(*lead, *own), (*lead, *axes))

    inner, between, squares = block(count), block(total, "", EVENT), block(square, EVENT, EVENT_TOO)
    if reads_others(f):
        inner = joined([[inner, block(first, "", DIM)], [block(first, DIM), block(second, DIM, OTHER)]])
        between = joined([[between], [block(cross, DIM, EVENT)]])
    lead = jnp.broadcast_shapes(*(x.shape[: len(whole)] for x in (inner, between, squares)))
    between, squares = (jnp.broadcast_to(x, (*lead, *x.shape[len(whole) :])) for x in (between, squares))
    return Products(inner, between, squares), -jnp.broadcast_to(count.to(whole), lead)


def joined(blocks: Sequence[Sequence[Array]]) -> Array:
    """A matrix from its blocks, in as many cells as any of them has."""
    lead = jnp.broadcast_shapes(*(x.shape[:-2] for line in blocks for x in line))
    lines = [jnp.concatenate([jnp.broadcast_to(x, (*lead, *x.shape[-2:])) for x in line], -1) for line in blocks]
    return jnp.concatenate(lines, -2)


def of_own(f: Factor, first: Named, second: Named) -> tuple[Named, Named, Named]:
    """A latent's own values among the moments of all latents that its site reads: sum, products with them, squares."""
    assert f.completions is not None and f.family is not None
    span, event = f.completions.span(f.name), event_of(f)
    states = tuple(a for a in second.axes if a not in (DIM, OTHER))
    d = f.completions.dim
    sums = first.to((*states, DIM))
    sums = jnp.broadcast_to(sums, (*sums.shape[:-1], d))[..., span]
    inner = second.to((*states, DIM, OTHER))
    inner = jnp.broadcast_to(inner, (*inner.shape[:-2], d, d))
    cross = inner[..., span, :]
    names = own_axes(f) + (EVENT,) * f.family.event_dim
    total = Named(sums.reshape(*sums.shape[:-1], *event), (*states, *names))
    crossed = Named(cross.reshape(*cross.shape[:-2], *event, d), (*states, *names, DIM))
    if f.family.event_dim:
        return total, crossed, Named(cross[..., span], (*states, EVENT, EVENT_TOO))
    squares = jnp.diagonal(cross[..., span], axis1=-2, axis2=-1)
    return total, crossed, Named(squares.reshape(*squares.shape[:-1], *event), (*states, *names))

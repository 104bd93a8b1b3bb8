"""What a site's log density holds beside the parameters: `log h(x)`, a constant of the data.

In: a factor and its prepared rows. Out: the constant of every row, which is no part of the tables unless states of
latents differ in it.
"""

from __future__ import annotations

import jax.numpy as jnp

from autoem.e_step.tables.tabulate import Factor, Rows
from autoem.graph.named import Named, choose, multiply, named


def log_density_constant(factor: Factor, rows: Rows) -> Named | None:
    """`log h(x)` of an observed natural site, masked and weighted, with an axis for each plate that it varies on.

    None where it is part of the table, since it differs between states.
    """
    out = None if factor.moving else log_base(factor, rows)
    return out if out is None or rows.weight is None else multiply(out, rows.weight)


def log_base(factor: Factor, rows: Rows) -> Named | None:
    """The same of every row once."""
    if factor.own or factor.family is None or rows.value is None:
        return None
    value, events = factor.observations(rows), factor.family.event_dim
    axes = value.axes[events:]
    base = factor.family.base(value.array, {k: f.to(axes) for k, f in (rows.fixed or {}).items()})
    if rows.spread is not None:  # the density of x is that of the standardised x, divided by the spread
        log_spread = jnp.log(rows.spread)
        base = base - (log_spread.sum() if events else named(log_spread, factor.site.axes).to(axes))
    out = Named(jnp.broadcast_to(base, value.array.shape[events:]), axes)
    return out if rows.mask is None else choose(rows.mask, out, 0.0)

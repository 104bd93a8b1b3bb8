"""What each independent datum contributes to the log-likelihood.

In: a kernel, parameters and data. Out: the plate whose rows are independent, and their log densities.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoem.answers.moments import with_constants
from autoem.e_step.elimination.eliminate import Table, eliminate
from autoem.e_step.tables.constants import log_density_constant
from autoem.graph.named import add
from autoem.lowering.kernel import Kernel
from autoem.m_step.problem import Bundle, Params, make_layout


def datum_plate(kernel: Kernel, logs: bool, params: Params, bundle: Bundle) -> str | None:
    """The plate whose rows are the independent data: the largest that all parts of the likelihood have, or None."""
    found: list[frozenset[str]] = []

    def run(params, bundle):
        found[:] = [part.plates for part in independent_parts(kernel, logs, params, bundle)]
        return ()

    jax.eval_shape(run, params, bundle)
    shared = frozenset.intersection(*found) if found else frozenset()
    sizes = kernel.layout.sizes
    return max(shared, key=lambda p: (sizes[p], p)) if shared else None


def independent_parts(kernel: Kernel, logs: bool, params: Params, bundle: Bundle) -> list[Table]:
    """Independent contributions to the log-likelihood, before their sum over plates; constants included."""
    parts, tables = [], []
    cells = kernel.problem.cells(params, bundle)
    for factor in kernel.likelihood_factors:
        rows = bundle.rows[factor.name]
        if not factor.latents:  # no latent varies along its plates, but the data do
            factor = dataclasses.replace(factor, kept=factor.site.plates, plates=frozenset(factor.site.plates))
        table = factor.table(cells[factor.name], rows)
        constant = log_density_constant(factor, dataclasses.replace(rows, weight=rows.scale))
        if constant is not None:
            constant = constant.sum(a for a in constant.axes if a not in factor.kept)
            table = dataclasses.replace(table, value=add(table.value, constant))
        tables.append(table)
    for block in kernel.integrals:
        tables.append(with_constants(block, block.integrate(params, bundle)[0], bundle))
    eliminate(tables, dataclasses.replace(make_layout(kernel.layout, bundle), logs=logs), parts=parts)
    return parts


def per_datum(kernel: Kernel, logs: bool, params: Params, bundle: Bundle, plate: str | None) -> Array:
    """Log density of each row of `plate`, in nats; of all data where there is none."""
    sizes = kernel.layout.sizes
    total = jnp.zeros(sizes[plate] if plate else ())
    for part in independent_parts(kernel, logs, params, bundle):
        kept = part.value.sum(a for a in part.value.axes if a != plate)
        absent = [sizes[p] for p in part.plates if p not in part.value.axes and p != plate]
        total = total + (kept.to((plate,)) if plate else kept.array) * float(np.prod(absent, dtype=float))
    return total

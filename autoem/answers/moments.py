"""Answers about continuous latents: means, covariances, draws, and what each independent datum contributes.

In: a kernel, parameters, data, and the elimination's tables beside them. Out: arrays by latent, at full shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from autoem.e_step.elimination.eliminate import Table
from autoem.e_step.tables.constants import log_density_constant
from autoem.graph.named import Named, add
from autoem.ir import Chain
from autoem.lowering.integrals import Integral
from autoem.lowering.kernel import Kernel
from autoem.m_step.problem import Bundle, Params
from autoem.planning.build import Build


def mixed_moments(
    kernel: Kernel, params: Params, bundle: Bundle, log_z: Callable[[Sequence[Table]], Array]
) -> dict[str, tuple[Array, Array]]:
    """Posterior mean and covariance of every continuous latent, the discrete ones summed out.

    Args:
        log_z: the log-likelihood as a function of the integrals' tables.
    """
    done = [block.integrate(params, bundle) for block in kernel.integrals]

    def value(values: list[Named]) -> Array:
        return log_z([Table(v, t.latents, t.plates) for v, (t, _) in zip(values, done, strict=True)])

    slopes = jax.grad(value)([t.value for t, _ in done])
    out = {}
    for integral, (_, moments), slope in zip(kernel.integrals, done, slopes, strict=True):
        whole = integral.block.mixed(moments, integral.weights(slope))
        for m in integral.block.members:
            mean, covariance = integral.block.marginal(m, whole)
            mean, covariance = in_order(kernel, m.name, mean), in_order(kernel, m.name, covariance)
            out[m.name] = m.in_model(mean), covariance
    return out


def completed(
    kernel: Kernel, params: Params, bundle: Bundle, chosen: Mapping[str, Array], key: Array | None
) -> dict[str, Array]:
    """Values of the continuous latents given those of the discrete ones: drawn with `key`, or the mean without."""
    out = {}
    for i, integral in enumerate(kernel.integrals):
        own = None if key is None else jax.random.fold_in(key, i)
        drawn = integral.block.draw(integral.integrate(params, bundle)[1], chosen, own)
        known = {m.name: m for m in integral.block.members}
        drawn = {n: in_order(kernel, n, v) for n, v in drawn.items()}
        out.update({n: known[n].in_model(v) if n in known else v for n, v in drawn.items()})
    return out


def in_order(kernel: Kernel, name: str, path: Array) -> Array:
    """What a kernel knows of a latent, in the order of the data."""
    return flipped(path, kernel.program.chain_of(name))


def flipped(array: Array, chain: Chain | None) -> Array:
    """A path in the order of the data, where its scan runs in reverse."""
    return array[::-1] if chain is not None and chain.reverse else array


def with_constants(block: Integral, table: Table, bundle: Bundle) -> Table:
    """The table of an integral with what its observed sites add that no parameter enters."""
    value = table.value
    for f in block.factors:
        constant = log_density_constant(f, bundle.rows[f.name])
        if constant is not None:
            value = add(value, block.block.constant(f, constant, bundle.cells))
    return Table(value, table.latents, table.plates)


def zeros(built: Build, names: tuple[str, ...]) -> Named:
    """A table of zeros over latents, with an axis for each of the innermost one's plates."""
    program, plates_of = built.program, built.kernel.layout.plates_of
    latents = [program.every_latent[n] for n in names]
    deepest = max(latents, key=lambda z: len(plates_of[z.name]))
    axes = (*names, *(a for a in deepest.axes if a in plates_of[deepest.name]))
    sizes = [z.num_states for z in latents] + [program.plates[a].size for a in axes[len(names) :]]
    return Named(jnp.zeros(sizes), axes)

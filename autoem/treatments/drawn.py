r"""Continuous latents by weighted draws, whatever their law and however their cells are tied together.

In: the members of a group that no formula integrates, and the factors that read them. Out: their joint log density with
everything else summed out,

.. math:: J(u) = \log \sum_z p(x, z, u \mid \theta),

in which the discrete latents `z` are summed exactly at each draw of `u`; and expected statistics under weighted draws,
which the M-step takes as completions: what was closed form stays closed form.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import biject_to

from autoem.e_step.elimination.along_time import pieces_of_paths
from autoem.e_step.elimination.eliminate import Table, eliminate
from autoem.e_step.tables.completions import NODES
from autoem.e_step.tables.tabulate import Factor
from autoem.e_step.treatment import AbstractTreatment, Expectation, TreatedRow
from autoem.graph.named import Named, named
from autoem.ir import Continuous, Program
from autoem.lowering.integrals import pulled_back, with_value
from autoem.lowering.kernel import with_nodes
from autoem.m_step.problem import Bundle, Params, graph_values, make_layout

if TYPE_CHECKING:
    from autoem.lowering.kernel import Kernel

Draws = Mapping[str, Array]  # by latent, `(draws, *shape, *event)`


@dataclasses.dataclass(frozen=True, eq=False)
class Hidden:
    """The latents that are drawn, and the factors that read them.

    Attributes:
        program: the classified model.
        members: the latents, each at full shape.
        factors: all that read any of them, their own densities among them.
        why: why no exact integral does, as one clause.
    """

    program: Program
    members: tuple[Continuous, ...]
    factors: tuple[Factor, ...]
    why: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.members)

    @property
    def dim(self) -> int:
        """Number of unconstrained coordinates in all."""
        return sum(int(np.prod(s, dtype=int)) for s in self.free_shapes)

    @property
    def free_shapes(self) -> list[tuple[int, ...]]:
        return [biject_to(m.support).inverse_shape(m.shape + m.event) for m in self.members]

    def constrain(self, x: Array) -> tuple[Draws, Array]:
        """Values of the latents at free coordinates `(draws, dim)`, and the log Jacobian of each draw."""
        out, start, jacobian = {}, 0, jnp.zeros(x.shape[0])
        for m, shape in zip(self.members, self.free_shapes, strict=True):
            size = int(np.prod(shape, dtype=int))
            free = x[:, start : start + size].reshape(-1, *shape)
            start += size
            transform = biject_to(m.support)
            out[m.name] = transform(free)
            slope = transform.log_abs_det_jacobian(free, out[m.name])
            jacobian = jacobian + slope.reshape(x.shape[0], -1).sum(1)
        return out, jacobian

    def free(self, draws: Draws) -> Array:
        """The free coordinates `(draws, dim)` of values."""
        parts = [biject_to(m.support).inv(draws[m.name]) for m in self.members]
        return jnp.concatenate([p.reshape(p.shape[0], -1) for p in parts], 1)

    def pieces(self, draws: Draws) -> dict[str, Array]:
        """The draws as sites read them: along a scan also step by step, and at all steps some way back."""
        return {**draws, **jax.vmap(lambda paths: pieces_of_paths(self.program, paths))(dict(draws))}

    def nodes(self, draws: Draws, bundle: Bundle) -> dict[str, tuple[Any, Named | None]]:
        """For each factor its nodes, and the values of its own latent there (None where it has none)."""
        values, out = self.pieces(draws), {}
        for f in self.factors:
            assert f.completions is not None
            lead = (1,) * len(f.parents)
            chosen = {m.name: values[m.name].reshape(*lead, *values[m.name].shape) for m in f.completions.members}
            own = None
            if f.is_hidden and f.family is not None:
                events = tuple(f"event{i}" for i in range(f.family.event_dim))
                mine = values[f.name]
                value = named(
                    mine.reshape(*lead, *mine.shape), (*(z.name for z in f.parents), NODES, *f.site.axes, *events)
                )
                order = (*events, *(a for a in value.axes if a not in events))
                own = Named(value.to(order), order)
            out[f.name] = with_value(f, bundle, chosen, own)
        return out

    def tables(self, params: Params, bundle: Bundle, nodes: Mapping[str, Any]) -> dict[str, Table]:
        """Log densities of the factors at all draws, with an axis for the draws in front."""
        filled = with_nodes(bundle, nodes)
        values, out = graph_values(filled, params), {}
        for f in self.factors:
            # in natural form the density of a value that is itself drawn would lack its base measure
            family = None if f.is_hidden or f.value_hidden else f.family
            plain = dataclasses.replace(f, family=family, kept=f.site.plates)  # row by row: twice differentiable
            rows = filled.rows[f.name]
            value = plain.table(plain.cells(values, rows), rows).value
            count = next(iter(nodes[f.name][0].values())).shape[len(f.parents)]
            sizes = {**f.sizes, **{z.name: z.num_states for z in f.latents}, NODES: count}
            kept = (NODES, *(z.name for z in f.latents), *(f.kept if f.latents else ()))
            gone = [p for p in f.site.plates if p not in kept and p not in value.axes]
            repeats = float(np.prod([f.sizes[p] for p in gone], dtype=float))
            array = value.sum(a for a in value.axes if a not in kept).to(kept) * repeats
            whole = jnp.broadcast_to(array, [sizes[a] for a in kept])
            out[f.name] = Table(Named(whole, kept), frozenset(z.name for z in f.latents), f.plates, f.route)
        return out

    def idle(self, draws: Draws, bundle: Bundle) -> Array:
        """Log density that makes up for cells which a mask takes out, `(draws,)`: they have none of their own.

        Standard normal in free coordinates, which integrates to one and leaves the likelihood as it is.
        """
        each: dict[str, Array] = {}
        for m in self.members:
            transform, value = biject_to(m.support), draws[m.name]
            x = transform.inv(value)
            cells = (len(value), *m.shape, -1)
            normal = (-0.5 * x**2 - 0.5 * math.log(2 * math.pi)).reshape(cells).sum(-1)
            each[m.name] = normal - transform.log_abs_det_jacobian(x, value).reshape(cells).sum(-1)
        out, pieces = jnp.zeros(len(next(iter(draws.values())))), self.pieces(each)
        for f in self.factors:
            if f.is_hidden and (mask := bundle.rows[f.name].mask) is not None:
                cells = f.site.plates if set(mask.axes) <= set(f.site.plates) else f.site.axes
                gone = jnp.broadcast_to(mask.to(cells) == 0, pieces[f.name].shape[1:])
                out = out + jnp.where(gone, pieces[f.name], 0).reshape(len(out), -1).sum(1)
        return out

    def misread(self, kernel: Kernel, params: Params, bundle: Bundle, draws: Draws) -> dict[str, Array]:
        """By latent with a mask, whether a site reads a cell that the mask takes out, which then has no law."""

        def rest(draws: Draws) -> Array:
            return (self.log_joint(kernel, params, bundle, draws) - self.idle(draws, bundle)).sum()

        masks = {f.name: m for f in self.factors if f.is_hidden and (m := bundle.rows[f.name].mask) is not None}
        slopes, out = self.pieces(jax.grad(rest)(dict(draws))) if masks else {}, {}
        for f in (f for f in self.factors if f.name in masks):
            slope = slopes[f.name].reshape(-1, *f.site.shape, *slopes[f.name].shape[1 + len(f.site.shape) :])
            gone = (masks[f.name].to(f.site.axes) == 0).reshape(1, *masks[f.name].to(f.site.axes).shape)
            gone = gone.reshape(*gone.shape, *(1,) * (slope.ndim - gone.ndim))
            out[f.name] = jnp.any(gone & (slope != 0))
        return out

    def log_joint(self, kernel: Kernel, params: Params, bundle: Bundle, draws: Draws) -> Array:
        """`J` at every draw, `(draws,)`, in nats."""
        found = self.tables(params, bundle, self.nodes(draws, bundle))
        cells = kernel.problem.cells(params, bundle)
        beside = [block.integrate(params, bundle)[0] for block in kernel.integrals]
        return self.each(kernel, cells, beside, found, bundle) + bundle.constant + self.idle(draws, bundle)

    def each(self, kernel: Kernel, cells, beside: Sequence[Table], found: Mapping[str, Table], bundle: Bundle) -> Array:
        """Sum the discrete latents out at every draw."""
        plain = [*kernel.tables(cells, bundle.rows, kernel.likelihood_factors), *beside]
        layout = make_layout(kernel.layout, bundle)
        alone = {n: t for n, t in found.items() if not t.latents}
        tied = {n: t for n, t in found.items() if t.latents}
        out = sum((t.value.array for t in alone.values()), start=jnp.zeros(()))
        if not tied:
            return out + eliminate(plain, layout)

        def one(arrays: Mapping[str, Array]) -> Array:
            drawn = [dataclasses.replace(t, value=Named(arrays[n], t.value.axes[1:])) for n, t in tied.items()]
            return eliminate([*plain, *drawn], layout)

        return out + jax.vmap(one)({n: t.value.array for n, t in tied.items()})

    def expectation(
        self, kernel: Kernel, params: Params, bundle: Bundle, draws: Draws, weights: Array
    ) -> tuple[Array, Expectation]:
        """`J` at every draw, and expected statistics under draws of these weights, which sum to one.

        The expectation's `likelihood` is the weighted mean of `J`.
        """
        nodes = self.nodes(draws, bundle)
        filled = with_nodes(bundle, nodes)
        cells = kernel.problem.cells(params, bundle)
        found = self.tables(params, bundle, nodes)
        prior, from_prior = jax.value_and_grad(kernel.log_prior)(cells, bundle)
        integrals = [block.integrate(params, bundle) for block in kernel.integrals]

        def mean(cells, arrays, beside: list[Named]) -> tuple[Array, Array]:
            known = [dataclasses.replace(t, value=v) for (t, _), v in zip(integrals, beside, strict=True)]
            tables = {n: dataclasses.replace(found[n], value=v) for n, v in arrays.items()}
            each = self.each(kernel, cells, known, tables, bundle)
            return (weights * each).sum(), each

        values = {n: t.value for n, t in found.items()}
        (_, each), (statistics, slopes, beside) = jax.value_and_grad(mean, (0, 1, 2), has_aux=True)(
            cells, values, [t.value for t, _ in integrals]
        )
        out = {n: from_prior[n] if kernel.problem.factors[n].is_prior else statistics[n] for n in cells}
        out |= kernel.completed_by(params, [m for _, m in integrals], beside, bundle)
        for f in self.factors:
            weight = slopes[f.name] if f.latents else Named(weights, (NODES,))
            out[f.name] = pulled_back(f, params, filled, weight)
        out[NODES] = {**out.get(NODES, {}), **nodes}
        each = each + bundle.constant + self.idle(draws, bundle)
        return each, Expectation((weights * each).sum(), prior, out)


@dataclasses.dataclass(frozen=True, eq=False)
class AbstractDrawn(AbstractTreatment):
    """A treatment that ends in draws; `strategy` is its name in the plan."""

    hidden: Hidden

    strategy = ""
    smooth = False

    @property
    def num_draws(self) -> int:
        """How many draws the M-step sees."""
        raise NotImplementedError

    @property
    def factors(self) -> tuple[Factor, ...]:
        return self.hidden.factors

    def nodes_at(self, latents: Mapping[str, Array], bundle: Bundle) -> dict[str, tuple[Any, Named | None]]:
        """One node for each factor, where the latents have given values."""
        return self.hidden.nodes({n: latents[n][None] for n in self.hidden.names}, bundle)

    def completed(self, bundle: Bundle) -> Bundle:
        """The data with the latents at that many draws, of whatever value: what the M-step is planned on."""
        x = jnp.zeros((self.num_draws, self.hidden.dim))
        return with_nodes(bundle, self.hidden.nodes(self.hidden.constrain(x)[0], bundle))

    def rows(self) -> list[TreatedRow]:
        return [
            TreatedRow(m.name, int(np.prod(m.shape, dtype=int)), self.reason(), self.strategy, m.plates)
            for m in self.hidden.members
        ]

    def log_density(self, kernel: Kernel, params: Params, bundle: Bundle, x: Array) -> Array:
        """Log joint density in free coordinates `(draws, dim)`, the Jacobian included."""
        draws, jacobian = self.hidden.constrain(x)
        return self.hidden.log_joint(kernel, params, bundle, draws) + jacobian

    def posterior_draws(self, kernel: Kernel, params: Params, bundle: Bundle, state: Any, key: Array, num: int):
        """`num` draws of the latents from the approximate posterior, `(draws, weights)`."""
        raise NotImplementedError

    def reason(self) -> str:
        """Why and how, as one clause for the plan."""
        raise NotImplementedError

r"""Newton's method for what has no closed form but is small: generalised linear models, Gamma shapes, odd links.

In unconstrained coordinates, with Levenberg damping and a step that is only taken if `Q` rises, so a step never costs
the guarantee of EM. Where `Q` is concave in the coordinates (a GLM with its canonical link) this is iteratively
reweighted least squares.

References:
    Nelder and Wedderburn 1972; Lange 1995, "A gradient algorithm locally equivalent to the EM algorithm"; More 1978
    (damping).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from autoem.e_step.tables.tabulate import Factor
from autoem.families import Family, Median
from autoem.m_step.block import NEWTON, AbstractBlock
from autoem.m_step.closed_form.counting import latex_name
from autoem.m_step.closed_form.location import hessian_in_groups, newton_direction
from autoem.m_step.problem import Bundle, Params, Statistics, graph_values, inner
from autoem.m_step.unconstrained import to_constrained, to_unconstrained


class NewtonState(NamedTuple):
    at: Array
    value: Array
    damping: Array
    step: Array
    moved: Array


@dataclasses.dataclass(frozen=True, eq=False)
class NewtonBlock(AbstractBlock):
    """Damped Newton steps on the block's parameters together.

    `profile` holds closed-form blocks that are strongly tied to them (a Gamma's rate to its shape, a rate's level to
    the slopes in it): `Q` is maximised with those at their closed form for every trial value, which is a joint maximum
    at the price of a conditional one. `groups` are places of free coordinates, `(groups, size)`, of which no datum ties
    two together: the parameters of each item of a test, or of each component.
    """

    profile: tuple[AbstractBlock, ...] = ()
    max_steps: int = 25
    tolerance: float = 1e-10
    groups: np.ndarray | None = None

    order = 3
    strategy = NEWTON
    source = "Lange 1995; Nelder and Wedderburn 1972"

    @property
    def update(self) -> str:
        together = f" on {', '.join(self.names)} together" if len(self.names) > 1 else ""
        tied = [n for b in self.profile for n in b.names]
        apart = "" if self.groups is None else f", in {len(self.groups):,} groups apart"
        tied = f", with {', '.join(tied)} at the closed form" if tied else ""
        return f"damped Newton steps{together}{apart}{tied}"

    @property
    def latex(self) -> str:
        name = ",".join(latex_name(n) for n in self.names)
        return rf"{name} \leftarrow {name} - (\nabla^2 Q)^{{-1}} \nabla Q \quad\text{{(damped)}}"

    @property
    def touched(self) -> tuple[str, ...]:
        """The factors that read its parameters."""
        return self.problem.touched((*self.names, *(n for b in self.profile for n in b.names)))

    def free(self, params: Params) -> dict[str, Array]:
        """Unconstrained coordinates."""
        return {n: to_unconstrained(self.problem.params[n], params[n]) for n in self.names}

    def climbed(
        self, params: Params, statistics: Statistics, bundle: Bundle
    ) -> tuple[Array, Callable[[Array], dict[str, Array]], Callable[[Array], Array]]:
        """Where it is, in one vector; the parameters for such a vector, and `Q` of it."""
        flat, unravel = ravel_pytree(self.free(params))

        def constrained(v: Array) -> dict[str, Array]:
            return {n: to_constrained(self.problem.params[n], u) for n, u in unravel(v).items()}

        def completed(v: Array) -> dict[str, Array]:
            new = {**params, **constrained(v)}
            for block in self.profile:
                new.update(block.solve(new, statistics, bundle, None)[0])
            return new

        def objective(v: Array) -> Array:
            return self.problem.q(completed(v), statistics, bundle, self.touched)

        return flat, completed, objective

    @property
    def kinks(self) -> dict[str, str]:
        """Factors whose density has a corner at every datum, and in which argument."""
        return {n: arg for n in self.touched if (arg := kinked(self.problem.factors[n], self.names))}

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state):
        flat, completed, objective = self.climbed(params, statistics, bundle)
        if not flat.size:  # a simplex of one point
            return {n: params[n] for n in self.names}, state
        touched, kinks = self.touched, self.kinks
        if kinks:
            smooth = [n for n in touched if n not in kinks]

            def minorised(at: Array):
                there = completed(at)

                def bound(v: Array) -> Array:
                    new = completed(v)
                    rest = self.problem.q(new, statistics, bundle, smooth)
                    parts = [
                        quadratic_bound(self.problem.factors[n], arg, new, there, statistics[n], bundle)
                        for n, arg in kinks.items()
                    ]
                    return rest + sum(parts, start=jnp.zeros(()))

                return bound

            best = climb(objective, minorised, flat, self.max_steps, self.tolerance)
        else:
            best = maximise(objective, flat, self.max_steps, self.tolerance, self.groups)
        new = completed(best)
        # a parameter on its boundary has no finite coordinate: it stays there
        finite = jnp.isfinite(flat).all() & jnp.isfinite(best).all()
        names = (*self.names, *(n for b in self.profile for n in b.names))
        return {n: jnp.where(finite, new[n], params[n]) for n in names}, state


def kinked(factor: Factor, names: tuple[str, ...]) -> str:
    """The free location in which the density has a corner at every datum, where Newton's method would stop; or ""."""
    entry = factor.site.family
    for arg, rule in entry.fixed_rules.items() if isinstance(entry, Family) and factor.family is None else ():
        needs = factor.graph.needs((factor.name, f"arg:{arg}"))
        if isinstance(rule, Median) and any(("param", n) in needs for n in names):
            return arg
    return ""


def quadratic_bound(factor: Factor, arg: str, params: Params, at: Params, statistics: Array, bundle: Bundle) -> Array:
    """A smooth lower bound of a Laplace site's part of `Q`, equal to it at `at`.

    It is that of `|r| <= (r^2 / d + d) / 2` with `d = |r(at)|`.

    References:
        Hunter and Lange 2000, "Quantile regression via an MM algorithm".
    """
    family = factor.site.family
    assert isinstance(family, Family)
    values, there = graph_values(bundle, params), graph_values(bundle, at)
    rule = family.fixed_rules[arg]
    assert isinstance(rule, Median)
    x = jnp.asarray(factor.graph.evaluate([(factor.name, "value")], values)[0])
    residual = x - factor.argument(f"arg:{arg}", values)
    width = jnp.abs(x - factor.argument(f"arg:{arg}", there))
    width = jnp.maximum(width, 1e-6 * width.mean() + jnp.finfo(width.dtype).tiny)
    above, below = rule.slopes({a: factor.argument(f"arg:{a}", values) for a in (*family.args, *family.fixed)})
    loss = jnp.abs(residual) - 0.5 * (residual**2 / width + width)
    density = factor.argument("elem", values) + 0.5 * (above + below) * loss
    return inner(statistics, jnp.broadcast_to(density, statistics.shape))


def climb(objective, minorised, start: Array, rounds: int, tolerance: float) -> Array:
    """Maximise a bound, move, bound anew; a round that does not raise the objective itself ends the climb."""

    def round_(_, carry):
        at, value = carry
        new = maximise(minorised(at), at, 5, tolerance)
        reached = objective(new)
        better = reached > value
        return jnp.where(better, new, at), jnp.where(better, reached, value)

    return jax.lax.fori_loop(0, rounds, round_, (start, objective(start)))[0]


def derivatives(objective, at: Array) -> tuple[Array, Array]:
    """Slope and second derivatives, from one pass."""

    def slope(v: Array) -> tuple[Array, Array]:
        out = jax.grad(objective)(v)
        return out, out

    hessian, first = jax.jacfwd(slope, has_aux=True)(at)
    return first, hessian


def maximise(objective, start: Array, max_steps: int, tolerance: float, groups: np.ndarray | None = None) -> Array:
    """A local maximum of `objective` from `start`; never lower than where it began."""
    tolerance = max(tolerance, 10 * float(jnp.finfo(start.dtype).eps))

    def going(s: NewtonState) -> Array:
        return (s.step < max_steps) & s.moved

    def step(s: NewtonState) -> NewtonState:
        if groups is None:
            slope, hessian = derivatives(objective, s.at)
        else:
            slope, hessian = hessian_in_groups(jax.grad(objective), s.at, groups)
        direction = newton_direction(hessian, slope, s.damping)
        # where the quadratic model is not concave its step may point down: follow the slope instead
        rises = jnp.sum(direction * slope, axis=-1, keepdims=True) > 0
        length = jnp.linalg.norm(slope, axis=-1, keepdims=True)
        direction = jnp.where(rises, direction, slope / (1 + length) / (1 + s.damping))
        new = s.at + direction if groups is None else s.at.at[groups].add(direction)
        value = objective(new)
        better = value >= s.value
        gain = jnp.vdot(direction, slope)
        done = gain <= tolerance * (1 + jnp.abs(s.value)) * 1e-2
        damping = jnp.where(better, s.damping * 0.1, jnp.maximum(s.damping * 10, 1e-3))
        damping = jnp.where(damping < 1e-8, 0.0, damping)
        keep = better & jnp.isfinite(value)
        rest = done & (keep | (s.damping == 0))  # a whole step that would gain nothing: what it loses is rounding
        return NewtonState(
            jnp.where(keep, new, s.at), jnp.where(keep, value, s.value), damping, s.step + 1,
            ~rest & (damping < 1e12) & jnp.isfinite(gain),
        )  # fmt: skip

    first = NewtonState(start, objective(start), jnp.zeros((), start.dtype), jnp.zeros((), int), jnp.array(True))
    return jax.lax.while_loop(going, step, first).at

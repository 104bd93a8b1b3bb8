"""Gradient steps with optax, for parameters too many for Newton's method.

The optimiser's state persists from one M-step to the next, and each M-step's result is only taken if `Q` rose
(generalised EM).

References:
    Dempster, Laird and Rubin 1977, section 3 (generalised EM).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from autoem.m_step.block import GRADIENT, AbstractBlock
from autoem.m_step.closed_form.counting import latex_name
from autoem.m_step.problem import Bundle, Params, Statistics
from autoem.m_step.unconstrained import to_constrained, to_unconstrained


@dataclasses.dataclass(frozen=True, eq=False)
class GradientBlock(AbstractBlock):
    """`steps` steps of `optimizer` (default: L-BFGS with a line search) on the block's parameters.

    `in_place_of_newton` says why Newton's method, which would be chosen otherwise, was not.
    """

    optimizer: Any = None
    steps: int = 10
    in_place_of_newton: str = ""

    order = 4
    strategy = GRADIENT
    source = "Dempster, Laird and Rubin 1977, section 3 (generalised EM)"

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return self.optimizer is not None  # L-BFGS begins anew

    @property
    def update(self) -> str:
        return f"{self.steps} gradient steps"

    @property
    def latex(self) -> str:
        name = ",".join(latex_name(n) for n in self.names)
        return rf"{name} \leftarrow {name} + \rho\,\nabla Q"

    def method(self) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(self.optimizer or optax.lbfgs())

    def free(self, params: Params) -> dict[str, Array]:
        return {n: to_unconstrained(self.problem.params[n], params[n]) for n in self.names}

    def init(self, params: Params) -> Any:
        return self.method().init(self.free(params))

    def solve(self, params: Params, statistics: Statistics, bundle: Bundle, state: Any):
        touched = self.problem.touched(self.names)
        method = self.method()

        def loss(free) -> Array:
            new = {n: to_constrained(self.problem.params[n], u) for n, u in free.items()}
            return -self.problem.q({**params, **new}, statistics, bundle, touched)

        def step(carry, _) -> tuple[Any, None]:
            free, inner = carry
            value, slope = jax.value_and_grad(loss)(free)
            updates, inner = method.update(slope, inner, free, value=value, grad=slope, value_fn=loss)
            return (optax.apply_updates(free, updates), inner), None

        start = self.free(params)
        first = method.init(start) if self.optimizer is None else state  # curvature of another Q would mislead L-BFGS
        (end, last), _ = jax.lax.scan(step, (start, first), None, length=self.steps)
        better = loss(end) <= loss(start)
        new = {n: to_constrained(self.problem.params[n], u) for n, u in end.items()}
        return {n: jnp.where(better, new[n], params[n]) for n in self.names}, last

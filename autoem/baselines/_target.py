r"""What baselines climb: the objective that EM climbs, as a function of free coordinates.

In: an EM and a call of its model. Out: `Target`, with :math:`\log p(x \mid \theta) + \log p(\theta)` at
:math:`\theta = f(u)`, for `u` anywhere, the latents summed out as the plan does. Messages of chains are logarithms
wherever scaled ones could lose something, since no one looks at the iterates of a baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import biject_to

from autoem._em import EM
from autoem._errors import PlanError
from autoem.answers.result import one_device
from autoem.answers.stderr import off_boundary
from autoem.lowering.kernel import Kernel
from autoem.m_step.problem import Bundle
from autoem.m_step.unconstrained import to_constrained, to_unconstrained
from autoem.planning.build import Build
from autoem.reading.trace import Source

Free = dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """The objective of one model on one call.

    Attributes:
        em, built, source, bundle: the derivation, and the data.
        starts: the points that every strategy starts from.
    """

    em: EM
    built: Build
    source: Source
    bundle: Bundle
    starts: tuple[dict[str, Array], ...]

    @property
    def kernel(self) -> Kernel:
        kernel = self.built.kernel
        return dataclasses.replace(kernel.proof, chunks=one_device(kernel.chunks))

    @property
    def names(self) -> list[str]:
        """The parameters that move."""
        params = self.built.program.params
        return [n for b in self.built.kernel.blocks for n in b.names if np.prod(params[n].shape, dtype=int) > 0]

    @property
    def with_prior(self) -> list[str]:
        """Those of them that have a prior."""
        return [n for n in self.names if self.built.program.params[n].prior]

    @property
    def name(self) -> str:
        """What the objective is."""
        return objective_name(self.built)

    def require_objective(self, who: str) -> None:
        """Refuse to climb what no plan can evaluate as a function of the parameters alone.

        Raises:
            PlanError: latents are drawn, or approximated all at once; or there is nothing to climb with.
        """
        treatment = self.built.kernel.treatment
        if not self.names:
            mend = "EM(model), which is nothing but its E-step here"
            raise PlanError(who, problem="no parameter of the model moves", mend=mend, kind="strategy")
        if treatment is not None:
            name = next(iter([*self.built.program.continuous, *self.built.program.latents]))
            problem = f"no plan integrates it so that {who} could climb the likelihood: {treatment.objective_name}"
            raise PlanError(name, problem=problem, mend="autoem.baselines.SVI(), or EM with a strategy of its own")

    def free(self, params: Mapping[str, Array]) -> Free:
        """Free coordinates of a point.

        Raises:
            PlanError: a parameter lies on the boundary of its domain.
        """
        out = {}
        for n in self.names:
            param = self.built.program.params[n]
            out[n] = to_unconstrained(param, off_boundary(param, jnp.asarray(params[n])))
            if not bool(jnp.isfinite(out[n]).all()):
                problem = f"its start {np.asarray(params[n])} lies on the boundary of {param.constraint}"
                mend = "start inside: a free coordinate has no value there (init={...})"
                raise PlanError(n, problem=problem, mend=mend)
        return out

    def params(self, free: Free, others: Mapping[str, Array]) -> dict[str, Array]:
        """The point of free coordinates; parameters that do not move are those of `others`."""
        moved = {n: to_constrained(self.built.program.params[n], u) for n, u in free.items()}
        return {**others, **moved}

    def objective(self, free: Free, others: Mapping[str, Array], bundle: Bundle) -> Array:
        """Log-likelihood plus log prior, in nats."""
        return self.kernel.objective(self.params(free, others), bundle)[0]

    def log_density(self, free: Free, others: Mapping[str, Array], bundle: Bundle) -> Array:
        """The same as a density of the free coordinates: with the volume that they take up, in nats."""
        total = self.objective(free, others, bundle)
        for n, u in free.items():
            transform = biject_to(self.built.program.params[n].constraint)
            total = total + jnp.sum(transform.log_abs_det_jacobian(u, transform(u)))
        return total

    def call(self, data: list[Array]) -> tuple[tuple, dict]:
        """The model's arguments with these arrays in them."""
        return self.source.call(data)

    @property
    def data(self) -> list[Any]:
        return list(self.source.data)

    @property
    def has_holes(self) -> bool:
        """Whether the data hold NaN, which autoem leaves out and NumPyro does not."""
        kinds = (np.asarray(x) for x in self.source.data)
        return any(x.dtype.kind == "f" and bool(np.isnan(x).any()) for x in kinds)


def objective_name(built: Build) -> str:
    """What a derivation's objective is, in words."""
    name = built.kernel.objective_name
    name += " within the truncation" if built.source.truncated else ""
    return name + (" + log prior" if has_priors(built) else "")


def has_priors(built: Build) -> bool:
    """Whether a parameter has a prior."""
    return any(p.prior for p in built.program.params.values())

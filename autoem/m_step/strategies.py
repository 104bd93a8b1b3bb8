"""What a user may ask of the M-step, as small frozen objects."""

from __future__ import annotations

import dataclasses
from typing import Any


class AbstractMStep:
    """Asks for one way of maximising a parameter: `EM(model, m_step=...)` or `m_step={"site": ...}`."""


@dataclasses.dataclass(frozen=True)
class ClosedForm(AbstractMStep):
    """Insist on the exact maximum; a parameter that has none is refused with the reason."""


@dataclasses.dataclass(frozen=True)
class Newton(AbstractMStep):
    """Damped Newton steps in unconstrained coordinates.

    Args:
        max_steps: steps an M-step at most, at least 1.

    References:
        Lange 1995, "A gradient algorithm locally equivalent to the EM algorithm".
    """

    max_steps: int = 25

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError(f"Newton(max_steps={self.max_steps}): max_steps must be at least 1")


@dataclasses.dataclass(frozen=True)
class Gradient(AbstractMStep):
    """Gradient steps with an optax optimiser, whose state persists between M-steps.

    Args:
        optimizer: an optax gradient transformation; the default is L-BFGS with a line search.
        steps: steps an M-step, at least 1.
    """

    optimizer: Any = None
    steps: int = 10

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"Gradient(steps={self.steps}): steps must be at least 1")


@dataclasses.dataclass(frozen=True)
class Augmented(AbstractMStep):
    """Least squares with the weights of a latent that the model's text does not hold, one solution an M-step.

    For parameters that enter the location of a Student t, a Cauchy or a Laplace, or the logits of a Bernoulli,
    affinely: these sites are Normal once a scale (or a Polya-Gamma variable) is given. A parameter that enters anything
    else is refused.
    Scales and degrees of freedom are left to their own strategy, on the likelihood itself.

    References:
        Liu and Rubin 1995 (ECME); Andrews and Mallows 1974; Polson, Scott and Windle 2013.
    """


@dataclasses.dataclass(frozen=True)
class Fixed(AbstractMStep):
    """Leave the parameter at its start value."""

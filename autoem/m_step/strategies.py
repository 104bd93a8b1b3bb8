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
    """A latent that the model's text does not hold, integrated inside the M-step, which its update then solves at once.

    For parameters that enter affinely

    - the location of a Student t, a Cauchy or a Laplace: a Normal once a scale is given;
    - the log-odds of a Bernoulli, a Binomial or a NegativeBinomial, as `logits=` or by a logistic function in
      `probs=`: a Normal once a Polya-Gamma variable is given;
    - the utility of a probit, `probs=` by a cumulative normal however that is written: a Normal utility, not seen;
    - the location of a Normal or LogNormal that is censored, or a Normal that is truncated: the value itself;

    and may be negative: one least squares an M-step. And for positive parameters of which the mean of a
    `NegativeBinomial2` is a non-negative sum: a Poisson count whose rate a Gamma variable multiplies, split over its
    terms. A parameter that enters anything else is refused. Scales, concentrations and degrees of freedom are left to
    their own strategy, on the likelihood itself.

    References:
        Liu and Rubin 1995 (ECME); Andrews and Mallows 1974; Polson, Scott and Windle 2013; Albert and Chib 1993;
        Dempster, Laird and Rubin 1977; Amemiya 1984; Shepp and Vardi 1982.
    """


@dataclasses.dataclass(frozen=True)
class OrderedSubsets(AbstractMStep):
    """Multiplicative updates of tomography from interleaved subsets of the rows in turn, for the price of one.

    For a positive parameter whose M-step is a superposition, in a rate that is computed row by row. A pass that does
    not raise `Q` is made anew with half as many subsets, down to plain EM, so the fit ends where plain EM does.

    Args:
        num_subsets: subsets at first, at least 2; best a power of two.

    References:
        Hudson and Larkin 1994, "Accelerated image reconstruction using ordered subsets of projection data".
    """

    num_subsets: int = 8

    def __post_init__(self):
        if self.num_subsets < 2:
            raise ValueError(f"OrderedSubsets(num_subsets={self.num_subsets}): num_subsets must be at least 2")


@dataclasses.dataclass(frozen=True)
class Fixed(AbstractMStep):
    """Leave the parameter at its start value."""

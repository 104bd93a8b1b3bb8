"""What a user may ask of the E-step, as small frozen objects."""

from __future__ import annotations

import dataclasses


class AbstractEStep:
    """Asks for one way of treating a latent: `EM(model, e_step=...)` or `e_step={"site": ...}`."""

    approximate = False  # whether it is asked for where an exact one may exist


@dataclasses.dataclass(frozen=True)
class Exact(AbstractEStep):
    """Sum the latent out exactly: tabulation and plated variable elimination.

    References:
        Obermeyer et al. 2019, "Tensor variable elimination for plated factor graphs".
    """


@dataclasses.dataclass(frozen=True)
class Truncated(AbstractEStep):
    """Sum a latent with infinite support out over `low ... high` only.

    The mass outside is left out of the likelihood: choose `high` where the prior's tail is negligible.

    Args:
        low: smallest value, an integer.
        high: largest value, an integer above `low`.
    """

    low: int = 0
    high: int = 50

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"Truncated(low={self.low}, high={self.high}): low must be below high")


@dataclasses.dataclass(frozen=True)
class Quadrature(AbstractEStep):
    """Integrate a continuous latent by adaptive Gauss-Hermite quadrature, cell by cell.

    For latents of up to three dimensions a cell. What is maximised is the log-likelihood by the rule.

    Args:
        points: nodes along every dimension of a cell, at least 1 (which is Laplace's approximation); None for 21, 11 or
            7, in one, two or three dimensions.

    References:
        Naylor and Smith 1982; Liu and Pierce 1994, "A note on Gauss-Hermite quadrature".
    """

    points: int | None = None

    approximate = True

    def __post_init__(self):
        if self.points is not None and not 1 <= self.points <= 200:
            raise ValueError(f"Quadrature(points={self.points}): points must lie between 1 and 200")

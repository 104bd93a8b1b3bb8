"""What a user may ask of the E-step, as small frozen objects."""

from __future__ import annotations

import dataclasses


class AbstractEStep:
    """Asks for one way of treating a latent: `EM(model, e_step=...)` or `e_step={"site": ...}`."""


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

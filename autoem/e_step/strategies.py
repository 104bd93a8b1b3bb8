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


@dataclasses.dataclass(frozen=True)
class MeanField(AbstractEStep):
    r"""Approximate the posterior by a product of laws, one for each group of latents, each improved in turn.

    .. math:: q(z) = \prod_g q_g(z_g), \qquad \log q_g = \mathrm{E}_{q_{-g}}[\log p(x, z)] + \text{const}

    A discrete latent keeps the joint law of all that is carried along its chain; a continuous one (Gamma, inverse Gamma,
    Beta, Dirichlet, Normal) has the law of its conjugate form. What rises, at every update, is a lower bound of the
    log-likelihood, the ELBO. `e_step=MeanField()` takes each latent as a group of its own; `e_step={"z": MeanField()}`
    the discrete latents that are named, the others together in one group, and each continuous latent as its own.

    Args:
        sweeps: how often all groups are updated in one E-step, at most; at least 1. The next E-step goes on from there.
        tol: an E-step ends once a sweep raises the ELBO by less than `tol` of itself.

    References:
        Jordan, Ghahramani, Jaakkola and Saul 1999; Ghahramani and Jordan 1997, "Factorial hidden Markov models"; Blei, Ng
        and Jordan 2003, "Latent Dirichlet allocation"; Daudin, Picard and Robin 2008, "A mixture model for random graphs".
    """

    sweeps: int = 1
    tol: float = 1e-6

    approximate = True

    def __post_init__(self):
        if not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise ValueError(f"MeanField(sweeps={self.sweeps!r}): sweeps must be a whole number, at least 1")
        if not self.tol >= 0:
            raise ValueError(f"MeanField(tol={self.tol!r}): tol must not be negative")

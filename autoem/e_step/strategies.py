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
class Hard(AbstractEStep):
    r"""Give every discrete latent its most probable joint value, and count that: classification EM, Viterbi training.

    .. math:: \max_{z} \log p(x, z \mid \theta)

    is what rises, the classification log-likelihood, not the likelihood: classes that overlap are told apart more
    sharply than they are, so that weights, spreads and transitions are biased; the gain is a fit that ends after few
    steps, and k-means where the model is that. Of several best values the first is taken. As `e_step={"z": Hard()}` the
    maximum is over the latents that are named, the others summed out within. Continuous latents are integrated as ever.

    After the fit the log-likelihood and the posterior are the exact ones at the parameters found.

    Raises:
        PlanError: the model has no discrete latent; a latent that is summed out would have to be removed after one that
            is not; `accelerate=` is given.

    References:
        Celeux and Govaert 1992, "A classification EM algorithm for clustering and two stochastic versions". Juang and
        Rabiner 1990, "The segmental k-means algorithm for estimating parameters of hidden Markov models".
    """

    approximate = True


@dataclasses.dataclass(frozen=True)
class Stochastic(AbstractEStep):
    r"""Draw all discrete latents once from their exact joint posterior at every step, and count that: stochastic EM.

    The draws shake the fit off saddle points and small hills. The log-likelihood of each step's parameters is exact; it
    wavers, and the fit has settled once the mean of ten steps is no better than that of the ten before, up to twice its
    random error. The result is the best point that was visited. A row that counts several times (`handlers.scale`) has
    one draw, counted as often.

    Raises:
        PlanError: the model has no discrete latent, or not all are named; `accelerate=` is given.

    References:
        Celeux and Diebolt 1985, "The SEM algorithm". Celeux, Chauveau and Diebolt 1996, "Stochastic versions of the EM
        algorithm". Chib 1996 (draws of a path).
    """

    approximate = True


@dataclasses.dataclass(frozen=True)
class Annealed(AbstractEStep):
    r"""Flatten the posterior of the discrete latents at first, and let it sharpen: deterministic annealing.

    .. math:: \frac{1}{\beta} \log \sum_z p(x, z \mid \theta)^{\beta}

    is what a step raises, with :math:`\beta` going from `start` to one in equal ratios over `steps` steps; from there
    on it is plain EM, and only there may the fit end. Poor starts are left more often, where the spreads of the classes
    are known or held: spreads that are free grow to the whole data's while the posterior is flat, and the states merge,
    which the result says. Continuous latents are integrated given the discrete ones, at any :math:`\beta`.

    Args:
        start: the first inverse temperature, above 0 and below 1. Too small a one makes all states alike, from which
            few steps do not recover.
        steps: steps until it is one, at least 1; below `max_steps`.

    Raises:
        PlanError: the model has no discrete latent, or not all are named; `accelerate=` is given.

    References:
        Ueda and Nakano 1998, "Deterministic annealing EM algorithm".
    """

    start: float = 0.2
    steps: int = 50

    approximate = True

    def __post_init__(self):
        if not 0 < self.start < 1:
            raise ValueError(f"Annealed(start={self.start!r}): start must lie between 0 and 1")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"Annealed(steps={self.steps!r}): steps must be a whole number, at least 1")

"""What a user may ask of the E-step, as small frozen objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


class AbstractEStep:
    """Asks for one way of treating a latent: `EM(model, e_step=...)` or `e_step={"site": ...}`."""

    approximate = False  # whether it is asked for where an exact one may exist
    drawn = False  # whether it ends in draws of all cells at once


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
class Laplace(AbstractEStep):
    r"""Integrate continuous latents by Laplace's approximation: a Gaussian about the mode of their joint density.

    With `J` the log joint density in unconstrained coordinates, mode :math:`\hat u` and curvature :math:`H`,

    .. math:: \log \int e^{J(u)} du \approx J(\hat u) + \tfrac d2 \log 2\pi - \tfrac12 \log \det H.

    Cell by cell where the cells stand apart, of any dimension; otherwise over all coordinates at once.

    References:
        Tierney and Kadane 1986, "Accurate approximations for posterior moments and marginal densities"; Breslow and
        Clayton 1993 (generalised linear mixed models).
    """

    approximate = True


@dataclasses.dataclass(frozen=True)
class Importance(AbstractEStep):
    r"""Integrate continuous latents by importance sampling: weighted draws of a t law about the mode.

    With `J` the log joint density in unconstrained coordinates and `q` the density of the draws,

    .. math:: \log \int e^{J(u)} du \approx \log \frac1S \sum_s e^{J(u_s)} / q(u_s).

    Cell by cell where the cells stand apart, of any dimension; otherwise over all coordinates at once, up to some tens
    of them. The draws are the same at every step in units of the posterior, so that the fit converges; what is reported
    is the estimate with its standard error, and the effective sample size (`EMResult.effective_sample_size`): where it
    is a small share of the draws, the posterior is far from its mode's law, and neither figure is to be relied on.

    Args:
        num_samples: draws, of each cell or of all coordinates at once; at least 2.
        freedom: degrees of freedom of the t law, above 2; `math.inf` for a Normal, whose weights have no bound.

    References:
        Geweke 1989; Quintana, Liu and del Pino 1999, "Monte Carlo EM with importance reweighting"; Booth and Hobert
        1999 (t proposals about the mode).
    """

    num_samples: int = 500
    freedom: float = 6.0

    approximate = True

    def __post_init__(self):
        if not isinstance(self.num_samples, int) or self.num_samples < 2:
            raise ValueError(f"Importance(num_samples={self.num_samples!r}): it must be a whole number above 1")
        if not self.freedom > 2:
            raise ValueError(f"Importance(freedom={self.freedom!r}): freedom must be above 2")


@dataclasses.dataclass(frozen=True)
class Variational(AbstractEStep):
    r"""Approximate the posterior of continuous latents by a NumPyro guide `q`, and maximise the evidence lower bound.

    .. math:: \mathrm{ELBO} = E_q[\log p(x, u \mid \theta) - \log q(u)] \le \log p(x \mid \theta)

    Discrete latents beside are summed out exactly at each draw of `q`. The M-step sees draws of `q`, so that what is in
    closed form stays so. What is reported is the bound, by draws of its own, with their standard error.

    A normal law (`guide=None`, `AutoNormal`, and `AutoMultivariateNormal` up to some hundred coordinates) is fitted at
    draws that are the same at every step: both steps climb one function, and the fit converges. With an `optimizer=`,
    and for any other guide, the draws are random, and the fit settles.

    Args:
        guide: None (`AutoNormal`), an AutoGuide class of `numpyro.infer.autoguide`, or a guide of your own: a function
            of the model's arguments with a sample site for each continuous latent; its parameters may be those of a
            neural network (amortised).
        num_draws: draws of `q` in the M-step, at least 1. None: 32; of a normal law 128, or two a coordinate up to some
            hundred of these.
        steps: optimiser steps on the bound in every E-step, at least 1; of a normal law at most so many. None: until
            the bound rests, up to its random error.
        optimizer: an optax optimiser of the guide's parameters, with random draws. None: L-BFGS for a normal law, and
            Adam for the others, at a rate of 0.02 that falls slowly.
        num_particles: random draws of `q` in one optimiser step, at least 1.

    References:
        Neal and Hinton 1998; Kingma and Welling 2014, "Auto-encoding variational Bayes"; Kucukelbir et al. 2017;
        Giordano, Ingram and Broderick 2024, "Black box variational inference with a deterministic objective".
    """

    guide: Callable | None = None
    num_draws: int | None = None
    steps: int | None = None
    optimizer: Any = None
    num_particles: int = 4

    approximate = True
    drawn = True

    def __post_init__(self):
        for name in ("num_draws", "steps", "num_particles"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"Variational({name}={getattr(self, name)}): {name} must be at least 1")


@dataclasses.dataclass(frozen=True)
class MonteCarlo(AbstractEStep):
    """Draw continuous latents from their posterior by Hamiltonian Monte Carlo (Monte Carlo EM).

    The chains go on from step to step, with a step size adapted while they warm up. What is reported is an estimate of
    the log-likelihood, by importance sampling at the start and the draws' likelihood ratios from step to step.

    Args:
        num_draws: draws of each chain in every E-step, at least 1.
        num_chains: chains side by side, at least 1.
        kernel: "NUTS" or "HMC", NumPyro's.
        warmup: transitions before the first E-step, which adapt the step size.

    References:
        Wei and Tanner 1990, "A Monte Carlo implementation of the EM algorithm"; Hoffman and Gelman 2014.
    """

    num_draws: int = 8
    num_chains: int = 4
    kernel: str = "NUTS"
    warmup: int = 200

    approximate = True
    drawn = True

    def __post_init__(self):
        for name, least in (("num_draws", 1), ("num_chains", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{type(self).__name__}({name}={getattr(self, name)}): {name} must be at least {least}"
                )
        if self.kernel not in ("NUTS", "HMC"):
            raise ValueError(f"{type(self).__name__}(kernel={self.kernel!r}): kernel must be 'NUTS' or 'HMC'")


@dataclasses.dataclass(frozen=True)
class SAEM(MonteCarlo):
    r"""Stochastic approximation EM: few draws a step, and expected statistics averaged over the steps.

    Draw `i` counts with weight :math:`\gamma_i \prod_{j > i} (1 - \gamma_j)`, where :math:`\gamma_t = 1` for the
    first `burn_in` steps and :math:`(t - \text{burn in})^{-\text{decay}}` after them. The last `memory` steps are held.

    Args:
        num_draws, num_chains, kernel, warmup: as those of `MonteCarlo`.
        burn_in: steps without averaging, about as many as EM takes to come near the maximum: what is averaged moves
            slowly.
        decay: how fast the weight of a new draw falls, above 0.5 and at most 1. Small values follow EM where it is
            slow; the error that they leave is for the end, which is the mean of the last steps where that is better.
        memory: steps whose draws are held, at least 2.

    References:
        Delyon, Lavielle and Moulines 1999, "Convergence of a stochastic approximation version of the EM algorithm";
        Kuhn and Lavielle 2004 (with Markov chains); Polyak and Juditsky 1992 (slow decay, averaged parameters).
    """

    num_draws: int = 2
    num_chains: int = 1
    burn_in: int = 100
    decay: float = 0.6
    memory: int = 50

    def __post_init__(self):
        super().__post_init__()
        if not 0.5 < self.decay <= 1:
            raise ValueError(f"SAEM(decay={self.decay}): decay must lie above 0.5 and not above 1")
        if self.burn_in < 0 or self.memory < 2:
            raise ValueError(f"SAEM(burn_in={self.burn_in}, memory={self.memory}): at least 0 and 2")


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


@dataclasses.dataclass(frozen=True)
class Sparse(AbstractEStep):
    r"""Sum every discrete latent over its `top` most probable states alone: sparse EM, expectation truncation.

    .. math:: \log \sum_{z \in K} p(x, z \mid \theta), \qquad K \text{ chosen anew in every E-step},

    is what rises, a lower bound of the log-likelihood: a latent that is summed out given others keeps `top` states for
    each of theirs. With `top=1` it is the maximum, as by `Hard()`; with as many as there are states, the exact sum.
    As `e_step={"z": Sparse(2)}` it is for the latents that are named, the others summed out over all states. It makes
    responsibilities sparse, and tells what few states would do; the tables cost what the exact step's do.

    After the fit the log-likelihood and the posterior are the exact ones at the parameters found, and the status says
    how much of the posterior's mass the best states leave out.

    Args:
        top: states that are kept, at least 1.

    Raises:
        PlanError: the model has no discrete latent.

    References:
        Neal and Hinton 1998, "A view of the EM algorithm that justifies incremental, sparse, and other variants";
        Lücke and Eggert 2010, "Expectation truncation and the benefits of preselection in training generative models".
    """

    top: int = 2

    def __post_init__(self):
        if not isinstance(self.top, int) or self.top < 1:
            raise ValueError(f"Sparse(top={self.top!r}): top must be a whole number, at least 1")


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

    def __post_init__(self):
        if not 0 < self.start < 1:
            raise ValueError(f"Annealed(start={self.start!r}): start must lie between 0 and 1")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"Annealed(steps={self.steps!r}): steps must be a whole number, at least 1")


@dataclasses.dataclass(frozen=True)
class MeanField(AbstractEStep):
    r"""Approximate the posterior by a product of laws, one for each group of latents, each improved in turn.

    .. math:: q(z) = \prod_g q_g(z_g), \qquad \log q_g = \mathrm{E}_{q_{-g}}[\log p(x, z)] + \text{const}

    A discrete latent keeps the joint law of all that is carried along its chain; a continuous one has the law of its
    conjugate form (Gamma, inverse Gamma, Beta, Dirichlet, Normal). What rises, at every update, is a lower bound of the
    log-likelihood, the ELBO. `e_step=MeanField()` takes each latent as a group of its own; `e_step={"z": MeanField()}`
    the discrete latents that are named, the others together in one group, and each continuous latent as its own.

    Args:
        sweeps: how often all groups are updated in one E-step, at most; at least 1. The next E-step goes on from there.
            None: 20 where a simplex of each row's own and the classes that look it up are all that is swept, which
            costs little beside the rest (topics); 1 elsewhere.
        tol: an E-step ends once a sweep raises the ELBO by less than `tol` of itself.

    References:
        Jordan, Ghahramani, Jaakkola and Saul 1999; Ghahramani and Jordan 1997, "Factorial hidden Markov models"; Blei,
        Ng and Jordan 2003, "Latent Dirichlet allocation"; Daudin, Picard and Robin 2008, "A mixture model for random
        graphs".
    """

    sweeps: int | None = None
    tol: float = 1e-6

    approximate = True

    def __post_init__(self):
        if self.sweeps is not None and (not isinstance(self.sweeps, int) or self.sweeps < 1):
            raise ValueError(f"MeanField(sweeps={self.sweeps!r}): sweeps must be a whole number, at least 1")
        if not self.tol >= 0:
            raise ValueError(f"MeanField(tol={self.tol!r}): tol must not be negative")

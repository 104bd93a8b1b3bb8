"""The strategies of the E-step, one row each: for which latents, what is maximised, where it is derived.

In: nothing. Out: `STRATEGIES`, from which `Plan.alternatives` and the decision table of the docs are drawn.
"""

from __future__ import annotations

import dataclasses

from autoem.e_step import strategies
from autoem.e_step.strategies import AbstractEStep

DISCRETE, CONTINUOUS = "discrete", "continuous"


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way of treating a latent.

    Attributes:
        example: it, as a user would ask for it.
        latents: the kinds of latents that it is for: discrete, continuous.
        changes: what becomes of the objective and of the answer, as a clause.
        price: what a step costs beside the exact one, as a clause.
        source: where it is derived.
        together: whether all latents of the kind have to be treated so.
        offered: whether it can be offered without a choice that only the user can make.
    """

    example: AbstractEStep
    latents: tuple[str, ...]
    changes: str
    price: str
    source: str
    together: bool = False
    offered: bool = True

    @property
    def name(self) -> str:
        return type(self.example).__name__


STRATEGIES: tuple[Strategy, ...] = (
    Strategy(
        strategies.Exact(),
        (DISCRETE, CONTINUOUS),
        "the log-likelihood itself",
        "the tables of the elimination; for continuous latents the cube of a cell's dimensions",
        "Obermeyer et al. 2019",
    ),
    Strategy(
        strategies.Truncated(),
        (DISCRETE,),
        "the log-likelihood without the prior's mass outside the range, which the result tells where it counts",
        "the tables of as many states as the range has",
        "the sum itself",
        offered=False,
    ),
    Strategy(
        strategies.Hard(),
        (DISCRETE,),
        "the classification log-likelihood instead: estimates are biased where classes overlap, and fits are short",
        "as the exact step",
        "Celeux and Govaert 1992",
    ),
    Strategy(
        strategies.Sparse(),
        (DISCRETE,),
        "a lower bound of the log-likelihood, without the states that are not among the best, which the result tells",
        "as the exact step, and a selection",
        "Neal and Hinton 1998; Lücke and Eggert 2010",
    ),
    Strategy(
        strategies.Stochastic(),
        (DISCRETE,),
        "the log-likelihood, by a path with random error: small hills are left, and the best point visited is returned",
        "as the exact step, and a uniform number a cell",
        "Celeux and Diebolt 1985",
        together=True,
    ),
    Strategy(
        strategies.Annealed(),
        (DISCRETE,),
        "the log-likelihood, from a flattened posterior on: poor starts are left more often, if spreads are held",
        "as the exact step, along chains in logarithms; and the steps of the annealing",
        "Ueda and Nakano 1998",
        together=True,
    ),
    Strategy(
        strategies.MeanField(),
        (DISCRETE, CONTINUOUS),
        "a lower bound of the log-likelihood (ELBO), without what latents of different groups share",
        "one table a site in each sweep",
        "Jordan et al. 1999; Blei, Ng and Jordan 2003",
    ),
    Strategy(
        strategies.Quadrature(),
        (CONTINUOUS,),
        "the log-likelihood up to the rule's error",
        "twice `points ** dimensions` evaluations a cell, and a search for its mode",
        "Naylor and Smith 1982; Liu and Pierce 1994",
    ),
    Strategy(
        strategies.Laplace(),
        (CONTINUOUS,),
        "Laplace's approximation of the log-likelihood, whose error falls with the data of a cell",
        "a search for the mode of a cell, or of all coordinates at once, and the curvature there",
        "Tierney and Kadane 1986",
    ),
    Strategy(
        strategies.Importance(),
        (CONTINUOUS,),
        "the log-likelihood, with random error that more draws make smaller and whose size is told",
        "as many evaluations as draws, and a search for the mode",
        "Geweke 1989; Quintana, Liu and del Pino 1999",
    ),
    Strategy(
        strategies.Variational(),
        (CONTINUOUS,),
        "a lower bound of the log-likelihood (ELBO), with random error where the guide is not a normal law",
        "gradient steps of a guide",
        "Kingma and Welling 2014",
    ),
    Strategy(
        strategies.MonteCarlo(),
        (CONTINUOUS,),
        "the log-likelihood, with random error that more draws make smaller",
        "chains of draws in every step",
        "Wei and Tanner 1990",
    ),
    Strategy(
        strategies.SAEM(),
        (CONTINUOUS,),
        "the log-likelihood, by averaging over steps with random error",
        "a few draws in every step, and more steps",
        "Delyon, Lavielle and Moulines 1999",
    ),
)

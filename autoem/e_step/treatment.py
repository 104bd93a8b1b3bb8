"""What an E-step yields to the loop, and what an approximate one must be able to do.

In: a kernel, parameters, data and what the E-step remembers. Out: `Expectation`: the objective, expected statistics for
the M-step, and what it will remember.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, NamedTuple

from jax import Array

if TYPE_CHECKING:
    from autoem.lowering.kernel import Kernel
    from autoem.m_step.problem import Bundle, Params


class Expectation(NamedTuple):
    """The end of an E-step.

    Attributes:
        likelihood: log-likelihood of the observed data, or what stands for it, in nats.
        prior: log density of the parameters' priors.
        statistics: expected statistics by factor, nodes of continuous latents, and cells for the blocks that read them,
            as `Kernel.maximise` takes them.
        state: what the E-step remembers for the next.
    """

    likelihood: Array
    prior: Array
    statistics: dict[str, Any]
    state: Any = None


class TreatedRow(NamedTuple):
    """What the plan says of one latent."""

    name: str
    cells: int
    reason: str
    strategy: str
    plates: tuple[str, ...]


class Ending(NamedTuple):
    """Where a fit ends.

    Attributes:
        params: the parameters.
        objective: what was maximised, the priors included, in nats.
        likelihood: log-likelihood of the observed data there, or what stands for it, in nats.
    """

    params: Params
    objective: Array
    likelihood: Array


class AbstractTreatment(abc.ABC):
    """An E-step other than the exact one, over all latents of a kernel that it names.

    Attributes:
        objective_name: what it maximises in place of the log-likelihood, as a user should read it.
        noisy: whether the objective is known up to a random error only, which no step is to be stopped for.
        estimated: whether what is reported at the end is an estimate by draws of its own, see `final`.
        falls: whether the objective may fall from one step to the next without anything being wrong.
        slow: whether its steps are a map of the parameters that comes to rest slowly where the data say little of its
            latents, so that acceleration helps.
        least: steps before which no fit with a random objective ends.
        warmup: steps whose objectives are of other functions: none is compared with another, and no fit ends there.
        is_likelihood: whether what it ends at is a maximum of the likelihood, up to rounding.
        comparable: whether fits may be compared by it: it stands for the log-likelihood, and a run gives it again.
        sums_exactly: whether it is over discrete latents alone, so that at the end the log-likelihood is the exact
            one, whatever was maximised; all messages of chains are logarithms.
        not_estimated: why no likelihood can be told at the end, where `estimated` ones are not; otherwise empty.
        needs_data: whether it calls a function of the model's own arguments, so that the bundle has to hold them all.
        source: where the method is derived.
    """

    objective_name = "log-likelihood"
    noisy = False
    estimated = False
    falls = False
    slow = False
    least = 0
    warmup = 0
    is_likelihood = False
    comparable = False
    sums_exactly = False
    not_estimated = ""
    needs_data = False
    source = ""

    def prepare(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> None:  # noqa: B027
        """Do what can be done once only, and in no traced function."""

    def rows(self) -> list[TreatedRow]:
        """How each of its latents is treated, in words."""
        return []

    def completed(self, bundle: Bundle) -> Bundle:
        """The data as the M-step sees them."""
        return bundle

    def final(self, kernel: Kernel, params: Params, bundle: Bundle, state: Any, key: Array) -> tuple[Array, Array]:
        """Of an objective by draws, a better estimate at the end, and its standard error."""
        raise NotImplementedError

    @abc.abstractmethod
    def init(self, kernel: Kernel, params: Params, bundle: Bundle, key: Array) -> Any:
        """What it remembers before its first step."""

    @abc.abstractmethod
    def expect(self, kernel: Kernel, params: Params, bundle: Bundle, state: Any) -> Expectation:
        """One E-step."""

    def averaged(self, kernel: Kernel, state: Any) -> Params | None:
        """The mean of the last steps' parameters, which may be the better end; None where there is none."""
        del kernel, state
        return None

    def ended(
        self, kernel: Kernel, params: Params, bundle: Bundle, state: Any, value: Array, likelihood: Array
    ) -> Ending:
        """What a fit that came to `params` returns: by default that, with its last objective and log-likelihood."""
        return Ending(params, value, likelihood)

    def described(self, latent: str) -> tuple[str, str] | None:
        """The name of the strategy for a latent, and why, for the plan; None where it is as in an exact E-step."""
        return None

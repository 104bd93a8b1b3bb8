"""Three kinds of failure, each naming the place, the problem and the mend.

A model that cannot be compiled (`ModelError`), a plan that cannot be carried out (`PlanError`) and data that cannot be
fitted (`DataError`) are the user's to mend and derive from `ValueError`. `AutoEMBug` is ours. Numerical failure is not
an error: it is a status of the result (see `EMResult.status`).
"""


class _Located(ValueError):
    def __init__(self, where: str, *, problem: str, mend: str, kind: str = "site"):
        super().__init__(f"{kind} '{where}': {problem}\n  mend: {mend}")
        self.where, self.problem, self.mend = where, problem, mend


class ModelError(_Located):
    """The model cannot be compiled. Says at which site, what is wrong, and what to write instead."""


class PlanError(_Located):
    """The model is understood, but what was asked of it cannot be carried out exactly or within memory."""


class Intractable(PlanError):
    """Latents have no exact posterior of a known form; an approximate E-step may still take them."""

    def __init__(self, where: str, *, problem: str, mend: str, latents: tuple[str, ...]):
        super().__init__(where, problem=problem, mend=mend)
        self.latents = latents


class DataError(_Located):
    """The numbers given cannot be fitted: NaN, infinite, outside the support, of the wrong shape or dtype."""


class AutoEMBug(AssertionError):
    """An invariant of autoem itself does not hold. Please report it with the model that shows it."""

"""The bootstrap likelihood-ratio test: is the larger structure better than chance would make it?

In: two fits of the same data. Out: `BootstrapTest`. Data sets are drawn from the smaller fitted model and both
structures are fitted to each; all fits of a structure run as one compiled program.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array

from autoem._em import as_key
from autoem._errors import DataError, PlanError
from autoem.answers.result import EMResult
from autoem.selection._batch import fit_many
from autoem.selection._simulate import draws, refuse_approximate, with_draws

SLACK = 1e-6  # of the objective: by how much two optima may differ and still be one
SLOW = 0.05  # nats by which the larger structure may end below the smaller where its optimum is on a boundary


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BootstrapTest:
    """What came of a bootstrap likelihood-ratio test.

    Attributes:
        statistic: twice the rise of the log-likelihood from the null structure to the alternative, in nats.
        null: the same of every data set drawn from the null structure, `(num,)`; NaN where a fit broke down.
        p_value: `(1 + number of null >= statistic) / (num + 1)`; a fit that broke down counts as one that exceeds.
        null_params, alternative_params: parameters that were fitted to each drawn data set, `(num, *shape)` by name;
            those of the null structure are a parametric bootstrap of its estimates.
        notes: what is odd about the fits.
    """

    statistic: float
    null: np.ndarray
    p_value: float
    null_params: dict[str, np.ndarray]
    alternative_params: dict[str, np.ndarray]
    notes: tuple[str, ...]
    names: tuple[str, str] = ("the null structure", "the alternative")

    @property
    def num_exceeding(self) -> int:
        """Drawn data sets whose statistic is at least that of the data, broken fits counted in."""
        return int(np.sum(~(self.null < self.statistic)))

    def __str__(self) -> str:
        head = f"{self.names[0]} against {self.names[1]}: twice the log-likelihood rises by {self.statistic:.4f}"
        count = f"of {len(self.null)} data sets drawn from {self.names[0]}, {self.num_exceeding} rise as much"
        return "\n".join([head, f"{count}: p = {self.p_value:.4g}", *(f"note: {n}" for n in self.notes)])

    __repr__ = __str__

    def plot(self, ax: Any = None) -> Any:
        """The statistic under the null structure, and that of the data; returns matplotlib's axes."""
        from autoem.selection._plot import plot_test  # matplotlib is asked for by a plot alone

        return plot_test(self, ax)


def bootstrap_test(
    null: EMResult, alternative: EMResult, rng_key: Array, *, num: int = 99, restarts: int | None = None
) -> BootstrapTest:
    r"""Test a structure against a larger one by simulation from the smaller.

    The statistic is :math:`2(\log L_1 - \log L_0)`. Its null distribution is no chi-square where the smaller structure
    lies on the boundary of the larger, as k components do among k + 1; so it is simulated: `num` data sets are drawn
    from the null structure at its estimates, both structures are fitted to each, and

    .. math:: p = \frac{1 + \#\{b : T_b \ge T\}}{\mathrm{num} + 1}.

    Arguments of the model that are not observed (covariates, groups, sizes) stay as they are. Each data set is fitted
    from the estimates, and from as many starts as the structure's own `EM` has. The data themselves are fitted in the
    same way, so that a better optimum of theirs counts.

    Args:
        null: fit of the smaller structure.
        alternative: fit of the larger, to the same data.
        rng_key: `jax.random.key(seed)`.
        num: data sets to draw, at least 1; the smallest p-value is `1 / (num + 1)`.
        restarts: starts for each data set, besides the estimates; None for those of each structure's `EM`. With fewer
            than the two fits had, drawn data are searched less well than the data were, and p is too small.

    Returns:
        The test, with the simulated null distribution.

    Raises:
        PlanError: the model cannot be simulated (weights, a factor), or a distribution reads the data to be replaced.
        DataError: the two were fitted to different data, or the alternative fits worse than the null.

    References:
        McLachlan 1987, "On bootstrapping the likelihood ratio test statistic for the number of components in a normal
        mixture". Davison and Hinkley 1997, section 4.2 (the p-value).
    """
    if num < 1:
        raise ValueError(f"bootstrap_test(num={num}): num must be at least 1")
    if restarts is not None and restarts < 1:
        raise ValueError(f"bootstrap_test(restarts={restarts}): restarts must be at least 1")
    for result in (null, alternative):
        refuse_approximate(result, "likelihood-ratio tests")
    refuse_other_data(null, alternative)
    to_draw, to_null, to_alternative = jax.random.split(as_key(rng_key), 3)
    drawn = draws(null, to_draw, num)
    likelihood, params = [], []
    for result, key in ((null, to_null), (alternative, to_alternative)):
        em = with_draws(result, drawn, restarts)
        args, kwargs = result._context.args, result._context.kwargs
        host = {n: np.asarray(v) for n, v in drawn.items()}
        calls = [(({n: v[b] for n, v in host.items()}, *args), kwargs) for b in range(num + 1)]
        ends = fit_many(em, calls, key, also=[result.params])
        likelihood.append(ends.log_likelihood)
        params.append({n: v[1:] for n, v in ends.params.items()})
    best = [np.nanmax([r.log_likelihood, v[0]]) for r, v in zip((null, alternative), likelihood, strict=True)]
    statistic, under_null = float(2 * (best[1] - best[0])), 2 * (likelihood[1] - likelihood[0])[1:]
    if statistic < -2 * SLOW:
        problem = f"the larger structure fits worse than the null ({best[1]:.6g} against {best[0]:.6g})"
        raise DataError("alternative", problem=problem, mend="more restarts, or exchange the two", kind="argument")
    p = (1 + int(np.sum(~(under_null < statistic)))) / (num + 1)
    notes = told(under_null, best, (null, alternative))
    return BootstrapTest(statistic, under_null, p, params[0], params[1], notes, (label(null), label(alternative)))


def label(result: EMResult) -> str:
    """What a structure is called: by its label in a selection, or by its model's name and number of parameters."""
    em = result._context.em
    if told := getattr(em.model, "label", None):
        return told
    name = getattr(getattr(em.model, "func", em.model), "__name__", "the model")
    return f"{name} with {result.num_params} parameters"


def told(under_null: np.ndarray, best: list[float], results: tuple[EMResult, EMResult]) -> tuple[str, ...]:
    notes = []
    if broken := int(np.isnan(under_null).sum()):
        notes += [f"{broken} fits of drawn data broke down (a likelihood without bound); they count as exceeding"]
    if worse := int(np.sum(under_null < -2 * SLACK * (1 + abs(best[0])))):
        most = f"at most {-np.nanmin(under_null) / 2:.2g} nats"
        notes += [f"in {worse} drawn data sets the alternative ended below the null ({most}): more restarts, or tol="]
    known = under_null[np.isfinite(under_null)]
    if known.size > 1 and known.max() < SLOW and best[1] - best[0] < SLOW:
        notes += ["the alternative never fitted better than the null: it is stuck, or its addition does nothing"]
    odd = ("is empty", "every step from there")  # states that do nothing, and states that nothing tells apart
    notes += [f"of {label(r)}: {w}" for r in results for w in r.warnings if any(o in w for o in odd)]
    for result, value in zip(results, best, strict=True):
        if value > result.log_likelihood + SLACK * (1 + abs(value)):
            found = f"the data themselves have a better fit of {label(result)} than the one given"
            notes += [f"{found} ({value:.6f} against {result.log_likelihood:.6f}), and it is what was tested"]
    return tuple(notes)


def refuse_other_data(null: EMResult, alternative: EMResult) -> None:
    """Raise where two fits are not of the same data, or the alternative is not the larger."""
    one, two = null._context.source.data, alternative._context.source.data
    if len(one) != len(two) or not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, two, strict=True)):
        mend = "fit both to the same arrays, in the same order"
        raise DataError("alternative", problem="it was fitted to other data than null=", mend=mend, kind="argument")
    if alternative.num_params <= null.num_params:
        counts = f"{alternative.num_params} against {null.num_params}"
        problem = f"it has no more free parameters than null= ({counts}), so it is no larger structure"
        raise PlanError("alternative", problem=problem, mend="bootstrap_test(smaller, larger, key)", kind="argument")

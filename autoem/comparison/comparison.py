"""`Comparison`: the rows, and everything that may be asked of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from autoem.comparison.plots import plot_agreement, plot_progress
from autoem.comparison.row import Row
from autoem.comparison.table import frame, html_table, plain_table
from autoem.comparison.verdict import verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    r"""One model and its data under several strategies.

    Printed, it is a table with a verdict; in a notebook, the same as HTML. Distances are measured from the reference:

    - of the parameters: :math:`\sqrt{\operatorname{mean}_j \lVert \theta_j - \theta_j' \rVert^2 / \lVert \theta_j'
      \rVert^2}` over the parameters :math:`j`, on their constrained scales;
    - of discrete posteriors: the total variation between marginals, averaged over the latents' cells, from 0 to 1;
    - of continuous posteriors: the difference of means in standard deviations of the reference, its root mean square
      over cells.

    States of a latent that the model does not tell apart are relabelled first to match the reference: those that some
    permutation of parameters' axes leaves the likelihood the same for, which is tried. Others are compared as they
    stand, and so are two latents that might change places.

    Attributes:
        rows: a `Row` for each strategy, in the order given.
        reference: label of the strategy that the others are held against; None where none ended.
        measure: what the yardstick's figures are, "log-likelihood" where it is exact.
        has_priors: whether parameters have priors, so that strategies climb the log-likelihood and the log prior.
        exact: whether the yardstick sums and integrates all latents exactly.
        matched: latents whose labels were matched.

    References:
        Stephens 2000, on label switching.
    """

    rows: tuple[Row, ...]
    reference: str | None
    measure: str
    has_priors: bool
    exact: bool
    matched: tuple[str, ...] = ()

    def __getitem__(self, label: str) -> Row:
        """The row of a strategy.

        Raises:
            KeyError: there is none of that label.
        """
        for row in self.rows:
            if row.label == label:
                return row
        raise KeyError(f"no strategy {label!r}; there are {[r.label for r in self.rows]}")

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return "\n".join([plain_table(self), "", *self.remarks(), "", self.verdict()])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_table(self)

    @property
    def table(self) -> Any:
        """The rows as a pandas DataFrame, indexed by label; columns that nothing has are left out.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(self)

    def verdict(self) -> str:
        """Which strategy ended highest, which came within 0.01 nats of that first, and whether a baseline did."""
        return verdict(self)

    def remarks(self) -> list[str]:
        """How each strategy ended, and what is to be said of it, a line each."""
        lines = []
        for row in self.rows:
            lines += [f"{row.label}: {row.status}", *(f"  note: {n}" for n in row.notes if n not in row.status)]
        if not self.exact:
            lines += [f"no plan of these parameters is exact: end points are measured by the {self.measure}"]
        return lines

    def plot(self) -> Figure:
        """The objective against seconds and against steps, a line for each strategy, less the best end point.

        Seconds are those of the warm run, its steps taken to be of equal length. Dashed lines climb another objective
        than the one that end points (dots) are measured by.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot_progress(self)

    def plot_agreement(self) -> Figure:
        """How far the posteriors of any two strategies are apart, and their parameters, as tables of shades.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot_agreement(self)

    @property
    def best(self) -> float:
        """The highest end point by the yardstick, log priors included, in nats; NaN where there is none."""
        values = [r.log_joint for r in self.rows if np.isfinite(r.log_joint)]
        return max(values, default=float("nan"))

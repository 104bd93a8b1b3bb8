"""What came of a sweep over structures: a table, the choice, and how clear it is.

In: an entry for each structure. Out: `Selection`, which prints, shows itself in a notebook, and draws.
"""

from __future__ import annotations

import dataclasses
import functools
import html
from typing import TYPE_CHECKING, Any

import numpy as np

from autoem.answers.result import EMResult
from autoem.selection._grid import Structure

if TYPE_CHECKING:
    import pandas

CRITERIA = {"aic": "AIC", "bic": "BIC", "icl": "ICL", "heldout": "held-out log-likelihood"}
# Kass and Raftery 1995 for twice the logarithm of a Bayes factor; Burnham and Anderson 2002, section 2.6, for AIC
GRADES = {
    "bic": ((2, "no more than a bare mention"), (6, "positive"), (10, "strong"), (np.inf, "very strong")),
    "aic": ((2, "hardly any"), (4, "some"), (10, "considerable"), (np.inf, "decisive")),
}
GRADES["icl"] = GRADES["bic"]


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One structure: its fit, or why there is none, and the held-out log density of each row."""

    structure: Structure
    result: EMResult | None
    reason: str
    seconds: float
    held_out: np.ndarray | None = None

    @property
    def label(self) -> str:
        return self.structure.label

    @functools.cached_property
    def numbers(self) -> dict[str, float]:
        """Criteria by name; NaN where there is no fit."""
        names = ("log_likelihood", "num_params", "aic", "bic", "icl")
        fitted = self.result if not self.reason else None
        out = {n: float(getattr(fitted, n)) if fitted is not None else np.nan for n in names}
        if self.held_out is not None:
            mean, error = mean_and_error(self.held_out)
            out |= {"heldout": mean, "heldout_se": error}
        return out


def mean_and_error(rows: np.ndarray) -> tuple[float, float]:
    """Mean over rows and its standard error."""
    error = rows.std(ddof=1) / np.sqrt(rows.size) if rows.size > 1 else np.nan
    return float(rows.mean()), float(error)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """A sweep over structures, ranked by a criterion.

    Of AIC, BIC and ICL smaller is better; of the held-out log-likelihood, which is a mean over rows in nats, larger.

    Attributes:
        entries: every structure in the order of the grid, failures included.
        criterion: "bic", "aic", "icl" or "heldout".
        notes: what is to be known of the sweep as a whole.
    """

    entries: tuple[Entry, ...]
    criterion: str
    notes: tuple[str, ...] = ()

    @property
    def ranked(self) -> list[Entry]:
        """The structures that were fitted, the best first."""
        known = [e for e in self.entries if np.isfinite(e.numbers.get(self.criterion, np.nan))]
        return sorted(known, key=self.loss)

    def loss(self, entry: Entry) -> float:
        value = entry.numbers[self.criterion]
        return -value if self.criterion == "heldout" else value

    @property
    def best(self) -> EMResult:
        """Fit of the structure that is chosen."""
        result = self.ranked[0].result
        assert result is not None
        return result

    @property
    def chosen(self) -> dict[str, Any]:
        """The keyword arguments of the structure that is chosen."""
        return dict(self.ranked[0].structure.setting)

    @property
    def results(self) -> dict[str, EMResult]:
        """Fit of each structure that has one, by label."""
        return {e.label: e.result for e in self.entries if e.result is not None}

    def __getitem__(self, label: str) -> EMResult:
        """The fit of a structure, by its label in the table.

        Raises:
            KeyError: there is no such structure, or it could not be fitted.
        """
        found = self.results
        if label not in found:
            failed = next((e.reason for e in self.entries if e.label == label), "")
            raise KeyError(f"{label!r} could not be fitted: {failed}" if failed else f"{label!r}; there are {[*found]}")
        return found[label]

    def lead(self, entry: Entry) -> tuple[float, float]:
        """By how much the best is better than a structure, and the standard error of that where rows were held out."""
        best = self.ranked[0]
        if self.criterion == "heldout":
            assert best.held_out is not None and entry.held_out is not None
            return mean_and_error(best.held_out - entry.held_out)
        return self.loss(entry) - self.loss(best), np.nan

    @property
    def sentence(self) -> str:
        """What is chosen, and how clear the choice is."""
        best, *others = self.ranked
        head = f"{CRITERIA[self.criterion]} chooses {best.label}"
        if not others:
            return f"{head}, the only structure that could be fitted."
        after, gap = others[0], self.lead(others[0])
        if self.criterion == "heldout":
            clear = abs(gap[0]) > 2 * gap[1]
            how = "a clear lead" if clear else "no clear lead: less than two standard errors"
            return f"{head}: {gap[0]:.4f} ± {gap[1]:.4f} nats a row above {after.label}, {how}."
        grade = next(word for bound, word in GRADES[self.criterion] if gap[0] <= bound)
        return f"{head}: {gap[0]:.2f} below the next, {after.label}: {grade} evidence."

    @property
    def remarks(self) -> list[str]:
        """What weakens the choice: an edge of the grid, fits that did not converge, failures."""
        best = self.ranked[0]
        out = list(self.notes)
        for name, value in best.structure.setting.items():
            tried = [e.structure.setting.get(name) for e in self.entries]
            numbers = {v for v in tried if isinstance(v, int | float) and not isinstance(v, bool)}
            if len(numbers) > 2 and value == max(numbers):
                out += [f"{name}={value} is the largest that was tried: larger ones may be better"]
        slow = [e.label for e in self.entries if e.result is not None and not e.reason and not e.result.converged]
        out += [f"not converged: {'; '.join(slow)} (more max_steps=)"] if slow else []
        return out

    @property
    def columns(self) -> list[str]:
        names = ["log_likelihood", "num_params", "aic", "bic", "icl"]
        held = any(e.held_out is not None for e in self.entries)
        return names + ["heldout", "heldout_se"] * held

    @property
    def table(self) -> pandas.DataFrame:
        """A pandas frame with a row for each structure: its setting, criteria, `difference` to the best, and status."""
        import pandas  # asked for by a table alone

        rows = []
        known = {id(e) for e in self.ranked}
        for e in self.entries:
            numbers = {n: e.numbers.get(n, np.nan) for n in self.columns}
            difference = self.lead(e)[0] if id(e) in known else np.nan
            status = e.reason or (e.result.status if e.result is not None else "")
            rows.append({**e.structure.setting, **numbers, "difference": difference, "seconds": e.seconds})
            rows[-1]["status"] = status
        frame = pandas.DataFrame(rows, index=pandas.Index([e.label for e in self.entries], name="structure"))
        frame["num_params"] = frame["num_params"].astype("Int64")
        return frame

    def cells(self) -> list[list[str]]:
        """The table as text, the head first."""
        ranked = self.ranked
        head = ["", "structure", "log-lik.", "params", "AIC", "BIC", "ICL"]
        held = "heldout" in self.columns
        rows = [[*head, *(["held out a row"] * held), "to the best", ""]]
        for e in self.entries:
            mark = "*" if ranked and e is ranked[0] else ""
            if e.reason:
                rows += [[mark, e.label, *[""] * (len(rows[0]) - 3), e.reason]]
                continue
            values = e.numbers
            line = [mark, e.label, f"{values['log_likelihood']:.3f}", f"{values['num_params']:.0f}"]
            line += [f"{values[n]:.2f}" for n in ("aic", "bic", "icl")]
            line += [f"{values.get('heldout', np.nan):.4f} ± {values.get('heldout_se', np.nan):.4f}"] * held
            rows += [[*line, self.gap(e) if e in ranked else "", ""]]
        return rows

    def gap(self, entry: Entry) -> str:
        value, error = self.lead(entry)
        return f"{value:.4f} ± {error:.4f}" if self.criterion == "heldout" else f"{value:.2f}"

    def __str__(self) -> str:
        rows = self.cells()
        widths = [max(len(r[i]) for r in rows if not (r[-1] and i > 1)) for i in range(len(rows[0]) - 1)]
        lines = []
        for r in rows:
            if r[-1]:  # a reason takes the place of the numbers
                lines += [f"{r[0]:<{widths[0]}} {r[1]:<{widths[1]}}  {r[-1].splitlines()[0]}"]
                continue
            text = [f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(r[:-1], widths, strict=True))]
            lines += [(text[0] + " " + "  ".join(text[1:])).rstrip()]
        return "\n".join([*lines, self.sentence, *(f"note: {n}" for n in self.remarks)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *rows = self.cells()
        best = self.ranked[0].label
        lines = ["<table><thead><tr>", *(f"<th>{html.escape(c)}</th>" for c in head[1:]), "</tr></thead><tbody>"]
        for r in rows:
            tag = "b" if r[1] == best else "span"
            lines += ["<tr>", *(f"<td><{tag}>{html.escape(c)}</{tag}></td>" for c in r[1:]), "</tr>"]
        lines += ["</tbody></table>", f"<p>{html.escape(self.sentence)}</p>"]
        return "".join([*lines, *(f"<p><i>{html.escape(n)}</i></p>" for n in self.remarks)])

    def plot(self, ax: Any = None) -> Any:
        """The criterion against the structure; returns matplotlib's axes."""
        from autoem.selection._plot import plot_selection  # matplotlib is asked for by a plot alone

        return plot_selection(self, ax)

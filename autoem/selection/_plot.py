"""Pictures of a selection and of a bootstrap test, drawn with matplotlib, which only a plot asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from autoem.selection._bootstrap import BootstrapTest
    from autoem.selection._selection import Entry, Selection

COLOURS = ("#2f6690", "#e0762f", "#4f9d69", "#8a5a9e", "#8d99a6")
INK = "#22303c"
NAMES = {"aic": "AIC", "bic": "BIC", "icl": "ICL", "heldout": "held-out log-likelihood a row (nats)"}


def axes_of(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6.4, 4.0), constrained_layout=True)[1]


def plot_selection(selection: Selection, ax: Any = None) -> Any:
    """The criterion against the setting that has the most numbers in it, a line for each combination of the others."""
    ax = axes_of(ax)
    along = numeric(selection)
    if along is None:
        bars(selection, ax)
    else:
        lines(selection, ax, along)
    ax.set_title(selection.sentence.partition(":")[0].rstrip("."), loc="left")
    return ax


def numeric(selection: Selection) -> str | None:
    """The setting to draw along: the one with the most different numbers, at least three."""
    settings = [e.structure.setting for e in selection.entries]
    counts = {}
    for name in settings[0]:
        values = {s.get(name) for s in settings if is_number(s.get(name))}
        if all(is_number(s.get(name)) for s in settings) and len(values) > 2:
            counts[name] = len(values)
    return max(counts, key=lambda n: counts[n]) if counts else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def lines(selection: Selection, ax: Any, along: str) -> None:
    groups: dict[str, list[Entry]] = {}
    for e in selection.ranked:
        rest = ", ".join(str(v) if n == "model" else f"{n}={v}" for n, v in e.structure.setting.items() if n != along)
        groups.setdefault(rest, []).append(e)
    for (rest, members), colour in zip(sorted(groups.items()), COLOURS * 20, strict=False):
        members.sort(key=lambda e: e.structure.setting[along])
        at = [e.structure.setting[along] for e in members]
        values, errors = spread(selection, members)
        ax.errorbar(at, values, errors, color=colour, marker="o", ms=5, lw=1.4, capsize=3, label=rest or None)
    best = selection.ranked[0]
    value = best.numbers[selection.criterion]
    ax.plot([best.structure.setting[along]], [value], "o", ms=13, mfc="none", mec=INK, mew=1.4)
    ax.set_xticks(sorted({e.structure.setting[along] for e in selection.entries}))
    ax.set(xlabel=along, ylabel=NAMES[selection.criterion])
    if any(groups):
        ax.legend(frameon=False)


def bars(selection: Selection, ax: Any) -> None:
    ranked = selection.ranked[::-1]
    values, errors = spread(selection, ranked)
    ax.errorbar(values, range(len(ranked)), xerr=errors, fmt="o", color=COLOURS[0], capsize=3)
    ax.plot(values[-1:], [len(ranked) - 1], "o", ms=13, mfc="none", mec=INK, mew=1.4)
    ax.set_yticks(range(len(ranked)), [e.label for e in ranked])
    ax.set(xlabel=NAMES[selection.criterion], ylim=(-0.6, len(ranked) - 0.4))


def spread(selection: Selection, members: list[Entry]) -> tuple[np.ndarray, np.ndarray | None]:
    """Values of the criterion, and their standard errors where rows were held out."""
    values = np.array([e.numbers[selection.criterion] for e in members])
    held = selection.criterion == "heldout"
    return values, np.array([e.numbers["heldout_se"] for e in members]) if held else None


def plot_test(test: BootstrapTest, ax: Any = None) -> Any:
    """A histogram of the statistic under the null structure, and a line where the data are."""
    ax = axes_of(ax)
    known = test.null[np.isfinite(test.null)]
    ax.hist(known, bins=min(30, max(8, len(known) // 6)), color=COLOURS[0], alpha=0.65, ec="white")
    ax.axvline(test.statistic, color=COLOURS[1], lw=2)
    right = test.statistic > np.median([*known, test.statistic])
    ax.annotate(
        f"data: {test.statistic:.1f}\np = {test.p_value:.3g}", (test.statistic, 0.97), (-6 if right else 6, 0),
        xycoords=("data", "axes fraction"), textcoords="offset points", va="top", ha="right" if right else "left",
        color=INK, weight="bold",
    )  # fmt: skip
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.set_ylim(top=1.25 * ax.get_ylim()[1])  # room for what is written there
    ax.margins(x=0.12)
    ax.set(xlabel="twice the rise of the log-likelihood", ylabel="drawn data sets")
    ax.set_title(f"{test.names[0]} against {test.names[1]}", loc="left")
    return ax

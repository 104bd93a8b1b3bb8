"""Two pictures of a comparison: the way up, and how far the answers are apart."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from autoem.comparison.match import distance, shift, variation
from autoem.comparison.row import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from autoem.comparison.comparison import Comparison

COLOURS = ("#2f6690", "#e0762f", "#4f9d69", "#a23b72", "#8d99a6", "#b58900", "#22303c", "#7b68ae")
FINE = 0.01  # nats around the top that are shown on a linear scale


def pyplot() -> Any:
    """matplotlib's pyplot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        mend = "pip install matplotlib, or print(comparison), which needs nothing"
        raise ImportError(f"pictures need matplotlib, which is not installed\n  mend: {mend}") from None


def plot_progress(comparison: Comparison) -> Figure:
    """The objective, less the best end point, against seconds and against steps."""
    figure, panels = pyplot().subplots(1, 2, figsize=(10.5, 4.4), sharey=True, layout="constrained")
    rows = [r for r in comparison.rows if r.ended and len(r.history)]
    top = comparison.best
    top = top if np.isfinite(top) else max((float(np.nanmax(r.history)) for r in rows), default=0.0)
    lines = []
    for i, row in enumerate(rows):
        colour, dashes = COLOURS[i % len(COLOURS)], "-" if row.comparable else "--"
        height = (row.history if row.comparable else smoothed(row.history)) - top
        share = np.linspace(0, 1, len(height)) if len(height) > 1 else np.ones(1)
        for axes, length in zip(panels, (row.seconds, row.num_steps), strict=True):
            style = {"color": colour, "ls": dashes, "lw": 1.6, "alpha": 0.9}
            lines += axes.plot(share * length, height, **style, label=row.label if axes is panels[0] else None)
            if np.isfinite(row.log_joint):
                axes.plot(
                    [length],
                    [row.log_joint - top],
                    "o",
                    color=colour,
                    ms=6,
                    mec="white",
                    mew=0.8,
                    zorder=4,
                    clip_on=False,
                )
    for axes, name in zip(panels, ("seconds, compiled already", "steps"), strict=True):
        axes.axhline(0, color="#8d99a6", lw=0.8, zorder=0)
        axes.set_xscale("symlog", linthresh=smallest(rows, name == "steps"))
        axes.set_xlim(left=0)
        axes.set_xlabel(name)
    panels[0].set_yscale("symlog", linthresh=FINE)
    highest = max((float(np.nanmax(line.get_ydata(), initial=-np.inf)) for line in lines), default=0.0)
    panels[0].set_ylim(top=max(FINE, 3 * highest))
    panels[0].set_ylabel("nats from the best end point")
    figure.suptitle(f"{comparison.measure} (dashed: another objective, smoothed)", fontsize=10)
    if rows:
        figure.legend(handles=[x for x in lines if not x.get_label().startswith("_")], loc="outside right center")
    return figure


def smoothed(history: np.ndarray) -> np.ndarray:
    """Means over a fortieth of the run: estimates and draws are noisy."""
    finite = history[np.isfinite(history)]
    width = max(1, len(finite) // 40)
    if width == 1:
        return finite
    sums = np.cumsum(np.insert(finite, 0, 0.0))
    ends = np.arange(1, len(finite) + 1)
    begins = np.maximum(ends - width, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def smallest(rows: Sequence[Row], steps: bool) -> float:
    """The length of the shortest step, up to which the horizontal scale is linear."""
    if steps:
        return 1.0
    lengths = [r.seconds / max(len(r.history) - 1, 1) for r in rows if np.isfinite(r.seconds)]
    longest = max((r.seconds for r in rows if np.isfinite(r.seconds)), default=1.0)
    shortest = max(min(lengths, default=1.0), 1e-4 * longest, 1e-6)
    return 10.0 ** np.ceil(np.log10(shortest))  # a tick of its own, clear of that of zero


def plot_agreement(comparison: Comparison) -> Figure:
    """A table of shades for each measure that any two strategies have in common."""
    rows = [r for r in comparison.rows if r.ended]
    measures: list[tuple[str, Callable[[Row, Row], float]]] = [
        ("discrete latents: total variation", lambda a, b: variation(a.latents, b.latents)),
        ("continuous latents: shift of means (sd)", lambda a, b: shift(a.latents, b.latents)),
        ("parameters: relative distance", parameters),
    ]
    tables = [(name, np.array([[of(a, b) for b in rows] for a in rows])) for name, of in measures]
    tables = [(name, t) for name, t in tables if t.size and np.isfinite(t).any()]
    wide = 1.6 + 0.75 * len(rows)
    plots = max(len(tables), 1)
    size = (1.2 + (wide + 0.6) * plots, 1.4 + 0.62 * len(rows))
    figure, panels = pyplot().subplots(1, plots, figsize=size, squeeze=False, layout="constrained")
    labels = [r.label for r in rows]
    for axes, (name, table) in zip(panels[0], tables, strict=False):
        shaded(axes, table, labels if axes is panels[0][0] else [""] * len(labels), labels)
        axes.set_title(name, fontsize=10)
    panels[0][0].set_ylabel("strategy")
    figure.supxlabel("against", fontsize=10)
    return figure


def parameters(a: Row, b: Row) -> float:
    same = {n: v.shape for n, v in a.params.items()} == {n: v.shape for n, v in b.params.items()}
    return distance(a.params, b.params) if same and a.params else float("nan")


def shaded(axes: Any, table: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    """One table: the number in each cell, and a shade on a logarithmic scale."""
    shade = np.log10(np.clip(np.nan_to_num(table, nan=1e-6), 1e-6, 1.0))
    axes.imshow(shade, cmap="Blues", vmin=-6, vmax=0.5, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        text = "-" if not np.isfinite(value) else "0" if value < 1e-9 else f"{value:.2g}"
        axes.text(
            j, i, text, ha="center", va="center", fontsize=8.5, color="white" if shade[i, j] > -2.7 else "#22303c"
        )
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)

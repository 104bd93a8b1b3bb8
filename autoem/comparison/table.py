"""The rows as plain text, as a pandas DataFrame and as HTML."""

from __future__ import annotations

import html
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from autoem.comparison.row import Row
from autoem.comparison.verdict import closeness

if TYPE_CHECKING:
    from autoem.comparison.comparison import Comparison

Column = tuple[str, Callable[[Row], Any], Callable[[Any], str]]
BLANK = "-"


def nats(value: float) -> str:
    return f"{value:.4f}"


def small(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def signed(value: float) -> str:
    """A gap; what is rounding alone is none."""
    return "0" if abs(value) < 5e-7 else f"{value:+.2g}"


def columns(comparison: Comparison) -> list[Column]:
    """Name, value and format of every column that some row has a value in."""
    found: list[Column] = [
        ("kind", lambda r: r.kind, str),
        ("objective", lambda r: r.objective, nats),
        ("which is", lambda r: r.objective_name, str),
        ("gap", lambda r: r.gap, signed),
        (comparison.measure, lambda r: r.log_likelihood, nats),
    ]
    if comparison.has_priors:
        found += [(f"{comparison.measure} + log prior", lambda r: r.log_joint, nats)]
    found += [
        ("held-out", lambda r: r.held_out, nats),
        ("seconds", lambda r: r.seconds, lambda v: f"{v:.3g}"),
        ("compilation", lambda r: r.compilation, lambda v: f"{v:.3g}"),
        ("steps", lambda r: r.num_steps if r.ended else float("nan"), lambda v: f"{int(v):,}"),
        ("distance", lambda r: r.distance, small),
        ("variation", lambda r: r.variation, small),
        ("shift", lambda r: r.shift, small),
    ]
    always = {"objective", "which is", "seconds"}
    return [c for c in found if c[0] in always or any(known(c[1](r)) for r in comparison.rows)]


def known(value: Any) -> bool:
    return bool(value) if isinstance(value, str) else bool(np.isfinite(value))


def cell(column: Column, row: Row) -> str:
    """One entry as text."""
    value = column[1](row)
    if isinstance(value, float) and np.isinf(value):
        return "inf" if value > 0 else "-inf"
    return column[2](value) if known(value) else BLANK


def plain_table(comparison: Comparison) -> str:
    """The table in characters of equal width."""
    shown = columns(comparison)
    head = ["strategy", *(c[0] for c in shown)]
    lines = [head, *([r.label, *(cell(c, r) for c in shown)] for r in comparison.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    words = {0, *(i + 1 for i, c in enumerate(shown) if c[0] in ("kind", "which is"))}

    def aligned(line: list[str]) -> str:
        cells = [t.ljust(w) if i in words else t.rjust(w) for i, (t, w) in enumerate(zip(line, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([aligned(head), "  ".join("-" * w for w in widths), *map(aligned, lines[1:])])


def frame(comparison: Comparison) -> Any:
    """The table as a DataFrame, with the status of each row.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        mend = "pip install pandas, or print(comparison), which needs nothing"
        raise ImportError(
            f"comparison.table is a pandas DataFrame, and pandas is not installed\n  mend: {mend}"
        ) from None
    data = {name: [value(r) for r in comparison.rows] for name, value, _ in columns(comparison)}
    data["status"] = [r.status for r in comparison.rows]
    return pandas.DataFrame(data, index=pandas.Index([r.label for r in comparison.rows], name="strategy"))


STYLE = """<style>
.autoem-comparison{font-family:system-ui,sans-serif;font-size:13px;line-height:1.45;color:inherit}
.autoem-comparison table{border-collapse:collapse;margin:.3em 0 1em}
.autoem-comparison th,.autoem-comparison td{text-align:right;padding:.3em .7em;border-bottom:1px solid #8884}
.autoem-comparison th{font-weight:600;border-bottom:2px solid #8888}
.autoem-comparison .text{text-align:left}
.autoem-comparison .how{display:inline-block;padding:0 .5em;border-radius:.7em;background:#2a7f4a26}
.autoem-comparison .how.other{background:#c9820033}
.autoem-comparison .best{font-weight:600}
.autoem-comparison .failed{opacity:.6}
.autoem-comparison p{margin:.2em 0;white-space:pre-line}
</style>"""


def html_table(comparison: Comparison) -> str:
    """The table for a notebook; the highest end points in bold."""
    shown, top = columns(comparison), comparison.best
    words = ("kind", "which is")
    measured = comparison.measure + (" + log prior" if comparison.has_priors else "")
    heads = [("strategy", "text"), *((c[0], "text" if c[0] in words else "") for c in shown)]
    out = [STYLE, '<div class="autoem-comparison"><table><thead><tr>']
    out += [tag("th", html.escape(name), kind) for name, kind in heads]
    out += ["</tr></thead><tbody>"]
    for row in comparison.rows:
        cells = [tag("td", html.escape(row.label), "text")]
        for column in shown:
            text = html.escape(cell(column, row))
            if column[0] == "kind":
                text = f'<span class="how{"" if row.kind == "EM" else " other"}">{text}</span>'
            best = column[0] == measured and row.log_joint >= top - closeness(top)
            kind = "text" if column[0] in words else "best" if best else ""
            cells += [tag("td", text, kind)]
        out += [tag("tr", "".join(cells), "" if row.ended else "failed")]
    out += ["</tbody></table>"]
    out += [f"<p>{html.escape(line.strip())}</p>" for line in (*comparison.remarks(), comparison.verdict())]
    return "".join([*out, "</div>"])


def tag(name: str, inside: str, kind: str) -> str:
    """An element, of a class where there is one."""
    return f'<{name} class="{kind}">{inside}</{name}>' if kind else f"<{name}>{inside}</{name}>"

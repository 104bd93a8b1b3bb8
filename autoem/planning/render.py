"""The plan as text, as notebook HTML and as LaTeX."""

from __future__ import annotations

import html
import re
import textwrap
from typing import TYPE_CHECKING

from autoem.e_step.elimination.eliminate import SOURCE as ELIMINATION_SOURCE

if TYPE_CHECKING:
    from autoem.ir import Program
    from autoem.planning.plan import ParameterRow, Plan

WIDTH = 110
GUARD = "extrapolates the EM map; a point that would lower the objective is refused"
MANY = 6  # entries alike from which on they are not all printed


def plan_text(plan: Plan) -> str:
    """Sites, then a line or two for each latent and each parameter."""
    lines = [f"Plan for {plan.program.name}", ""]
    sites = [line for line in str(plan.program).splitlines()[1:] if not line.startswith("  note: ")]
    lines += shortened([["  " + line] for line in sites])
    lines += ["", "  E-step"]
    if plan.latents:
        width = max(len(r.name) for r in plan.latents)
        lines += shortened([_wrapped(f"    {r.name:<{width}}  {r.strategy}: ", r.reason) for r in plan.latents])
        lines += [f"    objective: {plan.treatment.objective_name}"] if plan.treatment else []
        lines += [f"    cost: {plan.cost}"]
        if len(order := plan.cost.order) > 1:
            shown = order if len(order) <= 10 else (*order[:8], f"... {len(order) - 8} more")
            lines += _wrapped("    order: ", ", ".join(shown))
    else:
        split = dict.fromkeys(b.augmentation for b in plan.blocks if b.augmentation)
        lines += _wrapped("    no latents: ", "; ".join(split) or "the likelihood is maximised directly")
    if plan.chunks:
        c = plan.chunks
        lines += [
            f"    rows of '{c.plate}' in chunks of {c.size:,} on {c.devices} device{'s' if c.devices > 1 else ''}"
        ]
    lines += ["", "  M-step"]
    width = max((len(r.name) for r in plan.parameters), default=0)
    said: dict[str, str] = {}
    for r in plan.parameters:
        said.setdefault(r.reason, r.name)
    lines += shortened([_parameter(r, width, said[r.reason]) for r in plan.parameters])
    if not plan.parameters:
        lines += ["    no parameters: nothing to maximise"]
    if plan.accelerate:
        lines += ["", "  Acceleration", f"    {plan.accelerate}: {GUARD}"]
    if plan.notes:
        lines += ["", "  Notes", *shortened([_wrapped("    - ", note) for note in plan.notes])]
    return "\n".join(lines)


def _parameter(row: ParameterRow, width: int, first: str) -> list[str]:
    """Its update, and why; a long reason that a parameter before it has too is not said again."""
    head = f"    {row.name:<{width}}  {row.strategy}" + (f": {row.update}" if row.update else "")
    again = first != row.name and len(row.reason) > WIDTH
    return [head, *_wrapped("    " + " " * width + "  ", f"as '{first}'" if again else row.reason)]


def shortened(entries: list[list[str]]) -> list[str]:
    """The lines of all entries; of many that differ in the numbers of their names alone, the first two and the last."""
    alike: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        # a number that ends a name is one; shapes and counts are not
        kind = re.sub(r"\s+", " ", re.sub(r"(?<=[A-Za-z_])\d+", "#", " ".join(entry)))
        alike.setdefault(kind, []).append(i)
    left_out = {i: len(group) - 3 for group in alike.values() if len(group) > MANY for i in group[2:-1]}
    firsts = {group[2] for group in alike.values() if len(group) > MANY}
    lines = []
    for i, entry in enumerate(entries):
        if i not in left_out:
            lines += entry
        elif i in firsts:
            indent = len(entry[0]) - len(entry[0].lstrip())
            lines += [" " * indent + f"... {left_out[i]} more alike"]
    return lines


def _wrapped(prefix: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=prefix, subsequent_indent=" " * len(prefix)) or [prefix.rstrip()]


STYLE = """<style>
.autoem-plan{font-family:system-ui,sans-serif;font-size:13px;line-height:1.45;max-width:60em;color:inherit}
.autoem-plan table{border-collapse:collapse;margin:.3em 0 1em;width:100%}
.autoem-plan th,.autoem-plan td{text-align:left;padding:.3em .7em;border-bottom:1px solid #8884;vertical-align:top}
.autoem-plan th{font-weight:600;border-bottom:2px solid #8888}
.autoem-plan code{font-size:12px}
.autoem-plan .how{display:inline-block;padding:0 .5em;border-radius:.7em;background:#2a7f4a26;white-space:nowrap}
.autoem-plan .how.other{background:#c9820033}
.autoem-plan p{margin:.2em 0}
</style>"""


def plan_html(plan: Plan) -> str:
    """The plan for a notebook: a graph of the model, a table of latents, a table of parameters."""
    out = [STYLE, '<div class="autoem-plan">', f"<p><b>Plan for <code>{html.escape(plan.program.name)}</code></b></p>"]
    out += [graph_svg(plan)]
    if plan.latents:
        rows = [(r.name, _badge(r.strategy), ", ".join(r.plates) or "-", html.escape(r.reason)) for r in plan.latents]
        out += [_table(("latent", "E-step", "plates", "why"), rows)]
        out += [f"<p>Objective: {html.escape(plan.treatment.objective_name)}</p>"] if plan.treatment else []
        out += [f"<p>{html.escape(str(plan.cost))}</p>"]
    rows = [
        (r.name, _badge(r.strategy), f"<code>{html.escape(r.update)}</code>", html.escape(r.reason))
        for r in plan.parameters
    ]
    out += [_table(("parameter", "M-step", "update", "why"), rows)]
    if plan.accelerate:
        out += [f"<p>Accelerated by <code>{html.escape(str(plan.accelerate))}</code>: {GUARD}</p>"]
    out += [f"<p>Note: {html.escape(n)}</p>" for n in plan.notes]
    return "\n".join([*out, "</div>"])


def _badge(strategy: str) -> str:
    exact = strategy in ("closed form", "exact")
    return f'<span class="how{"" if exact else " other"}">{html.escape(strategy)}</span>'


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{h}</th>" for h in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{c if i else f'<code>{html.escape(c)}</code>'}</td>" for i, c in enumerate(r)) + "</tr>"
        for r in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


COLUMN, ROW, BOX = 150, 62, (120, 34)


def drawn_parents(program: Program, name: str) -> tuple[str, ...]:
    """What a site reads, as far as it has a box: a chain's earlier step is its first ones, its path all of them."""
    parents = program.sites[name].parents if name in program.sites else ()
    out = []
    for p in parents:
        steps = [n for n in program.sites if n != name and program.base_of(n) == program.base_of(p)]
        boxed = p in program.sites or p in program.params
        out += [p] if boxed else [n for n in steps if "@" not in p or "@" not in n]
    return tuple(dict.fromkeys(out))


def graph_svg(plan: Plan) -> str:
    """Who depends on whom: parameters, latents and data in columns, an arrow from each to what reads it."""
    program = plan.program
    names = [n for n in program.params if n not in program.sites] + list(program.sites)
    depth: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((level(p) for p in drawn_parents(program, name)), default=-1)
        return depth[name]

    columns: dict[int, list[str]] = {}
    for n in names:
        columns.setdefault(level(n), []).append(n)
    place = {n: (c * COLUMN + 10, i * ROW + 8) for c, ns in columns.items() for i, n in enumerate(ns)}
    width, height = (max(columns) + 1) * COLUMN, max(len(c) for c in columns.values()) * ROW
    arrows = [_arrow(place[p], place[n]) for n in program.sites for p in drawn_parents(program, n)]
    boxes = [_box(n, program.sites[n].role if n in program.sites else "parameter", place[n]) for n in names]
    marker = (
        '<defs><marker id="autoem-tip" markerWidth="7" markerHeight="6" refX="6" refY="3" orient="auto">'
        '<path d="M0,0 L7,3 L0,6 z" fill="#888"/></marker></defs>'
    )
    opening = f'<svg width="{width}" height="{height}" role="img" aria-label="model graph">'
    return f"{opening}{marker}{''.join(arrows + boxes)}</svg>"


def _arrow(a: tuple[int, int], b: tuple[int, int]) -> str:
    x1, y1, x2, y2 = a[0] + BOX[0], a[1] + BOX[1] / 2, b[0], b[1] + BOX[1] / 2
    middle = (x1 + x2) / 2
    path = f"M{x1},{y1} C{middle},{y1} {middle},{y2} {x2},{y2}"
    return f'<path d="{path}" fill="none" stroke="#888" stroke-width="1.2" marker-end="url(#autoem-tip)"/>'


def _box(name: str, role: str, at: tuple[int, int]) -> str:
    fill = {
        "parameter": "#c9820022",
        "latent": "#2a62c922",
        "continuous": "#2a62c922",
        "observed": "#8883",
        "factor": "#8883",
    }[role]
    radius = 17 if role in ("latent", "continuous") else 4
    shown = html.escape(name if len(name) <= 17 else name[:16] + "…")
    x, y = at
    return (
        f'<rect x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="{radius}" fill="{fill}" stroke="#888"/>'
        f'<text x="{x + BOX[0] / 2}" y="{y + 21}" text-anchor="middle" font-size="12" fill="currentColor">'
        f"{shown}</text>"
    )


def plan_latex(plan: Plan) -> str:
    """The derived updates, one line a block."""
    if not plan.blocks:
        return r"\text{nothing to maximise}"
    lines = [block.latex.replace("=", "&=", 1) if "=" in block.latex else "&" + block.latex for block in plan.blocks]
    return "\\begin{align}\n" + " \\\\\n".join(lines) + "\n\\end{align}"


def citations_of(plan: Plan) -> str:
    """Sources of what the plan uses."""
    sources = [f"E-step: {ELIMINATION_SOURCE}"] if plan.program.latents else []
    sources += [f"E-step: {plan.treatment.source}"] if plan.treatment else []
    sources += [f"{', '.join(i.block.names)}: {i.source}" for i in plan.integrals]
    sources += [f"{', '.join(b.names)}: {b.source}" for b in plan.blocks]
    sources += [f"{plan.accelerate.name}: {plan.accelerate.source}"] if plan.accelerate else []
    families = {f.site.distribution: f.family.source for f in plan.problem.factors.values() if f.family}
    return "\n".join(dict.fromkeys([*sources, *(f"{n}: {s}" for n, s in families.items())]))

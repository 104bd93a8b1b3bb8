"""Measurements of one workload in, a table out: seconds, memory, whether the same work was done, and ratios."""

from __future__ import annotations

from .child import Measurement

_SAME = 1e-8  # relative difference of the log-likelihood under which two contenders did the same work

_HEADING = (
    f"  {'contender':14s} {'ms/step':>10s} {'[fastest .. slowest]':>22s} {'first s':>8s} {'+MiB':>7s} "
    f"{'vs best':>8s} {'vs plain':>8s} {'sklearn/it':>10s} {'log-likelihood':>18s}"
)


def _reference(rows: list[Measurement], role: str) -> Measurement | None:
    return min((r for r in rows if r.role == role), key=lambda r: r.step, default=None)


def _ratio(above: Measurement | None, below: Measurement | None) -> str:
    return f"x{above.step / below.step:.2f}" if above and below else "-"


def _work(row: Measurement, judge: Measurement) -> str:
    gap = abs(row.log_likelihood - judge.log_likelihood) / abs(judge.log_likelihood)
    same = "" if gap <= _SAME else f"  NOT THE SAME WORK: differs by {gap:.1e}"
    return f"{row.log_likelihood:18.6f}{same}"


def table(title: str, rows: list[Measurement]) -> str:
    """One line a contender.

    `vs best` and `vs plain` are its seconds over those of the fastest and of the plain hand-written JAX, so below one
    is faster; `sklearn/it` is scikit-learn's (or, where it has no such model, the first peer's) seconds over its own.
    """
    best, plain = _reference(rows, "best"), _reference(rows, "plain")
    peers = [r for r in rows if r.role == "peer"]
    peer = next((r for r in peers if r.contender == "sklearn"), peers[0] if peers else None)
    judge = best or plain or rows[0]
    lines = [title, _HEADING.replace("sklearn/it", f"{peer.contender[:7]}/it" if peer else "peer/it", 1)]
    for row in rows:
        spread = f"[{row.fastest * 1e3:.3f} .. {row.slowest * 1e3:.3f}]"
        lines.append(
            f"  {row.contender:14s} {row.step * 1e3:10.3f} {spread:>22s} {row.first:8.3f} {row.peak_mib:7.0f} "
            f"{_ratio(row, best):>8s} {_ratio(row, plain):>8s} {_ratio(peer, row):>10s} {_work(row, judge)}"
        )
    return "\n".join(lines)

"""Who ended highest, and who was there first; and whether EM was beaten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from autoem.comparison.row import Row

if TYPE_CHECKING:
    from autoem.comparison.comparison import Comparison

CLOSE = 0.01  # nats that do not matter


def verdict(comparison: Comparison) -> str:
    """The verdict in sentences, a line each."""
    rows = [r for r in comparison.rows if np.isfinite(r.log_joint)]
    if not rows:
        return "Verdict: no strategy has an end point that could be measured."
    top = comparison.best
    close = closeness(top)
    near = [r for r in rows if r.log_joint >= top - close]
    what = comparison.measure + (" + log prior" if comparison.has_priors else "")
    by = f"by {quoted(near)} alone" if len(near) == 1 else f"within {close:.2g} nats by {quoted(near)}"
    lines = [f"Verdict: the highest {what} is {top:.4f}, reached {by}"]
    lines += speed(near, top, close)
    lines += [baselines(comparison, near, top)]
    lines += [better_draw(r, top) for r in rows if drawn(r) > top + close]
    return "\n  ".join(lines)


def closeness(top: float) -> float:
    """Nats that do not matter: a hundredth, or what the precision cannot tell."""
    return max(CLOSE, 4 * float(jnp.finfo(jnp.result_type(float)).eps) * abs(top))


def fastest(rows: Sequence[Row], level: float, compilation: bool) -> Row | None:
    """The row that was above `level` first."""

    def seconds(row: Row) -> float:
        value = row.seconds_to(level) + (row.compilation if compilation else 0.0)
        return value if np.isfinite(value) else float("inf")

    found = min(rows, key=seconds, default=None)
    return found if found is not None and np.isfinite(seconds(found)) else None


def speed(near: Sequence[Row], top: float, close: float) -> list[str]:
    """Who was first, compiled already and not."""
    level = top - close
    warm, cold = fastest(near, level, False), fastest(near, level, True)
    if warm is None:
        return []
    seconds = warm.seconds_to(level)
    line = f"fastest to within {close:.2g} nats of it: {quoted([warm])} in {seconds:.3g} s"
    line += f" (its whole run took {warm.seconds:.3g} s)" if warm.seconds > 2 * seconds else ""
    if cold is None:
        return [line]
    total = cold.seconds_to(level) + cold.compilation
    same = "" if cold is warm else f"{quoted([cold])} in "
    return [f"{line}; with compilation {same}{total:.3g} s"]


def baselines(comparison: Comparison, near: Sequence[Row], top: float) -> str:
    """Whether a baseline wins, said plainly."""
    if not any(r.kind == "baseline" for r in comparison.rows):
        return "no baseline was run"
    if not any(r.kind == "EM" and r.ended for r in comparison.rows):
        return "no EM has an end point for a baseline to be held against"
    wins = []
    if not any(r.kind == "EM" for r in near):
        wins += [f"in {comparison.measure} ({quoted(near)})"]
    level = top - closeness(top)
    warm, cold = fastest(near, level, False), fastest(near, level, True)
    if warm is not None and warm.kind == "baseline":
        wins += [f"in time ({quoted([warm])})"]
    elif cold is not None and cold.kind == "baseline":
        wins += [f"in time with compilation ({quoted([cold])})"]
    return f"a baseline wins {' and '.join(wins)}" if wins else "no baseline beats EM here"


def drawn(row: Row) -> float:
    """The best log density of a sampler's draws."""
    details = getattr(row.result, "details", {})
    return details.get("best", float("-inf"))


def better_draw(row: Row, top: float) -> str:
    return (
        f"a draw of {quoted([row])} has {drawn(row):.4f}, {drawn(row) - top:.3g} more than any end point: "
        "there is a higher hill, so try more starts"
    )


def quoted(rows: Sequence[Row]) -> str:
    return ", ".join(f"'{r.label}'" for r in rows)

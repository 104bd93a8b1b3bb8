"""How long a small fit takes in a fresh process, and another of the same shapes; prints one line.

Run by `__main__`, which sets the environment first: `python -m tests.benchmarks.cold defaults`.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from .contenders_autoem import MODELS
from .workloads import Workload, gaussian_full


def _seconds(em: Any, x: np.ndarray) -> float:
    import jax

    begin = time.perf_counter()
    em.run(jax.random.key(0), x)
    return time.perf_counter() - begin


def _shifted(w: Workload, seed: int) -> np.ndarray:
    """Other rows of the same shape: resampled and moved, so that no cached answer can serve."""
    rng = np.random.default_rng(seed)
    x = w.data["x"]
    return x[rng.integers(len(x), size=len(x))] + 0.1 * rng.normal(size=x.shape[1])


CASES = ("defaults", "given start")


def cold(case: str) -> None:
    """The first fit of 2,000 rows in a fresh process, then new values of the same shapes."""
    import numpyro  # noqa: F401  (imports are not timed, so all of them are made here)

    import autoem

    w = gaussian_full(2_000, 2, 3, num_steps=100)
    model = MODELS["full"](len(w.start["weights"]))
    options = {"init": w.start, "max_steps": 100, "tol": 0.0} if case == "given start" else {}
    em = autoem.EM(model, progress=False, **options)
    first = _seconds(em, w.data["x"])
    again = sorted(_seconds(em, _shifted(w, seed)) for seed in range(1, 8))
    anew = _seconds(autoem.EM(model, progress=False, **options), _shifted(w, 99))
    print(
        f"  {case:12s} first fit {first:6.3f} s; new values of the same shapes {again[3] * 1e3:6.1f} ms "
        f"[{again[0] * 1e3:.1f} .. {again[-1] * 1e3:.1f}], by a new EM object {anew:6.3f} s"
    )


if __name__ == "__main__":
    cold(sys.argv[1])

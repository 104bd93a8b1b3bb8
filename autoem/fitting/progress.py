"""A progress bar that appears only when a fit is worth waiting for."""

from __future__ import annotations

import time

import numpy as np
from tqdm.auto import tqdm

PATIENCE = 2.0  # seconds before a bar is shown


class Progress:
    """Context of one fit; `report(state)` moves the bar. Silent when off, and for short fits."""

    def __init__(self, on: bool, max_steps: int, starts: int):
        self.on, self.max_steps, self.starts = on, max_steps, starts
        self.began = time.perf_counter()
        self.bar: tqdm | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc) -> None:
        if self.bar is not None:
            self.bar.close()

    def report(self, state) -> None:
        if not self.on:
            return
        if self.bar is None:
            if time.perf_counter() - self.began < PATIENCE:
                return
            self.bar = tqdm(total=self.max_steps, unit="step", desc="EM")
        step = int(np.max(np.asarray(state.step)))
        self.bar.update(max(step - self.bar.n, 0))
        self.bar.set_postfix(objective=f"{float(np.max(np.asarray(state.objective))):.8g}")

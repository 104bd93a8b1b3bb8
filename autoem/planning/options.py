"""What a user may ask of a derivation, beside the model and its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from autoem.accelerate import AbstractAcceleration
from autoem.e_step.strategies import AbstractEStep, Truncated
from autoem.m_step.strategies import AbstractMStep


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What the user asked of the derivation."""

    e_step: AbstractEStep | Mapping[str, AbstractEStep] | None = None
    m_step: AbstractMStep | Mapping[str, AbstractMStep] | None = None
    latent: tuple[str, ...] = ()
    maximize: tuple[str, ...] = ()
    missing: str = "error"
    accelerate: AbstractAcceleration | None = None

    @property
    def given(self) -> dict[str, Any]:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {n: v for n, v in vars(self).items() if v != defaults[n]}

    def truncated(self) -> dict[str, tuple[int, int]]:
        asked = self.e_step.items() if isinstance(self.e_step, Mapping) else ()
        return {n: (s.low, s.high) for n, s in asked if isinstance(s, Truncated)}

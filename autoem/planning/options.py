"""What a user may ask of a derivation, beside the model and its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from autoem.accelerate import AbstractAcceleration
from autoem.e_step.strategies import AbstractEStep, Truncated
from autoem.ir import Program, Site
from autoem.m_step.strategies import AbstractMStep
from autoem.reading.support import EVERY


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
        """The ranges asked for, by latent; by `EVERY` where one strategy is for all."""
        one_for_all = isinstance(self.e_step, Truncated)
        asked = self.e_step.items() if isinstance(self.e_step, Mapping) else [(EVERY, self.e_step)] * one_for_all
        return {n: (s.low, s.high) for n, s in asked if isinstance(s, Truncated)}


def ranges_of(program: Program, truncated: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The ranges of the latents that are summed over a range only."""
    endless = {program.base_of(s.name) for s in program.sites.values() if s.role == "latent" and has_no_end(s)}
    every = dict.fromkeys(endless, truncated[EVERY]) if EVERY in truncated else {}
    return {**every, **{n: r for n, r in truncated.items() if n != EVERY}}


def has_no_end(site: Site) -> bool:
    """Whether a discrete site's support is infinite."""
    return site.support != "Boolean()" and "upper_bound" not in site.support

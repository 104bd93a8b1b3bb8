"""Every contender by the family of workload that it fits. Importing this imports no contender's library."""

from __future__ import annotations

from . import (
    contenders_autoem,
    contenders_chains,
    contenders_continuous,
    contenders_continuous_jax,
    contenders_jax,
    contenders_peers,
    contenders_peers_chains,
    contenders_r,
    contenders_textbook,
    contenders_topics,
)
from ._contender import Contender

_MODULES = (
    contenders_autoem,
    contenders_jax,
    contenders_chains,
    contenders_textbook,
    contenders_peers,
    contenders_peers_chains,
    contenders_r,
    contenders_continuous,
    contenders_continuous_jax,
    contenders_topics,
)
CONTENDERS: tuple[Contender, ...] = tuple(c for module in _MODULES for c in module.CONTENDERS)


def contenders_of(family: str, wanted: tuple[str, ...] = ()) -> tuple[Contender, ...]:
    """The contenders of a family, those whose name contains one of `wanted` (all, where nothing is wanted)."""
    fitting = (c for c in CONTENDERS if c.family == family)
    return tuple(c for c in fitting if not wanted or any(part in c.name for part in wanted))


def contender_of(family: str, name: str) -> Contender:
    """The contender of exactly that name."""
    for contender in contenders_of(family):
        if contender.name == name:
            return contender
    raise ValueError(f"no contender '{name}' for {family}; there are {[c.name for c in contenders_of(family)]}")

"""E-steps: how latents are treated. Public: the strategy objects."""

from autoem.e_step.strategies import AbstractEStep, Exact, Truncated

__all__ = ["AbstractEStep", "Exact", "Truncated"]

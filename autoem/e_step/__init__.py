"""E-steps: how latents are treated. Public: the strategy objects."""

from autoem.e_step.strategies import AbstractEStep, Exact, Quadrature, Truncated

__all__ = ["AbstractEStep", "Exact", "Quadrature", "Truncated"]

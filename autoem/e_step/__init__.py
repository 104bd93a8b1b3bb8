"""E-steps: how latents are treated. Public: the strategy objects."""

from autoem.e_step.strategies import AbstractEStep, Exact, MeanField, Quadrature, Truncated

__all__ = ["AbstractEStep", "Exact", "MeanField", "Quadrature", "Truncated"]

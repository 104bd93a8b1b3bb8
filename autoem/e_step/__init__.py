"""E-steps: how latents are treated. Public: the strategy objects."""

from autoem.e_step.strategies import AbstractEStep, Annealed, Exact, Hard, Quadrature, Stochastic, Truncated

__all__ = ["AbstractEStep", "Annealed", "Exact", "Hard", "Quadrature", "Stochastic", "Truncated"]

"""E-steps: how latents are treated. Public: the strategy objects."""

from autoem.e_step.strategies import (
    SAEM,
    AbstractEStep,
    Exact,
    Laplace,
    MonteCarlo,
    Quadrature,
    Truncated,
    Variational,
)

__all__ = ["SAEM", "AbstractEStep", "Exact", "Laplace", "MonteCarlo", "Quadrature", "Truncated", "Variational"]

"""E-steps: how latents are treated. Public: the strategy objects."""

from autoem.e_step.strategies import (
    SAEM,
    AbstractEStep,
    Exact,
    Laplace,
    MeanField,
    MonteCarlo,
    Quadrature,
    Truncated,
    Variational,
)

__all__ = [
    "SAEM", "AbstractEStep", "Exact", "Laplace", "MeanField", "MonteCarlo", "Quadrature", "Truncated", "Variational",
]  # fmt: skip

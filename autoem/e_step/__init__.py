"""E-steps: how latents are treated. Public: the strategy objects."""

from autoem.e_step.strategies import (
    SAEM,
    AbstractEStep,
    Annealed,
    Exact,
    Hard,
    Importance,
    Laplace,
    MeanField,
    MonteCarlo,
    Quadrature,
    Sparse,
    Stochastic,
    Truncated,
    Variational,
)

__all__ = [
    "SAEM",
    "AbstractEStep",
    "Annealed",
    "Exact",
    "Hard",
    "Importance",
    "Laplace",
    "MeanField",
    "MonteCarlo",
    "Quadrature",
    "Sparse",
    "Stochastic",
    "Truncated",
    "Variational",
]

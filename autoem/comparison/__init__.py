"""The same model and data under several strategies, side by side."""

from autoem.comparison.compare import compare
from autoem.comparison.comparison import Comparison
from autoem.comparison.row import Row

__all__ = ["Comparison", "Row", "compare"]

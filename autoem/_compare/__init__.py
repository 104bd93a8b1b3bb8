"""The same model and data under several strategies, side by side."""

from autoem._compare._compare import compare
from autoem._compare._comparison import Comparison
from autoem._compare._row import Row

__all__ = ["Comparison", "Row", "compare"]

"""Other ways to fit the same model, for `autoem.compare`: gradient ascent, variational inference, sampling."""

from autoem.baselines._ascent import GradientAscent
from autoem.baselines._base import AbstractBaseline, Fit
from autoem.baselines._nuts import NUTS
from autoem.baselines._svi import SVI

__all__ = ["NUTS", "SVI", "AbstractBaseline", "Fit", "GradientAscent"]

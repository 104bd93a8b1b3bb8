"""M-steps: how parameters are maximised. Public: the strategy objects."""

from autoem.m_step.strategies import AbstractMStep, Augmented, ClosedForm, Fixed, Gradient, Newton, OrderedSubsets

__all__ = ["AbstractMStep", "Augmented", "ClosedForm", "Fixed", "Gradient", "Newton", "OrderedSubsets"]

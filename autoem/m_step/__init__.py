"""M-steps: how parameters are maximised. Public: the strategy objects."""

from autoem.m_step.strategies import AbstractMStep, ClosedForm, Fixed, Gradient, Newton

__all__ = ["AbstractMStep", "ClosedForm", "Fixed", "Gradient", "Newton"]

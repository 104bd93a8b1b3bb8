"""Continuous latents with a Gaussian posterior: effects, factors, states along time, entries that are missing."""

"""Continuous latents whose cells stand apart, integrated one by one: by formula, between thresholds, or by a rule."""

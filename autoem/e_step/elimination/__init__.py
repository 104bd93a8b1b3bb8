"""Latents summed out of a product of tables with named axes, in plates and along time: the kernel of exact E-steps."""

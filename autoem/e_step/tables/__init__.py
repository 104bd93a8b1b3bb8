"""Each site of a program as a factor: a table of log densities over the latents that it reads."""

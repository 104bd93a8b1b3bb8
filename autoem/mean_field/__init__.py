"""The E-step under a product of laws, one for each group of latents: found in a program, tabulated, swept."""

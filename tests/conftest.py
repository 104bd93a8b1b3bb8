"""Tests run in float64: the library leaves JAX's configuration to its user, and here the user is the test suite."""

import jax

jax.config.update("jax_enable_x64", True)

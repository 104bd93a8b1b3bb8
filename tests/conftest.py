"""Tests run in float64: the library leaves JAX's configuration to its user, and here the user is the test suite."""

import itertools

import jax
import pytest

jax.config.update("jax_enable_x64", True)

TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def bounded_memory():
    """Forget compiled programs now and then: every small model compiles its own, and they would fill gigabytes."""
    yield
    if next(TESTS) % 40 == 0:
        jax.clear_caches()

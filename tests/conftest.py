"""Tests run in float64, on programs compiled fast rather than well: most of their time is the compiling of models.

The library leaves JAX's configuration to its user, and here the user is the test suite. Examples, docs and benchmarks
run programs as users have them.
"""

import itertools
import os
import pathlib

import jax
import pytest

FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"

os.environ.setdefault("XLA_FLAGS", FAST)  # read when JAX is first used, not when it is imported
jax.config.update("jax_enable_x64", True)

TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def bounded_memory():
    """Forget compiled programs now and then: every small model compiles its own, and they would fill gigabytes."""
    yield
    if next(TESTS) % 40 == 0:
        jax.clear_caches()


@pytest.hookimpl(tryfirst=True)  # before those marked slow are left out
def pytest_collection_modifyitems(items):
    """Leave the tests that `slow_tests.txt` lists to the slow mode."""
    slow = set(pathlib.Path(__file__).with_name("slow_tests.txt").read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)

"""The environment of a process that runs as a user's does: without this suite's settings of JAX and of its compiler."""

import os


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}

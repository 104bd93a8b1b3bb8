"""Tables of what to do with each primitive of JAX.

In: names of primitives, and a function. Out: `Rules`, a dict that has the function for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Rules(dict[str, F]):
    """For the name of each primitive what is to be done with it."""

    def of(self, *names: str) -> Callable[[F], F]:
        """Enter the decorated function for the primitives `names`."""

        def register(function: F) -> F:
            self.update(dict.fromkeys(names, function))
            return function

        return register

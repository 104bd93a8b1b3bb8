"""What stands around a scan or goes into it, and is not read: refused before its body is looked at.

In: the message that `numpyro.contrib.control_flow.scan` sends. Out: nothing, or the values that a condition gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.primitives import _PYRO_STACK

from autoem._errors import DataError, ModelError

RUNNING = (
    "a moving average is read where it is observed, of an autoregression that is sampled: "
    "dist.Normal(x + theta * earlier, sd); a level that sums its slopes is sampled by its last two values: "
    "dist.Normal(2 * one - two, q)"
)
REGISTER = (
    "a vector that shifts its entries (A @ x, jnp.concatenate, jnp.roll) carry each entry by itself, in a tuple: "
    'x = numpyro.sample("x", dist.Normal(a[0] * earlier[0] + a[1] * earlier[1], q)); '
    "return (x, *earlier[:-1]), None"
)


def refuse_around(label: str) -> None:
    """Raise where a mask or a scale stands around a scan."""
    around = {type(h).__name__ for h in _PYRO_STACK if isinstance(h, handlers.mask | handlers.scale)}
    if around:
        raise ModelError(
            label,
            problem=f"handlers.{' and '.join(sorted(around))} around a scan",
            mend="put the handler inside the step, around its sites",
        )


def refuse_lists(label: str, xs: Sequence[Any]) -> None:
    """Raise where a list of numbers is run over: to JAX each of them is an input of its own, without steps."""
    if any(not np.ndim(x) for x in xs):
        raise DataError(
            label,
            problem="it runs over something without a time axis (a list of numbers, or one number)",
            mend="scan(step, start, jnp.asarray(data)), or pass the model arrays",
            kind="scan",
        )


def conditioned(label: str, length: int, msg: Mapping[str, Any]) -> dict[str, Any]:
    """Values along time that `handlers.condition` around the scan gives its sites."""
    out: dict[str, Any] = {}
    for kind, values in msg["kwargs"].get("substitute_stack") or ():
        if kind != "condition" or not isinstance(values, Mapping):
            raise ModelError(
                label,
                problem="sites of a scan are substituted from outside",
                mend="pass the values to the step as inputs and observe them there (obs=)",
            )
        out.update({n: v for n, v in values.items() if jnp.ndim(v) and jnp.shape(v)[0] == length})
    return out

"""Values of a model's data flow that the data alone tell, in NumPy: each JAX operation would be compiled for itself.

In: a graph, one of its values, and the inputs. Out: an array. What is not made of the few primitives that indices and
bounds are made with is computed by JAX, compiled as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from autoem.graph.jaxpr import Atom, Constant, Equation, Graph, Variable
from autoem.graph.programs import jit_once


def select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    """Entries of the cases by number; of two, several times as fast as by `choose`."""
    if len(cases) == 2:
        return np.where(which, cases[1], cases[0])
    return np.choose(np.asarray(which, int), cases)


HOST: dict[str, Callable[..., np.ndarray]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "select_n": select,
    "copy": np.asarray,
}


def on_host(
    graph: Graph, atom: Atom, inputs: Mapping[Any, Any], known: dict[Variable, np.ndarray], compiled: dict
) -> np.ndarray:
    """A value of the graph that depends on the data alone, in NumPy where its primitives are simple.

    What is not simple is kept `compiled`: a second fit of the same structure does not even trace it.
    """
    if isinstance(atom, Constant):
        return np.asarray(atom.value)
    by_variable = {v: inputs[k] for k, v in graph.inputs.items() if k in inputs}
    for equation in graph.slice([atom], known):
        args = [np.asarray(a.value if isinstance(a, Constant) else known.get(a, by_variable.get(a)))
                for a in equation.inputs]  # fmt: skip
        value = simple(equation, args)
        if value is None:
            if ("host", atom) not in compiled:
                compiled["host", atom] = jit_once(lambda d: graph.evaluate_atoms([atom], d)[0])
            known[atom] = np.asarray(compiled["host", atom]({k: jnp.asarray(v) for k, v in inputs.items()}))
            return known[atom]
        known[equation.outputs[0]] = value
    return known[atom] if atom in known else np.asarray(by_variable[atom])


def simple(equation: Equation, args: list[np.ndarray]) -> np.ndarray | None:
    """One equation in NumPy, or None where it is not among the few that indices are made with."""
    name, params, shape = equation.primitive.name, equation.params, equation.outputs[0].shape
    if name in HOST:
        return HOST[name](*args)
    if name == "convert_element_type":
        with np.errstate(invalid="ignore"):  # NaN in a row that a mask takes out
            return args[0].astype(params["new_dtype"])
    if name in ("reshape", "squeeze", "expand_dims") and len(args) == 1:
        return args[0].reshape(shape)
    if name == "broadcast_in_dim" and len(args) == 1:
        at = dict(zip(params["broadcast_dimensions"], args[0].shape, strict=True))
        return np.broadcast_to(args[0].reshape([at.get(d, 1) for d in range(len(shape))]), shape)
    if name == "iota":
        at = np.arange(shape[params["dimension"]], dtype=params["dtype"])
        return np.broadcast_to(np.expand_dims(at, [d for d in range(len(shape)) if d != params["dimension"]]), shape)
    if name == "concatenate":
        return np.concatenate(args, params["dimension"])
    if name == "slice":
        strides = params["strides"] or (1,) * len(shape)
        parts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        return args[0][tuple(slice(*p) for p in parts)]
    return None

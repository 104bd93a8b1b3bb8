r"""What kind of function of a parameter a log density is, taken as a whole.

In: a graph, one of its atoms, and the inputs that are targets. Out: the functions of which the atom is a sum, with
coefficients that no target enters: powers :math:`\theta^p` (a constant is the power zero) and :math:`\log \theta`; or
`Declined`. Nothing is computed. A density that is :math:`a \log \theta - b\, \theta^m`, or a polynomial of the second
degree, has its maximum in closed form whatever code it was written in: `a` and `b` are read off its derivatives.

For scales and rates every element may be made of sums over different entries of the parameter, which stay apart; but
what is multiplied, raised or taken the logarithm of must be of one entry. Polynomials (`joint`) may mix entries, of all
targets together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from autoem.graph.jaxpr import Atom, Equation, Graph, Variable, graph_of
from autoem.graph.rules import Rules
from autoem.passes.forms import Declined

LOG = "log"
Power = float | str  # an exponent, or the logarithm
MIXED, JOINT = "mixed", "joint"  # how entries are read where one element is made of several, against the rule or by it

COPIES = {
    "reshape", "broadcast_in_dim", "squeeze", "transpose", "slice", "rev", "expand_dims", "copy", "copy_p", "tile",
    "convert_element_type", "reduce_precision", "gather", "dynamic_slice", "split", "unstack",
}  # fmt: skip
JOINS = {"concatenate", "stack", "pad", "scatter", "dynamic_update_slice", "select_n"}
SUMS = {"reduce_sum", "cumsum", "scatter-add", "scatter_add", "reduce_window_sum"}
TINY = 1e-6  # guards closer than this to zero leave a scale what it is


@dataclasses.dataclass(frozen=True)
class Terms:
    """A sum of powers and the logarithm, each with its coefficient where that is one known number.

    `read` tells how entries of the target are read: equal where two values have the same entry in every element.
    """

    of: Mapping[Power, float | None]
    read: Any = None

    @property
    def power(self) -> Power | None:
        """The only power that it is; None where it is a sum."""
        return next(iter(self.of)) if len(self.of) == 1 else None


@dataclasses.dataclass(frozen=True)
class Free:
    """A value that no target enters; `number` is its one entry where that is written in the model's text."""

    number: float | None = None


Value = Terms | Free


def terms_of(graph: Graph, atom: Atom, targets: Collection[Any], joint: bool, real: bool = False) -> frozenset[Power]:
    """The powers of which `atom` is a sum, `LOG` among them where a logarithm is.

    Args:
        joint: whether entries may mix; nothing but sums, products and squares is then let through.
        real: whether a target is the logarithm of what powers are taken of.

    Raises:
        Declined: it is no such sum.
    """
    env: dict[Variable, Value] = {}
    for key, var in graph.inputs.items():
        whole = JOINT if joint else None if int(np.prod(var.shape, dtype=int)) == 1 else "whole"
        env[var] = Terms({LOG if real else 1.0: 1.0}, whole) if key in targets else Free()
    run(graph.slice([atom]), env)
    value = look_up(atom, env)
    return frozenset(value.of) if isinstance(value, Terms) else frozenset({0.0})


def look_up(atom: Atom, env: Mapping[Variable, Value]) -> Value:
    if isinstance(atom, Variable):
        return env[atom]
    if not hasattr(atom.value, "dtype") and not isinstance(atom.value, int | float):
        return Free()
    try:
        entries = np.unique(np.asarray(atom.value)) if np.size(atom.value) <= 4096 else np.empty(0)
        return Free(float(entries[0]) if len(entries) == 1 else None)
    except (TypeError, ValueError):
        return Free()


def run(equations: list[Equation], env: dict[Variable, Value]) -> None:
    for eqn in equations:
        inputs = [look_up(a, env) for a in eqn.inputs]
        name = eqn.primitive.name
        if all(isinstance(i, Free) for i in inputs):
            numbers = {i.number for i in inputs if isinstance(i, Free)}
            same = name in COPIES and len(inputs) == 1
            out: Value | list[Value] = Free(numbers.pop() if same else None)
        elif name in ("ne", "eq") and eqn.inputs[0] is eqn.inputs[1]:  # whether it is a number at all
            out = Free()
        elif name in ("custom_jvp_call", "custom_vjp_call"):
            out = inside(eqn, inputs)
        elif (rule := RULES.get(name)) is not None:
            out = rule(eqn, inputs)
        else:
            raise Declined(f"it passes through `{name}`")
        env.update(zip(eqn.outputs, out if isinstance(out, list) else [out] * len(eqn.outputs), strict=True))


def inside(eqn: Equation, inputs: list[Value]) -> list[Value]:
    inner = graph_of(eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr")))
    env: dict[Variable, Value] = dict(zip(inner.inputs.values(), inputs, strict=True))
    outs = list(inner.outputs.values())
    run(inner.slice(outs), env)
    return [look_up(o, env) for o in outs]


Rule = Callable[[Equation, list[Value]], Value]
RULES: Rules[Rule] = Rules()


def read_as(values: list[Value]) -> Any:
    """How a value made of several, element by element, reads entries."""
    ways = [v.read for v in values if isinstance(v, Terms)]
    return ways[0] if all(w == ways[0] for w in ways) else MIXED


def blended(read: Any) -> Any:
    """The same where elements are added up."""
    return read if read in (None, JOINT) else MIXED


def of_one_entry(*values: Value, product: bool = False) -> None:
    """Raise unless the elements of what is combined otherwise than by a sum are of one entry each."""
    way = read_as(list(values))
    if way == MIXED or (way == JOINT and not product):
        raise Declined("entries of it are combined otherwise than by a sum")


def summed(values: list[Value], signs: tuple[float, ...] = ()) -> dict[Power, float | None]:
    """Terms of a sum, or of a choice."""
    out: dict[Power, float | None] = {}
    for value, sign in zip(values, signs or (1.0,) * len(values), strict=True):
        for power, number in value.of.items() if isinstance(value, Terms) else [(0.0, None)]:
            number = None if number is None else sign * number
            out[power] = number if power not in out else None
    return out


@RULES.of(*COPIES)
def _copy(eqn, inputs):
    if not isinstance(inputs[0], Terms) or any(isinstance(i, Terms) for i in inputs[1:]):
        raise Declined("it is used as an index")
    x, name = inputs[0], eqn.primitive.name
    if name.startswith("convert") and np.dtype(eqn.params["new_dtype"]).kind not in "fc":
        raise Declined("it is rounded")
    if x.read in (None, MIXED, JOINT) or name in ("copy", "copy_p", "convert_element_type", "reduce_precision"):
        return x
    token = (name, str(eqn.params)) if len(inputs) == 1 else eqn
    return Terms(x.of, (token, x.read))


@RULES.of(*JOINS)
def _join(eqn, inputs):
    name = eqn.primitive.name
    parts = inputs[1:] if name == "select_n" else inputs[::2] if name == "scatter" else inputs
    parts = parts[:2] if name == "dynamic_update_slice" else parts
    if any(isinstance(i, Terms) and not any(i is p for p in parts) for i in inputs):
        raise Declined("a choice depends on it")
    way = read_as(parts)  # with a choice elements keep their places
    return Terms(summed(parts), way if name == "select_n" else blended(way))


@RULES.of(*SUMS)
def _sum(eqn, inputs):
    terms = [i for i in inputs if isinstance(i, Terms)]
    if eqn.primitive.name.startswith("scatter") and isinstance(inputs[1], Terms):
        raise Declined("it is used as an index")
    return Terms(dict.fromkeys(summed(list(terms)), None), blended(read_as(list(terms))))


@RULES.of("dot_general")
def _dot(eqn, inputs):
    if not all(isinstance(i, Terms) for i in inputs):
        return _sum(eqn, inputs)
    if read_as(inputs) not in (None, JOINT):  # which of the one meets which of the other is not followed
        raise Declined("entries of it are multiplied by each other")
    return _product(inputs)


@RULES.of("add", "add_any", "sub")
def _add(eqn, inputs):
    sign = -1.0 if eqn.primitive.name == "sub" else 1.0
    return Terms(summed(inputs, (1.0, sign)), read_as(inputs))


@RULES.of("neg")
def _neg(eqn, inputs):
    return Terms(summed(inputs, (-1.0,)), inputs[0].read)


@RULES.of("mul")
def _mul(eqn, inputs):
    return _product(inputs)


def _product(inputs: list[Value]) -> Terms:
    a, b = inputs
    if isinstance(a, Free) or isinstance(b, Free):
        x, known = (b, a) if isinstance(a, Free) else (a, b)
        number = known.number if isinstance(known, Free) else None
        assert isinstance(x, Terms)
        return Terms({p: None if c is None or number is None else c * number for p, c in x.of.items()}, x.read)
    of_one_entry(a, b, product=True)
    out: dict[Power, float | None] = {}
    for p in a.of:
        for q in b.of:
            if LOG in (p, q) and 0 not in (p, q):
                raise Declined("its logarithm is multiplied by it")
            out[LOG if LOG in (p, q) else float(p) + float(q)] = None
    return Terms(out, a.read)


@RULES.of("div")
def _div(eqn, inputs):
    a, b = inputs
    if isinstance(b, Free):
        over = Free(1 / b.number if b.number else None)
        return _product([a, over])
    return _product([a, raised(b, -1.0)])


def raised(x: Value, power: float) -> Terms:
    """A power of one power; of a sum where the exponent is two."""
    assert isinstance(x, Terms)
    if power == 2 and LOG not in x.of:
        return _product([x, x])
    of_one_entry(x)
    if not isinstance(x.power, float):
        raise Declined("a sum with it is raised to a power")
    return Terms({x.power * power: None}, x.read)


@RULES.of("integer_pow")
def _integer_pow(eqn, inputs):
    return raised(inputs[0], float(eqn.params["y"]))


@RULES.of("square")
def _square(eqn, inputs):
    return raised(inputs[0], 2.0)


@RULES.of("sqrt", "rsqrt")
def _root(eqn, inputs):
    return raised(inputs[0], 0.5 if eqn.primitive.name == "sqrt" else -0.5)


@RULES.of("pow")
def _pow(eqn, inputs):
    x, exponent = inputs
    if not isinstance(exponent, Free) or exponent.number is None:
        raise Declined("it stands in a power whose exponent is no number of the model's text")
    return raised(x, exponent.number)


@RULES.of("log")
def _log(eqn, inputs):
    (x,) = inputs
    of_one_entry(x)
    if not isinstance(x.power, float):
        raise Declined("the logarithm of a sum with it is taken")
    return Terms({0.0: None, LOG: x.power} if x.power else {0.0: None}, x.read)


@RULES.of("exp")
def _exp(eqn, inputs):
    (x,) = inputs
    of_one_entry(x)
    power = x.of.get(LOG)
    if not set(x.of) <= {0.0, LOG} or power is None:
        raise Declined("its exponential is taken")
    return Terms({power: None}, x.read)


@RULES.of("max", "clamp")
def _guard(eqn, inputs):
    limits, x = (inputs[:1] + inputs[2:], inputs[1]) if eqn.primitive.name == "clamp" else (inputs[:1], inputs[1])
    if isinstance(limits[0], Terms):
        limits, x = [x], limits[0]
    low = limits[0].number if isinstance(limits[0], Free) else None
    high = limits[1].number if len(limits) > 1 and isinstance(limits[1], Free) else math.inf
    if not isinstance(x, Terms) or low is None or high is None or not 0 <= low <= TINY or high < 1 / TINY:
        raise Declined(f"it passes through `{eqn.primitive.name}`")
    return x

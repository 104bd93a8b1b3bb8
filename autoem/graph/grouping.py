"""Equal operations of a program done together: a model of a hundred like sites compiles about as one of a few.

In: a closed jaxpr. Out: others that together compute the same, in which operations of one kind on arrays of one shape
that do not wait for each other are a single operation on a stack of them. Loops are gone into. Sites written in a
Python loop leave hundreds of copies of the same few operations, and XLA's compiling is paid by the operation.

References:
    Neubig, Goldberg and Dyer 2017, "On-the-fly operation batching in dynamic computation graphs".
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core as jex

from autoem.graph.jaxpr import WITH_RULES, Atom, Constant, Equation, Graph, Variable, graph_of

MANY = 1_500  # operations of a program, or of a loop's body, from which grouping them is worth its time
FEWEST = 4  # equal operations that are worth one of their own
STACKED_UP_TO = 4 << 20  # bytes of a stack: larger ones would be copied about for longer than they save
LONG = 8  # terms of a sum that are added up at once
APART = ("while", "scan", "cond", "shard_map", "rng_bit_generator", "copy")


def grouped(closed: Any) -> tuple[Any, ...]:
    """The same program with equal operations done together, in parts that hand on all their outputs; or as it came.

    A loop is a part of its own between that which makes its stacks and that which takes them apart.
    """
    if closed.effects or size_of(closed) < MANY:
        return (closed,)

    def run(*values):
        graph = graph_of(closed, WITH_RULES)
        env = evaluate(graph, dict(zip(graph.inputs.values(), values, strict=True)))
        return [whole(a, env) for a in graph.outputs.values()]

    new = jax.make_jaxpr(run)(*map(spec, closed.in_avals))
    return parts(new) if list(new.out_avals) == list(closed.out_avals) else (closed,)


def parts(closed: Any) -> tuple[Any, ...]:
    """What comes before the only loop of a program, the loop, and what comes after; or the program as it came."""
    graph = graph_of(closed)
    loops = [e for e in graph.equations if e.primitive.name == "while"]
    if len(loops) != 1:
        return (closed,)
    (middle,), ends = loops, list(graph.outputs.values())
    read = graph.reach(ends, middle.outputs)[1]
    if read & set(graph.inputs.values()):
        return (closed,)

    def before(*values):
        return graph.evaluate_atoms(middle.inputs, dict(zip(graph.inputs, values, strict=True)))

    def after(*values):
        return graph.evaluate_atoms(ends, {}, dict(zip(middle.outputs, values, strict=True)))

    first = jax.make_jaxpr(before)(*map(spec, closed.in_avals))
    second = jax.make_jaxpr(lambda *x: middle.apply(x))(*map(spec, first.out_avals))
    return first, second, jax.make_jaxpr(after)(*map(spec, second.out_avals))


def spec(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=bool(getattr(aval, "weak_type", False)))


def size_of(closed: Any) -> int:
    """Operations of a program, or of the largest body of a loop in it."""
    count, largest = 0, 0
    for equation in closed.jaxpr.eqns:
        inner = [v for v in equation.params.values() if isinstance(v, jex.ClosedJaxpr)]
        sizes = [size_of(v) for v in inner]
        if equation.primitive.name in WITH_RULES:
            count += sum(sizes)
        else:
            largest, count = max([largest, *sizes]), count + 1
    return max(count, largest)


SUM: Any = type("Sum", (), {"name": "sum of many"})()


@dataclasses.dataclass
class Plan:
    """Sets of equal equations that wait for none of each other, in an order in which they can be done.

    `same` tells of variables that hold what another holds already.
    """

    steps: list[list[Equation]]
    same: dict[Variable, Variable]


def plan_of(graph: Graph) -> Plan:
    """Every equation once for all that compute the same, with as many of its kind as can wait for it.

    Of the kinds that have equations ready, that is done next whose equations lie least deep in the mean: a kind of
    which more are to come, further down, waits for them.
    """
    kinds, equations, same = once_each(with_sums(graph.slice(graph.outputs.values()), graph.outputs.values()))
    depth: dict[Variable, int] = {}
    depths: dict[Any, list[int]] = {}
    readers: dict[Variable, list[int]] = {}
    waits: list[int] = []
    for number, (kind, equation) in enumerate(zip(kinds, equations, strict=True)):
        read = {a for a in equation.inputs if isinstance(a, Variable) and a in depth}
        depths.setdefault(kind, []).append(at := 1 + max((depth[a] for a in read), default=0))
        depth.update(dict.fromkeys(equation.outputs, at))
        waits.append(len(read))
        for a in read:
            readers.setdefault(a, []).append(number)
    place = {kind: (sum(d) / len(d), i) for i, (kind, d) in enumerate(depths.items())}
    ready: dict[Any, list[int]] = {}
    heap: list[tuple] = []

    def add(number: int) -> None:
        kind = kinds[number]
        if kind not in ready:
            heapq.heappush(heap, (*place[kind], number))
        ready.setdefault(kind, []).append(number)

    for number in [i for i, count in enumerate(waits) if not count]:
        add(number)
    steps = []
    while heap:
        members = sorted(ready.pop(kinds[heapq.heappop(heap)[2]]))
        steps.append([equations[i] for i in members])
        for number in [r for i in members for v in equations[i].outputs for r in readers.get(v, ())]:
            waits[number] -= 1
            if not waits[number]:
                add(number)
    return Plan(steps, same)


def once_each(equations: Sequence[Equation]) -> tuple[list[Any], list[Equation], dict[Variable, Variable]]:
    """Equations and their kinds, one for all that compute the same; and which variables hold what others hold."""
    kinds, kept, same, known = [], [], {}, {}
    for number, equation in enumerate(equations):
        atoms = tuple(same.get(a, a) if isinstance(a, Variable) else a for a in equation.inputs)
        kind = kind_of(equation)
        if kind is not None:
            value = kind, tuple(map(identity, atoms))
            if value in known:
                same.update(zip(equation.outputs, known[value], strict=True))
                continue
            known[value] = equation.outputs
        kinds.append(number if kind is None else kind)
        kept.append(dataclasses.replace(equation, inputs=atoms))
    return kinds, kept, same


def with_sums(equations: Sequence[Equation], ends: Iterable[Atom]) -> list[Equation]:
    """The equations, but for long sums, added up one term after another: they become single ones of all their terms."""
    uses = collections.Counter(a for e in equations for a in e.inputs if isinstance(a, Variable))
    uses.update(a for a in ends if isinstance(a, Variable))
    sums = {e.outputs[0]: e for e in equations if is_sum(e)}
    partial = {a for e in sums.values() for a in e.inputs if isinstance(a, Variable) and a in sums and uses[a] == 1}
    gone: set[Variable] = set()
    whole_sums: dict[Variable, Equation] = {}
    for total, equation in sums.items():
        if total in partial:
            continue
        terms, within, pending = [], [], [*equation.inputs]
        while pending:
            atom = pending.pop()
            if isinstance(atom, Variable) and atom in partial:
                within.append(atom)
                pending += sums[atom].inputs
            else:
                terms.append(atom)
        if len(terms) >= LONG:
            gone.update(within)
            whole_sums[total] = dataclasses.replace(equation, primitive=SUM, inputs=tuple(terms))
    return [whole_sums.get(e.outputs[0], e) if e.outputs else e for e in equations
            if not (e.outputs and e.outputs[0] in gone)]  # fmt: skip


def is_sum(equation: Equation) -> bool:
    """Whether it adds two arrays of the shape of their sum."""
    kinds = [kind_of_atom(a) for a in (*equation.inputs, *equation.outputs)]
    return equation.primitive.name in ("add", "add_any") and kinds[0] is not None and len(set(kinds)) == 1


def kind_of(equation: Equation) -> Any:
    """What equal equations share; None for one that stands alone."""
    name = equation.primitive.name
    if name in APART or name.startswith("random_") or "callback" in name:
        return None
    params = tuple(sorted(equation.params.items()))
    try:
        hash(params)
    except TypeError:
        return None
    kinds = tuple(map(kind_of_atom, equation.inputs))
    return None if None in kinds else (equation.primitive, params, kinds)


def kind_of_atom(atom: Atom) -> Any:
    """Shape and type of a value; None for one that is no array of numbers."""
    if isinstance(atom, Constant):
        value = atom.value
        return np.shape(value), jnp.result_type(value), not isinstance(value, np.ndarray | jax.Array)
    aval = atom.aval
    if not hasattr(aval, "shape") or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return None
    return aval.shape, aval.dtype, aval.weak_type


def identity(atom: Atom) -> Any:
    """Equal for values that are known to be the same."""
    if isinstance(atom, Variable):
        return atom
    value = atom.value
    return id(value) if np.ndim(value) else (np.asarray(value).tobytes(), np.asarray(value).dtype)


@dataclasses.dataclass(frozen=True)
class Row:
    """A value that lies in a stack with others."""

    stack: Array
    index: int


def evaluate(graph: Graph, env: dict[Variable, Any]) -> dict[Variable, Any]:
    """All values that the outputs of a graph need, equal equations at once; `env` holds its inputs."""
    plan = plan_of(graph)
    for members in plan.steps:
        first = members[0]
        if first.primitive is SUM:
            for equation in members:
                terms, stacked = together(equation.inputs, env)
                env[equation.outputs[0]] = terms.sum(0) if stacked else terms * len(equation.inputs)
        elif first.primitive.name == "while":
            loop(first, env)
        elif len(members) < FEWEST or not small(members):
            for equation in members:
                out = equation.apply([whole(a, env) for a in equation.inputs])
                env.update(zip(equation.outputs, out, strict=True))
        else:
            over = [together([e.inputs[i] for e in members], env) for i in range(len(first.inputs))]
            axes = [0 if stacked else None for _, stacked in over]
            outs = jax.vmap(lambda *x, e=first: e.apply(x), axes)(*(x for x, _ in over))
            for number, stack in enumerate(outs):
                env.update({e.outputs[number]: Row(stack, i) for i, e in enumerate(members)})
    env.update({v: env[held] for v, held in plan.same.items()})
    return env


def loop(equation: Equation, env: dict[Variable, Any]) -> None:
    """A loop whose body is grouped: what it reads and carries of one shape goes in and round as a stack."""
    params = equation.params
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    limits, read, start = (equation.inputs[a:b] for a, b in ((0, split[0]), split, (split[1], None)))
    body, ends = graph_of(params["body_jaxpr"], WITH_RULES), graph_of(params["cond_jaxpr"])
    several = params["cond_jaxpr"].out_avals[0].shape
    odd = any(kind_of_atom(v) is None for v in body.inputs.values()) and several
    if odd or params["body_jaxpr"].effects or len(body.equations) < MANY:
        out = equation.apply([whole(a, env) for a in equation.inputs])
        env.update(zip(equation.outputs, out, strict=True))
        return
    around, carried = list(body.inputs.values())[: len(read)], list(body.inputs.values())[len(read) :]
    fixed, seen = unpacked(around, packed(read, alike(around), env)), [whole(a, env) for a in limits]
    classes = alike(carried)

    def still(stacks):
        now = unpacked(carried, stacks)
        return in_order(ends, [*seen, *(whole(v, now) for v in carried)])[0]

    def step(stacks):
        after = evaluate(body, {**fixed, **unpacked(carried, stacks)})
        new = packed(list(body.outputs.values()), classes, after)
        if not several:
            return new
        runs = still(stacks)  # of loops side by side, those that ended stay as they are
        return [kept_where(runs, a, b, len(c) > 1) for a, b, c in zip(new, stacks, classes, strict=True)]

    last = jax.lax.while_loop(lambda stacks: still(stacks).any(), step, packed(start, classes, env))
    end = unpacked(carried, last)
    env.update({o: end[v] for o, v in zip(equation.outputs, carried, strict=True)})


def kept_where(runs: Array, new: Array, old: Array, stacked: bool) -> Array:
    """What is carried by loops side by side, of which some still run; `stacked`, if their axes come second."""
    shape = (*((1,) if stacked else ()), *runs.shape)
    return jnp.where(runs.reshape(shape + (1,) * (new.ndim - len(shape))), new, old)


def in_order(graph: Graph, values: Sequence[Any]) -> list[Any]:
    return graph.evaluate(list(graph.outputs), dict(zip(graph.inputs, values, strict=True)))


def alike(variables: Sequence[Variable]) -> list[list[int]]:
    """Places of variables of one shape and type, those that go into a stack together."""
    classes: dict[Any, list[int]] = {}
    for place, v in enumerate(variables):
        kind = kind_of_atom(v)
        fits = kind is not None and v.aval.size * v.aval.dtype.itemsize * FEWEST <= STACKED_UP_TO
        classes.setdefault(kind if fits else place, []).append(place)
    return list(classes.values())


def packed(atoms: Sequence[Atom], classes: Sequence[Sequence[int]], env: dict[Variable, Any]) -> list[Any]:
    """One array for each class: a stack, or the value itself where it is the only one."""
    out = []
    for places in classes:
        members = [atoms[i] for i in places]
        value, stacked = together(members, env) if len(members) > 1 else (whole(members[0], env), True)
        out.append(value if stacked else jnp.broadcast_to(value, (len(members), *np.shape(value))))
    return out


def unpacked(variables: Sequence[Variable], stacks: Sequence[Any]) -> dict[Variable, Any]:
    out: dict[Variable, Any] = {}
    for places, stack in zip(alike(variables), stacks, strict=True):
        one = len(places) == 1
        out.update({variables[i]: stack if one else Row(stack, row) for row, i in enumerate(places)})
    return out


def small(members: Sequence[Equation]) -> bool:
    """Whether what equal equations read and write may lie in stacks."""
    first = members[0]
    sizes = [np.size(a.value) * 8 if isinstance(a, Constant) else a.aval.size * a.aval.dtype.itemsize
             for a in (*first.inputs, *first.outputs)]  # fmt: skip
    return len(members) * max(sizes) <= STACKED_UP_TO


def whole(atom: Atom, env: dict[Variable, Any]) -> Any:
    """One value, cut out of its stack where it lies in one."""
    if isinstance(atom, Constant):
        return atom.value
    value = env[atom]
    return jax.lax.index_in_dim(value.stack, value.index, keepdims=False) if isinstance(value, Row) else value


def together(atoms: Sequence[Atom], env: dict[Variable, Any]) -> tuple[Any, bool]:
    """Values as a stack, and whether it is one: a value that all share stays as it is."""
    if len({identity(a) for a in atoms}) == 1:
        return whole(atoms[0], env), False
    if all(isinstance(a, Constant) for a in atoms):
        return np.stack([a.value for a in atoms if isinstance(a, Constant)]), True
    rows = [env[a] if isinstance(a, Variable) else a.value for a in atoms]
    sources: dict[int, tuple[Array | None, list[int], list[int]]] = {}  # a stack, which of its rows, and where they go
    for place, row in enumerate(rows):
        stack = row.stack if isinstance(row, Row) else None
        _, taken, places = sources.setdefault(id(stack), (stack, [], []))
        taken.append(row.index if isinstance(row, Row) else place)
        places.append(place)
    if len(sources) > len(rows) // 2:
        return jnp.stack([whole(a, env) for a in atoms]), True
    parts = [jnp.stack([rows[i] for i in taken]) if stack is None else rows_of(stack, taken)
             for stack, taken, _ in sources.values()]  # fmt: skip
    order = np.argsort([place for _, _, places in sources.values() for place in places])
    return rows_of(jnp.concatenate(parts) if len(parts) > 1 else parts[0], list(order)), True


def rows_of(stack: Array | np.ndarray, taken: Sequence[int]) -> Array | np.ndarray:
    """Some rows of a stack, in an order."""
    first, count = taken[0], len(taken)
    if list(taken) == list(range(first, first + count)):
        return stack if count == len(stack) else jax.lax.slice_in_dim(stack, first, first + count)
    if isinstance(stack, np.ndarray):
        return stack[np.asarray(taken)]
    return stack.at[np.asarray(taken)].get(mode="promise_in_bounds", wrap_negative_indices=False)

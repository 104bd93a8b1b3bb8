"""A seed in, a small random NumPyro model with discrete latents, data and parameter values out.

Every model is written by composing closures that a user could have written: plates (none, one, nested with and without
`dim=`, or a group index from one to another), one to four latents whose tables are indexed by other latents, observed
sites of many families and links, priors, masks, row weights, partly observed latents, factors. The same sketch builds
at two sizes: small enough for every completion to be added up, and large enough for a fit to make sense.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers

from tests.random_sites import FAMILIES, FOR_FEW, LATENTS, LINKS, Maker, Reads, Sketch, Values, declare, draw_parameter
from tests.simulate import simulate

LIMIT = 20_000  # completions of a small instance
SMALL = {"rows": 4, "outer": 2, "groups": 2, "tops": 2}
LARGE = {"rows": 60, "outer": 8, "groups": 8, "tops": 3}
PARENT = {"rows": "groups", "groups": "tops"}  # which plate a plate's index leads to


class Node(NamedTuple):
    """One site: where it stands, and a closure that writes its line given (values, latents, data)."""

    level: str
    name: str
    write: Callable[[Values, dict, Values], None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Plates of a model. `shape` is that of a level's cells, as NumPyro lays them out."""

    name: str
    levels: tuple[str, ...]
    explicit: bool = False

    def shape(self, level: str, sizes: dict[str, int]) -> tuple[int, ...]:
        rows, outer = sizes["rows"], sizes["outer"]
        if self.name == "nested":
            explicit, implicit = (
                {"outer": (outer, 1), "rows": (outer, rows)},
                {"outer": (outer,), "rows": (rows, outer)},
            )
            shapes = explicit if self.explicit else implicit
        else:
            shapes = {"rows": (rows,), "groups": (sizes["groups"],), "tops": (sizes["tops"],)}
        return {"all": (), **shapes}[level]

    def readable(self, level: str) -> tuple[str, ...]:
        if self.name in ("gather", "chain"):
            return "all", level, PARENT.get(level, level)
        return self.levels[: self.levels.index(level) + 1]

    def plate(self, level: str, sizes: dict[str, int]) -> contextlib.AbstractContextManager:
        if level == "all":
            return contextlib.nullcontext()
        dim = -2 if level == "outer" else -1
        return numpyro.plate(level, sizes[level], dim=dim if self.explicit else None)

    def enter(self, level: str, sizes: dict[str, int]) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.name == "nested" and level == "rows":
            stack.enter_context(self.plate("outer", sizes))
        stack.enter_context(self.plate(level, sizes))
        return stack


@dataclasses.dataclass(frozen=True)
class Instance:
    """One size of a random model, ready to run, with what the oracle must be given in its place.

    `repeated` is the same model on repeated rows when rows carry weights, and `row_of` says which repeated row stands
    for each row; otherwise they are the model itself and None.
    """

    model: Callable
    args: tuple
    repeated: tuple[Callable, tuple]
    row_of: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A random model. `refusal` says why autoem may refuse it; None means that it must not."""

    seed: int
    description: str
    params: dict[str, np.ndarray]
    latents: tuple[str, ...]
    refusal: str | None
    small: Instance
    large: Instance


class _Draft(Sketch):
    """A sketch with its layout, latents and nodes."""

    def __init__(self, rng: np.random.Generator):
        super().__init__(rng)
        self.layout = Layout(*self.pick([
            ("none", ("all",)), *[("rows", ("all", "rows"), False)] * 3, ("rows", ("all", "rows"), True),
            ("nested", ("all", "outer", "rows"), False), *[("nested", ("all", "outer", "rows"), True)] * 2,
            *[("gather", ("all", "groups", "rows"), self.chance(0.5))] * 2,
            ("chain", ("all", "tops", "groups", "rows"), self.chance(0.5)),
        ]))  # fmt: skip
        self.sizes_of: dict[str, tuple[str, int]] = {}
        self.nodes: list[Node] = []
        self.partly: set[str] = set()
        self.refusal: str | None = None
        self.masked = self.layout.name != "none" and self.chance(0.15)
        self.weighted = self.layout.name in ("rows", "gather", "chain") and self.chance(0.12)
        self.second_index = self.layout.name in ("gather", "chain") and self.chance(0.1)


def random_model(seed: int, most_latents: int = 4, most_observed: int = 3) -> RandomModel:
    """The random model of this seed: the first draft whose completions are few enough to add up."""
    rng = np.random.default_rng(seed)
    while True:
        draft = _draft(rng, most_latents, most_observed)
        params = {p.name: draw_parameter(rng, p) for p in draft.parameters}
        data_seed = int(rng.integers(2**31))
        for rows in range(SMALL["rows"], 1, -1):
            sizes = {**SMALL, "rows": rows}
            if _completions(draft, sizes) <= LIMIT:
                small, large = _instance(draft, sizes, data_seed), _instance(draft, LARGE, data_seed)
                words, latents = _describe(draft, rows), tuple(draft.sizes_of)
                return RandomModel(seed, words, params, latents, draft.refusal, small, large)


def _completions(draft: _Draft, sizes: dict[str, int]) -> float:
    """How many completions the oracle will have to add up, weighted rows repeated."""
    log_total = 0.0
    for level, size in draft.sizes_of.values():
        cells = np.prod(draft.layout.shape(level, sizes), dtype=int) * (2 if draft.weighted and level == "rows" else 1)
        log_total += float(cells) * np.log(size)
    return float(np.exp(log_total))


def _describe(draft: _Draft, rows: int) -> str:
    extra = " masked" * draft.masked + " weighted" * draft.weighted + " dim=" * draft.layout.explicit
    priors = sum(p.how != "param" for p in draft.parameters)
    return f"{draft.layout.name} (rows={rows}){extra}, {priors} priors: " + "; ".join(draft.notes)


def _draft(rng: np.random.Generator, most_latents: int, most_observed: int) -> _Draft:
    draft = _Draft(rng)
    for _ in range(rng.integers(1, most_latents + 1)):
        _add_latent(draft)
    for _ in range(rng.integers(1, most_observed + 1)):
        _add_observed(draft)
    if draft.chance(0.15):
        _add_factor(draft)
    order = {level: depth for depth, level in enumerate(draft.layout.levels)}
    draft.nodes.sort(key=lambda node: order[node.level])
    return draft


def _levels(draft: _Draft) -> list[str]:
    """Levels by how often a site should stand there: mostly in the innermost plate, seldom outside all plates."""
    *outer, last = draft.layout.levels
    return [*outer, *outer[1:] * 2, *[last] * 4]


def _reads(draft: _Draft, level: str, most: int) -> Reads:
    """Some of the latents that can be read at this level; their values may first pass through a function."""
    seen = [name for name, (where, _) in draft.sizes_of.items() if where in draft.layout.readable(level)]
    count = min(len(seen), int(draft.rng.integers(0 if draft.chance(0.2) else 1, most + 1)))
    names = tuple(str(name) for name in draft.rng.permutation(seen)[:count])
    sizes = tuple(draft.sizes_of[name][1] for name in names)
    if len(names) == 2 and draft.chance(0.25):
        return Reads(names, *_merged(draft, sizes))
    return Reads(names, sizes, lambda *z: z)


def _merged(draft: _Draft, sizes: tuple[int, int]) -> tuple[tuple[int, ...], Callable]:
    a, b = sizes
    options = {
        "sum": ((a + b - 1,), lambda x, y: (x + y,)),
        "equal": ((2,), lambda x, y: ((x == y).astype(int),)),
        "larger": ((max(a, b),), lambda x, y: (jnp.maximum(x, y),)),
        "where": ((b,), lambda x, y: (jnp.where(x > 0, y, 0),)),
    }
    how = draft.pick(options)
    draft.notes.append(f"{how} of two")
    return options[how]


def _get(draft: _Draft, level: str, names: tuple[str, ...], latents: dict, data: Values, index: str) -> tuple:
    """The latents as they are read at a level: rows read a group's latent through the group's index."""
    through = PARENT.get(level) if draft.layout.name in ("gather", "chain") else None
    grouped = {name for name in names if draft.sizes_of[name][0] == through}
    return tuple(latents[name][data[index]] if name in grouped else latents[name] for name in names)


def _arguments(draft: _Draft, level: str, maker: Maker, most: int) -> tuple[Callable, str]:
    """A closure that builds the distribution, and words for it. Each argument reads latents of its own choice."""
    parts, words, index = [], [], f"index of {level}"
    if draft.second_index and level == "rows" and draft.chance(0.5):
        index = "second index"
        draft.refusal = "rows read the groups by two indices"
    shared = _reads(draft, level, most)
    for kind, event in maker.arguments:
        reads = shared if draft.chance(0.7) else _reads(draft, level, 1)
        how, link = LINKS[kind](draft, level, event, reads)
        parts.append((reads, link))
        words.append(f"{how}[{','.join(reads.names)}]")

    def build(values: Values, latents: dict, data: Values) -> dist.Distribution:
        read = [r.index(*_get(draft, level, r.names, latents, data, index)) for r, _ in parts]
        arguments = [link(values, i, data) for i, (_, link) in zip(read, parts, strict=True)]
        return maker.make(*arguments)

    return build, " ".join(words)


def _add_latent(draft: _Draft) -> None:
    level, name = draft.pick(_levels(draft)), f"z{len(draft.sizes_of)}"
    family = draft.pick(LATENTS)
    size = 2 if family.startswith("bernoulli") else int(draft.rng.integers(2, 4))
    build, words = _arguments(draft, level, LATENTS[family](size), most=2)
    infer = {"enumerate": "parallel"} if draft.chance(0.3) else None
    if draft.chance(0.12) and level != "all":
        draft.partly.add(name)

    def write(values: Values, latents: dict, data: Values) -> None:
        seen = {"obs": data[name], "obs_mask": data[f"{name}_seen"]} if f"{name}_seen" in data else {}
        latents[name] = numpyro.sample(name, build(values, latents, data), infer=infer, **seen)

    draft.sizes_of[name] = (level, size)
    draft.nodes.append(Node(level, name, write))
    draft.notes.append(f"{name} {family} in {level} {words}" + " partly seen" * (name in draft.partly))


def _add_observed(draft: _Draft) -> None:
    level, name = draft.pick(_levels(draft)), f"y{len(draft.nodes)}"
    family = draft.pick(FAMILIES if level == "rows" else FOR_FEW)
    build, words = _arguments(draft, level, FAMILIES[family], most=2)
    if draft.chance(0.03) and level == "rows" and draft.sizes_of:
        build = _neighbourly(draft, build)
    thinned = level != "all" and draft.chance(0.1)
    named = draft.chance(0.15)

    def write(values: Values, latents: dict, data: Values) -> None:
        fn = build(values, latents, data)
        if named:
            numpyro.deterministic(f"{name}_mean", fn.mean)
        with handlers.mask(mask=data[f"{name}_kept"]) if thinned else contextlib.nullcontext():
            numpyro.sample(name, fn, obs=data.get(name))

    if thinned:
        draft.inputs[f"{name}_kept"] = (level, _coins(0.7))
    draft.nodes.append(Node(level, name, write))
    draft.notes.append(f"{name} {family} in {level} {words}" + " masked" * thinned)


def _neighbourly(draft: _Draft, build: Callable) -> Callable:
    """A site whose row reads another row's latents: a dependence along the plate, which plates do not describe."""
    rows = [name for name, (level, _) in draft.sizes_of.items() if level == "rows"]
    if not rows:
        return build
    draft.refusal = "a row reads another row's latent"
    draft.notes.append("rolled")

    def rolled(values: Values, latents: dict, data: Values) -> dist.Distribution:
        return build(values, {**latents, **{name: jnp.roll(latents[name], 1, -1) for name in rows}}, data)

    return rolled


def _add_factor(draft: _Draft) -> None:
    name = draft.pick(draft.sizes_of)
    level, size = draft.sizes_of[name]
    bonus = draft.rng.normal(size=size)
    draft.nodes.append(
        Node(level, "bonus", lambda values, latents, data: numpyro.factor("bonus", jnp.asarray(bonus)[latents[name]]))
    )
    draft.notes.append(f"factor of {name}")


def _coins(probability: float) -> Callable:
    return lambda rng, shape: rng.random(shape) < probability


def _model(draft: _Draft, sizes: dict[str, int]) -> Callable:
    """The model as a function of a dict of arrays; whatever the dict lacks is drawn."""

    def model(data: Values) -> None:
        values = {parameter.name: declare(parameter) for parameter in draft.parameters}
        latents: dict[str, Any] = {}
        for level in draft.layout.levels:
            with draft.layout.enter(level, sizes), _around(draft, level, data):
                for node in draft.nodes:
                    if node.level == level:
                        node.write(values, latents, data)

    return model


@contextlib.contextmanager
def _around(draft: _Draft, level: str, data: Values) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if draft.masked and level == draft.layout.levels[-1]:
            stack.enter_context(handlers.mask(mask=data["kept"]))
        if "weights" in data and level == "rows":
            stack.enter_context(handlers.scale(scale=data["weights"]))
        yield


def _inputs(draft: _Draft, sizes: dict[str, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    data = {name: make(rng, draft.layout.shape(level, sizes)) for name, (level, make) in draft.inputs.items()}
    for level in set(PARENT) & set(draft.layout.levels):
        if PARENT[level] in draft.layout.levels:
            data[f"index of {level}"] = rng.permutation(np.arange(sizes[level]) % sizes[PARENT[level]])
    if draft.second_index:
        data["second index"] = rng.integers(sizes["groups"], size=sizes["rows"])
    if draft.masked:
        data["kept"] = rng.random(draft.layout.shape(draft.layout.levels[-1], sizes)) < 0.75
    return data


def _instance(draft: _Draft, sizes: dict[str, int], seed: int) -> Instance:
    """Data drawn from the model at parameters of its own, so that a fit has somewhere to go."""
    rng = np.random.default_rng(seed)
    model, data = _model(draft, sizes), _inputs(draft, sizes, rng)
    truth = {p.name: draw_parameter(rng, p) for p in draft.parameters}
    drawn = simulate(model, truth, data, seed=seed)
    data |= {node.name: drawn[node.name] for node in draft.nodes if node.name.startswith("y")}
    for name in draft.partly:
        data |= {name: drawn[name], f"{name}_seen": rng.random(drawn[name].shape) < 0.5}
    if not draft.weighted:
        return Instance(model, (data,), (model, (data,)), None)
    return _weighted(draft, sizes, model, data, rng)


def _weighted(draft: _Draft, sizes: dict[str, int], model: Callable, data: dict, rng: np.random.Generator) -> Instance:
    weights = rng.integers(1, 3, sizes["rows"])
    row_of = np.repeat(np.arange(sizes["rows"]), weights)
    levels = {name: level for name, (level, _) in draft.inputs.items()} | {n.name: n.level for n in draft.nodes}
    levels |= {"index of rows": "rows", "second index": "rows", "index of groups": "groups", "kept": "rows"}
    levels |= {f"{name}_seen": draft.sizes_of[name][0] for name in draft.partly}
    repeated = {name: value[row_of] if levels[name] == "rows" else value for name, value in data.items()}
    longer = _model(draft, {**sizes, "rows": len(row_of)})
    return Instance(model, ({**data, "weights": weights},), (longer, (repeated,)), row_of)

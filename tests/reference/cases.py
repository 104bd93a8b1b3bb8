"""The reference cases: a name in; its plain NumPyro model, data, start, expected M-steps and expected answer out.

The answers live beside the data in `tests/data/reference/*.json`, each with its source and with what it was checked by.
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import case_models as models

DATA = pathlib.Path(__file__).parent.parent / "data"
IRIS = ("sepal_length", "sepal_width", "petal_length", "petal_width")
FAITHFUL = ("eruptions", "waiting")
PATHOLOGISTS = tuple("ABCDEFG")
CHEATING = ("lieexam", "liepaper", "fraud", "copyexam")
BIOCHEMISTS = ("women", "married", "kid5", "phd", "ment")
CLOSED = "closed form"

Columns = dict[str, jax.Array]


def columns(name: str) -> Columns:
    """The columns of a CSV file by name; a column `repeats` says how often its row stands in the data."""
    with open(DATA / name, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    table = {key: _column(cells) for key, cells in zip(header, zip(*rows, strict=True), strict=True)}
    repeats = table.pop("repeats", None)
    if repeats is not None:
        table = {key: np.repeat(value, repeats) for key, value in table.items()}
    return {key: jnp.asarray(value) for key, value in table.items()}


def _column(cells: tuple[str, ...]) -> np.ndarray:
    try:
        return np.array([int(cell) for cell in cells])
    except ValueError:
        return np.array([float(cell) for cell in cells])


def matrix(name: str, skip: int = 0) -> jax.Array:
    """The columns of a CSV file after the first `skip`, side by side."""
    return jnp.stack(list(columns(name).values())[skip:], -1)


def genes() -> Columns:
    return {"x": matrix("golub.csv", skip=2)}


def sequences() -> Columns:
    lines = (DATA / "crp.fasta").read_text(encoding="utf-8").split()
    return {"sequences": jnp.array([["ACGT".index(letter) for letter in line] for line in lines[1::2]])}


def phantom() -> Columns:
    strip, counts = columns("phantom_system.csv"), columns("phantom_counts.csv")["count"]
    system = jnp.zeros((len(counts), 64)).at[strip["bin"], strip["pixel"]].set(strip["weight"] / 300)
    return {"system": system, "counts": counts}


def majority_vote(d: Columns) -> dict[str, Any]:
    """As in Dawid and Skene 1979: an item's class is at first as probable as it is frequent among the labels."""
    counts = jnp.zeros((45, 4)).at[d["item"], d["label"]].add(1.0)
    return {"z": counts / counts.sum(1, keepdims=True)}


def seeded_clusters(_: Columns) -> dict[str, Any]:
    """Ninety per cent on the cluster that a k-means++ seeding named, the rest spread evenly."""
    return {"z": 0.9 * jax.nn.one_hot(columns("golub.csv")["start_cluster"], 3) + 0.1 / 3}


def drawn_clusters(_: Columns) -> dict[str, Any]:
    drawn = matrix("mite_start.csv")  # four digits are kept, so rows sum to one within 2e-4
    return {"z": drawn / drawn.sum(1, keepdims=True)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model on one data set.

    `start` is a function of the data, or the name of a start that the EM object knows; None takes the parameters that
    the reference states. `m_step` holds the words that the plan must use, by parameter; `options` go to `EM`.
    `quantities` makes what is compared of the parameters, where those are not determined.
    """

    name: str
    model: Callable[[Columns], None]
    data: Callable[[], Columns]
    m_step: Mapping[str, str | tuple[str, ...]]
    start: Callable[[Columns], dict[str, Any]] | str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quantities: Callable[[dict[str, Any]], dict[str, Any]] = dict

    @property
    def reference(self) -> dict[str, Any]:
        return json.loads((DATA / "reference" / f"{self.name}.json").read_text(encoding="utf-8"))

    def init(self, d: Columns) -> dict[str, Any] | str:
        if isinstance(self.start, str):
            return self.start
        if self.start is not None:
            return self.start(d)
        return {name: jnp.asarray(value, float) for name, value in self.reference["start"].items()}


def _closed(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, CLOSED)


def _file(name: str) -> Callable[[], Columns]:
    return lambda: columns(name)


_SEARCH = {"restarts": 20, "max_steps": 5000}
_SLOW = {"max_steps": 20_000}  # plain EM is slow here: thousands of steps, of a few microseconds each
_ASIA = _closed(*(f"p_{v}" for v in ("asia", "smoke", "tub", "lung", "bronc", "either", "xray", "dysp")))
_CORONARY = _closed(*(f"p_{v}" for v in ("smoking", "mental_work", "physical_work", "proteins", "pressure", "family")))

CASES = (
    Case("two_coins", models.two_coins, _file("coins.csv"), _closed("theta")),
    Case("linkage", models.linkage, _file("linkage.csv"), _closed("theta")),
    Case("abo", models.blood_groups, _file("abo.csv"), _closed("freq")),
    Case("haplotypes", models.haplotypes, _file("mns.csv"), _closed("freq")),
    Case("times_deaths", models.poisson_mixture, _file("times_deaths.csv"), _closed("pi", "rate"), options=_SLOW),
    Case("iris_eee", models.gaussian_eee(IRIS, 3), _file("iris.csv"), _closed("pi", "mu", "Sigma")),
    Case("iris_eii", models.gaussian_eii(IRIS, 3), _file("iris.csv"), _closed("pi", "mu", "sd")),
    Case("iris_vvi", models.gaussian_vvi(IRIS, 3), _file("iris.csv"), _closed("pi", "mu", "sd")),
    Case("iris_vvv", models.gaussian_vvv(IRIS, 3), _file("iris.csv"), _closed("pi", "mu", "Sigma")),
    Case("old_faithful", models.gaussian_vvv(FAITHFUL, 2), _file("old_faithful.csv"), _closed("pi", "mu", "Sigma")),
    Case("golub", models.gene_clusters, genes, _closed("pi", "mu", "sd"), seeded_clusters),
    Case("asia", models.asia, _file("asia.csv"), _ASIA, "model"),
    Case("coronary", models.coronary, _file("coronary.csv"), _CORONARY, "model"),
    Case(
        "anaesthetists",
        models.dawid_skene,
        _file("anaesthetists.csv"),
        _closed("prevalence", "confusion"),
        majority_vote,
    ),
    Case(
        "old_faithful_gamma",
        models.gamma_mixture,
        _file("old_faithful.csv"),
        _closed("pi") | {"shape": ("Newton", "gradient")},  # no closed form exists for the shape
    ),
    Case("das_haus", models.word_alignment, _file("das_haus.csv"), _closed("t"), options=_SLOW | {"tol": 1e-8}),
    Case(
        "carcinoma_2",
        models.latent_classes(PATHOLOGISTS, 2),
        _file("carcinoma.csv"),
        _closed("pi", "theta"),
        "auto",
        _SEARCH,
    ),
    Case(
        "carcinoma_3",
        models.latent_classes(PATHOLOGISTS, 3),
        _file("carcinoma.csv"),
        _closed("pi", "theta"),
        "auto",
        _SEARCH,
    ),
    Case(
        "cheating", models.latent_classes(CHEATING, 2), _file("cheating.csv"), _closed("pi", "theta"), "auto", _SEARCH
    ),
    Case("tone", models.two_lines, _file("tone.csv"), _closed("pi", "beta", "sd")),
    Case("crp_motif", models.motif, sequences, _closed("pwm", "bg")),
    Case(
        "mite",
        models.multinomial_mixture,
        lambda: {"counts": matrix("mite.csv")},
        _closed("pi", "theta"),
        drawn_clusters,
    ),
    Case("house_votes", models.naive_bayes, _file("house_votes.csv"), _closed("pi", "theta")),
    Case("record_linkage", models.record_linkage, _file("record_pairs.csv"), _closed("match", "m", "u")),
    Case(
        "biochemists",
        models.zero_inflated(BIOCHEMISTS),
        _file("biochemists.csv"),
        dict.fromkeys(("beta", "gamma"), ("Newton", "gradient")),
        "model",
    ),
    Case("pet_phantom", models.tomography, phantom, _closed("activity"), options=_SLOW | {"tol": 1e-12}),
    Case("biochemists_constant", models.zero_inflated(()), _file("biochemists.csv"), _closed("beta", "gamma"), "model"),
)
BY_NAME = {case.name: case for case in CASES}

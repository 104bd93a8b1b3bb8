"""What the examples share: columns of a data file in, pictures out.

A picture goes to the folder named by `--out`, or to `examples/out`; in a notebook it is shown as well.
"""

import argparse
import csv
import pathlib
import sys

import matplotlib

if "ipykernel" not in sys.modules:
    matplotlib.use("Agg")  # a script draws to files alone

import matplotlib.pyplot as plt
import numpy as np

HERE = pathlib.Path(__file__).parent
BLUE, ORANGE, GREEN, GREY, INK = "#2f6690", "#e0762f", "#4f9d69", "#8d99a6", "#22303c"

plt.rcParams.update(
    {
        "figure.dpi": 110,
        "savefig.dpi": 160,
        "figure.constrained_layout.use": True,
        "font.size": 10.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
    }
)


def columns(name: str) -> dict[str, np.ndarray]:
    """The columns of `examples/data/<name>`; a column `repeats` says how often its row stands in the data."""
    with open(HERE / "data" / name, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    table = {key: _numbers(cells) for key, cells in zip(header, zip(*rows, strict=True), strict=True)}
    repeats = table.pop("repeats", np.ones(len(rows), int))
    return {key: np.repeat(value, repeats) for key, value in table.items()}


def _numbers(cells: tuple[str, ...]) -> np.ndarray:
    whole = all(cell.lstrip("-").isdigit() for cell in cells)
    return np.array(cells).astype(int if whole else float)


def save(figure: plt.Figure, name: str) -> None:
    """Writes the picture and says where."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "out", help="folder for pictures")
    folder = parser.parse_known_args()[0].out
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name)
    print(f"picture: {folder / name}")

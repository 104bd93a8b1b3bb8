"""Each example runs whole, as a reader would run it: from the root, in a process of its own, drawing into a folder."""

import pathlib
import subprocess
import sys

import pytest

from tests.as_users_run import environment

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))
WITHOUT_PICTURE = {"02_linkage_1977", "03_blood_groups"}


@pytest.mark.slow  # .ci/run runs them all
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_ends_well(script, tmp_path):
    """Every example ends in an assertion against a known answer, so an exit code of zero says that it was reached."""
    own = {**environment(), "PYTHONPATH": str(ROOT)}  # this checkout, installed or not
    command = [sys.executable, str(script.relative_to(ROOT)), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == (script.stem not in WITHOUT_PICTURE)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_ends_in_an_assertion(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80
    assert lines[0].startswith("# %%")
    last_cell = lines[max(number for number, line in enumerate(lines) if line.startswith("# %%")) :]
    assert any("assert" in line for line in last_cell)


def test_there_are_examples():
    assert len(EXAMPLES) >= 7

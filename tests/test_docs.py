"""What the pages promise to cover. (That their cells run is for the build of the docs to say.)"""

import pathlib
import re
import tomllib

import autoem

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_every_public_name_is_in_the_api_page():
    page = (DOCS / "api.md").read_text()
    missing = [name for name in autoem.__all__ if not re.search(rf":: (autoem\.)?{name}$", page, flags=re.MULTILINE)]
    assert not missing


def test_every_error_has_an_executed_example():
    cells = "\n".join(re.findall(r"^```\{code-cell\}\n(.*?)^```$", (DOCS / "errors.md").read_text(), re.M | re.S))
    for error in ("ModelError", "PlanError", "DataError"):
        assert f"expected(autoem.{error})" in cells


def test_the_changelog_speaks_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (DOCS / "changelog.md").read_text()


def test_every_page_is_reachable():
    listed = re.findall(r"^[\w-]+$", (DOCS / "index.md").read_text(), flags=re.MULTILINE)
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert pages == set(listed) & pages

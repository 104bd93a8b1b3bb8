"""Builds the documentation: every code cell runs, and a cell that raises fails the build.

Run it with `python -m sphinx -W --keep-going -b html docs docs/_build/html`.
"""

import importlib.metadata
import os
import pathlib
import shutil

HERE = pathlib.Path(__file__).parent

project = "autoem"
version = release = importlib.metadata.version("autoem")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "conf.py"]
default_role = "code"  # docstrings mark code as Markdown does

html_theme = "furo"
html_title = f"autoem {release}"
html_static_path = ["_static"]
html_css_files = ["width.css"]

myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"  # a stored result would not notice that autoem has changed
nb_execution_excludepatterns = os.environ.get("DOCS_NOT_EXECUTED", "").split()  # pages laid out without running
suppress_warnings = ["myst-nb.lexer"] if nb_execution_excludepatterns else []  # such a page has no kernel to name it
nb_execution_timeout = 300
nb_execution_show_tb = True  # a failing cell is a warning, which -W turns into an error
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute that is a property too is listed once


def render_examples() -> None:
    """Copy examples/ beside the pages: each script becomes a page, executed with what lies beside the script."""
    source, target = HERE.parent / "examples", HERE / "examples"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for script in sorted(source.glob("[0-9]*.py")):
        beside = f'# %% tags=["remove-cell"]\nimport sys\n\nsys.path.insert(0, {str(source)!r})\n\n'
        (target / script.name).write_text(beside + script.read_text())


render_examples()

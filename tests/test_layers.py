"""The shape of the code: who may import whom, how large a piece may grow, and that what is imported is declared.

To move a module to another layer, edit LAYERS: a unit (a file or a folder of `autoem`, without those of its parts that
have a line of their own) may import from the lines above its own, and from within itself; never from its own line or
from below.
"""

import ast
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = """
    _errors
    graph
    families
    ir
    reading
    passes
    e_step.strategies m_step.strategies
    e_step.elimination
    e_step.tables
    e_step.gaussian
    e_step.cells
    e_step
    m_step.problem
    m_step.block
    m_step.closed_form
    m_step
    accelerate
    lowering
    treatments mean_field
    planning
    fitting
    answers
    checks
    _em
    selection baselines
    comparison
    __init__
"""
LAYER_OF = {unit: depth for depth, line in enumerate(LAYERS.split("\n")) for unit in line.split()}

MAX_LINES = 400
MAX_BODY = 60

FILES = sorted((ROOT / "autoem").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def unit(module):
    """The longest name in LAYERS that answers for `module`; the first part below `autoem` where none does."""
    parts = module.split(".")[1:] or ["__init__"]
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in LAYER_OF), parts[0])


def imports(path):
    """(line, module) of each import that runs, wherever it stands, with `from package import module` resolved."""
    for_types = {id(child) for node in ast.walk(TREES[path]) if is_for_types(node) for child in ast.walk(node)}
    for node in ast.walk(TREES[path]):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(path, node)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in MODULES else base


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def absolute(path, node):
    if not node.level:
        return node.module
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def own_imports(path):
    return [(line, module) for line, module in imports(path) if module.split(".")[0] == "autoem"]


def functions(path):
    return [node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_lines(function):
    """Lines from the first statement after the docstring to the end."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def test_every_module_has_a_layer():
    strangers = {unit(module) for module in MODULES} - set(LAYER_OF)
    assert not strangers, f"add to LAYERS: {sorted(strangers)}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    above = []
    for line, imported in own_imports(MODULES[module]):
        importer, source = unit(module), unit(imported)
        allowed = importer == source or LAYER_OF[source] < LAYER_OF[importer]
        if not allowed:
            above.append(f"{MODULES[module].relative_to(ROOT)}:{line} imports {imported}")
    assert not above, "\n".join(above)


def test_no_module_imports_itself_through_others():
    graph = {module: {imported for _, imported in own_imports(path)} - {module} for module, path in MODULES.items()}
    while leaves := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"in or above a cycle of imports: {sorted(graph)}"


@pytest.mark.parametrize("module", MODULES)
def test_budgets(module):
    path = MODULES[module]
    lines = path.read_text().count("\n")
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines"
    large = {function.name: body_lines(function) for function in functions(path) if body_lines(function) > MAX_BODY}
    assert not large, f"{path.name}: bodies over {MAX_BODY} lines: {large}"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(TREES[MODULES[module]])


def test_what_is_imported_is_declared():
    """A module that only comes along with another package may one day not come along."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = {re.match(r"[\w.-]+", line).group().replace("-", "_") for line in declared}
    modules = {name.split(".")[0] for path in FILES for _, name in imports(path)}
    providers = importlib.metadata.packages_distributions()
    used = {
        provider.replace("-", "_")
        for module in modules - set(sys.stdlib_module_names) - {"autoem"}
        for provider in providers.get(module, [module])
    }
    assert used - {"matplotlib", "pandas"} <= declared, "imported but not declared"
    assert declared <= used, "declared but not imported"

"""The package keeps the rules of docs/design.md: layers, and the lengths of files and functions."""

import ast
import graphlib
import pathlib
import re

from helpers import REPO
import pytest

DESIGN = (REPO / "docs" / "design.md").read_text()


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((REPO / "wsparse").rglob("*.py"))}


def layers() -> dict[str, int]:
    """Room -> row of the table, counted from the top."""
    table = DESIGN[DESIGN.index("| modules |") :].split("\n\n")[0].splitlines()[2:]
    return {room: i for i, row in enumerate(table) for room in re.findall(r"`(\w+)`", row.split("|")[1])}


def room(module: str) -> str:
    """The file or folder of the package that a module is, or is in; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def imports(path: pathlib.Path) -> set[str]:
    """Modules of the package that are imported when this file is, functions and type checks left out."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                found.update(name if name in MODULES else str(node.module) for name in names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                visit([*node.body, *node.orelse])
            elif isinstance(node, ast.Try):
                visit([*node.body, *node.orelse, *node.finalbody])

    visit(ast.parse(path.read_text()).body)
    return found & set(MODULES)


def test_every_room_has_one_row_and_every_row_names_rooms():
    rooms = {room(module) for module in MODULES} - {""}
    assert rooms <= set(layers())


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_row_and_those_above(module):
    rows = layers() | {"": -1}
    if module == "wsparse":
        pytest.skip("the package imports its public names when they are used")
    below = [name for name in imports(MODULES[module]) if rows[room(name)] > rows[room(module)]]
    assert not below


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    for module, names in graph.items():
        # A package's own names are found in it while its modules are loaded.
        graph[module] = {name for name in names if not module.startswith(f"{name}.")}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_the_rule_notices_an_import_from_below(tmp_path):
    """A negative control, and imports inside of functions are allowed."""
    path = tmp_path / "ops.py"
    path.write_text("from wsparse import prune\n\ndef f():\n    import wsparse.train\n")
    assert imports(path) == {"wsparse.prune"}
    assert layers()["prune"] > layers()["ops"]


FILES = [*MODULES.values(), *sorted((REPO / "configs").rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_files_have_at_most_600_lines_and_functions_80(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    }
    assert {name: length for name, length in lengths.items() if length > 80} == {}

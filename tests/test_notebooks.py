"""The notebooks run from first cell to last, use public names only, and are stored without outputs."""

import ast
import functools
import os
import shutil
import sys
import tomllib

from helpers import REPO
import pytest

import wsparse

nbformat = pytest.importorskip("nbformat")

FOLDER = REPO / "notebooks"
# The first one trains what the others use as well.
NAMES = ("circuit.ipynb", "audit.ipynb", "published_model.ipynb")
REPOSITORY = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


@functools.cache
def notebook(name: str):
    return nbformat.read(FOLDER / name, as_version=4)


def code(name: str) -> list[str]:
    """The cells in Python, without lines for the shell."""
    cells = [cell.source for cell in notebook(name).cells if cell.cell_type == "code"]
    return [
        "\n".join(
            line if line.lstrip()[:1] not in ("!", "%") else f"{' ' * 4}pass" for line in cell.split("\n")
        )
        for cell in cells
        if not cell.startswith("%%")
    ]


def names_of_the_package(source: str) -> set[str]:
    """Attributes of `wsparse` that are used, and modules of the package that are imported."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "wsparse"
        ):
            found.add(node.attr)
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found.update(name for name in modules if name.startswith("wsparse."))
    return found


def test_all_notebooks_are_tested():
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_without_outputs(name):
    for cell in notebook(name).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.source


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_uses_the_public_names_only(name):
    assert set().union(*map(names_of_the_package, code(name))) <= set(wsparse.__all__)


def test_the_rule_notices_a_name_that_is_not_public():
    """Negative control."""
    assert names_of_the_package("import wsparse.taps\nwsparse.masks.names") == {"wsparse.taps", "masks"}
    assert names_of_the_package("from wsparse.circuits import masks") == {"wsparse.circuits"}


@pytest.mark.parametrize("name", NAMES)
def test_badge_and_clone_are_of_the_repository_that_pyproject_names(name):
    owner = REPOSITORY.removeprefix("https://github.com/")
    badge = f"(https://colab.research.google.com/github/{owner}/blob/main/notebooks/{name})"
    assert badge in notebook(name).cells[0].source
    assert f"git clone -q --depth=1 {REPOSITORY} " in notebook(name).cells[1].source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as notebooks/ is in a checkout, without what they made before."""
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / "tests").mkdir()
    (checkout / "tests" / "golden").symlink_to(REPO / "tests" / "golden")
    (checkout / "notebooks").mkdir()
    return checkout / "notebooks"


@pytest.fixture
def environment(folder, monkeypatch):
    """That of a shell where the environment is active, with quick compilation, whose results are shared."""
    monkeypatch.setenv("PATH", os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, folder):
    """In order, in one folder, as somebody does who reads one after the other; each would run alone."""
    nbclient = pytest.importorskip("nbclient")
    if shutil.which("wsparse") is None:
        pytest.skip("the command wsparse is not installed: pip install -e .")
    copy = nbformat.from_dict(notebook(name))
    client = nbclient.NotebookClient(copy, timeout=900, resources={"metadata": {"path": str(folder)}})
    client.execute()
    shown = [output for cell in copy.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("<iframe srcdoc=" in output.get("data", {}).get("text/html", "") for output in shown)

"""The documentation: its site builds without a warning, its links lead somewhere, its commands exist."""

import importlib
import pathlib
import re
import sys

from helpers import REPO, run_python
import pytest

from wsparse import cli, recipes
from wsparse.config import TrainConfig, describe

DOCUMENTS = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "launch/README.md")),
    *sorted((REPO / "docs").glob("*.md")),
    *sorted((REPO / "notebooks").glob("*.ipynb")),
]
RECIPES = sorted((REPO / "configs").rglob("*.py"))
MODULES = {module: name for name, (module, _) in cli.COMMANDS.items()}
KEYS = {key for key, _, _ in describe(TrainConfig())}
# Commands that have no name of their own.
OTHERS = ("wsparse.interop.parity",)


def of(path: pathlib.Path) -> str:
    return path.relative_to(REPO).as_posix()


@pytest.fixture(scope="module")
def pages():
    sys.path.insert(0, str(REPO / "docs"))
    yield importlib.import_module("pages")
    sys.path.remove(str(REPO / "docs"))


def text_of(path: pathlib.Path) -> str:
    """A document; a notebook's strings as they are read."""
    text = path.read_text()
    return re.sub(r'\\n",?\s*"', "\n", text).replace("\\\\\n", "\\\n") if path.suffix == ".ipynb" else text


def commands(text: str) -> list[list[str]]:
    """Every command of the package in a text, as a module and its arguments."""
    found = []
    joined = text.replace("\\\n", " ")
    start = r"(?:(?:python3? -m|launch/\w+\.sh(?: run| babysit)?) (wsparse[.\w]*)|\bwsparse (\w+))"
    for match in re.finditer(rf"{start}((?: +[^\s`|#;&]+)*)", joined):
        module, name, arguments = match.groups()
        if module is None and name not in cli.COMMANDS:
            continue
        found.append([module or cli.COMMANDS[name][0], *re.findall(r"--\w[\w.]*(?:=\S*)?", arguments)])
    return found


def headings(text: str) -> set[str]:
    """Anchors of a document's headings, as the repository's web view makes them."""
    found = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("document", DOCUMENTS, ids=of)
def test_every_link_to_a_file_leads_to_one_and_to_a_heading_of_it(document):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text_of(document)):
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), target
        assert not anchor or anchor in headings(path.read_text()), f"{target}#{anchor}"


@pytest.fixture(scope="module")
def known(pages):
    """Options of every command."""
    return {module: pages.options(importlib.import_module(module)) for module in (*MODULES, *OTHERS)}


@pytest.mark.parametrize("document", [*DOCUMENTS, *RECIPES], ids=of)
def test_every_command_in_a_document_exists_and_has_the_options_it_is_given(document, known):
    kinds = {"wsparse.prune": "prune", "wsparse.sweep": "sweeps"}
    for module, *arguments in commands(text_of(document)):
        if module.startswith("wsparse.") and module.count(".") > 1 and module not in known:
            assert importlib.util.find_spec(module) is not None, module
            continue
        assert module in known, module
        names = {option.name for option in known[module]}
        for argument in arguments:
            name, _, value = argument.removeprefix("--").partition("=")
            if name == "help":
                continue
            option, _, key = name.partition(".")
            assert not key or module == "wsparse.prune" or key in KEYS, argument
            assert option in names or option.removeprefix("no") in names, f"{module} {argument}"
            if name == "config" and re.fullmatch(r"[\w/]+(\.py)?(:\w+)?", value) and value != "NAME":
                recipes.find(value, kinds.get(module, ""))


def test_commands_are_found_in_texts(known):
    """A control of the test above."""
    text = (
        "`wsparse prune --run=RUN --taks=x` and\npython -m wsparse.train --config=tiny \\\n    --workdir=a\n"
    )
    assert commands(text) == [
        ["wsparse.prune", "--run=RUN", "--taks=x"],
        ["wsparse.train", "--config=tiny", "--workdir=a"],
    ]
    assert "taks" not in {option.name for option in known["wsparse.prune"]}
    assert "task" in {option.name for option in known["wsparse.prune"]}


def test_links_lead_to_pages_of_the_site(pages):
    site = pages.Site(REPO, "https://example.org/wsparse")
    text = "[a](../launch/README.md) [b](circuits.md#in-a-notebook) [c](../LICENSE) [d](https://x.y)"
    assert site.relinked(text, "docs/design.md", "design.md") == (
        "[a](generated/launch.md) [b](circuits.md#in-a-notebook) "
        "[c](https://example.org/wsparse/blob/main/LICENSE) [d](https://x.y)"
    )
    moved = site.relinked("[e](docs/viewer.md) [f](configs)", "README.md", "generated/readme.md")
    assert moved == "[e](../viewer.md) [f](recipes.md)"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_a_page_for_every_recipe(tmp_path):
    pytest.importorskip("sphinx")
    folder = tmp_path / "html"
    options = ("-W", "-q", "-b", "html", "-d", tmp_path / "cache")
    done = run_python("-m", "sphinx", *options, "docs", folder, cwd=REPO)
    assert done.returncode == 0, done.stderr
    for kind in ("", "prune", "sweeps"):
        for name in recipes.names(kind):
            page = folder / "generated" / "recipes" / kind / f"{name.partition(':')[0]}.html"
            assert name in page.read_text()
    assert "min_per_neuron" in (folder / "generated" / "settings.html").read_text()
    assert "Run.prune" in (folder / "generated" / "api" / "wsparse.html").read_text()
    for command in cli.COMMANDS:
        assert f'id="wsparse-{command}"' in (folder / "generated" / "commands.html").read_text()

"""Pages of the site that are made from the package: recipes, settings, commands, modules, notebooks.

They are written into `docs/generated/`, which git ignores, so that nothing is said twice. Documents are
written for the repository's web view; here their links to files become links to pages.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import importlib
import inspect
import os
import pathlib
import re
import shutil
from typing import Any

from absl import flags

from wsparse import cli, recipes
from wsparse.circuits.settings import Settings
from wsparse.config import TrainConfig, describe, from_dict
from wsparse.sweeps import Sweep

# Documents outside of docs/ that are pages too.
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")
# Kinds of recipes: their folder in configs/, and what they are for.
KINDS = {
    "": "Models to train: `wsparse train --config=NAME`.",
    "prune": "Settings of the search for circuits: `wsparse prune --run=RUN --config=NAME`.",
    "sweeps": "Grids of models: `wsparse sweep --config=NAME`.",
}
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


@dataclasses.dataclass(frozen=True)
class Site:
    """A site of the repository in `root`.

    Attributes:
      repository: Address of the repository, for files that have no page.
    """

    root: pathlib.Path
    repository: str

    @property
    def docs(self) -> pathlib.Path:
        return self.root / "docs"

    @functools.cached_property
    def pages(self) -> dict[str, str]:
        """Pages of files and folders of the repository: path -> path below docs/."""
        found = {path: f"generated/{_stem(path)}.md" for path in DOCUMENTS}
        for path in (self.root / "notebooks").glob("*.ipynb"):
            found[f"notebooks/{path.name}"] = f"generated/notebooks/{path.name}"
        for kind in KINDS:
            found["/".join(filter(None, ("configs", kind)))] = "generated/recipes.md"
            for path in self.recipes(kind):
                found[path.relative_to(self.root).as_posix()] = f"{_recipe(path, kind)}.md"
        for module, path in self.modules.items():
            found[path] = f"generated/api/{module}.md"
        return found

    @property
    def modules(self) -> dict[str, str]:
        """Modules that docs/api.md names, with their files."""
        files = re.findall(r"\]\(\.\./(wsparse/[\w/]+\.py)\)", (self.docs / "api.md").read_text())
        return {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in files}

    def recipes(self, kind: str) -> list[pathlib.Path]:
        return sorted((self.root / "configs" / kind).glob("*.py"))

    def write(self) -> None:
        """Writes the pages that are made; those of an earlier time go."""
        folder = self.docs / "generated"
        shutil.rmtree(folder, ignore_errors=True)
        for source, page in self.pages.items():
            if source.endswith((".md", ".ipynb")):
                self._write(page, (self.root / source).read_text())
        self._write("generated/recipes.md", "".join(self._recipe_list()))
        for kind in KINDS:
            for path in self.recipes(kind):
                self._write(f"{_recipe(path, kind)}.md", "".join(recipe_page(path, kind)))
        for module in self.modules:
            self._write(f"generated/api/{module}.md", module_page(module))
        self._write("generated/settings.md", "".join(settings_page()))
        self._write("generated/commands.md", "".join(commands_page()))

    def _write(self, page: str, text: str) -> None:
        path = self.docs / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def read(self, name: str, source: list[str]) -> None:
        """Replaces the links of a page by links that lead to pages of the site."""
        page = next((page for page in self.pages.values() if os.path.splitext(page)[0] == name), f"{name}.md")
        written = next((path for path, made in self.pages.items() if made == page), f"docs/{page}")
        source[0] = self.relinked(source[0], written, page)

    def relinked(self, text: str, written: str, page: str) -> str:
        """Returns text with links for the site.

        Args:
          text: Markdown with links that are relative to `written`.
          written: File of the repository that it is from.
          page: Its page, below docs/.
        """

        def replace(match: re.Match[str]) -> str:
            target, anchor = match.group(1), match.group(2) or ""
            path = os.path.normpath(os.path.join(os.path.dirname(written), target)).replace(os.sep, "/")
            if path.startswith("docs/"):
                found = path.removeprefix("docs/")
            elif path in self.pages:
                found = self.pages[path]
            else:
                kind = "tree" if (self.root / path).is_dir() else "blob"
                return f"]({self.repository}/{kind}/main/{path}{anchor})"
            return f"]({os.path.relpath(found, os.path.dirname(page) or '.')}{anchor})"

        return _LINK.sub(replace, text)

    def _recipe_list(self) -> Iterator[str]:
        yield (
            "# Recipes\n\nA recipe is a Python file; `--config` takes its name from any folder, or the path "
            "of one of yours. A variant follows after a colon: `tiny:dense`.\n"
        )
        for kind, text in KINDS.items():
            yield f"\n## {kind.capitalize() or 'Train'}\n\n{text}\n\n| recipe | what |\n|---|---|\n"
            for path in self.recipes(kind):
                yield f"| [{path.stem}](/{_recipe(path, kind)}.md) | {_summary(path)} |\n"
        entries = [f"/{_recipe(path, kind)}\n" for kind in KINDS for path in self.recipes(kind)]
        yield f"\n```{{toctree}}\n:hidden:\n\n{''.join(entries)}```\n"


def recipe_page(path: pathlib.Path, kind: str) -> Iterator[str]:
    """Yields what a recipe's docstring says, what its variants set, and its code."""
    yield f"# `{path.stem}`\n\n{_summary(path)}\n"
    for name, text in _entries(path):
        space = "\n" if text.startswith("```") else " "
        yield f"\n**{name}:**{space}{text}\n"
    names = [f"{path.stem}:{variant}" if variant else path.stem for variant in recipes.variants(path)]
    if kind == "sweeps":
        yield from _cells(names)
    else:
        yield from _values(names, kind)
    where = "/".join(filter(None, ("/../configs", kind, path.name)))
    yield f"\n## The file\n\n```{{literalinclude}} {where}\n:language: python\n```\n"


def _values(names: Sequence[str], kind: str) -> Iterator[str]:
    """Yields a table of the keys in which recipes differ from the defaults."""
    cls: Any = Settings if kind == "prune" else TrainConfig
    rows = list(describe(cls()))
    values = [
        {key: value for key, value, _ in describe(from_dict(cls, recipes.load(name, kind).to_dict()))}
        for name in names
    ]
    changed = [row for row in rows if any(each[row[0]] != row[1] for each in values)]
    defaults = "commands.md#wsparse-prune" if kind == "prune" else "settings.md"
    yield f"\n## What it sets\n\nEverything else has [its default](/generated/{defaults}).\n\n"
    if not changed:
        yield "It sets nothing.\n"
        return
    heads = " | ".join(f"`{name}`" for name in names)
    yield f"| key | {heads} | default |\n|---|{'---|' * len(names)}---|\n"
    for key, default, _ in changed:
        cells = " | ".join(_code(each[key]) for each in values)
        yield f"| `{key}` | {cells} | {_code(default)} |\n"


def _cells(names: Sequence[str]) -> Iterator[str]:
    """Yields a table of the models that sweeps train."""
    yield "\n## What it trains\n\n| sweep | points | seeds | tasks | pruned with |\n|---|---|---|---|---|\n"
    for name in names:
        sweep = recipes.load_as(Sweep, name, "sweeps", "")
        tasks = ", ".join(f"`{task}`" for task in sweep.tasks)
        prune = f"`{sweep.prune}`" if tasks else ""
        yield (
            f"| `{name}` | {len(sweep.points)} | {', '.join(map(str, sweep.seeds))} | {tasks or 'none'} "
            f"| {prune} |\n"
        )


def _docstring(path: pathlib.Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def _summary(path: pathlib.Path) -> str:
    return _documents(_docstring(path).split("\n\n")[0].replace("\n", " "))


def _entries(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields the entries "Hardware: 2 CPU cores." of a recipe's docstring, which may go on indented."""
    for entry in re.split(r"\n(?=[A-Z][\w ]*:)", _docstring(path))[1:]:
        name, _, text = entry.partition(":")
        first, _, others = text.strip().partition("\n")
        yield name, _documents(f"{first}\n{inspect.cleandoc(others)}".strip())


def _documents(text: str) -> str:
    """Returns text whose names of documents are links, and whose lines of commands are blocks."""
    text = re.sub(r"docs/(\w+)\.md", r"[\g<0>](/\1.md)", text)
    return re.sub(
        r"(?m)(?:^python -m .*(?:\n|\Z))+", lambda lines: f"```bash\n{lines[0].rstrip()}\n```\n", text
    )


def settings_page() -> Iterator[str]:
    """Yields every key of a training config."""
    yield (
        "# Keys of a config\n\nA [recipe](recipes.md) sets some of them; on the command line each is "
        "`--config.KEY=VALUE`, as in\n`wsparse train --config=tiny --config.sparsity.density=0.03`. "
        "`wsparse train --help` prints this list.\n"
    )
    group = None
    for key, default, text in describe(TrainConfig()):
        owner = key.rpartition(".")[0]
        if owner != group:
            group = owner
            yield f"\n## {owner or 'Training'}\n\n| key | default | meaning |\n|---|---|---|\n"
        yield f"| `{key}` | {_code(default)} | {_plain(text)} |\n"


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a command."""

    name: str
    default: str
    text: str


def options(module: Any) -> list[Option]:
    """Returns the options of a command's module, and leaves none of them defined."""
    define: Callable[[], None] = getattr(module, "define_flags", None) or module._define_flags
    before = set(flags.FLAGS)
    define()
    found = []
    for name in (name for name in flags.FLAGS if name not in before):
        flag = flags.FLAGS[name]
        # A switch is off, if nothing else is said.
        default = "" if flag.default in (None, False) else flag.default_as_str.strip("'")
        found.append(Option(name, default, flag.help or ""))
    for option in found:
        delattr(flags.FLAGS, option.name)
    return found


def commands_page() -> Iterator[str]:
    """Yields every command with its options."""
    yield (
        "# Commands\n\n`wsparse NAME` and `python -m MODULE` are the same command; `--help` lists its "
        "options. A list is `a,b`; a switch is `--name`, and `--noname` turns it off.\n"
    )
    for name, (path, summary) in cli.COMMANDS.items():
        module = importlib.import_module(path)
        yield f"\n## wsparse {name}\n\n{summary} `python -m {path}`\n\n"
        yield "| option | default | meaning |\n|---|---|---|\n"
        for option in options(module):
            default = f"`{option.default}`" if option.default else ""
            yield f"| `--{option.name}` | {default} | {_plain(option.text)} |\n"


def module_page(name: str) -> str:
    """Returns a page of a module: its own docstring as the Markdown that it is, and those of its members."""
    text = inspect.getdoc(importlib.import_module(name)) or ""
    return f"# `{name}`\n\n{text}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n"


def without_docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Leaves out the docstring of a module, which `module_page` has."""
    if what == "module":
        lines.clear()


def is_foreign(app: Any, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Returns whether a member is another package's and to be skipped; None leaves it to autodoc."""
    module = getattr(value, "__module__", None) or "wsparse"
    return None if module.startswith("wsparse") else True


def _recipe(path: pathlib.Path, kind: str) -> str:
    """Returns the name of a recipe's page."""
    return "/".join(filter(None, ("generated/recipes", kind, path.stem)))


def _stem(path: str) -> str:
    """Returns the name of a document's page: "launch" for launch/README.md."""
    return path.removesuffix(".md").lower().removesuffix("/readme")


def _code(value: Any) -> str:
    return f"`{value:g}`" if isinstance(value, float) else f"`{value!r}`".replace("|", "\\|")


def _plain(text: str) -> str:
    """Returns text for a cell of a table, in which only what stands between backticks is code."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(re.sub(r"([<*])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))

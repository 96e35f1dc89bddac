"""Recipes: training configs in Python files, found by path or by name.

`--config=configs/tiny.py`, `--config=tiny`, `--config=gao:475m`: a recipe is a file that defines
`get_config()`, or `get_config(variant)` together with `VARIANTS`, the names that may follow a colon. Those
of this repository's `configs/` are part of the installed package and are found from any folder.
"""

from __future__ import annotations

from collections.abc import Iterator
import importlib.util
import inspect
import logging
import pathlib
import re
import traceback
from types import ModuleType
from typing import Any, TypeVar

from absl import flags
import ml_collections
from ml_collections import config_flags

from wsparse.config import TrainConfig, from_dict
from wsparse.errors import UserError, closest

# Flags of `define_flag` are its caller's, see `wsparse.command`.
flags.disclaim_key_flags()

log = logging.getLogger(__name__)
T = TypeVar("T")


def folder() -> pathlib.Path:
    """Returns the folder of the recipes: in an installed package, or in a checkout of the repository."""
    package = pathlib.Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names(kind: str = "") -> Iterator[str]:
    """Yields the names of all recipes of a kind (a folder of `configs/`), "gao:475m" for a variant."""
    for path in sorted((folder() / kind).glob("*.py")):
        yield from (f"{path.stem}:{variant}" if variant else path.stem for variant in variants(path))


def variants(path: pathlib.Path) -> tuple[str, ...]:
    """Returns what may follow a recipe's name; "" stands for the name alone."""
    module = _module(path)
    known = tuple(getattr(module, "VARIANTS", ()))
    return known if _needs_variant(module) else ("", *known)


def find(name: str, kind: str = "") -> str:
    """Returns the path of a recipe, with its variant after a colon.

    Args:
      name: A path, or the name of a recipe of this package, with or without a variant.
      kind: Folder of `configs/` to search for names.

    Raises:
      UserError: There is no such recipe.
    """
    path, colon, variant = name.partition(":")
    if path.endswith(".py") and pathlib.Path(path).is_file():
        return name
    root = folder() / kind
    stem = re.sub(r"\.py$", "", path).removeprefix("configs/").removeprefix(f"{kind}/")
    if (root / f"{stem}.py").is_file():
        return f"{root / stem}.py{colon}{variant}"
    # Variants used to be files of their own: configs/gao.py:475m.
    base, _, old_variant = stem.partition("_")
    if (root / f"{base}.py").is_file() and old_variant in variants(root / f"{base}.py"):
        log.info(f"--config={name} is --config={base}:{old_variant} now")
        return f"{root / base}.py:{old_variant}"
    known = list(names(kind))
    near = closest(stem, known)
    raise UserError(f"--config={name}: no such file, and not a recipe{near}; recipes are {', '.join(known)}")


def load(name: str, kind: str = "") -> ml_collections.ConfigDict:
    """Returns what the recipe of a name or path says.

    Raises:
      UserError: There is no such recipe or variant, or its code does not return a ConfigDict.
    """
    return load_as(ml_collections.ConfigDict, name, kind, "wsparse.config.recipe makes one")


def load_as(cls: type[T], name: str, kind: str, hint: str) -> T:
    """Returns what the recipe of a name or path says, which must be of a class; see `load`."""
    path, _, variant = find(name, kind).partition(":")
    module = _module(pathlib.Path(path))
    known = getattr(module, "VARIANTS", None)
    if (variant or _needs_variant(module)) and known is not None and variant not in known:
        raise UserError(
            f"--config={name}: {path} has no variant {variant!r}{closest(variant, known)}; "
            f"write {pathlib.Path(path).stem}:VARIANT with one of {', '.join(known)}"
        )
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} does not define get_config(): see configs/tiny.py for a recipe")
    try:
        config = module.get_config(*([variant] if variant else []))
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = f"{path}:{frames[-1].lineno}" if frames else path
        kind_of_error = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{line}: {kind_of_error}{error}") from error
    if not isinstance(config, cls):
        raise UserError(
            f"{path}: get_config() must return a {cls.__name__} ({hint}), got {type(config).__name__}"
        )
    return config


def define_flag(default: str | None = None, *, text: str = "Recipe to use", kind: str = "") -> None:
    """Defines `--config` and, for every key of the recipe, `--config.key`."""
    holder = config_flags.DEFINE_config_file("config", None, f"{text}: a name, such as tiny, or a path.")
    flags.FLAGS["config"].parser = _Parser(kind)
    flags.set_default(holder, default)


def from_flag() -> tuple[str, TrainConfig]:
    """Returns the name and the config that `--config` and its overrides give.

    The name is fit for files: "gao_475m" for configs/gao.py:475m.

    Raises:
      UserError: The flag is missing, or a value is refused by the config.
    """
    values: Any = flags.FLAGS["config"].value
    if values is None:
        raise UserError("--config is missing: give a recipe, such as --config=tiny, or its path")
    path, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    stem = pathlib.Path(path).stem
    return f"{stem}_{variant}" if variant else stem, from_dict(TrainConfig, values)


class _Parser(flags.ArgumentParser):
    """Reads recipes by path or name, with this module's messages."""

    def __init__(self, kind: str):
        super().__init__()
        self._kind = kind

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        return load(argument, self._kind).lock()

    def flag_type(self) -> str:
        return "recipe"


def _module(path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    return module


def _needs_variant(module: ModuleType) -> bool:
    if not (hasattr(module, "get_config") and hasattr(module, "VARIANTS")):
        return False
    (parameter,) = inspect.signature(module.get_config).parameters.values()
    return parameter.default is parameter.empty

"""Files: written so that a reader sees the old one or the new one, read with clear errors."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import shutil
import socket
from typing import Any

from wsparse.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A temporary path beside `path`, with its suffix, that takes its place when the block ends well."""
    path = pathlib.Path(path)
    # Processes on different machines may write to one folder, and have the same number.
    writer = f"{socket.gethostname()}.{os.getpid()}"
    part = path.with_name(f".{path.stem}.{writer}.tmp{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def cannot_write(path: str | os.PathLike[str], error: BaseException | str) -> UserError:
    """Returns the error for a file or folder that could not be written, with the space that is left."""
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(f"cannot write {path}: {reason}{_space_left(pathlib.Path(path))}")


def _space_left(path: pathlib.Path) -> str:
    for folder in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB free in {folder})"
    return ""


def make_folder(
    path: str | os.PathLike[str], *, shown: str | os.PathLike[str] | None = None
) -> None:
    """Make a folder where there is none; UserError when that cannot be, which names `shown` instead."""
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {shown or path}: {error.strerror}") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented JSON."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values

"""Files: written so that a reader sees the old one or the new one, read and refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import socket
from typing import Any

from wsparse import errors
from wsparse.errors import UserError

# Errors of a write for which more space is the remedy.
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], *, durable: bool = False, part: pathlib.Path | None = None
) -> Iterator[pathlib.Path]:
    """Yields a temporary path, with the suffix of `path`, that takes its place when the block ends well.

    Args:
      path: File to write.
      durable: Whether the content reaches the disk first, so that it survives a power cut.
      part: Temporary path; by default one beside `path` that no other process uses.

    Raises:
      UserError: The file cannot be written; the message says how much space is left, where that may be why.
    """
    path = pathlib.Path(path)
    part = part or _temporary(path)
    try:
        yield part
        if durable:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `path` that becomes `path` when the block ends well.

    Where another process has made `path` meanwhile, its folder stays and this one is dropped.

    Args:
      path: Folder to make; it does not exist, or is empty.

    Raises:
      UserError: The folder cannot be written.
    """
    path = pathlib.Path(path).absolute()
    part, made = _temporary(path), not path.parent.exists()
    make_folder(part, shown=path)
    try:
        yield part
        try:
            os.replace(part, path)
        except OSError as error:
            if not (path.is_dir() and any(path.iterdir())):
                raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if made:
            # What failed leaves nothing behind; a folder that holds something stays.
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _temporary(path: pathlib.Path) -> pathlib.Path:
    # Processes on different machines may write to one folder, and have the same number.
    return path.with_name(f".{path.stem}.{socket.gethostname()}.{os.getpid()}.tmp{path.suffix}")


def cannot_write(path: str | os.PathLike[str], error: BaseException | str) -> UserError:
    """Returns the error for a file or folder not written, with the space left where that may be why."""
    reason = getattr(error, "strerror", None) or errors.reason(error)
    # Errors of libraries, such as orbax's, have no number: space may be why.
    may_be_space = getattr(error, "errno", None) in (None, *OUT_OF_SPACE)
    space = _space_left(pathlib.Path(path)) if may_be_space else ""
    return UserError(f"cannot write {path}: {reason}{space}")


def _space_left(path: pathlib.Path) -> str:
    for folder in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            if not folder.is_dir():
                continue
            return f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB free in {folder})"
    return ""


def check_writable(folder: pathlib.Path, what: str) -> None:
    """Checks, before long work, that what comes of it can be written.

    Args:
      folder: Directory that is written to.
      what: What is written, for the message.

    Raises:
      UserError: It cannot be.
    """
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {what}: {folder} is not a writable directory")


def check_output(path: pathlib.Path) -> None:
    """Checks, before long work, that a file can be written.

    Raises:
      UserError: The path is a directory, or the one that it is in cannot be written to.
    """
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory; give the name of a file")
    check_writable(path.absolute().parent, str(path))


def check_new_folder(out: pathlib.Path) -> None:
    """Raises a UserError if the folder `--out` cannot be made, because something is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists and is not empty: choose another folder")


def make_folder(path: str | os.PathLike[str], *, shown: str | os.PathLike[str] | None = None) -> None:
    """Makes a folder, and those above it, where there is none.

    Args:
      path: Folder to make.
      shown: Folder to name in the message instead.

    Raises:
      UserError: The folder cannot be made.
    """
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {shown or path}: {error.strerror}") from error


def write_text(
    path: str | os.PathLike[str], text: str, *, durable: bool = False, part: pathlib.Path | None = None
) -> None:
    """Writes text in UTF-8; see `replacing`."""
    with replacing(path, durable=durable, part=part) as part:
        part.write_text(text, encoding="utf-8")


def write_json(
    path: str | os.PathLike[str], value: Any, *, durable: bool = False, part: pathlib.Path | None = None
) -> None:
    """Writes a value as indented JSON; see `replacing`."""
    write_text(path, json.dumps(value, indent=2) + "\n", durable=durable, part=part)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
      UserError: The file cannot be read, or holds something else.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{path} cannot be read: {reason}") from error
    return parse_json(text, str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Returns the JSON object that `text` holds.

    Args:
      text: Text to parse.
      where: Name of the place for messages, such as "data.jsonl:3".

    Raises:
      UserError: `text` is not JSON or not an object, is nested too deep, or has a number of too many digits.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" + (f" of line {error.lineno}" if error.lineno > 1 else "")
        raise UserError(f"{where}: not JSON: {error.msg} at {place}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not JSON in UTF-8") from error
    except RecursionError as error:
        raise UserError(f"{where}: its JSON is nested too deep") from error
    except ValueError as error:
        raise UserError(f"{where}: a number in its JSON has too many digits") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a JSON object, got {type(values).__name__}")
    return values


def sha256(path: str | os.PathLike[str]) -> str:
    """Returns the hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

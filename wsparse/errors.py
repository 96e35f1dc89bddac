"""Errors that a user can correct, each told in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import contextlib
import difflib
import importlib
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave: a config, a file, an option.

    The message says what must hold, what arrived and what to change. Commands print it alone, without
    a traceback, and leave with status 2.
    """


class MissingKeyError(UserError, KeyError):
    """A key that a mapping does not have, for which `get` returns its default."""

    # That of KeyError quotes the message.
    __str__ = UserError.__str__


@contextlib.contextmanager
def located(before: str, after: str = "") -> Iterator[None]:
    """Puts text around the message of a UserError that the block raises, such as the file it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{before}{error}{after}") from error


def quoted(text: object) -> str:
    """Returns a file's own text as it may stand in a message: short, and nothing that a terminal obeys."""
    return ascii(str(text)[:80])


def reason(error: object) -> str:
    """Returns the first line of an error's message, or the error's type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def closest(name: str, valid: Iterable[str]) -> str:
    """Returns `" (did you mean 'x'?)"` with the nearest valid name, or `""` when none is near."""
    near = difflib.get_close_matches(name[:80], list(valid), n=1)
    return f" (did you mean {quoted(near[0])}?)" if near else ""


def missing_extra(package: str, extra: str, purpose: str) -> UserError:
    """The error for an optional package that is not installed."""
    return UserError(f"{purpose} needs the package {package!r}: pip install 'wsparse[{extra}]'")


def optional(package: str, extra: str, purpose: str) -> Any:
    """Imports and returns an optional package; raises `missing_extra` where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing_extra(package, extra, purpose) from error

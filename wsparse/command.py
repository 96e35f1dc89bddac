"""How every command begins and ends: flags, log lines, signals, and mistakes told in one line.

A module that is a command defines its flags and ends in `run_command(main)`. What it reports it logs
(`log = logging.getLogger(__name__)`, `log.info(...)`); here the lines get their way to stdout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import logging
import math
import os
import re
import signal
import sys
import typing
from typing import Any, NoReturn

from absl import app, flags
import absl.logging
from tqdm import tqdm

from wsparse import files, signals
from wsparse.errors import UserError


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Parse the flags, run a command's `main(argv)`, and exit with the status it returns.

    A `UserError`, a flag that cannot be parsed, or an error of the operating system becomes one line on
    stderr and exit status 2; SIGINT and SIGTERM become one line and 130 or 143. Loggers of this package
    print to stdout. Those of libraries are hidden unless the user asks for them with `--verbosity`.
    """

    def guarded(argv: Sequence[str]) -> None:
        _check_flags(argv)
        if not flags.FLAGS["verbosity"].present:
            _hush_libraries()
        sys.exit(_run(main, argv))

    signals.handle(signals.unwind)
    sys.unraisablehook = signals.unraisable
    try:
        with log_to_stdout():
            app.run(guarded, flags_parser=_parse)
    except KeyboardInterrupt as interrupt:
        signals.leave(getattr(interrupt, "number", signal.SIGINT))
    finally:
        signals.handle(signals.leave)


# Flags of `define_fields` are its caller's: `--help` shows those of the command's own module.
flags.disclaim_key_flags()

_DEFINE: dict[type, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    tuple: flags.DEFINE_list,
}


def define_fields(cls: type, about: str = "") -> None:
    """Defines a flag for every field of a dataclass that has `config.setting`'s help.

    A field without a default is a flag that must be given; what a default of None means, its help says.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default, text = field.default, f"{about}{field.metadata['help']}"
        kind = type(default)
        if kind in _DEFINE:
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            text += f" Default: {shown!r}."
        else:
            hint = hints[field.name]
            kind = next(kind for kind in (hint, *typing.get_args(hint)) if kind in _DEFINE)
        _DEFINE[kind](field.name, None, text, required=default is dataclasses.MISSING)


def given_fields(cls: type) -> dict[str, Any]:
    """Returns the values of the flags of `define_fields` that were given."""
    values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if value is not None}


class _TqdmHandler(logging.Handler):
    """Prints messages to stdout, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            raise
        except Exception:
            self.handleError(record)


def _hush_libraries() -> None:
    """Hide what libraries log and complain of; their errors reach us as exceptions."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    for name in ("jax", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # After a failed save, orbax's unawaited writes are collected with an error each.
    sys.unraisablehook = functools.partial(signals.unraisable, quiet=True)


@contextlib.contextmanager
def log_to_stdout() -> Iterator[None]:
    """Print what this package logs, the message alone, while the block runs."""
    log, handler = logging.getLogger("wsparse"), _TqdmHandler()
    before = log.level, log.propagate
    log.addHandler(handler)
    # A module run as a command has the name `__main__`.
    main = logging.getLogger("__main__")
    main.parent = log
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]
        main.parent = logging.root


class _Help(app.HelpFlag):
    """`-h`, beside absl's own `--help`."""

    NAME, SHORT_NAME = "h", None


def _parse(argv: Sequence[str]) -> list[str]:
    app.define_help_flags()
    if _Help.NAME not in flags.FLAGS:
        flags.DEFINE_flag(_Help())
    try:
        return flags.FLAGS(argv)
    except SystemExit as end:
        # A flag that shows help leaves with status 1, as if that were a failure.
        sys.exit(0 if end.code == 1 else end.code)
    except UserError as error:
        _fail(str(error))
    except Exception as error:
        _fail(_flag_error(error))


def _flag_error(error: Exception) -> str:
    """Returns what went wrong while flags were parsed, in one line."""
    # An unknown key comes as the repr of a KeyError's message.
    text = " ".join(str(error).replace("\\'", "'").replace("\\n", " ").split())
    if unknown := re.fullmatch(r"""["']+(\w+)'( Did you mean "(\w+)".*)?["']?""", text):
        nearest = f" (did you mean {unknown[3]!r}?)" if unknown[3] else ""
        return f"unknown config key {unknown[1]!r}{nearest}"
    # absl wraps what a flag's parser raises.
    return str(error.__context__) if isinstance(error.__context__, UserError) else f"{text}; see --help"


def _check_flags(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}: options are written --name=value")
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value):
            _fail(f"--{name} must be a finite number, got {value}")


def _run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    try:
        return main(argv) or 0
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:
        # The reader of a pipe has seen enough; nothing may be flushed into it at the end.
        os._exit(128 + signal.SIGPIPE)
    except OSError as error:
        if flags.FLAGS.verbosity > 0:
            raise
        if error.errno in files.OUT_OF_SPACE:
            _fail(str(files.cannot_write(error.filename or _destination(), error)))
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")


def _destination() -> str:
    """Returns where a command writes: a write that fails does not know its file."""
    names = ("out", "workdir", "run")
    values = (flags.FLAGS[name].value for name in names if name in flags.FLAGS)
    return next((str(value) for value in values if value), ".")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

"""What a user did wrong, said in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import difflib
import re
import sys
import traceback
from typing import NoReturn

from absl import app, flags, logging


class UserError(ValueError):
    """A mistake in what the user gave: a config, a file, an option.

    The message says what must hold, what arrived and what to change. Commands print it alone, without
    a traceback, and leave with status 2.
    """


def quoted(text: object) -> str:
    """Returns a file's own text as it may stand in a message: short, and nothing that a terminal obeys."""
    return ascii(str(text)[:80])


def closest(name: str, valid: Iterable[str]) -> str:
    """Returns `" (did you mean 'x'?)"` with the nearest valid name, or `""` when none is near."""
    near = difflib.get_close_matches(name[:80], list(valid), n=1)
    return f" (did you mean {quoted(near[0])}?)" if near else ""


def missing_extra(package: str, extra: str, purpose: str) -> UserError:
    """The error for an optional package that is not installed."""
    return UserError(f"{purpose} needs the package {package!r}: pip install 'wsparse[{extra}]'")


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Parse the flags, run a command's `main(argv)` and exit with the status it returns.

    A `UserError`, or a flag that cannot be parsed, becomes one line on stderr and exit status 2. The
    libraries' own log lines are hidden unless the user asks for them with `--verbosity`.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except UserError as error:
            _fail(str(error))
        except SyntaxError as error:
            _fail(f"{error.filename}:{error.lineno}: {error.msg}")
        except Exception as error:
            # A recipe is Python, and is run while flags are parsed: whatever it raises ends here.
            _fail(_flag_error(error))

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}: options are written --name=value")
        try:
            status = main(argv)
        except UserError as error:
            _fail(str(error))
        sys.exit(status or 0)

    app.run(guarded, flags_parser=parse)


def run_plain(main: Callable[[], None]) -> None:
    """Run a command that parses its own arguments; a `UserError` becomes one line and exit status 2."""
    try:
        main()
    except UserError as error:
        _fail(str(error))


def _flag_error(error: Exception) -> str:
    """What went wrong while flags were parsed, with the recipe's line where it went wrong there."""
    # An unknown key comes as the repr of a KeyError's message.
    text = " ".join(str(error).replace("\\'", "'").replace("\\n", " ").split())
    if unknown := re.fullmatch(r"""["']+(\w+)'( Did you mean "(\w+)".*)?["']?""", text):
        nearest = f" (did you mean {unknown[3]!r}?)" if unknown[3] else ""
        return f"unknown config key {unknown[1]!r}{nearest}"
    if "has no attribute 'get_config'" in text:
        return "the recipe of --config defines no get_config(); see configs/tiny.py for one"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if frame.name == "get_config":
        return f"{frame.filename}:{frame.lineno}: {type(error).__name__}: {text}"
    return f"{text}; see --help"


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

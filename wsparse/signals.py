"""SIGINT and SIGTERM: a command ends in one line, with the status of the signal, at any moment."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import os
import signal
import sys
from typing import Any, NoReturn


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; unwinds like Ctrl-C, so that files and leases are left in order."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def leave(number: int, frame: Any = None) -> NoReturn:
    """End the process at once, with one line and without the interpreter's shutdown.

    A handler for the time before and after a command runs. Threads of libraries may still be at work then,
    and some do not survive their interpreter.
    """
    del frame
    name = signal.Signals(number).name
    print(f"{name}: stopped; run the same command again to go on", file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(128 + number)


def unwind(number: int, frame: Any) -> NoReturn:
    """Raise `Interrupted`, while a command runs; a second signal ends the process."""
    del frame
    handle(signal.SIG_DFL)
    raise Interrupted(number)


def handle(handler: Callable[..., Any] | signal.Handlers = leave) -> None:
    """Install a handler for both signals."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # A shell that starts a command in the background has SIGINT ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def unraisable(lost: Any, *, quiet: bool = False) -> None:
    """Python's hook for an exception that nothing can catch, in a destructor or a callback of C.

    Args:
      lost: The exception and where it was; an `Interrupted` is raised again as soon as it can be caught.
      quiet: Whether others are passed over.
    """
    if isinstance(lost.exc_value, Interrupted):
        number = lost.exc_value.number
        signal.signal(signal.SIGALRM, lambda *_: unwind(number, None))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    elif not quiet:
        sys.__unraisablehook__(lost)

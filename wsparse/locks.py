"""A lock on a folder, so that two commands do not write to it at once.

The lock is a file that names its holder (host and process) and is locked with `flock`, which ends with the
process, however it ends. Where a file system keeps such locks from other machines, a counter that the holder
moves on every few seconds shows that it is alive.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
from typing import Any

from wsparse import files
from wsparse.errors import UserError

log = logging.getLogger(__name__)

# Seconds between two signs of life, and how long a holder on another machine may be without one.
_BEAT, _PATIENCE = 5.0, 30.0


class Held(UserError):
    """Another process holds the lock."""


@contextlib.contextmanager
def hold(folder: pathlib.Path, work: str, *, name: str = ".lock") -> Iterator[None]:
    """Hold the lock of an existing folder while the block runs.

    Args:
      folder: Folder that is written to.
      work: What the holder does, such as "training", for the message to others.
      name: Name of the lock's file in the folder.

    Raises:
      Held: Another process holds it; its host, number and work are named.
      UserError: The file cannot be written.
    """
    path = folder / name
    file = _acquire(path)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "work": work}
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(file, holder, ended), daemon=True)
    try:
        try:
            _write(file, holder, 0)
        except OSError as error:
            raise files.cannot_write(path, error) from error
        thread.start()
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
        # Gone before it is released: whoever opened it meanwhile notices that it is not the lock any more.
        path.unlink(missing_ok=True)
        os.close(file)


def is_held(folder: pathlib.Path, *, name: str = ".lock") -> bool:
    """Returns whether a process is known to hold the lock of a folder; those of other machines may not be."""
    try:
        file = os.open(folder / name, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def _acquire(path: pathlib.Path) -> int:
    """Returns the open file of the lock."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise files.cannot_write(path, error) from error
        try:
            _lock(file, path)
        except BaseException:
            os.close(file)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file).st_ino:
                return file
        os.close(file)


def _lock(file: int, path: pathlib.Path) -> None:
    locked = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _refusal(path, _read(path)) from error
    except OSError:
        # This file system has no such locks: the counter alone must do.
        locked = False
    holder = _read(path)
    if holder and not (locked and holder.get("host") == socket.gethostname()):
        log.info(
            "%s is held by process %s on %s: watching for %.0f s whether it is alive",
            path, holder.get("pid"), holder.get("host"), _PATIENCE,
        )  # fmt: skip
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            time.sleep(_PATIENCE / 30)
            if (now := _read(path)) and now != holder:
                raise _refusal(path, now)


def _refusal(path: pathlib.Path, holder: dict[str, Any]) -> Held:
    return Held(
        f"{path.parent} is in use: process {holder.get('pid', '?')} on {holder.get('host', '?')} is "
        f"{holder.get('work', 'working')} there; wait for it, or stop it"
    )


def _beat(file: int, holder: dict[str, Any], ended: threading.Event) -> None:
    count = 0
    while not ended.wait(_BEAT):
        count += 1
        # Without it the lock still holds on this machine.
        with contextlib.suppress(OSError):
            _write(file, holder, count)


def _write(file: int, holder: dict[str, Any], count: int) -> None:
    text = json.dumps(holder | {"beat": f"{count:012}"}) + "\n"
    os.pwrite(file, text.encode(), 0)
    os.ftruncate(file, len(text.encode()))
    # A bucket that is mounted shows an open file to other machines only then.
    os.fsync(file)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return files.read_json(path)
    except UserError:
        # It was released, or its holder has not written its name yet.
        return {}

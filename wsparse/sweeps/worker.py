"""The process of one cell: `wsparse.sweep` starts it, and gives it the cell as a line of JSON on stdin.

A cell has a process of its own, since what JAX compiles and keeps for one model is of no use to the next, and
since a model that needs too much memory should end its own cell alone. When the pipe is closed the parent has
left, whatever way, and the worker saves and leaves as after SIGTERM.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import logging
import os
import pathlib
import signal
import sys
import threading
from typing import Any

from wsparse import files, locks, prune, train
from wsparse.circuits import tasks as task_lib
from wsparse.command import run_command
from wsparse.config import from_dict, to_dict
from wsparse.errors import UserError
from wsparse.ops import cpu
from wsparse.sweeps import records
from wsparse.sweeps.grid import Cell

log = logging.getLogger(__name__)

# Exit status where another worker has the cell.
BUSY = 75
RESULT, LOCK = "cell.json", ".cell.lock"


def result(own: pathlib.Path, cell: Cell) -> dict[str, Any] | None:
    """Returns the record of a cell whose folder says that it is finished, else None."""
    path = own / RESULT
    if not path.exists():
        return None
    values = files.read_json(path)
    return values["record"] if _is_of(values["cell"], cell) else None


def _is_of(made: dict[str, Any], cell: Cell) -> bool:
    try:
        return from_dict(Cell, made) == cell
    except UserError:
        return False


def run(folder: pathlib.Path, cell: Cell) -> int:
    """Trains, prunes and scores a cell, as far as that is not done, and returns the exit status.

    Raises:
      UserError: A command refuses the cell, or its folder cannot be written.
    """
    files.make_folder(folder)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.hold(folder, "computing this cell", name=LOCK))
        except locks.Held as error:
            log.info("%s", error)
            return BUSY
        if status := train.run(cell.config, folder):
            return status
        if cell.settings is not None:
            prune.run(folder, [task_lib.find(name) for name in cell.tasks], cell.settings)
        record = records.read(folder, pairs=cell.pairs, chosen=cell.tasks)
        files.write_json(folder / RESULT, {"cell": to_dict(cell), "record": record})
    return 0


def _leave_with_parent() -> None:
    # A buffered read would hold a lock that the interpreter needs at its end.
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: Sequence[str]) -> int:
    """Run the cell that stdin says."""
    del argv
    job = files.parse_json(sys.stdin.readline(), "stdin")
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    cpu.enable()
    return run(pathlib.Path(job["folder"]), from_dict(Cell, job["cell"]))


if __name__ == "__main__":
    run_command(main)

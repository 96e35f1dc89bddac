"""Train a grid of models, and prune them: `python -m wsparse.sweep --config=configs/sweeps/frontier.py`.

A sweep file has the points of a grid, seeds, tasks to find circuits of, and plots. Every cell (a point with
a seed) becomes a run folder in runs/sweeps/NAME/, by a process of its own whose output is `log.txt` there.
What is finished is not done again, and an interrupted cell goes on. Start the same line as often as you like,
on all machines that see the folder: the workers share the cells.

`results.csv`, `results.json`, `table.txt` and the plots beside them are rewritten after every cell.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import dataclasses
import json
import logging
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

from absl import flags

from wsparse import files, locks, metrics, recipes, train
from wsparse.command import run_command
from wsparse.config import to_dict
from wsparse.errors import UserError
from wsparse.progress import duration
from wsparse.sweeps import grid, report, worker
from wsparse.sweeps.grid import Cell, Sweep

log = logging.getLogger(__name__)

# Seconds between looks at what other workers have left.
_POLL = 10.0
_FAILURE, _LOG = "failed.txt", "log.txt"
# Exit statuses of a process that was told to stop.
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def run(sweep: Sweep, folder: pathlib.Path, *, retry: bool = False) -> int:
    """Computes the cells of a sweep that are not finished, and returns 0 if all of them are then, else 1.

    Args:
      folder: Folder of the sweep.
      retry: Whether cells are tried again that failed in an earlier call.

    Raises:
      UserError: A cell is refused, or its folder holds another run.
    """
    cells = grid.cells(sweep)
    for cell in cells:
        train.refuse_other(folder / cell.name, cell.config)
        if retry:
            (folder / cell.name / _FAILURE).unlink(missing_ok=True)
    files.make_folder(folder)
    # Cells whose process was told to stop, though this one was not; and how many were last waited for.
    stopped: set[str] = set()
    told = 0
    while left := [cell for cell in cells if cell.name not in stopped and _is_left(folder, cell)]:
        n_busy = 0
        for cell in left:
            status = _begin(folder, cell, cells)
            if status == worker.BUSY:
                n_busy += 1
                continue
            if status in _STOPPED:
                stopped.add(cell.name)
            report.write(folder, sweep, _results(folder, cells))
        if n_busy == len(left):
            if n_busy != told:
                log.info("cells with other workers: %d; waiting for them, in case one dies", n_busy)
            told = n_busy
            time.sleep(_POLL)
    results = _results(folder, cells)
    log.info("%s\nwritten to %s", report.write(folder, sweep, results), folder)
    if missing := len(cells) - len(results):
        log.info("%d cells are missing: see their log.txt; --retry tries failed ones again", missing)
    return int(missing > 0)


def _results(folder: pathlib.Path, cells: Sequence[Cell]) -> report.Results:
    found = [(cell, worker.result(folder / cell.name, cell)) for cell in cells]
    return [(cell, record) for cell, record in found if record is not None]


def _is_left(folder: pathlib.Path, cell: Cell) -> bool:
    own = folder / cell.name
    return not (own / _FAILURE).exists() and worker.result(own, cell) is None


def _begin(folder: pathlib.Path, cell: Cell, cells: Sequence[Cell]) -> int:
    """Computes a cell, unless another worker does or did meanwhile, and returns its process's exit status."""
    own, started = folder / cell.name, time.monotonic()
    if locks.is_held(own, name=worker.LOCK):
        return worker.BUSY
    if not _is_left(folder, cell):
        return 0
    log.info("[%d/%d] %s", cells.index(cell) + 1, len(cells), cell.name)
    status = _process(own, cell)
    if status == worker.BUSY:
        log.info("  another worker has it")
    elif record := worker.result(own, cell):
        log.info("  %s, %s", report.line(record), duration(time.monotonic() - started))
    elif status in _STOPPED:
        log.info("  its process was stopped")
    else:
        # The last line is the command's own.
        lines = (own / _LOG).read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "").removeprefix("error: ")
        reason = f"killed by {signal.Signals(-status).name}" if status < 0 else said
        files.write_text(own / _FAILURE, f"{reason}\n")
        log.info("  failed: %s", reason)
    return status


def _process(folder: pathlib.Path, cell: Cell) -> int:
    """Runs a cell's process to its end, or, when this one is interrupted, until it has saved."""
    files.make_folder(folder)
    with (folder / _LOG).open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", worker.__name__],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, text=True,
            # Ctrl-C is for this process; the other sees its pipe closed, once.
            start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        try:
            # A process that died at once is known by its status.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps({"folder": str(folder), "cell": to_dict(cell)}) + "\n")
                process.stdin.flush()
            return process.wait()
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()


def listing(sweep: Sweep, folder: pathlib.Path) -> str:
    """Returns a line for each cell with its state; computes nothing."""
    cells = grid.cells(sweep)
    width = max(len(cell.name) for cell in cells)
    lines = [f"{cell.name:<{width}}  {_state(folder / cell.name, cell)}" for cell in cells]
    tasks = f"; pruned for {len(cells[0].tasks)} tasks" if cells[0].tasks else ""
    return "\n".join([f"{len(cells)} cells in {folder}{tasks}", *lines])


def _state(own: pathlib.Path, cell: Cell) -> str:
    if record := worker.result(own, cell):
        return report.line(record)
    if (own / _FAILURE).exists():
        return f"failed: {(own / _FAILURE).read_text(encoding='utf-8').strip()}"
    if not (own / "config.json").exists():
        return "new"
    steps = [record["step"] for record in metrics.read(own)] if (own / "metrics.jsonl").exists() else []
    held = "running" if locks.is_held(own, name=worker.LOCK) else "interrupted"
    return f"{held}, step {max(steps, default=0)} of {cell.config.steps}"


def main(argv: Sequence[str]) -> int:
    """Run the command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    sweep = recipes.load_as(Sweep, options.config, "sweeps", "from wsparse.sweeps import Sweep")
    if options.seeds is not None:
        try:
            sweep = dataclasses.replace(sweep, seeds=tuple(map(int, options.seeds)))
        except ValueError as error:
            raise UserError(f"--seeds must be whole numbers separated by commas: {error}") from error
    name = pathlib.Path(options.config.partition(":")[0]).stem
    variant = options.config.partition(":")[2]
    folder = pathlib.Path(options.workdir or f"runs/sweeps/{name}{'_' * bool(variant)}{variant}")
    if options.list:
        log.info("%s", listing(sweep, folder))
        return 0
    return run(sweep, folder, retry=options.retry)


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_string("config", None, "Sweep: a name, such as frontier, or a path.", required=True)
    flags.DEFINE_string("workdir", None, "Folder of the sweep; runs/sweeps/NAME for the sweep NAME.")
    flags.DEFINE_list("seeds", None, "Seeds in place of the sweep's, such as 0,1,2.")
    flags.DEFINE_bool("list", False, "Only check the sweep, and show its cells and their state.")
    flags.DEFINE_bool("retry", False, "Try cells again that failed before.")


if __name__ == "__main__":
    define_flags()
    run_command(main)

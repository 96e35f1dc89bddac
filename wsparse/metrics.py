"""Where numbers go: `metrics.jsonl`, TensorBoard events, trackers, and `curves.png`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import itertools
import json
import logging
import math
import pathlib
from typing import Any

from wsparse import files, plots
from wsparse.errors import UserError, reason
from wsparse.trackers import Tracker

log = logging.getLogger(__name__)

_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records to `metrics.jsonl`, TensorBoard events and trackers; use as a context manager.

    Records after `start_step`, of a run that got further than its last checkpoint, are removed. A tracker
    that fails while training runs is told of and left out: it must not cost the run.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int, trackers: Sequence[Tracker] = ()):
        import tensorboardX  # Only training needs it.

        self._trackers = list(trackers)
        self._path = workdir / _FILE
        kept = [record for record in read(workdir) if record["step"] <= start_step]
        files.write_text(self._path, "".join(_line(record) for record in kept))
        self._file = self._path.open("a", buffering=1)
        self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=start_step + 1, write_to_disk=True)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._events.close()
        for tracker in self._trackers:
            _guarded(tracker, tracker.finish)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` (numbers, or dicts and lists of numbers) as of `step`."""
        try:
            self._file.write(_line({"step": step, **values}))
        except OSError as error:
            raise files.cannot_write(self._path, error) from error
        scalars = dict(_scalars("", values))
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        self._trackers = [
            tracker for tracker in self._trackers if _guarded(tracker, tracker.log, step, scalars)
        ]


def _guarded(tracker: Tracker, call: Callable[..., None], *arguments: Any) -> bool:
    """Returns whether a call to a tracker ended well."""
    try:
        call(*arguments)
    except Exception as error:
        log.warning("%s no longer records this run: %s", tracker.name, reason(error))
        return False
    return True


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of a run's `metrics.jsonl`; a last line cut short by a crash is left out."""
    path = workdir / _FILE
    if not path.exists():
        return []
    records = []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = files.parse_json(line, f"{path}:{number}")
        except UserError:
            if number == len(lines):
                break
            record = {}
        if not isinstance(record.get("step"), int):
            raise UserError(f"{path}:{number}: not a record with a step; move the file away")
        records.append(record)
    return records


def last_record(workdir: pathlib.Path, step: int, name: str) -> dict[str, Any] | None:
    """Returns the last record of a step in which a number is finite, or None."""
    records = (record for record in reversed(read(workdir)) if record["step"] == step)
    return next((record for record in records if record.get(name) is not None), None)


def set_aside(workdir: pathlib.Path, folder: pathlib.Path) -> None:
    """Move the records of a run that begins anew to a folder, where they overwrite nothing."""
    path = workdir / _FILE
    if not path.exists() or not path.stat().st_size:
        return
    names = (folder / f"metrics-{number}.jsonl" for number in itertools.count())
    target = next(name for name in names if not name.exists())
    files.make_folder(folder)
    path.replace(target)
    log.warning("no checkpoint is usable: training begins anew; its records so far are in %s", target)


def strict(value: Any) -> Any:
    """Returns a value for JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict[str, Any]) -> str:
    return json.dumps(strict(record), allow_nan=False) + "\n"


def _scalars(prefix: str, values: dict[Any, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from _scalars(f"{prefix}{name}/", value)
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield f"{prefix}{name}", value


def plot_curves(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw loss and nonzero weights against tokens seen into a PNG."""

    def series(name: str) -> tuple[list[int], list[float]]:
        kept = [record for record in records if name in record]
        return [record["tokens"] for record in kept], [record[name] for record in kept]

    with plots.figure(path, 2, sharex=True, figsize=(7, 6), height_ratios=(2, 1)) as (loss, nonzeros):
        loss.plot(*series("loss"), color="#4477aa", label="training")
        loss.plot(*series("val_loss"), "o-", color="#cc6677", label="held out")
        loss.set_ylabel("cross-entropy (nats per token)")
        loss.legend(frameon=False)
        nonzeros.plot(*series("nonzeros"), color="#228833")
        nonzeros.set_yscale("log")
        nonzeros.set_ylabel("nonzero weights")
        nonzeros.set_xlabel("tokens seen")

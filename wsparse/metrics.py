"""Where numbers go: `metrics.jsonl`, TensorBoard events, and `curves.png`."""

from __future__ import annotations

import itertools
import json
import logging
import math
import pathlib
from typing import Any

from wsparse import files, plots
from wsparse.errors import UserError

log = logging.getLogger(__name__)

_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records to `metrics.jsonl` and TensorBoard events; use as a context manager.

    Args:
      workdir: Folder of the run.
      start_step: Step to go on from; records after it (of a run that got further than its last checkpoint)
        are removed.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int):
        # Imported here: only training needs it.
        import tensorboardX

        self._path = workdir / _FILE
        kept = [record for record in read(workdir) if record["step"] <= start_step]
        with files.replacing(self._path) as part:
            part.write_text("".join(_line(record) for record in kept))
        self._file = self._path.open("a", buffering=1)
        self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=start_step + 1, write_to_disk=True)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._events.close()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` (numbers, or dicts and lists of numbers) as of `step`.

        Raises:
          UserError: The file cannot be written.
        """
        try:
            self._file.write(_line({"step": step, **values}))
        except OSError as error:
            raise files.cannot_write(self._path, error) from error
        for name, value in _scalars("", values):
            self._events.add_scalar(name, value, step)


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Read the records of a run's `metrics.jsonl`; a last line cut short by a crash is left out.

    Raises:
      UserError: A line is not a record.
    """
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


def _scalars(prefix: str, values: dict[str, Any]):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(f"{prefix}{name}/", value)
        elif isinstance(value, (list, tuple)):
            yield from _scalars(f"{prefix}{name}/", {str(i): item for i, item in enumerate(value)})
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield f"{prefix}{name}", value


def plot_curves(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw loss and nonzero weights against tokens seen into a PNG."""
    train = [record for record in records if "loss" in record]
    held_out = [record for record in records if "val_loss" in record]
    tokens = [record["tokens"] for record in train]
    with plots.figure(path, 2, sharex=True, figsize=(7, 6), height_ratios=(2, 1)) as axes:
        loss, nonzeros = axes
        loss.plot(tokens, [record["loss"] for record in train], color="#4477aa", label="training")
        loss.plot(
            [record["tokens"] for record in held_out],
            [record["val_loss"] for record in held_out],
            "o-",
            color="#cc6677",
            label="held out",
        )
        loss.set_ylabel("cross-entropy (nats per token)")
        loss.legend(frameon=False)
        nonzeros.plot(tokens, [record["nonzeros"] for record in train], color="#228833")
        nonzeros.set_yscale("log")
        nonzeros.set_ylabel("nonzero weights")
        nonzeros.set_xlabel("tokens seen")

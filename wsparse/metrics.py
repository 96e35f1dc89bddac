"""Where numbers go: `metrics.jsonl`, TensorBoard events, and `curves.png`."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

from wsparse import files, plots
from wsparse.errors import UserError
from wsparse.progress import Progress, progress

__all__ = ["MetricsWriter", "Progress", "plot_curves", "progress", "read"]


class MetricsWriter:
    """Appends records to `metrics.jsonl` and TensorBoard events; use as a context manager.

    Args:
      workdir: the run's folder.
      start_step: records after this step (of a run that went on further than its last checkpoint)
        are removed.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int):
        # Imported here: only training needs it.
        import tensorboardX

        self._path = workdir / "metrics.jsonl"
        kept = [record for record in read(workdir) if record["step"] <= start_step]
        with files.replacing(self._path) as part:
            part.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a", buffering=1)
        self._events = tensorboardX.SummaryWriter(
            str(workdir), purge_step=start_step + 1, write_to_disk=True
        )

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._events.close()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` (numbers, or dicts and lists of numbers) as of `step`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in _scalars("", values):
            self._events.add_scalar(name, value, step)


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`; a last line cut short by a crash is left out."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(
                    f"{path}:{number}: not a JSON record; move the file away"
                ) from error
    return records


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

"""Trackers of experiments beside `metrics.jsonl`: Weights & Biases, and trackio.

`train --tracker=wandb,trackio` starts them. A run that is resumed goes on in the tracker's run of the same
name, which `trackers.json` in the run's folder remembers. Where a tracker writes, and whether it needs a
network, is its own affair: `WANDB_MODE=offline`, `TRACKIO_DIR` and so on hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import importlib
import importlib.util
import os
import pathlib
import re
import secrets
from typing import Any, NamedTuple

import jax

from wsparse import files
from wsparse.config import TrainConfig, to_dict
from wsparse.errors import UserError, closest, missing_extra, reason

_FILE = "trackers.json"
_PROJECT = "wsparse"


class Tracker(NamedTuple):
    """A tracker's run that has been started.

    Attributes:
      log: Called with a step and numbers by name.
      finish: Called once, when training has ended or stopped.
    """

    name: str
    log: Callable[[int, Mapping[str, float]], None]
    finish: Callable[[], None]


def check(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown, or not installed where they are to run.

    Raises:
      UserError: One is.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f"--tracker={name[:80]} is not known{closest(name, TRACKERS)}: it is one of "
                f"{', '.join(TRACKERS)}"
            )
        if _writes() and not _is_installed(name):
            raise missing_extra(name, name, f"--tracker={name}")


def start(names: Sequence[str], workdir: pathlib.Path, config: TrainConfig) -> list[Tracker]:
    """Starts trackers for the run of a folder, or goes on where they were; in process 0 alone.

    Raises:
      UserError: One cannot be started.
    """
    check(names)
    started: list[Tracker] = []
    for name in dict.fromkeys(names if _writes() else ()):
        identity = _identity(name, workdir)
        try:
            library = importlib.import_module(name)
            started.append(TRACKERS[name](library, identity, workdir, to_dict(config)))
        # Logins, networks, disks and settings of the user's.
        except Exception as error:
            for tracker in started:
                tracker.finish()
            hint = "; WANDB_MODE=offline needs no account and no network" if name == "wandb" else ""
            raise UserError(f"--tracker={name} cannot be started: {reason(error)}{hint}") from error
    return started


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _writes() -> bool:
    """Returns whether this process writes for all: what it writes is the same in all of them."""
    return jax.process_index() == 0


def _identity(name: str, workdir: pathlib.Path) -> str:
    """Returns the name of the tracker's run, which the folder remembers."""
    path = workdir / _FILE
    known = files.read_json(path) if path.exists() else {}
    if not isinstance(known.get(name), str):
        plain = re.sub(r"[^\w-]+", "-", workdir.absolute().name)
        known[name] = f"{plain}-{secrets.token_hex(4)}"
        files.write_json(path, known)
    return known[name]


def _wandb(wandb: Any, identity: str, workdir: pathlib.Path, config: dict[str, Any]) -> Tracker:
    project = os.environ.get("WANDB_PROJECT", _PROJECT)
    run = wandb.init(
        project=project, id=identity, name=identity, dir=str(workdir), config=config, resume="allow"
    )
    # Its own steps only rise, and those after the last checkpoint of a run that was killed come again.
    run.define_metric("*", step_metric="step")
    return Tracker("wandb", lambda step, values: run.log({"step": step, **values}), run.finish)


def _trackio(trackio: Any, identity: str, workdir: pathlib.Path, config: dict[str, Any]) -> Tracker:
    del workdir
    project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
    trackio.init(project=project, name=identity, config=config, resume="allow")
    return Tracker("trackio", lambda step, values: trackio.log(dict(values), step=step), trackio.finish)


TRACKERS: dict[str, Callable[[Any, str, pathlib.Path, dict[str, Any]], Tracker]] = {
    "wandb": _wandb,
    "trackio": _trackio,
}

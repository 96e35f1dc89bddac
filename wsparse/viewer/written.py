"""What people have written about circuits, for the page: notes files, and a tour where nobody wrote one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import logging
import pathlib
from typing import Any

from wsparse.circuits.circuit import Circuit
from wsparse.circuits.evidence_file import Evidence
from wsparse.circuits.notes import Notes, beside, fitted
from wsparse.circuits.tour import first_tour
from wsparse.config import to_dict
from wsparse.errors import UserError, closest, quoted

log = logging.getLogger(__name__)


def read(places: Mapping[str, pathlib.Path], paths: Sequence[str]) -> dict[str, Notes]:
    """Returns the notes on the circuits that are shown, by task.

    Args:
      places: The folder of each task's circuit, which may hold notes.
      paths: Notes files to use instead, each for its own task.

    Raises:
      UserError: A file is not what it should be, or its task is not shown.
    """
    found: dict[str, Notes] = {}
    for path in paths:
        notes = Notes.load(path)
        if notes.task not in places:
            raise UserError(
                f"{path} has notes on the task {quoted(notes.task)}, of which no circuit is shown"
                f"{closest(notes.task, places)}"
            )
        if notes.task in found:
            raise UserError(f"{path} is the second file with notes on {quoted(notes.task)}: give one")
        found[notes.task] = notes
    beside_them = {task: beside(folder) for task, folder in places.items() if task not in found}
    return found | {task: notes for task, notes in beside_them.items() if notes is not None}


def of_circuit(
    circuit: Circuit, evidence: Evidence, notes: Notes | None, shown: Sequence[str]
) -> dict[str, Any]:
    """Returns what the page says beside a circuit's numbers.

    Args:
      circuit: The circuit.
      evidence: What was measured of it.
      notes: What is written about it, if anything is.
      shown: The nodes of it that the page has.
    """
    written = notes or Notes(task=circuit.full_name, circuit=circuit.digest)
    written, remarks = fitted(written, circuit, shown)
    for remark in remarks:
        log.info("note: %s: %s", circuit.full_name, remark)
    made = Notes(task=circuit.full_name, circuit=circuit.digest, tour=first_tour(circuit, evidence))
    shown_tour = written.tour or fitted(made, circuit, shown)[0].tour
    kept = ("caption", "labels", "groups", "pins")
    return {
        **{key: value for key, value in to_dict(written).items() if key in kept},
        "task": circuit.full_name,
        "tour": [to_dict(step) for step in shown_tour],
        "measured": not written.tour,
        "remarks": remarks,
    }

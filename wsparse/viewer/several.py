"""The page of several runs: their circuits side by side, under names RUN/TASK."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from wsparse.circuits import compare
from wsparse.circuits.circuit import Circuit
from wsparse.errors import UserError
from wsparse.viewer import contents, overlap

# What a page has of each run; that of the first stands at the top of its data.
_OF_RUN = ("run", "tokens", "live", "static", "mean_edges", "n_tasks")


def read(folders: Sequence[pathlib.Path], options: contents.Options) -> dict[str, Any]:
    """Returns the data of a page of one run, or of several.

    Raises:
      UserError: A run has no circuits to show, or is given twice.
    """
    if len(folders) == 1:
        return contents.read_run(folders[0], options)
    names = _names(folders)
    # Files of notes name tasks alone: they are on the first run's.
    without_notes = dataclasses.replace(options, notes=())
    found = [contents.read(folder, without_notes if i else options) for i, folder in enumerate(folders)]
    pages = {
        name: contents.contents(name, each.rows, each.shown, each.summary, options, each.folder)
        for name, each in zip(names, found, strict=True)
    }
    circuits = {
        f"{name}/{shown.circuit.full_name}": shown.circuit
        for name, each in zip(names, found, strict=True)
        for shown in each.shown
    }
    data = joined(pages, circuits)
    if len(folders) == 2:
        data["comparison"] = _comparison(folders)
    return data


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
    """Returns a name of each run: its folder's, or, where two have the same, their paths."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise UserError(f"a run is given twice: {', '.join(map(str, folders))}")
    names = [folder.name for folder in resolved]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def joined(pages: Mapping[str, dict[str, Any]], circuits: Mapping[str, Circuit]) -> dict[str, Any]:
    """Returns the data of runs as those of one page.

    Args:
      pages: The data of each run's own page, by its name.
      circuits: All circuits by their names on the page, RUN/TASK.
    """
    first, *others = pages.values()
    data = first | {"tasks": [], "circuits": {}, "texts": []}
    for index, (name, page) in enumerate(pages.items()):
        offset = len(data["texts"])
        data["texts"] += page["texts"]
        data["tasks"] += [row | {"task": f"{name}/{row['task']}"} for row in page["tasks"]]
        data["circuits"] |= {
            f"{name}/{task}": circuit | {"run": index, "text": circuit["text"] + offset}
            for task, circuit in page["circuits"].items()
        }
    data["others"] = [{key: page[key] for key in _OF_RUN} for page in others]
    data["overlap"] = overlap.contents(circuits)
    return data


def _comparison(folders: Sequence[pathlib.Path]) -> dict[str, Any] | None:
    """Returns the edges of two runs over the tasks that both have, None where there is no such task."""
    try:
        found = compare.compare(folders[0], folders[1])
    except UserError:
        return None
    means, ratio = found["geometric_mean_edges"], found["ratio_edges"]
    return {"tasks": len(found["tasks"]), "target": found["target"], "edges": means, "ratio": ratio}

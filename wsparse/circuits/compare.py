"""Two runs' circuits side by side: `python -m wsparse.circuits.compare --runs=runs/small,runs/small_dense`.

Compares the tasks for which both runs have a circuit, at the same target, found by the same procedure: edges
of each, their ratio, geometric means over tasks, and loss-against-edges curves.
"""

from __future__ import annotations

from collections.abc import Sequence
import logging
import pathlib
import sys
from typing import Any, NamedTuple

from absl import flags

from wsparse import files
from wsparse.circuits import report
from wsparse.circuits.circuit import FOUND, check_name, folder_of
from wsparse.command import run_command
from wsparse.errors import UserError

log = logging.getLogger(__name__)


class Pruned(NamedTuple):
    """A run's rows by task, see `report.row`, and its summary of training, empty where there is none."""

    folder: pathlib.Path
    rows: dict[str, dict[str, Any]]
    summary: dict[str, Any]


def read(folder: pathlib.Path, name: str = "") -> Pruned:
    """Returns the circuits of a run that have a name, or none, and its training summary."""
    rows = [row for row, _ in report.read_named(folder_of(folder), name)]
    if not rows:
        flag = f" --name={name}" if name else ""
        raise UserError(f"{folder} has no circuits: python -m wsparse.prune --run={folder}{flag}")
    return Pruned(folder, {r["task"]: r for r in rows}, report.training_summary(folder))


def compare(first: pathlib.Path, second: pathlib.Path) -> dict[str, Any]:
    """Returns the comparison of two runs, as the command prints and writes it."""
    return _compare(read(first), read(second))


def _compare(*runs: Pruned) -> dict[str, Any]:
    found = [[task for task, row in run.rows.items() if "edges" in row] for run in runs]

    def both(task: str, key: str) -> list[Any]:
        return [run.rows[task][key] for run in runs]

    comparable = [t for t in found[0] if t in found[1] and len(set(both(t, "target"))) == 1]
    if not comparable:
        raise UserError(
            f"{runs[0].folder} and {runs[1].folder} have no task with a circuit at the same target in both"
        )
    # Edges at different targets cannot be averaged: the target of most tasks.
    targets = [both(task, "target")[0] for task in comparable]
    target = max(sorted(set(targets)), key=targets.count)
    tasks = [
        {
            "task": task,
            "edges": both(task, "edges"),
            "edges_between_nodes": both(task, "edges_between_nodes"),
            "ratio": max(both(task, "edges")[1], 1) / max(both(task, "edges")[0], 1),
            "loss": both(task, "sufficiency"),
        }
        for task, of_task in zip(comparable, targets, strict=True)
        if of_task == target
    ]
    tasks.sort(key=lambda task: task["edges"][0])
    # Circuits are chosen on other pairs than their loss is reported on, and some do not generalize.
    held = [t for t in tasks if set(both(t["task"], "status")) == {FOUND} and min(t["edges"]) > 0]
    result: dict[str, Any] = {
        "runs": [str(run.folder) for run in runs],
        "val_loss": [run.summary.get("val_loss") for run in runs],
        "nonzeros": [run.summary.get("nonzeros") for run in runs],
        "target": target,
        "tasks": tasks,
        "other_targets": sorted(set(comparable) - {t["task"] for t in tasks}),
        "only_first": sorted(set(found[0]) - set(comparable)),
        "only_second": sorted(set(found[1]) - set(comparable)),
        "held": [t["task"] for t in held],
    }
    for key, rows in (("edges", tasks), ("edges_between_nodes", tasks), ("edges_held", held)):
        if rows:
            counts = [t[key.removesuffix("_held")] for t in rows]
            means = [report.geometric_mean(list(side)) for side in zip(*counts, strict=True)]
            result |= {f"geometric_mean_{key}": means, f"ratio_{key}": means[1] / means[0]}
    return result


def text(result: dict[str, Any]) -> str:
    """Returns the comparison as a table."""
    names = [pathlib.Path(run).name for run in result["runs"]]
    lines = [f"{'task':<28}{names[0]:>16}{names[1]:>16}{'ratio':>9}   edges at loss {result['target']}"]
    lines += [
        f"{t['task']:<28}{t['edges'][0]:>16}{t['edges'][1]:>16}{t['ratio']:>9.1f}"
        f"{'' if t['task'] in result['held'] else '  *'}"
        for t in result["tasks"]
    ]
    for key, name in (
        ("edges", "geometric mean of edges"),
        ("edges_between_nodes", "with all between nodes"),
        ("edges_held", "of edges, without *"),
    ):
        if f"ratio_{key}" in result:
            means = result[f"geometric_mean_{key}"]
            lines.append(f"{name:<28}{means[0]:>16.1f}{means[1]:>16.1f}{result[f'ratio_{key}']:>9.1f}")
    for key, name in (("val_loss", "held-out loss"), ("nonzeros", "nonzero weights")):
        values = ["-" if v is None else f"{v:.4g}" if key == "val_loss" else f"{v}" for v in result[key]]
        lines.append(f"{name:<28}{values[0]:>16}{values[1]:>16}")
    if len(result["held"]) < len(result["tasks"]):
        lines.append("*: a circuit without edges, or one that misses the target on the report split")
    if result["other_targets"]:
        lines.append(f"left out, at another target: {', '.join(result['other_targets'])}")
    for key, name in (("only_first", names[0]), ("only_second", names[1])):
        if result[key]:
            lines.append(f"a circuit only in {name}: {', '.join(result[key])}")
    return "\n".join(lines)


def run(folders: Sequence[str], out: str | None = None, name: str = "") -> None:
    """Log the table of two runs, and write it and the curves into `out` or the first run's circuits."""
    if len(folders) != 2:
        raise UserError(f"--runs must be two run folders, A,B, got {len(folders)}")
    check_name(name)
    runs = [read(pathlib.Path(folder), name) for folder in folders]
    result = _compare(*runs)
    log.info("%s", text(result))
    path = pathlib.Path(out) if out else folder_of(runs[0].folder)
    files.make_folder(path)
    files.write_json(path / "compare.json", result)
    shared = [task["task"] for task in result["tasks"]]
    rows_of = {run.folder.name: [run.rows[task] for task in shared] for run in runs}
    report.plot_curves(rows_of, path / "compare.png")
    log.info("written to %s and %s", path / "compare.json", path / "compare.png")


def main(argv: Sequence[str]) -> None:
    """Run the command; see the module's docstring."""
    del argv
    run(flags.FLAGS.runs, flags.FLAGS.out, flags.FLAGS.name)


def joined(arguments: Sequence[str]) -> list[str]:
    """Returns arguments with the old form `--runs A B` as `--runs=A,B`."""
    arguments = list(arguments)
    at = arguments.index("--runs") if "--runs" in arguments else len(arguments)
    folders = [argument for argument in arguments[at + 1 : at + 3] if not argument.startswith("--")]
    if len(folders) == 2:
        arguments[at : at + 3] = [f"--runs={','.join(folders)}"]
        print("note: --runs A B is --runs=A,B now", file=sys.stderr)
    return arguments


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_list("runs", None, "Two run folders, both pruned: A,B.", required=True)
    flags.DEFINE_string("name", "", "Compare the circuits of this name, see prune --name.")
    flags.DEFINE_string("out", None, "Folder for compare.json and .png; the first run's circuits by default.")


if __name__ == "__main__":
    define_flags()
    sys.argv[1:] = joined(sys.argv[1:])
    run_command(main)

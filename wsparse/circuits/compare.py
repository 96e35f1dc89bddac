"""Two runs' circuits side by side: `python -m wsparse.circuits.compare --runs runs/small runs/small_dense`.

Compares the tasks for which both runs have a circuit, at the same target, found by the same procedure: edges
of each, their ratio, geometric means over tasks, and loss-against-edges curves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import pathlib
import sys
from typing import Any, NamedTuple

from wsparse import files
from wsparse.circuits import report
from wsparse.command import run_plain
from wsparse.errors import UserError


class Pruned(NamedTuple):
    """A run with circuits."""

    folder: pathlib.Path
    rows: dict[str, dict[str, Any]]
    """By task; see `report.row`."""
    summary: dict[str, Any]
    """Of training; empty where there is none."""


def read(folder: pathlib.Path) -> Pruned:
    """The circuits of a run, and its training summary.

    Raises:
      UserError: the run has no circuits.
    """
    rows = report.collect(folder / "circuits")
    if not rows:
        raise UserError(f"{folder} has no circuits: python -m wsparse.prune --run={folder}")
    path = folder / "summary.json"
    summary = files.read_json(path) if path.exists() else {}
    return Pruned(folder, {r["task"]: r for r in rows}, summary)


def compare(first: pathlib.Path, second: pathlib.Path) -> dict[str, Any]:
    """The comparison of two runs, as the command prints and writes it.

    Raises:
      UserError: a run has no circuits, or the two have none at the same target.
    """
    return compare_pruned(read(first), read(second))


def compare_pruned(first: Pruned, second: Pruned) -> dict[str, Any]:
    """`compare` of what was read."""
    a, b = first.rows, second.rows
    shared = [
        task
        for task in a
        if task in b
        and "edges" in a[task]
        and "edges" in b[task]
        and a[task]["target"] == b[task]["target"]
    ]
    if not shared:
        raise UserError(
            f"{first.folder} and {second.folder} have no task with a circuit at the same target in both"
        )
    tasks = [
        {
            "task": task,
            "edges": [a[task]["edges"], b[task]["edges"]],
            "edges_between_nodes": [a[task]["edges_between_nodes"], b[task]["edges_between_nodes"]],
            "ratio": max(b[task]["edges"], 1) / max(a[task]["edges"], 1),
            "loss": [a[task]["sufficiency"], b[task]["sufficiency"]],
        }
        for task in sorted(shared, key=lambda t: a[t]["edges"])
    ]
    result: dict[str, Any] = {
        "runs": [str(run.folder) for run in (first, second)],
        "val_loss": [run.summary.get("val_loss") for run in (first, second)],
        "nonzeros": [run.summary.get("nonzeros") for run in (first, second)],
        "target": a[shared[0]]["target"],
        "tasks": tasks,
        "only_first": sorted(t for t in a if "edges" in a[t] and t not in shared),
        "only_second": sorted(t for t in b if "edges" in b[t] and t not in shared),
    }
    counts = {key: [t[key] for t in tasks] for key in ("edges", "edges_between_nodes")}
    # Circuits are chosen on other pairs than their loss is reported on, and some do not generalize.
    held = [t for t in tasks if max(t["loss"]) <= result["target"] and min(t["edges"]) > 0]
    result["held"] = [t["task"] for t in held]
    if held:
        counts["edges_held"] = [t["edges"] for t in held]
    for key, pairs in counts.items():
        means = [report.geometric_mean([pair[i] for pair in pairs]) for i in (0, 1)]
        result[f"geometric_mean_{key}"] = means
        result[f"ratio_{key}"] = means[1] / means[0]
    return result


def text(result: dict[str, Any]) -> str:
    """The comparison as a table."""
    names = [pathlib.Path(run).name for run in result["runs"]]
    lines = [
        f"{'task':<28}{names[0]:>16}{names[1]:>16}{'ratio':>9}   edges at loss {result['target']}"
    ]
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
        if f"ratio_{key}" not in result:
            continue
        means = result[f"geometric_mean_{key}"]
        lines.append(f"{name:<28}{means[0]:>16.1f}{means[1]:>16.1f}{result[f'ratio_{key}']:>9.1f}")
    for key, name in (("val_loss", "held-out loss"), ("nonzeros", "nonzero weights")):
        values = [
            "-" if v is None else f"{v:.4g}" if key == "val_loss" else f"{v}" for v in result[key]
        ]
        lines.append(f"{name:<28}{values[0]:>16}{values[1]:>16}")
    if len(result["held"]) < len(result["tasks"]):
        lines.append(
            "*: a circuit without edges, or one that misses the target on the report split"
        )
    for key, name in (("only_first", names[0]), ("only_second", names[1])):
        if result[key]:
            lines.append(f"a circuit only in {name}: {', '.join(result[key])}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m wsparse.circuits.compare", description=__doc__)
    parser.add_argument(
        "--runs",
        nargs=2,
        required=True,
        type=pathlib.Path,
        metavar=("A", "B"),
        help="two run folders, both pruned",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=None, help="folder for compare.json and .png"
    )
    options = parser.parse_args(argv[1:])
    first, second = map(read, options.runs)
    result = compare_pruned(first, second)
    print(text(result))
    out = options.out or options.runs[0] / "circuits"
    files.make_folder(out)
    files.write_json(out / "compare.json", result)
    shared = [t["task"] for t in result["tasks"]]
    rows_of = {run.folder.name: [run.rows[task] for task in shared] for run in (first, second)}
    report.plot_curves(rows_of, out / "compare.png")
    print(f"written to {out / 'compare.json'} and {out / 'compare.png'}")


if __name__ == "__main__":
    run_plain(lambda: main(sys.argv))

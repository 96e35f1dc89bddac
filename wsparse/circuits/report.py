"""Tables and plots over the circuits of one run."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from wsparse import files, plots
from wsparse.circuits.circuit import FOUND, NOT_CONFIRMED, Circuit, Status, folder_of, joined, split
from wsparse.errors import UserError, closest
from wsparse.nodes import Node


def row(status: Status, circuit: Circuit | None) -> dict[str, Any]:
    """Returns the table's row of one task."""
    values = {
        "task": status.full_name,
        "status": status.status if circuit is None else circuit.status,
        "model_loss": status.model.loss,
        "model_accuracy": status.model.accuracy,
    }
    if circuit is None:
        return values
    return values | {
        "nodes": circuit.counts.nodes,
        "edges": circuit.counts.edges,
        "edges_between_nodes": circuit.counts.edges_between_nodes,
        "edges_before_clean_up": circuit.scores.edges_before_clean_up,
        "sufficiency": circuit.loss,
        "calibrated": circuit.scores.calibrated.loss,
        "strict": circuit.scores.strict.loss if circuit.scores.strict else None,
        "attacked": circuit.scores.attacked,
        "constants": circuit.counts.constants,
        "necessity": circuit.scores.necessity.loss,
        "necessity_accuracy": circuit.scores.necessity.accuracy,
        "attribution_edges": circuit.scores.attribution_baseline.edges,
        "controls": {name: control.least_loss for name, control in circuit.controls.items()},
        "seconds": circuit.scores.seconds_to_find,
        "target": circuit.target,
        "curve": [dataclasses.asdict(point) for point in circuit.curve],
    }


def read(folder: pathlib.Path) -> list[tuple[dict[str, Any], Circuit | None]]:
    """Returns the row and the circuit of every task under a run's `circuits` folder, sorted by edges."""
    tasks = []
    for path in sorted(folder.glob("*/status.json")):
        status = Status.load(path.parent)
        circuit = Circuit.load(path.parent) if status.has_circuit else None
        tasks.append((row(status, circuit), circuit))
    return sorted(tasks, key=lambda task: (task[0].get("edges", math.inf), task[0]["task"]))


def training_summary(folder: pathlib.Path) -> dict[str, Any]:
    """Returns a run's `summary.json`; empty where there is none."""
    path = folder / "summary.json"
    return files.read_json(path) if path.exists() else {}


def collect(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of `read`."""
    return [row for row, _ in read(folder)]


def read_named(folder: pathlib.Path, name: str) -> list[tuple[dict[str, Any], Circuit | None]]:
    """Returns what `read` does of the circuits of one name, "" for those without one, by task alone."""
    tasks = [(row, circuit, *split(row["task"])) for row, circuit in read(folder)]
    return [(row | {"task": task}, circuit) for row, circuit, task, found in tasks if found == name]


def select(folder: pathlib.Path, names: Sequence[str]) -> tuple[list[dict[str, Any]], list[Circuit]]:
    """Returns the rows of tasks of a run, given by name, by file or as "all", and their circuits.

    "TASK" is the circuit without a name, "TASK@NAME" another one of the task, "all" are all circuits,
    "all@NAME" those of one name. A circuit without nodes is left out: it says that a constant reaches the
    target.
    """
    if not names:
        raise UserError("--task is empty: give names, .jsonl or .py files, or all")
    tasks = read(folder_of(folder))
    wanted = set(map(name_in_run, names))
    if "all" not in wanted:
        known = [row["task"] for row, _ in tasks]
        for name in sorted(wanted.difference(known, map(_all_of_its_name, known))):
            raise UserError(
                f"{folder} has no circuit of {name!r}{closest(name, known)}: "
                f"python -m wsparse.prune --run={folder} {_flags_of(name)}"
            )
        tasks = [
            (row, circuit)
            for row, circuit in tasks
            if row["task"] in wanted or _all_of_its_name(row["task"]) in wanted
        ]
    circuits = [circuit for _, circuit in tasks if circuit is not None and circuit.nodes]
    if not circuits:
        tried = f" ({len(tasks)} tasks were tried, and none was found)" if tasks else ""
        raise UserError(f"{folder} has no circuits{tried}: python -m wsparse.prune --run={folder} --task=all")
    return [row for row, _ in tasks], circuits


def name_in_run(given: str) -> str:
    """Returns the name of a circuit in its run for "TASK", "TASK@NAME", "FILE.jsonl" or "FILE.jsonl@NAME"."""
    task, name = split(given)
    return joined(pathlib.Path(task).stem, name)


def _all_of_its_name(full_name: str) -> str:
    return joined("all", split(full_name)[1])


def _flags_of(full_name: str) -> str:
    """Returns the flags of `prune` that look for a circuit."""
    task, name = split(full_name)
    return f"--task={task} --name={name}" if name else f"--task={task}"


def summary(circuit: Circuit) -> str:
    """Returns one line about a circuit."""
    scores = circuit.scores
    strict = f", strict edges {scores.strict.loss:.3f}" if scores.strict else ""
    if scores.attacked is not None:
        strict += f", attacked {scores.attacked:.3f}"
    above = f"(not confirmed: {circuit.misses}) " if circuit.misses else ""
    controls = ", ".join(
        f"{name.replace('_', ' ')} {control.least_loss:.3f}" for name, control in circuit.controls.items()
    )
    return (
        f"{circuit.counts.nodes} nodes ({circuit.counts.constants} constants), {circuit.counts.edges} edges; "
        f"loss {circuit.loss:.3f} {above}(calibrated {scores.calibrated.loss:.3f}{strict}), without the "
        f"circuit {scores.necessity.loss:.3f}; {'controls: ' + controls + '; ' if controls else ''}"
        f"{scores.seconds_to_find:.0f} s to find, {scores.seconds:.0f} s in all"
    )


def text(circuit: Circuit) -> str:
    """Returns each node in the model's order, and the weighted sum that it is; constants are left out."""
    title = f"{circuit.full_name}, {circuit.form}"
    lines = [title, summary(circuit), "", f"{'node':<22}{'importance':>10}   made of"]
    incoming: dict[str, list[str]] = {node.name: [] for node in circuit.nodes}
    for edge in circuit.edges:
        incoming[edge.target].append(f"{edge.weight:+.3f} {edge.source}")
    for node in sorted(circuit.nodes, key=lambda node: Node.parse(node.name).order()):
        made_of = "  ".join(incoming[node.name])
        if ".act_in." in node.name:
            made_of = "the normed residual stream"
        elif ".attn.resid_delta." in node.name:
            made_of = f"where attention looks: {made_of}"
        lines.append(f"{node.name:<22}{node.importance:>10.3f}   {made_of or 'constants'}")
    return "\n".join(lines) + "\n"


def geometric_mean(values: list[float]) -> float:
    """Returns the geometric mean of counts; a circuit without edges counts as one edge."""
    return math.exp(float(np.mean(np.log(np.maximum(values, 1)))))


_ROW = "{:<28}{:>8}{:>7}{:>7}{:>7}{:>7}{:>7}{:>8}{:>8}{:>8}{:>8}{:>9}{:>10}{:>8}{:>9}{:>9}"
_HEADINGS = (
    *("task", "model", "nodes", "(const)", "edges", "(all)", "(cut)", "target", "loss", "strict", "calib."),
    *("without", "shuffled", "random", "attrib.", "seconds"),
)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as text, with the geometric mean of edges over the tasks of each target."""
    lines: list[str] = [_ROW.format(*_HEADINGS)]
    for r in rows:
        if "edges" not in r:
            lines.append(f"{r['task']:<28}{r['model_loss']:>8.3f}  {r['status']}")
            continue
        sizes = ("nodes", "constants", "edges", "edges_between_nodes", "edges_before_clean_up")
        counts = [r[key] for key in sizes]
        losses = [
            r[key] for key in ("model_loss", "target", "sufficiency", "strict", "calibrated", "necessity")
        ]
        losses += [r["controls"].get(name) for name in ("shuffled_labels", "random_model")]
        model, *others = ("-" if loss is None else f"{loss:.3f}" for loss in losses)
        attribution = "missed" if r["attribution_edges"] is None else r["attribution_edges"]
        line = _ROW.format(r["task"], model, *counts, *others, attribution, f"{r['seconds']:.0f}")
        lines.append(f"{line}  *" if r["status"] == NOT_CONFIRMED else line)
    found = [r for r in rows if "edges" in r]
    confirmed = sum(r["status"] == FOUND for r in found)
    tasks = len({split(r["task"])[0] for r in rows})
    lines.append(f"confirmed on the report split: {confirmed} of {len(found)} circuits, {tasks} tasks")
    groups = sorted({(split(r["task"])[1], r["target"]) for r in found})
    for name, target in groups:
        same = [r for r in found if (split(r["task"])[1], r["target"]) == (name, target)]
        means = [geometric_mean([r[key] for r in same]) for key in ("edges", "edges_between_nodes")]
        at = f" named {name}" if name else ""
        at += f" with target {target:.3g}" if len(groups) > 1 else ""
        lines.append(
            f"geometric mean over {len(same)} tasks{at}: {means[0]:.1f} edges "
            f"({means[1]:.1f} with every weight between the kept nodes)"
        )
    return "\n".join(lines)


LEGEND = """
model: task loss of the whole model on the report split. edges: weights left after single edges were cut;
(all): every nonzero weight between the kept nodes; (cut): the same before the clean-up. loss: of the
circuit alone, everything else at its mean; strict: when nothing but its edges carries what varies; calib.:
after a fitted scale and shift, where that helps. without: loss when the circuit is removed and the rest stays
(chance 0.693). shuffled, random: least loss of the controls. attrib.: edges of the circuit that gradient
attribution finds. seconds: search and clean-up. (const): nodes that do not vary. target: follows the model
where that is near it.
*: found, and not confirmed on the report split; circuits are chosen on other pairs.
"""


def write(folder: pathlib.Path, rows: list[dict[str, Any]], *, title: str) -> None:
    """Write `table.txt`, `results.json` and `curves.png` into a run's `circuits` folder."""
    files.write_text(folder / "table.txt", f"{table(rows)}\n{LEGEND}")
    files.write_json(folder / "results.json", rows)
    if with_circuit := [r for r in rows if "edges" in r]:
        plot_curves({title: with_circuit}, folder / "curves.png")


def plot_curves(rows_of: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Draw edges against target loss: tasks thin, and geometric means where all of a run's tasks reach it."""
    with plots.figure(path, figsize=(6.4, 4.4)) as axes:
        colors = ("#4477aa", "#ee6677", "#228833", "#ccbb44")
        for (title, rows), color in zip(rows_of.items(), colors, strict=False):
            curves = [{point["target"]: point["edges"] for point in r["curve"]} for r in rows]
            for edges_at in curves:
                edges = np.maximum(list(edges_at.values()), 1)
                axes.plot(list(edges_at), edges, color=color, alpha=0.25, linewidth=0.8)
            targets = sorted(set.intersection(*map(set, curves)))
            means = [geometric_mean([edges_at[target] for edges_at in curves]) for target in targets]
            # The label too where no target is reached by all: the legend names every run.
            axes.plot(targets, means, color=color, marker="o", linewidth=2, label=title)
        axes.set_yscale("log")
        axes.set_xlabel("target task loss (nats)")
        axes.set_ylabel("edges of the circuit")
        axes.legend(frameon=False)

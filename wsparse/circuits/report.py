"""Tables and plots over the circuits of one run."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from wsparse import files, plots
from wsparse.circuits.circuit import ABOVE_TARGET, Circuit, Status
from wsparse.nodes import Node


def row(status: Status, circuit: Circuit | None) -> dict[str, Any]:
    """Returns the table's row of one task."""
    values = {
        "task": status.task,
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


def collect(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of `read`."""
    return [row for row, _ in read(folder)]


def summary(circuit: Circuit) -> str:
    """Returns one line about a circuit."""
    scores = circuit.scores
    above = f"{ABOVE_TARGET} ({circuit.target:g}) " if circuit.status == ABOVE_TARGET else ""
    controls = ", ".join(
        f"{name.replace('_', ' ')} {control.least_loss:.3f}" for name, control in circuit.controls.items()
    )
    return (
        f"{circuit.counts.nodes} nodes, {circuit.counts.edges} edges; loss {circuit.loss:.3f} "
        f"{above}(calibrated {scores.calibrated.loss:.3f}), without the circuit "
        f"{scores.necessity.loss:.3f}; {'controls: ' + controls + '; ' if controls else ''}"
        f"{scores.seconds_to_find:.0f} s to find, {scores.seconds:.0f} s in all"
    )


def text(circuit: Circuit) -> str:
    """Returns the circuit as text: each node in the model's order, and the weighted sum that it is.

    Biases and what removed nodes bring are constants, and are left out.
    """
    lines = [
        f"{circuit.task}, {circuit.form}",
        summary(circuit),
        "",
        f"{'node':<22}{'importance':>10}   made of",
    ]
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


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as text, with the geometric mean of edges over the tasks of each target."""
    lines = [
        f"{'task':<28}{'model':>8}{'nodes':>7}{'edges':>7}{'(all)':>7}{'(cut)':>7}{'loss':>8}{'calib.':>8}"
        f"{'without':>9}{'shuffled':>10}{'random':>8}{'attrib.':>9}{'seconds':>9}"
    ]
    for r in rows:
        start = f"{r['task']:<28}{r['model_loss']:>8.3f}"
        if "edges" not in r:
            lines.append(f"{start}  {r['status']}")
            continue
        controls = [
            f"{r['controls'][name]:.3f}" if name in r["controls"] else "-"
            for name in ("shuffled_labels", "random_model")
        ]
        attribution = r["attribution_edges"]
        lines.append(
            f"{start}{r['nodes']:>7}{r['edges']:>7}{r['edges_between_nodes']:>7}"
            f"{r['edges_before_clean_up']:>7}{r['sufficiency']:>8.3f}{r['calibrated']:>8.3f}"
            f"{r['necessity']:>9.3f}{controls[0]:>10}{controls[1]:>8}"
            f"{'missed' if attribution is None else attribution:>9}{r['seconds']:>9.0f}"
            f"{'  *' if r['status'] == ABOVE_TARGET else ''}"
        )
    targets = sorted({r["target"] for r in rows if "edges" in r})
    for target in targets:
        same = [r for r in rows if r.get("target") == target]
        means = [geometric_mean([r[key] for r in same]) for key in ("edges", "edges_between_nodes")]
        at = f" with target {target:g}" if len(targets) > 1 else ""
        lines.append(
            f"geometric mean over {len(same)} tasks{at}: {means[0]:.1f} edges "
            f"({means[1]:.1f} with every weight between the kept nodes)"
        )
    return "\n".join(lines)


LEGEND = """
model: task loss of the whole model on the report split. edges: weights left after single edges were cut;
(all): every nonzero weight between the kept nodes; (cut): the same before the clean-up. loss: of the
circuit alone, everything else at its mean; calib.: after a fitted scale and shift. without: loss when the
circuit is removed and the rest stays (chance 0.693). shuffled, random: least loss of the controls.
attrib.: edges of the circuit that gradient attribution finds. seconds: search and clean-up.
*: its loss is above the target on the report split; circuits are chosen on other pairs.
"""


def write(folder: pathlib.Path, rows: list[dict[str, Any]], *, title: str) -> None:
    """Write `table.txt`, `results.json` and `curves.png` into a run's `circuits` folder."""
    with files.replacing(folder / "table.txt") as part:
        part.write_text(f"{table(rows)}\n{LEGEND}", encoding="utf-8")
    files.write_json(folder / "results.json", rows)
    with_circuit = [r for r in rows if "edges" in r]
    if with_circuit:
        plot_curves({title: with_circuit}, folder / "curves.png")


def curve(rows: list[dict[str, Any]]) -> list[tuple[float, float, int]]:
    """Returns `(target, geometric mean of edges, tasks)` over the tasks that reach each target."""
    targets = sorted({point["target"] for r in rows for point in r["curve"]})
    points = []
    for target in targets:
        edges = [p["edges"] for r in rows for p in r["curve"] if p["target"] == target]
        points.append((target, geometric_mean(edges), len(edges)))
    return points


def plot_curves(rows_of: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Draw edges against target loss: thin lines are tasks, thick ones geometric means.

    A mean is drawn over the targets that all of a run's tasks reach.
    """
    with plots.figure(path, figsize=(6.4, 4.4)) as axes:
        for (title, rows), color in zip(
            rows_of.items(), ("#4477aa", "#ee6677", "#228833", "#ccbb44"), strict=False
        ):
            for r in rows:
                targets = [p["target"] for p in r["curve"]]
                edges = [max(p["edges"], 1) for p in r["curve"]]
                axes.plot(targets, edges, color=color, alpha=0.25, linewidth=0.8)
            full = [(t, mean) for t, mean, n in curve(rows) if n == len(rows)]
            targets, means = [t for t, _ in full], [mean for _, mean in full]
            # The label too where no target is reached by all: the legend names every run.
            axes.plot(targets, means, color=color, marker="o", linewidth=2, label=title)
        axes.set_yscale("log")
        axes.set_xlabel("target task loss (nats)")
        axes.set_ylabel("edges of the circuit")
        axes.legend(frameon=False)

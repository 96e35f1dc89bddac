"""A run's results as one JSON object, the metrics that are made of it, and their spread over seeds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
import math
import pathlib
import statistics
from typing import Any, NamedTuple

import numpy as np

from wsparse import processes, runs, tasks, trees
from wsparse.circuits import report
from wsparse.circuits import tasks as task_lib
from wsparse.circuits.audits.record import Audit
from wsparse.circuits.circuit import FOUND, folder_of
from wsparse.circuits.pairs import Split
from wsparse.circuits.settings import Settings
from wsparse.errors import UserError

# The loss below which a model does a task: the target of circuits.
BAR = Settings().target

# Metrics of a record, and how axes of plots name them.
METRICS = {
    "val_loss": "held-out loss (nats)",
    "nonzeros": "nonzero weights",
    "parameters": "parameters",
    "minutes": "minutes of training",
    "tokens_per_s": "tokens per second",
    "tasks": f"tasks below {BAR} on the report split",
    "task_loss": "mean loss over tasks (nats)",
    "circuits": "tasks with a circuit",
    "nodes": "nodes of a circuit, geometric mean",
    "edges": "edges of a circuit, geometric mean over the model's tasks",
    "edges_shared": "edges of a circuit, geometric mean over tasks of all models",
}
_SUMMARY = ("val_loss", "nonzeros", "parameters", "tokens_per_s", "steps", "seconds")


def read(folder: pathlib.Path, *, pairs: int, chosen: Sequence[str] = (), name: str = "") -> dict[str, Any]:
    """Returns the results of a run that is complete.

    Its model is scored on pairs of the report split of every task of its kind of text.

    Args:
      pairs: How many pairs of each task.
      chosen: Names or files of further tasks.
      name: Name of the circuits that are taken in, where tasks have several.

    Raises:
      UserError: The folder is not a run, or training is not complete.
    """
    run, summary = runs.load(folder), report.training_summary(folder)
    if missing := [key for key in _SUMMARY if key not in summary]:
        raise UserError(f"{folder} is not a complete run: its summary.json has no {missing[0]!r}")
    every = task_lib.names_of(run.config.data.domain)
    wanted = map(task_lib.find, dict.fromkeys((*every, *chosen)))
    splits: dict[Split, int] = {"report": pairs}
    built, refused = task_lib.build_all(wanted, run.tokenizer, splits, 0, max_tokens=run.config.model.context)
    losses = {
        of_task["report"].task: tasks.score(run.params, run.config.model, of_task["report"])[0]
        for of_task in built
    }
    return {key: summary[key] for key in _SUMMARY} | {
        # Runs of earlier versions do not say where they were.
        "machine": summary.get("machine", processes.machine()),
        "digest": trees.digest(run.params)[:16],
        "pairs": pairs,
        "task_losses": losses,
        "refused": sorted(refused),
        "circuits": circuits_of(folder, name),
    }


def circuits_of(folder: pathlib.Path, name: str = "") -> dict[str, dict[str, Any]]:
    """Returns what is kept of a run's circuits of a name, and of their audits, by task."""
    found = {}
    for row, circuit in report.read_named(folder_of(folder), name):
        kept = found[row["task"]] = _circuit(row)
        if circuit and (audit := Audit.load(folder_of(folder, circuit.full_name), circuit=circuit.digest)):
            kept["audit"] = {test.name: test.verdict for test in audit.tests}
    return found


def _circuit(row: Mapping[str, Any]) -> dict[str, Any]:
    if "edges" not in row:
        return {"status": row["status"], "model_loss": row["model_loss"]}
    kept = {key: row[key] for key in ("status", "nodes", "edges", "edges_between_nodes", "target", "seconds")}
    kept |= {"attacked": row["attacked"], "model_loss": row["model_loss"]}
    return kept | {"loss": row["sufficiency"], "without": row["necessity"], "controls": row["controls"]}


def found(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the circuits of a record that hold on the report split, by task."""
    circuits = record["circuits"].items()
    return {task: circuit for task, circuit in circuits if circuit["status"] == FOUND}


def shared_tasks(records: Iterable[Mapping[str, Any]]) -> set[str]:
    """Returns the tasks for which every record with circuits has one that holds."""
    tasks_of = [set(found(record)) for record in records if record["circuits"]]
    return set.intersection(*tasks_of) if tasks_of else set()


def metrics(record: Mapping[str, Any], shared: Collection[str] = ()) -> dict[str, float]:
    """Returns the metrics of a record that it has; `shared` are the tasks of "edges_shared"."""
    circuits, losses = found(record), list(record["task_losses"].values())
    values = {key: record[key] for key in ("val_loss", "nonzeros", "parameters", "tokens_per_s")}
    values["minutes"] = record["seconds"] / 60
    if losses:
        values |= {"tasks": sum(loss < BAR for loss in losses), "task_loss": statistics.fmean(losses)}
    if record["circuits"]:
        values["circuits"] = len(circuits)
    if circuits:
        of = {key: [circuit[key] for circuit in circuits.values()] for key in ("nodes", "edges")}
        values |= {key: report.geometric_mean(counts) for key, counts in of.items()}
    if shared and set(shared) <= set(circuits):
        values["edges_shared"] = report.geometric_mean([circuits[task]["edges"] for task in shared])
    return values


class Ratio(NamedTuple):
    """How many times as large the circuits of one kind of model are, a geometric mean over tasks and seeds.

    Attributes:
      low, high: 95% bootstrap interval over tasks and over models: a model is drawn with all its circuits.
      tasks: Number of tasks that some run of each kind has a circuit for.
    """

    value: float
    low: float
    high: float
    tasks: int


def ratio(small: Iterable[Mapping[str, Any]], large: Iterable[Mapping[str, Any]], key: str) -> Ratio | None:
    """Returns how many times as large the circuits of the records `large` are; None without a shared task.

    Args:
      small: Records of one kind of model, one for each seed.
      large: Records of the other.
      key: What is counted: "nodes", "edges" or "edges_between_nodes".
    """
    kinds = [[found(record) for record in records] for records in (small, large)]
    tasks = sorted(set.intersection(*(set().union(*circuits) for circuits in kinds)))
    if not tasks:
        return None
    logs = [_log_sizes(circuits, key, tasks) for circuits in kinds]
    rng = np.random.default_rng(0)

    def log_ratio(logs: Sequence[np.ma.MaskedArray]) -> float:
        """Returns the mean over the tasks that both have; NaN without any."""
        small_T, large_T = (log_RT.mean(axis=0) for log_RT in logs)
        return float(np.ma.filled((large_T - small_T).mean(), np.nan))

    def drawn() -> float:
        columns = rng.integers(len(tasks), size=len(tasks))
        return log_ratio([log_RT[rng.integers(len(log_RT), size=len(log_RT))][:, columns] for log_RT in logs])

    low, high = np.nanquantile([drawn() for _ in range(2000)], (0.025, 0.975))
    return Ratio(math.exp(log_ratio(logs)), math.exp(low), math.exp(high), len(tasks))


def _log_sizes(circuits: Sequence[Mapping[str, Any]], key: str, tasks: Sequence[str]) -> np.ma.MaskedArray:
    """Returns logarithms of sizes, `(runs, tasks)`; masked where a run has no circuit for a task."""
    # A task may need nothing but the constants.
    sizes = [[max(of[task][key], 1) if task in of else 0 for task in tasks] for of in circuits]
    return np.ma.log(np.ma.masked_equal(sizes, 0))


def spread(values: Sequence[float], form: str = ",.3g") -> str:
    """Returns the median and the range, such as "2.59 (2.57 to 2.62)"; "-" for none.

    >>> spread([3.0, 1.0, 2.0], ".1f"), spread([2.5], ".1f"), spread([])
    ('2.0 (1.0 to 3.0)', '2.5', '-')
    """
    if not values:
        return "-"
    middle, low, high = (format(f(values), form) for f in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"

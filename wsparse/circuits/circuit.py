"""The circuit file: what was found for a task, in which model, and the evidence.

A circuit is a folder: `circuit.json`, readable by people, and `circuit.npz` with the arrays that a program
needs to run it. The viewer, the auditor and the exporter read nothing else of pruning.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple
import zipfile

import numpy as np

from wsparse import files, model, trees
from wsparse.circuits import graph, masks
from wsparse.config import ModelConfig, from_dict, to_dict
from wsparse.errors import UserError

SCHEMA = 1
_JSON, _ARRAYS = "circuit.json", "circuit.npz"


class Node(NamedTuple):
    """A node of a circuit."""

    name: str
    """"layer.location.channel"."""
    tau: float
    """What pruning learned for it."""
    importance: float
    """Growth of the task's loss, in nats, when it alone is removed from the circuit."""


class Edge(NamedTuple):
    """A weight between two nodes of a circuit."""

    source: str
    target: str
    weight: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Circuit:
    """A task's circuit in one model.

    Attributes:
      task: name of the task.
      form: the candidates' surface form.
      model_digest: `trees.digest` of the parameters it belongs to.
      config: of the model.
      target: task loss that it was to reach.
      nodes: the kept nodes.
      edges: the kept weights between them.
      loss: task loss of the circuit alone (everything else at its mean), in nats, on the report split, with
        the logits as they are.
      scores: every other measurement, see `procedure.find_circuit`.
      counts: sizes, see `graph.Counts`; "edges_between_nodes" counts all weights between kept nodes.
      controls: the same procedure where there is nothing to find.
      curve: one entry for each target of the sweep.
      hyperparameters: of the trial that it came from, and of the search.
      means: location -> float32 `(L, N)`: what a removed node's value is.
      tau: location -> float32 `(L, N)`.
      removed: kernel path -> bool `(L, in, out)`: the cut weights.
    """

    task: str
    form: str
    model_digest: str
    config: ModelConfig
    target: float
    nodes: list[Node]
    edges: list[Edge]
    loss: float
    scores: dict[str, Any]
    counts: dict[str, int]
    controls: dict[str, Any]
    curve: list[dict[str, float]]
    hyperparameters: dict[str, Any]
    means: dict[str, np.ndarray]
    tau: dict[str, np.ndarray]
    removed: dict[str, np.ndarray]

    def mask(self) -> masks.Mask:
        """Location -> bool `(L, N)`: which nodes are kept."""
        vector_U = masks.from_names([node.name for node in self.nodes], self.config)
        return masks.unflatten(vector_U, self.config)

    def belongs_to(self, params: model.Params) -> bool:
        """Whether these are the parameters that the circuit was found in, to the bit."""
        return trees.digest(params) == self.model_digest

    def check(self, params: model.Params) -> None:
        """Refuse other parameters.

        Raises:
          UserError: the circuit was found in another model.
        """
        if not self.belongs_to(params):
            raise UserError(
                f"the circuit of {self.task!r} belongs to parameters {self.model_digest[:12]}, these are "
                f"{trees.digest(params)[:12]}: prune this run again, or use the run it came from"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`; its `circuit.json` appears last."""
        folder = pathlib.Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write a circuit to {folder}: {error.strerror}") from error
        arrays: dict[str, Any] = {
            f"{kind}/{name}": np.asarray(array)
            for kind in ("means", "tau", "removed")
            for name, array in getattr(self, kind).items()
        }
        with files.replacing(folder / _ARRAYS) as part:
            np.savez_compressed(part, **arrays)
        values = {
            "schema": SCHEMA,
            "task": self.task,
            "form": self.form,
            "loss": self.loss,
            "target": self.target,
            "counts": self.counts,
            "scores": self.scores,
            "controls": self.controls,
            "nodes": [node._asdict() for node in self.nodes],
            "edges": [edge._asdict() for edge in self.edges],
            "curve": self.curve,
            "hyperparameters": self.hyperparameters,
            "model": {"digest": self.model_digest, "config": to_dict(self.config)},
        }
        files.write_json(folder / _JSON, values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """Read a circuit's folder, or the `circuit.json` in it.

        Raises:
          UserError: nothing there, or it is not a circuit of this version, or contradicts itself.
        """
        path = pathlib.Path(path)
        folder = path.parent if path.name == _JSON else path
        try:
            values = json.loads((folder / _JSON).read_text(encoding="utf-8"))
            with (
                (folder / _ARRAYS).open("rb") as file,
                np.load(file, allow_pickle=False) as stored,
            ):
                arrays = {name: stored[name] for name in stored.files}
        except FileNotFoundError as error:
            raise UserError(
                f"no circuit in {folder} ({error.filename} is missing): python -m wsparse.prune makes one"
            ) from error
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"the circuit in {folder} is damaged: {error}") from error
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            raise UserError(f"{folder / _JSON} is not a circuit of schema {SCHEMA}: prune again")
        kinds: dict[str, dict[str, np.ndarray]] = {"means": {}, "tau": {}, "removed": {}}
        for name, array in arrays.items():
            kind, _, rest = name.partition("/")
            kinds.setdefault(kind, {})[rest] = array
        try:
            circuit = cls(
                task=values["task"],
                form=values["form"],
                model_digest=values["model"]["digest"],
                config=from_dict(ModelConfig, values["model"]["config"]),
                target=values["target"],
                nodes=[Node(**node) for node in values["nodes"]],
                edges=[Edge(**edge) for edge in values["edges"]],
                loss=values["loss"],
                scores=values["scores"],
                counts=values["counts"],
                controls=values["controls"],
                curve=values["curve"],
                hyperparameters=values["hyperparameters"],
                **kinds,
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / _JSON} lacks what a circuit has: {error}") from error
        if fault := _fault(circuit):
            raise UserError(f"the circuit in {folder} is damaged: {fault}")
        return circuit


def _fault(circuit: Circuit) -> str | None:
    """What in a circuit's file cannot be of the model that it names."""
    known, kept = set(masks.names(circuit.config)), {node.name for node in circuit.nodes}
    if strangers := kept - known:
        return f"its model has no node {min(strangers, key=str)!r}"
    ends = {end for edge in circuit.edges for end in (edge.source, edge.target)}
    if strangers := ends - kept:
        return f"an edge ends at {min(strangers, key=str)!r}, which is no node of it"
    numbers = [number for node in circuit.nodes for number in (node.tau, node.importance)]
    numbers += [circuit.loss, circuit.target, *(edge.weight for edge in circuit.edges)]
    for number in numbers:
        if not isinstance(number, int | float):
            return f"{number!r} is where a number must be"
    for name, shape in masks.shapes(circuit.config).items():
        if name not in circuit.means or circuit.means[name].shape != shape:
            return f"the means of {name} must have shape {shape}"
    return None


def edge_list(edges: graph.EdgeMask, params: model.Params) -> list[Edge]:
    """The edges of a mask with their weights."""
    flat = trees.flatten(params)
    return [
        Edge(f"{layer}.{c.source}.{i}", f"{layer}.{c.target}.{o}", float(kernel[layer, i, o]))
        for c in graph.CONNECTIONS
        for kernel in [np.asarray(flat[c.kernel])]
        for layer, i, o in np.argwhere(edges[c.kernel])
    ]

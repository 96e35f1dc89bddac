"""The circuit file: the nodes and edges found for a task in a model, with their scores.

A circuit is a folder: `circuit.json`, readable by people, `circuit.npz` with the arrays that a program needs
to run it, and `status.json`, which tells how the task's search ended. Reading them needs no jax. Beside them
is what the page shows, see `wsparse.circuits.evidence`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from wsparse import files
from wsparse.circuits.settings import Settings
from wsparse.config import ModelConfig, from_dict, to_dict
from wsparse.errors import UserError, located, quoted
from wsparse.nodes import CONNECTIONS, Node, shapes

if TYPE_CHECKING:
    from wsparse import model

SCHEMA = 1
FOUND = "found"
NOT_CONFIRMED = "found, not confirmed on the report split"
NOT_FOUND = "not found"
# The words of older files.
_FORMERLY = {"above target on the report split": NOT_CONFIRMED}

# Where they are in a run's folder.
FOLDER = "circuits"
_JSON, _ARRAYS, _STATUS = "circuit.json", "circuit.npz", "status.json"
# Between a task and the name of one of its circuits.
_AT, _NAME = "@", re.compile(r"[A-Za-z0-9_-]+")
_ARRAY_FIELDS = ("means", "tau", "removed")


def joined(task: str, name: str) -> str:
    """Returns the name of a circuit in its run, which is that of its folder: "TASK", or "TASK@NAME"."""
    return f"{task}{_AT}{name}" if name else task


def split(full_name: str) -> tuple[str, str]:
    """Returns the task, or the file of one, and the name, which may be empty, of "TASK@NAME"."""
    task, at, name = full_name.rpartition(_AT)
    # The path of a file may have the sign as well.
    return (task, name) if at and _NAME.fullmatch(name) else (full_name, "")


def folder_of(run: str | os.PathLike[str], full_name: str = "") -> pathlib.Path:
    """Returns the folder of a circuit in a run's folder; without a name, the one of all its circuits."""
    return pathlib.Path(run) / FOLDER / full_name


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a circuit."""
    if name and not _NAME.fullmatch(name):
        raise UserError(f"a circuit's name must be of letters, digits, _ and -, got {quoted(name)}")


def _name_of(folder: pathlib.Path, task: str) -> str:
    """Returns the name that a circuit's folder gives it."""
    _, found, name = folder.resolve().name.partition(f"{task}{_AT}")
    return name if found else ""


@dataclasses.dataclass(frozen=True)
class CircuitNode:
    """A node "layer.location.channel"; `importance` is the growth of the circuit's loss without it."""

    name: str
    tau: float
    importance: float


@dataclasses.dataclass(frozen=True)
class Edge:
    """A weight between two nodes."""

    source: str
    target: str
    weight: float


@dataclasses.dataclass(frozen=True)
class Score:
    """Task loss in nats (ln 2 is chance), and the fraction of prompts whose answer is preferred."""

    loss: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Scale and shift of the logits fitted on the pairs circuits are chosen on, and the loss they give."""

    scale: float
    shift: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Baseline:
    """The circuit of nodes ranked by attribution; `least_loss` stands alone where it missed the target."""

    reached: bool
    nodes: int | None = None
    edges: int | None = None
    loss: float | None = None
    least_loss: float | None = None


@dataclasses.dataclass(frozen=True)
class Control:
    """The same procedure where there is nothing to find."""

    reached: bool
    least_loss: float
    edges: int | None = None


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """The circuit of one target loss, with its loss on the report split."""

    target: float
    nodes: int
    edges: int
    loss: float


@dataclasses.dataclass(frozen=True)
class TrialSize:
    """Size of the circuit of one pruning run; None where it missed the target."""

    number: int
    nodes: int | None
    edges: int | None


@dataclasses.dataclass(frozen=True)
class Size:
    """Numbers of nodes and edges."""

    nodes: int
    edges: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Sizes of a circuit.

    Attributes:
      edges: Weights between kept nodes, in attention and MLP matrices.
      edges_between_nodes: All nonzero weights between the kept nodes, the cut ones too.
      embedding_edges: Nonzero embedding entries of the residual channels that kept nodes read.
      unembedding_edges: Nonzero unembedding entries of the residual channels that kept nodes write.
      biases: Nonzero biases of kept nodes.
      constants: Nodes whose value is the same at every token of the report split's prompts.
      answer_edges: Of the embedding's and unembedding's entries, those of tokens that tell the two sides of a
        pair apart, and of answers.
    """

    nodes: int
    edges: int
    edges_between_nodes: int
    embedding_edges: int
    unembedding_edges: int
    biases: int
    constants: int = 0
    answer_edges: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Everything that was measured of a circuit, on the report split unless said otherwise.

    Attributes:
      model: The whole model.
      sufficiency: The circuit alone, everything else at its mean.
      calibrated: The same after a scale and a shift of the logits, fitted on the pairs that the circuit was
        chosen on.
      necessity: The circuit's nodes at their means, and everything else as it is.
      seconds_to_find: Time of search and clean-up.
      discretize_loss: Loss on the pairs that the circuit was chosen on.
      sufficient: Size of the circuit before it was completed until it is necessary.
      strict: The circuit alone when nothing but its own edges carries what varies, see `ablation.Ablation`.
      attacked: Largest loss that `adversary.ascend` finds, in 20 steps from each of its starts; only circuits
        of the objective "robust" are held to it.
    """

    model: Score
    sufficiency: Score
    calibrated: Calibration
    necessity: Score
    attribution_baseline: Baseline
    edges_before_clean_up: int
    seconds_to_find: float
    seconds: float
    discretize_loss: float | None = None
    sufficient: Size | None = None
    trials: tuple[TrialSize, ...] = ()
    strict: Score | None = None
    attacked: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """`status.json`: how the search for a task's circuit ended.

    Attributes:
      status: `FOUND`, `NOT_CONFIRMED`, `NOT_FOUND`, or why none was looked for.
      model: Score of the whole model on the report split.
      digest: `trees.digest` of the model's parameters.
      hint: What would have a circuit looked for, where none was.
      settings: Settings of the procedure.
      pairs: `Pairs.digest` of the task's pairs; "" in older files.
      name: Which of the task's circuits it is about; its folder says it, not its file.
    """

    task: str
    status: str
    model: Score
    hint: str = ""
    digest: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    pairs: str = ""
    name: str = ""

    @property
    def full_name(self) -> str:
        """Name of the circuit in its run: "TASK", or "TASK@NAME"."""
        return joined(self.task, self.name)

    @property
    def has_circuit(self) -> bool:
        """Whether a circuit is beside it."""
        return self.status in (FOUND, NOT_CONFIRMED)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a circuit's folder."""
        files.make_folder(folder)
        values = to_dict(self)
        del values["name"]
        files.write_json(pathlib.Path(folder) / _STATUS, values)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Status:
        """Returns the status of a circuit's folder."""
        path = pathlib.Path(folder) / _STATUS
        with located(f"{path} is damaged: ", "; remove it and prune the task again"):
            status = from_dict(cls, files.read_json(path))
            return dataclasses.replace(
                status,
                status=_FORMERLY.get(status.status, status.status),
                name=_name_of(path.parent, status.task),
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Circuit:
    """A task's circuit in one model.

    Attributes:
      form: The candidates' surface form.
      loss: Task loss of the circuit alone (everything else at its mean), in nats, on the report split, with
        the logits as they are.
      target: Task loss that it was to reach.
      curve: The circuit of each target of the sweep.
      hyperparameters: Those of the trial that it came from, and the "settings" of the procedure.
      model_digest: `trees.digest` of the parameters it belongs to.
      means: Location -> float32 `(L, N)`, the values of removed nodes.
      tau: Location -> float32 `(L, N)`.
      removed: Kernel path -> bool `(L, in, out)`, the cut weights.
      name: Which of its task's circuits it is; its folder says it, not its file.
    """

    task: str
    form: str
    loss: float
    target: float
    counts: Counts
    scores: Scores
    controls: dict[str, Control]
    nodes: list[CircuitNode]
    edges: list[Edge]
    curve: list[CurvePoint]
    hyperparameters: dict[str, Any]
    model_digest: str
    config: ModelConfig
    means: dict[str, np.ndarray]
    tau: dict[str, np.ndarray]
    removed: dict[str, np.ndarray]
    name: str = ""

    def __repr__(self) -> str:
        return (
            f"Circuit(task={self.full_name!r}, nodes={len(self.nodes)}, edges={len(self.edges)}, "
            f"loss={self.loss:.3f}, status={self.status!r})"
        )

    @property
    def full_name(self) -> str:
        """Name of the circuit in its run: "TASK", or "TASK@NAME"."""
        return joined(self.task, self.name)

    @property
    def status(self) -> str:
        """`FOUND`, or `NOT_CONFIRMED`: it is chosen on other pairs than its loss is reported on."""
        return NOT_CONFIRMED if self.misses else FOUND

    @property
    def misses(self) -> str:
        """What it misses on the report split, such as "the target is 0.15"; "" for nothing."""
        if self.loss > self.target:
            return f"the target is {self.target:.3g}"
        settings, attacked = self.hyperparameters.get("settings", {}), self.scores.attacked
        if settings.get("objective") == "robust" and attacked is not None:
            bound = max(settings["robust_target"], self.target)
            return f"the target under attack is {bound:.3g}" if attacked > bound else ""
        return ""

    @property
    def settings(self) -> Settings:
        """Settings of the procedure that found it, with today's defaults for those that it does not name."""
        return from_dict(Settings, self.hyperparameters.get("settings", {}))

    @property
    def digest(self) -> str:
        """Digest of the circuit itself: its task, its model, its nodes and its edges."""
        names = [node.name for node in self.nodes]
        edges = [[edge.source, edge.target] for edge in self.edges]
        text = json.dumps([self.task, self.model_digest, names, edges])
        return hashlib.sha256(text.encode()).hexdigest()

    def mask(self) -> dict[str, np.ndarray]:
        """Returns location -> bool `(L, N)`: which nodes are kept."""
        mask = {name: np.zeros(shape, bool) for name, shape in shapes(self.config).items()}
        for kept in self.nodes:
            node = Node.parse(kept.name)
            mask[node.location][node.layer, node.channel] = True
        return mask

    def check(self, params: model.Params) -> None:
        """Refuse parameters other than those that the circuit was found in, to the bit."""
        from wsparse import trees  # Needs jax, which reading a circuit does not.

        digest = trees.digest(params)
        if digest != self.model_digest:
            raise UserError(
                f"the circuit of {self.full_name!r} belongs to parameters {self.model_digest[:12]}, these "
                f"are {digest[:12]}: prune this run again, or use the run it came from"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`; its `circuit.json` appears last."""
        folder = pathlib.Path(path)
        files.make_folder(folder)
        # A subclass may have further fields.
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Circuit)}
        values: dict[str, Any] = dataclasses.asdict(Circuit(**own))
        del values["name"]
        arrays = {
            f"{kind}/{name}": array for kind in _ARRAY_FIELDS for name, array in values.pop(kind).items()
        }
        model = {"digest": values.pop("model_digest"), "config": values.pop("config")}
        # Hyperparameters may hold what JSON does not: nothing is written then.
        text = json.dumps({"schema": SCHEMA, **values, "model": model}, indent=2)
        write_arrays(folder / _ARRAYS, arrays)
        files.write_text(folder / _JSON, text + "\n")

    # Of this class for its subclasses too, which may have fields that are not in the folder.
    @staticmethod
    def load(path: str | os.PathLike[str]) -> Circuit:
        """Returns the circuit of a folder, or of the `circuit.json` in it."""
        path = pathlib.Path(path)
        folder = path.parent if path.name == _JSON else path
        if missing := [name for name in (_JSON, _ARRAYS) if not (folder / name).exists()]:
            raise UserError(
                f"no circuit in {folder} ({missing[0]} is missing): python -m wsparse.prune makes one"
            )
        with located(f"the circuit in {folder} is damaged: ", "; prune the task again"):
            values = files.read_json(folder / _JSON)
            if values.pop("schema", None) != SCHEMA:
                raise UserError(f"it is not of schema {SCHEMA}")
            model = values.pop("model", None)
            if not isinstance(model, dict):
                raise UserError("key 'model' must be a group of keys")
            values |= {"model_digest": model.get("digest"), "config": model.get("config")}
            arrays: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in _ARRAY_FIELDS}
            for key, array in read_arrays(folder / _ARRAYS).items():
                kind, _, name = key.partition("/")
                arrays.get(kind, {})[name] = array
            circuit = from_dict(Circuit, values | arrays)
            circuit = dataclasses.replace(circuit, name=_name_of(folder, circuit.task))
            _check(circuit)
        return circuit


def write_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name into an `.npz` file."""
    with files.replacing(path) as part:
        np.savez_compressed(part, **arrays)  # pyrefly: ignore


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an `.npz` file by name."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # What zipfile, zlib and NumPy raise for a damaged file is of many kinds.
        raise UserError(f"{path.name} cannot be read: {quoted(error)}") from error


def _check(circuit: Circuit) -> None:
    """Refuse a circuit that cannot be of the model that it names."""
    kept = {node.name for node in circuit.nodes}
    for name in kept:
        Node.parse(name, circuit.config)
    ends = {end for edge in circuit.edges for end in (edge.source, edge.target)}
    if loose := ends - kept:
        raise UserError(f"an edge ends at {min(loose)!r:.80}, which is not among its nodes")
    widths = shapes(circuit.config)
    for name, shape in widths.items():
        if name not in circuit.means or circuit.means[name].shape != shape:
            raise UserError(f"the means of {name} must have shape {shape}")
        if name in circuit.tau and circuit.tau[name].shape != shape:
            raise UserError(f"the tau of {name} must have shape {shape}")
    for connection in CONNECTIONS:
        shape = (*widths[connection.source], widths[connection.target][1])
        removed = circuit.removed.get(connection.kernel)
        if removed is None or removed.shape != shape or removed.dtype != bool:
            raise UserError(f"the removed weights of {connection.kernel} must be bool of shape {shape}")
    settings = circuit.hyperparameters.get("settings", {})
    if not isinstance(settings, dict):
        raise UserError("hyperparameters.settings must be a group of keys")
    held = settings.get("objective") == "robust" and circuit.scores.attacked is not None
    if held and type(settings.get("robust_target")) not in (int, float):
        raise UserError("hyperparameters.settings.robust_target must be a number")

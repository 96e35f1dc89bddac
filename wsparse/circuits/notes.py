"""The notes file, `notes.json` beside `circuit.json`: what people write about a circuit, for its page.

It holds a caption, names of nodes, groups that are drawn as one box, pinned nodes, and a tour: captions, each
with what is to be shown with it. Notes belong to one circuit, which they name by its digest. Reading them
needs no jax.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import os
import pathlib
from typing import Any, Literal

from wsparse import files
from wsparse.circuits.circuit import Circuit, split
from wsparse.config import from_dict, require, to_dict
from wsparse.errors import UserError, closest, located, quoted
from wsparse.nodes import Node

SCHEMA = 1
FILE = "notes.json"
LONGEST_NAME, LONGEST_TEXT = 80, 2000
"""Characters of the name of a node or a group; of a caption."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """A node, or an edge "source>target", that is held while a step is shown.

    Attributes:
      mode: At its mean (an edge: its source's), at zero, or set to `value` (an edge: its weight).
    """

    name: str
    mode: Literal["mean", "zero", "set"]
    value: float | None = None

    def __post_init__(self):
        _check_place(self.name)
        if (self.value is None) == (self.mode == "set"):
            raise UserError(f"the edit of {self.name!r} must have a value exactly when its mode is 'set'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a tour.

    Attributes:
      node: The node that is selected; None for none, as in the fields after it.
      edge: The edge that is selected, "source>target".
      pair: The pair of prompts that is shown, counted from 0.
      token: The token of the pair's first prompt that is marked, counted from 0.
      edits: What is held in the model that the page runs.
    """

    caption: str
    node: str | None = None
    edge: str | None = None
    pair: int | None = None
    token: int | None = None
    edits: tuple[Edit, ...] = ()

    def __post_init__(self):
        _check_text("the caption of a step", self.caption, LONGEST_TEXT)
        if self.node is not None and self.edge is not None:
            raise UserError(f"a step selects a node or an edge, not both: {self.node!r}, {self.edge!r}")
        for place in filter(None, (self.node, self.edge)):
            _check_place(place)
            require((">" in place) == (place == self.edge), "a step's edge must be source>target", place)
        for name in ("pair", "token"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} of a step must be at least 0", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Nodes that are drawn as one box; `open` ones are drawn as they are, and marked."""

    name: str
    nodes: tuple[str, ...]
    open: bool = False

    def __post_init__(self):
        _check_text("the name of a group", self.name, LONGEST_NAME)
        require(bool(self.nodes), f"group {self.name!r} must have at least one node", self.nodes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notes:
    """What is written about one circuit.

    Attributes:
      task: Name of the circuit in its run, "TASK" or "TASK@NAME".
      circuit: `Circuit.digest` of the circuit.
      caption: Text about all of it.
      labels: Names of nodes, by node.
      groups: In the order in which they are listed; a node is in one of them at most.
      pins: Nodes that are kept when the page shows pinned nodes alone.
      tour: Empty for the tour that is made from the circuit's evidence.
    """

    task: str
    circuit: str
    caption: str = ""
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    pins: tuple[str, ...] = ()
    tour: tuple[Step, ...] = ()

    def __post_init__(self):
        _check_text("the caption", self.caption, LONGEST_TEXT, empty=True)
        for name, label in self.labels.items():
            _check_text(f"the label of {name[:80]!r}", label, LONGEST_NAME)
        grouped = [name for group in self.groups for name in group.nodes]
        for name in (*self.labels, *grouped, *self.pins):
            Node.parse(name)
        for what, names in (
            ("nodes in a group", grouped),
            ("pinned nodes", self.pins),
            ("names of groups", [g.name for g in self.groups]),
        ):
            if twice := _repeated(names):
                raise UserError(f"{what} must be there once, got {twice!r} twice")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a notes file, or into a circuit's folder, without what is empty."""
        path = pathlib.Path(path)
        path = path / FILE if path.is_dir() else path
        files.write_json(path, {"schema": SCHEMA, **_without_empty(to_dict(self))})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Notes:
        """Returns the notes in a file.

        Raises:
          UserError: The file cannot be read, is of another schema, or its content breaks a rule.
        """
        values = files.read_json(path)
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise UserError(f"{path}: notes must be of schema {SCHEMA}, got {quoted(schema)}")
        with located(f"{path}: "):
            return from_dict(cls, values)


def beside(folder: str | os.PathLike[str]) -> Notes | None:
    """Returns the notes in a circuit's folder; None where there are none."""
    path = pathlib.Path(folder) / FILE
    return Notes.load(path) if path.exists() else None


def fitted(notes: Notes, circuit: Circuit, shown: Iterable[str]) -> tuple[Notes, list[str]]:
    """Returns what of the notes is about a circuit, and remarks about what is left out.

    Args:
      notes: Notes, maybe of another circuit of the same task.
      circuit: The circuit.
      shown: The nodes of it that are shown.

    Raises:
      UserError: The notes are on another task, or they are of just this circuit and name a node or an edge
        that it has not.
    """
    if split(notes.task)[0] != circuit.task:
        raise UserError(f"the notes are on the task {quoted(notes.task)}, the circuit is of {circuit.task!r}")
    nodes, edges = {node.name for node in circuit.nodes}, {f"{e.source}>{e.target}" for e in circuit.edges}
    same, remarks = notes.circuit == circuit.digest, []
    unknown = [place for place in _places(notes) if place not in nodes and place not in edges]
    if same and unknown:
        kind = "edge" if ">" in unknown[0] else "node"
        near = closest(unknown[0], sorted(edges if kind == "edge" else nodes))
        raise UserError(
            f"the notes on {notes.task!r} name the {kind} {unknown[0]!r}, which its circuit has not{near}"
        )
    if not same:
        left_out = f"{len(unknown)} of its nodes and edges are not here and are left out" if unknown else ""
        remarks.append(
            f"The notes were written for another circuit of this task, {notes.circuit[:12]}; this one is "
            f"{circuit.digest[:12]}{': ' if left_out else ''}{left_out}."
        )
    shown = set(shown)
    here = {edge for edge in edges if shown.issuperset(edge.split(">"))} | shown
    if hidden := [place for place in _places(notes) if place not in here and place not in unknown]:
        remarks.append(f"Notes on {len(hidden)} nodes and edges are left out, which this page has not.")
    return _only(notes, here), remarks


def _places(notes: Notes) -> list[str]:
    """Returns all nodes and edges that notes name, each once."""
    steps = [place for step in notes.tour for place in (step.node, step.edge) if place is not None]
    edits = [edit.name for step in notes.tour for edit in step.edits]
    grouped = [name for group in notes.groups for name in group.nodes]
    return list(dict.fromkeys([*notes.labels, *grouped, *notes.pins, *steps, *edits]))


def _only(notes: Notes, here: set[str]) -> Notes:
    """Returns notes without the nodes and edges that are not `here`; a step keeps its caption."""
    groups = (
        dataclasses.replace(group, nodes=tuple(name for name in group.nodes if name in here))
        for group in notes.groups
        if here.intersection(group.nodes)
    )
    steps = (
        dataclasses.replace(
            step,
            node=step.node if step.node in here else None,
            edge=step.edge if step.edge in here else None,
            edits=tuple(edit for edit in step.edits if edit.name in here),
        )
        for step in notes.tour
    )
    return dataclasses.replace(
        notes,
        labels={name: label for name, label in notes.labels.items() if name in here},
        groups=tuple(groups),
        pins=tuple(name for name in notes.pins if name in here),
        tour=tuple(steps),
    )


def _check_place(place: str) -> None:
    """Refuses what is neither a node's name nor an edge's."""
    ends = place.split(">")
    require(len(ends) <= 2, "an edge is written source>target", place[:80])
    for end in ends:
        Node.parse(end)


def _check_text(what: str, text: str, longest: int, *, empty: bool = False) -> None:
    require(empty or bool(text.strip()), f"{what} must not be empty", text)
    require(len(text) <= longest, f"{what} must have at most {longest} characters", len(text))


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def _without_empty(value: Any) -> Any:
    """Returns JSON values without keys that say nothing: none, false, and what is empty."""
    if isinstance(value, dict):
        plain = {key: _without_empty(item) for key, item in value.items()}
        return {k: v for k, v in plain.items() if v is not None and v is not False and v not in ("", [], {})}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value

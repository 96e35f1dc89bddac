"""Circuits as attribution graphs for Neuronpedia and the frontend of circuit-tracer.

    python -m wsparse.interop.neuronpedia --run=RUN --task=TASK --out=FILE [--prompt=TEXT] [--notes=FILE]

The file is a circuit unrolled over a prompt (`wsparse.circuits.unrolled` says what the numbers are) in the
JSON that neuronpedia.org/graph/validator checks. A node of the circuit is a feature there, its layer a row of
the drawing: a location of a layer of the model. Constants are error nodes, below the row that they enter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import logging
import os
import pathlib
import re
from typing import Any

from absl import flags

import wsparse
from wsparse import files, runs
from wsparse.circuits import evidence, report
from wsparse.circuits.circuit import Circuit, folder_of
from wsparse.circuits.notes import Notes, beside, fitted
from wsparse.circuits.unrolled import Unrolled, Vertex, row, unroll
from wsparse.command import run_command
from wsparse.errors import UserError
from wsparse.nodes import NODES, Node
from wsparse.ops import cpu

log = logging.getLogger(__name__)

# Their types of nodes: every feature of whatever kind is the first.
_TYPES = {
    "node": "cross layer transcoder",
    "constants": "mlp reconstruction error",
    "embedding": "embedding",
    "logit": "logit",
}
# Nodes in the subgraph where there are no labels and groups.
_PINNED = 10
# Numbers of features are layer and index paired by Cantor's function.
_SCHEMA_VERSION = 1


def graph(
    run: runs.Run,
    circuit: Circuit,
    tokens: Sequence[int],
    answers: Sequence[int] = (),
    *,
    notes: Notes | None = None,
    model_name: str = "",
    slug: str = "",
) -> dict[str, Any]:
    """Returns the attribution graph of a circuit on a prompt, as JSON values.

    Args:
      run: The run that the circuit was found in.
      circuit: The circuit.
      tokens: The prompt.
      answers: Tokens whose logits are in the graph; the five most likely ones where there are none.
      notes: Names of nodes, and groups of them, which become supernodes.
      model_name: Name of the model on Neuronpedia; that of the run's folder by default.
      slug: Name of the graph; model and circuit by default.

    Raises:
      UserError: The prompt does not fit the context, the circuit is another run's, the notes are on another
        task, or it has not a node that notes on it name.
    """
    notes = notes or Notes(task=circuit.full_name, circuit=circuit.digest)
    notes, remarks = fitted(notes, circuit, [node.name for node in circuit.nodes])
    for remark in remarks:
        log.info("note: %s", remark)
    circuit.check(run.params)
    unrolled = unroll(run.params, run.config.model, circuit, tokens, answers)
    model_name = model_name or _slug(run.folder.absolute().name)
    texts = [run.tokenizer.decode([token]) for token in unrolled.tokens]
    names = {(row(node), node.channel): str(node) for node in (Node.parse(n.name) for n in circuit.nodes)}
    metadata = {
        "slug": slug or _slug(f"{model_name}-{circuit.full_name}"),
        "scan": model_name,
        "prompt_tokens": texts,
        "prompt": run.tokenizer.decode(list(unrolled.tokens)),
        "transcoder_list": [],
        "schema_version": _SCHEMA_VERSION,
        "info": {
            "description": _description(circuit, unrolled),
            "generator": {"name": "wsparse", "version": wsparse.__version__},
        },
        "generation_settings": {"task": circuit.full_name, "circuit": circuit.digest},
    }
    links = [
        {"source": _id(source), "target": _id(target), "weight": number}
        for (source, target), number in unrolled.links.items()
    ]
    nodes = [
        _node(vertex, value, names, texts, notes, run, unrolled) for vertex, value in unrolled.values.items()
    ]
    state = _state(circuit, unrolled, names, notes)
    return {"metadata": metadata, "qParams": state, "nodes": nodes, "links": links}


def _description(circuit: Circuit, unrolled: Unrolled) -> str:
    rows = ", ".join(NODES)
    layers = (
        f"{circuit.config.n_layer} layers of the model" if circuit.config.n_layer > 1 else "the model's layer"
    )
    return (
        f"The circuit of {circuit.full_name} ({circuit.counts.nodes} nodes, {circuit.counts.edges} edges) in "
        f"a weight-sparse transformer, on a prompt of {len(unrolled.tokens)} tokens. Rows from the first "
        f"are, for {layers}: {rows}. Links into a node add up to its value before its nonlinearity; error "
        "nodes are biases and the constants that stand for what is not in the circuit."
    )


def _node(
    vertex: Vertex,
    value: float | None,
    names: Mapping[tuple[int, int], str],
    texts: Sequence[str],
    notes: Notes,
    run: runs.Run,
    unrolled: Unrolled,
) -> dict[str, Any]:
    """Returns a node of the JSON."""
    probability, feature, clerp = 0.0, vertex.index, ""
    if vertex.kind == "node":
        name = names[vertex.row, vertex.index]
        feature = _paired(vertex.row, vertex.index)
        meaning = NODES[Node.parse(name).location].meaning
        clerp = notes.labels.get(name) or f"{name}, {meaning}"
    elif vertex.kind == "embedding":
        feature, clerp = vertex.position, f'Emb: "{texts[vertex.position]}"'
    elif vertex.kind == "constants":
        clerp = "biases, and constants of what is not in the circuit"
    else:
        probability = unrolled.probabilities[vertex.index]
        clerp = f'Output "{run.tokenizer.decode([vertex.index])}" (p={probability:.3f})'
    identity = _id(vertex)
    return {
        "node_id": identity,
        "feature": feature,
        "layer": "E" if vertex.kind == "embedding" else identity.split("_")[0],
        "ctx_idx": vertex.position,
        "feature_type": _TYPES[vertex.kind],
        "token_prob": probability,
        "is_target_logit": vertex.kind == "logit" and vertex.index == next(iter(unrolled.probabilities)),
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": _hover_id(vertex),
        "clerp": clerp,
        "influence": None,
        "activation": value,
    }


def _id(vertex: Vertex) -> str:
    """Returns the id of a node: layer, feature and token, as circuit-tracer writes it."""
    if vertex.kind == "embedding":
        return f"E_{vertex.index}_{vertex.position}"
    height = vertex.row - 1 if vertex.kind == "constants" else vertex.row
    return f"{height}_{vertex.index}_{vertex.position}"


def _hover_id(vertex: Vertex) -> str:
    """Returns what is highlighted together: a node of the circuit at all tokens, anything else alone."""
    if vertex.kind == "node":
        return f"{vertex.row}_{vertex.index}-0"
    prefix = {"embedding": "E", "logit": "L", "constants": str(vertex.row - 1)}[vertex.kind]
    return f"{prefix}_{vertex.index}-{vertex.position}"


def _paired(layer: int, index: int) -> int:
    """Returns Cantor's number of a pair."""
    return (layer + index) * (layer + index + 1) // 2 + index


def _state(
    circuit: Circuit, unrolled: Unrolled, names: Mapping[tuple[int, int], str], notes: Notes
) -> dict[str, Any]:
    """Returns what is pinned and grouped when the graph opens.

    A group is a supernode of its nodes at all tokens, a labelled node one of its own. Without either, the
    most important nodes are.
    """
    groups = {group.name: list(group.nodes) for group in notes.groups}
    grouped = {name for group in groups.values() for name in group}
    groups |= {text: [name] for name, text in notes.labels.items() if name not in grouped}
    if not groups and not notes.pins:
        ranked = sorted(circuit.nodes, key=lambda node: -node.importance)
        groups = {node.name: [node.name] for node in ranked[:_PINNED]}
    places: dict[str, list[str]] = {}
    for vertex in unrolled.values:
        if vertex.kind == "node":
            places.setdefault(names[vertex.row, vertex.index], []).append(_id(vertex))
    supernodes = [
        [label, *(place for name in group for place in places.get(name, []))]
        for label, group in groups.items()
    ]
    supernodes = [supernode for supernode in supernodes if len(supernode) > 1]
    logits = [_id(vertex) for vertex in unrolled.values if vertex.kind == "logit"]
    pinned = [place for _, *group in supernodes for place in group]
    pinned += [place for name in notes.pins for place in places.get(name, [])]
    pinned = list(dict.fromkeys([*pinned, *logits]))
    return {
        "pinnedIds": pinned,
        "supernodes": supernodes,
        "linkType": "both",
        "clickedId": logits[0],
        "sg_pos": "",
    }


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "wsparse"


def export(
    folder: str | os.PathLike[str],
    task: str,
    out: str | os.PathLike[str],
    *,
    prompt: str = "",
    number: int = 0,
    notes: Notes | None = None,
    model_name: str = "",
    slug: str = "",
) -> dict[str, Any]:
    """Writes the graph of a run's circuit to a file, and returns it.

    Args:
      folder: The run's folder.
      task: Name of the circuit, "TASK" or "TASK@NAME", or with the file of a task of the user's own.
      out: The JSON file.
      prompt: Text to run the circuit on; by default a prompt of the task, on which the logits are those of
        its two answers.
      number: Which prompt of the task's report split that is.
      notes: See `graph`, as for the other arguments; by default those beside the circuit, if there are any.
    """
    folder, out = pathlib.Path(folder), pathlib.Path(out)
    files.check_output(out)
    place = folder_of(folder, report.name_in_run(task))
    runs.read_config(folder)  # It says what is not a run.
    circuit = Circuit.load(place)
    run = runs.load(folder)
    if prompt:
        tokens, answers = run.tokenizer.encode(prompt), []
    else:
        # It names the file that is missing.
        known = evidence.known_tasks([task], [circuit])
        pairs = evidence.report_pairs(run, circuit, known[circuit.task])
        if not 0 <= number < len(pairs.position):
            raise UserError(f"--number must be from 0 to {len(pairs.position) - 1}, got {number}")
        tokens = pairs.tokens[number][: pairs.position[number] + 1].tolist()
        answers = [int(pairs.answer[number]), int(pairs.other[number])]
    found = graph(
        run, circuit, tokens, answers, notes=notes or beside(place), model_name=model_name, slug=slug
    )
    files.write_text(out, json.dumps(found, allow_nan=False))
    return found


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    cpu.enable()
    found = export(
        options.run,
        options.task,
        options.out,
        prompt=options.prompt or "",
        number=options.number,
        notes=Notes.load(options.notes) if options.notes else None,
        model_name=options.model or "",
        slug=options.slug or "",
    )
    log.info(
        "written to %s: %d nodes, %d links; neuronpedia.org/graph/validator checks and shows it",
        options.out, len(found["nodes"]), len(found["links"]),
    )  # fmt: skip


def _define_flags() -> None:
    flags.DEFINE_string("run", None, "The run's folder.")
    flags.DEFINE_string("task", None, "The circuit: TASK or TASK@NAME, a .jsonl or .py file for TASK.")
    flags.DEFINE_string("out", None, "The JSON file to write.")
    flags.DEFINE_string("prompt", None, "Text to run the circuit on, instead of a prompt of the task.")
    flags.DEFINE_integer("number", 0, "Which prompt of the task's report split, where --prompt is not given.")
    flags.DEFINE_string(
        "notes",
        None,
        "Notes file, by default that beside the circuit: its names and groups become supernodes.",
    )
    flags.DEFINE_string(
        "model", None, "Name of the model on Neuronpedia; that of the run's folder by default."
    )
    flags.DEFINE_string("slug", None, "Name of the graph; model and circuit by default.")
    flags.mark_flags_as_required(["run", "task", "out"])


if __name__ == "__main__":
    _define_flags()
    run_command(main)

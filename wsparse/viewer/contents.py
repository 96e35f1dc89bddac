"""The data of a page, as JSON values: circuits and their evidence, read from their folders."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import logging
import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from wsparse import files
from wsparse.circuits import report
from wsparse.circuits.circuit import Circuit, Status
from wsparse.circuits.evidence_file import PATTERN_TOKENS, Evidence, triangle
from wsparse.config import require, to_dict
from wsparse.errors import UserError, closest
from wsparse.nodes import NODES
from wsparse.viewer.page import packed, raw, render

log = logging.getLogger(__name__)

SCHEMA = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to show.

    Attributes:
      task: Names of tasks, or all: every task that has a circuit.
      pairs: Pairs of each task to show token by token, at most as many as were measured.
      max_nodes: Nodes of a circuit to show; the least important ones are left out.
    """

    task: tuple[str, ...] = ("all",)
    pairs: int = 6
    max_nodes: int = 2000

    def __post_init__(self):
        require(bool(self.task), "task must name at least one task", self.task)
        require(self.pairs >= 1, "pairs must be at least 1", self.pairs)
        require(self.max_nodes >= 1, "max_nodes must be at least 1", self.max_nodes)


class Shown(NamedTuple):
    """A circuit and what was measured of it."""

    circuit: Circuit
    evidence: Evidence


def read_run(folder: pathlib.Path, options: Options) -> dict[str, Any]:
    """Returns the data of a run's page.

    Raises:
      UserError: The folder has no circuits, or none with evidence, or one is damaged.
    """
    tasks = report.read(folder / "circuits")
    if "all" not in options.task:
        names = [row["task"] for row, _ in tasks]
        stems = [pathlib.Path(name).stem for name in options.task]
        for name in stems:
            if name not in names:
                raise UserError(
                    f"{folder} has no circuit of {name!r}{closest(name, names)}: "
                    f"python -m wsparse.prune --run={folder} --task={name}"
                )
        tasks = [(row, circuit) for row, circuit in tasks if row["task"] in stems]
    # A circuit without nodes says that a constant reaches the target: there is nothing to draw.
    circuits = [circuit for _, circuit in tasks if circuit is not None and circuit.nodes]
    if not circuits:
        tried = f" ({len(tasks)} tasks were tried, and none was found)" if tasks else ""
        raise UserError(f"{folder} has no circuits{tried}: python -m wsparse.prune --run={folder} --task=all")
    evidence = [Evidence.load(folder / "circuits" / c.task, c) for c in circuits]
    shown = [Shown(c, e) for c, e in zip(circuits, evidence, strict=True) if e is not None]
    without = [c.task for c, e in zip(circuits, evidence, strict=True) if e is None]
    if without:
        missing = (
            f"no evidence of {', '.join(without)}: "
            f"python -m wsparse.prune --run={folder} --evidence measures it"
        )
        if not shown:
            raise UserError(missing)
        log.info("note: %s", missing)
    log.info("%s: %d circuits of %d tasks", folder, len(shown), len(tasks))
    summary = folder / "summary.json"
    values = files.read_json(summary) if summary.exists() else {}
    return contents(folder.resolve().name, [row for row, _ in tasks], shown, values, options)


def read_circuit(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the data of the page of one circuit's folder.

    Raises:
      UserError: It has no circuit or no evidence, or they are damaged.
    """
    circuit = Circuit.load(folder)
    evidence = Evidence.load(folder, circuit)
    if evidence is None:
        raise UserError(
            f"{folder} has no evidence of its circuit: python -m wsparse.prune --run=RUN --evidence "
            "measures it"
        )
    row = report.row(Status.load(folder), circuit)
    name = folder.resolve().parent.parent.name
    return contents(name, [row], [Shown(circuit, evidence)], {}, Options())


def circuit_page(folder: str | os.PathLike[str]) -> str:
    """Returns the page of one circuit's folder as HTML, e.g. for the `srcdoc` of an `iframe`.

    Raises:
      UserError: See `read_circuit`.
    """
    data = read_circuit(pathlib.Path(folder))
    [task] = data["circuits"]
    return render(data | {"opens": task}, title=f"{task} in {data['run']['name']}")


def contents(
    name: str,
    rows: Sequence[dict[str, Any]],
    shown: Sequence[Shown],
    summary: dict[str, Any],
    options: Options,
) -> dict[str, Any]:
    """Returns the data of a page.

    Args:
      name: Name of the run.
      rows: Rows of the table, see `report.row`.
      shown: Circuits of one model.
      summary: The run's `summary.json`.
      options: How much is shown.
    """
    texts: list[dict[str, Any]] = []
    circuits = {s.circuit.task: _circuit(s, texts, options) for s in shown}
    for task, circuit in circuits.items():
        for note in circuit["notes"]:
            log.info("note: %s: %s", task, note)
    config = shown[0].circuit.config
    about = {s.circuit.task: s.evidence.summary for s in shown}
    edges = [row["edges"] for row in rows if "edges" in row]
    return {
        "schema": SCHEMA,
        "opens": None,
        "run": {
            "name": name,
            "step": shown[0].evidence.step,
            "model": to_dict(config),
            "summary": {key: _number(summary.get(key)) for key in ("val_loss", "nonzeros")},
        },
        "locations": {
            location: {
                "part": "MLP" if location.startswith("mlp") else "attention",
                "channels": kind.channels,
                "meaning": kind.meaning,
            }
            for location, kind in NODES.items()
        },
        "mean_edges": report.geometric_mean(edges),
        "tasks": [row | {"summary": about.get(row["task"], "")} for row in rows],
        "circuits": circuits,
        "texts": texts,
        "tokens": {token: t for s in shown for token, t in s.evidence.token_texts.items()},
    }


def _number(value: Any) -> float | None:
    """Returns a number; None for what is not one, as a summary written by hand may have."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and math.isfinite(value) else None


def _circuit(shown: Shown, texts: list[dict[str, Any]], options: Options) -> dict[str, Any]:
    """Returns what the page says about one circuit; its nodes on text are added to `texts`."""
    circuit, evidence = shown
    nodes = evidence.nodes[: options.max_nodes]
    total, notes = len(circuit.nodes), []
    if len(nodes) < total:
        notes.append(f"{len(nodes)} of {total} nodes are shown, the most important ones")
    learned = {node.name: node for node in circuit.nodes}
    index = {node.name: i for i, node in enumerate(nodes)}
    return {
        "form": circuit.form,
        "target": circuit.target,
        "loss": circuit.loss,
        "status": circuit.status,
        "scores": to_dict(circuit.scores),
        "counts": to_dict(circuit.counts),
        "controls": {name: to_dict(control) for name, control in circuit.controls.items()},
        "notes": notes,
        "total_nodes": total,
        "nodes": [
            {
                "name": node.name,
                "tau": learned[node.name].tau,
                "importance": learned[node.name].importance,
                "from_model": node.from_model,
                "mean": node.mean,
            }
            for node in nodes
        ],
        "edges": [
            [index[edge.source], index[edge.target], edge.weight]
            for edge in sorted(circuit.edges, key=lambda edge: -abs(edge.weight))
            if edge.source in index and edge.target in index
        ],
        "ablation_pairs": evidence.ablation_pairs,
        "prefix": [[prefix.nodes, prefix.loss] for prefix in evidence.prefix],
        "answer_weights": None
        if evidence.answers is None
        else {
            "tokens": evidence.answers,
            "weights": {node.name: node.answer_weights for node in nodes if node.answer_weights is not None},
        },
        "text": _text(evidence, len(nodes), texts),
        **_prompts(evidence, set(index), options.pairs),
    }


def _prompts(evidence: Evidence, names: set[str], pairs: int) -> dict[str, Any]:
    """Returns the first prompts, with the values of nodes and the attention of heads on them."""
    prompts = evidence.prompts[: 2 * pairs]
    ends = np.cumsum([prompt.length for prompt in prompts])
    entries = sum(triangle(prompt.length) for prompt in prompts)
    tokens = np.split(evidence.prompt_tokens_X[: ends[-1]], ends[:-1])
    # The key of a query that is shown, and the other way round.
    partner = {"q": "k", "k": "q"}
    recorded = set(names)
    for name in names:
        layer, part, kind, channel = name.split(".")
        recorded.add(".".join((layer, part, partner.get(kind, kind), channel)))
    sides = (
        ("model", evidence.model_values_PX, evidence.model_patterns_HY),
        ("circuit", evidence.circuit_values_PX, evidence.circuit_patterns_HY),
    )
    return {
        "rows": [
            {"tokens": ids, "answer": prompt.answer, "model": prompt.model, "circuit": prompt.circuit}
            for prompt, ids in zip(prompts, tokens, strict=True)
        ],
        "values": {
            name: {side: packed(values[i, : ends[-1]], "int16") for side, values, _ in sides}
            for i, name in enumerate(evidence.places)
            if name in recorded
        },
        "patterns": {
            f"{head.layer}.{head.head}": {
                side: packed(patterns[i, :entries], "uint8") for side, _, patterns in sides
            }
            for i, head in enumerate(evidence.heads)
        },
        "pattern_tokens": PATTERN_TOKENS,
    }


def _text(evidence: Evidence, n_nodes: int, texts: list[dict[str, Any]]) -> int:
    """Adds the text of a circuit's excerpts, once for all circuits, and its nodes; returns its index."""
    dtype = evidence.windows_WT.dtype.name
    windows = raw(evidence.windows_WT, dtype)
    at = next((i for i, text in enumerate(texts) if text["data"] == windows), len(texts))
    if at == len(texts):
        length = evidence.windows_WT.shape[1]
        texts.append({"name": evidence.text, "length": length, "dtype": dtype, "data": windows, "nodes": {}})
    spans_E6 = evidence.excerpts_E6
    ends = np.cumsum(spans_E6[:, 4] - spans_E6[:, 3])
    values = np.split(evidence.excerpt_values_Z, ends[:-1]) if len(ends) else []
    excerpts: list[list[int]] = [[] for _ in evidence.nodes]
    for e, node in enumerate(spans_E6[:, 0].tolist()):
        excerpts[node].append(e)
    for i, node in enumerate(evidence.nodes[:n_nodes]):
        kinds: list[list[Any]] = [[], [], []]
        for e in excerpts[i]:
            kind, *span = spans_E6[e, 1:].tolist()
            kinds[kind].append(span)
            if kind == 2:
                span.append(float(evidence.quantile_E[e]))
        tokens, weights = evidence.top_tokens_NK[i].tolist(), evidence.top_weights_NK[i].tolist()
        texts[at]["nodes"][node.name] = {
            "bias": node.bias,
            "gain": node.gain,
            "tokens": [[t, w] for t, w in zip(tokens, weights, strict=True) if t >= 0],
            "n_tokens": node.n_tokens,
            "largest": node.largest,
            "zero": node.zero,
            "low": node.low,
            "high": node.high,
            "counts": evidence.counts_NB[i],
            "highest": kinds[0],
            "lowest": kinds[1],
            "sampled": kinds[2],
            "values": packed(np.concatenate([np.zeros(0), *(values[e] for e in excerpts[i])]), "int8"),
        }
    return at

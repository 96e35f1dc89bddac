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

from wsparse.circuits import evidence_file, report
from wsparse.circuits import notes as notes_file
from wsparse.circuits.audits import report as audit_report
from wsparse.circuits.audits.record import Audit
from wsparse.circuits.circuit import Circuit, Status, folder_of, split
from wsparse.circuits.evidence_file import Evidence
from wsparse.circuits.notes import Notes
from wsparse.config import check, require, setting, to_dict
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError
from wsparse.nodes import NODES, Node
from wsparse.viewer import live, overlap, written
from wsparse.viewer.page import packed, raw, render

log = logging.getLogger(__name__)

_IN_TEXT = ("bias", "gain", "n_tokens", "largest", "zero", "low", "high")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to show; see the flags of `wsparse.view`."""

    task: tuple[str, ...] = setting(("all",), "Names of tasks, or all: every task that has a circuit.")
    pairs: int = setting(
        6, "Pairs of a task to show token by token, at most as many as were measured.", "at least 1"
    )
    max_nodes: int = setting(2000, "Most important nodes of a circuit to show.", "at least 1")
    notes: tuple[str, ...] = setting((), "Notes files, instead of the notes.json beside their circuits.")

    def __post_init__(self):
        require(bool(self.task), "task must name at least one task", self.task)
        check(self)


class Shown(NamedTuple):
    """A circuit, what was measured of it, and its audit and the notes on it if it has some."""

    circuit: Circuit
    evidence: Evidence
    audit: Audit | None = None
    notes: Notes | None = None


class Reading(NamedTuple):
    """What was read of a run for its page: see the arguments of `contents`."""

    name: str
    rows: list[dict[str, Any]]
    shown: list[Shown]
    summary: dict[str, Any]
    folder: pathlib.Path


def read_run(folder: pathlib.Path, options: Options) -> dict[str, Any]:
    """Returns the data of a run's page."""
    found = read(folder, options)
    return contents(found.name, found.rows, found.shown, found.summary, options, found.folder)


def read(folder: pathlib.Path, options: Options) -> Reading:
    """Returns what a run's page is made of."""
    rows, circuits = report.select(folder, options.task)
    places = {c.full_name: folder_of(folder, c.full_name) for c in circuits}
    evidence = {c.full_name: Evidence.load(places[c.full_name], c) for c in circuits}
    notes = written.read(places, options.notes)
    shown = [
        Shown(c, found, Audit.load(places[c.full_name], circuit=c.digest), notes.get(c.full_name))
        for c in circuits
        if (found := evidence[c.full_name]) is not None
    ]
    if without := [task for task, found in evidence.items() if found is None]:
        command = f"python -m wsparse.prune --run={folder} --evidence"
        missing = f"no evidence of {', '.join(without)}: {command} measures it"
        if not shown:
            raise UserError(missing)
        log.info("note: %s", missing)
    tasks = {split(row["task"])[0] for row in rows}
    log.info("%s: %d circuits of %d tasks", folder, len(shown), len(tasks))
    summary = report.training_summary(folder)
    return Reading(folder.resolve().name, rows, shown, summary, folder_of(folder))


def circuit_page(folder: str | os.PathLike[str]) -> str:
    """Returns the page of one circuit's folder as HTML, e.g. for the `srcdoc` of an `iframe`."""
    folder = pathlib.Path(folder).resolve()
    circuit = Circuit.load(folder)
    evidence = Evidence.load(folder, circuit)
    if evidence is None:
        command = "python -m wsparse.prune --run=RUN --evidence"
        raise UserError(f"{folder} has no evidence of its circuit: {command} measures it")
    name = folder.parent.parent.name
    rows = [report.row(Status.load(folder), circuit)]
    audit = Audit.load(folder, circuit=circuit.digest)
    shown = Shown(circuit, evidence, audit, notes_file.beside(folder))
    data = contents(name, rows, [shown], {}, Options(), folder.parent)
    return render(data | {"opens": circuit.full_name}, title=f"{circuit.full_name} in {name}")


def contents(
    name: str,
    rows: Sequence[dict[str, Any]],
    shown: Sequence[Shown],
    summary: dict[str, Any],
    options: Options,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Returns the data of a page: the run's name, rows of its table, circuits, `summary.json`, the model.

    Args:
      folder: The run's folder `circuits`, which may hold the model.
    """
    texts: dict[tuple[str, str], dict[str, Any]] = {}
    circuits = {s.circuit.full_name: _circuit(s, texts, options) for s in shown}
    running, static = _live(folder, shown, circuits)
    for task, circuit in circuits.items():
        for note in circuit["notes"]:
            log.info("note: %s: %s", task, note)
    about = {s.circuit.full_name: s.evidence.summary for s in shown}
    # Further circuits of a task would count it more than once.
    edges = [row["edges"] for row in rows if "edges" in row and not split(row["task"])[1]]
    return {
        "opens": None,
        "run": {
            "name": name,
            "step": shown[0].evidence.step,
            "model": to_dict(shown[0].circuit.config),
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
        "n_tasks": len({split(row["task"])[0] for row in rows}),
        "mean_edges": report.geometric_mean(edges) if edges else None,
        "tasks": [row | {"summary": about.get(row["task"], "")} for row in rows],
        "circuits": circuits,
        "texts": list(texts.values()),
        "live": running,
        "static": static,
        "others": [],
        "comparison": None,
        "overlap": overlap.contents({s.circuit.full_name: s.circuit for s in shown}),
        "tokens": {token: t for s in shown for token, t in s.evidence.token_texts.items()},
    }


def _live(
    folder: pathlib.Path, shown: Sequence[Shown], circuits: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any] | None, str]:
    """Returns the model for the page, or why there is none; what running a circuit takes is added to it."""
    try:
        model = live.read(folder, [s.circuit for s in shown])
        found = live.contents(model)
    except live.NotLive as reason:
        log.info("note: the page cannot run the model: %s", reason)
        return None, str(reason)
    decode = tokenizer_lib.from_json(model.tokenizer).decode
    for each in shown:
        own = circuits[each.circuit.full_name]
        own["live"] = live.of_circuit(model, each.circuit, each.evidence, found)
        # Of all tokens together: one may be a part of a character.
        own["rows"] = [row | {"text": decode(row["tokens"])} for row in own["rows"]]
    return found, ""


def _number(value: Any) -> float | None:
    """Returns a number; None for what is not one, as a summary may have."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and math.isfinite(value) else None


def _circuit(shown: Shown, texts: dict[tuple[str, str], dict[str, Any]], options: Options) -> dict[str, Any]:
    """Returns what the page says about one circuit; its nodes on text are added to `texts`."""
    circuit, evidence, audit, notes = shown
    nodes = evidence.nodes[: options.max_nodes]
    total = len(circuit.nodes)
    note = f"{len(nodes)} of {total} nodes are shown, the most important ones"
    learned = {node.name: vars(node) for node in circuit.nodes}
    index = {node.name: i for i, node in enumerate(nodes)}
    edges = [
        [index[edge.source], index[edge.target], edge.weight]
        for edge in circuit.edges
        if edge.source in index and edge.target in index
    ]
    constant = _constant(evidence)
    weights = {node.name: node.answer_weights for node in nodes if node.answer_weights is not None}
    return {
        **{key: getattr(circuit, key) for key in ("form", "target", "loss", "status", "misses")},
        "scores": to_dict(circuit.scores),
        "counts": to_dict(circuit.counts),
        "controls": {name: to_dict(control) for name, control in circuit.controls.items()},
        "audit": None if audit is None else _audit(audit),
        "digest": circuit.digest,
        "written": written.of_circuit(circuit, evidence, notes, list(index)),
        "notes": [note] if len(nodes) < total else [],
        "total_nodes": total,
        "nodes": [
            learned[node.name]
            | {"from_model": node.from_model, "mean": node.mean, "constant": node.name in constant}
            for node in nodes
        ],
        "edges": sorted(edges, key=lambda edge: -abs(edge[2])),
        "ablation_pairs": evidence.ablation_pairs,
        "prefix": [[prefix.nodes, prefix.loss] for prefix in evidence.prefix],
        "answer_weights": {"tokens": evidence.answers, "weights": weights} if evidence.answers else None,
        "contrast": _contrast(evidence, len(nodes)),
        "text": _text(shown, len(nodes), texts),
        "run": 0,
        "live": None,
        **_prompts(evidence, list(index), options.pairs),
    }


def _constant(evidence: Evidence) -> set[str]:
    """Returns the places whose values in the circuit are, but for rounding, the same on all prompts."""
    values_PX = evidence.circuit_values_PX
    varies_P = np.ptp(values_PX, axis=1) > 1e-5 * np.abs(values_PX).max(axis=1)
    return {name for name, varies in zip(evidence.places, varies_P.tolist(), strict=True) if not varies}


def _contrast(evidence: Evidence, n_nodes: int) -> dict[str, Any] | None:
    """Returns the tokens that tell the task's sides apart, and their entries in the channels of nodes."""
    if not evidence.contrast_tokens_J.size:
        return None
    return {
        "tokens": evidence.contrast_tokens_J,
        "counts": evidence.contrast_counts_J4,
        "weights": {
            node.name: evidence.contrast_weights_NJ[i]
            for i, node in enumerate(evidence.nodes[:n_nodes])
            if node.n_tokens
        },
    }


def _audit(audit: Audit) -> dict[str, Any]:
    """Returns the verdicts of an audit."""
    return {
        "file": audit_report.FILE,
        "tests": [
            {
                "title": test.title,
                "verdict": test.verdict,
                "mark": audit_report.MARKS[test.verdict],
                "meaning": audit_report.meaning(test),
            }
            for test in audit.tests
        ],
    }


def _prompts(evidence: Evidence, names: list[str], pairs: int) -> dict[str, Any]:
    """Returns the first prompts, with the values of nodes and the attention of heads on them."""
    prompts = evidence.prompts[: 2 * pairs]
    ends = np.cumsum([prompt.length for prompt in prompts])
    entries = sum(evidence_file.triangle(prompt.length) for prompt in prompts)
    tokens = np.split(evidence.prompt_tokens_X[: ends[-1]], ends[:-1])
    recorded = set(map(str, evidence_file.with_partners([Node.parse(name) for name in names])))
    values = {"model": evidence.model_values_PX, "circuit": evidence.circuit_values_PX}
    patterns = {"model": evidence.model_patterns_HY, "circuit": evidence.circuit_patterns_HY}
    return {
        "rows": [
            {"tokens": ids, "answer": prompt.answer, "model": prompt.model, "circuit": prompt.circuit}
            for prompt, ids in zip(prompts, tokens, strict=True)
        ],
        "values": {
            name: {side: packed(values_PX[i, : ends[-1]], "int16") for side, values_PX in values.items()}
            for i, name in enumerate(evidence.places)
            if name in recorded
        },
        "patterns": {
            f"{head.layer}.{head.head}": {
                side: packed(patterns_HY[i, :entries], "uint8") for side, patterns_HY in patterns.items()
            }
            for i, head in enumerate(evidence.heads)
        },
        "pattern_tokens": evidence_file.PATTERN_TOKENS,
    }


def _text(shown: Shown, n_nodes: int, texts: dict[tuple[str, str], dict[str, Any]]) -> int:
    """Adds the text of a circuit's excerpts, and what its nodes do on it; returns its index.

    Args:
      texts: By model and text: circuits of one model share what a node does on a text.
    """
    evidence = shown.evidence
    dtype = evidence.windows_WT.dtype.name
    windows = raw(evidence.windows_WT, dtype)
    length = evidence.windows_WT.shape[1]
    text = {"name": evidence.text, "length": length, "dtype": dtype, "data": windows, "nodes": {}}
    key = shown.circuit.model_digest, windows
    about = texts.setdefault(key, text)["nodes"]
    spans_E6 = evidence.excerpts_E6
    first_N = np.searchsorted(spans_E6[:, 0], np.arange(len(evidence.nodes) + 1)).tolist()
    ends_E = np.cumsum([0, *(spans_E6[:, 4] - spans_E6[:, 3])])
    for i, node in enumerate(evidence.nodes[:n_nodes]):
        rows = slice(first_N[i], first_N[i + 1])
        kind_E, spans_E4 = spans_E6[rows, 1], spans_E6[rows, 2:]
        sampled = kind_E == evidence_file.SAMPLED
        quantiles = zip(spans_E4[sampled].tolist(), evidence.quantile_E[rows][sampled].tolist(), strict=True)
        top = zip(evidence.top_tokens_NK[i].tolist(), evidence.top_weights_NK[i].tolist(), strict=True)
        about[node.name] = {
            **{key: getattr(node, key) for key in _IN_TEXT},
            "tokens": [[token, weight] for token, weight in top if token >= 0],
            "counts": evidence.counts_NB[i],
            "highest": spans_E4[kind_E == evidence_file.HIGHEST],
            "lowest": spans_E4[kind_E == evidence_file.LOWEST],
            "sampled": [[*span, quantile] for span, quantile in quantiles],
            "values": packed(evidence.excerpt_values_Z[ends_E[rows.start] : ends_E[rows.stop]], "int16"),
        }
    return list(texts).index(key)

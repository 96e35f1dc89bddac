"""Runs with several circuits, parts of that of `viewer_case`, for tests of pages that show many."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import shutil

import numpy as np
import viewer_case as case

from wsparse import files
from wsparse.circuits import Circuit
from wsparse.circuits.circuit import FOUND, Score, Status, joined
from wsparse.circuits.evidence_file import ARRAYS, Evidence
from wsparse.circuits.model_file import StoredModel

# Nodes of each circuit of the run, by their rank in all of `viewer_case`'s: two that share the most important
# nodes, one that shares none with them, and another circuit of a task.
PARTS = {
    "quotes": range(20),
    "quotes@small": range(8),
    "brackets": [*range(12), *range(20, 24)],
    "counting": range(24, 32),
}


def part(
    circuit: Circuit, evidence: Evidence, ranks: Sequence[int], full_name: str, digest: str
) -> tuple[Circuit, Evidence]:
    """Returns the circuit of some nodes, of another task and perhaps another model, and its evidence."""
    task, _, name = full_name.partition("@")
    keep = np.zeros(len(evidence.nodes), bool)
    keep[list(ranks)] = True
    names = {node.name for node, kept in zip(evidence.nodes, keep, strict=True) if kept}
    edges = [edge for edge in circuit.edges if {edge.source, edge.target} <= names]
    found = dataclasses.replace(
        circuit,
        task=task,
        name=name,
        model_digest=digest or circuit.model_digest,
        nodes=[node for node in circuit.nodes if node.name in names],
        edges=edges,
        counts=dataclasses.replace(circuit.counts, nodes=len(names), edges=len(edges)),
    )
    excerpts_E6 = evidence.excerpts_E6
    kept_E = keep[excerpts_E6[:, 0]]
    lengths_E = excerpts_E6[:, 4] - excerpts_E6[:, 3]
    rows = excerpts_E6[kept_E].copy()
    rows[:, 0] = (np.cumsum(keep) - 1)[rows[:, 0]]
    # Arrays by node, whose names say so.
    arrays = {name: getattr(evidence, name)[keep] for name in ARRAYS if name.split("_")[-1].startswith("N")}
    values = evidence.excerpt_values_Z[np.repeat(kept_E, lengths_E)]
    measured = dataclasses.replace(
        evidence,
        task=task,
        circuit=found.digest,
        nodes=[node for node, kept in zip(evidence.nodes, keep, strict=True) if kept],
        excerpts_E6=rows,
        quantile_E=evidence.quantile_E[kept_E],
        excerpt_values_Z=values,
        **arrays,
    )
    return found, measured


def write(
    source: pathlib.Path,
    folder: pathlib.Path,
    parts: Mapping[str, Sequence[int]],
    *,
    digest: str = "",
) -> pathlib.Path:
    """Writes a run whose circuits are parts of that in `source`; its model may have another digest."""
    whole = source / "circuits" / case.TASK
    circuit = Circuit.load(whole)
    evidence = Evidence.load(whole, circuit)
    assert evidence is not None
    circuits = folder / "circuits"
    files.make_folder(circuits)
    shutil.copy(source / "config.json", folder)
    for full_name, ranks in parts.items():
        found, measured = part(circuit, evidence, ranks, full_name, digest)
        place = circuits / joined(found.task, found.name)
        found.save(place)
        measured.save(place)
        Status(task=found.task, status=FOUND, model=Score(0.1, 1.0)).save(place)
    hard = circuits / "hard"
    Status(task="hard", status="the model cannot do it", model=Score(0.6, 0.5)).save(hard)
    stored = StoredModel.load(source / "circuits")
    if stored is not None:
        dataclasses.replace(stored, digest=digest or stored.digest).save(circuits)
    return folder

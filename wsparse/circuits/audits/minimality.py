"""Is there anything in the circuit that it does not need?"""

from __future__ import annotations

import numpy as np

from wsparse.circuits import graph
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import Measurement, TestResult

# Edges whose removal is scored; and nodes.
_MOST = 48
# Share of nodes that may be removable.
_SHARE = 0.1


def minimality(context: Context) -> TestResult:
    """Returns how many nodes, and edges, the circuit could lose one at a time."""
    rng, target = context.rng("minimality"), context.circuit.target
    nodes = rng.permutation(np.flatnonzero(context.nodes_U))[:_MOST]
    edges = rng.permutation(np.flatnonzero(graph.flatten_edges(context.edges)))[:_MOST]
    others = rng.permutation(np.flatnonzero(~context.nodes_U))[: min(8, nodes.size)]
    loss, of_nodes = _removals(context, nodes, of_edges=False)
    _, of_edges = _removals(context, edges, of_edges=True)
    added = np.array([_with(context, node) for node in others])
    removable = float(np.mean(of_nodes <= target)) if of_nodes.size else 0.0
    return TestResult(
        question="Can single nodes or edges be left out of the circuit?",
        procedure=f"{context.n_pairs} pairs of the report split; {nodes.size} nodes and {edges.size} edges, "
        f"each removed alone from the circuit, at most {_MOST} of either, drawn. The circuit was cleaned up "
        "on other pairs.",
        control="Random nodes added to the circuit one at a time: the change of its loss.",
        criterion=f"At most {_SHARE:.0%} of the nodes can be removed alone with the loss within the target, "
        f"{target:g}.",
        verdict="passed" if removable <= _SHARE else "failed",
        measurements=[
            Measurement(name="nodes that can be removed alone", value=removable, unit="share"),
            Measurement(
                name="edges that can be removed alone",
                value=float(np.mean(of_edges <= target)) if of_edges.size else None,
                unit="share",
            ),
            Measurement(
                name="median growth of the loss without a node",
                value=float(np.median(of_nodes - loss)) if of_nodes.size else None,
                control=float(np.median(added - loss)) if added.size else None,
            ),
        ],
    )


def _removals(context: Context, items: np.ndarray, *, of_edges: bool) -> tuple[float, np.ndarray]:
    """Returns the circuit's loss, and its losses without each item."""
    spans = [[0, 0], *([i, i + 1] for i in range(items.size))]
    losses = context.subject.scorer.without(
        context.pairs.report, context.nodes_U, context.remaining, items, spans, of_edges=of_edges
    ).loss
    return float(losses[0]), losses[1:]


def _with(context: Context, node: int) -> float:
    nodes_U = context.nodes_U.copy()
    nodes_U[node] = True
    return context.subject.scorer.mask(context.pairs.report, nodes_U, context.remaining).loss

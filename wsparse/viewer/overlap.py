"""How far circuits share nodes and edges, and which of them use a node.

A node's name and an edge say something only within one model: circuits of different models share nothing that
could be told from their files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial import distance

from wsparse.circuits.circuit import Circuit
from wsparse.nodes import NODES, Node

# Entry of a matrix: what two circuits have in common, None where that cannot be said.
_Matrix = list[list[Any]]


def contents(circuits: Mapping[str, Circuit]) -> dict[str, Any] | None:
    """Returns what a page says of all circuits together, by their names on the page; None for a single one.

    "names" are in an order in which circuits that share nodes are close, "models" which of the models each
    is of. For "nodes" and "edges" there are the "sizes" of the circuits, and matrices of how many are
    "shared" and of the "jaccard" index, the part of the union that is shared: None for circuits of different
    models, and where neither has any. "expected" is how many nodes would be shared were each circuit's drawn
    at random from the same locations. "uses" has `[node, model, [[index of a circuit, importance], ...]]`,
    nodes that many circuits use first.
    """
    if len(circuits) < 2:
        return None
    names = _order(circuits)
    ordered = [circuits[name] for name in names]
    digests = list(dict.fromkeys(circuit.model_digest for circuit in ordered))
    models = [digests.index(circuit.model_digest) for circuit in ordered]
    nodes = [{node.name for node in circuit.nodes} for circuit in ordered]
    edges = [{(edge.source, edge.target) for edge in circuit.edges} for circuit in ordered]
    locations = list(map(_locations, ordered))

    def expected(i: int, j: int) -> float:
        return sum(count * locations[j][at] / _width(ordered[i], at) for at, count in locations[i].items())

    return {
        "names": names,
        "models": models,
        "nodes": _shared(nodes, models),
        "edges": _shared(edges, models),
        "expected": _matrix(models, expected),
        "uses": _uses(ordered, models),
    }


def jaccard(first: set[Any], second: set[Any]) -> float | None:
    """Returns the part of the union of two sets that both have; None where both are empty."""
    union = len(first | second)
    return len(first & second) / union if union else None


def _shared(sets: Sequence[set[Any]], models: Sequence[int]) -> dict[str, Any]:
    return {
        "sizes": list(map(len, sets)),
        "shared": _matrix(models, lambda i, j: len(sets[i] & sets[j])),
        "jaccard": _matrix(models, lambda i, j: jaccard(sets[i], sets[j])),
    }


def _matrix(models: Sequence[int], entry: Callable[[int, int], Any]) -> _Matrix:
    """Returns the entries of all pairs of circuits, None where they are of different models."""
    return [
        [entry(i, j) if first == second else None for j, second in enumerate(models)]
        for i, first in enumerate(models)
    ]


def _order(circuits: Mapping[str, Circuit]) -> list[str]:
    """Returns names with those of one model together, and among them those that share nodes close."""
    groups: dict[str, list[str]] = {}
    for name, circuit in circuits.items():
        groups.setdefault(circuit.model_digest, []).append(name)
    return [name for group in groups.values() for name in _similar({name: circuits[name] for name in group})]


def _similar(circuits: Mapping[str, Circuit]) -> list[str]:
    """Returns the names of one model's circuits in the order of the leaves of a tree of their similarity."""
    names = sorted(circuits)
    if len(names) < 3:
        return names
    nodes = [{node.name for node in circuits[name].nodes} for name in names]
    apart = np.array([[1 - (jaccard(a, b) or 0) for b in nodes] for a in nodes])
    np.fill_diagonal(apart, 0)
    tree = hierarchy.linkage(distance.squareform(apart), "average", optimal_ordering=True)
    return [names[leaf] for leaf in hierarchy.leaves_list(tree)]


def _locations(circuit: Circuit) -> Counter[tuple[int, str]]:
    """Returns how many nodes a circuit has at each layer and location."""
    parsed = [Node.parse(node.name) for node in circuit.nodes]
    return Counter((node.layer, node.location) for node in parsed)


def _width(circuit: Circuit, at: tuple[int, str]) -> int:
    return NODES[at[1]].width(circuit.config)


def _uses(circuits: Sequence[Circuit], models: Sequence[int]) -> list[list[Any]]:
    """Returns the circuits that use each node, with its importance in them."""
    uses: dict[tuple[str, int], list[list[Any]]] = {}
    for i, (circuit, model) in enumerate(zip(circuits, models, strict=True)):
        for node in circuit.nodes:
            uses.setdefault((node.name, model), []).append([i, node.importance])
    rows = [[name, model, sorted(used, key=lambda use: -use[1])] for (name, model), used in uses.items()]
    return sorted(rows, key=lambda row: (-len(row[2]), -row[2][0][1], Node.parse(row[0]).order()))

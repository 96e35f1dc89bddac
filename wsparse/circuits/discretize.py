"""From a learned mask to the smallest subgraph that reaches a target loss: a cut through the order of tau."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from wsparse.circuits import graph
from wsparse.circuits.pairs import PairArrays
from wsparse.circuits.scoring import Scorer

# Sizes tried in one call of the scorer.
GRID = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Subgraph:
    """Nodes and edges of a circuit.

    Attributes:
      nodes: Bool `(U,)`.
      edges: Kernel path -> bool `(L, in, out)`: the kept nonzero weights between kept nodes.
      removed: The same for weights that were cut; other weights between kept nodes and removed ones are
        constants, and stay in the model.
      loss: Task loss on the pairs that it was chosen on.
    """

    nodes: np.ndarray
    edges: graph.EdgeMask
    removed: graph.EdgeMask
    loss: float

    @property
    def n_nodes(self) -> int:
        return int(np.count_nonzero(self.nodes))

    @property
    def n_edges(self) -> int:
        return graph.count(self.edges)

    def remaining(self, scorer: Scorer) -> graph.EdgeMask:
        """Returns every weight of the model that is not cut."""
        return graph.uncut(scorer.weights, self.removed)


class Cut(NamedTuple):
    """Result of `discretize`."""

    subgraph: Subgraph | None
    """None where no size reaches the target."""
    least_loss: float
    """The least loss that was seen."""

    def __str__(self) -> str:
        if self.subgraph is None:
            return f"target missed ({self.least_loss:.3f})"
        return f"{self.subgraph.n_nodes} nodes, {self.subgraph.n_edges} edges"


def discretize(scorer: Scorer, pairs: PairArrays, tau_U: np.ndarray, target: float) -> Cut:
    """Returns the fewest nodes, in the order of their learned `tau_U`, whose loss on `pairs` is the target's.

    The loss need not fall as nodes are added, so a grid over all sizes comes first, and the smallest size
    that reaches the target is then refined towards its neighbor below.
    """
    order = np.argsort(-np.asarray(tau_U), kind="stable")
    all_nodes = np.ones(order.size, bool)

    def first_reached(sizes: np.ndarray) -> tuple[int | None, np.ndarray]:
        """Returns the index of the smallest size that reaches the target, and the losses."""
        spans = [[size, order.size] for size in sizes]
        losses = scorer.without(pairs, all_nodes, None, order, spans, until=target).loss
        return first_within(losses, target), losses

    # Most circuits are somewhat smaller than the number of open gates: the grid is dense there.
    n_open = max(int(np.count_nonzero(np.asarray(tau_U) > 0)), 1)
    sizes = np.concatenate(
        [np.geomspace(max(n_open / 16, 1), n_open, GRID - 4), np.geomspace(n_open, order.size, 5)[1:]]
    )
    sizes = np.unique(sizes.round().astype(int))
    at, losses = first_reached(sizes)
    least_loss = float(np.nanmin(losses))
    if at is None:
        return Cut(None, least_loss)
    low, high, loss = (int(sizes[at - 1]) if at else 0), int(sizes[at]), float(losses[at])
    while high - low > 1:
        between = grid_between(low, high)
        at, losses = first_reached(between)
        if at is None:
            low = int(between[-1])
        else:
            low = int(between[at - 1]) if at else low
            high, loss = int(between[at]), float(losses[at])
    kept = np.zeros(order.size, bool)
    kept[order[:high]] = True
    return Cut(subgraph_of(scorer, kept, loss), least_loss)


def subgraph_of(scorer: Scorer, nodes_U: np.ndarray, loss: float) -> Subgraph:
    """Returns the subgraph of these nodes with every edge between them."""
    removed = {path: np.zeros_like(weights) for path, weights in scorer.weights.items()}
    edges = graph.between(nodes_U, scorer.weights, scorer.config)
    return Subgraph(nodes_U, edges, removed, loss)


def first_within(losses: np.ndarray, target: float) -> int | None:
    """Returns the index of the first loss that is at most the target; losses after it may be NaN."""
    reached = np.flatnonzero(losses <= target)
    return int(reached[0]) if reached.size else None


def grid_between(low: int, high: int) -> np.ndarray:
    """Returns up to `GRID` integers strictly between two that are at least 2 apart, evenly spaced."""
    between = np.unique(np.linspace(low, high, GRID + 2).round().astype(int)[1:-1])
    return between[(between > low) & (between < high)]

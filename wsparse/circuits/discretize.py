"""From a learned mask to a small subgraph that reaches a target: part of its open nodes, or some more."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from wsparse.circuits import graph, masks
from wsparse.circuits.pairs import PairArrays
from wsparse.circuits.scoring import Scorer

# Sizes tried in one call of the scorer.
GRID = 16
# Nodes that are added at once to those that miss the target, as a share of them.
_GROWTH = 0.5


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
    """Result of `discretize`, or of `shortest`."""

    subgraph: Subgraph | None
    """None where nothing reaches the target."""
    least_loss: float
    """The least loss that was seen."""

    def __str__(self) -> str:
        if self.subgraph is None:
            return f"target missed ({self.least_loss:.3f})"
        return f"{self.subgraph.n_nodes} nodes, {self.subgraph.n_edges} edges"


def discretize(
    scorer: Scorer,
    pairs: PairArrays,
    tau_U: np.ndarray,
    target: float,
    *,
    forbidden_U: np.ndarray | None = None,
) -> Cut:
    """Returns a subgraph of few nodes whose loss on `pairs` is at most the target.

    These are the first open nodes in the order of their learned `tau_U`. Where all of them miss the target,
    closed ones are added, see `grow`: their order in tau says nothing any more.

    Args:
      scorer: Scorer whose loss counts.
      pairs: Pairs that the circuit is chosen on.
      tau_U: Learned parameters; a node is open where its own is positive.
      target: Loss to reach.
      forbidden_U: Closed nodes that stay closed; None forbids none.
    """
    tau_U = np.asarray(tau_U)
    open_U = tau_U > 0
    order = np.argsort(-tau_U, kind="stable")[: np.count_nonzero(open_U)]
    cut = shortest(scorer, pairs, order, target)
    if cut.subgraph is not None:
        return cut
    grown = grow(scorer, pairs, open_U, target, forbidden_U=forbidden_U)
    return Cut(grown.subgraph, min(cut.least_loss, grown.least_loss))


def grow(
    scorer: Scorer,
    pairs: PairArrays,
    nodes_U: np.ndarray,
    target: float,
    *,
    forbidden_U: np.ndarray | None = None,
) -> Cut:
    """Returns the nodes with others added: as few as reach the target, where the whole model does.

    Added are those of which `Scorer.openings` estimates that they lower the loss most; at most half as many
    as there are at a time.

    Args:
      scorer: Scorer whose loss counts.
      pairs: Pairs that the circuit is chosen on.
      nodes_U: Bool, nodes that stay.
      target: Loss to reach.
      forbidden_U: Nodes that are not added; None forbids none.
    """
    allowed_U = np.ones(nodes_U.size, bool) if forbidden_U is None else ~forbidden_U
    # The path of the estimates leads there.
    whole = scorer.mask(pairs, allowed_U).loss
    while whole <= target and (outside := np.flatnonzero(allowed_U & ~nodes_U)).size:
        estimates_U = scorer.openings(pairs, nodes_U, allowed_U)
        n_added = max(GRID, int(_GROWTH * np.count_nonzero(nodes_U)))
        order = outside[np.argsort(estimates_U[outside], kind="stable")][:n_added]
        cut = shortest(scorer, pairs, order, target, base_U=nodes_U)
        if cut.subgraph is not None:
            return cut
        nodes_U = nodes_U.copy()
        nodes_U[order] = True
    return Cut(None, whole)


def shortest(
    scorer: Scorer, pairs: PairArrays, order: np.ndarray, target: float, *, base_U: np.ndarray | None = None
) -> Cut:
    """Returns the shortest prefix of an order of nodes that reaches the target, on top of the nodes `base_U`.

    The loss need not fall as nodes are added, so a grid over all lengths comes first, and the smallest length
    that reaches the target is then refined towards its neighbor below.
    """
    nodes_U = np.zeros(masks.n_nodes(scorer.config), bool) if base_U is None else base_U.copy()
    nodes_U[order] = True

    def first_reached(lengths: np.ndarray) -> tuple[int | None, np.ndarray]:
        """Returns the index of the smallest length that reaches the target, and the losses."""
        spans = [[length, order.size] for length in lengths]
        losses = scorer.without(pairs, nodes_U, None, order, spans, until=target).loss
        return first_within(losses, target), losses

    # Most of an order is needed more often than little of it.
    lengths = np.unique(np.geomspace(max(order.size / 16, 1), max(order.size, 1), GRID).round().astype(int))
    at, losses = first_reached(np.minimum(lengths, order.size))
    least_loss = float(np.nanmin(losses))
    if at is None:
        return Cut(None, least_loss)
    low, high, loss = (int(lengths[at - 1]) if at else 0), int(lengths[at]), float(losses[at])
    while high - low > 1:
        between = grid_between(low, high)
        at, losses = first_reached(between)
        if at is None:
            low = int(between[-1])
        else:
            low = int(between[at - 1]) if at else low
            high, loss = int(between[at]), float(losses[at])
    nodes_U[order[high:]] = False
    return Cut(subgraph_of(scorer, nodes_U, loss), least_loss)


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

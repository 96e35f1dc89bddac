"""Greedy changes of a subgraph: removing what its target does not need, adding what makes it necessary."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

from wsparse.circuits import graph
from wsparse.circuits.discretize import GRID, Subgraph, first_within, grid_between
from wsparse.circuits.pairs import HasPairs
from wsparse.circuits.scoring import Scorer

# Passes of `clean_up`: nodes, edges, nodes again.
PASSES = 3

Advance = Callable[[int], Any]


def clean_up(
    scorer: Scorer,
    pairs: HasPairs,
    subgraph: Subgraph,
    target: float,
    *,
    single_removals: int = 256,
    advance: Advance = lambda count: None,
) -> Subgraph:
    """Remove nodes, then single edges, then nodes again, that the target does not need.

    A node is worth removing the more edges it takes with it and the less the loss grows.

    Args:
      scorer: Scorer of the model.
      pairs: Pairs that losses are taken on.
      subgraph: Where to start.
      target: Largest loss allowed.
      single_removals: How many single removals, in each of the passes, may be scored exactly once first-order
        estimates lead no further; 0 relies on the estimates alone, in a tenth of the time.
      advance: Called with counts that add up to `PASSES * (single_removals + 1)`, for a progress bar.

    Returns:
      The smaller subgraph.
    """
    removal = (_NodeRemoval, _EdgeRemoval, _NodeRemoval)
    for kind in removal:
        items = kind(scorer, pairs, subgraph)
        kept, loss = _Greedy(items, target, subgraph.loss, single_removals, advance).run()
        subgraph = items.subgraph(kept, loss)
    return subgraph


def complete(
    scorer: Scorer,
    pairs: HasPairs,
    subgraph: Subgraph,
    tau_U: np.ndarray,
    target: float,
    *,
    necessity: float,
    max_added: int = 128,
) -> Subgraph:
    """Add nodes until the model without the circuit loses the task.

    A model may do a task in more than one way, and the smallest sufficient circuit is then only one of
    them. Nodes are added in the order in which first-order estimates say that the rest of the model needs
    them, as few as possible, and those that turn out not to be needed are taken back.

    Args:
      scorer: Scorer of the model.
      pairs: Pairs that losses are taken on.
      subgraph: A sufficient circuit.
      tau_U: Learned parameters of the nodes; of equal estimates the larger comes first.
      target: Largest loss that the circuit alone may have.
      necessity: Loss that the model without the circuit must have.
      max_added: Largest number of nodes to add.

    Returns:
      The circuit with its additions and the weights between all of them; `subgraph` itself where it needs
      none, or where adding nodes does not get there.
    """
    size, remaining = subgraph.nodes.size, subgraph.remaining(scorer)

    def without(order: np.ndarray, lengths: Any) -> np.ndarray:
        """Returns losses of the model without the circuit and the first nodes of an order."""
        spans = [[0, length] for length in lengths]
        return scorer.without_nodes(pairs, ~subgraph.nodes, None, order, spans).loss

    added = np.zeros(0, int)
    if without(added, [0])[0] >= necessity:
        return subgraph
    while added.size < max_added:
        outside = ~subgraph.nodes & ~_bools(size, added)
        estimates = scorer.attributions(pairs, outside)[0]
        ranking = np.lexsort((-np.asarray(tau_U), -estimates))
        order = np.concatenate([added, ranking[outside[ranking]][: max_added - added.size]])
        # First-order estimates hold near the model as it is: half as many again at a time.
        lengths = np.unique(np.linspace(added.size + 1, added.size * 1.5 + GRID, GRID).astype(int))
        lengths = lengths[lengths <= order.size]
        reached = np.flatnonzero(without(order, lengths) >= necessity)
        if reached.size:
            added = order[: lengths[reached[0]]]
            break
        added = order[: lengths[-1]]
    else:
        return subgraph
    # Try to take every node back, the last first.
    for node in added[::-1]:
        fewer = added[added != node]
        if without(fewer, [fewer.size])[0] >= necessity:
            added = fewer
    nodes_U = subgraph.nodes | _bools(size, added)
    edges = graph.between(nodes_U, remaining, scorer.config)
    loss = scorer.mask(pairs, nodes_U, remaining).loss
    return Subgraph(nodes_U, edges, subgraph.removed, loss) if loss <= target else subgraph


class _NodeRemoval:
    """Removal of nodes from a subgraph; items are indices of nodes."""

    def __init__(self, scorer: Scorer, pairs: HasPairs, subgraph: Subgraph):
        self._scorer, self._pairs, self._subgraph = scorer, pairs, subgraph
        self._remaining = subgraph.remaining(scorer)
        self.items = np.flatnonzero(subgraph.nodes)

    def _mask(self, kept: np.ndarray) -> np.ndarray:
        return _bools(self._subgraph.nodes.size, kept)

    def losses(self, kept: np.ndarray, order: np.ndarray, spans: Any, until: float) -> np.ndarray:
        """Returns the losses of the kept items without spans of an order of them."""
        return self._scorer.without_nodes(
            self._pairs, self._mask(kept), self._remaining, order, spans, until=until
        ).loss

    def estimates(self, kept: np.ndarray) -> np.ndarray:
        """Returns the growth of the loss to first order, for each of the kept items."""
        return self._scorer.attributions(self._pairs, self._mask(kept), self._remaining)[0][kept]

    def savings(self, kept: np.ndarray) -> np.ndarray:
        """Returns how many edges each of the kept items takes with it, and a half."""
        edges = graph.between(self._mask(kept), self._remaining, self._scorer.config)
        return 0.5 + graph.degrees(edges, self._scorer.config)[kept]

    def subgraph(self, kept: np.ndarray, loss: float) -> Subgraph:
        """Returns the subgraph of the kept items."""
        edges = graph.between(self._mask(kept), self._remaining, self._scorer.config)
        return Subgraph(self._mask(kept), edges, self._subgraph.removed, loss)


class _EdgeRemoval:
    """Removal of edges from a subgraph; items are indices into `graph.flatten_edges`."""

    def __init__(self, scorer: Scorer, pairs: HasPairs, subgraph: Subgraph):
        self._scorer, self._pairs, self._subgraph = scorer, pairs, subgraph
        self._removed = graph.flatten_edges(subgraph.removed)
        self._is_item = graph.flatten_edges(subgraph.edges)
        self.items = np.flatnonzero(self._is_item)

    def _split(self, vector: np.ndarray) -> graph.EdgeMask:
        return graph.unflatten_edges(vector, self._subgraph.edges)

    def _remaining(self, kept: np.ndarray) -> graph.EdgeMask:
        size = self._removed.size
        return self._split(~self._removed & (~self._is_item | _bools(size, kept)))

    def losses(self, kept: np.ndarray, order: np.ndarray, spans: Any, until: float) -> np.ndarray:
        """Returns the losses of the kept items without spans of an order of them."""
        nodes, remaining = self._subgraph.nodes, self._remaining(kept)
        return self._scorer.without_edges(self._pairs, nodes, remaining, order, spans, until=until).loss

    def estimates(self, kept: np.ndarray) -> np.ndarray:
        """Returns the growth of the loss to first order, for each of the kept items."""
        nodes, remaining = self._subgraph.nodes, self._remaining(kept)
        return graph.flatten_edges(self._scorer.attributions(self._pairs, nodes, remaining)[1])[kept]

    def savings(self, kept: np.ndarray) -> np.ndarray:
        """Returns 1 for each of the kept items."""
        return np.ones(kept.size)

    def subgraph(self, kept: np.ndarray, loss: float) -> Subgraph:
        """Returns the subgraph of the kept items."""
        is_kept = _bools(self._removed.size, kept)
        removed = self._removed | (self._is_item & ~is_kept)
        return Subgraph(self._subgraph.nodes, self._split(is_kept), self._split(removed), loss)


@dataclasses.dataclass
class _Greedy:
    """Removes items while the loss stays at the target.

    As long as first-order estimates lead far, the longest passing prefix of their order goes at once. Then
    single removals are scored exactly, cheapest first, a chunk at a time, until none is left that the target
    allows.
    """

    removal: _NodeRemoval | _EdgeRemoval
    target: float
    loss: float
    single_removals: int
    advance: Advance

    def run(self) -> tuple[np.ndarray, float]:
        """Returns the items that are left, and their loss."""
        self._kept = self.removal.items
        n_removed = self._kept.size
        # A round scores some thirty masks: when it removes next to nothing, exact scores do better.
        while self._kept.size and n_removed > self._kept.size / GRID:
            order, _ = self._by_worth()
            n_removed = self._remove_prefix(order)
        self.advance(1)
        budget = self.single_removals
        while self._kept.size:
            budget, changed = self._remove_singles(budget)
            if not changed:
                break
        self.advance(max(budget, 0))
        return self._kept, self.loss

    def _by_worth(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the kept items, the one most worth removing first, and what each saves."""
        savings = self.removal.savings(self._kept)
        order = np.argsort(self.removal.estimates(self._kept) / savings, kind="stable")
        return self._kept[order], savings[order]

    def _remove_singles(self, budget: int) -> tuple[int, bool]:
        """Score every item's removal; return what is left of the budget, and whether to go on."""
        order, savings = self._by_worth()
        changed = False
        for start in range(0, order.size, GRID):
            chunk = order[start : start + GRID]
            if chunk.size > budget:
                return budget, False
            budget -= chunk.size
            self.advance(chunk.size)
            spans = [[i, i + 1] for i in range(chunk.size)]
            losses = self.removal.losses(self._kept, chunk, spans, -np.inf)
            growth = (losses - self.loss) / savings[start : start + GRID]
            allowed = np.flatnonzero(losses <= self.target)
            if allowed.size:
                cheapest = allowed[np.argsort(growth[allowed], kind="stable")]
                changed |= self._remove_prefix(chunk[cheapest]) > 0
        return budget, changed

    def _remove_prefix(self, order: np.ndarray) -> int:
        """Remove the longest prefix of an order that the target allows, and return its length."""
        length, loss = self._longest_prefix(order)
        if length:
            self._kept, self.loss = np.setdiff1d(self._kept, order[:length]), loss
        return length

    def _longest_prefix(self, order: np.ndarray) -> tuple[int, float]:
        def longest(lengths: np.ndarray) -> tuple[int | None, float]:
            """Returns the index of the longest length that can go, and the loss; it is tried first."""
            spans = [[0, length] for length in lengths[::-1]]
            losses = self.removal.losses(self._kept, order, spans, self.target)
            at = first_within(losses, self.target)
            return (None, 0.0) if at is None else (lengths.size - 1 - at, float(losses[at]))

        lengths = np.unique(np.geomspace(1, order.size, GRID).round().astype(int))
        at, loss = longest(lengths)
        if at is None:
            return 0, 0.0
        low = int(lengths[at])
        high = int(lengths[at + 1]) if at + 1 < lengths.size else low + 1
        if high - low > 1:
            between = grid_between(low, high)
            at, new_loss = longest(between)
            if at is not None:
                low, loss = int(between[at]), new_loss
        return low, loss


def _bools(size: int, indices: np.ndarray) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[indices] = True
    return mask

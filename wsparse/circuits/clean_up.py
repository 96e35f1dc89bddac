"""Greedy changes of a subgraph: removing what its target does not need, adding what makes it necessary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from wsparse.circuits import graph
from wsparse.circuits.criterion import Criterion
from wsparse.circuits.discretize import GRID, Subgraph, first_within, grid_between
from wsparse.circuits.pairs import PairArrays
from wsparse.circuits.scoring import Scorer
from wsparse.config import ModelConfig

# Passes of `clean_up`: nodes, edges, nodes again.
PASSES = 3
# Share of the nodes that may go between two attacks, at first; it shrinks to single nodes.
_FIRST_SHARE = 1 / 6

Advance = Callable[[int], Any]


class Removed(NamedTuple):
    """Nodes or edges that a clean-up removed at once."""

    items: np.ndarray
    """Indices of nodes, or indices into `graph.flatten_edges`."""
    of_edges: bool
    loss: float
    """Task loss without them, on the pairs that the circuit is chosen on."""


@dataclasses.dataclass(frozen=True, eq=False)
class CleanUp:
    """The way of a clean-up, on which a circuit can be chosen that is less than cleaned up.

    Attributes:
      start: The subgraph before it.
      stages: What was removed, in order. After every stage the subgraph is known to meet the criterion.
      result: The subgraph at its end.
      config: Config of the model.
    """

    start: Subgraph
    stages: Sequence[Sequence[Removed]]
    result: Subgraph
    config: ModelConfig

    def after(self, n_stages: int) -> Subgraph:
        """Returns the subgraph after the first stages."""
        subgraph = self.start
        for stage in self.stages[:n_stages]:
            for removed in stage:
                subgraph = _without(subgraph, removed, self.config)
        return subgraph

    def last_within(self, loss: Callable[[Subgraph], float], bound: float) -> Subgraph:
        """Returns the subgraph of the latest stage that a bisection finds within a bound of another loss.

        It is the result where that is within the bound, or where the start is not.
        """
        if loss(self.result) <= bound or loss(self.start) > bound:
            return self.result
        within, beyond = 0, len(self.stages)
        while beyond - within > 1:
            middle = (within + beyond) // 2
            if loss(self.after(middle)) <= bound:
                within = middle
            else:
                beyond = middle
        return self.after(within)


def clean_up(
    criterion: Criterion,
    pairs: PairArrays,
    subgraph: Subgraph,
    target: float,
    *,
    single_removals: int = 256,
    advance: Advance = lambda count: None,
) -> CleanUp:
    """Returns the removal of nodes, then single edges, then nodes again, that the target does not need.

    A node is worth removing the more edges it takes with it and the less the loss grows. A pass whose result
    adversaries refute is done again; where they refute every result, it removes nothing.
    `advance` is called with counts that add up to `PASSES * (single_removals + 1)`, for a progress bar.
    """
    start, stages = subgraph, []
    if criterion.is_adversarial:
        subgraph, stages = _shrink(criterion, pairs, subgraph, target)
    for of_edges in (False, True, False):
        reports = iter([advance])

        def run(removal: _Removal) -> None:
            removal.run(single_removals, next(reports, lambda count: None))  # noqa: B023 (called here alone)

        if removal := _settled(criterion, pairs, subgraph, target, run, of_edges=of_edges):
            subgraph = removal.subgraph
            # Where adversaries matter, only the end of a pass was attacked.
            stages += [removal.removed] if criterion.is_adversarial else [[each] for each in removal.removed]
    return CleanUp(start, stages, subgraph, criterion.scorer.config)


def _shrink(
    criterion: Criterion, pairs: PairArrays, subgraph: Subgraph, target: float
) -> tuple[Subgraph, list[Sequence[Removed]]]:
    """Returns the subgraph without the nodes that can go a few at a time, each time under attack; the stages.

    What is removed up to the edge of a bank of adversaries falls to the next one.
    """
    share, stages = _FIRST_SHARE, []
    while (limit := int(subgraph.n_nodes * share)) >= 1:

        def run(removal: _Removal, limit: int = limit) -> None:
            removal.run_prefix(limit)

        removal = _settled(criterion, pairs, subgraph, target, run, of_edges=False)
        if removal is None or not removal.removed:
            share /= 4
        else:
            subgraph = removal.subgraph
            stages.append(removal.removed)
    return subgraph, stages


def _settled(
    criterion: Criterion,
    pairs: PairArrays,
    subgraph: Subgraph,
    target: float,
    run: Callable[[_Removal], None],
    *,
    of_edges: bool,
) -> _Removal | None:
    """Returns the first removal, made by `run`, that no adversary refutes; None if all are refuted."""

    def proposal(scorer: Scorer) -> _Removal:
        removal = _Removal(scorer, pairs, subgraph, target, of_edges=of_edges)
        run(removal)
        return removal

    return criterion.settle(proposal, lambda removal: removal.subgraph, target)


def _without(subgraph: Subgraph, removed: Removed, config: ModelConfig) -> Subgraph:
    """Returns the subgraph without nodes or edges that are removed at once."""
    if removed.of_edges:
        size = graph.flatten_edges(subgraph.edges).size
        gone = graph.unflatten_edges(_bools(size, removed.items), subgraph.edges)
        edges = {path: subgraph.edges[path] & ~gone[path] for path in gone}
        cut = {path: subgraph.removed[path] | gone[path] for path in gone}
        return Subgraph(subgraph.nodes, edges, cut, removed.loss)
    nodes_U = subgraph.nodes & ~_bools(subgraph.nodes.size, removed.items)
    edges = graph.between(nodes_U, subgraph.edges, config)
    return Subgraph(nodes_U, edges, subgraph.removed, removed.loss)


def complete(
    scorer: Scorer,
    pairs: PairArrays,
    subgraph: Subgraph,
    tau_U: np.ndarray,
    target: float,
    *,
    necessity: float,
    sufficiency: Scorer | None = None,
    max_added: int = 128,
) -> Subgraph:
    """Returns the circuit with the nodes added without which the model without the circuit loses the task.

    A model may do a task in more than one way, and the smallest sufficient circuit is then only one of
    them. Nodes are added in the order in which first-order estimates say that the rest of the model needs
    them, as few as possible, and those that turn out not to be needed are taken back.

    Args:
      subgraph: A sufficient circuit.
      tau_U: Learned parameters of the nodes; of equal estimates the larger comes first.
      target: Largest loss that the circuit alone may have.
      necessity: Loss that the model without the circuit must have.
      sufficiency: Scorer that the circuit alone is held to; `scorer` by default.
      max_added: Largest number of nodes to add.

    Returns:
      `subgraph` itself where it needs none, or where adding nodes does not get there.
    """
    size, remaining = subgraph.nodes.size, subgraph.remaining(scorer)

    def without(order: np.ndarray, lengths: Any) -> np.ndarray:
        """Returns losses of the model without the circuit and the first nodes of an order."""
        spans = [[0, length] for length in lengths]
        return scorer.without(pairs, ~subgraph.nodes, None, order, spans).loss

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
    loss = (sufficiency or scorer).mask(pairs, nodes_U, remaining).loss
    return Subgraph(nodes_U, edges, subgraph.removed, loss) if loss <= target else subgraph


class _Removal:
    """Removal of nodes, or of edges, from a subgraph while the loss stays at the target.

    As long as first-order estimates lead far, the longest passing prefix of their order goes at once. Then
    single removals are scored exactly, cheapest first, a chunk at a time, until none is left that the target
    allows. Items are indices of nodes, or indices into `graph.flatten_edges`.
    """

    def __init__(
        self, scorer: Scorer, pairs: PairArrays, subgraph: Subgraph, target: float, *, of_edges: bool
    ):
        self._scorer, self._pairs, self._target, self._of_edges = scorer, pairs, target, of_edges
        self.removed: list[Removed] = []
        self._continue_with(subgraph)

    def _continue_with(self, subgraph: Subgraph) -> None:
        self.subgraph = subgraph
        is_item = graph.flatten_edges(subgraph.edges) if self._of_edges else subgraph.nodes
        self._kept = np.flatnonzero(is_item)

    def run(self, single_removals: int, advance: Advance) -> None:
        """Remove what can go; see `clean_up`."""
        n_removed = self._kept.size
        # A round scores some thirty masks: when it removes next to nothing, exact scores do better.
        while self._kept.size and n_removed > self._kept.size / GRID:
            order, _ = self._by_worth()
            n_removed = self._remove_prefix(order)
        advance(1)
        budget, changed = single_removals, True
        while self._kept.size and changed:
            budget, changed = self._remove_singles(budget, advance)
        advance(budget)

    def run_prefix(self, limit: int) -> None:
        """Remove at most `limit` items, those that first-order estimates find the least worth."""
        order, _ = self._by_worth()
        self._remove_prefix(order[:limit])

    def _by_worth(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the items, the one most worth removing first, and how many edges each takes with it."""
        now = self.subgraph
        growth_U, growth = self._scorer.attributions(self._pairs, now.nodes, now.remaining(self._scorer))
        if self._of_edges:
            growth, savings = graph.flatten_edges(growth)[self._kept], np.ones(self._kept.size)
        else:
            # A node without edges is worth removing too.
            growth = growth_U[self._kept]
            savings = 0.5 + graph.degrees(now.edges, self._scorer.config)[self._kept]
        order = np.argsort(growth / savings, kind="stable")
        return self._kept[order], savings[order]

    def _losses(self, order: np.ndarray, spans: Any, until: float) -> np.ndarray:
        """Returns the losses without spans of an order of items."""
        nodes_U, remaining = self.subgraph.nodes, self.subgraph.remaining(self._scorer)
        return self._scorer.without(
            self._pairs, nodes_U, remaining, order, spans, of_edges=self._of_edges, until=until
        ).loss

    def _remove_singles(self, budget: int, advance: Advance) -> tuple[int, bool]:
        """Score every item's removal; return what is left of the budget, and whether to go on."""
        order, savings = self._by_worth()
        changed = False
        for start in range(0, order.size, GRID):
            chunk = order[start : start + GRID]
            if chunk.size > budget:
                return budget, False
            budget -= chunk.size
            advance(chunk.size)
            losses = self._losses(chunk, [[i, i + 1] for i in range(chunk.size)], -np.inf)
            growth = (losses - self.subgraph.loss) / savings[start : start + GRID]
            allowed = np.flatnonzero(losses <= self._target)
            if allowed.size:
                cheapest = allowed[np.argsort(growth[allowed], kind="stable")]
                changed |= self._remove_prefix(chunk[cheapest]) > 0
        return budget, changed

    def _remove_prefix(self, order: np.ndarray) -> int:
        """Remove the longest prefix of an order that the target allows, and return its length."""

        def longest(lengths: np.ndarray) -> tuple[int, float] | None:
            """Returns the index of the longest length that can go, and the loss; it is tried first."""
            losses = self._losses(order, [[0, length] for length in lengths[::-1]], self._target)
            at = first_within(losses, self._target)
            return None if at is None else (lengths.size - 1 - at, float(losses[at]))

        lengths = np.unique(np.geomspace(1, order.size, GRID).round().astype(int))
        if not (found := longest(lengths)):
            return 0
        if found[0] + 1 < lengths.size:
            between = grid_between(lengths[found[0]], lengths[found[0] + 1])
            if between.size and (further := longest(between)):
                lengths, found = between, further
        n_items = int(lengths[found[0]])
        self.removed.append(Removed(order[:n_items], self._of_edges, found[1]))
        self._continue_with(_without(self.subgraph, self.removed[-1], self._scorer.config))
        return n_items


def _bools(size: int, indices: np.ndarray) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[indices] = True
    return mask

"""From a learned mask to the smallest circuit that reaches a target loss.

First a cut through the order of tau, then a greedy clean-up of nodes, then of single edges.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wsparse.circuits import graph
from wsparse.circuits.pairs import HasPairs
from wsparse.circuits.scoring import GONE, STAYS, Ranks, Scorer

# Sizes tried in one call of the scorer.
_GRID = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Nodes and edges of a circuit.

    Attributes:
      nodes: bool `(U,)`.
      edges: kernel path -> bool `(L, in, out)`: the kept nonzero weights between kept nodes.
      removed: the same for weights that were cut; other weights between kept nodes and removed ones are
        constants, and stay in the model.
      loss: task loss on the pairs that it was chosen on.
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

    def stays(self, scorer: Scorer) -> graph.EdgeMask:
        """Every weight of the model that is not cut."""
        return {path: scorer.weights[path] & ~self.removed[path] for path in scorer.weights}


def discretize(
    scorer: Scorer, pairs: HasPairs, tau_U: np.ndarray, target: float
) -> tuple[Parts | None, float]:
    """The smallest number of nodes, in the order of tau, whose loss reaches the target.

    The loss need not fall as nodes are added, so a grid over all sizes comes first, and the smallest size
    that reaches the target is then refined towards its neighbor below.

    Returns:
      The circuit, or None where no size reaches the target, and the least loss that was seen.
    """
    order = np.argsort(-np.asarray(tau_U), kind="stable")
    ranks = np.empty(order.size, np.int32)
    ranks[order] = np.arange(order.size)
    all_ranks = scorer.ranks(np.ones(order.size, bool))._replace(nodes=ranks)

    def first_reached(sizes: np.ndarray) -> tuple[int | None, np.ndarray]:
        """Index of the smallest size that reaches the target, and the losses."""
        return _first_within(scorer, pairs, all_ranks, [[k, order.size] for k in sizes], target)

    # Most circuits are somewhat smaller than the number of open gates: the grid is dense there.
    n_open = max(int(np.count_nonzero(np.asarray(tau_U) > 0)), 1)
    sizes = np.concatenate(
        [
            np.geomspace(max(n_open / 16, 1), n_open, _GRID - 4),
            np.geomspace(n_open, order.size, 5)[1:],
        ]
    )
    sizes = np.unique(sizes.round().astype(int))
    at, found = first_reached(sizes)
    least = float(np.nanmin(found))
    if at is None:
        return None, least
    low, high, loss = (int(sizes[at - 1]) if at else 0), int(sizes[at]), float(found[at])
    while high - low > 1:
        between = _between(low, high)
        at, found = first_reached(between)
        if at is None:
            low = int(between[-1])
        else:
            low = int(between[at - 1]) if at else low
            high, loss = int(between[at]), float(found[at])
    return circuit_of(scorer, ranks < high, loss), least


def circuit_of(scorer: Scorer, nodes_U: np.ndarray, loss: float) -> Parts:
    """The circuit of these nodes with every edge between them."""
    nothing = {path: np.zeros_like(each) for path, each in scorer.weights.items()}
    edges = graph.between(nodes_U, scorer.weights, scorer.config)
    return Parts(nodes_U, edges, nothing, loss)


def clean_up(
    scorer: Scorer, pairs: HasPairs, parts: Parts, target: float, *, singles: int = 256
) -> Parts:
    """Remove nodes, then single edges, then nodes again, that the target does not need.

    A node is worth removing the more edges it takes with it and the less the loss grows.

    Args:
      scorer: of the model.
      pairs: that the loss is taken on.
      parts: where to start.
      target: largest loss allowed.
      singles: how many single removals, in each of the three passes, may be scored exactly once first-order
        estimates lead no further; 0 goes by the estimates alone, in a tenth of the time.
    """
    parts = _without_nodes(scorer, pairs, parts, target, singles)
    parts = _without_edges(scorer, pairs, parts, target, singles)
    return _without_nodes(scorer, pairs, parts, target, singles)


def complete(
    scorer: Scorer,
    pairs: HasPairs,
    parts: Parts,
    tau_U: np.ndarray,
    target: float,
    *,
    least: float,
    most: int = 128,
) -> Parts:
    """Add nodes until the model without the circuit loses the task.

    A model may do a task in more than one way, and the smallest sufficient circuit is then only one of
    them. Nodes are added in the order in which first-order estimates say that the rest of the model needs
    them, as few as possible, and those that turn out not to be needed are taken back.

    Args:
      scorer: of the model.
      pairs: that losses are taken on.
      parts: a circuit.
      tau_U: what was learned; of equal estimates the larger comes first.
      target: largest loss that the circuit alone may have.
      least: loss that the model without the circuit must have.
      most: nodes added at most.

    Returns:
      The circuit with its additions and the weights between all of them; `parts` itself where it needs
      none, or where adding nodes does not get there.
    """
    size, stays = parts.nodes.size, parts.stays(scorer)
    outside = scorer.ranks(~parts.nodes)

    def without(order: np.ndarray, spans: Any) -> np.ndarray:
        """Losses of the model without the circuit and without spans of an order."""
        ranks = outside.nodes.copy()
        ranks[order] = np.arange(order.size)
        return scorer.spans(pairs, outside._replace(nodes=ranks), spans).loss

    none = np.zeros(0, int)
    if without(none, [[0, 0]])[0] >= least:
        return parts
    added = none
    while added.size < most:
        rest = ~parts.nodes & ~_bools(size, added)
        estimates = scorer.attributions(pairs, rest)[0]
        ranking = np.lexsort((-np.asarray(tau_U), -estimates))
        order = np.concatenate([added, ranking[rest[ranking]][: most - added.size]])
        # First-order estimates hold near the model as it is: half as many again at a time.
        lengths = np.unique(
            np.linspace(added.size + 1, added.size * 1.5 + _GRID, _GRID).astype(int)
        )
        lengths = lengths[lengths <= order.size]
        reached = np.flatnonzero(without(order, [[0, n] for n in lengths]) >= least)
        if reached.size:
            added = order[: lengths[reached[0]]]
            break
        added = order[: lengths[-1]]
    else:
        return parts
    # Taking one back is tried for each, the last first.
    for node in added[::-1]:
        fewer = added[added != node]
        if without(fewer, [[0, fewer.size]])[0] >= least:
            added = fewer
    nodes_U = parts.nodes | _bools(size, added)
    edges = graph.between(nodes_U, stays, scorer.config)
    loss = scorer.mask(pairs, nodes_U, stays).loss
    return Parts(nodes_U, edges, parts.removed, loss) if loss <= target else parts


def _without_nodes(
    scorer: Scorer, pairs: HasPairs, parts: Parts, target: float, singles: int
) -> Parts:
    stays = parts.stays(scorer)
    edge_ranks = scorer.ranks(parts.nodes, stays).edges

    def ranks(order: np.ndarray, kept: np.ndarray) -> Ranks:
        of_nodes = np.full(parts.nodes.size, GONE)
        of_nodes[kept] = STAYS
        of_nodes[order] = np.arange(order.size)
        return Ranks(of_nodes, edge_ranks)

    def estimates(kept: np.ndarray) -> np.ndarray:
        return scorer.attributions(pairs, _bools(parts.nodes.size, kept), stays)[0][kept]

    def costs(kept: np.ndarray) -> np.ndarray:
        mask = _bools(parts.nodes.size, kept)
        edges = graph.between(mask, stays, scorer.config)
        return 0.5 + graph.degrees(edges, scorer.config)[kept]

    kept, loss = _greedy(
        scorer,
        pairs,
        np.flatnonzero(parts.nodes),
        ranks,
        estimates,
        costs,
        target,
        parts.loss,
        singles,
    )
    nodes_U = _bools(parts.nodes.size, kept)
    edges = graph.between(nodes_U, stays, scorer.config)
    return Parts(nodes_U, edges, parts.removed, loss)


def _without_edges(
    scorer: Scorer, pairs: HasPairs, parts: Parts, target: float, singles: int
) -> Parts:
    paths = list(parts.edges)
    ends = np.cumsum([parts.edges[path].size for path in paths])[:-1]
    node_ranks = scorer.ranks(parts.nodes).nodes
    gone = np.concatenate([parts.removed[path].ravel() for path in paths])

    def split(vector: np.ndarray) -> dict[str, np.ndarray]:
        pieces = np.split(vector, ends)
        return {p: v.reshape(parts.edges[p].shape) for p, v in zip(paths, pieces, strict=True)}

    candidates = np.flatnonzero(np.concatenate([parts.edges[path].ravel() for path in paths]))
    is_candidate = _bools(gone.size, candidates)

    def ranks(order: np.ndarray, kept: np.ndarray) -> Ranks:
        of_edges = np.where(gone | is_candidate, GONE, STAYS)
        of_edges[kept] = STAYS
        of_edges[order] = np.arange(order.size)
        return Ranks(node_ranks, split(of_edges))

    def stays(kept: np.ndarray) -> graph.EdgeMask:
        return split(~gone & (~is_candidate | _bools(gone.size, kept)))

    def estimates(kept: np.ndarray) -> np.ndarray:
        of_edges = scorer.attributions(pairs, parts.nodes, stays(kept))[1]
        return np.concatenate([of_edges[path].ravel() for path in paths])[kept]

    kept, loss = _greedy(
        scorer,
        pairs,
        candidates,
        ranks,
        estimates,
        lambda kept: np.ones(kept.size),
        target,
        parts.loss,
        singles,
    )
    is_kept = _bools(gone.size, kept)
    return Parts(parts.nodes, split(is_kept), split(gone | (is_candidate & ~is_kept)), loss)


def _greedy(
    scorer: Scorer,
    pairs: HasPairs,
    kept: np.ndarray,
    ranks: Callable[[np.ndarray, np.ndarray], Ranks],
    estimates: Callable[[np.ndarray], np.ndarray],
    costs: Callable[[np.ndarray], np.ndarray],
    target: float,
    loss: float,
    singles: int,
) -> tuple[np.ndarray, float]:
    """Remove items while the loss stays at the target.

    As long as first-order estimates lead far, the longest passing prefix of their order goes at once. Then
    single removals are scored exactly, cheapest first, a chunk at a time, until none is left that the target
    allows.

    Args:
      kept: indices of the items.
      ranks: `(order, kept)` -> ranks in which `order` is removed from the first on.
      estimates: kept items -> estimated growth of the loss when each is removed.
      costs: kept items -> what removing each saves.
      target: largest loss allowed.
      loss: with all items.
      singles: exact scores of the second part at most.

    Returns:
      The items left, and their loss.
    """

    def remove_prefix(order: np.ndarray) -> int:
        nonlocal kept, loss
        length, new = _longest_prefix(scorer, pairs, ranks(order, kept), order.size, target)
        if length:
            kept, loss = np.setdiff1d(kept, order[:length]), new
        return length

    removed = kept.size
    # A round scores some thirty masks: when it removes next to nothing, exact scores do better.
    while kept.size and removed > kept.size / _GRID:
        removed = remove_prefix(kept[np.argsort(estimates(kept) / costs(kept), kind="stable")])
    changed = True
    while kept.size and changed:
        changed = False
        saved = costs(kept)
        by_worth = np.argsort(estimates(kept) / saved, kind="stable")
        order, saved = kept[by_worth], saved[by_worth]
        for start in range(0, order.size, _GRID):
            chunk = order[start : start + _GRID]
            singles -= chunk.size
            if singles < 0:
                return kept, loss
            alone = scorer.spans(
                pairs, ranks(chunk, kept), [[i, i + 1] for i in range(chunk.size)]
            ).loss
            growth = (alone - loss) / saved[start : start + _GRID]
            allowed = np.flatnonzero(alone <= target)
            if allowed.size:
                cheapest = allowed[np.argsort(growth[allowed], kind="stable")]
                changed |= remove_prefix(chunk[cheapest]) > 0
    return kept, loss


def _longest_prefix(
    scorer: Scorer, pairs: HasPairs, ranks: Ranks, size: int, target: float
) -> tuple[int, float]:
    """The longest prefix of an order that can go, and the loss without it; 0 where none can."""

    def longest(lengths: np.ndarray) -> tuple[int | None, float]:
        """Index of the longest length that can go, and the loss without it: the longest is tried first."""
        spans = [[0, n] for n in lengths[::-1]]
        at, found = _first_within(scorer, pairs, ranks, spans, target)
        return (None, 0.0) if at is None else (lengths.size - 1 - at, float(found[at]))

    lengths = np.unique(np.geomspace(1, size, _GRID).round().astype(int))
    at, loss = longest(lengths)
    if at is None:
        return 0, 0.0
    low = int(lengths[at])
    high = int(lengths[at + 1]) if at + 1 < lengths.size else low + 1
    if high - low > 1:
        between = _between(low, high)
        at, new = longest(between)
        if at is not None:
            low, loss = int(between[at]), new
    return low, loss


def _first_within(
    scorer: Scorer, pairs: HasPairs, ranks: Ranks, spans: list[list[int]], target: float
) -> tuple[int | None, np.ndarray]:
    """Index of the first span whose mask has at most the target's loss, and all losses, NaN after it.

    What comes after it is not computed: masks are scored one after the other.
    """
    found = scorer.spans(pairs, ranks, spans, until=target).loss
    reached = np.flatnonzero(found <= target)
    return (int(reached[0]) if reached.size else None), found


def _between(low: int, high: int) -> np.ndarray:
    """Up to `_GRID` integers strictly between two that are at least 2 apart, evenly spaced."""
    between = np.unique(np.linspace(low, high, _GRID + 2).round().astype(int)[1:-1])
    return between[(between > low) & (between < high)]


def _bools(size: int, indices: np.ndarray) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[indices] = True
    return mask


def calibrated_loss(margins_B: Any, *, scale: Any, shift: Any) -> jax.Array:
    """The task loss after a scale and a shift of the logits; see `calibrate`."""
    margins = jnp.asarray(margins_B, jnp.float32)
    sides = jnp.where(jnp.arange(margins.size) % 2 == 0, 1.0, -1.0)
    return jnp.mean(jax.nn.softplus(-(scale * margins + shift * sides)))


def calibrate(margins_B: np.ndarray, *, steps: int = 16) -> dict[str, float]:
    """Fit a scale and a shift of the logits by L-BFGS (Gao et al. 2025).

    With two candidates only their difference matters: the margin of the first side's answer is scaled and
    shifted, and the margin of the second side's is shifted the other way.

    Args:
      margins_B: logit of the answer less the other's; rows `2 i` and `2 i + 1` are a pair.
      steps: of L-BFGS.

    Returns:
      "scale" and "shift".
    """

    def loss(fit):
        return calibrated_loss(margins_B, **fit)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def fitted():
        start = {"scale": jnp.ones(()), "shift": jnp.zeros(())}

        def step(carry, _):
            fit, state = carry
            value, gradient = value_and_grad(fit, state=state)
            updates, state = solver.update(
                gradient, state, fit, value=value, grad=gradient, value_fn=loss
            )
            return (optax.apply_updates(fit, updates), state), None

        (fit, _), _ = jax.lax.scan(step, (start, solver.init(start)), None, length=steps)
        return fit

    return {name: float(value) for name, value in fitted().items()}

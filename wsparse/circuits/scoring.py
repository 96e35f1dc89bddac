"""Scoring circuits: many node and edge masks of a model, in one compiled function.

Shapes: U nodes of the model in one vector (see `masks`), M masks scored in one call, B rows of pairs, L
layer, N nodes of a location, W windows of T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from wsparse import model, nodes, trees
from wsparse.circuits import graph
from wsparse.circuits.ablation import Background, circuit_logits
from wsparse.circuits.circuit import Score
from wsparse.circuits.pairs import PairArrays, margins, pairs_loss, row_losses, task_accuracy
from wsparse.config import ModelConfig

# Rank of what is never removed, and of what always is; see `_Ranks`.
_STAYS, _GONE = np.int32(2**31 - 1), np.int32(-1)

# Points on the path from a circuit to the model at which slopes are taken.
_POINTS = 4

# Masks that one call scores. They are run one after the other: the rows of a batch fill a device, and its
# activations stay in a CPU's cache.
_MASKS = 16

Means = dict[str, jax.Array]


class _Ranks(NamedTuple):
    """An order in which nodes, int32 `(U,)`, and edges, kernel path -> int32 `(L, in, out)`, are removed.

    A span `(lo, hi)` names a mask: without everything whose rank is negative or in `[lo, hi)`. Prefixes
    of an order and single removals are both spans, so one compiled function scores them all.
    """

    nodes: Any
    edges: dict[str, Any]


class Bank(NamedTuple):
    """Strengths of closed nodes under which a mask is scored too, see `ablation.circuit_logits`.

    The pairs are dealt to groups, each with strengths of its own: drawn ones, or an adversary's. What counts
    is the group in which the loss is largest.
    """

    strengths: Any
    """float32 `(B, U)` in [0, 1]."""
    groups: Any
    """float32 `(G, B)`: the weights of each group's mean over its rows."""
    weight: Any
    """Scalar that the loss under the bank is multiplied by before it is compared with that without it."""


class MaskScores(NamedTuple):
    """`(M,)` losses and accuracies of masks, see `circuit.Score`; under a bank, the larger loss."""

    loss: Any
    accuracy: Any


def mean_activations(params: model.Params, config: ModelConfig, windows_WT: np.ndarray) -> Means:
    """Returns the means of nodes, and of "attn.y", over pretraining text: location -> float32 `(L, N)`."""
    parts = (
        _summed_activations(params, jnp.asarray(windows_WT[start : start + 32]), config=config)
        for start in range(0, len(windows_WT), 32)
    )
    sums = functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)
    return {name: total / np.size(windows_WT) for name, total in sums.items()}


@functools.partial(jax.jit, static_argnames="config")
def _summed_activations(params, windows_WT, *, config):
    _, acts = model.forward(params, windows_WT, config)
    return {name: jnp.sum(acts[name].astype(jnp.float32), axis=(1, 2)) for name in [*nodes.NODES, "attn.y"]}


class Scorer:
    """Scores masks of one model on pairs of one shape.

    Masks are given as the nodes that stay, bool `(U,)`, and the weights that stay, see `graph.EdgeMask`;
    None stands for all weights.

    Attributes:
      config: Config of the model, with biases.
      params: Parameters of the model; where it has no biases, with zeros for them.
      weights: Which weights are not zero.
      bank: Strengths under which masks must hold too; None for mean ablation alone.
    """

    def __init__(self, params: model.Params, config: ModelConfig, means: Means):
        self.config, self.params = with_biases(config, params)
        self.means = means
        self.weights = graph.nonzero(params)
        self.bank: Bank | None = None

    def against(self, bank: Bank | None) -> Scorer:
        """Returns the scorer of the same model whose masks must hold under a bank made for the same pairs."""
        scorer = copy.copy(self)
        scorer.bank = bank
        return scorer

    def mask(self, pairs: PairArrays, nodes_U: np.ndarray, edges: graph.EdgeMask | None = None) -> Score:
        """Returns the score of one mask."""
        score = self.without(pairs, nodes_U, edges, np.zeros(0, int), [[0, 0]])
        return Score(float(score.loss[0]), float(score.accuracy[0]))

    def without(
        self,
        pairs: PairArrays,
        nodes_U: np.ndarray,
        edges: graph.EdgeMask | None,
        order: np.ndarray,
        spans_M2: Any,
        *,
        of_edges: bool = False,
        until: float = -np.inf,
    ) -> MaskScores:
        """Returns the scores of a mask without spans of an order of its nodes, or of its edges.

        Args:
          nodes_U: Nodes that stay where no span removes them.
          edges: Weights that stay likewise.
          order: Indices of nodes; with `of_edges`, indices into `graph.flatten_edges`.
          spans_M2: Begin and end, in the order, of what each of M masks lacks.
          until: Loss; what follows the first mask that reaches it is not scored. Under a bank, of a mask that
            is above it under the bank already, that loss alone is returned, and NaN as its accuracy.

        Returns:
          NumPy arrays `(M,)`; NaN for masks that were not scored.
        """
        ranks = self._ranks(nodes_U, edges)
        if of_edges:
            ranks_of_edges = graph.flatten_edges(ranks.edges)
            ranks_of_edges[order] = np.arange(len(order))
            ranks = ranks._replace(edges=graph.unflatten_edges(ranks_of_edges, ranks.edges))
        else:
            ranks.nodes[order] = np.arange(len(order))
        spans_M2 = np.asarray(spans_M2, np.int32).reshape(-1, 2)
        scores_2M = np.full((2, len(spans_M2)), np.nan, np.float32)
        ranks = jax.tree.map(jnp.asarray, ranks)
        for start in range(0, len(spans_M2), _MASKS):
            part = spans_M2[start : start + _MASKS]
            # One shape, so that one program is compiled; what fills it up is not computed.
            filled, n = np.resize(part, (_MASKS, 2)), np.int32(len(part))
            score = _score_spans(
                self.params,
                self.means,
                pairs,
                ranks,
                self.bank,
                filled,
                n,
                np.float32(until),
                config=self.config,
            )
            scores_2M[:, start : start + n] = np.asarray(score)[:, :n]
            if np.any(scores_2M[0, start : start + n] <= until):
                break
        return MaskScores(*scores_2M)

    def _ranks(self, nodes_U: np.ndarray, edges: graph.EdgeMask | None = None) -> _Ranks:
        """Returns ranks in which what stays stays and everything else is gone."""
        edges = self.weights if edges is None else edges
        return _Ranks(
            np.where(nodes_U, _STAYS, _GONE),
            {path: np.where(edges[path] | ~self.weights[path], _STAYS, _GONE) for path in self.weights},
        )

    def attributions(
        self, pairs: PairArrays, nodes_U: np.ndarray, edges: graph.EdgeMask | None = None
    ) -> tuple[np.ndarray, graph.EdgeMask]:
        """Returns first-order estimates of the loss's growth when a node, or an edge, of a mask is removed.

        For a node this is the sum of `(mean - value) * gradient`, the attribution baseline.

        Returns:
          `(U,)`, and kernel path -> `(L, in, out)`; both 0 for what is not in the circuit.
        """
        ranks = self._ranks(nodes_U, edges)
        estimates = _attributions(self.params, self.means, pairs, ranks, self.bank, config=self.config)
        return jax.tree.map(np.asarray, tuple(estimates))

    def openings(self, pairs: PairArrays, nodes_U: np.ndarray, others_U: np.ndarray) -> np.ndarray:
        """Returns `(U,)` estimates of the change of a mask's loss when a node is opened; 0 for its own nodes.

        They are slopes in the node's gate, averaged along the straight path on which all gates of `others_U`
        open together (integrated gradients, Sundararajan et al. 2017). At the circuit itself, a node that
        nothing open reads from would have none.

        Args:
          nodes_U: Nodes that are open.
          others_U: Nodes that may be opened.
        """
        ranks, opened_U = self._ranks(nodes_U), jnp.asarray(others_U & ~nodes_U, jnp.float32)
        slopes_U = _openings(self.params, self.means, pairs, ranks, opened_U, self.bank, config=self.config)
        return np.asarray(slopes_U)

    def margins(
        self, pairs: PairArrays, nodes_U: np.ndarray, edges: graph.EdgeMask | None = None
    ) -> np.ndarray:
        """Returns `(B,)`: the logit of the answer less that of the other candidate."""
        ranks = self._ranks(nodes_U, edges)
        return np.asarray(_margins(self.params, self.means, pairs, ranks, config=self.config))


def with_biases(config: ModelConfig, params: model.Params) -> tuple[ModelConfig, model.Params]:
    """Returns the same model with a (zero) bias in every linear layer, so that edges can be cut."""
    if config.bias:
        return config, params
    flat = dict(trees.flatten(params))
    for c in graph.CONNECTIONS:
        kernel = flat[c.kernel]
        flat[c.bias] = jnp.zeros((kernel.shape[0], kernel.shape[2]), kernel.dtype)
    return dataclasses.replace(config, bias=True), trees.unflatten(flat)


def _kept(ranks: _Ranks, span_2: Any = (0, 0)) -> _Ranks:
    """Returns 1.0 for what the mask of a span keeps, 0.0 elsewhere."""

    def kept(rank):
        return ((rank >= 0) & ((rank < span_2[0]) | (rank >= span_2[1]))).astype(jnp.float32)

    return jax.tree.map(kept, ranks)


def _logits(params, means, pairs: PairArrays, kept: _Ranks, config, strengths: Any = 0.0) -> jax.Array:
    background = Background(means, means)
    return circuit_logits(params, config, pairs, kept.nodes, kept.edges, background, strengths=strengths)


def _bank_losses(params, means, pairs: PairArrays, kept: _Ranks, config, bank: Bank) -> jax.Array:
    """Returns the weighted loss of each group of a bank, `(G,)`."""
    logits_BV = _logits(params, means, pairs, kept, config, bank.strengths)
    return bank.weight * (bank.groups @ row_losses(logits_BV, pairs))


@functools.partial(jax.jit, static_argnames="config")
def _score_spans(params, means, pairs, ranks: _Ranks, bank, spans_M2, n, until, *, config) -> MaskScores:
    """Returns scores of the first `n` spans, up to one whose loss is at most `until`; NaN after it."""

    def goes_on(carry):
        i, scores = carry
        reached = (i > 0) & (scores.loss[i - 1] <= until)
        return (i < n) & ~reached

    def plain(kept):
        logits_BV = _logits(params, means, pairs, kept, config)
        return MaskScores(pairs_loss(logits_BV, pairs), task_accuracy(logits_BV, pairs.answer, pairs.other))

    def under_bank(kept):
        loss = jnp.max(_bank_losses(params, means, pairs, kept, config, bank))
        # Most masks of a search miss the target, and under the bank: half of the work is saved.
        missed = (loss > until) & (until > -jnp.inf)
        unknown = MaskScores(loss, jnp.full_like(loss, jnp.nan))
        score = lax.cond(missed, lambda: unknown, lambda: plain(kept))
        return score._replace(loss=jnp.maximum(loss, score.loss))

    def score(carry):
        i, scores = carry
        kept = _kept(ranks, spans_M2[i])
        new = plain(kept) if bank is None else under_bank(kept)
        return i + 1, jax.tree.map(lambda all_M, value: all_M.at[i].set(value), scores, new)

    unscored = MaskScores(*[jnp.full(len(spans_M2), jnp.nan)] * 2)
    return lax.while_loop(goes_on, score, (jnp.int32(0), unscored))[1]


@functools.partial(jax.jit, static_argnames="config")
def _attributions(params, means, pairs, ranks: _Ranks, bank, *, config) -> _Ranks:
    kept = _kept(ranks)
    slopes = jax.grad(_total_loss, argnums=3)(params, means, pairs, kept, config, bank)
    return jax.tree.map(lambda slope, gate: -slope * gate, slopes, kept)


@functools.partial(jax.jit, static_argnames="config")
def _openings(params, means, pairs, ranks: _Ranks, opened_U, bank, *, config) -> jax.Array:
    kept = _kept(ranks)

    def slopes(share):
        between = kept._replace(nodes=kept.nodes + share * opened_U)
        return jax.grad(_total_loss, argnums=3)(params, means, pairs, between, config, bank).nodes

    # One after the other, as masks are.
    midpoints = (jnp.arange(_POINTS) + 0.5) / _POINTS
    return opened_U * jnp.mean(lax.map(slopes, midpoints), axis=0)


def _total_loss(params, means, pairs, kept: _Ranks, config, bank) -> jax.Array:
    """Returns the loss of a mask and, under a bank, the mean of its groups' added to it."""
    loss = pairs_loss(_logits(params, means, pairs, kept, config), pairs)
    # The largest alone would say nothing of the others, which removals may make the largest.
    return loss if bank is None else loss + jnp.mean(_bank_losses(params, means, pairs, kept, config, bank))


@functools.partial(jax.jit, static_argnames="config")
def _margins(params, means, pairs, ranks: _Ranks, *, config) -> jax.Array:
    logits_BV = _logits(params, means, pairs, _kept(ranks), config)
    return margins(logits_BV, pairs.answer, pairs.other)

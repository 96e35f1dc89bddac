"""The edges between nodes: nonzero weights whose two ends are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, trees
from wsparse.circuits import masks
from wsparse.circuits.circuit import Counts, Edge
from wsparse.circuits.pairs import PairArrays
from wsparse.config import ModelConfig
from wsparse.nodes import CONNECTIONS, Node

# The activation that a kernel multiplies where that is not its source node: heads mix values over time.
_INPUTS = {"attn.v": "attn.y"}

EdgeMask = dict[str, Any]
"""Kernel path -> bool `(L, in, out)`: which weights are in use."""


def nonzero(params: model.Params) -> EdgeMask:
    """Returns which weights are not zero."""
    flat = trees.flatten(params)
    return {c.kernel: np.asarray(flat[c.kernel]) != 0 for c in CONNECTIONS}


def uncut(weights: EdgeMask, removed: Mapping[str, np.ndarray]) -> EdgeMask:
    """Returns the weights of `weights` that were not removed."""
    return {path: present & ~removed[path] for path, present in weights.items()}


def between(nodes_U: np.ndarray, weights: EdgeMask, config: ModelConfig) -> EdgeMask:
    """Returns the weights of `weights` whose two ends are among `nodes_U` (bool)."""
    mask = masks.unflatten(np.asarray(nodes_U), config)
    return {
        c.kernel: weights[c.kernel] & mask[c.source][:, :, None] & mask[c.target][:, None, :]
        for c in CONNECTIONS
    }


def count(edges: EdgeMask) -> int:
    """Returns the number of edges."""
    return sum(int(np.count_nonzero(array)) for array in edges.values())


def flatten_edges(edges: EdgeMask) -> np.ndarray:
    """Returns an edge mask (or an array of numbers for each edge) as one vector."""
    return np.concatenate([np.ravel(array) for array in edges.values()])


def unflatten_edges(vector: np.ndarray, like: EdgeMask) -> EdgeMask:
    """Returns the edge mask of a vector, in the shapes of another edge mask."""
    ends = np.cumsum([array.size for array in like.values()])[:-1]
    parts = np.split(vector, ends)
    return {path: part.reshape(like[path].shape) for path, part in zip(like, parts, strict=True)}


def edge_list(edges: EdgeMask, params: model.Params) -> list[Edge]:
    """Returns the edges of a mask with their weights."""
    flat = trees.flatten(params)
    return [
        Edge(str(Node(layer, c.source, i)), str(Node(layer, c.target, o)), float(kernel[layer, i, o]))
        for c in CONNECTIONS
        for kernel in [np.asarray(flat[c.kernel])]
        for layer, i, o in np.argwhere(edges[c.kernel])
    ]


def degrees(edges: EdgeMask, config: ModelConfig) -> np.ndarray:
    """Returns int `(U,)`: edges in and out of every node."""
    mask = {name: np.zeros(shape, int) for name, shape in masks.shapes(config).items()}
    for c in CONNECTIONS:
        mask[c.source] += edges[c.kernel].sum(2)
        mask[c.target] += edges[c.kernel].sum(1)
    return np.asarray(masks.flatten(mask))


def count_all(
    nodes_U: np.ndarray,
    edges: EdgeMask,
    params: model.Params,
    config: ModelConfig,
    *,
    pairs: PairArrays | None = None,
    constants: int = 0,
) -> Counts:
    """Returns the sizes of a circuit.

    Args:
      pairs: Pairs of its task, of which `Counts.answer_edges` are counted; None counts none.
      constants: See `Counts`.
    """
    mask = masks.unflatten(np.asarray(nodes_U), config)
    flat = trees.flatten(params)
    read = np.any(mask["attn.act_in"] | mask["mlp.act_in"], axis=0)[: config.d_model]
    written = np.any(mask["attn.resid_delta"] | mask["mlp.resid_delta"], axis=0)
    embedding = np.asarray(flat["embed/tokens"])
    unembedding = embedding.T if config.tied_embeddings else np.asarray(flat["head/unembed"])
    biases = [np.asarray(flat[c.bias])[mask[c.target]] for c in CONNECTIONS if c.bias in flat]
    return Counts(
        nodes=int(np.count_nonzero(nodes_U)),
        edges=count(edges),
        edges_between_nodes=count(between(nodes_U, nonzero(params), config)),
        embedding_edges=int(np.count_nonzero(embedding[:, read])),
        unembedding_edges=int(np.count_nonzero(unembedding[written])),
        biases=sum(int(np.count_nonzero(bias)) for bias in biases),
        constants=constants,
        answer_edges=0 if pairs is None else _answer_edges(pairs, embedding[:, read], unembedding[written]),
    )


def _answer_edges(pairs: PairArrays, embedding_VD: np.ndarray, unembedding_DV: np.ndarray) -> int:
    """Returns the nonzero entries of tokens that differ between the sides of pairs, and of answers."""
    n_tokens = len(embedding_VD)
    tokens_PST = np.asarray(pairs.tokens).reshape(-1, 2, pairs.tokens.shape[1])
    length_P2 = np.asarray(pairs.position).reshape(-1, 2) + 1
    deciding = set()
    for sides_ST, lengths in zip(tokens_PST, length_P2, strict=True):
        counts_SV = [
            np.bincount(side_T[:length], minlength=n_tokens)
            for side_T, length in zip(sides_ST, lengths, strict=True)
        ]
        deciding |= set(np.flatnonzero(counts_SV[0] != counts_SV[1]).tolist())
    answers = np.unique(np.asarray(pairs.answer))
    read = np.count_nonzero(embedding_VD[sorted(deciding)])
    return int(read + np.count_nonzero(unembedding_DV[:, answers]))


def cut(params: model.Params, kept: Mapping[str, jax.Array], means: Mapping[str, jax.Array]) -> model.Params:
    """Returns the parameters without the edges that are not kept.

    `w_ij x_i` becomes the constant `w_ij mean(x_i)`, the mean over the pretraining distribution, as for
    nodes. The model must have biases, see `scoring.with_biases`.

    Args:
      params: Parameters of the model.
      kept: Kernel path -> float or bool `(L, in, out)`, 1 where the weight stays; differentiable.
      means: Location -> `(L, N)`, and those of "attn.y".
    """
    flat = dict(trees.flatten(params))
    for c in CONNECTIONS:
        kernel = flat[c.kernel]
        left = kernel * kept[c.kernel].astype(kernel.dtype)
        mean = means[_INPUTS.get(c.source, c.source)].astype(kernel.dtype)
        flat[c.kernel] = left
        flat[c.bias] = flat[c.bias] + jnp.einsum("li,lio->lo", mean, kernel - left)
    return trees.unflatten(flat)

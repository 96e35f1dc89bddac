"""Slow, plain NumPy versions of what the library computes, written from the definitions.

Nothing here is shared with the library: selection is a stable sort, the model is loops over tokens and
heads in float64. Tests compare the two.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def largest(magnitude: np.ndarray, k: int) -> np.ndarray:
    """Mask of the first k of a stable descending sort: ties go to the lowest flat index."""
    mask = np.zeros(magnitude.size, bool)
    mask[np.argsort(-magnitude.ravel(), kind="stable")[: max(k, 0)]] = True
    return mask.reshape(magnitude.shape)


def keep_top_k(w: np.ndarray, k: int, floor: int = 0, axis: int | None = None) -> np.ndarray:
    """One matrix: protect each neuron's `floor` largest nonzeros, fill the rest of the budget k."""
    magnitude = np.abs(w.astype(np.float64))
    protected = np.zeros(w.shape, bool)
    if axis is not None:
        for neuron in range(w.shape[axis]):
            row = (slice(None),) * (axis % w.ndim) + (neuron,)
            protected[row] = largest(magnitude[row], floor) & (magnitude[row] > 0)
    left = max(k - int(protected.sum()), 0)
    kept = protected | largest(np.where(protected, -1.0, magnitude), min(left, w.size))
    return np.where(kept & (magnitude > 0), w, np.zeros((), w.dtype))


def abs_top_k(x: np.ndarray, k: int) -> np.ndarray:
    """Per row of the last axis the k entries of largest magnitude, the rest zero."""
    rows = x.reshape(-1, x.shape[-1])
    return np.stack([np.where(largest(np.abs(row), k), row, 0.0) for row in rows]).reshape(x.shape)


def attention(q, k, v, sink, positions, dy):
    """Attention with sinks and its gradients, in float64 NumPy."""
    q, k, v, sink, dy = (np.asarray(a, np.float64) for a in (q, k, v, sink, dy))
    scale = 1 / np.sqrt(q.shape[-1])
    scores = np.einsum("bthk,bshk->bhts", q, k) * scale
    future = np.arange(k.shape[1]) > positions[:, None, :, None]
    weights = np.where(future, 0, np.exp(scores))
    total = weights.sum(-1, keepdims=True) + np.exp(sink)[:, None, None]
    weights, sunk = weights / total, np.exp(sink)[:, None, None] / total
    y = np.einsum("bhts,bshk->bthk", weights, v)
    d_weights = np.einsum("bthk,bshk->bhts", dy, v)
    overlap = (weights * d_weights).sum(-1, keepdims=True)
    d_scores = weights * (d_weights - overlap)
    return y, (
        np.einsum("bhts,bshk->bthk", d_scores, k) * scale,
        np.einsum("bhts,bthk->bshk", d_scores, q) * scale,
        np.einsum("bhts,bthk->bshk", weights, dy),
        -(sunk * overlap).sum((0, 2, 3)),
    )


class Model:
    """The decoder of Gao et al. 2025 for one config and tree of parameters, token by token.

    `run(tokens)` returns logits `(T, V)` of one sequence and what happens at each location: a list over
    layers, or one array for "final_resid".
    """

    def __init__(self, config: Any, params: dict[str, Any]):
        self.config, self.params = config, params

    def run(self, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        config, embed, head = self.config, self.params["embed"], self.params["head"]
        x = np.array([embed["tokens"][token] for token in tokens], np.float64)
        positions = None
        if config.position == "added":
            x = x + embed["positions"][: len(tokens)]
        elif config.position == "concat":
            positions = embed["positions"][: len(tokens)]
        elif config.position == "concat_sinusoid":
            positions = embed["sinusoids"][: len(tokens)]
        seen: dict[str, Any] = {}
        for i in range(config.n_layer):
            x = self.block(_layer(self.params["blocks"], i), x, positions, seen)
        seen["final_resid"] = x
        unembed = embed["tokens"].T if config.tied_embeddings else head["unembed"]
        logits = self.norm(x, head["norm"]) @ unembed
        if config.bigram != "none":
            logits = logits + np.array([head["bigram"][token] for token in tokens])
        if config.logits_bias:
            logits = logits + head["logits_bias"]
        return logits, seen

    def block(self, p, x, positions, seen):
        def record(location, site, value):
            value = self.sparse(site, value)
            seen.setdefault(location, []).append(value)
            return value

        record("attn.resid_in", None, x)
        read = record(
            "attn.act_in", "attn_in", self.read(x, p["attn_norm"], p.get("attn_pos_norm"), positions)
        )
        q, k, v = (record(f"attn.{n}", f"attn_{n}", self.linear(read, p["attn"][n])) for n in "qkv")
        y = record("attn.y", None, self.attention(q, k, v, p["attn"].get("sink")))
        delta = record("attn.resid_delta", "attn_out", self.linear(y, p["attn"]["out"]))
        x = self.sparse("resid_post_attn", self.residual(x + delta))

        record("mlp.resid_mid", None, x)
        read = record("mlp.act_in", "mlp_in", self.read(x, p["mlp_norm"], p.get("mlp_pos_norm"), positions))
        hidden = self.linear(read, p["mlp"]["fc"])
        if self.config.activation == "relu":
            hidden = np.where(hidden > 0, hidden, 0.0)
        else:
            hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        hidden = record("mlp.post_act", "mlp_neuron", hidden)
        delta = record("mlp.resid_delta", "mlp_out", self.linear(hidden, p["mlp"]["proj"]))
        return self.sparse("resid_post_mlp", self.residual(x + delta))

    def attention(self, q, k, v, sink):
        heads, width = self.config.n_head, self.config.d_head
        y = np.zeros((len(q), heads * width))
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for t in range(len(q)):
                scores = [q[t, part] @ k[s, part] / math.sqrt(width) for s in range(t + 1)]
                weights = np.array([math.exp(score) for score in scores])
                total = weights.sum() + (math.exp(sink[head]) if self.config.sink else 0.0)
                y[t, part] = sum(w / total * v[s, part] for s, w in enumerate(weights))
        return y

    def read(self, x, p, p_positions, positions):
        normed = self.norm(x, p)
        if positions is None:
            return normed
        return np.concatenate([normed, self.norm(np.array(positions), p_positions)], axis=1)

    def norm(self, x, p):
        config = self.config
        rms = config.norm == "rms"
        eps = config.norm_eps
        if eps is None:
            eps = 2.0**-23 if rms else 1e-5
        rows = []
        for row in x:
            centered = row if rms else row - row.mean()
            row = centered / math.sqrt((centered**2).mean() + eps) * p["gain"]
            rows.append(row if rms or not config.norm_bias else row + p["bias"])
        return np.array(rows)

    def linear(self, x, p):
        return x @ p["kernel"] + (p["bias"] if self.config.bias else 0.0)

    def residual(self, x):
        return np.where(x > 0, x, 0.0) if self.config.residual_activation == "relu" else x

    def sparse(self, site, x):
        fraction = self.config.abs_top_k_fraction
        if fraction is None or site not in self.config.abs_top_k_sites:
            return x
        return abs_top_k(x, int(fraction * x.shape[-1]))


def _layer(tree, i):
    if isinstance(tree, dict):
        return {name: _layer(value, i) for name, value in tree.items()}
    return tree[i]

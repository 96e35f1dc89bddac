"""What nodes do on text: recorded values, histograms, and the excerpts that show them best.

Shapes: N chosen nodes, W windows or rows, T tokens, L layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, nodes, taps
from wsparse.config import ModelConfig

# Tokens of a forward pass, and nodes whose values over all windows are held at once.
_TOKENS, _NODES = 4096, 1024
# Tokens shown before and after the one that an excerpt is about.
_BEFORE, _AFTER = 23, 8
_BINS = 41
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_EXTREMES = 6


class Place(NamedTuple):
    """Where a node is."""

    layer: int
    location: str
    channel: int

    @property
    def name(self) -> str:
        """As circuits have it: "0.attn.q.17"."""
        return f"{self.layer}.{self.location}.{self.channel}"


class Excerpt(NamedTuple):
    """A stretch of a window around one token."""

    window: int
    start: int
    stop: int
    token: int
    """Index in the window of the token that it is about."""
    values: np.ndarray
    """`(stop - start,)` of the node."""


class Summary(NamedTuple):
    """A node's values over windows of text."""

    largest: float
    """Magnitude."""
    zero: float
    """Share of values that are exactly 0."""
    low: float
    high: float
    counts: list[int]
    """Of values in bins of equal width between `low` and `high`, zeros left out."""
    highest: list[Excerpt]
    lowest: list[Excerpt]
    sampled: list[tuple[float, Excerpt]]
    """At quantiles of the values that are not 0."""


def place(name: str) -> Place:
    """`"0.attn.q.17"` as `(0, "attn.q", 17)`."""
    layer, location = name.split(".", 1)
    location, channel = location.rsplit(".", 1)
    return Place(int(layer), location, int(channel))


def recorded(
    params: model.Params,
    tokens_WT: jax.Array,
    position_W: jax.Array,
    tap: taps.Tap = taps.identity,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits at one position of each window, and every node's value.

    Args:
      params: of the model.
      tokens_WT: int tokens.
      position_W: int positions.
      tap: what to do to the nodes.
      config: of the model.

    Returns:
      `(W, V)`, and location -> float32 `(L, W, T, nodes of the location)`.
    """
    logits_W1V, acts = model.forward(
        params, tokens_WT, config, tap=tap, positions_BP=position_W[:, None]
    )
    return logits_W1V[:, 0], {name: acts[name].astype(jnp.float32) for name in nodes.NODES}


_recorded = jax.jit(recorded, static_argnames="config")


def chosen(acts: Mapping[str, Any], places: Sequence[Place]) -> np.ndarray:
    """float32 `(N, W, T)`: the values of some nodes of what `recorded` returned."""
    host = {name: np.asarray(acts[name]) for name in {p.location for p in places}}
    return np.stack([host[p.location][p.layer, :, :, p.channel] for p in places])


def summaries(
    params: model.Params,
    config: ModelConfig,
    windows_WT: np.ndarray,
    names: Sequence[str],
    tick: Callable[[int], Any] = lambda count: None,
) -> dict[str, Summary]:
    """Each node's summary over windows.

    Args:
      params: of the model.
      config: of the model.
      windows_WT: int tokens.
      names: of nodes.
      tick: is told how many nodes are done, as they are.
    """
    size = max(1, _TOKENS // windows_WT.shape[1])
    # Batches of one shape: the last is filled up with repeats.
    position_W = jnp.zeros(size, jnp.int32)
    starts = range(0, len(windows_WT), size)
    found: dict[str, Summary] = {}
    for first in range(0, len(names), _NODES):
        part = names[first : first + _NODES]
        places = [place(name) for name in part]
        parts = []
        for start in starts:
            batch_WT = windows_WT[start : start + size]
            filled = jnp.asarray(np.resize(batch_WT, (size, batch_WT.shape[1])))
            _, acts = _recorded(params, filled, position_W, config=config)
            parts.append(chosen(acts, places)[:, : len(batch_WT)])
        values_NWT = np.concatenate(parts, axis=1)
        found |= zip(part, map(summarize, values_NWT), strict=True)
        tick(len(part))
    return found


def summarize(values_WT: np.ndarray) -> Summary:
    """The summary of one node's values."""
    active = np.sort(values_WT[values_WT != 0])
    low, high = (float(active[0]), float(active[-1])) if active.size else (0.0, 0.0)
    # A node that is always the same still needs bins of some width.
    if low == high:
        low, high = low - 0.5, high + 0.5
    tops, bottoms = values_WT.max(axis=1), values_WT.min(axis=1)
    flat = values_WT.ravel()
    wanted = np.quantile(active, _QUANTILES, method="nearest") if active.size else []
    return Summary(
        largest=float(np.max(np.abs(values_WT))),
        zero=float(np.mean(values_WT == 0)),
        low=low,
        high=high,
        counts=np.histogram(active, bins=_BINS, range=(low, high))[0].tolist(),
        highest=[
            excerpt(values_WT, w, int(values_WT[w].argmax()))
            for w in np.argsort(-tops, kind="stable")[:_EXTREMES].tolist()
            if tops[w] != 0
        ],
        lowest=[
            excerpt(values_WT, w, int(values_WT[w].argmin()))
            for w in np.argsort(bottoms, kind="stable")[:_EXTREMES].tolist()
            if bottoms[w] != 0
        ],
        sampled=[
            (q, excerpt(values_WT, *divmod(int(np.flatnonzero(flat == v)[0]), values_WT.shape[1])))
            for q, v in zip(_QUANTILES, wanted, strict=False)
        ],
    )


def excerpt(values_WT: np.ndarray, window: int, token: int) -> Excerpt:
    """The tokens around one."""
    start, stop = max(0, token - _BEFORE), min(values_WT.shape[1], token + _AFTER + 1)
    return Excerpt(window, start, stop, token, values_WT[window, start:stop])

"""What nodes do on text: recorded values, histograms, and the excerpts that show them best.

Shapes: N chosen nodes, W windows or rows, T tokens, L layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, taps
from wsparse.circuits.evidence_file import BINS
from wsparse.config import ModelConfig
from wsparse.nodes import NODES, Node

# Tokens of a forward pass, and nodes whose values over all windows are held at once.
_TOKENS, _NODES = 4096, 1024
# Tokens shown before and after the one that an excerpt is about.
_BEFORE, _AFTER = 23, 8
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_EXTREMES = 6


class Excerpt(NamedTuple):
    """A stretch of a window around one token.

    Attributes:
      window: Index of the window.
      start: First token.
      stop: Token after the last.
      token: Index in the window of the token that it is about.
      values: `(stop - start,)` of the node.
    """

    window: int
    start: int
    stop: int
    token: int
    values: np.ndarray


class Summary(NamedTuple):
    """A node's values over windows of text.

    Attributes:
      largest: Largest magnitude.
      zero: Fraction of values that are exactly 0.
      low: Lower end of the histogram.
      high: Upper end of the histogram.
      counts: Values in bins of equal width between the two, zeros left out.
      highest: Excerpts, one a window, by their highest value.
      lowest: The same by their lowest.
      sampled: Quantiles of the values that are not 0, each with an excerpt.
    """

    largest: float
    zero: float
    low: float
    high: float
    counts: np.ndarray
    highest: list[Excerpt]
    lowest: list[Excerpt]
    sampled: list[tuple[float, Excerpt]]


def recorded(
    params: model.Params,
    tokens_WT: jax.Array,
    position_W: jax.Array,
    tap: taps.Tap = taps.identity,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the logits at one position of each window, and every node's value.

    Args:
      params: Model parameters.
      tokens_WT: Int tokens.
      position_W: Int positions.
      tap: What to do to the nodes.
      config: Model config.

    Returns:
      `(W, V)`, and location -> float32 `(L, W, T, nodes of the location)`.
    """
    logits_W1V, acts = model.forward(params, tokens_WT, config, tap=tap, positions_BP=position_W[:, None])
    return logits_W1V[:, 0], {name: acts[name].astype(jnp.float32) for name in NODES}


_recorded = jax.jit(recorded, static_argnames="config")


def values_at(acts: Mapping[str, Any], places: Sequence[Node]) -> np.ndarray:
    """Returns float32 `(N, W, T)`: the values of some nodes of what `recorded` returned."""
    host = {name: np.asarray(acts[name]) for name in {place.location for place in places}}
    return np.stack([host[p.location][p.layer, :, :, p.channel] for p in places])


def summaries(
    params: model.Params,
    config: ModelConfig,
    windows_WT: np.ndarray,
    places: Sequence[Node],
    advance: Callable[[int], Any] = lambda count: None,
) -> list[Summary]:
    """Returns the summary of each node over windows.

    Args:
      params: Model parameters.
      config: Model config.
      windows_WT: Int tokens.
      places: The nodes.
      advance: Called with the number of nodes that are done since the last call.
    """
    size = max(1, _TOKENS // windows_WT.shape[1])
    # Batches of one shape: the last is filled up with repeats.
    position_W = jnp.zeros(size, jnp.int32)
    described = []
    for first in range(0, len(places), _NODES):
        part = places[first : first + _NODES]
        stretches = []
        for start in range(0, len(windows_WT), size):
            batch_WT = windows_WT[start : start + size]
            filled = jnp.asarray(np.resize(batch_WT, (size, batch_WT.shape[1])))
            _, acts = _recorded(params, filled, position_W, config=config)
            stretches.append(values_at(acts, part)[:, : len(batch_WT)])
        values_NWT = np.concatenate(stretches, axis=1)
        described += [summarize(values_WT, windows_WT) for values_WT in values_NWT]
        advance(len(part))
    return described


def summarize(values_WT: np.ndarray, windows_WT: np.ndarray) -> Summary:
    """Returns the summary of one node's values; no stretch of text is shown twice."""
    active = np.sort(values_WT[values_WT != 0])
    low, high = (float(active[0]), float(active[-1])) if active.size else (0.0, 0.0)
    # A node that is always the same still needs bins of some width.
    if low == high:
        low, high = low - 0.5, high + 0.5
    shown: set[bytes] = set()

    def extremes(value_W: np.ndarray, token_W: np.ndarray, order_W: np.ndarray) -> list[Excerpt]:
        excerpts = []
        for window in order_W.tolist():
            if value_W[window] == 0 or len(excerpts) == _EXTREMES:
                continue
            excerpts += _new(excerpt(values_WT, window, int(token_W[window])), windows_WT, shown)
        return excerpts

    tops, bottoms = values_WT.max(axis=1), values_WT.min(axis=1)
    highest = extremes(tops, values_WT.argmax(axis=1), np.argsort(-tops, kind="stable"))
    lowest = extremes(bottoms, values_WT.argmin(axis=1), np.argsort(bottoms, kind="stable"))
    flat, sampled = values_WT.ravel(), []
    values = np.quantile(active, _QUANTILES, method="nearest") if active.size else []
    for quantile, value in zip(_QUANTILES, values, strict=False):
        window, token = divmod(int(np.flatnonzero(flat == value)[0]), values_WT.shape[1])
        for new in _new(excerpt(values_WT, window, token), windows_WT, shown):
            sampled.append((quantile, new))
    return Summary(
        largest=float(np.max(np.abs(values_WT))),
        zero=float(np.mean(values_WT == 0)),
        low=low,
        high=high,
        counts=np.histogram(active, bins=BINS, range=(low, high))[0],
        highest=highest,
        lowest=lowest,
        sampled=sampled,
    )


def _new(excerpt: Excerpt, windows_WT: np.ndarray, shown: set[bytes]) -> list[Excerpt]:
    """Returns the excerpt, unless its text up to its token was shown before, and notes it as shown."""
    # What follows a token does not change its value.
    text = windows_WT[excerpt.window, excerpt.start : excerpt.token + 1].astype(np.int64).tobytes()
    if text in shown:
        return []
    shown.add(text)
    return [excerpt]


def excerpt(values_WT: np.ndarray, window: int, token: int) -> Excerpt:
    """Returns the tokens around one."""
    start, stop = max(0, token - _BEFORE), min(values_WT.shape[1], token + _AFTER + 1)
    return Excerpt(window, start, stop, token, values_WT[window, start:stop])

"""What nodes do on text: recorded values, histograms, and the excerpts that show them best.

Shapes: N chosen nodes, W windows or rows, T tokens, L layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, taps
from wsparse.circuits.evidence_file import BINS, HIGHEST, LOWEST, SAMPLED
from wsparse.config import ModelConfig
from wsparse.nodes import NODES, Node

# Tokens of a forward pass, and nodes whose values over all windows are held at once.
_TOKENS, _NODES = 4096, 1024
# Tokens shown before and after the one that an excerpt is about.
_BEFORE, _AFTER = 23, 8
# Excerpts that agree in so many tokens, up to the one that they are about, look the same to a reader.
_SAME = 8
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_EXTREMES = 6


class Excerpt(NamedTuple):
    """The tokens `start` to `stop` of a window, around the one at `token` that they are about.

    Attributes:
      kind: `HIGHEST`, `LOWEST` or `SAMPLED`.
      quantile: That of the token's value among those that are not 0, where it is sampled.
      values: `(stop - start,)` of the node.
    """

    kind: int
    window: int
    start: int
    stop: int
    token: int
    quantile: float
    values: np.ndarray


class Summary(NamedTuple):
    """A node's values over windows of text.

    Attributes:
      largest: Largest magnitude.
      zero: Fraction of values that are exactly 0.
      low, high: Ends of the histogram.
      counts: Values in bins of equal width between the two, zeros left out.
      excerpts: By highest and by lowest value, one a window, and at quantiles of the values that are not 0.
    """

    largest: float
    zero: float
    low: float
    high: float
    counts: np.ndarray
    excerpts: list[Excerpt]


@functools.partial(jax.jit, static_argnames="config")
def recorded(
    params: model.Params,
    tokens_WT: jax.Array,
    position_W: jax.Array,
    tap: taps.NodeAblation | None = None,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the logits `(W, V)` at one position of each window, and every node's value.

    Values are location -> float32 `(L, W, T, N)`.
    """
    logits_W1V, acts = model.forward(params, tokens_WT, config, tap=tap, positions_BP=position_W[:, None])
    return logits_W1V[:, 0], {name: acts[name].astype(jnp.float32) for name in NODES}


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
    """Returns the summary of each node over windows; `advance(n)` is called after every `n` nodes."""
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
            _, acts = recorded(params, filled, position_W, config=config)
            stretches.append(values_at(acts, part)[:, : len(batch_WT)])
        values_NWT = np.concatenate(stretches, axis=1)
        described += [summarize(values_WT, windows_WT) for values_WT in values_NWT]
        advance(len(part))
    return described


def summarize(values_WT: np.ndarray, windows_WT: np.ndarray) -> Summary:
    """Returns the summary of one node's values; no two excerpts of it look the same."""
    active = np.sort(values_WT[values_WT != 0])
    low, high = (float(active[0]), float(active[-1])) if active.size else (0.0, 0.0)
    # A node that is always the same still needs bins of some width.
    if low == high:
        low, high = low - 0.5, high + 0.5
    n_windows, n_time = values_WT.shape
    excerpts: list[Excerpt] = []
    shown: set[bytes] = set()

    def add(kind: int, window: int, token: int, quantile: float = 0.0) -> None:
        start, stop = max(0, token - _BEFORE), min(n_time, token + _AFTER + 1)
        # What follows a token does not change its value.
        text = windows_WT[window, max(0, token - _SAME + 1) : token + 1].astype(np.int64).tobytes()
        beside = any(e.window == window and abs(e.token - token) <= _AFTER for e in excerpts)
        if text not in shown and not (kind == SAMPLED and beside):
            shown.add(text)
            values = values_WT[window, start:stop]
            excerpts.append(Excerpt(kind, window, start, stop, token, quantile, values))

    for kind, sign in ((HIGHEST, 1), (LOWEST, -1)):
        token_W = np.argmax(sign * values_WT, axis=1)
        value_W = values_WT[np.arange(n_windows), token_W]
        limit = len(excerpts) + _EXTREMES
        for window in np.argsort(-sign * value_W, kind="stable").tolist():
            if value_W[window] != 0 and len(excerpts) < limit:
                add(kind, window, int(token_W[window]))
    quantiles = np.quantile(active, _QUANTILES, method="nearest") if active.size else []
    for quantile, value in zip(_QUANTILES, quantiles, strict=False):
        window, token = divmod(int(np.flatnonzero(values_WT == value)[0]), n_time)
        add(SAMPLED, window, token, quantile)
    return Summary(
        largest=float(np.max(np.abs(values_WT))),
        zero=float(np.mean(values_WT == 0)),
        low=low,
        high=high,
        counts=np.histogram(active, bins=BINS, range=(low, high))[0],
        excerpts=excerpts,
    )

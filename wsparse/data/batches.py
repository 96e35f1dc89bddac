"""Datasets and batches.

A batch is a pure function of (seed, global step): a run that resumes at step s with any number of reader
threads or processes sees the batches that an uninterrupted single process would have seen, so the step is the
only state there is to save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import logging
import math
import sys
from typing import Any

import grain
import numpy as np

from wsparse.data.tokens import Components, TokenStream
from wsparse.errors import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A stream as a sequence of windows `(T+1,)` int32, T the context.

    Window i covers the tokens [i*T, i*T + T], T inputs and T targets that overlap in all but one token, so
    that in an epoch every token after the first is predicted exactly once (at most T-1 tokens at the end are
    in no window).
    """

    stream: TokenStream
    context: int

    def __len__(self) -> int:
        return window_count(len(self.stream), self.context)

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self.context
        return self.stream.read(start, start + self.context + 1)


def window_count(length: int, context: int) -> int:
    """Returns how many windows of `context + 1` tokens a stream of `length` has."""
    return max(length - 1, 0) // context


def train_batches(
    components: Components,
    *,
    batch_size: int,
    context: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    threads: int = 2,
    prefetch: int = 8,
) -> Iterator[np.ndarray]:
    """Returns an iterator of endless shuffled batches, from `start_step` on.

    The batch of step s is a pure function of (components, batch_size, context, seed, s). Every epoch of a
    component has its own shuffle; a smaller stream is repeated as often as its weight asks.

    Args:
      components: Weights and streams.
      batch_size: Rows B of the global batch.
      context: Context T.
      seed: Seed of the order, not negative.
      start_step: Step of the first batch.
      rows: Rows of the global batch that this process wants, R of them, and reads alone; None is all.
      threads: Threads that read ahead.
      prefetch: Batches they keep ready.

    Returns:
      An iterator of (R, T+1) int32: inputs are `[:, :-1]`, targets `[:, 1:]`.

    Raises:
      UserError: At once, when a row is out of range or the seed is negative.
    """
    wanted = _rows(batch_size, rows)
    if seed < 0:
        raise UserError(f"data.seed must not be negative, got {seed}")
    windows = _shuffled_windows(components, context, seed)

    def batch_BT(step: int) -> np.ndarray:
        # Grain types an element as optional; these windows have no gaps.
        picked: list[Any] = [windows[step * batch_size + row] for row in wanted]
        return np.stack(picked)

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(batch_BT)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    return iter(steps.to_iter_dataset(options))


def eval_batches(
    components: Components, *, batch_size: int, context: int, batches: int, rows: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Returns the same held-out batches at each call, evenly spread over each stream, in mix proportion.

    There are as many batches as the windows of all streams fill, at most `batches` and at least one. A stream
    that has fewer windows than its share of them repeats them about equally often, and a line is logged.

    Args:
      components: Weights and streams.
      batch_size: Rows B of the global batch.
      context: Context T.
      batches: Number of batches, at most.
      rows: Rows of the global batches that this process wants, R of them; None is all.

    Returns:
      Arrays (R, T+1) int32.
    """
    wanted = _rows(batch_size, rows)
    windows = [Windows(stream, context) for _, stream in components]
    count = min(batches, max(1, sum(map(len, windows)) // batch_size))
    shares = _shares([weight for weight, _ in components], count * batch_size)
    for stream, share in zip(windows, shares, strict=True):
        if share > len(stream):
            log.info(
                "evaluation repeats the %d windows of a stream of %d tokens to make %d",
                len(stream), len(stream.stream), share,
            )  # fmt: skip
    # A window's place in its own stream, from 0 to 1, orders the windows of all streams.
    plan = sorted(
        ((j + 0.5) / share, c, j * len(windows[c]) // share)
        for c, share in enumerate(shares)
        for j in range(share)
    )
    return [
        np.stack([windows[c][i] for _, c, i in (plan[b * batch_size + row] for row in wanted)])
        for b in range(count)
    ]


def windows(components: Components, *, n: int, context: int, seed: int) -> np.ndarray:
    """Returns different windows in mix proportion, the inputs of the first that training would draw.

    Args:
      components: Weights and streams; streams that are shorter than a window are left out.
      n: Number of windows, at most; one that comes again is dropped.
      context: Context T.
      seed: Seed of the order, not negative.

    Returns:
      int32 `(W, T)`, W at most `n`, 0 where there is no window.
    """
    components = [pair for pair in components if window_count(len(pair[1]), context)]
    if not components:
        return np.empty((0, context), np.int32)
    shuffled: Any = _shuffled_windows(components, context, seed)
    distinct = {}
    for index in range(n):
        window_T = shuffled[index][:-1]
        distinct.setdefault(window_T.tobytes(), window_T)
    return np.stack(list(distinct.values()))


def _rows(batch_size: int, rows: Sequence[int] | None) -> Sequence[int]:
    if rows is None:
        return range(batch_size)
    for row in rows:
        if not 0 <= row < batch_size:
            raise UserError(f"rows must be in [0, batch_size={batch_size}), got {row}")
    return [int(row) for row in rows]


class _EndlessShuffle:
    """The windows of a stream, epoch after epoch in new orders, with random access at any index.

    Grain's own shuffle takes milliseconds per index when there are few windows, and its epoch e with seed s
    is its epoch e-1 with seed s+1. Here the orders of two epochs are kept, 4 bytes a window.
    """

    def __init__(self, windows: Windows, seed: Sequence[int]):
        self._windows = windows

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            bits = np.random.MT19937(np.random.SeedSequence([*seed, epoch]))
            # RandomState, because numpy has promised never to change what it gives.
            return np.random.RandomState(bits).permutation(len(windows)).astype(np.uint32)

        self._order = order

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, len(self._windows))
        return self._windows[int(self._order(epoch)[place])]


def _shuffled_windows(components: Components, context: int, seed: int) -> grain.MapDataset:
    """Returns the windows of an endless run, (T+1,) int32, with random access."""
    endless = [
        grain.MapDataset.source(_EndlessShuffle(Windows(stream, context), (seed, index)))
        for index, (_, stream) in enumerate(components)
    ]
    return grain.MapDataset.mix(endless, weights=[weight for weight, _ in components])


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Returns `total` in whole parts nearest to the weights (largest remainder first)."""
    whole = math.fsum(weights)
    exact = [weight / whole * total for weight in weights]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda c: shares[c] - exact[c])
    for c in by_remainder[: total - sum(shares)]:
        shares[c] += 1
    return shares

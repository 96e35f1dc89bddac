"""Datasets and batches.

A batch is a pure function of (seed, global step): a run that resumes at step s with any number of
reader threads or processes sees the batches that an uninterrupted single process would have seen,
so the step is the only state there is to save.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
from typing import Any

from absl import logging
import grain
import numpy as np

from wsparse.config import DataConfig
from wsparse.data import corpus, prepared, sources, streams
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.data.streams import TokenStream
from wsparse.errors import UserError

# The streams of a mix, each with its share in sampling; the shares sum to 1.
Components = Sequence[tuple[float, TokenStream]]


@dataclasses.dataclass(frozen=True)
class Report:
    """What the data was made from.

    Attributes:
      sources: what came out of each source, in the order of the mix.
      train_tokens: tokens to train on.
      validation_tokens: tokens held out.
    """

    sources: tuple[sources.SourceReport, ...]
    train_tokens: int
    validation_tokens: int

    def __str__(self) -> str:
        tokens = f"{self.train_tokens} training tokens, {self.validation_tokens} held out"
        return "\n".join([*map(str, self.sources), tokens])


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A tokenizer and the token streams of each source of a mix.

    Attributes:
      tokenizer: what the tokens mean.
      train: (weight, stream) for each source; weights sum to 1.
      validation: the same for held-out documents.
      digest: hex sha256 over the tokenizer, the weights and all tokens.
      report: counts.
    """

    tokenizer: tokenizer_lib.Tokenizer
    train: list[tuple[float, TokenStream]]
    validation: list[tuple[float, TokenStream]]
    digest: str
    report: Report


def open_dataset(
    data: DataConfig,
    *,
    vocab_size: int,
    context: int,
    tokenizer_file: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Dataset:
    """Collect, split, tokenize: everything that comes before batches.

    `data.megabytes` are shared between the sources by weight; a source that has less gives all it
    has, and is repeated more often in training, since weights are about sampling. The tokenizer is,
    in this order: `tokenizer_file`, `data.tokenizer`, that of the `arrayrecord:` parts, or one
    trained on the training text. `arrayrecord:` parts stay on disk, and `data.megabytes`,
    `data.validation_fraction` and `data.seed` do not touch their documents.

    Args:
      data: the `data` group of a config.
      vocab_size: what the model expects V.
      context: T, to check that there is a window to train on.
      tokenizer_file: for example the `tokenizer.json` of the run that is resumed.
      progress: is given a line at each stage.

    Raises:
      UserError: a bad source, a tokenizer of another size, or too little text on either side.
    """
    say = progress or (lambda line: None)
    parts = sources.parse_mix(data.source)
    folders = [sources.arrayrecord_folder(part.name) for part in parts]
    opened = {i: prepared.open_folder(folder) for i, folder in enumerate(folders) if folder}
    tokenizer = _given_tokenizer(data, tokenizer_file, {parts[i].name: opened[i] for i in opened})
    if tokenizer is not None and tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size={vocab_size}: "
            "make them equal"
        )

    texts: dict[int, list[str]] = {}
    reports: dict[int, list[sources.SourceReport]] = {}
    for i, part in enumerate(parts):
        if i in opened:
            reports[i] = [component.report for component in opened[i].manifest.components]
            continue
        say(f"reading {part.name}")
        counts: collections.Counter[str] = collections.Counter()
        source = sources.open_source(part.name, seed=data.seed)
        share = data.megabytes * 1e6 * part.weight
        texts[i] = list(sources.documents(source, counts, max_bytes=share))
        reports[i] = [sources.SourceReport(part.name, **counts)]

    named = [(parts[i].name, documents) for i, documents in texts.items()]
    found = corpus.scan(named, validation_fraction=data.validation_fraction)
    if tokenizer is None:
        say(f"training a tokenizer of {vocab_size} tokens")
        tokenizer = tokenizer_lib.train(found.sample, vocab_size)

    names: list[str] = []
    train: list[tuple[float, TokenStream]] = []
    validation: list[tuple[float, TokenStream]] = []
    for i, part in enumerate(parts):
        if i in opened:
            names += [f"{part.name} ({report.source})" for report in reports[i]]
            train += [(part.weight * weight, stream) for weight, stream in opened[i].train]
            validation += [
                (part.weight * weight, stream) for weight, stream in opened[i].validation
            ]
            continue
        say(f"encoding {part.name}")
        names.append(part.name)
        for side, documents in zip(
            (train, validation), corpus.split(texts[i], found.holdout), strict=True
        ):
            side.append((part.weight, corpus.encode_stream(documents, tokenizer)))
    for name, (_, training), (_, held_out) in zip(names, train, validation, strict=True):
        _require_window(training, name, context, "training")
        _require_window(held_out, name, context, "held-out")

    report = Report(
        tuple(each for i in range(len(parts)) for each in reports[i]),
        train_tokens=sum(len(stream) for _, stream in train),
        validation_tokens=sum(len(stream) for _, stream in validation),
    )
    return Dataset(tokenizer, train, validation, _digest(tokenizer, train, validation), report)


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
    """Endless shuffled batches, from `start_step` on.

    The batch of step s is a pure function of (components, batch_size, context, seed, s), whatever
    `start_step`, `threads` and `prefetch`; a process that wants some `rows` of it reads no others.
    Each epoch of each component has its own shuffle. To resume, start at the step.

    Args:
      components: (weight, stream) pairs; a smaller stream is repeated as often as its weight asks.
      batch_size: B, rows of the global batch.
      context: T.
      seed: of the order, not negative.
      start_step: the first batch that is returned.
      rows: which rows of the global batch this process wants, R of them; None is all.
      threads: threads that read ahead.
      prefetch: batches they keep ready.

    Returns:
      An iterator of (R, T+1) int32: inputs are `[:, :-1]`, targets `[:, 1:]`.

    Raises:
      UserError: at once, when there is no such row or the seed is negative.
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
    components: Components,
    *,
    batch_size: int,
    context: int,
    batches: int,
    rows: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """The same held-out batches at each call, evenly spread over each stream, in mix proportion.

    There are as many batches as the windows of all streams fill, at most `batches`. A stream that
    has fewer windows than its share of them repeats each about equally often; so does a single
    stream that fills less than one batch. A line is logged when windows are repeated.

    Args:
      components: (weight, stream) pairs.
      batch_size: B, rows of the global batch.
      context: T.
      batches: how many at most, at least 1.
      rows: which rows of each global batch this process wants, R of them; None is all.

    Returns:
      1 to `batches` arrays (R, T+1) int32.
    """
    wanted = _rows(batch_size, rows)
    windows = [streams.Windows(stream, context) for _, stream in components]
    weights = _normalized([weight for weight, _ in components])
    count = min(batches, max(1, sum(map(len, windows)) // batch_size))
    shares = _shares(weights, count * batch_size)
    for (_, stream), each, share in zip(components, windows, shares, strict=True):
        if share > len(each):
            logging.info(
                "evaluation repeats the %d windows of a stream of %d tokens to make %d",
                len(each),
                len(stream),
                share,
            )
    # Each window's place in its own stream, from 0 to 1, orders the windows of all streams.
    plan = sorted(
        ((j + 0.5) / share, c, j * len(windows[c]) // share)
        for c, share in enumerate(shares)
        for j in range(share)
    )
    return [
        np.stack([windows[c][i] for _, c, i in (plan[b * batch_size + row] for row in wanted)])
        for b in range(count)
    ]


def _given_tokenizer(
    data: DataConfig,
    tokenizer_file: str | os.PathLike[str] | None,
    opened: dict[str, prepared.Prepared],
) -> tokenizer_lib.Tokenizer | None:
    """The tokenizer that the user or prepared tokens dictate; None when one is to be trained."""
    found: list[tuple[str, tokenizer_lib.Tokenizer]] = []
    if tokenizer_file or data.tokenizer:
        path = os.path.expanduser(tokenizer_file or data.tokenizer)
        found.append((str(path), tokenizer_lib.load(path)))
    found += [(name, each.tokenizer) for name, each in opened.items()]
    for name, other in found[1:]:
        if other.digest != found[0][1].digest:
            raise UserError(
                f"{found[0][0]} and {name} have different tokenizers: prepare one again with "
                "--tokenizer=<the tokenizer.json of the other>"
            )
    return found[0][1] if found else None


def _require_window(stream: TokenStream, name: str, context: int, side: str) -> None:
    if streams.window_count(len(stream), context) < 1:
        raise UserError(
            f"{name} has {len(stream)} {side} tokens, one window of model.context={context} needs "
            f"{context + 1}: raise data.megabytes"
            + (" or data.validation_fraction" if side == "held-out" else "")
            + ", or give more documents; an arrayrecord: folder must be prepared again"
        )


def _digest(tokenizer: tokenizer_lib.Tokenizer, *sides: Components) -> str:
    content = [tokenizer.digest, *([[w, len(s), s.digest] for w, s in side] for side in sides)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _rows(batch_size: int, rows: Sequence[int] | None) -> Sequence[int]:
    if rows is None:
        return range(batch_size)
    for row in rows:
        if not 0 <= row < batch_size:
            raise UserError(f"rows must be in [0, batch_size={batch_size}), got {row}")
    return [int(row) for row in rows]


class _EndlessShuffle:
    """The windows of a stream, epoch after epoch in new orders, with random access at any index.

    Grain's own shuffle keeps nothing in memory, but takes milliseconds per index when there are few
    windows, and its epoch e with seed s is its epoch e-1 with seed s+1. Here the orders of two
    epochs are kept, 4 bytes a window.
    """

    def __init__(self, windows: streams.Windows, seed: Sequence[int]):
        """Shuffle `windows` by `seed`, numbers that no other shuffle has."""
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
    """Element i is the i-th window of an endless run, (T+1,) int32: random access at any i."""
    endless = [
        grain.MapDataset.source(_EndlessShuffle(streams.Windows(stream, context), (seed, index)))
        for index, (_, stream) in enumerate(components)
    ]
    return grain.MapDataset.mix(endless, weights=[weight for weight, _ in components])


def _normalized(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` in whole parts nearest to the weights (largest remainder first)."""
    exact = [weight * total for weight in weights]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda c: shares[c] - exact[c])
    for c in by_remainder[: total - sum(shares)]:
        shares[c] += 1
    return shares

"""Batches are a pure function of (seed, step), cover every token, and follow the mix's weights."""

import collections
import itertools

from helpers import check
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from wsparse.data import batches, tokens

# A component's tokens name their own position, so a window shows where it was read.
APART = 1_000_000


def counting_streams(*lengths: int) -> list[tokens.MemoryStream]:
    return [
        tokens.MemoryStream(np.arange(length, dtype=np.uint32) + index * APART)
        for index, length in enumerate(lengths)
    ]


def mix(weights, lengths) -> list[tuple[float, tokens.TokenStream]]:
    return list(zip(weights, counting_streams(*lengths), strict=True))


def take(count: int, components, **options) -> np.ndarray:
    return np.stack(list(itertools.islice(batches.train_batches(components, **options), count)))


# Windows and epochs.


@given(length=st.integers(0, 200), context=st.integers(1, 40))
def test_windows_predict_every_token_after_the_first_once_in_order(length, context):
    (stream,) = counting_streams(length)
    windows = batches.Windows(stream, context)
    targets = [int(token) for i in range(len(windows)) for token in windows[i][1:]]
    assert targets == list(range(1, 1 + len(targets)))
    assert 0 <= length - 1 - len(targets) < context or length == 0 == len(targets)
    for i in range(len(windows)):
        assert windows[i].dtype == np.int32
        assert windows[i].tolist() == list(range(i * context, i * context + context + 1))


@settings(max_examples=20, deadline=None)
@given(
    windows=st.integers(1, 30),
    context=st.integers(1, 8),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 2**40),
)
def test_each_epoch_has_every_target_once_in_a_new_order(windows, context, batch_size, seed):
    components = mix([1.0], [windows * context + 1])
    steps = -(-3 * windows // batch_size)
    batches = take(steps, components, batch_size=batch_size, context=context, seed=seed)
    rows = batches.reshape(-1, context + 1)
    epochs = [rows[e * windows : (e + 1) * windows] for e in range(3)]
    for epoch in epochs:
        targets = sorted(epoch[:, 1:].ravel().tolist())
        assert targets == list(range(1, windows * context + 1))
    if windows >= 10:
        orders = {tuple(epoch[:, 0].tolist()) for epoch in epochs}
        assert len(orders) > 1
        assert tuple(range(0, windows * context, context)) not in orders


def test_neighboring_seeds_share_no_epoch():
    components = mix([1.0], [64 * 4 + 1])
    options = {"batch_size": 64, "context": 4}
    epochs = {seed: take(3, components, seed=seed, **options) for seed in (0, 1)}
    for a, b in itertools.product(epochs[0], epochs[1]):
        assert not np.array_equal(a, b)


# A pure function of (seed, step).


@settings(max_examples=15, deadline=None)
@given(
    start=st.integers(0, 50),
    processes=st.sampled_from([1, 2, 3, 6]),
    threads=st.integers(1, 4),
    prefetch=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_resumed_and_divided_runs_see_the_batches_of_one_process(start, processes, threads, prefetch, seed):
    components = mix([0.7, 0.3], [150, 60])
    options = {"batch_size": 6, "context": 5}
    whole = take(start + 3, components, seed=seed, **options)[start:]
    shares = [
        take(
            3,
            components,
            seed=seed,
            start_step=start,
            rows=range(index * 6 // processes, (index + 1) * 6 // processes),
            threads=threads,
            prefetch=prefetch,
            **options,
        )
        for index in range(processes)
    ]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)
    assert whole.dtype == shares[0].dtype == np.int32
    # Controls: the seed and the step matter.
    assert not np.array_equal(take(start + 3, components, seed=seed + 1, **options)[start:], whole)
    assert not np.array_equal(take(start + 4, components, seed=seed, **options)[start + 1 :], whole)


def test_a_process_reads_only_its_own_rows():
    class Watched:
        digest = ""

        def __init__(self):
            self.starts = []

        def __len__(self):
            return 1001

        def read(self, start, stop):
            self.starts.append(start)
            return np.arange(start, stop, dtype=np.int32)

    stream = Watched()
    options = {"batch_size": 8, "context": 10, "seed": 0, "rows": [2, 3]}
    batches = take(2, [(1.0, stream)], threads=1, prefetch=1, **options)
    read = len(stream.starts)
    # Two batches of two rows, and what was read ahead.
    assert batches.shape == (2, 2, 11)
    assert read <= 2 * (2 + 2)
    assert stream.starts[:4] == batches[:, :, 0].ravel().tolist()


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, 0.25, 0.25), (0.98, 0.02)])
def test_mix_proportions_converge_to_the_weights_and_repeat_the_smaller_source(weights):
    components = mix(weights, [5000, 300, 300][: len(weights)])
    drawn = take(100, components, batch_size=20, context=4, seed=1)
    of = collections.Counter((drawn[:, :, 0] // APART).ravel().tolist())
    shares = [of[index] / drawn[:, :, 0].size for index in range(len(weights))]
    np.testing.assert_allclose(shares, weights, atol=0.005)
    # And already in every batch, to a row.
    first = (drawn[:, :, 0] // APART == 0).sum(axis=1)
    assert np.abs(first - 20 * weights[0]).max() <= 1.01
    # Each epoch of a component has each of its windows once, whatever the mix.
    starts = drawn[:, :, 0].ravel()
    for index, (_, stream) in enumerate(components):
        mine = starts[starts // APART == index]
        size = batches.window_count(len(stream), 4)
        for begin in range(0, len(mine) - size + 1, size):
            assert len(set(mine[begin : begin + size].tolist())) == size


# Evaluation.


def test_evaluation_is_spread_over_the_held_out_text_in_mix_proportion():
    components = mix([0.75, 0.25], [4001, 4001])
    options = {"batch_size": 8, "context": 4, "batches": 10}
    given = batches.eval_batches(components, **options)
    assert len(given) == 10
    np.testing.assert_array_equal(given, batches.eval_batches(components, **options))
    starts = np.stack(given)[:, :, 0]
    assert (starts // APART == 0).sum() == 60
    assert set((starts // APART == 0).sum(axis=1)) <= {5, 6, 7}
    for index, rows in ((0, 60), (1, 20)):
        positions = np.sort(starts[starts // APART == index] - index * APART)
        expected = [4 * int(j * 1000 / rows) for j in range(rows)]
        assert positions.tolist() == expected
    shares = [batches.eval_batches(components, rows=[2 * p, 2 * p + 1], **options) for p in range(4)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), np.stack(given))


def test_little_held_out_text_gives_fewer_batches_and_at_least_one():
    def starts(components, **options):
        return [b[:, 0].tolist() for b in batches.eval_batches(components, context=4, **options)]

    one = mix([1.0], [4 * 10 + 1])
    assert starts(one, batch_size=4, batches=9) == [[0, 4, 8, 12], [20, 24, 28, 32]]
    filled = starts(one, batch_size=15, batches=9)
    assert len(filled) == 1
    assert collections.Counter(filled[0]).keys() == {4 * i for i in range(10)}
    assert max(collections.Counter(filled[0]).values()) == 2
    # In a mix the smaller source repeats, rather than leave the larger one unread.
    two = starts(mix([0.5, 0.5], [4 * 38 + 1, 4 * 2 + 1]), batch_size=10, batches=9)
    assert len(two) == 4
    counts = collections.Counter(start for batch in two for start in batch if start >= APART)
    assert counts == {APART: 10, APART + 4: 10}


def test_bad_requests_are_one_line():
    options = {"context": 4, "seed": 0}
    components = mix([1.0], [100])
    check(
        r"rows must be in \[0, batch_size=6\), got 6",
        lambda: batches.train_batches(components, batch_size=6, rows=[0, 6], **options),
    )
    check(
        "seed must not be negative",
        lambda: batches.train_batches(components, batch_size=6, context=4, seed=-1),
    )


# Windows for measurements.


def test_windows_are_the_first_that_training_draws_without_those_that_come_again():
    components = mix([0.7, 0.3], [4 * 50 + 1, 4 * 30 + 1])
    expected = take(1, components, batch_size=20, context=4, seed=3)[0][:, :-1]
    drawn = batches.windows(components, n=20, context=4, seed=3)
    np.testing.assert_array_equal(drawn, expected)
    assert drawn.dtype == np.int32
    other = batches.windows(components, n=20, context=4, seed=4)
    assert not np.array_equal(drawn, other)
    few = batches.windows(mix([1.0], [4 * 5 + 1]), n=20, context=4, seed=3)
    assert sorted(few[:, 0]) == [0, 4, 8, 12, 16]
    assert batches.windows(mix([1.0], [4]), n=20, context=4, seed=3).shape == (0, 4)

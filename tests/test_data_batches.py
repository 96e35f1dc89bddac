"""Batches are a pure function of (seed, step), cover every token, and follow the mix's weights."""

import collections
import dataclasses
import itertools
import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from wsparse.config import DataConfig
from wsparse.data import batches, corpus, streams, tokenizer
from wsparse.errors import UserError
from wsparse.pytext.documents import document

# A component's tokens name their own position, so a window shows where it was read.
APART = 1_000_000


def counting_streams(*lengths: int) -> list[streams.MemoryStream]:
    return [
        streams.MemoryStream(np.arange(length, dtype=np.uint32) + index * APART)
        for index, length in enumerate(lengths)
    ]


def mix(weights, lengths) -> list[tuple[float, streams.TokenStream]]:
    return list(zip(weights, counting_streams(*lengths), strict=True))


def take(count: int, components, **options) -> np.ndarray:
    return np.stack(list(itertools.islice(batches.train_batches(components, **options), count)))


def check(match: str, call) -> None:
    """`call` raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


# Windows and epochs.


@given(length=st.integers(0, 200), context=st.integers(1, 40))
def test_windows_predict_every_token_after_the_first_once_in_order(length, context):
    (stream,) = counting_streams(length)
    windows = streams.Windows(stream, context)
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
def test_resumed_and_divided_runs_see_the_batches_of_one_process(
    start, processes, threads, prefetch, seed
):
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
    batches = take(100, components, batch_size=20, context=4, seed=1)
    of = collections.Counter((batches[:, :, 0] // APART).ravel().tolist())
    shares = [of[index] / batches[:, :, 0].size for index in range(len(weights))]
    np.testing.assert_allclose(shares, weights, atol=0.005)
    # And already in every batch, to a row.
    first = (batches[:, :, 0] // APART == 0).sum(axis=1)
    assert np.abs(first - 20 * weights[0]).max() <= 1.01
    # Each epoch of a component has each of its windows once, whatever the mix.
    starts = batches[:, :, 0].ravel()
    for index, (_, stream) in enumerate(components):
        mine = starts[starts // APART == index]
        size = streams.window_count(len(stream), 4)
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
    shares = [
        batches.eval_batches(components, rows=[2 * p, 2 * p + 1], **options) for p in range(4)
    ]
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


# Datasets.


@pytest.fixture
def corpus_folder(tmp_path):
    """Files of generated code, one of them twice and one that is not text."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(120):
        (folder / f"{i:03}.py").write_text(document(7, i))
    (folder / "zcopy.py").write_text(document(7, 3))
    (folder / "binary.py").write_bytes(b"\xff\xfe\x00")
    return folder


def open_files(folder, **changes):
    options = {"vocab_size": 300, "context": 16, "tokenizer_file": None}
    options |= {key: changes.pop(key) for key in list(changes) if key in options}
    values = {"source": f"files:{folder}/*.py", "validation_fraction": 0.1} | changes
    return batches.open_dataset(DataConfig(**values), **options)


def documents_of(dataset, side) -> list[str]:
    (_, stream) = side[0]
    text = dataset.tokenizer.decode(stream.read(0, len(stream)))
    assert text.endswith(tokenizer.END_OF_TEXT)
    return text.removesuffix(tokenizer.END_OF_TEXT).split(tokenizer.END_OF_TEXT)


def test_every_document_is_on_one_side_in_order_and_copies_stay_together(corpus_folder):
    dataset = open_files(corpus_folder)
    train, held_out = (
        documents_of(dataset, dataset.train),
        documents_of(dataset, dataset.validation),
    )
    files = sorted(corpus_folder.glob("*.py"))
    texts = [file.read_text() for file in files if file.name != "binary.py"]
    assert [text for text in texts if text in set(train)] == train
    assert [text for text in texts if text in set(held_out)] == held_out
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    assert 3 <= len(held_out) <= 25
    (report,) = dataset.report.sources
    assert (report.documents, report.skipped_undecodable) == (121, 1)
    assert dataset.report.train_tokens == len(dataset.train[0][1])
    assert "121 documents" in str(dataset.report)
    assert "skipped 1 undecodable" in str(dataset.report)


def test_the_split_depends_on_content_alone(corpus_folder, tmp_path):
    held_out = set(documents_of(d := open_files(corpus_folder), d.validation))
    moved = tmp_path / "moved"
    moved.mkdir()
    for number, file in enumerate(sorted(corpus_folder.glob("*.py"), reverse=True)):
        (moved / f"{number}.py").write_bytes(file.read_bytes())
    assert set(documents_of(d := open_files(moved), d.validation)) == held_out


def test_a_source_without_a_held_out_document_holds_out_the_one_with_the_smallest_digest():
    texts = [f"document {i}" for i in range(30)]
    found = corpus.scan([("a", texts), ("b", texts[:5])], validation_fraction=1e-9)
    held_out = {text for text in texts if corpus.text_digest(text) in found.holdout}
    assert held_out == {min(texts, key=corpus.text_digest), min(texts[:5], key=corpus.text_digest)}
    check(
        "'one' must have a document",
        lambda: corpus.scan([("one", ["x", "x"])], validation_fraction=0.1),
    )
    check(
        "'all'.*raise megabytes or give more documents",
        lambda: corpus.scan([("all", texts)], validation_fraction=0.99999),
    )


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(40)), st.integers(50, 800))
def test_the_tokenizer_sample_is_training_text_in_no_order_and_bounded(order, limit):
    texts = [f"document number {i}" for i in range(40)]
    shuffled = [texts[i] for i in order]
    options = {"validation_fraction": 0.2, "sample_bytes": limit}
    found = corpus.scan([("a", shuffled)], **options)
    assert found == corpus.scan([("a", texts)], **options)
    assert sum(map(len, found.sample)) <= limit
    assert not any(corpus.text_digest(text) in found.holdout for text in found.sample)
    if limit >= 800:
        assert len(found.sample) == len(
            [t for t in texts if corpus.text_digest(t) not in found.holdout]
        )


def test_the_digest_follows_tokens_tokenizer_and_weights(corpus_folder, tmp_path):
    dataset = open_files(corpus_folder)
    assert open_files(corpus_folder).digest == dataset.digest
    file = tmp_path / "tokenizer.json"
    dataset.tokenizer.save(file)
    assert open_files(corpus_folder, tokenizer_file=file).digest == dataset.digest
    assert open_files(corpus_folder, tokenizer=str(file)).digest == dataset.digest
    assert open_files(corpus_folder, vocab_size=301).digest != dataset.digest
    one, two = f"files:{corpus_folder}/0*.py", f"files:{corpus_folder}/1*.py"
    digests = {
        open_files(corpus_folder, tokenizer_file=file, source=f"{weight}*{one}+{two}").digest
        for weight in (1, 2)
    }
    assert len(digests) == 2
    changed = corpus_folder / "050.py"
    changed.write_text(changed.read_text() + "# changed\n")
    assert open_files(corpus_folder, tokenizer_file=file).digest != dataset.digest


def test_megabytes_are_shared_by_weight(corpus_folder):
    dataset = open_files(
        corpus_folder, source=f"0.75*idioms+0.25*files:{corpus_folder}/*.py", megabytes=0.1
    )
    first, second = dataset.report.sources
    assert 75_000 <= first.bytes < 78_000
    assert 25_000 <= second.bytes < 28_000
    assert [weight for weight, _ in dataset.train] == [0.75, 0.25]
    # A source that has less gives all it has, and keeps its weight.
    more = open_files(
        corpus_folder, source=f"0.5*idioms+0.5*files:{corpus_folder}/00*.py", megabytes=0.1
    )
    assert more.report.sources[1].documents == 10
    assert [weight for weight, _ in more.train] == [0.5, 0.5]


def test_every_token_of_the_dataset_reaches_a_batch(corpus_folder):
    dataset = open_files(corpus_folder)
    (_, stream) = dataset.train[0]
    windows = streams.window_count(len(stream), 16)
    batches = take(windows, dataset.train, batch_size=1, context=16, seed=0)[:, 0]
    expected = [stream.read(i * 16, i * 16 + 17).tolist() for i in range(windows)]
    assert sorted(batches.tolist()) == sorted(expected)


def test_bad_requests_are_one_line(corpus_folder, tmp_path):
    dataset = open_files(corpus_folder)
    file = tmp_path / "tokenizer.json"
    dataset.tokenizer.save(file)
    check(
        "tokenizer has 300 tokens, but model.vocab_size=400",
        lambda: open_files(corpus_folder, vocab_size=400, tokenizer_file=file),
    )
    check("no tokenizer at", lambda: open_files(corpus_folder, tokenizer="/nowhere.json"))
    check(
        "training tokens, one window of model.context=100000 needs 100001",
        lambda: open_files(corpus_folder, context=100_000),
    )
    check(
        "held-out tokens, .* or data.validation_fraction",
        lambda: open_files(corpus_folder, context=2000, validation_fraction=1e-9),
    )
    check("vocab_size=50000 needs more text", lambda: open_files(corpus_folder, vocab_size=50_000))
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


def test_reports_are_plain_data(corpus_folder):
    report = dataclasses.asdict(open_files(corpus_folder).report)
    assert json.loads(json.dumps(report))["sources"][0]["documents"] == 121

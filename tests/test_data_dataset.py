"""A run's data: how documents are divided, what its digest follows, and what its folder remembers."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import platform
import shutil
import tempfile

from helpers import check
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from wsparse.config import DataConfig, ModelConfig, TrainConfig
from wsparse.data import batches, dataset, encode, sources, split, tokenizer
from wsparse.pytext.documents import document


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


def config_of(*, vocab_size=300, context=16, **data) -> TrainConfig:
    return TrainConfig(model=ModelConfig(vocab_size=vocab_size, context=context), data=DataConfig(**data))


def open_files(folder, **changes):
    file = changes.pop("tokenizer_file", None)
    config = config_of(**{"source": f"files:{folder}/*.py", "validation_fraction": 0.1} | changes)
    with tempfile.TemporaryDirectory() as run:
        path = pathlib.Path(run, "data")
        return dataset.open_dataset(path, config, tokenizer=file and tokenizer.load(file))


def documents_of(opened, side) -> list[str]:
    (_, stream) = side[0]
    text = opened.tokenizer.decode(stream.read(0, len(stream)))
    assert text.endswith(tokenizer.END_OF_TEXT)
    return text.removesuffix(tokenizer.END_OF_TEXT).split(tokenizer.END_OF_TEXT)


def test_every_document_is_on_one_side_in_order_and_copies_stay_together(corpus_folder):
    opened = open_files(corpus_folder)
    train, held_out = (documents_of(opened, opened.train), documents_of(opened, opened.validation))
    files = sorted(corpus_folder.glob("*.py"))
    texts = [file.read_text() for file in files if file.name != "binary.py"]
    assert [text for text in texts if text in set(train)] == train
    assert [text for text in texts if text in set(held_out)] == held_out
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    assert 3 <= len(held_out) <= 25
    (report,) = opened.report.sources
    assert (report.documents, report.skipped_undecodable) == (121, 1)
    assert opened.report.train_tokens == len(opened.train[0][1])
    assert "121 documents" in str(opened.report)
    assert "skipped 1 undecodable" in str(opened.report)


def test_the_split_depends_on_content_alone(corpus_folder, tmp_path):
    held_out = set(documents_of(d := open_files(corpus_folder), d.validation))
    moved = tmp_path / "moved"
    moved.mkdir()
    for number, file in enumerate(sorted(corpus_folder.glob("*.py"), reverse=True)):
        (moved / f"{number}.py").write_bytes(file.read_bytes())
    assert set(documents_of(d := open_files(moved), d.validation)) == held_out


def test_a_source_without_a_held_out_document_holds_out_the_one_with_the_smallest_digest():
    texts = [f"document {i}" for i in range(30)]
    found = split.scan([("a", texts), ("b", texts[:5])], validation_fraction=1e-9)
    held_out = {text for text in texts if split.text_digest(text) in found.holdout}
    assert held_out == {min(texts, key=split.text_digest), min(texts[:5], key=split.text_digest)}
    check("'one' must have a document", lambda: split.scan([("one", ["x", "x"])], validation_fraction=0.1))
    check(
        "'all'.*raise megabytes or give more documents",
        lambda: split.scan([("all", texts)], validation_fraction=0.99999),
    )


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(40)), st.integers(50, 800))
def test_the_tokenizer_sample_is_training_text_in_no_order_and_bounded(order, limit):
    texts = [f"document number {i}" for i in range(40)]
    shuffled = [texts[i] for i in order]
    options = {"validation_fraction": 0.2, "sample_size": limit}
    found = split.scan([("a", shuffled)], **options)
    assert found == split.scan([("a", texts)], **options)
    assert sum(map(len, found.sample)) <= limit
    assert not any(split.text_digest(text) in found.holdout for text in found.sample)
    if limit >= 800:
        assert len(found.sample) == len([t for t in texts if split.text_digest(t) not in found.holdout])


def test_the_digest_follows_tokens_tokenizer_and_weights(corpus_folder, tmp_path):
    opened = open_files(corpus_folder)
    assert open_files(corpus_folder).digest == opened.digest
    file = tmp_path / "tokenizer.json"
    opened.tokenizer.save(file)
    assert open_files(corpus_folder, tokenizer_file=file).digest == opened.digest
    assert open_files(corpus_folder, tokenizer=str(file)).digest == opened.digest
    assert open_files(corpus_folder, vocab_size=301).digest != opened.digest
    one, two = f"files:{corpus_folder}/0*.py", f"files:{corpus_folder}/1*.py"
    digests = {
        open_files(corpus_folder, tokenizer_file=file, source=f"{weight}*{one}+{two}").digest
        for weight in (1, 2)
    }
    assert len(digests) == 2
    changed = corpus_folder / "050.py"
    changed.write_text(changed.read_text() + "# changed\n")
    assert open_files(corpus_folder, tokenizer_file=file).digest != opened.digest


def test_megabytes_are_shared_by_weight(corpus_folder):
    opened = open_files(corpus_folder, source=f"0.75*idioms+0.25*files:{corpus_folder}/*.py", megabytes=0.1)
    first, second = opened.report.sources
    assert 75_000 <= first.bytes < 78_000
    assert 25_000 <= second.bytes < 28_000
    assert [weight for weight, _ in opened.train] == [0.75, 0.25]
    # A source that has less gives all it has, and keeps its weight.
    more = open_files(corpus_folder, source=f"0.5*idioms+0.5*files:{corpus_folder}/00*.py", megabytes=0.1)
    assert more.report.sources[1].documents == 10
    assert [weight for weight, _ in more.train] == [0.5, 0.5]


def test_every_token_of_the_dataset_reaches_a_batch(corpus_folder):
    opened = open_files(corpus_folder)
    (_, stream) = opened.train[0]
    windows = batches.window_count(len(stream), 16)
    drawn = np.concatenate(
        list(itertools.islice(batches.train_batches(opened.train, batch_size=1, context=16, seed=0), windows))
    )
    expected = [stream.read(i * 16, i * 16 + 17).tolist() for i in range(windows)]
    assert sorted(drawn.tolist()) == sorted(expected)


def test_bad_requests_are_one_line(corpus_folder, tmp_path):
    opened = open_files(corpus_folder)
    file = tmp_path / "tokenizer.json"
    opened.tokenizer.save(file)
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


def test_reports_are_plain_data(corpus_folder):
    report = dataclasses.asdict(open_files(corpus_folder).report)
    assert json.loads(json.dumps(report))["sources"][0]["documents"] == 121


# The folder.


def open_run(folder, source, **changes):
    return dataset.open_dataset(folder, config_of(source=source, validation_fraction=0.1, **changes))


def same_streams(first, second) -> bool:
    return all(
        np.array_equal(a.read(0, len(a)), b.read(0, len(b))) and v == w
        for side in ("train", "validation")
        for (v, a), (w, b) in zip(first.side(side), second.side(side), strict=True)
    )


def test_a_run_reads_its_own_tokens_when_its_sources_are_gone(corpus_folder, tmp_path):
    source = f"0.7*idioms+0.3*files:{corpus_folder}/*.py"
    first = open_run(tmp_path / "data", source, megabytes=0.1)
    shutil.rmtree(corpus_folder)
    again = open_run(tmp_path / "data", source, megabytes=0.1)
    assert again.digest == first.digest and same_streams(first, again)
    assert str(again.report) == str(first.report)
    assert again.provenance == first.provenance
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_digest_and_the_tokens_are_those_of_documents_encoded_one_after_another(corpus_folder):
    """Runs that are older than their folder's tokens compare this digest with their checkpoints'."""
    opened = open_files(corpus_folder)
    texts = [path.read_text() for path in sorted(corpus_folder.glob("*.py")) if path.name[0] != "b"]
    holdout = split.scan([("a", texts)], validation_fraction=0.1).holdout
    for side, documents in zip((opened.train, opened.validation), split.split(texts, holdout), strict=True):
        ids = [i for text in documents for i in [*opened.tokenizer.encode(text), 299]]
        assert side[0][1].read(0, len(side[0][1])).tolist() == ids
        assert side[0][1].digest == hashlib.sha256(np.array(ids, "<u2").tobytes()).hexdigest()


def test_the_folder_says_what_made_it(corpus_folder, tmp_path):
    opened = open_run(tmp_path / "data", f"files:{corpus_folder}/*.py")
    stored = json.loads((tmp_path / "data" / "provenance.json").read_text())
    assert stored["python"] == platform.python_version()
    assert stored["platform"] == platform.platform()
    assert stored["digest"] == opened.digest
    assert stored["tokenizer_sha256"] == opened.tokenizer.digest
    assert stored["train_tokens"] == opened.report.train_tokens
    assert opened.digest[:16] in str(opened.provenance)
    assert platform.python_version() in str(opened.provenance)


def test_prepared_tokens_stay_where_they_are_and_are_recognized(corpus_folder, tmp_path):
    prepared = tmp_path / "prepared"
    options = encode.Options(source=f"files:{corpus_folder}/*.py", vocab_size=300, validation_fraction=0.1)
    encode.write(options, prepared)
    run = tmp_path / "run" / "data"
    first = open_run(run, f"arrayrecord:{prepared}")
    assert [path.name for path in run.iterdir()] == ["provenance.json"]
    assert same_streams(first, open_run(run, f"arrayrecord:{prepared}"))
    shutil.rmtree(prepared)
    (corpus_folder / "050.py").write_text("changed = True\n")
    tokenizer_file = tmp_path / "tokenizer.json"
    first.tokenizer.save(tokenizer_file)
    other = dataclasses.replace(options, vocab_size=None, tokenizer=str(tokenizer_file))
    encode.write(other, prepared)
    check("its digest differs.*delete", lambda: open_run(run, f"arrayrecord:{prepared}"))


def test_a_failure_leaves_no_folder_and_a_damaged_one_is_refused(corpus_folder, tmp_path):
    run = tmp_path / "run" / "data"
    check(
        "needs more text",
        lambda: dataset.open_dataset(run, config_of(source=f"files:{corpus_folder}/*.py", vocab_size=50_000)),
    )
    assert not (tmp_path / "run").exists()
    source = f"files:{corpus_folder}/*.py"
    open_run(run, source)
    shard = max(run.glob("train*record"))
    shard.write_bytes(shard.read_bytes()[:-1])
    check("must have .* bytes", lambda: open_run(run, source))
    shutil.rmtree(run)
    run.mkdir()
    (run / "mine.txt").write_text("")
    check("is not the data of a run", lambda: open_run(run, source))
    assert (run / "mine.txt").exists()


def test_data_of_other_options_is_made_again(corpus_folder, tmp_path):
    first = open_run(tmp_path / "data", f"files:{corpus_folder}/0*.py")
    other = open_run(tmp_path / "data", f"files:{corpus_folder}/*.py")
    assert first.digest != other.digest
    assert other.report.sources[0].documents == 121


def test_a_tokenizer_of_another_run_is_refused(corpus_folder, tmp_path):
    open_run(tmp_path / "data", f"files:{corpus_folder}/*.py")
    other = tokenizer.train([document(9, i) for i in range(40)], 300)
    config = config_of(source=f"files:{corpus_folder}/*.py", validation_fraction=0.1)
    check("is not the one that", lambda: dataset.open_dataset(tmp_path / "data", config, tokenizer=other))


def test_other_text_that_was_prepared_with_another_tokenizer_is_refused(corpus_folder, tmp_path):
    prepared = tmp_path / "prepared"
    encode.write(encode.Options(source=f"files:{corpus_folder}/*.py", vocab_size=300), prepared)
    own = tokenizer.load(prepared / "tokenizer.json")
    source = f"0.5*arrayrecord:{prepared}+0.5*files:{corpus_folder}/*.py"
    assert len(dataset.other_text(source, DataConfig(), own, max_bytes=1e5)) == 2
    other = tokenizer.train([document(9, i) for i in range(40)], 300)
    check(
        "the run and arrayrecord:.* have different tokenizers",
        lambda: dataset.other_text(source, DataConfig(), other, max_bytes=1e5),
    )


def test_a_remembered_source_is_read_once(corpus_folder):
    reads = []

    def read():
        reads.append(1)
        yield from ("a", "b", "c")

    source = sources.remembered(sources.Source("x", False, read))
    first = source.read()
    assert next(first) == "a"
    assert list(source.read()) == ["a", "b", "c"] and list(first) == ["b", "c"]
    assert len(reads) == 1

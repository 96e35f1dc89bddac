"""Prepared folders equal what is made in memory, survive every interruption, and notice damage."""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import signal
import tempfile
import time

from helpers import check, run_python, start_python
import numpy as np
import pytest

from wsparse import locks
from wsparse.config import DataConfig, ModelConfig, TrainConfig
from wsparse.data import batches, dataset, encode, prepare, tokens
from wsparse.pytext.documents import document

ROOT = pathlib.Path(prepare.__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A mix of two sources of generated files, one much smaller."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, count in (("a", 150), ("b", 20)):
        (folder / name).mkdir()
        for i in range(count):
            (folder / name / f"{i:03}.py").write_text(document(len(name) + count, i))
    return f"0.8*files:{folder}/a/*.py+0.2*files:{folder}/b/*.py"


def options(source: str, **changes) -> prepare.Options:
    values = {"vocab_size": 300, "validation_fraction": 0.15, "tokens_per_record": 64}
    return prepare.Options(source=source, **(values | {"shard_megabytes": 0.04} | changes))


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare.prepare(options(source), out)
    return out


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def copy(finished, tmp_path) -> pathlib.Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, data in content(finished).items():
        (folder / name).write_bytes(data)
    return folder


def open_dataset(source: str, *, vocab_size=300, **changes):
    data = {"source": source, "validation_fraction": 0.15, "megabytes": 1e3} | changes
    config = TrainConfig(model=ModelConfig(vocab_size=vocab_size, context=48), data=DataConfig(**data))
    with tempfile.TemporaryDirectory() as run:
        return dataset.open_dataset(pathlib.Path(run, "data"), config)


# The same data.


def test_a_prepared_folder_gives_the_batches_of_the_sources_themselves(source, finished):
    direct, stored = open_dataset(source), open_dataset(f"arrayrecord:{finished}")
    assert stored.tokenizer.digest == direct.tokenizer.digest
    assert [r.documents for r in stored.report.sources] == [150, 20]
    assert stored.report.train_tokens == direct.report.train_tokens
    for side in ("train", "validation"):
        pairs = zip(getattr(direct, side), getattr(stored, side), strict=True)
        for (weight, memory), (stored_weight, files) in pairs:
            assert weight == stored_weight
            assert len(memory) == len(files)
            np.testing.assert_array_equal(memory.read(0, len(memory)), files.read(0, len(files)), strict=True)
    sizes = {"batch_size": 8, "context": 48}
    drawn = [
        list(itertools.islice(batches.train_batches(each.train, seed=3, **sizes), 20))
        for each in (direct, stored)
    ]
    np.testing.assert_array_equal(*drawn)
    evaluation = [batches.eval_batches(each.validation, batches=4, **sizes) for each in (direct, stored)]
    np.testing.assert_array_equal(*evaluation)


def test_any_window_no_longer_than_a_record_reads_at_most_two_records_of_a_shard(finished):
    (_, stream) = open_dataset(f"arrayrecord:{finished}").train[0]
    assert isinstance(stream, tokens.ArrayRecordStream)
    whole = stream.read(0, len(stream))
    records = stream._records
    read = []

    class Watched:
        def __getitem__(self, index):
            read.append(index)
            return records[index]

    stream._records = Watched()
    crossing = 0
    for length in (1, 2, 63, 64, 65):
        for start in range(0, len(stream) - length, 37):
            read.clear()
            np.testing.assert_array_equal(stream.read(start, start + length), whole[start : start + length])
            assert len(read) <= 3
            crossing += len(read) == 3
    # Only where a window holds the end of a shard.
    assert crossing < 30
    assert stream.read(5, 5).shape == (0,)
    assert stream.read(5, 70).dtype == np.int32


def test_the_manifest_counts_what_is_in_the_folder(source, finished):
    manifest = tokens.verify(finished)
    assert not (finished / "progress").exists()
    assert {shard.file for shard in manifest.shards} == {p.name for p in finished.glob("*record")}
    totals = {(s.component, s.split): 0 for s in manifest.shards}
    for shard in manifest.shards:
        totals[shard.component, shard.split] += shard.tokens
        assert 0 <= shard.records * 64 - shard.tokens < 64
    assert len(manifest.shards) >= 6
    for index, component in enumerate(manifest.components):
        assert component.train_tokens == totals[index, "train"]
        assert component.validation_tokens == totals[index, "validation"]
        assert component.train_documents + component.validation_documents == component.documents
    assert manifest.options["source"] == source
    assert (manifest.schema, manifest.vocab_size, manifest.dtype) == (2, 300, "uint16")


def test_mixes_of_folders_need_one_tokenizer_and_multiply_their_weights(source, finished, tmp_path):
    one = tmp_path / "one"
    prepare.prepare(options("idioms", megabytes=0.03, vocab_size=300), one)
    check("have different tokenizers", lambda: open_dataset(f"arrayrecord:{finished}+arrayrecord:{one}"))
    same = tmp_path / "same"
    tokenizer = str(finished / "tokenizer.json")
    prepare.prepare(options("idioms", megabytes=0.03, vocab_size=None, tokenizer=tokenizer), same)
    mixed = open_dataset(f"arrayrecord:{finished}+arrayrecord:{same}+2*idioms", megabytes=0.05)
    assert [weight for weight, _ in mixed.train] == pytest.approx([0.2, 0.05, 0.25, 0.5])
    assert len(mixed.report.sources) == 4
    check(
        "tokenizer has 300 tokens, but model.vocab_size=400",
        lambda: open_dataset(f"arrayrecord:{finished}", vocab_size=400),
    )


def test_a_folder_of_the_first_schema_still_opens(finished, copy):
    """There every record of a stream but the last was full, across its shards."""
    expected = tokens.open_folder(finished)
    manifest = json.loads((copy / "manifest.json").read_text())
    for index, side in itertools.product(range(2), tokens.SPLITS):
        stream = {"train": expected.train, "validation": expected.validation}[side][index][1]
        ids = stream.read(0, len(stream)).astype("<u2")
        entries = [e for e in manifest["shards"] if (e["component"], e["split"]) == (index, side)]
        middle = len(ids) // 2 // 64 * 64
        for number, entry in enumerate(entries):
            # All but two shards stay empty.
            part = {0: ids[:middle], 1: ids[middle:]}.get(number, ids[:0])
            part = ids if len(entries) == 1 else part
            records = encode._write_records(copy / entry["file"], part, 64)
            content = (copy / entry["file"]).read_bytes()
            entry |= {"records": records, "tokens": len(part), "bytes": len(content)}
            entry["sha256"] = hashlib.sha256(content).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest | {"schema": 1}))
    tokens.verify(copy)
    for side in tokens.SPLITS:
        for (_, old), (_, new) in zip(
            getattr(tokens.open_folder(copy), side), getattr(expected, side), strict=True
        ):
            assert old.read(100, len(old)).tolist() == new.read(100, len(new)).tolist()


# Interruptions.


class Killed(BaseException):
    pass


def test_a_run_cut_at_any_write_and_resumed_gives_the_same_bytes(source, finished, tmp_path, monkeypatch):
    expected = content(finished)
    out = tmp_path / "out"
    publish = os.replace
    cuts = 0
    for after in (False, True):
        for number in itertools.count():
            calls = itertools.count()

            def cut(part, path, number=number, after=after, calls=calls):
                if next(calls) != number:
                    return publish(part, path)
                if after:
                    publish(part, path)
                raise Killed

            monkeypatch.setattr(os, "replace", cut)
            folder = out / f"{after}-{number}"
            try:
                prepare.prepare(options(source), folder)
            except Killed:
                cuts += 1
            else:
                break
            for path in folder.glob("*record"):
                assert path.read_bytes() == expected[path.name]
            finished_now = (folder / "manifest.json").exists()
            assert finished_now == (after and set(content_names(folder)) >= set(expected))
            if not finished_now:
                check("prepare has not finished in", lambda f=folder: tokens.open_folder(f))
            monkeypatch.setattr(os, "replace", publish)
            prepare.prepare(options(source), folder)
            assert content(folder) == expected
    assert cuts > 20


def content_names(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()]


def command(source: str, out: pathlib.Path, *more: str) -> list[str]:
    given = options(source)
    return [
        f"--source={source}",
        f"--out={out}",
        f"--vocab_size={given.vocab_size}",
        f"--validation_fraction={given.validation_fraction}",
        f"--tokens_per_record={given.tokens_per_record}",
        f"--shard_megabytes={given.shard_megabytes}",
        *more,
    ]


# The command, slow enough to be killed between two shards.
SLOW = """
import runpy, time
from wsparse.data import encode
write = encode._write_records
encode._write_records = lambda *arguments: (time.sleep(0.1), write(*arguments))[1]
runpy.run_module("wsparse.data.prepare", run_name="__main__")
"""


def test_a_killed_process_leaves_no_half_shard_and_the_same_command_finishes(source, finished, tmp_path):
    out = tmp_path / "out"
    expected = content(finished)
    for sent in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        before = len(list(out.glob("*record")))
        with start_python("-c", SLOW, *command(source, out)) as process:
            while process.poll() is None and len(list(out.glob("*record"))) < before + 2:
                time.sleep(0.005)
            process.send_signal(sent)
            _, errors = process.communicate()
        assert process.returncode == (-sent if sent == signal.SIGKILL else 128 + sent)
        assert not (out / "manifest.json").exists()
        if sent != signal.SIGKILL:
            assert errors.endswith("stopped; run the same command again to go on\n")
        for path in out.glob("*record"):
            assert path.read_bytes() == expected[path.name]
    last = run_python("-m", "wsparse.data.prepare", *command(source, out, "--verify"))
    assert "arrayrecord:" in last.stdout
    assert content(out) == expected
    again = run_python("-m", "wsparse.data.prepare", *command(source, out))
    assert again.stdout.startswith(f"{out} is already finished: nothing to do\n")
    other = run_python("-m", "wsparse.data.prepare", *command(source, out, "--seed=9"))
    assert other.returncode == 2
    assert "seed: 0 -> 9" in other.stderr
    assert len(other.stderr.splitlines()) == 1


# Refusals.


def test_an_unfinished_folder_refuses_other_options(source, tmp_path, monkeypatch):
    def cut(part, path):
        if path.suffix == ".array_record":
            raise Killed
        publish(part, path)

    publish = os.replace
    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(Killed):
        prepare.prepare(options(source), tmp_path / "out")
    check(
        "was begun with other options .vocab_size: 300 -> 301",
        lambda: prepare.prepare(options(source, vocab_size=301), tmp_path / "out"),
    )


def test_a_request_that_could_not_work_does_not_bind_the_next(source, tmp_path):
    out = tmp_path / "out"
    check("needs more text", lambda: prepare.prepare(options(source, vocab_size=50_000), out))
    assert prepare.prepare(options(source), out).vocab_size == 300


def test_documents_that_change_between_runs_are_noticed(tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.py").write_text(document(1, i))
    given = options(f"files:{folder}/*.py", shard_megabytes=0.01)
    publish = os.replace

    def cut(part, path):
        if path.name.startswith("train-00001"):
            raise Killed
        publish(part, path)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(Killed):
        prepare.prepare(given, tmp_path / "out")
    monkeypatch.setattr(os, "replace", publish)
    (folder / "01.py").write_text("changed = True\n")
    check("changed since prepare began", lambda: prepare.prepare(given, tmp_path / "out"))


def test_damage_is_noticed(copy):
    shard = max(copy.glob("train*record"))
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    tokens.open_folder(copy)  # Sizes only: opening stays fast.
    check(f"{shard.name} is damaged", lambda: tokens.verify(copy))
    shard.write_bytes(data[:-1])
    check(f"{shard.name} must have .* bytes, has", lambda: tokens.open_folder(copy))
    shard.unlink()
    check(f"{shard.name} is missing", lambda: open_dataset(f"arrayrecord:{copy}"))


def test_a_wrong_manifest_or_tokenizer_is_one_line(copy, tmp_path):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "tokenizer.json").write_text(
        (copy / "tokenizer.json").read_text().replace("endoftext", "endoftext")[:-2] + " }"
    )
    tokens.open_folder(copy)  # Layout of the JSON is not content.
    encode.tokenizer_lib.train([document(0, i) for i in range(40)], 300).save(copy / "tokenizer.json")
    check("is not the tokenizer that", lambda: tokens.open_folder(copy))
    (copy / "manifest.json").write_text(json.dumps(manifest | {"schema": 3}))
    check("has schema 3, this version reads 1 to 2", lambda: tokens.open_folder(copy))
    (copy / "manifest.json").write_text(json.dumps(manifest | {"surprise": 2}))
    check("manifest.json is malformed", lambda: tokens.open_folder(copy))
    (copy / "manifest.json").write_text("{")
    check("manifest.json: not JSON", lambda: tokens.open_folder(copy))
    check("no folder", lambda: tokens.open_folder(tmp_path / "none"))


def test_bad_requests_are_one_line(source, finished, tmp_path):
    out = tmp_path / "out"
    check("never ends: say how much with --megabytes", lambda: prepare.prepare(options("idioms"), out))
    check("holds tokens", lambda: prepare.prepare(options(f"arrayrecord:{finished}"), out))
    check("megabytes must be positive and finite, got 0", lambda: options(source, megabytes=0))
    for value in (float("nan"), float("inf")):
        check("positive and finite", lambda v=value: options(source, megabytes=v))
        check("positive and finite", lambda v=value: options(source, shard_megabytes=v))
    check(r"must be in \(0, 1\)", lambda: options(source, validation_fraction=float("nan")))
    check(r"must be in \(0, 1\)", lambda: options(source, validation_fraction=1.0))
    tokenizer = str(finished / "tokenizer.json")
    check(
        "vocab_size=400: leave",
        lambda: prepare.prepare(options(source, vocab_size=400, tokenizer=tokenizer), out),
    )
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").write_text("")
    check("must be empty .* has 'thesis.tex'", lambda: prepare.prepare(options(source), out))
    (out / "thesis.tex").unlink()
    (out / "progress").mkdir()
    with locks.hold(out / "progress", "preparing tokens", name="lock"):
        check("process .* is preparing tokens there", lambda: prepare.prepare(options(source), out))


def test_help_names_every_option_and_importing_defines_no_flag():
    shown = run_python("-m", "wsparse.data.prepare", "--help", COLUMNS="100")
    for name in (*(field.name for field in dataclasses.fields(prepare.Options)), "out", "[no]verify"):
        assert f"  --{name}: " in shown.stdout, name
    from absl import flags

    assert "shard_megabytes" not in flags.FLAGS

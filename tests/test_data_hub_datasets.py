"""The source `hf:`: data sets through the `datasets` library, from local folders and without a network."""

import json
import sys

from helpers import check, read
import pytest

from wsparse.config import DataConfig, ModelConfig, TrainConfig
from wsparse.data import dataset, hub_datasets, sources

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def json_folder(tmp_path):
    """Two splits of stories in JSON lines, one of which is empty, one none."""
    folder = tmp_path / "stories"
    folder.mkdir()
    for split, first in (("train", 0), ("test", 100)):
        rows = [
            {"text": f"title {i}", "story": f"Mia saw {i} birds.", "size": i} for i in range(first, first + 6)
        ]
        rows[2]["story"], rows[4]["story"] = "", None
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_of_a_folder_are_read_in_order_by_split_and_column(json_folder):
    documents, report = read(f"hf:{json_folder}:train:story")
    assert documents == [f"Mia saw {i} birds." for i in (0, 1, 3, 5)]
    assert (report.documents, report.skipped_empty) == (4, 2)
    assert read(f"hf:{json_folder}")[0] == [f"title {i}" for i in range(6)]
    assert read(f"hf:{json_folder}:test")[0][0] == "title 100"
    source = sources.open_source(f"hf:{json_folder}")
    assert list(source.read()) == list(source.read())


def test_parquet_files_of_a_folder_are_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"story": [f"story {i}" for i in range(9)], "topic": ["x"] * 9})
    pyarrow.parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    assert read(f"hf:{tmp_path}:train:story")[0] == [f"story {i}" for i in range(9)]
    check(
        "no column 'text'; columns are story, topic: name one, hf:.*:train:COLUMN",
        lambda: read(f"hf:{tmp_path}"),
    )


def test_no_more_is_read_than_is_asked_for(json_folder):
    with (json_folder / "train.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"more {i}", "story": "", "size": 1}) + "\n" for i in range(5000))
    assert len(read(f"hf:{json_folder}", max_bytes=30)[0]) == 5


def test_text_to_train_on_is_made_of_such_a_source_in_a_mix(tmp_path):
    rows = [{"story": f"{i} birds sang by the lake, and {i + 1} frogs heard them."} for i in range(80)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"0.5*hf:{tmp_path}:train:story+0.5*stories"
    assert [term.name for term in sources.parse_mix(source)] == [f"hf:{tmp_path}:train:story", "stories"]
    config = TrainConfig(
        model=ModelConfig(vocab_size=300, context=16),
        data=DataConfig(source=source, megabytes=0.008, validation_fraction=0.2),
    )
    data = dataset.open_dataset(tmp_path / "data", config)
    assert len(data.side("train")) == len(data.side("validation")) == 2


def test_bad_requests_are_one_line(json_folder, tmp_path):
    check("must be hf:NAME$", lambda: read("hf:"))
    check("must be hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:COLUMN", lambda: read("hf:a/b::text"))
    check("must be hf:NAME, hf:NAME:SPLIT or", lambda: read("hf:a/b:train:text:more"))
    check("folder /nowhere/at/all does not exist", lambda: read("hf:/nowhere/at/all"))
    check("split 'trian', cannot be opened: .*trian", lambda: read(f"hf:{json_folder}:trian"))
    check("'nobody/nothing', split 'train', cannot be opened", lambda: read("hf:nobody/nothing"))
    check("the field 'size' must be a string, got int", lambda: read(f"hf:{json_folder}:train:size"))
    check("no (field|column) 'stroy' .did you mean 'story'", lambda: read(f"hf:{json_folder}:train:stroy"))
    (tmp_path / "empty").mkdir()
    check("cannot be opened", lambda: read(f"hf:{tmp_path / 'empty'}"))


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    check("cannot be (read|opened)", lambda: read(f"hf:{tmp_path}"))


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    check(
        r"the source 'hf:a/b' needs the package 'datasets': pip install 'wsparse\[datasets\]'",
        lambda: read("hf:a/b"),
    )


def test_defaults_are_the_split_train_and_the_column_text():
    assert hub_datasets.parse("hf:a/b", "a/b") == ("a/b", "train", "text")
    assert hub_datasets.parse("hf:a/b:test", "a/b:test") == ("a/b", "test", "text")
    assert hub_datasets.parse("hf:a/b:test:story", "a/b:test:story") == ("a/b", "test", "story")

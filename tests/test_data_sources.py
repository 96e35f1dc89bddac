"""Every source yields its documents in order, counts what it skips, refuses bad input in a line."""

import collections
import json
import pathlib
import sysconfig

from helpers import check, read, run_python
from hypothesis import given
from hypothesis import strategies as st
import pytest

from wsparse.data import sources
from wsparse.pytext.documents import document

# Mixes.


def test_a_mix_is_normalized_and_keeps_its_order():
    assert sources.parse_mix("idioms") == (sources.Term(1.0, "idioms"),)
    assert sources.parse_mix(" 7 * idioms + 3*stdlib ") == (
        sources.Term(0.7, "idioms"),
        sources.Term(0.3, "stdlib"),
    )
    assert sources.parse_mix("stdlib+1e+1*idioms") == (
        sources.Term(1 / 11, "stdlib"),
        sources.Term(10 / 11, "idioms"),
    )


def test_a_plus_or_star_inside_a_path_belongs_to_the_path():
    names = [part.name for part in sources.parse_mix("files:a+b/*.py+0.5*jsonl:c++.jsonl+stdlib")]
    assert names == ["files:a+b/*.py", "jsonl:c++.jsonl", "stdlib"]


@given(
    st.lists(
        st.tuples(
            st.floats(0.01, 100),
            st.sampled_from(["idioms", "stdlib", "files:/x/**/*.py", "tfds:a/b:1.0.0?field=code"]),
        ),
        min_size=1,
    )
)
def test_every_mix_that_is_written_is_read_back(parts):
    parsed = sources.parse_mix("+".join(f"{weight!r}*{name}" for weight, name in parts))
    assert [part.name for part in parsed] == [name for _, name in parts]
    total = sum(weight for weight, _ in parts)
    assert [part.weight for part in parsed] == pytest.approx([w / total for w, _ in parts])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("idoms", r"unknown source 'idoms' \(did you mean 'idioms'\?\)"),
        ("0.7*idioms+0.3*stdlb", r"unknown source 'stdlb' \(did you mean 'stdlib'\?\)"),
        ("0.7*idioms+", "'0.7\\*idioms\\+' has an empty part"),
        ("x*idioms+stdlib", r"weight of 'x\*idioms' in the source .*positive number, got 'x'"),
        ("0*idioms", "positive number, got '0'"),
        ("-1*idioms+2*stdlib", "positive number, got '-1'"),
        ("inf*idioms", "positive number"),
        ("idioms:5", "takes nothing after its name"),
        ("files:", "'files:' must be files:PATH"),
        ("jsonl:a.jsonl?feild=x", r"unknown option 'feild' \(did you mean 'field'\?\)"),
    ],
)
def test_a_malformed_mix_is_one_line_that_names_the_part(text, match):
    check(match, lambda: sources.parse_mix(text))


# Documents.


def test_stdlib_is_the_interpreters_own_code_in_order():
    documents, report = read("stdlib", max_bytes=1e6)
    assert documents == read("stdlib", max_bytes=1e6)[0]
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    assert (root / "abc.py").read_text(encoding="utf-8") in read("stdlib")[0]
    assert report.documents == len(documents)
    assert report.bytes == sum(len(text.encode()) for text in documents)
    # At least the limit, and without the last document less than the limit.
    assert report.bytes >= 1e6 > report.bytes - len(documents[-1].encode())


def test_idioms_are_those_of_the_generator_and_of_the_seed():
    counts: collections.Counter[str] = collections.Counter()
    source = sources.open_source("idioms", seed=5)
    assert source.endless
    documents = list(sources.documents(source, counts, max_bytes=20_000))
    assert documents == [document(5, i) for i in range(len(documents))]
    assert documents[0] != document(6, 0)


def test_files_that_are_no_text_are_counted_and_skipped(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.py").write_bytes("x = 'é'\r\n".encode())
    (tmp_path / "sub" / "a.py").write_bytes(b"y = 1\n")
    (tmp_path / "latin.py").write_bytes("x = 'é'\n".encode("latin-1"))
    (tmp_path / "empty.py").write_bytes(b" \n")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "folder.py").mkdir()
    documents, report = read(f"files:{tmp_path}/**/*.py")
    assert documents == ["x = 'é'\r\n", "y = 1\n"]
    assert report == sources.SourceReport(
        f"files:{tmp_path}/**/*.py",
        documents=2,
        bytes=16,
        skipped_undecodable=1,
        skipped_unreadable=1,
        skipped_empty=1,
    )
    assert "2 documents, 0.00 MB, skipped 1 unreadable, 1 undecodable, 1 empty" in str(report)


def test_a_path_that_exists_is_meant_literally(tmp_path):
    (tmp_path / "a[1].py").write_text("literal")
    (tmp_path / "a1.py").write_text("glob")
    assert read(f"files:{tmp_path}/a[1].py")[0] == ["literal"]
    assert read(f"files:{tmp_path}/a?.py")[0] == ["glob"]


def test_jsonl_gives_the_named_field(tmp_path):
    lines = [
        json.dumps({"text": "one", "code": "1"}).encode(),
        b"",
        b'{"text": "bad \xff", "code": "2"}',
        json.dumps({"text": None, "code": "3"}).encode(),
        b'{"text": "half \\ud800", "code": "4"}',
        json.dumps({"text": "fünf\n", "code": "5"}, ensure_ascii=False).encode(),
    ]
    path = tmp_path / "a.jsonl"
    # With a byte-order mark.
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    documents, report = read(f"jsonl:{path}")
    assert documents == ["one", "fünf\n"]
    assert (report.skipped_undecodable, report.skipped_empty) == (2, 2)
    assert read(f"jsonl:{tmp_path}/*.jsonl?field=code")[0] == ["1", "3", "4", "5"]


def test_parquet_gives_the_named_field(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {i}\n" for i in range(1000)]
    columns = {"text": texts, "raw": [text.encode() for text in texts], "n": list(range(1000))}
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path, row_group_size=300)
    assert read(f"parquet:{path}")[0] == texts
    assert read(f"parquet:{path}?field=raw")[0] == texts
    coded = {"text": pyarrow.array(texts).dictionary_encode()}
    parquet.write_table(pyarrow.table(coded), tmp_path / "coded.parquet")
    assert read(f"parquet:{tmp_path}/coded.parquet")[0] == texts
    odd = {"text": pyarrow.array([b"ok", b"\xff", None], pyarrow.binary())}
    parquet.write_table(pyarrow.table(odd), tmp_path / "odd.parquet")
    documents, report = read(f"parquet:{tmp_path}/odd.parquet")
    assert documents == ["ok"]
    assert (report.skipped_undecodable, report.skipped_empty) == (1, 1)
    check(
        "no field 'txt' .did you mean 'text'.*fields are text, raw, n",
        lambda: read(f"parquet:{path}?field=txt"),
    )
    check("field 'n' must hold strings, got int64", lambda: read(f"parquet:{path}?field=n"))
    (tmp_path / "no.parquet").write_text("not parquet")
    check("no.parquet is not a Parquet file", lambda: read(f"parquet:{tmp_path}/no.parquet"))
    damaged = bytearray(path.read_bytes())
    damaged[1000:1200] = bytes(200)
    (tmp_path / "bad.parquet").write_bytes(damaged)
    check("bad.parquet is damaged: '", lambda: read(f"parquet:{tmp_path}/bad.parquet"))


TFDS_BUILDER = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class TinyCode(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "path": tfds.features.Text(), "size": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(30), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"x = {i}  # é\\n", "path": f"{i}.py", "size": i}

TinyCode(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory) -> pathlib.Path:
    """A dataset that TFDS itself wrote, by a builder that this process has never seen."""
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    script = folder / "tiny_code.py"
    script.write_text(TFDS_BUILDER)
    done = run_python(script, folder / "data", NO_GCE_CHECK="true")
    assert done.returncode == 0, done.stderr
    return folder / "data"


def test_tfds_reads_an_array_record_dataset(tfds_folder):
    documents, report = read(f"tfds:tiny_code?data_dir={tfds_folder}")
    # TFDS shuffles by key when it writes.
    assert sorted(documents) == sorted(f"x = {i}  # é\n" for i in range(30))
    assert report.documents == 30
    assert documents == read(f"tfds:tiny_code:1.0.0?data_dir={tfds_folder}")[0]
    held_out, _ = read(f"tfds:tiny_code?split=test&field=path&data_dir={tfds_folder}")
    assert sorted(held_out) == [f"{i}.py" for i in range(4)]


def test_bad_tfds_requests_are_one_line(tfds_folder):
    def request(query: str, name: str = "tiny_code"):
        return lambda: read(f"tfds:{name}?{query}&data_dir={tfds_folder}")

    check("no field 'txt'.*fields are path, size, text", request("field=txt"))
    check("field 'size' must be a string, got int", request("field=size"))
    check("Unknown split 'validation'. Should be one of", request("split=validation"))
    check("Dataset tiny_kode not found", request("split=train", "tiny_kode"))
    check("folder /nowhere does not exist", lambda: read("tfds:tiny_code?data_dir=/nowhere"))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": "a"', "a.jsonl:2: not JSON: .* at column"),
        ('["text"]', "a.jsonl:2: must be a JSON object, got list"),
        ('{"txt": "a", "n": 1}', r"a.jsonl:2: no field 'text' \(did.*'txt'\?\); fields are txt, n"),
        ('{"text": 5}', "a.jsonl:2: the field 'text' must be a string, got int"),
    ],
)
def test_a_malformed_jsonl_line_is_named(tmp_path, line, match):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    check(match, lambda: read(f"jsonl:{tmp_path}/a.jsonl"))


def test_missing_and_empty_sources_are_one_line(tmp_path):
    (tmp_path / "empty.py").write_text("\n")
    check("/nowhere/a.py does not exist", lambda: read("files:/nowhere/a.py"))
    check("matches no file", lambda: read(f"files:{tmp_path}/*.txt"))
    check(r"is a folder; name the files in it, e.g. .*\*.py", lambda: read(f"files:{tmp_path}"))
    check("has no documents .*'skipped_empty': 1", lambda: read(f"files:{tmp_path}/*.py"))
    check("holds tokens, not documents", lambda: read(f"arrayrecord:{tmp_path}"))

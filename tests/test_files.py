import errno
import os
import pathlib
import re

import pytest

from wsparse import errors, files
from wsparse.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r": not JSON: .* at column"),
        ("[" * 100_000, r": its JSON is nested too deep"),
        ('{"a": %s}' % ("1" * 10_000), r": a number in its JSON has too many digits"),
        ("[1]", r": must be a JSON object, got list"),
        ("null", r": must be a JSON object, got NoneType"),
        (b"\xff", r" cannot be read: it is not UTF-8"),
    ],
)
def test_json_that_is_not_an_object_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "values.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=re.escape(str(path)) + message) as error:
        files.read_json(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_json_that_is_written_is_read_back(tmp_path):
    files.write_json(tmp_path / "values.json", {"a": [1, "é"]}, durable=True)
    assert files.read_json(tmp_path / "values.json") == {"a": [1, "é"]}
    assert [path.name for path in tmp_path.iterdir()] == ["values.json"]


def test_a_file_is_replaced_only_when_its_block_ends_well(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(part):
        part.write_text("new")
        raise KeyError

    with pytest.raises(KeyError), files.replacing(path) as part:
        fail(part)
    assert path.read_text() == "old"
    with files.replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "told"),
    [(ValueError("one\ntwo"), "one"), (ValueError(""), "ValueError"), (KeyError("x"), "'x'"), ("why", "why")],
)
def test_the_reason_of_an_error_is_one_line_and_never_empty(tmp_path, error, told):
    assert errors.reason(error) == told
    assert str(files.cannot_write(tmp_path / "x", error)).startswith(f"cannot write {tmp_path}/x: {told} (")


def test_a_full_disk_is_told_in_one_line_with_the_space_left(tmp_path):
    path = tmp_path / "a.txt"
    with (
        pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left on device \(.* MB free"),
        files.replacing(path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_the_space_left_is_not_told_where_it_is_not_the_reason(tmp_path, number):
    with pytest.raises(UserError) as error, files.replacing(tmp_path / "a.txt"):
        raise OSError(number, os.strerror(number))
    assert str(error.value) == f"cannot write {tmp_path / 'a.txt'}: {os.strerror(number)}"


def test_a_new_folder_appears_complete_or_not_at_all(tmp_path):
    folder = tmp_path / "run" / "data"

    def fail(part):
        (part / "a").write_text("1")
        raise KeyError

    with pytest.raises(KeyError), files.new_folder(folder) as part:
        fail(part)
    assert not list(tmp_path.iterdir())
    with files.new_folder(folder) as part:
        (part / "a").write_text("1")
        assert not folder.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["data"]
    assert (folder / "a").read_text() == "1"


def test_a_folder_that_another_process_made_first_stays(tmp_path):
    folder = tmp_path / "data"
    with files.new_folder(folder) as part:
        (part / "a").write_text("mine")
        folder.mkdir()
        (folder / "a").write_text("theirs")
    assert (folder / "a").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make the folder .*file/a: Not a directory"):
        files.make_folder(tmp_path / "file" / "a")


def test_a_digest_of_a_file_is_that_of_its_content(tmp_path):
    path: pathlib.Path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert files.sha256(path).startswith("ba7816bf") and len(files.sha256(path)) == 64

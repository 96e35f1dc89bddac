"""Sources of documents, named by strings, and weighted mixes of them.

| name | documents |
|---|---|
| `stdlib` | modules of the running interpreter's own library |
| `idioms` | generated modules that show both sides of every task of Python; endless |
| `stories` | generated little stories in English that show both sides of every task of theirs; endless |
| `files:GLOB` | one per file; `**` is any depth: `files:~/src/**/*.py` |
| `jsonl:PATH?field=text` | one per line of the JSON-lines files PATH (a glob may be given) |
| `parquet:PATH?field=text` | one per row of the Parquet files PATH (a glob may be given) |
| `hf:NAME[:SPLIT[:COLUMN]]` | one per row of a data set of the Hugging Face Hub, or of a folder |
| `tfds:NAME?field=text&split=train&data_dir=DIR` | examples of a TFDS dataset in ArrayRecord |
| `arrayrecord:DIR` | tokens written by `python -m wsparse.data.prepare` (`wsparse.data.tokens`) |

The fields shown after `?` are the defaults, except `data_dir`, which is TFDS's own; those of `hf:` are the
split `train` and the column `text`. A mix is
`0.7*idioms+0.3*stdlib`; weights are normalized and a missing one counts as 1. A `+` inside a path belongs to
the path unless what follows it is `NUMBER*` or the name of a source.

Every source yields the same documents in the same order each time. Nothing is stripped or normalized.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import enum
import glob
import importlib.util
import itertools
import math
import os
import pathlib
import re
import sysconfig
from typing import Any
import urllib.parse

from wsparse import files
from wsparse.data import hub_datasets
from wsparse.errors import UserError, closest, missing_extra, optional, quoted, reason
from wsparse.pytext.documents import documents as python_documents
from wsparse.stories.documents import documents as story_documents

# What each kind of source accepts after `?`, with defaults.
_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "stdlib": {},
    "idioms": {},
    "stories": {},
    "files": {},
    "jsonl": {"field": "text"},
    "parquet": {"field": "text"},
    "hf": {},
    "tfds": {"field": "text", "split": "train", "data_dir": ""},
    "arrayrecord": {},
}
_WITHOUT_PATH = ("stdlib", "idioms", "stories")
_USAGE = ", ".join(kind if kind in _WITHOUT_PATH else f"{kind}:..." for kind in _OPTIONS)

# Left out: installed packages, the library's own tests and programs, and modules that are tables.
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"}
    | {"pydoc_data", "encodings", "__pycache__"}
)

_NUMBER = r"[0-9.][0-9.]*(?:[eE][-+]?[0-9]+)?"


class Skip(enum.Enum):
    """Why a file, line or row is not a document: it cannot be opened, is not UTF-8, or is white space."""

    UNREADABLE = "skipped_unreadable"
    UNDECODABLE = "skipped_undecodable"
    EMPTY = "skipped_empty"


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """Counts of one source: documents taken, their bytes in UTF-8, and what was skipped (see `Skip`)."""

    source: str
    documents: int = 0
    bytes: int = 0
    skipped_undecodable: int = 0
    skipped_unreadable: int = 0
    skipped_empty: int = 0

    def __str__(self) -> str:
        line = f"{self.source}: {self.documents} documents, {self.bytes / 1e6:.2f} MB"
        counts = {skip.name.lower(): getattr(self, skip.value) for skip in Skip}
        skipped = [f"{count} {name}" for name, count in counts.items() if count]
        return f"{line}, skipped {', '.join(skipped)}" if skipped else line


@dataclasses.dataclass(frozen=True)
class Term:
    """One source of a mix; the weights of a mix sum to 1."""

    weight: float
    name: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A source that was found and looks readable.

    Attributes:
      name: Name as the user wrote it.
      endless: Whether it needs a limit on bytes, because it never runs out.
      read: Starts from the first document; yields text, bytes to be decoded, or the reason to skip an item.
    """

    name: str
    endless: bool
    read: Callable[[], Iterator[str | bytes | Skip]]


def parse_mix(text: str) -> tuple[Term, ...]:
    """Returns the terms of a mix such as `0.7*idioms+0.3*stdlib`, weights normalized.

    Raises:
      UserError: A term is empty, its weight is not a positive number, or its source or an option is unknown.
    """
    terms = []
    for piece in _split_mix(text):
        part = piece.strip()
        where = f" in the source {text!r}" if part != text.strip() else ""
        if not part:
            raise UserError(f"the source {text!r} has an empty part: write e.g. 0.7*idioms+0.3*stdlib")
        weight, name = 1.0, part
        # A `*` before the first `:` or `/` is the one after a weight; later it is a glob's.
        if match := re.match(r"([^:/*]*)\*(.*)", part, flags=re.DOTALL):
            name = match[2].strip()
            try:
                weight = float(match[1])
            except ValueError:
                weight = math.nan
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"the weight of {part!r}{where} must be a positive number, got {match[1]!r}")
        _kind_path_options(name)
        terms.append(Term(weight, name))
    total = sum(term.weight for term in terms)
    return tuple(Term(term.weight / total, term.name) for term in terms)


def open_source(name: str, *, seed: int = 0) -> Source:
    """Returns the source of a term.

    Args:
      name: See the table above; not `arrayrecord:`, which holds tokens and no documents.
      seed: Seed of the generated documents of `idioms` and `stories`.

    Raises:
      UserError: The name is unknown, a path is missing, a glob is empty, or a package is not installed.
    """
    kind, path, options = _kind_path_options(name)
    if kind == "arrayrecord":
        raise UserError(f"the source {name!r} holds tokens, not documents: name the source it was made from")
    if kind == "stdlib":
        return Source(name, False, lambda: _read_files(_stdlib_files()))
    if kind == "idioms":
        return Source(name, True, lambda: python_documents(seed))
    if kind == "stories":
        return Source(name, True, lambda: story_documents(seed))
    if kind == "hf":
        parts = hub_datasets.parse(name, path)
        rows = hub_datasets.open_dataset(name, parts)
        return Source(name, False, lambda: _read_rows(name, rows, parts.column))
    if kind == "tfds":
        examples = _open_tfds(name, path, options["split"], options["data_dir"])
        return Source(name, False, lambda: _read_tfds(name, examples, options["field"]))
    if kind == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise missing_extra("pyarrow", "parquet", f"the source {name!r}")
    paths = _expand(name, path)
    if kind == "files":
        return Source(name, False, lambda: _read_files(paths))
    read = _read_jsonl if kind == "jsonl" else _read_parquet
    return Source(name, False, lambda: read(paths, options["field"]))


def documents(
    source: Source, counts: collections.Counter[str], *, max_bytes: float = math.inf
) -> Iterator[str]:
    """Yields the documents of a source until they hold `max_bytes` bytes; the last one may pass the limit.

    Args:
      source: The source.
      counts: Added to meanwhile; `SourceReport(source.name, **counts)` reports what was drawn so far.
      max_bytes: Limit, in bytes of UTF-8.

    Raises:
      UserError: The source has no document at all, or holds something malformed.
    """
    if max_bytes <= 0:
        return
    for item in source.read():
        document, size = _decode(item)
        if isinstance(document, Skip):
            counts[document.value] += 1
            continue
        counts["documents"] += 1
        counts["bytes"] += size
        yield document
        if counts["bytes"] >= max_bytes:
            return
    if not counts["documents"]:
        skipped = f" (what was skipped: {dict(counts)})" if counts else ""
        raise UserError(f"the source {source.name!r} has no documents{skipped}")


def remembered(source: Source) -> Source:
    """Returns the source with a memory: what was read once is not read again."""
    stream = source.read()

    def read() -> Iterator[str | bytes | Skip]:
        nonlocal stream
        stream, copy = itertools.tee(stream)
        return copy

    return dataclasses.replace(source, read=read)


def arrayrecord_folder(name: str) -> pathlib.Path | None:
    """Returns the folder of an `arrayrecord:DIR` source, None for other sources."""
    kind, path, _ = _kind_path_options(name)
    return pathlib.Path(path).expanduser() if kind == "arrayrecord" else None


def _split_mix(text: str) -> list[str]:
    """Cuts a mix at its `+`, leaving those inside paths."""
    starts_part = re.compile(rf"\s*(?:{_NUMBER}\s*\*|(?:{'|'.join(_OPTIONS)})(?=[:+\s]|$))")
    pieces = [""]
    for index, piece in enumerate(text.split("+")):
        # "1e+3*idioms" is one number.
        in_number = re.fullmatch(r"\s*[0-9.]+[eE]", pieces[-1]) is not None
        if index == 0:
            pieces = [piece]
        elif in_number or (":" in pieces[-1] and not starts_part.match(piece)):
            pieces[-1] += f"+{piece}"
        else:
            pieces.append(piece)
    return pieces


def _kind_path_options(name: str) -> tuple[str, str, dict[str, str]]:
    """Takes `jsonl:a.jsonl?field=code` apart, filling in default options."""
    kind, colon, path = name.partition(":")
    if kind not in _OPTIONS:
        raise UserError(f"unknown source {name!r}{closest(kind, _OPTIONS)}; sources are {_USAGE}")
    if kind in _WITHOUT_PATH:
        if colon:
            raise UserError(f"the source {kind!r} takes nothing after its name, got {name!r}")
        return kind, "", {}
    options = dict(_OPTIONS[kind])
    # Only `?word=` starts the options: a lone `?` is a glob's.
    if options and (match := re.search(r"\?(?=\w+=)", path)):
        given = dict(urllib.parse.parse_qsl(path[match.end() :], keep_blank_values=True))
        path = path[: match.start()]
        for option in sorted(given.keys() - options.keys()):
            near = closest(option, options)
            raise UserError(f"unknown option {option!r}{near} of {name!r}; options are {', '.join(options)}")
        options |= given
    if not path:
        raise UserError(f"the source {name!r} must be {kind}:{'NAME' if kind in ('tfds', 'hf') else 'PATH'}")
    return kind, path, options


def _decode(item: str | bytes | Skip) -> tuple[str | Skip, int]:
    """Returns a document and its size in bytes, or the reason to skip it."""
    if isinstance(item, Skip):
        return item, 0
    try:
        if isinstance(item, bytes):
            text, size = item.decode("utf-8"), len(item)
        else:
            text, size = item, len(item.encode("utf-8"))  # Fails on half a surrogate pair.
    except UnicodeError:
        return Skip.UNDECODABLE, 0
    return (text, size) if text.strip() else (Skip.EMPTY, 0)


def _expand(name: str, pattern: str) -> list[pathlib.Path]:
    """Returns the files of a path or glob in sorted order, at least one."""
    pattern = os.path.expanduser(pattern)
    # A name that exists is meant literally, even with `[` or `*` in it.
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    paths = [pathlib.Path(path) for path in found if not os.path.isdir(path)]
    if paths:
        return paths
    if os.path.isdir(pattern):
        hint = f"is a folder; name the files in it, e.g. {os.path.join(pattern, '**', '*.py')}"
        raise UserError(f"the source {name!r} {hint}")
    what = "matches no file" if glob.has_magic(pattern) else "does not exist"
    raise UserError(f"the source {name!r}: {os.path.abspath(pattern)} {what}")


def _stdlib_files() -> list[pathlib.Path]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in _STDLIB_SKIPPED]
        paths += [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths)


def _read_files(paths: list[pathlib.Path]) -> Iterator[bytes | Skip]:
    for file in paths:
        try:
            yield file.read_bytes()
        except OSError:
            yield Skip.UNREADABLE


def _read_jsonl(paths: list[pathlib.Path], field: str) -> Iterator[str | bytes | Skip]:
    for file in paths:
        try:
            lines = file.open("rb")
        except OSError:
            yield Skip.UNREADABLE
            continue
        with lines:
            for number, line in enumerate(lines, start=1):
                yield _jsonl_document(line, field, f"{file}:{number}")


def _jsonl_document(line: bytes, field: str, where: str) -> str | bytes | Skip:
    try:
        # A file may begin with a byte-order mark.
        text = line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        return Skip.UNDECODABLE
    if not text.strip():
        return Skip.EMPTY
    return _text(files.parse_json(text, where), field, where)


def _read_parquet(paths: list[pathlib.Path], field: str) -> Iterator[str | bytes | Skip]:
    import pyarrow
    import pyarrow.parquet

    for file in paths:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except OSError:
            yield Skip.UNREADABLE
            continue
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file} is not a Parquet file: {reason(error)}") from error
        with table:
            schema = table.schema_arrow
            if field not in schema.names:
                raise _wrong_field(field, schema.names, str(file))
            types = pyarrow.types
            column = schema.field(field).type
            column = column.value_type if types.is_dictionary(column) else column
            checks = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
            if not any(check(column) for check in checks):
                raise UserError(f"{file}: the field {field!r} must hold strings, got {column}")
            try:
                for batch in table.iter_batches(batch_size=256, columns=[field]):
                    # As bytes, so that a value that is not UTF-8 is ours to count.
                    for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        yield Skip.EMPTY if value is None else value
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{file} is damaged: {quoted(reason(error))}") from error


def _open_tfds(name: str, dataset: str, split: str, data_dir: str) -> Any:
    tfds = optional("tensorflow_datasets", "tfds", f"the source {name!r}")
    folder = os.path.expanduser(data_dir) if data_dir else None
    if folder and not os.path.isdir(folder):
        raise UserError(f"the source {name!r}: the folder {os.path.abspath(folder)} does not exist")
    try:
        return tfds.data_source(dataset, split=split, data_dir=folder)
    except Exception as error:  # TFDS raises many kinds, some with a page of advice.
        raise UserError(
            f"the source {name!r}: TFDS cannot open {dataset!r}, split {split!r}, as ArrayRecord: "
            f"{reason(error)}"
        ) from error


def _read_tfds(name: str, examples: Any, field: str) -> Iterator[str | bytes | Skip]:
    for index in range(len(examples)):
        yield _text(examples[index], field, f"the source {name!r}")


def _read_rows(name: str, rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[str | bytes | Skip]:
    for row in hub_datasets.read(name, rows):
        yield _text(row, column, f"the source {name!r}")


def _text(record: Mapping[str, Any], field: str, where: str) -> str | bytes | Skip:
    if field not in record:
        raise _wrong_field(field, record, where)
    value = record[field]
    if value is not None and not isinstance(value, str | bytes):
        raise UserError(f"{where}: the field {field!r} must be a string, got {type(value).__name__}")
    return Skip.EMPTY if value is None else value


def _wrong_field(field: str, fields: Any, where: str) -> UserError:
    names = [str(name) for name in fields]
    return UserError(f"{where}: no field {field!r}{closest(field, names)}; fields are {', '.join(names)}")

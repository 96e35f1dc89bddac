"""Folders of tokens: `tokenizer.json`, ArrayRecord shards and `manifest.json`; see `encode.write`.

The manifest is written last: a folder with one is complete. It holds the options it was made with, counts of
documents, bytes and tokens for each source and split, and for each shard its size, number of records and
sha256. The tokens of a source and split are a stream: its documents in order, each followed by end_of_text,
in the order of its shards. Sources of a mix keep their own shards, so that their weights hold when the
folder is read.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
from typing import Any, Literal, NamedTuple, Protocol

from array_record.python import array_record_data_source
import numpy as np

from wsparse import config as config_lib
from wsparse import files
from wsparse.data import sources
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError, located

log = logging.getLogger(__name__)

# In schema 1 every record of a stream but the last was full; now every record of a shard but its last is.
SCHEMA = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

_REMEDY = "copy it again, or prepare into an empty folder"

# ---- Streams ----


class TokenStream(Protocol):
    """Random access to one long sequence of token ids."""

    @property
    def digest(self) -> str:
        """Hex sha256 that changes with the tokens."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens [start, stop), int32; `0 <= start <= stop <= len`."""
        ...


# The streams of a mix, each with its weight in sampling; the weights sum to 1.
Components = Sequence[tuple[float, TokenStream]]


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryStream:
    """Tokens in memory, `(len,)` of the dtype that `token_dtype` gives."""

    tokens: np.ndarray

    @functools.cached_property
    def digest(self) -> str:
        content = np.ascontiguousarray(self.tokens, self.tokens.dtype.newbyteorder("<"))
        return hashlib.sha256(content.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop].astype(np.int32)


class _FileInstruction(NamedTuple):
    """A shard as `array_record` takes it to open it lazily."""

    filename: str
    examples_in_shard: int
    take: int
    skip: int = 0


class ArrayRecordStream:
    """Tokens in ArrayRecord files, read when asked for; threads may share it.

    Every record of a file but its last holds `tokens_per_record` little-endian tokens, so a window that is no
    longer than a record reads at most two records inside a file, and three where it crosses into the next.
    """

    def __init__(
        self, folder: pathlib.Path, shards: Sequence[ShardEntry], *, tokens_per_record: int, dtype: str
    ):
        """Describes the files; none is opened.

        Args:
          folder: Folder of the shards.
          shards: Entries of the manifest, in the order of the stream.
          tokens_per_record: Tokens in every record of a file but its last.
          dtype: "uint16" or "uint32".
        """
        instructions: list[Any] = [
            _FileInstruction(str(folder / shard.file), shard.records, shard.records) for shard in shards
        ]
        self._records = array_record_data_source.ArrayRecordDataSource(instructions)
        # The first token and the first record of each shard; the last entry is the number of all.
        self._tokens = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._first_records = np.cumsum([0, *(shard.records for shard in shards)])
        self._tokens_per_record = tokens_per_record
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self.digest = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._tokens[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        pieces = [np.empty(0, self._dtype)]
        while start < stop:
            shard = np.searchsorted(self._tokens, start, side="right") - 1
            record, skipped = divmod(start - self._tokens[shard], self._tokens_per_record)
            content = self._records[int(self._first_records[shard] + record)]
            pieces.append(np.frombuffer(content, self._dtype)[skipped : skipped + stop - start])
            start += len(pieces[-1])
        return np.concatenate(pieces).astype(np.int32)


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest dtype that streams use for ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


# ---- Folders ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard file as the manifest has it.

    Attributes:
      file: Name inside the folder.
      component: Index into `Manifest.components`.
      records: Number of records, possibly 0.
      bytes: Size of the file.
      sha256: Hex digest of the file.
    """

    file: str
    component: int
    split: Split
    records: int
    tokens: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """One source of the mix, with the counts of its `sources.SourceReport`.

    Attributes:
      weight: Weight in sampling.
      train_documents, validation_documents: Documents on each side of the split.
      train_tokens, validation_tokens: Tokens on each side, one end_of_text per document included.
    """

    source: str
    weight: float
    documents: int
    bytes: int
    train_documents: int
    validation_documents: int
    train_tokens: int
    validation_tokens: int
    skipped_undecodable: int
    skipped_unreadable: int
    skipped_empty: int

    @property
    def report(self) -> sources.SourceReport:
        names = [field.name for field in dataclasses.fields(sources.SourceReport)]
        return sources.SourceReport(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything in `manifest.json`.

    Attributes:
      schema: Version of this layout.
      options: Options of `encode.write` that decide the content.
      tokenizer_sha256: `Tokenizer.digest`.
      dtype: Type of the tokens in the records, little-endian.
      tokens_per_record: Tokens in every record of a shard but its last.
      components: Sources of the mix.
      shards: All files, sorted by component, then split, then order in the stream.
    """

    schema: int
    options: dict[str, Any]
    vocab_size: int
    tokenizer_sha256: str
    dtype: str
    tokens_per_record: int
    components: tuple[Component, ...]
    shards: tuple[ShardEntry, ...]


@dataclasses.dataclass(frozen=True)
class TokenFolder:
    """An opened folder: its manifest, its tokenizer, and the streams of its components; no token was read."""

    manifest: Manifest
    tokenizer: tokenizer_lib.Tokenizer
    train: Components
    validation: Components


def _read_manifest(folder: pathlib.Path) -> Manifest:
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder.absolute()}: python -m wsparse.data.prepare --out={folder} makes it"
        )
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"prepare has not finished in {folder}: run the same command again")
    values = files.read_json(path)
    schema = values.get("schema")
    if schema not in (1, SCHEMA):
        raise UserError(
            f"{path} has schema {schema!r}, this version reads 1 to {SCHEMA}: prepare the data again"
        )
    with located(f"{path} is malformed: "):
        return config_lib.from_dict(Manifest, values)


def open_folder(folder: str | os.PathLike[str]) -> TokenFolder:
    """Opens a folder, checking that every shard is there with its size (see `verify`).

    Raises:
      UserError: The folder is unfinished, a shard is missing or has another size, or the tokenizer is not
        the one that the tokens were made with.
    """
    folder = pathlib.Path(folder)
    manifest = _read_manifest(folder)
    for shard in manifest.shards:
        path = folder / shard.file
        if not path.exists():
            raise UserError(f"{path} is missing: {_REMEDY}")
        if path.stat().st_size != shard.bytes:
            raise UserError(f"{path} must have {shard.bytes} bytes, has {path.stat().st_size}: {_REMEDY}")
    tokenizer = tokenizer_lib.load(folder / TOKENIZER)
    if tokenizer.digest != manifest.tokenizer_sha256:
        raise UserError(f"{folder / TOKENIZER} is not the tokenizer that the tokens beside it were made with")

    def stream(index: int, split: Split) -> ArrayRecordStream:
        return ArrayRecordStream(
            folder,
            [shard for shard in manifest.shards if (shard.component, shard.split) == (index, split)],
            tokens_per_record=manifest.tokens_per_record,
            dtype=manifest.dtype,
        )

    train, validation = (
        [(component.weight, stream(index, split)) for index, component in enumerate(manifest.components)]
        for split in SPLITS
    )
    return TokenFolder(manifest, tokenizer, train, validation)


def verify(folder: str | os.PathLike[str]) -> Manifest:
    """Opens a folder, reads every shard and compares its sha256.

    Raises:
      UserError: As `open_folder`, or the content of a shard is not what was written.
    """
    folder = pathlib.Path(folder)
    manifest = open_folder(folder).manifest
    for shard in manifest.shards:
        log.info("checking %s", shard.file)
        if files.sha256(folder / shard.file) != shard.sha256:
            raise UserError(f"{folder / shard.file} is damaged (sha256 differs from the manifest): {_REMEDY}")
    return manifest

"""The folder that `prepare` writes: `tokenizer.json`, ArrayRecord shards and `manifest.json`.

The manifest is written last: a folder with one is complete. It holds the options it was made with,
counts of documents, bytes and tokens for each source and split, and for each shard its size, number
of records and sha256. Token order is shard order within a source and split; sources of a mix keep
their own shards, so that their weights hold when the folder is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any, Literal

from wsparse import config as config_lib
from wsparse import files
from wsparse.data import sources, streams
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError

SCHEMA = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard file as the manifest has it.

    Attributes:
      file: name inside the folder.
      component: index into `Manifest.components`.
      split: "train" or "validation".
      records: number of records, possibly 0.
      tokens: number of tokens.
      bytes: size of the file.
      sha256: hex digest of the file.
    """

    file: str
    component: int
    split: Literal["train", "validation"]
    records: int
    tokens: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """One source of the mix.

    Attributes:
      source: its name.
      weight: its share in sampling; the weights sum to 1.
      documents, bytes: what was taken, in all.
      train_documents, validation_documents: documents on each side of the split.
      train_tokens, validation_tokens: tokens on each side, one end_of_text per document included.
      skipped_undecodable, skipped_unreadable, skipped_empty: as in `sources.SourceReport`.
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

    def tokens(self, split: str) -> int:
        return self.train_tokens if split == "train" else self.validation_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything in `manifest.json`.

    Attributes:
      schema: version of this layout.
      options: the options of `prepare` that decide the content.
      vocab_size: size of the tokenizer.
      tokenizer_sha256: `Tokenizer.digest`.
      dtype: of the tokens in the records, little-endian.
      tokens_per_record: tokens in every record but the last of each stream.
      components: the sources of the mix.
      shards: all files, sorted by component, then split, then order in the stream.
    """

    schema: int
    options: dict[str, Any]
    vocab_size: int
    tokenizer_sha256: str
    dtype: str
    tokens_per_record: int
    components: tuple[Component, ...]
    shards: tuple[ShardEntry, ...]

    @property
    def digest(self) -> str:
        """Hex sha256 over the tokenizer, the weights and the content of every shard."""
        weights = [component.weight for component in self.components]
        shards = [(shard.component, shard.split, shard.sha256) for shard in self.shards]
        content = json.dumps([self.tokenizer_sha256, weights, shards])
        return hashlib.sha256(content.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An opened folder; no token has been read.

    Attributes:
      manifest: as on disk.
      tokenizer: the folder's own.
      train: for each component, its weight and training tokens.
      validation: the same for held-out tokens.
    """

    manifest: Manifest
    tokenizer: tokenizer_lib.Tokenizer
    train: list[tuple[float, streams.TokenStream]]
    validation: list[tuple[float, streams.TokenStream]]


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a finished folder.

    Raises:
      UserError: no folder, no manifest in it, or one of another schema.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder.absolute()}: python -m wsparse.data.prepare --out={folder} makes it"
        )
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"prepare has not finished in {folder}: run the same command again")
    values = files.read_json(path)
    schema = values.get("schema")
    if schema != SCHEMA:
        raise UserError(
            f"{path} has schema {schema!r}, this version reads {SCHEMA}: prepare the data again"
        )
    return manifest_from_json(values)


def open_folder(folder: str | os.PathLike[str]) -> Prepared:
    """Open what `prepare` wrote, checking that every shard is there with its size (see `verify`).

    Raises:
      UserError: the folder is unfinished, a shard is missing or has another size, or the tokenizer
        is not the one that the tokens were made with.
    """
    folder = pathlib.Path(folder)
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        path = folder / shard.file
        if not path.exists():
            raise UserError(f"{path} is missing: copy it again, or prepare into an empty folder")
        if path.stat().st_size != shard.bytes:
            raise UserError(
                f"{path} must have {shard.bytes} bytes, has {path.stat().st_size}: copy it again, "
                "or prepare into an empty folder"
            )
    tokenizer = tokenizer_lib.load(folder / TOKENIZER)
    if tokenizer.digest != manifest.tokenizer_sha256:
        raise UserError(
            f"{folder / TOKENIZER} is not the tokenizer that the tokens beside it were made with"
        )
    opened: dict[str, list[tuple[float, streams.TokenStream]]] = {
        split: [
            (component.weight, _stream(folder, manifest, index, split))
            for index, component in enumerate(manifest.components)
        ]
        for split in SPLITS
    }
    return Prepared(manifest, tokenizer, opened["train"], opened["validation"])


def verify(
    folder: str | os.PathLike[str], *, progress: Callable[[str], None] | None = None
) -> Manifest:
    """`open_folder`, then read every shard and compare its sha256.

    Raises:
      UserError: as `open_folder`, or the content of a shard is not what was written.
    """
    folder = pathlib.Path(folder)
    manifest = open_folder(folder).manifest
    for shard in manifest.shards:
        if progress:
            progress(f"checking {shard.file}")
        if file_sha256(folder / shard.file) != shard.sha256:
            raise UserError(
                f"{folder / shard.file} is damaged (sha256 differs from the manifest): copy it "
                "again, or prepare into an empty folder"
            )
    return manifest


def manifest_from_json(values: Mapping[str, Any]) -> Manifest:
    """A manifest from parsed JSON; `dataclasses.asdict` is the way back."""
    plain = {key: value for key, value in values.items() if key not in ("components", "shards")}
    try:
        return Manifest(
            **plain,
            components=tuple(
                config_lib.from_dict(Component, each) for each in values["components"]
            ),
            shards=tuple(config_lib.from_dict(ShardEntry, each) for each in values["shards"]),
        )
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{MANIFEST} is malformed: {error}") from error


def write_json(path: pathlib.Path, values: Any) -> None:
    """Write JSON so that `path` is either as before or complete, even after a power cut."""
    part = path.with_name(f"{path.name}.tmp")
    with part.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.write("\n")
    publish(part, path)


def publish(part: pathlib.Path, path: pathlib.Path) -> None:
    """Give a finished temporary file its name, after its content has reached the disk."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def file_sha256(path: pathlib.Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stream(
    folder: pathlib.Path, manifest: Manifest, component: int, split: str
) -> streams.ArrayRecordStream:
    entries = [s for s in manifest.shards if s.component == component and s.split == split]
    digest = hashlib.sha256("".join(entry.sha256 for entry in entries).encode()).hexdigest()
    return streams.ArrayRecordStream(
        [streams.Shard(str(folder / entry.file), entry.records) for entry in entries],
        tokens=sum(entry.tokens for entry in entries),
        tokens_per_record=manifest.tokens_per_record,
        dtype=manifest.dtype,
        digest=digest,
    )

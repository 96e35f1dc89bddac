"""Write a folder of tokens (`wsparse.data.tokens`) from sources of documents.

Two passes over the documents, neither of which keeps them: the first counts, decides the split and draws the
text that the tokenizer learns from; the second encodes block by block, one training and one held-out shard
each. It may be interrupted at any moment; the same call continues after the last finished block and gives
the same bytes as an uninterrupted one. A file gets its name only when it is complete, the manifest last.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import itertools
import logging
import math
import pathlib
import shutil

from array_record.python import array_record_module
import numpy as np

from wsparse import config as config_lib
from wsparse import files, locks
from wsparse.config import setting
from wsparse.data import sources, split, tokens
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError

log = logging.getLogger(__name__)

# What an unfinished folder keeps to continue from; removed when the manifest is there.
_PROGRESS = "progress"

# Characters handed to the encoder at once: enough for all cores, little to keep in memory.
_ENCODE_CHARACTERS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options that decide the content of the folder."""

    source: str = setting(dataclasses.MISSING, "A source or mix, e.g. 'files:/data/**/*.py'.")
    vocab_size: int | None = setting(None, "Tokens of the tokenizer that is trained; by default 2048.")
    tokenizer: str = setting("", "A tokenizer.json to use instead of training one.")
    megabytes: float | None = setting(
        None,
        "Text to take, in units of 10^6 bytes, divided by weight; by default all.",
        "positive and finite",
    )
    validation_fraction: float = setting(
        0.02, "Fraction of documents held out, by the hash of their content.", "in (0, 1)"
    )
    shard_megabytes: float = setting(
        64.0, "Text behind one shard, in units of 10^6 bytes.", "positive and finite"
    )
    tokens_per_record: int = setting(
        4096,
        "Tokens in a record; at least the context of the models to be trained, so that a window reads few "
        "records.",
        "at least 1",
    )
    seed: int = setting(0, "Seed of generated documents.", "at least 0")

    def __post_init__(self):
        config_lib.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Block:
    """Consecutive documents of one source, which make one pair of shards."""

    component: int
    documents: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The result of the first pass."""

    schema: int
    tokenizer_sha256: str
    reports: tuple[sources.SourceReport, ...]
    held_out: tuple[str, ...]
    blocks: tuple[_Block, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Encoded:
    """A finished block: its training and held-out shard, and the documents on each side."""

    shards: tuple[tokens.ShardEntry, ...]
    documents: tuple[int, ...]


def write(
    options: Options,
    out: pathlib.Path,
    *,
    mix: Sequence[sources.Term] | None = None,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
    in_memory: bool = False,
) -> tokens.Manifest:
    """Writes, continues or just reads the folder `out`.

    Args:
      options: Content of the folder.
      out: The folder, made if missing.
      mix: Part of a larger mix, with its weights there, that the folder holds; by default `options.source`.
      tokenizer: Tokenizer to use; by default the one that `options` name, or a new one.
      in_memory: Whether to keep the documents between the two passes, rather than to read them twice.

    Returns:
      The manifest of the finished folder.

    Raises:
      UserError: A bad source or tokenizer, a folder made with other options or holding other files,
        documents that changed since an interrupted run, or another process at work in the folder.
    """
    mix = sources.parse_mix(options.source) if mix is None else mix
    if tokenizer is None and options.tokenizer:
        tokenizer = tokenizer_lib.load(pathlib.Path(options.tokenizer).expanduser())
    vocab_size = _vocab_size(options, tokenizer)
    # The path of a tokenizer may change, its content may not.
    identity = dataclasses.asdict(options) | {
        "vocab_size": vocab_size,
        "tokenizer": tokenizer.digest if tokenizer else "",
    }
    if (out / tokens.MANIFEST).exists():
        manifest = tokens.open_folder(out).manifest
        _require_same_options(manifest.options, identity, out)
        shutil.rmtree(out / _PROGRESS, ignore_errors=True)
        log.info("%s is already finished: nothing to do", out)
        return manifest
    opened = [sources.open_source(term.name, seed=options.seed) for term in mix]
    for source in opened:
        if source.endless and options.megabytes is None:
            raise UserError(f"the source {source.name!r} never ends: say how much with --megabytes")
    if in_memory:
        opened = [sources.remembered(source) for source in opened]
    limit = math.inf if options.megabytes is None else options.megabytes * 1e6
    limits = [limit * term.weight for term in mix]
    state = out / _PROGRESS
    files.make_folder(out)
    others = [] if state.exists() else [path.name for path in out.iterdir()]
    if others:
        raise UserError(f"{out} must be empty or from an earlier run, has {min(others)!r}")
    files.make_folder(state)
    with locks.hold(state, "preparing tokens", name="lock"):
        plan = _read_plan(state / "plan.json", identity, out)
        if plan is None:
            plan = _plan(options, opened, limits, out, vocab_size, tokenizer)
            values = {"options": identity, "plan": dataclasses.asdict(plan)}
            files.write_json(state / "plan.json", values, durable=True)
        encoded = _encode_blocks(options, opened, limits, out, plan)
        manifest = _manifest(identity, vocab_size, mix, plan, encoded)
        values, part = dataclasses.asdict(manifest), state / "manifest.part"
        files.write_json(out / tokens.MANIFEST, values, durable=True, part=part)
        shutil.rmtree(state)
    return manifest


def encode(documents: Sequence[str], tokenizer: tokenizer_lib.Tokenizer) -> np.ndarray:
    """Returns `(n,)` tokens of documents, each followed by end_of_text, of the dtype `tokens.token_dtype`."""
    encoded = ([*ids, tokenizer.end_of_text] for ids in tokenizer.encode_batch(documents))
    return np.fromiter(itertools.chain.from_iterable(encoded), tokens.token_dtype(tokenizer.vocab_size))


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yields documents in lists of limited size."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _vocab_size(options: Options, tokenizer: tokenizer_lib.Tokenizer | None) -> int:
    if tokenizer is None:
        return 2048 if options.vocab_size is None else options.vocab_size
    if options.vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"{options.tokenizer or 'the tokenizer'} has {tokenizer.vocab_size} tokens, but vocab_size="
            f"{options.vocab_size}: leave vocab_size out"
        )
    return tokenizer.vocab_size


def _require_same_options(old: dict, new: dict, out: pathlib.Path) -> None:
    changed = config_lib.differences(old, new)
    if changed:
        raise UserError(
            f"{out} was begun with other options ({'; '.join(changed)}): use those or another --out"
        )


# ---- First pass ----


def _read_plan(path: pathlib.Path, identity: dict, out: pathlib.Path) -> _Plan | None:
    if not path.exists():
        return None
    values = files.read_json(path)
    try:
        _require_same_options(values["options"], identity, out)
        if values["plan"].get("schema") == tokens.SCHEMA:
            return config_lib.from_dict(_Plan, values["plan"])
    except (KeyError, AttributeError):
        pass
    raise UserError(f"{out} was begun by another version of prepare: use an empty --out")


def _plan(
    options: Options,
    opened: Sequence[sources.Source],
    limits: Sequence[float],
    out: pathlib.Path,
    vocab_size: int,
    tokenizer: tokenizer_lib.Tokenizer | None,
) -> _Plan:
    """Writes `tokenizer.json` and returns how the second pass is to go."""
    counts: list[collections.Counter[str]] = [collections.Counter() for _ in opened]
    blocks: list[_Block] = []

    def components() -> Iterator[tuple[str, Iterable[str]]]:
        for i, source in enumerate(opened):
            log.info("reading %s", source.name)
            documents = sources.documents(source, counts[i], max_bytes=limits[i])
            yield source.name, _cut(documents, i, options.shard_megabytes * 1e6, blocks)

    scan = split.scan(components(), validation_fraction=options.validation_fraction)
    if tokenizer is None:
        log.info("training a tokenizer of %d tokens", vocab_size)
        tokenizer = tokenizer_lib.train(scan.sample, vocab_size)
    temporary = out / _PROGRESS / "tokenizer.part"
    files.write_text(out / tokens.TOKENIZER, tokenizer.to_json(), durable=True, part=temporary)
    return _Plan(
        schema=tokens.SCHEMA,
        tokenizer_sha256=tokenizer.digest,
        reports=tuple(
            sources.SourceReport(source.name, **count) for source, count in zip(opened, counts, strict=True)
        ),
        held_out=tuple(sorted(digest.hex() for digest in scan.holdout.extra)),
        blocks=tuple(blocks),
    )


def _cut(documents: Iterable[str], component: int, block_bytes: float, blocks: list[_Block]) -> Iterator[str]:
    """Passes documents on and appends to `blocks` where they are to be cut."""
    documents = iter(documents)
    while (first := next(documents, None)) is not None:
        number, size, digest = 0, 0, hashlib.sha256()
        for text in itertools.chain([first], documents):
            yield text
            number += 1
            size += len(text.encode("utf-8"))
            digest.update(split.text_digest(text))
            if size >= block_bytes:
                break
        blocks.append(_Block(component=component, documents=number, bytes=size, sha256=digest.hexdigest()))


# ---- Second pass ----


def _encode_blocks(
    options: Options,
    opened: Sequence[sources.Source],
    limits: Sequence[float],
    out: pathlib.Path,
    plan: _Plan,
) -> list[_Encoded]:
    """Writes the shards of every block that does not have them yet."""
    tokenizer = tokenizer_lib.load(out / tokens.TOKENIZER)
    if tokenizer.digest != plan.tokenizer_sha256:
        raise UserError(f"{out / tokens.TOKENIZER} changed since prepare began: use an empty --out")
    holdout = split.Holdout(
        options.validation_fraction, frozenset(bytes.fromhex(digest) for digest in plan.held_out)
    )
    streams = [
        sources.documents(source, collections.Counter(), max_bytes=limit)
        for source, limit in zip(opened, limits, strict=True)
    ]
    encoded: list[_Encoded] = []
    for index, block in enumerate(plan.blocks):
        name = opened[block.component].name
        texts = _checked(itertools.islice(streams[block.component], block.documents), block, name, out)
        path = out / _PROGRESS / f"block-{index:05d}.json"
        if path.exists():
            collections.deque(texts, maxlen=0)  # To the next block, checking on the way.
            encoded.append(config_lib.from_dict(_Encoded, files.read_json(path)))
            continue
        log.info("encoding shard %d of %d, from %s", index + 1, len(plan.blocks), name)
        suffix = f"{index:05d}-of-{len(plan.blocks):05d}.array_record"
        result = _encode_block(texts, out, suffix, block.component, options, holdout, tokenizer)
        files.write_json(path, dataclasses.asdict(result), durable=True)
        encoded.append(result)
    return encoded


def _checked(documents: Iterable[str], block: _Block, name: str, out: pathlib.Path) -> Iterator[str]:
    """Passes documents on; at the end they must have been those that were planned."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(split.text_digest(text))
        yield text
    if digest.hexdigest() != block.sha256:
        raise UserError(f"the documents of {name!r} changed since prepare began in {out}: use an empty --out")


def _encode_block(
    documents: Iterable[str],
    out: pathlib.Path,
    suffix: str,
    component: int,
    options: Options,
    holdout: split.Holdout,
    tokenizer: tokenizer_lib.Tokenizer,
) -> _Encoded:
    """Writes the two shards of a block, `train-SUFFIX` and `validation-SUFFIX`."""
    ids: tuple[list[np.ndarray], ...] = ([], [])
    counts = [0, 0]
    for batch in _batched(documents):
        for side, texts in enumerate(split.split(batch, holdout)):
            counts[side] += len(texts)
            ids[side].append(encode(texts, tokenizer))
    shards = []
    for side, pieces in zip(tokens.SPLITS, ids, strict=True):
        name, part, content = f"{side}-{suffix}", out / _PROGRESS / f"{side}.part", np.concatenate(pieces)
        with files.replacing(out / name, durable=True, part=part):
            records = _write_records(part, content, options.tokens_per_record)
            entry = tokens.ShardEntry(
                file=name,
                component=component,
                split=side,
                records=records,
                tokens=len(content),
                bytes=part.stat().st_size,
                sha256=files.sha256(part),
            )
        shards.append(entry)
    return _Encoded(shards=tuple(shards), documents=tuple(counts))


def _write_records(path: pathlib.Path, ids: np.ndarray, tokens_per_record: int) -> int:
    """Writes tokens in records of equal length but for the last, and returns the number of records."""
    ids = ids.astype(ids.dtype.newbyteorder("<"), copy=False)
    starts = range(0, len(ids), tokens_per_record)
    try:
        # One record a group: each can be read without its neighbors.
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        with contextlib.closing(writer):
            for start in starts:
                writer.write(ids[start : start + tokens_per_record].tobytes())
    except Exception as error:  # The library raises errors of its own for a disk that is full.
        raise files.cannot_write(path, error) from error
    return len(starts)


def _manifest(
    options: dict, vocab_size: int, mix: Sequence[sources.Term], plan: _Plan, encoded: Sequence[_Encoded]
) -> tokens.Manifest:
    components = []
    for i, (term, report) in enumerate(zip(mix, plan.reports, strict=True)):
        blocks = [block for block in encoded if block.shards[0].component == i]
        counts = {}
        for number, side in enumerate(tokens.SPLITS):
            counts[f"{side}_documents"] = sum(block.documents[number] for block in blocks)
            counts[f"{side}_tokens"] = sum(block.shards[number].tokens for block in blocks)
        components.append(tokens.Component(**dataclasses.asdict(report), weight=term.weight, **counts))
    shards = [shard for block in encoded for shard in block.shards]
    return tokens.Manifest(
        schema=tokens.SCHEMA,
        options=options,
        vocab_size=vocab_size,
        tokenizer_sha256=plan.tokenizer_sha256,
        dtype=str(tokens.token_dtype(vocab_size)),
        tokens_per_record=int(options["tokens_per_record"]),
        components=tuple(components),
        shards=tuple(sorted(shards, key=lambda shard: (shard.component, shard.split, shard.file))),
    )

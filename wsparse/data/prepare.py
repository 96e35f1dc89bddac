"""Turn sources into a folder of token shards, so that a large corpus is tokenized only once.

    python -m wsparse.data.prepare --source='files:/data/**/*.py' --out=prepared [--vocab_size=2048]
    python -m wsparse.train --config.data.source=arrayrecord:prepared ...

Two passes over the documents, neither of which keeps them: the first counts, decides the split and
draws the text that the tokenizer learns from; the second encodes block by block, one training and
one held-out shard each. It may be interrupted at any moment; the same command continues after the
last finished block and gives the same bytes as an uninterrupted run. Each file gets its name only
when it is complete, the manifest last. A finished folder is left as it is.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import math
import pathlib
import shutil
import signal
import sys
from typing import Any

from absl import flags
from array_record.python import array_record_module
import numpy as np

from wsparse import config as config_lib
from wsparse import files
from wsparse.command import run_command
from wsparse.data import corpus, prepared, sources, streams
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError

# What an unfinished folder keeps to continue from; removed when the manifest is there.
_PROGRESS = "progress"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the content of the folder.

    Attributes:
      source: a source or mix (`wsparse.data.sources`).
      vocab_size: size of the tokenizer, None for 2048 or whatever `tokenizer` has.
      tokenizer: path of a `tokenizer.json` to use instead of training one; "" trains.
      megabytes: text to take, shared between the sources by weight; None takes all there is.
      validation_fraction: share of documents held out, by the hash of their content.
      shard_megabytes: text behind one shard, in units of 10^6 bytes.
      tokens_per_record: tokens in a record; at least the context of the models to be trained, so
        that a window reads at most two records.
      seed: of generated documents.
    """

    source: str
    vocab_size: int | None = None
    tokenizer: str = ""
    megabytes: float | None = None
    validation_fraction: float = 0.02
    shard_megabytes: float = 64.0
    tokens_per_record: int = 4096
    seed: int = 0

    def __post_init__(self):
        for name in ("megabytes", "shard_megabytes", "tokens_per_record"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} must be positive, got {value}")
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction must be in (0, 1), got {self.validation_fraction}"
            )
        if self.seed < 0:
            raise UserError(f"seed must not be negative, got {self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Block:
    """A run of consecutive documents of one source: what one pair of shards is made from."""

    component: int
    documents: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What the first pass found."""

    tokenizer_sha256: str
    reports: tuple[sources.SourceReport, ...]
    held_out: tuple[str, ...]
    blocks: tuple[_Block, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Done:
    """A finished block: its shards, and what is left for the next block of the same source.

    Attributes:
      shards: the training and the held-out shard.
      documents: documents on each side.
      carry: tokens of each side that did not fill a record; empty after the source's last block.
    """

    shards: tuple[prepared.ShardEntry, ...]
    documents: tuple[int, ...]
    carry: tuple[tuple[int, ...], ...]


def prepare(
    options: Options,
    out: pathlib.Path,
    *,
    progress: Callable[[str], None] | None = None,
) -> prepared.Manifest:
    """Write, continue or just read the folder `out`.

    Args:
      options: what to put in it.
      out: the folder; made if missing.
      progress: is given a line at each stage.

    Returns:
      The manifest of the finished folder.

    Raises:
      UserError: a bad source or tokenizer, a folder made with other options or holding other files,
        documents that changed since an interrupted run, or another process at work in the folder.
    """
    say = progress or (lambda line: None)
    mix = sources.parse_mix(options.source)
    given = (
        tokenizer_lib.load(pathlib.Path(options.tokenizer).expanduser())
        if options.tokenizer
        else None
    )
    vocab_size = _vocab_size(options, given)
    # The path of a tokenizer may change, its content may not.
    wanted = dataclasses.asdict(options) | {
        "vocab_size": vocab_size,
        "tokenizer": given.digest if given else "",
    }
    state = out / _PROGRESS
    if (out / prepared.MANIFEST).exists():
        manifest = prepared.read_manifest(out)
        _require_same_options(manifest.options, wanted, out)
        prepared.open_folder(out)
        shutil.rmtree(state, ignore_errors=True)
        say(f"{out} is already finished: nothing to do")
        return manifest
    opened = [sources.open_source(part.name, seed=options.seed) for part in mix]
    for source in opened:
        if source.endless and options.megabytes is None:
            raise UserError(f"the source {source.name!r} never ends: say how much with --megabytes")
    _make_folder(out)
    with _locked(state / "lock", out):
        limits = [_share(options, part) for part in mix]
        path = state / "plan.json"
        if path.exists():
            values = files.read_json(path)
            _require_same_options(values["options"], wanted, out)
            plan = config_lib.from_dict(_Plan, values["plan"])
        else:
            plan = _plan(options, opened, limits, out, vocab_size, given, say)
            prepared.write_json(path, {"options": wanted, "plan": dataclasses.asdict(plan)})
        done = _encode_blocks(options, opened, limits, out, plan, say)
        manifest = _manifest(wanted, vocab_size, mix, plan, done)
        prepared.write_json(out / prepared.MANIFEST, dataclasses.asdict(manifest))
        shutil.rmtree(state)
    return manifest


def _vocab_size(options: Options, given: tokenizer_lib.Tokenizer | None) -> int:
    if given is None:
        return 2048 if options.vocab_size is None else options.vocab_size
    if options.vocab_size not in (None, given.vocab_size):
        raise UserError(
            f"{options.tokenizer} has {given.vocab_size} tokens, but vocab_size="
            f"{options.vocab_size}: leave vocab_size out"
        )
    return given.vocab_size


def _require_same_options(old: dict, new: dict, out: pathlib.Path) -> None:
    changed = config_lib.differences(old, new)
    if changed:
        raise UserError(
            f"{out} was begun with other options ({'; '.join(changed)}): use those or another --out"
        )


def _make_folder(out: pathlib.Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = [path.name for path in out.iterdir()] if not (out / _PROGRESS).exists() else []
        if foreign:
            raise UserError(
                f"{out} must be empty or from an earlier run, has {sorted(foreign)[0]!r}"
            )
        (out / _PROGRESS).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error


@contextlib.contextmanager
def _locked(path: pathlib.Path, out: pathlib.Path) -> Iterator[None]:
    """Keep a second process out; the system lets go of the lock when this one dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is preparing {out}: wait for it") from error
        yield


def _share(options: Options, part: sources.Part) -> float:
    return math.inf if options.megabytes is None else options.megabytes * 1e6 * part.weight


def _plan(
    options: Options,
    opened: Sequence[sources.Source],
    limits: Sequence[float],
    out: pathlib.Path,
    vocab_size: int,
    given: tokenizer_lib.Tokenizer | None,
    say: Callable[[str], None],
) -> _Plan:
    """The first pass: writes `tokenizer.json` and says how the second is to go."""
    counts = [collections.Counter() for _ in opened]
    blocks: list[_Block] = []

    def components() -> Iterator[tuple[str, Iterable[str]]]:
        for i, source in enumerate(opened):
            say(f"reading {source.name}")
            documents = sources.documents(source, counts[i], max_bytes=limits[i])
            yield source.name, _cut(documents, i, options.shard_megabytes * 1e6, blocks)

    found = corpus.scan(components(), validation_fraction=options.validation_fraction)
    if given is None:
        say(f"training a tokenizer of {vocab_size} tokens")
    tokenizer = given or tokenizer_lib.train(found.sample, vocab_size)
    part = out / _PROGRESS / "tokenizer.part"
    part.write_text(tokenizer.to_json(), encoding="utf-8")
    prepared.publish(part, out / prepared.TOKENIZER)
    return _Plan(
        tokenizer_sha256=tokenizer.digest,
        reports=tuple(
            sources.SourceReport(source.name, **count)
            for source, count in zip(opened, counts, strict=True)
        ),
        held_out=tuple(sorted(digest.hex() for digest in found.holdout.extra)),
        blocks=tuple(blocks),
    )


def _cut(
    documents: Iterable[str], component: int, block_bytes: float, blocks: list[_Block]
) -> Iterator[str]:
    """Pass documents on and append to `blocks` where they are to be cut."""
    number, size, digest = 0, 0, hashlib.sha256()

    def block() -> _Block:
        return _Block(component=component, documents=number, bytes=size, sha256=digest.hexdigest())

    for text in documents:
        yield text
        number += 1
        size += len(text.encode("utf-8"))
        digest.update(corpus.text_digest(text))
        if size >= block_bytes:
            blocks.append(block())
            number, size, digest = 0, 0, hashlib.sha256()
    if number:
        blocks.append(block())


def _encode_blocks(
    options: Options,
    opened: Sequence[sources.Source],
    limits: Sequence[float],
    out: pathlib.Path,
    plan: _Plan,
    say: Callable[[str], None],
) -> list[_Done]:
    """The second pass: the shards of every block that has none yet."""
    tokenizer = tokenizer_lib.load(out / prepared.TOKENIZER)
    if tokenizer.digest != plan.tokenizer_sha256:
        raise UserError(
            f"{out / prepared.TOKENIZER} changed since prepare began: use an empty --out"
        )
    holdout = corpus.Holdout(
        options.validation_fraction, frozenset(bytes.fromhex(digest) for digest in plan.held_out)
    )
    done: list[_Done] = []
    for component, blocks in itertools.groupby(
        enumerate(plan.blocks), key=lambda numbered: numbered[1].component
    ):
        source = opened[component]
        documents = sources.documents(source, collections.Counter(), max_bytes=limits[component])
        carry: tuple[tuple[int, ...], ...] = ((), ())
        blocks = list(blocks)
        for index, block in blocks:
            texts = _checked(itertools.islice(documents, block.documents), block, source.name, out)
            path = out / _PROGRESS / f"block-{index:05d}.json"
            if path.exists():
                collections.deque(texts, maxlen=0)  # To the next block, checking on the way.
                result = config_lib.from_dict(_Done, files.read_json(path))
            else:
                say(f"encoding shard {index + 1} of {len(plan.blocks)}, from {source.name}")
                result = _encode_block(
                    texts,
                    carry,
                    out,
                    number=(index, len(plan.blocks)),
                    component=component,
                    is_last=index == blocks[-1][0],
                    tokens_per_record=options.tokens_per_record,
                    holdout=holdout,
                    tokenizer=tokenizer,
                )
                prepared.write_json(path, dataclasses.asdict(result))
            carry = result.carry
            done.append(result)
    return done


def _checked(
    documents: Iterable[str], block: _Block, name: str, out: pathlib.Path
) -> Iterator[str]:
    """Pass documents on; at the end they must have been those that were planned."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(corpus.text_digest(text))
        yield text
    if digest.hexdigest() != block.sha256:
        raise UserError(
            f"the documents of {name!r} changed since prepare began in {out}: use an empty --out"
        )


def _encode_block(
    documents: Iterable[str],
    carry: tuple[tuple[int, ...], ...],
    out: pathlib.Path,
    *,
    number: tuple[int, int],
    component: int,
    is_last: bool,
    tokens_per_record: int,
    holdout: corpus.Holdout,
    tokenizer: tokenizer_lib.Tokenizer,
) -> _Done:
    """Write the two shards of a block, first under other names, then under theirs.

    Args:
      documents: the block's.
      carry: tokens of each side that the block before left over.
      out: the folder.
      number: index of the block, and how many there are.
      component: index of the source.
      is_last: no block of the source follows, so the last record may be short.
      tokens_per_record: tokens in every other record.
      holdout: the split.
      tokenizer: of the folder.
    """
    parts = [out / _PROGRESS / f"{split}.part" for split in prepared.SPLITS]
    dtype = streams.token_dtype(tokenizer.vocab_size)
    counts = [0, 0]
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                contextlib.closing(_RecordWriter(part, tokens_per_record, dtype, left))
            )
            for part, left in zip(parts, carry, strict=True)
        ]
        for batch in corpus.batched(documents):
            for side, texts in enumerate(corpus.split(batch, holdout)):
                counts[side] += len(texts)
                for tokens in corpus.encode(texts, tokenizer):
                    writers[side].write(tokens)
        if is_last:
            for writer in writers:
                writer.flush()
    shards = []
    for split, part, writer in zip(prepared.SPLITS, parts, writers, strict=True):
        index, total = number
        path = out / f"{split}-{index:05d}-of-{total:05d}.array_record"
        shards.append(
            prepared.ShardEntry(
                file=path.name,
                component=component,
                split=split,
                records=writer.records,
                tokens=writer.tokens,
                bytes=part.stat().st_size,
                sha256=prepared.file_sha256(part),
            )
        )
        prepared.publish(part, path)
    left = tuple(tuple(writer.pending.tolist()) for writer in writers)
    return _Done(shards=tuple(shards), documents=tuple(counts), carry=left)


class _RecordWriter:
    """Cuts tokens into records of equal length; counts the `records` and `tokens` in the file."""

    def __init__(
        self, path: pathlib.Path, tokens_per_record: int, dtype: np.dtype, pending: Sequence[int]
    ):
        # One record a group: each can be read without its neighbors.
        self._file = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        self._size = tokens_per_record
        self._dtype = dtype.newbyteorder("<")
        self.pending = np.array(pending, self._dtype)
        self.records = 0
        self.tokens = 0

    def write(self, tokens: np.ndarray) -> None:
        """Add (n,) tokens; those that fill no record stay in `pending`."""
        tokens = np.concatenate([self.pending, tokens.astype(self._dtype)])
        full = len(tokens) - len(tokens) % self._size
        for start in range(0, full, self._size):
            self._record(tokens[start : start + self._size])
        self.pending = tokens[full:]

    def flush(self) -> None:
        """Write what is pending as a shorter record, the last of its stream."""
        if len(self.pending):
            self._record(self.pending)
            self.pending = self.pending[:0]

    def close(self) -> None:
        self._file.close()

    def _record(self, tokens: np.ndarray) -> None:
        self._file.write(tokens.tobytes())
        self.records += 1
        self.tokens += len(tokens)


def _manifest(
    options: dict, vocab_size: int, mix: Sequence[sources.Part], plan: _Plan, done: Sequence[_Done]
) -> prepared.Manifest:
    shards = [shard for result in done for shard in result.shards]
    shards.sort(key=lambda shard: (shard.component, shard.split, shard.file))
    components = []
    for i, (part, report) in enumerate(zip(mix, plan.reports, strict=True)):
        documents = [result.documents for result in done if result.shards[0].component == i]
        tokens = {
            split: sum(s.tokens for s in shards if s.component == i and s.split == split)
            for split in prepared.SPLITS
        }
        components.append(
            prepared.Component(
                **dataclasses.asdict(report),
                weight=part.weight,
                train_documents=sum(train for train, _ in documents),
                validation_documents=sum(validation for _, validation in documents),
                train_tokens=tokens["train"],
                validation_tokens=tokens["validation"],
            )
        )
    return prepared.Manifest(
        schema=prepared.SCHEMA,
        options=options,
        vocab_size=vocab_size,
        tokenizer_sha256=plan.tokenizer_sha256,
        dtype=str(streams.token_dtype(vocab_size)),
        tokens_per_record=int(options["tokens_per_record"]),
        components=tuple(components),
        shards=tuple(shards),
    )


def _command(argv: Sequence[str]) -> int:
    values: Any = flags.FLAGS
    options = Options(
        **{field.name: getattr(values, field.name) for field in dataclasses.fields(Options)}
    )
    # SIGTERM ends it like Ctrl-C; kill -9 does no harm either.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    out = pathlib.Path(values.out).expanduser()
    try:
        manifest = prepare(options, out, progress=say)
        if values.verify:
            prepared.verify(out, progress=say)
    except KeyboardInterrupt:
        say("interrupted: run the same command again to continue")
        return 130
    for component in manifest.components:
        print(component.report)
        print(f"  {component.train_tokens} training tokens, {component.validation_tokens} held out")
    print(f"read it with --config.data.source=arrayrecord:{out}")
    return 0


def _define_flags() -> None:
    """Called only by the command, so that importing this module defines no global flag."""
    flags.DEFINE_string(
        "source", None, "a source or mix, e.g. 'files:/data/**/*.py'", required=True
    )
    flags.DEFINE_string("out", None, "the folder to write", required=True)
    flags.DEFINE_integer(
        "vocab_size", None, "tokens of the tokenizer that is trained (default: 2048)"
    )
    flags.DEFINE_string("tokenizer", "", "use this tokenizer.json instead of training one")
    flags.DEFINE_float(
        "megabytes", None, "text to take, in 10^6 bytes, shared by weight (default: all)"
    )
    flags.DEFINE_float("validation_fraction", 0.02, "share of documents held out")
    flags.DEFINE_float("shard_megabytes", 64.0, "text behind one shard, in 10^6 bytes")
    flags.DEFINE_integer(
        "tokens_per_record", 4096, "tokens in a record; at least the model's context"
    )
    flags.DEFINE_integer("seed", 0, "seed of generated documents")
    flags.DEFINE_boolean("verify", False, "at the end, read every shard and compare its sha256")


if __name__ == "__main__":
    _define_flags()
    run_command(_command)

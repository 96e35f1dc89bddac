"""The data of a run: the tokens it trains on and holds out, kept in its folder.

`RUN/data` is a folder of tokens (`wsparse.data.tokens`) of the sources that are documents. `arrayrecord:`
sources, which are such folders themselves, stay where they are. `provenance.json` says what the data was
made from and with, and its digest: the data that a run sees is what it saw first, or an error.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import platform
import shutil
from typing import Any

from wsparse import config as config_lib
from wsparse import files
from wsparse.config import DataConfig, TrainConfig
from wsparse.data import encode, sources, tokens
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.data.batches import window_count
from wsparse.data.tokens import Components
from wsparse.errors import UserError, located

log = logging.getLogger(__name__)

PROVENANCE = "provenance.json"


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts of a dataset: text of each source, in the order of the mix, and tokens on each side."""

    sources: tuple[sources.SourceReport, ...]
    train_tokens: int
    validation_tokens: int

    def __str__(self) -> str:
        counts = f"{self.train_tokens} training tokens, {self.validation_tokens} held out"
        return "\n".join([*map(str, self.sources), counts])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Everything in `provenance.json`.

    Attributes:
      options: Fields of `DataConfig` that decide the tokens, and the size of the vocabulary.
      folders: Absolute paths of the `arrayrecord:` sources by name.
      digest: `Dataset.digest`.
      tokenizer_sha256: `Tokenizer.digest`.
      python: Version of the interpreter, whose library is the source `stdlib`.
      platform: Machine that read the sources.
    """

    options: dict
    folders: dict
    digest: str
    tokenizer_sha256: str
    train_tokens: int
    validation_tokens: int
    python: str
    platform: str

    def __str__(self) -> str:
        return f"data {self.digest[:16]}, made by Python {self.python} on {self.platform}"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A tokenizer and the token streams of each source of a mix.

    Attributes:
      digest: Hex sha256 over the tokenizer, the weights and all tokens.
      provenance: Content of `provenance.json`; None while the folder is written.
    """

    tokenizer: tokenizer_lib.Tokenizer
    train: Components
    validation: Components
    digest: str
    report: Report
    provenance: Provenance | None = None

    def side(self, split: tokens.Split) -> Components:
        """Returns the components of a split."""
        return self.train if split == "train" else self.validation


def open_dataset(
    folder: pathlib.Path,
    config: TrainConfig,
    *,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
) -> Dataset:
    """Opens the data of a run; where `folder` does not exist, it is made from the sources first.

    `data.megabytes` are divided between the sources by weight; a source that has less gives all it has, and
    is repeated more often in training, since weights are about sampling. The tokenizer is, in this order:
    `tokenizer`, `data.tokenizer`, that of the `arrayrecord:` sources, or one trained on the training
    text. `data.megabytes`, `data.validation_fraction` and `data.seed` do not touch `arrayrecord:` sources.

    Args:
      folder: `RUN/data`. It appears complete or not at all.
      config: Config of the run. Each side of each source must fill a window of `config.model.context`.
      tokenizer: Tokenizer of the run, where it has one.

    Raises:
      UserError: A bad source, a tokenizer of another size, too little text on either side, or data that is
        not what it was when the folder was made.
    """
    data, vocab_size, context = config.data, config.model.vocab_size, config.model.context
    names = ("source", "megabytes", "tokenizer", "validation_fraction", "seed")
    options: dict[str, Any] = {name: getattr(data, name) for name in names} | {"vocab_size": vocab_size}
    if folder.exists():
        path = folder / PROVENANCE
        if not path.exists():
            raise UserError(f"{folder} is not the data of a run (no {PROVENANCE}): move it away")
        with located(f"{path} is malformed: "):
            provenance = config_lib.from_dict(Provenance, files.read_json(path))
        changed = config_lib.differences(provenance.options, options)
        if not changed:
            return _reopen(folder, provenance, context, tokenizer)
        log.info("%s is made again: %s", folder, "; ".join(changed))
        shutil.rmtree(folder)
    mix = sources.parse_mix(data.source)
    paths = _arrayrecord_paths(mix)
    tokenizer = _given_tokenizer(data, tokenizer, paths)
    if tokenizer is not None and tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size={vocab_size}: "
            "make them equal"
        )
    documents = [term for term in mix if term.name not in paths]
    with files.new_folder(folder) as part:
        if documents:
            encode.write(encode.Options(**options), part, mix=documents, tokenizer=tokenizer, in_memory=True)
        dataset = _read(part, mix, paths, context)
        provenance = Provenance(
            options=options,
            folders={name: str(path.absolute()) for name, path in paths.items()},
            digest=dataset.digest,
            tokenizer_sha256=dataset.tokenizer.digest,
            train_tokens=dataset.report.train_tokens,
            validation_tokens=dataset.report.validation_tokens,
            python=platform.python_version(),
            platform=platform.platform(),
        )
        files.write_json(part / PROVENANCE, dataclasses.asdict(provenance), durable=True)
    return dataclasses.replace(dataset, provenance=provenance)


def other_text(
    source: str, data: DataConfig, tokenizer: tokenizer_lib.Tokenizer, *, max_bytes: float
) -> Components:
    """Returns the tokens of a source that a run was not made with: all its documents, nothing is stored.

    Args:
      source: A source or mix, as `data.source`; of an `arrayrecord:` source, the held-out side.
      data: Config of the run's data, for its seed.
      tokenizer: Tokenizer of the run.
      max_bytes: Text to read, divided by weight.

    Raises:
      UserError: A source cannot be read, or was prepared with another tokenizer.
    """
    mix = sources.parse_mix(source)
    paths = _arrayrecord_paths(mix)
    # Ids of another tokenizer would be other text to the model.
    _given_tokenizer(data, tokenizer, paths)
    components: list[tuple[float, tokens.TokenStream]] = []
    for term in mix:
        if term.name in paths:
            held_out = tokens.open_folder(paths[term.name]).validation
            components += [(term.weight * weight, stream) for weight, stream in held_out]
            continue
        opened = sources.open_source(term.name, seed=data.seed)
        texts = sources.documents(opened, collections.Counter(), max_bytes=max_bytes * term.weight)
        components.append((term.weight, tokens.MemoryStream(encode.encode(list(texts), tokenizer))))
    return components


def _arrayrecord_paths(mix: Sequence[sources.Term]) -> dict[str, pathlib.Path]:
    paths = {term.name: sources.arrayrecord_folder(term.name) for term in mix}
    return {name: path for name, path in paths.items() if path is not None}


def _reopen(
    folder: pathlib.Path, provenance: Provenance, context: int, tokenizer: tokenizer_lib.Tokenizer | None
) -> Dataset:
    mix = sources.parse_mix(provenance.options["source"])
    paths = {
        # A folder may have moved together with what names it.
        name: path if path.is_dir() else pathlib.Path(provenance.folders.get(name, path))
        for name, path in _arrayrecord_paths(mix).items()
    }
    if tokenizer is not None and tokenizer.digest != provenance.tokenizer_sha256:
        raise UserError(f"tokenizer.json of the run is not the one that {folder} was made with: restore it")
    dataset = _read(folder, mix, paths, context)
    if dataset.digest != provenance.digest:
        raise UserError(
            f"the data of {folder} is not what it was made from ({provenance.options['source']}, its digest "
            "differs): restore the original files, or delete the folder to make it again"
        )
    return dataclasses.replace(dataset, provenance=provenance)


def _read(
    folder: pathlib.Path, mix: Sequence[sources.Term], paths: dict[str, pathlib.Path], context: int
) -> Dataset:
    """Reads the run's own tokens into memory, and opens the folders that it points at."""
    opened = {name: tokens.open_folder(path) for name, path in paths.items()}
    own = tokens.open_folder(folder) if any(term.name not in opened for term in mix) else None
    tokenizer = (own or next(iter(opened.values()))).tokenizer
    dtype = tokens.token_dtype(tokenizer.vocab_size)
    own_rows = _rows(own) if own else iter(())
    reports: list[sources.SourceReport] = []
    train: list[tuple[float, tokens.TokenStream]] = []
    validation: list[tuple[float, tokens.TokenStream]] = []
    for term in mix:
        prepared = opened.get(term.name)
        for component, *sides in _rows(prepared) if prepared else [next(own_rows)]:
            reports.append(component.report)
            name = f"{term.name} ({component.source})" if prepared else term.name
            for components, (weight, stream) in zip((train, validation), sides, strict=True):
                _require_window(stream, name, context, held_out=components is validation)
                if prepared:
                    components.append((term.weight * weight, stream))
                else:
                    ids = stream.read(0, len(stream)).astype(dtype)
                    components.append((term.weight, tokens.MemoryStream(ids)))
    report = Report(
        tuple(reports),
        train_tokens=sum(len(stream) for _, stream in train),
        validation_tokens=sum(len(stream) for _, stream in validation),
    )
    content = [
        tokenizer.digest,
        *([[weight, len(stream), stream.digest] for weight, stream in side] for side in (train, validation)),
    ]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return Dataset(tokenizer, train, validation, digest, report)


def _rows(folder: tokens.TokenFolder) -> Iterator[tuple]:
    """Returns the components of a folder with their training and held-out streams."""
    return zip(folder.manifest.components, folder.train, folder.validation, strict=True)


def _require_window(stream: tokens.TokenStream, name: str, context: int, *, held_out: bool) -> None:
    if window_count(len(stream), context) < 1:
        side = "held-out" if held_out else "training"
        raise UserError(
            f"{name} has {len(stream)} {side} tokens, one window of model.context={context} needs "
            f"{context + 1}: raise data.megabytes"
            + (" or data.validation_fraction" if held_out else "")
            + ", or give more documents; an arrayrecord: folder must be prepared again"
        )


def _given_tokenizer(
    data: DataConfig, tokenizer: tokenizer_lib.Tokenizer | None, paths: dict[str, pathlib.Path]
) -> tokenizer_lib.Tokenizer | None:
    """Returns the tokenizer that the user or prepared tokens dictate; None when one is to be trained.

    Raises:
      UserError: They dictate different ones.
    """
    given: list[tuple[str, tokenizer_lib.Tokenizer]] = []
    if tokenizer is not None:
        given.append(("the run", tokenizer))
    elif data.tokenizer:
        given.append((data.tokenizer, tokenizer_lib.load(os.path.expanduser(data.tokenizer))))
    given += [(name, tokens.open_folder(path).tokenizer) for name, path in paths.items()]
    for name, other in given[1:]:
        if other.digest != given[0][1].digest:
            raise UserError(
                f"{given[0][0]} and {name} have different tokenizers: prepare one again with "
                "--tokenizer=<the tokenizer.json of the other>"
            )
    return given[0][1] if given else None

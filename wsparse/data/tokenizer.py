"""Byte-level BPE, a frozen wrapper around the `tokenizers` library.

Tokenizers of models from elsewhere may be of another kind, such as WordPiece, which loses white space.

The vocabulary is the 256 bytes, then merges in the order they were learned, then `<|endoftext|>` as the last
id. Special tokens are never recognized inside a text: the characters `<|endoftext|>` are encoded one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import os
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from wsparse import files
from wsparse.errors import UserError, located, quoted, reason

END_OF_TEXT = "<|endoftext|>"
# What ends a text in tokenizers from elsewhere.
_ENDS = (END_OF_TEXT, "[EOS]")

# The published pre-split: words with one leading mark, one to three digits, punctuation, line ends.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# 256 bytes and end_of_text.
SMALLEST_VOCAB = 257


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back, without loss if byte-level; two are equal when their `digest`s are.

    Attributes:
      core: The library's tokenizer, not to be changed.
    """

    core: tokenizers.Tokenizer

    def __post_init__(self):
        if all(self.core.token_to_id(end) is None for end in _ENDS):
            known = " or ".join(map(repr, _ENDS))
            raise UserError(f"a tokenizer must have the token {known}, this one has none")
        # Not part of the saved file, so it is set on every way in.
        self.core.encode_special_tokens = True
        # Files from elsewhere may have these on: texts would be cut or filled up, or encoded at random.
        self.core.no_truncation()
        self.core.no_padding()
        if getattr(self.core.model, "dropout", None) is not None:
            self.core.model.dropout = None

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of tokens V, end_of_text included."""
        return self.core.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def end_of_text(self) -> int:
        """Token that separates documents; no text encodes to it."""
        # __post_init__ refuses a tokenizer without any.
        return next(token for end in _ENDS if (token := self.core.token_to_id(end)) is not None)

    @functools.cached_property
    def digest(self) -> str:
        """Hex sha256 of everything that decides the ids."""
        return hashlib.sha256(self.core.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, of which a byte-level `decode` returns the same text."""
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of every text, encoded on all cores."""
        encodings = self.core.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of tokens; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.core.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_id(self, text: str) -> int | None:
        """Returns the token of a text that is exactly one token, else None."""
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None

    def to_json(self) -> str:
        """Returns the content of a `tokenizer.json`, which the `tokenizers` library loads too."""
        return self.core.to_str(pretty=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json` to a file, which is replaced when the write is complete."""
        files.write_text(path, self.to_json())


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Returns the tokenizer of a `tokenizer.json`.

    Raises:
      UserError: The file is missing, or as in `from_json`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: give the path of a tokenizer.json")
    try:
        with located(f"{path}: "):
            return from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{path} cannot be read: {why}") from error


def from_json(text: str) -> Tokenizer:
    """Returns the tokenizer of `Tokenizer.to_json`.

    Raises:
      UserError: `text` is not a tokenizer, has no end-of-text token, or its ids are not 0 to V - 1.
    """
    try:
        core = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises plain Exception for whatever it cannot parse.
        why = quoted(reason(error))
        raise UserError(f"not a tokenizer.json of the tokenizers library: {why}") from error
    tokenizer = Tokenizer(core)
    ids = sorted(core.get_vocab(with_added_tokens=True).values())
    if ids != list(range(len(ids))):
        wrong = next(index for index, number in enumerate(ids) if index != number)
        raise UserError(
            f"the {len(ids)} tokens must have the ids 0 to {len(ids) - 1}, each once, got {ids[wrong]}"
        )
    return tokenizer


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a tokenizer with V - 257 merges learned from `texts`, always the same for the same texts.

    Raises:
      UserError: `vocab_size` leaves no room for the bytes and end_of_text, or the texts hold too few distinct
        pairs to fill it.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(
            f"vocab_size must be at least {SMALLEST_VOCAB} (256 bytes and {END_OF_TEXT}), got {vocab_size}"
        )
    core = _byte_level(models.BPE())
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    core.train_from_iterator(counted(), trainer)
    tokenizer = _with_end_of_text(core)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"a tokenizer of vocab_size={vocab_size} needs more text: {seen} characters gave only "
            f"{tokenizer.vocab_size} tokens; give more text or a smaller vocab_size"
        )
    return tokenizer


def from_merges(ids: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """Returns a tokenizer of known merges; those of a trained one give it again, with its digest.

    Args:
      ids: Ids by token, whose bytes are written as the `tokenizers` library writes them; where
        `<|endoftext|>` is missing, it is the next id.
      merges: Pairs of tokens, the first to be merged first.
    """
    vocab = dict(ids)
    if vocab.get(END_OF_TEXT) == len(vocab) - 1:
        del vocab[END_OF_TEXT]  # It is added as the next id.
    return _with_end_of_text(_byte_level(models.BPE(vocab=vocab, merges=list(merges))))


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Returns a tokenizer that splits by the pattern, then into bytes."""
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _with_end_of_text(core: tokenizers.Tokenizer) -> Tokenizer:
    core.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(core)

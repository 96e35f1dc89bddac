"""Tokenizers as two files, the way GPT-2's was published: `encoder.json` and `vocab.bpe`.

`encoder.json` maps tokens to ids, `vocab.bpe` lists the pairs of tokens that merge, in order of priority.
Bytes are written as printable characters, as the `tokenizers` library writes them. The pattern that splits
text before merging is in neither file; it is `wsparse.data.tokenizer.PATTERN`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import tempfile

from tokenizers import pre_tokenizers

from wsparse import files
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.data.tokenizer import END_OF_TEXT, Tokenizer
from wsparse.errors import UserError, quoted

ENCODER_FILE, MERGES_FILE = "encoder.json", "vocab.bpe"
_VERSION_LINE = "#version: 0.2"


class NoTokenizerError(UserError):
    """A folder without the two files."""


def load(folder: str | os.PathLike[str]) -> Tokenizer:
    """Reads a byte-level BPE tokenizer.

    An `encoder.json` without `<|endoftext|>` gets it as its next id.

    Raises:
      NoTokenizerError: One of the files is missing.
      UserError: They are not such files, or contradict each other.
    """
    folder = pathlib.Path(folder)
    for name in (ENCODER_FILE, MERGES_FILE):
        if not (folder / name).is_file():
            raise NoTokenizerError(
                f"{folder} has no {name} (a tokenizer is {ENCODER_FILE} and {MERGES_FILE})"
            )
    ids = files.read_json(folder / ENCODER_FILE)
    merges = _merges(folder / MERGES_FILE)
    _check(folder, ids, merges)
    return tokenizer_lib.from_merges(ids, merges)


def save(folder: str | os.PathLike[str], tokenizer: Tokenizer) -> None:
    """Writes the two files of a byte-level BPE tokenizer into an existing folder."""
    folder = pathlib.Path(folder)
    model = json.loads(tokenizer.core.to_str())["model"]
    # The library writes the end of text among the tokens it was added to, not among the model's.
    ids = {**model["vocab"], END_OF_TEXT: tokenizer.end_of_text}
    files.write_json(folder / ENCODER_FILE, ids)
    lines = [_VERSION_LINE, *(" ".join(merge) for merge in model["merges"])]
    files.write_text(folder / MERGES_FILE, "\n".join(lines) + "\n")


def check(tokenizer: Tokenizer) -> None:
    """Checks that `load` would return a tokenizer that `save` has written.

    Raises:
      UserError: It would not, since the tokenizer is of another kind, or splits or ends text otherwise.
    """
    kind = json.loads(tokenizer.core.to_str())["model"]["type"]
    if kind == "BPE":
        with tempfile.TemporaryDirectory() as folder:
            save(folder, tokenizer)
            with contextlib.suppress(UserError):
                if load(folder).digest == tokenizer.digest:
                    return
    raise UserError(
        f"{ENCODER_FILE} and {MERGES_FILE} cannot express this tokenizer ({kind}): they are for byte-level "
        f"BPE with the published pattern and {END_OF_TEXT}; openai.save in Python writes the model alone"
    )


def _merges(path: pathlib.Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split()
        if len(pair) != 2:
            raise UserError(f"{path}:{number}: must be two tokens separated by a space, got {quoted(line)}")
        merges.append((pair[0], pair[1]))
    return merges


def _check(folder: pathlib.Path, ids: dict, merges: list[tuple[str, str]]) -> None:
    """Rejects files that leave an id without a token, or with a merge into an unknown token."""
    encoder = folder / ENCODER_FILE
    wrong = next((token for token, i in ids.items() if type(i) is not int), None)
    if wrong is not None:
        raise UserError(f"{encoder}: the id of {quoted(wrong)} must be an integer, got {quoted(ids[wrong])}")
    if sorted(ids.values()) != list(range(len(ids))):
        raise UserError(f"{encoder}: the ids must be 0 to {len(ids) - 1}, each of them once")
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    if missing := alphabet - set(ids):
        raise UserError(f"{encoder}: {len(missing)} of the 256 bytes have no token")
    for left, right in merges:
        unknown = next((t for t in (left, right, left + right) if t not in ids), None)
        if unknown is not None:
            raise UserError(
                f"{folder / MERGES_FILE}: the merge {quoted(left)} {quoted(right)} needs the token "
                f"{quoted(unknown)}, which {ENCODER_FILE} does not have"
            )
    if extra := set(ids) - {left + right for left, right in merges} - {END_OF_TEXT} - alphabet:
        raise UserError(f"{encoder}: no merge in {MERGES_FILE} makes the token {quoted(min(extra))}")

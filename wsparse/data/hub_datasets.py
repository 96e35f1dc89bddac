"""Data sets of the Hugging Face Hub, or folders of such files, read through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
import os
from typing import Any, NamedTuple

from wsparse.errors import UserError, closest, optional, reason

_SPLIT, _COLUMN = "train", "text"


class Name(NamedTuple):
    """What `NAME[:SPLIT[:COLUMN]]` says."""

    dataset: str
    split: str
    column: str


def parse(source: str, path: str) -> Name:
    """Returns the parts of what follows `hf:`, defaults filled in.

    Raises:
      UserError: There are too many parts, or an empty one.
    """
    parts = path.split(":")
    if len(parts) > 3 or not all(parts):
        raise UserError(f"the source {source!r} must be hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:COLUMN")
    return Name(*(*parts, *(_SPLIT, _COLUMN)[len(parts) - 1 :]))


def open_dataset(source: str, name: Name) -> Iterable[Mapping[str, Any]]:
    """Returns the examples of a data set, which are streamed: nothing is downloaded before it is read.

    Raises:
      UserError: `datasets` is not installed, the data set or the split does not exist or cannot be reached,
        or there is no such column.
    """
    datasets = optional("datasets", "datasets", f"the source {source!r}")
    folder = os.path.expanduser(name.dataset)
    # A path that does not exist would be looked for on the Hub.
    if folder.startswith(("/", ".")) and not os.path.isdir(folder):
        raise UserError(f"the source {source!r}: the folder {os.path.abspath(folder)} does not exist")
    try:
        examples = datasets.load_dataset(folder, split=name.split, streaming=True)
    except Exception as error:  # The library raises many kinds, those of its HTTP client included.
        what = f"the source {source!r}: {name.dataset!r}, split {name.split!r}, cannot be opened"
        raise UserError(f"{what}: {reason(error)}") from error
    known = examples.column_names  # None where the files must be read to tell; then reading tells.
    if known is not None and name.column not in known:
        near = closest(name.column, known)
        raise UserError(
            f"the source {source!r}: no column {name.column!r}{near}; columns are {', '.join(known)}: "
            f"name one, hf:{name.dataset}:{name.split}:COLUMN"
        )
    return examples


def read(source: str, examples: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields the examples of a data set.

    Raises:
      UserError: They cannot be read on.
    """
    try:
        yield from examples
    except Exception as error:  # As in `open_dataset`.
        raise UserError(f"the source {source!r} cannot be read: {reason(error)}") from error

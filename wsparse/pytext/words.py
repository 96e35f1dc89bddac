"""The words that programs are made of, and their division among the splits of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Literal, TypeVar

T = TypeVar("T")

Split = Literal["search", "discretize", "report"]
SPLITS: tuple[Split, ...] = ("search", "discretize", "report")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Nouns are variables, arguments, attributes and, with an "s", lists: all have a regular plural.
NOUNS = _words(
    """
    value item name count total key size state node word point line score label level user price
    limit width height offset color group record row field table cell block part step rate weight
    length event task order signal channel packet frame image pixel shape edge root parent owner
    member team player game board card deck turn goal reward agent action model layer unit
    feature sample metric margin ratio factor term digit number symbol letter phrase title author
    book chapter note tag topic post thread message contact phone region zone route road bridge
    river lake hill garden plant flower seed apple lemon meal recipe kitchen chair lamp window
    door wall floor room house store product cart invoice account bank loan budget cost profit
    month week day hour minute second timer clock alarm sensor motor wheel engine car train plane
    ship boat
    """
)
FLAGS = _words(
    """
    ready done valid active found empty full enabled visible hidden changed locked loaded closed
    running failed passed started stopped paused online verbose strict safe
    """
)
VERBS = _words(
    """
    get load make find check update build parse send fetch collect compute create remove reset
    merge split move copy start stop clean convert apply select test measure draw pack join
    """
)
WORDS = (
    *_words(
        """
        the new old first last next all more red blue green black white small large long short
        hello world good bad error missing of to start end left right low high time
        data
        """
    ),
    *FLAGS,
    *NOUNS,
)
PREFIXES = ("max", "min", "new", "old", "last", "first", "best", "num")
LETTERS = ("x", "y", "a", "b", "n", "f", "g", "h", "k", "v")
CLASS_KINDS = ("Store", "Reader", "Writer", "List", "Info", "Task", "Base")
INDICES = ("i", "j", "k", "n", "idx")
CALLS = ("log", "show", "warn", "notify", "trace")
MODULES = ("os", "sys", "json", "math", "time", "random")

STEMS = {
    "r": ("input", "source", "data", "config", "raw", "corpus"),
    "w": ("output", "result", "log", "report", "target", "export"),
}
"""Names of files, by the mode they are opened with; all splits share them."""
SUFFIXES = ("txt", "csv", "json", "md", "dat")
HANDLES = ("f", "file", "handle", "stream")

FIXED_VARIABLE = "current"
"""The only variable name of `set_or_string_fixedvarname`."""

DIGITS, TENS = range(10), range(10, 100)


def _owners() -> dict[object, Split]:
    """Returns the split of every filler; a word that is in several lists belongs to one split."""
    lists = (
        *(NOUNS, FLAGS, VERBS, WORDS, PREFIXES, LETTERS, INDICES, HANDLES),
        *(CALLS, MODULES, SUFFIXES, DIGITS, TENS),
    )
    owners: dict[object, Split] = {}
    for fillers in lists:
        # Lists begin with the common words: dealing them out gives each split its part of those.
        fresh = [filler for filler in fillers if filler not in owners]
        for index, filler in enumerate(fresh):
            owners[filler] = SPLITS[index % len(SPLITS)]
    return owners


_OWNERS = _owners()


@functools.cache
def fillers_of(split: Split, fillers: Sequence[T]) -> tuple[T, ...]:
    """Returns the fillers that belong to a split, common ones first."""
    return tuple(filler for filler in fillers if _OWNERS[filler] == split)

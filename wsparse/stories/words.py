"""The words that little stories are made of.

Lists begin with common words, and are dealt out to the splits of the tasks in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from wsparse.pytext.words import SPLITS, Split

T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# The names of the public data set SimpleStories, as their owners are spoken of there (Jean is both).
GIRLS = _words("Mia Kim Rita Lily Alice Maria Lena Anne")
BOYS = _words("Leo Alex Samuel Jose Emmanuel Peter Luis")

PLACES = _words(
    "park garden lake forest house river school hill beach cave farm shop bridge field barn pond tower tree"
)
MOVES = _words("went ran walked came hurried rode raced moved returned")
STAYS = (
    *(("sat", "sits"), ("played", "plays"), ("stood", "stands"), ("slept", "sleeps"), ("waited", "waits")),
    *(("sang", "sings"), ("danced", "dances"), ("rested", "rests"), ("worked", "works")),
)
"""What one does somewhere, in the past and in the present tense."""
WISHES = _words("play help rest sing swim read dance draw learn")
GIFTS = _words("ball book flower cake kite map stone leaf shell bell hat coin")
GIVES = _words("gave showed passed brought sent handed")
ANIMALS = _words("dog cat bird fox bear rabbit horse duck mouse deer goat frog")
ADJECTIVES = _words("big small red new blue little green bright long tall round warm")
FEELINGS = _words("happy sad tired proud brave calm glad shy quiet")
PAST_TIMES = ("Yesterday", "Last week", "Long ago")
PRESENT_TIMES = ("Today", "This week", "Right now")


def fillers_of(split: Split, fillers: Sequence[T]) -> Sequence[T]:
    """Returns the fillers that belong to a split, common ones first."""
    return fillers[SPLITS.index(split) :: len(SPLITS)]

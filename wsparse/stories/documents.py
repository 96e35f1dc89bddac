"""Synthetic little stories that show both sides of every contrast of theirs.

They are no substitute for a data set of stories: some hundred words and a dozen kinds of sentences, to learn
the tasks from without a network.
"""

from __future__ import annotations

from collections.abc import Iterator
import itertools
import random

from wsparse.errors import UserError
from wsparse.pytext.draw import seed_of
from wsparse.stories.contrasts import CONTRASTS, Draw
from wsparse.stories.prompts import opening

FEWEST, MOST = 4, 10
"""Passages of a document."""

# How often a passage shows no contrast, and how often one begins a new line.
_FILLED, _PARAGRAPH = 0.2, 0.15
# How often a passage shows the same contrast as the one before.
_AGAIN = 0.4


def document(seed: int, index: int) -> str:
    """Returns story number `index`, 0 or more, of the stream that any integer `seed` names.

    It depends on nothing but the two arguments.
    """
    if index < 0:
        raise UserError(f"a document's index must be 0 or more, got {index}")
    d = Draw(random.Random(seed_of(f"stories/{seed}/{index}")))
    name, text = d.either(*CONTRASTS), opening(d)
    for _ in range(d.between(FEWEST, MOST)):
        # What one passage says must not foretell the next, and prompts have several of one contrast.
        name = name if d.chance(_AGAIN) else d.either(*CONTRASTS)
        passage = opening(d) if d.chance(_FILLED) else CONTRASTS[name].write(d, d.either(0, 1))
        text += ("\n" if d.chance(_PARAGRAPH) else " ") + passage
    return f"{text}\n"


def documents(seed: int = 0, *, start: int = 0) -> Iterator[str]:
    """Yields `document(seed, start)`, `document(seed, start + 1)` and so on without end."""
    return (document(seed, index) for index in itertools.count(start))

"""Pairs of beginnings of stories: one draw of a contrast written twice, once for each side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import itertools
import random

from wsparse.pytext import prompts
from wsparse.pytext.prompts import Pair
from wsparse.pytext.words import Split
from wsparse.stories import words
from wsparse.stories.contrasts import CONTRASTS, DISTRACTORS, Draw


def pairs(name: str, seed: int, split: Split, *, knobs: Mapping[str, int] | None = None) -> Iterator[Pair]:
    """Yields pairs of a contrast without end; see `wsparse.pytext.prompts.pairs`."""
    fixed = knobs or {}
    drawn = (_pair(name, key, split, fixed) for key in prompts.keys(name, split, seed))
    return prompts.with_knobs(name, drawn, fixed)


def statements(name: str, side: int | None, seed: int, split: Split) -> Iterator[str]:
    """Yields finished passages of one side of a contrast, or of none where side is None, without end."""
    d = Draw(random.Random(next(prompts.keys(f"{name}/{side}/statements", split, seed))), split)
    while True:
        yield f"{opening(d) if side is None else CONTRASTS[name].write(d, side)}\n"


def opening(d: Draw) -> str:
    """Returns a sentence that shows no contrast, of the split's own kind."""
    kinds = itertools.chain(*_OPENINGS.values()) if d.split is None else _OPENINGS[d.split]
    return d.either(*kinds)(d)


def _pair(name: str, key: int, split: Split, fixed: Mapping[str, int]) -> Pair:
    contrast, rng = CONTRASTS[name], random.Random(key)
    # Everything that both prompts share. The knobs of the distractors are not the pair's.
    outer, inside = Draw(rng, split, fixed=fixed), Draw(rng, split)
    before = [opening(outer)]
    count = outer.knob("distractors", DISTRACTORS)
    sides = outer.either((0, 1), (1, 0))
    before += [contrast.write(inside, side) for side in sides[:count]]
    knobs, ends = dict(outer.knobs), []
    for side in (0, 1):
        d = Draw(random.Random(key + 1), split, cut=prompts.CUT, fixed=fixed)
        ends.append(contrast.write(d, side))
        knobs |= d.knobs
    first, second = (prompts.cut_program(" ".join([*before, end])) for end in ends)
    return Pair(first=first, second=second, template=f"after {before[0]!r}", knobs=knobs)


# ---- Openings ----


def _once(d: Draw) -> str:
    return f"Once there lived a {d.one(words.ADJECTIVES)} {d.one(words.ANIMALS)}."


def _path(d: Draw) -> str:
    return f"A {d.one(words.ADJECTIVES)} path led to {d.place()}."


def _weather(d: Draw) -> str:
    return f"The sun shone over {d.place()}."


def _wind(d: Draw) -> str:
    return f"There was wind at {d.place()}."


def _table(d: Draw) -> str:
    return f"A {d.one(words.GIFTS)} lay on the {d.one(words.ADJECTIVES)} table."


def _sound(d: Draw) -> str:
    return f"Everyone heard a {d.one(words.ANIMALS)}."


_OPENINGS: dict[Split, tuple[Callable[[Draw], str], ...]] = {
    "search": (_once, _path),
    "discretize": (_weather, _wind),
    "report": (_table, _sound),
}
"""How a story begins; each split has its own ways."""

"""The contrasts of little stories: small decisions of English, each with two sides.

Each contrast is one function that writes either side, as in `wsparse.pytext.contrasts`. Documents show the
sides one by one. A pair of prompts is the same draw written twice, once for each side, and cut where the
sides part (`Draw.cut`). Up to there both sides hold the same words in another order, but for
`indirect_object`, where one of two names occurs twice; what decides stands more than three tokens before the
decision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import TypeVar

from wsparse.pytext.choices import Choices
from wsparse.pytext.contrasts import Form
from wsparse.stories import words

T = TypeVar("T")


class Draw(Choices):
    """The random choices of a passage. Its knobs are

    - `distractors`: finished passages of the same contrast, of both its sides, before the one that is cut;
    - `order`: whether who gives in the first prompt of a pair is named first (0) or second (1);
    - `joint`: whether the other person is in a sentence before (0) or in the same (1);
    - `times`: whether the verb alone tells the time (0) or a word before it as well (1);
    - `length`: further words between what decides and the decision.
    """

    def one(self, fillers: Sequence[T]) -> T:
        """Returns one of the split's fillers."""
        return self.either(*(fillers if self.split is None else words.fillers_of(self.split, fillers)))

    def several(self, fillers: Sequence[T], count: int) -> list[T]:
        """Returns different fillers of the split."""
        drawn: list[T] = []
        while len(drawn) < count:
            if (filler := self.one(fillers)) not in drawn:
                drawn.append(filler)
        return drawn

    def place(self) -> str:
        return f"the {self.one(words.PLACES)}"

    def near(self) -> str:
        """Returns where something is, in as many phrases as the knob `length` says."""
        places = self.several(words.PLACES, 1 + self.knob("length", (0, 1)))
        return f"{self.either('by', 'near')} {' and '.join(f'the {place}' for place in places)}"


Write = Callable[[Draw, int], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
    """One decision.

    Attributes:
      summary: What is decided, and by what.
      write: `(draw, side) -> passage` of side 0 or 1, a sentence or two, which documents show equally often.
      forms: Surface forms of the two sides' answers, best first.
    """

    summary: str
    write: Write
    forms: tuple[Form, ...]


DISTRACTORS = (0, 1, 2, 2, 2, 2)
"""Choices of the knob."""


def _pronoun(d: Draw, side: int) -> str:
    """Two people, one of whom goes on being spoken of; all splits have the names, which decide."""
    people = (d.either(*words.GIRLS), d.either(*words.BOYS))
    name, other = people[side], people[1 - side]
    who = ("she", "he")[side]
    before = f"{other} {d.one(words.STAYS)[0]} by {d.place()}"
    after = f"{name} {d.one(words.MOVES)} to {d.place()}"
    if d.knob("length", (0, 1)):
        after = f"{after} with a {d.one(words.ADJECTIVES)} {d.one(words.GIFTS)}"
    joint = d.knob("joint", (0, 1))
    end = f" {who} was {d.one(words.FEELINGS)}."
    if d.chance(0.5):
        return f"{f'When {before} and' if joint else f'{before}. When'} {after},{d.cut}{end}"
    reason = f" {who} wanted to {d.one(words.WISHES)}."
    return f"{before}{' and' if joint else '.'} {after} because{d.cut}{reason}"


def _tense(d: Draw, side: int) -> str:
    """Two animals that do the same, one in the past and one now; the second is spoken of on."""
    verb = d.one(words.STAYS)
    first, second = d.one(words.ANIMALS), d.one(words.ANIMALS)
    times, timed = (d.one(words.PAST_TIMES), d.one(words.PRESENT_TIMES)), d.knob("times", (0, 1))
    here, there = d.near(), f"{d.either('by', 'near')} {d.place()}"

    def sentence(time: int, animal: str, where: str) -> str:
        return f"{f'{times[time]} the' if timed else 'The'} {animal} {verb[time]} {where}"

    before, after = sentence(1 - side, first, there), sentence(side, second, here)
    return f"{before}. {after} and it{d.cut} {('was', 'is')[side]} {d.one(words.FEELINGS)}."


def _indirect_object(d: Draw, side: int) -> str:
    """Two people, one of whom gives something to the other."""
    people = d.several((*words.GIRLS, *words.BOYS), 2)
    giver, taker = people[side], people[1 - side]
    named = people[::-1] if d.knob("order", (0, 1)) else people
    adjectives = d.several(words.ADJECTIVES, 1 + d.knob("length", (0, 1)))
    scene = f"When {' and '.join(named)} {d.one(words.MOVES)} to {d.place()}"
    gift = f"{giver} {d.one(words.GIVES)} the {' '.join(adjectives)} {d.one(words.GIFTS)} to"
    return f"{scene}, {gift}{d.cut} {taker}{d.cut}."


# The order is part of every document.
CONTRASTS: dict[str, Contrast] = {
    "pronoun": Contrast(
        summary="speak of a girl or a boy, by the name of who did something last",
        write=_pronoun,
        forms=(Form(" she", " he"),),
    ),
    "tense": Contrast(
        summary="go on in the past or in the present tense, by the last verb",
        write=_tense,
        forms=(Form(" was", " is"),),
    ),
    "indirect_object": Contrast(
        summary="name the one of two people who does not give", write=_indirect_object, forms=(Form(),)
    ),
}

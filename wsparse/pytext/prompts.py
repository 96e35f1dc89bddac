"""Pairs of programs: one draw of a contrast written twice, once for each side, in the same surroundings.

The surroundings hold *distractors*, finished statements of the same contrast of both its sides: the tokens of
either side are in both prompts, and only their arrangement decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import itertools
import random
import re

from wsparse.errors import UserError, closest
from wsparse.pytext import words
from wsparse.pytext.contrasts import CONTRASTS, Place
from wsparse.pytext.draw import Draw, Kind, imports, indented, joined, seed_of
from wsparse.pytext.words import Split

CUT = "¦"
"""Marks in a program where the prompt ends and, where the form does not say it, the answer."""

# Draws in a row without a knob after which a task counts as without it: some have one in one draw of twenty.
_PATIENCE = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One side of a pair.

    Attributes:
      prompt: The text that the model reads.
      rest: The text after it; `prompt + rest` is a complete program where this module made it.
      answer: The beginning of `rest` that is to be one token; "" where the task's form says it.
    """

    prompt: str
    rest: str
    answer: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two programs that differ only in what decides the token after their prompts.

    Attributes:
      first, second: The sides that the form's first and second candidate answer.
      template: What the pair was made from.
      knobs: What it was drawn with, see `wsparse.pytext.draw`.
    """

    first: Program
    second: Program
    template: str = ""
    knobs: Mapping[str, int] = dataclasses.field(default_factory=dict)


def pairs(name: str, seed: int, split: Split, *, knobs: Mapping[str, int] | None = None) -> Iterator[Pair]:
    """Yields pairs of a contrast without end, always the same for the same arguments.

    Args:
      name: A name in `CONTRASTS`.
      seed: Names the stream of pairs.
      split: Which templates and fillers to use; splits have neither in common.
      knobs: Values of knobs that are not to be drawn.

    Raises:
      UserError: The contrast has no such knob, or not with this value.
    """
    fixed = knobs or {}
    return with_knobs(name, (_pair(name, key, split, fixed) for key in keys(name, split, seed)), fixed)


def keys(name: str, split: Split, seed: int) -> Iterator[int]:
    """Yields the seeds of a stream's draws."""
    for index in itertools.count():
        yield seed_of(f"{name}/{split}/{seed}/{index}")


def with_knobs(name: str, drawn: Iterable[Pair], fixed: Mapping[str, int]) -> Iterator[Pair]:
    """Yields the pairs of a task that have all the knobs that were set; raises a UserError if none has."""
    known: set[str] = set()
    in_vain = 0
    for pair in drawn:
        if fixed.keys() <= pair.knobs.keys():
            in_vain = 0
            yield pair
            continue
        known |= pair.knobs.keys()
        in_vain += 1
        if in_vain == _PATIENCE:
            missing = min(fixed.keys() - known or fixed)
            near = closest(missing, known)
            raise UserError(f"task {name!r} has no knob {missing!r}{near}; it has {', '.join(sorted(known))}")


def cut_program(text: str) -> Program:
    """Returns a program from a text that is marked where it is to be cut."""
    prompt, answer, *others = text.split(CUT)
    return Program(prompt=prompt, rest=answer + "".join(others), answer=answer if others else "")


def statements(name: str, side: int | None, seed: int, split: Split) -> Iterator[str]:
    """Yields finished statements of one side of a contrast, lines of code without end.

    They are what may stand before a prompt. Where `side` is None they show no contrast: numbers are assigned
    to names.
    """
    rng = random.Random(seed_of(f"{name}/{split}/{seed}/{side}/statements"))
    while True:
        d = Draw(rng, split)
        lines = [f"{d.new()} = {d.number()}"] if side is None else CONTRASTS[name].write(d, side).lines
        yield "".join(f"{line}\n" for line in lines)


def _pair(name: str, key: int, split: Split, fixed: Mapping[str, int]) -> Pair:
    contrast = CONTRASTS[name]
    # The surroundings: everything that both programs share, their knobs apart from those of what is cut.
    d = Draw(random.Random(key), split)
    outer = Draw(d.rng, split, fixed=fixed)
    places = {_DEPTHS[place]: place for place in contrast.places}
    place = places[outer.knob("depth", list(places))]
    template, lead = d.either(*_LEADS[split].items())
    beginning = lead(d)
    count = outer.knob("distractors", contrast.distractors)
    sides = [*d.either((0, 1), (1, 0)), d.either(0, 1)] if count != 1 else [d.either(0, 1)]
    distractors = []
    d.fixed = {knob: fixed[knob] for knob in contrast.alike if knob in fixed}
    for side in sides[:count]:
        distractors.append(contrast.write(d, side).lines)
        d.fixed = {knob: d.knobs[knob] for knob in contrast.alike}
    statement = [d.statement()] if d.chance(0.3) else []

    ends: list[list[str]] = []
    needs = dict(d.needs)
    knobs = dict(outer.knobs)
    for side in (0, 1):
        inner = Draw(random.Random(key + 1), split, cut=CUT, fixed={**d.fixed, **fixed})
        inner.taken, inner.needs = set(d.taken), dict(d.needs)
        ends.append(contrast.write(inner, side).lines)
        needs |= inner.needs
        knobs |= inner.knobs
    d.taken |= set(needs)

    around = _surroundings(d, place, needs)
    before = [*imports(d, needs), beginning]
    first, second = (_program([*before, *around([*distractors, statement, end])]) for end in ends)
    return Pair(first=first, second=second, template=f"{place} after {template}", knobs=knobs)


def _program(blocks: list[list[str]]) -> Program:
    """Returns a program from its blocks of lines, one of which is marked where it is to be cut."""
    # A cut at the start of a line comes before that line's indentation.
    text = re.sub(rf"^( +){CUT}", rf"{CUT}\1", joined(blocks), flags=re.MULTILINE)
    return cut_program(text)


# ---- Surroundings ----


def _lead_assignment(d: Draw) -> list[str]:
    return [f"{d.new()} = {d.number()}"]


def _lead_function(d: Draw) -> list[str]:
    argument = d.new()
    return [f"def {d.function()}({argument}):", f"    return {argument}"]


def _lead_import(d: Draw) -> list[str]:
    return [f"import {d.one(words.MODULES)}"]


def _lead_print(d: Draw) -> list[str]:
    return [f"print({d.quoted(d.phrase(1, 3))})"]


def _lead_from(d: Draw) -> list[str]:
    return [f"from {d.one(words.MODULES)} import {d.one(words.VERBS)}"]


def _lead_docstring(d: Draw) -> list[str]:
    return [f'"""{d.one(words.VERBS).capitalize()} the {d.phrase(1, 2)}."""']


_DEPTHS: dict[Place, int] = {"module": 0, "definition": 0, "function": 1, "method": 2}
"""Levels of indentation of a snippet."""

_LEADS: dict[Split, dict[str, Callable[[Draw], list[str]]]] = {
    "search": {"assignment": _lead_assignment, "function": _lead_function},
    "discretize": {"import": _lead_import, "print": _lead_print},
    "report": {"from": _lead_from, "docstring": _lead_docstring},
}
"""How a program begins; each split has its own ways."""


def _surroundings(
    d: Draw, place: Place, needs: Mapping[str, Kind]
) -> Callable[[list[list[str]]], list[list[str]]]:
    """Returns a function that puts snippets where they stand, and what they need before them."""
    if place == "definition":
        return lambda snippets: [lines for lines in snippets if lines]
    given = {name: kind for name, kind in needs.items() if kind != "call"}
    if place == "module":
        lines = [f"{name} = {d.value(name, kind)}" for name, kind in given.items()]
        return lambda snippets: [[*lines, *itertools.chain(*snippets)]]
    receiver = ["self"] if place == "method" else []
    head = f"def {d.function()}({', '.join([*receiver, *given])}):"
    name = d.one(words.NOUNS).capitalize()

    def block(snippets: list[list[str]]) -> list[list[str]]:
        lines = [head, *indented(list(itertools.chain(*snippets)))]
        return [lines] if place == "function" else [[f"class {name}:", *indented(lines)]]

    return block

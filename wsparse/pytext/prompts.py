"""Pairs of programs: one draw of a contrast written twice, once for each side, in the same surroundings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import itertools
import random

from wsparse.pytext import words
from wsparse.pytext.contrasts import CONTRASTS, Contrast, Place
from wsparse.pytext.draw import Draw, Kind
from wsparse.pytext.words import Split

_CUT = "¦"
"""Marks in a program where the prompt ends and, where the form does not say it, the answer."""


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
    """

    first: Program
    second: Program
    template: str = ""


def pairs(name: str, seed: int, split: Split) -> Iterator[Pair]:
    """Yields pairs of a contrast without end, always the same for the same arguments.

    Args:
      name: A name in `CONTRASTS`.
      seed: Names the stream of pairs.
      split: Which templates and fillers to use; splits have neither in common.
    """
    for index in itertools.count():
        key = hashlib.blake2b(f"{name}/{split}/{seed}/{index}".encode(), digest_size=8).digest()
        yield _pair(CONTRASTS[name], int.from_bytes(key, "big"), split)


def _pair(contrast: Contrast, key: int, split: Split) -> Pair:
    draws = [Draw(random.Random(key), split, cut=_CUT, strings=contrast.strings) for _ in range(2)]
    sides = [contrast.write(d, side) for side, d in enumerate(draws)]
    # The surroundings know the names of both sides, and give both what either needs.
    d = draws[0]
    d.taken |= draws[1].taken
    needs = sides[0].needs | sides[1].needs
    place: Place = d.either(*contrast.places)
    name, lead = d.either(*_LEADS[split].items())
    beginning = lead(d)
    opening, depth = _opening(d, place, needs)
    # Two blank lines around functions and classes, one elsewhere.
    gap = "\n" if place == "module" and name != "function" else "\n\n"
    first, second = (_program(f"{beginning}{gap}{opening}", snippet.lines, depth) for snippet in sides)
    return Pair(first=first, second=second, template=f"{place} after {name}")


def _program(context: str, lines: list[str], depth: int) -> Program:
    """Returns a program from its context and a snippet that is still to be indented and cut."""
    # A cut at the start of a line comes before that line's indentation.
    indentation = " " * depth
    body = "".join(
        f"{_CUT}{indentation}{line[1:]}\n" if line.startswith(_CUT) else f"{indentation}{line}\n"
        for line in lines
    )
    prompt, answer, *others = (context + body).split(_CUT)
    return Program(prompt=prompt, rest=answer + "".join(others), answer=answer if others else "")


# ---- Surroundings ----


def _lead_assignment(d: Draw) -> str:
    return f"{d.new()} = {d.number()}\n{d.new()} = {d.number()}\n"


def _lead_function(d: Draw) -> str:
    argument = d.new()
    return f"def {d.function()}({argument}):\n    return {argument}\n"


def _lead_import(d: Draw) -> str:
    return f"import {d.one(words.MODULES)}\n\n{d.new()} = {d.number()}\n"


def _lead_print(d: Draw) -> str:
    return f"print({d.quoted(d.phrase(1, 3)) if d.strings else d.number()})\n"


def _lead_from(d: Draw) -> str:
    return f"from {d.either('helpers', 'tools')} import {d.one(words.CALLS)}\n"


def _lead_docstring(d: Draw) -> str:
    text = f"{d.one(words.VERBS).capitalize()} the {d.phrase(1, 2)}."
    return f'"""{text}"""\n' if d.strings else f"# {text}\n"


_LEADS: dict[Split, dict[str, Callable[[Draw], str]]] = {
    "search": {"assignment": _lead_assignment, "function": _lead_function},
    "discretize": {"import": _lead_import, "print": _lead_print},
    "report": {"from": _lead_from, "docstring": _lead_docstring},
}
"""How a program begins; each split has its own ways."""


def _opening(d: Draw, place: Place, needs: dict[str, Kind]) -> tuple[str, int]:
    """Returns the lines between a program's beginning and the snippet, and the snippet's indentation."""
    if place == "definition":
        return "", 0
    arguments = ", ".join(needs)
    if place == "module":
        lines, depth = [f"{name} = {d.value(name, kind)}" for name, kind in needs.items()], 0
    elif place == "function":
        lines, depth = [f"def {d.function()}({arguments}):"], 4
    else:
        kind = d.one(words.NOUNS).capitalize()
        receiver = f"self, {arguments}" if arguments else "self"
        lines, depth = [f"class {kind}:", f"    def {d.function()}({receiver}):"], 8
    if d.chance(0.35):
        lines.append(" " * depth + d.statement())
    elif d.chance(0.1):
        lines.append(f"{' ' * depth}# {d.one(words.VERBS)} the {d.phrase(1, 1)}")
    return "".join(f"{line}\n" for line in lines), depth

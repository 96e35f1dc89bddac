"""Synthetic Python modules that show both sides of every contrast.

Real code holds most of the contrasts behind the tasks, but too thinly for a model of two layers to learn them
in minutes. A document made here is a small module of snippets; most snippets show one side of one contrast,
the others what small programs have besides. Every document parses; in one of twenty a
`return` stands outside of a function, which Python refuses to compile.

Every string draws its own quote style, so that the opening quote, not the habit of the file, decides how it
closes; only one document in five keeps to a single style, as people do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
import itertools
import random

from wsparse.errors import UserError
from wsparse.pytext import words
from wsparse.pytext.contrasts import CONTRASTS
from wsparse.pytext.draw import Draw, Kind, Snippet, imports, indented, joined, seed_of
from wsparse.pytext.fillers import FILLERS

SMALLEST, ENOUGH = 300, 800
"""A document gets further snippets until it has a number of bytes drawn from this range."""

# How often a snippet shows the same contrast as the one before.
_AGAIN = 0.4
# How often it is something of which no task is made.
_FILLED = 0.15

_NAMES = tuple(CONTRASTS)
_CUMULATIVE = list(itertools.accumulate(contrast.weight for contrast in CONTRASTS.values()))


def document(seed: int, index: int) -> str:
    """Returns document number `index`, 0 or more, of the stream that any integer `seed` names.

    It is a module of some 300 to 1500 bytes, and depends on nothing but the two arguments.
    """
    if index < 0:
        raise UserError(f"a document's index must be 0 or more, got {index}")
    # `Random` ignores the sign of a seed and takes one number: derive it from both arguments.
    d = Draw(random.Random(seed_of(f"{seed}/{index}")))

    enough = d.between(SMALLEST, ENOUGH)
    blocks: list[list[str]] = []
    needs: dict[str, Kind] = {}
    pending: list[Snippet] = []
    length = d.between(1, 3)
    size = 0
    # Every snippet drawn is used, whatever its length: dropping long ones would tip the balance.
    name = ""
    while size < enough or pending:
        if size < enough:
            # Statements of one kind often stand together: what closed one says nothing about the next.
            name = name if name and d.chance(_AGAIN) else _any_contrast(d)
            if d.chance(_FILLED):
                snippet = d.either(*FILLERS)(d.inside())
            else:
                snippet = CONTRASTS[name].write(d.inside(), d.either(0, 1))
            needs |= snippet.needs
            pending.append(snippet)
        if pending[-1].definition:
            block = pending.pop().lines
        elif len(pending) == length or size >= enough:
            block, pending = _block(d, pending), []
            length = d.between(1, 3)
        else:
            continue
        blocks.append(block)
        size += sum(len(line) + 1 for line in block)

    style = d.rng.random()
    if style < 0.2:
        blocks = [_one_style(block, "'" if style < 0.1 else '"') for block in blocks]
    return joined([*_header(d, needs), *blocks])


def documents(seed: int = 0, *, start: int = 0) -> Iterator[str]:
    """Yields `document(seed, start)`, `document(seed, start + 1)` and so on without end."""
    return (document(seed, index) for index in itertools.count(start))


def _any_contrast(d: Draw) -> str:
    """Returns the name of a contrast, chosen by weight."""
    return _NAMES[bisect_right(_CUMULATIVE, d.rng.random() * _CUMULATIVE[-1])]


def _body(d: Draw, snippets: Sequence[Snippet]) -> list[str]:
    lines: list[str] = []
    for number, snippet in enumerate(snippets):
        if number and d.chance(0.15):
            lines.append("")
        if d.chance(0.1):
            lines.append(f"# {d.one(words.VERBS, early=True)} the {d.phrase(1, 2)}")
        lines += snippet.lines
    return lines


def _block(d: Draw, snippets: Sequence[Snippet]) -> list[str]:
    """Returns statements as they are, or as the body of a function that is given what they need."""
    needs: dict[str, Kind] = {
        name: kind for snippet in snippets for name, kind in snippet.needs.items() if kind != "call"
    }
    assignments = (f"{name} = {d.value(name, kind)}" for name, kind in needs.items())
    place = d.rng.random()
    if place < 0.35:
        return [*assignments, *_body(d, snippets)]
    arguments, others = list(needs)[:4], list(needs)[4:]
    signature = d.signature(arguments, defaults=d.chance(0.5))
    name = d.function()
    docstring = f'"""{name.replace("_", " the ").capitalize()}."""'
    body = [
        *([docstring] if d.chance(0.15) else []),
        *(f"{name} = {d.value(name, needs[name])}" for name in others),
        *_body(d, snippets),
    ]
    results = [snippet.result for snippet in snippets if snippet.result]
    if results and d.chance(0.75):
        body.append(f"return {results[-1]}")
    if place < 0.85:
        return [f"def {name}({signature}):", *indented(body)]
    inside = d.inside()
    attributes = [inside.new() for _ in range(d.between(1, 3))]
    constructor = d.constructor(attributes, reverse=d.chance(0.5))
    receiver = f"self, {signature}" if signature else "self"
    return [*constructor, "", *indented([f"def {name}({receiver}):", *indented(body)])]


def _header(d: Draw, needs: dict[str, Kind]) -> list[list[str]]:
    """Returns the docstring and the imports of a module, each a block of lines."""
    blocks: list[list[str]] = []
    if d.chance(0.2):
        text = f"{d.one(words.VERBS, early=True)} the {d.phrase(1, 3)}".capitalize()
        blocks.append([f'"""{text}."""'])
    if d.chance(0.2):
        blocks.append([f"import {d.one(words.MODULES)}"])
    return [*blocks, *imports(d, needs)]


def _one_style(lines: list[str], quote: str) -> list[str]:
    """Returns the lines with the strings in one quote style, but for docstrings and lines with both."""
    other = "'" if quote == '"' else '"'
    return [line if '"""' in line or quote in line else line.replace(other, quote) for line in lines]

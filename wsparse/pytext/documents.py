"""Synthetic Python modules that show both sides of every contrast.

Real code holds most of the contrasts behind the tasks (a list closed by `]` or `]]`, a variable updated by
`.add` or `+=`), but too thinly for a model of two layers to learn them in minutes. The documents made here
hold little else: each is a small module put together from snippets, and a snippet shows one side of one
contrast.

Every string draws its own quote style, so that the opening quote, not the habit of the file, decides how it
closes; only one document in five keeps to a single style, as people do.

    python -m wsparse.pytext.documents --megabytes=5     # bytes per second and distinct documents
    python -m wsparse.pytext.documents --examples=3      # three documents
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
import hashlib
import itertools
import math
import random
import time

from absl import flags

from wsparse.command import run_command
from wsparse.errors import UserError
from wsparse.pytext import words
from wsparse.pytext.contrasts import CONTRASTS
from wsparse.pytext.draw import Draw, Kind, Snippet, indented

SMALLEST, ENOUGH = 300, 800
"""A document gets further snippets until it has a number of bytes drawn from this range."""

_CONTRASTS = tuple(CONTRASTS.values())
_CUMULATIVE = list(itertools.accumulate(contrast.weight for contrast in _CONTRASTS))


def document(seed: int, index: int) -> str:
    """Returns document number `index` of the stream `seed`: a module of some 300 to 1500 bytes.

    The text depends on nothing but the two arguments.

    Args:
      seed: Any integer; names the stream.
      index: Position in the stream, from 0.
    """
    if index < 0:
        raise UserError(f"a document's index must be 0 or more, got {index}")
    # `Random` ignores the sign of a seed and takes one number: derive it from both arguments.
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    d = Draw(random.Random(int.from_bytes(digest, "big")))

    enough = d.between(SMALLEST, ENOUGH)
    blocks: list[list[str]] = []
    needs: dict[str, Kind] = {}
    pending: list[Snippet] = []
    length = d.between(1, 3)
    size = 0
    # Every snippet drawn is used, whatever its length: dropping long ones would tip the balance.
    while size < enough or pending:
        block = None
        if size < enough:
            snippet = _snippet(d.inside())
            needs |= snippet.needs
            if snippet.definition:
                block = snippet.lines
            else:
                pending.append(snippet)
        if block is None and (len(pending) == length or size >= enough):
            block = _block(d, pending)
            pending = []
            length = d.between(1, 3)
        if block is not None:
            blocks.append(block)
            size += sum(len(line) + 1 for line in block)

    style = d.rng.random()
    if style < 0.2:
        blocks = [_one_style(block, "'" if style < 0.1 else '"') for block in blocks]
    return _joined([*_header(d, needs), *blocks])


def documents(seed: int = 0, *, start: int = 0) -> Iterator[str]:
    """Yields `document(seed, start)`, `document(seed, start + 1)` and so on without end."""
    return (document(seed, index) for index in itertools.count(start))


def _snippet(d: Draw) -> Snippet:
    """Returns one side of one contrast, chosen by weight."""
    contrast = _CONTRASTS[bisect_right(_CUMULATIVE, d.rng.random() * _CUMULATIVE[-1])]
    return contrast.write(d, d.either(0, 1))


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
    arguments = list(needs)[:4]
    signature = d.signature(arguments, defaults=d.chance(0.5))
    name = d.function()
    docstring = f'"""{name.replace("_", " the ").capitalize()}."""'
    body = [
        *([docstring] if d.chance(0.15) else []),
        *(f"{name} = {d.value(name, needs[name])}" for name in list(needs)[4:]),
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
    blocks = []
    if d.chance(0.2):
        text = f"{d.one(words.VERBS, early=True)} the {d.phrase(1, 3)}".capitalize()
        blocks.append([f'"""{text}."""'])
    if d.chance(0.2):
        blocks.append([f"import {d.one(words.MODULES)}"])
    calls = sorted(name for name, kind in needs.items() if kind == "call")
    if calls:
        blocks.append([f"from {d.either('helpers', 'tools')} import {', '.join(calls)}"])
    return blocks


def _joined(blocks: Sequence[list[str]]) -> str:
    """Returns the text, with two blank lines around functions and classes, one between other blocks."""
    lines = list(blocks[0])
    for before, after in itertools.pairwise(blocks):
        defines = any(block[0].startswith(("def ", "class ")) for block in (before, after))
        lines += ["", "", *after] if defines else ["", *after]
    return "\n".join(lines) + "\n"


def _one_style(lines: list[str], quote: str) -> list[str]:
    """Returns the lines with every string but docstrings in one quote style; texts hold no quotes."""
    other = "'" if quote == '"' else '"'
    return [line if '"""' in line else line.replace(other, quote) for line in lines]


def main(argv: Sequence[str]) -> None:
    """Prints documents, or measures how fast they are made."""
    del argv
    options = flags.FLAGS
    if not (options.megabytes > 0 and math.isfinite(options.megabytes)):
        raise UserError(f"--megabytes must be a size above 0, got {options.megabytes}")
    if options.examples:
        for index in range(options.examples):
            print(f"{'=' * 20} seed {options.seed}, document {index}")
            print(document(options.seed, index))
        return
    size, made, distinct = 0, 0, set()
    start = time.perf_counter()
    for text in documents(options.seed):
        size += len(text)
        made += 1
        distinct.add(hashlib.blake2b(text.encode(), digest_size=16).digest())
        if size >= options.megabytes * 1e6:
            break
    seconds = time.perf_counter() - start
    print(
        f"{made} documents ({len(distinct)} distinct, {size / made:.0f} bytes on average), "
        f"{size / 1e6:.2f} MB in {seconds:.2f} s: {size / 1e6 / seconds:.2f} MB/s"
    )


def _define_flags() -> None:
    flags.DEFINE_integer("seed", 0, "Names the stream of documents.")
    flags.DEFINE_integer("examples", 0, "Only print so many documents.", lower_bound=0)
    flags.DEFINE_float("megabytes", 5.0, "How much text to time.")


if __name__ == "__main__":
    _define_flags()
    run_command(main)

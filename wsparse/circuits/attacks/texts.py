"""Texts that stand before prompts: neutral statements, and finished ones of either side of a task."""

from __future__ import annotations

from collections.abc import Iterator
import itertools
from typing import NamedTuple

from wsparse.circuits.attacks.record import Kind
from wsparse.circuits.pairs import Task, TaskBatch
from wsparse.data.tokenizer import Tokenizer
from wsparse.errors import UserError
from wsparse.pytext import prompts
from wsparse.stories import prompts as story_prompts

# Programs of a user's task that texts are made of; its stream may be endless.
_PROGRAMS = 512


class Text(NamedTuple):
    """Tokens that stand before the prompts; `side` is that of its statements, None for neutral ones."""

    side: int | None
    statements: int
    ids: list[int]
    text: str

    def kind(self, side: int) -> Kind:
        """Returns what the text is for prompts of a side."""
        return "neutral" if self.side is None else "own" if self.side == side else "other"


def make_texts(
    task: Task,
    tokenizer: Tokenizer,
    batch: TaskBatch,
    *,
    context: int,
    most_statements: int,
    draws: int,
    seed: int,
    domain: str = "python",
) -> list[Text]:
    """Returns texts that fit before every prompt, each the beginning of the next longer one.

    Args:
      task: The task that `batch` is of.
      tokenizer: The model's.
      batch: The prompts.
      context: Tokens that the model reads.
      most_statements: Numbers of statements are powers of two up to it.
      draws: Texts of every side and number of statements.
      seed: Seed of the draws.
      domain: The kind of text that the model reads, as in `config.data.domain`.

    Raises:
      UserError: No text fits.
    """
    room = context - batch.tokens.shape[1]
    lengths = [2**i for i in range(most_statements.bit_length())]
    texts = []
    for side, draw in itertools.product((None, 0, 1), range(draws)):
        stream = _statements(task, side, seed * draws + draw, domain)
        statements = list(itertools.islice(stream, lengths[-1]))
        for n in lengths:
            if n > len(statements):
                break
            text = "".join(statements[:n])
            ids = tokenizer.encode(text)
            if len(ids) <= room and _stands(tokenizer, text, ids, batch):
                texts.append(Text(side, n, ids, text))
    if not texts:
        raise UserError(
            f"no text fits before the prompts of task {task.name!r}: the longest has {batch.tokens.shape[1]} "
            f"tokens, of {context} that the model reads, or its start merges with a line end"
        )
    return texts


def _statements(task: Task, side: int | None, seed: int, domain: str) -> Iterator[str]:
    """Yields statements of one side of a task, or neutral ones."""
    if task.statements is not None:
        yield from task.statements(side, seed, "report")
        return
    if side is None:
        of_domain = story_prompts if domain == "stories" else prompts
        yield from of_domain.statements(task.name, None, seed, "report")
        return
    # Of a user's task, finished programs of the report split, from a place of its own for each seed.
    pairs = itertools.islice(task.stream(seed, "report"), _PROGRAMS)
    programs = [(pair.first, pair.second)[side] for pair in pairs]
    for index in range(len(programs)):
        program = programs[(index + 7 * seed) % len(programs)]
        yield f"{(program.prompt + program.rest).rstrip()}\n"


def _stands(tokenizer: Tokenizer, text: str, ids: list[int], batch: TaskBatch) -> bool:
    """Returns whether prompts keep their tokens after the text."""
    rows = zip(batch.prompts, batch.tokens, batch.position, strict=True)
    return all(tokenizer.encode(text + p) == [*ids, *row[: n + 1].tolist()] for p, row, n in rows)

"""The 20 tasks of Python code and those of little stories, by name, and tasks of a user's own.

    batch = build("bracket_counting", tokenizer, 64, seed=0)
    logits_BPV, _ = model.forward(
        params, batch.tokens, config, positions_BP=batch.position[:, None]
    )
    loss = task_loss(logits_BPV[:, 0], batch.answer, batch.other)

The prompts are another reading of the grammars behind the sources `idioms` (`wsparse.pytext.contrasts`) and
`stories` (`wsparse.stories.contrasts`). They are divided into three splits, for the search of a circuit, for
its discretization and for the report: two splits share neither templates nor names, words and numbers, except
those that decide, and names of files.

`python -m wsparse.tasks` shows how well a model does the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
from functools import partial
import hashlib
import logging
import os
import pathlib
import runpy
import sys
import traceback
from typing import Any

from wsparse import files
from wsparse.circuits import pairs
from wsparse.circuits.pairs import Task, TaskBatch, margins, padded, task_accuracy, task_loss
from wsparse.data.tokenizer import Tokenizer
from wsparse.errors import UserError, closest, quoted
from wsparse.pytext import prompts
from wsparse.pytext.contrasts import CONTRASTS, Form
from wsparse.pytext.prompts import Pair, Program
from wsparse.pytext.words import SPLITS, Split
from wsparse.stories import contrasts as story_contrasts
from wsparse.stories import prompts as story_prompts

__all__ = [
    "SPLITS", "STORY_TASKS", "TASKS", "Form", "Pair", "Program", "Split", "Task", "TaskBatch", "build",
    "build_all", "built_in", "find", "load", "margins", "names_of", "padded", "task_accuracy", "task_loss",
]  # fmt: skip

log = logging.getLogger(__name__)

TASKS: dict[str, Task] = {
    name: Task(
        name=name,
        summary=contrast.summary,
        stream=partial(prompts.pairs, name),
        forms=contrast.forms,
        local=contrast.local,
        has_knobs=True,
        domain="python",
        statements=partial(prompts.statements, name),
    )
    for name, contrast in CONTRASTS.items()
}
"""Those of Python code."""

STORY_TASKS: dict[str, Task] = {
    name: Task(
        name=name,
        summary=contrast.summary,
        stream=partial(story_prompts.pairs, name),
        forms=contrast.forms,
        has_knobs=True,
        domain="stories",
        statements=partial(story_prompts.statements, name),
    )
    for name, contrast in story_contrasts.CONTRASTS.items()
}
"""Those of little stories."""


def names_of(domain: str) -> tuple[str, ...]:
    """Returns the names of all tasks for a run whose text is of a domain, see `config.data.domain`."""
    return tuple({"python": TASKS, "stories": STORY_TASKS}[domain])


def built_in() -> dict[str, Task]:
    """Returns all tasks that are not a user's own, by name."""
    return {**TASKS, **STORY_TASKS}


def build(
    task: str | Task,
    tokenizer: Tokenizer,
    n_pairs: int,
    seed: int,
    *,
    split: Split = "search",
    max_tokens: int | None = None,
    knobs: Mapping[str, int] | None = None,
) -> TaskBatch:
    """Encodes `n_pairs` pairs of a task, or of a built-in one by its name; see `pairs.build`."""
    task = _named(task) if isinstance(task, str) else task
    return pairs.build(task, tokenizer, n_pairs, seed, split=split, max_tokens=max_tokens, knobs=knobs)


def build_all(
    tasks: Iterable[Task],
    tokenizer: Tokenizer,
    n_pairs: Mapping[Split, int],
    seed: int,
    *,
    max_tokens: int,
) -> tuple[list[dict[Split, TaskBatch]], dict[str, UserError]]:
    """Returns the batches of tasks by split, padded to one length, and why other tasks are refused."""
    built: list[dict[Split, TaskBatch]] = []
    refused: dict[str, UserError] = {}
    for task in tasks:
        try:
            built.append(
                {
                    split: build(task, tokenizer, count, seed, split=split, max_tokens=max_tokens)
                    for split, count in n_pairs.items()
                }
            )
        except UserError as error:
            refused[task.name] = error
    length = max((batch.tokens.shape[1] for batches in built for batch in batches.values()), default=0)
    return [{split: padded(batch, length) for split, batch in batches.items()} for batches in built], refused


def find(name: str) -> Task:
    """Returns the built-in task of a name, or the task of a .jsonl or .py file.

    Raises:
      UserError: The task does not exist, or its file is malformed.
    """
    return load(name) if name.endswith((".jsonl", ".py")) else _named(name)


def find_all(names: Iterable[str]) -> list[Task]:
    """Returns the tasks of names and files: each once, since what is found for a task has its name.

    Raises:
      UserError: As in `find`, or two tasks have one name, a built-in one and that of a file for instance.
    """
    found: dict[str, Task] = {}
    for name in names:
        task = find(name)
        if (built_in() | found).get(task.name, task) is not task:
            raise UserError(f"{name}: another task has the name {quoted(task.name)} too: rename this one")
        found[task.name] = task
    return list(found.values())


def _named(name: str) -> Task:
    known = built_in()
    if name not in known:
        raise UserError(f"no task {quoted(name)}{closest(name, known)}; tasks are {', '.join(known)}")
    return known[name]


# ---- A user's own tasks ----

_FIELDS = ("prompt_a", "prompt_b", "answer_a", "answer_b")


def load(path: str | os.PathLike[str]) -> Task:
    """Returns the task of a file, for `build`.

    A `.jsonl` file holds one pair per line, an object of the strings `prompt_a`, `prompt_b`, `answer_a` and
    `answer_b`. A `.py` file defines `TASK = Task(...)`, or a function `pairs()` that yields tuples of these
    four strings. It is executed, so load only what you trust.

    Pairs are divided into the splits by their content: half for the search, a quarter for each other split.
    A pair that repeats an earlier prompt is dropped, with a warning that counts such pairs.

    Raises:
      UserError: The file is missing, or one of its lines or pairs is malformed.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".jsonl", ".py"):
        raise UserError(f"{path}: a task file must end in .jsonl or .py")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no task file at {path}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return _from_python(path) if path.suffix == ".py" else _listed(path, _jsonl_pairs(path, content))


def _listed(path: pathlib.Path, listed: Iterable[tuple[str, tuple[str, ...]]]) -> Task:
    """Returns the task of a list of pairs: the place of each, and its four strings."""
    by_split: dict[Split, list[Pair]] = {split: [] for split in SPLITS}
    places: dict[str, str] = {}
    repeated: list[str] = []
    for place, strings in listed:
        _check(place, strings)
        prompt_a, prompt_b, answer_a, answer_b = strings
        if earlier := places.get(prompt_a) or places.get(prompt_b):
            repeated.append(f"{place}, as at {earlier}")
            continue
        places |= {prompt_a: place, prompt_b: place}
        digest = hashlib.blake2b(f"{prompt_a}\0{prompt_b}".encode(), digest_size=8).digest()
        split = ("search", "search", "discretize", "report")[digest[0] % 4]
        pair = Pair(
            first=Program(prompt=prompt_a, rest=answer_a, answer=answer_a),
            second=Program(prompt=prompt_b, rest=answer_b, answer=answer_b),
            template=place,
        )
        by_split[split].append(pair)
    if not places:
        raise UserError(f"task {path.stem!r} has no pairs")
    if repeated:
        message = "%s: dropped %d pairs that repeat an earlier prompt (first at %s)"
        log.warning(message, path, len(repeated), repeated[0])
    return Task(
        name=path.stem, summary="a task from a file", stream=partial(_shuffled, by_split), equal_lengths=False
    )


def _check(place: str, strings: tuple[str, ...]) -> None:
    """Raises a UserError if a pair's four strings do not make a decision."""
    for field, text in zip(_FIELDS, strings, strict=True):
        if not text:
            raise UserError(f"{place}: {field} must not be empty")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{place}: {field} holds half of a surrogate pair: {quoted(text)}")
    prompt_a, prompt_b, answer_a, answer_b = strings
    if prompt_a == prompt_b:
        raise UserError(f"{place}: prompt_a and prompt_b are the same, nothing decides")
    if answer_a == answer_b:
        raise UserError(f"{place}: answer_a and answer_b are the same: {quoted(answer_a)}")


def _shuffled(by_split: dict[Split, list[Pair]], seed: int, split: Split) -> Iterator[Pair]:
    def key(pair: Pair) -> bytes:
        text = f"{seed}\0{pair.first.prompt}\0{pair.second.prompt}"
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    return iter(sorted(by_split[split], key=key))


def _jsonl_pairs(path: pathlib.Path, content: bytes) -> Iterator[tuple[str, tuple[str, ...]]]:
    for number, line in enumerate(content.splitlines(), start=1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        values = files.parse_json(line, place)
        if unknown := sorted(values.keys() - set(_FIELDS)):
            near = f"{quoted(unknown[0])}{closest(unknown[0], _FIELDS)}"
            raise UserError(f"{place}: unknown field {near}; it has {', '.join(_FIELDS)}")
        for field in _FIELDS:
            if not isinstance(values.get(field), str):
                got = type(values[field]).__name__ if field in values else "nothing"
                raise UserError(f"{place}: {field!r} must be a string, got {got}")
        yield place, tuple(values[field] for field in _FIELDS)


def _from_python(path: pathlib.Path) -> Task:
    with _users_code(path):
        names = runpy.run_path(str(path))
    if "TASK" in names:
        task = names["TASK"]
        if not isinstance(task, Task):
            raise UserError(f"{path}: TASK must be a wsparse.circuits.tasks.Task, got {ascii(task)[:80]}")
        return dataclasses.replace(task, stream=partial(_checked, path, task.stream))
    if not callable(names.get("pairs")):
        raise UserError(f"{path}: must define TASK = Task(...) or a function pairs()")
    with _users_code(path):
        listed = list(names["pairs"]())
    return _listed(path, _python_pairs(path, listed))


def _checked(
    path: pathlib.Path, stream: Callable[..., Iterator[Pair]], seed: int, split: Split, **knobs: Any
) -> Iterator[Pair]:
    """Yields the pairs of a user's stream."""
    with _users_code(path):
        for pair in stream(seed, split, **knobs):
            if not isinstance(pair, Pair):
                raise TypeError(f"the stream of TASK must yield Pair, got {ascii(pair)[:80]}")
            yield pair


@contextlib.contextmanager
def _users_code(path: pathlib.Path) -> Iterator[None]:
    """Turns whatever the code of a file raises into a UserError that names the line of the file."""
    try:
        yield
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
        place = f"{path}:{lines[-1]}" if lines else str(path)
        message = f"{place}: {type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(message) from error


def _python_pairs(path: pathlib.Path, listed: Sequence[Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for number, pair in enumerate(listed, start=1):
        place = f"{path}: pair {number}"
        strings = tuple(pair) if isinstance(pair, (tuple, list)) else ()
        if len(strings) != len(_FIELDS) or not all(isinstance(text, str) for text in strings):
            raise UserError(f"{place}: must be four strings ({', '.join(_FIELDS)}), got {ascii(pair)[:80]}")
        yield place, strings


if __name__ == "__main__":
    print("note: this command is now python -m wsparse.tasks", file=sys.stderr)
    runpy.run_module("wsparse.tasks", run_name="__main__", alter_sys=True)

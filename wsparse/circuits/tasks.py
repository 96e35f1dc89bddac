"""The 20 tasks: pairs of Python prompts that differ only in what decides the next token.

    batch = build("bracket_counting", tokenizer, 64, seed=0)
    logits_BPV, _ = model.forward(
        params, batch.tokens, config, positions_BP=batch.position[:, None]
    )
    loss = task_loss(logits_BPV[:, 0], batch.answer, batch.other)

The prompts look like the text of `wsparse.data.idioms`. They are divided into three splits, for the search of
a circuit, for its discretization and for the report: two splits share neither templates nor names, words and
numbers.

A user's own task is a JSONL file of pairs or a small Python file; see `load`. `python -m wsparse.tasks` shows
how well a model does the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
from functools import partial
import hashlib
import itertools
import json
import logging
import os
import pathlib
import random
import runpy
import sys
import traceback
from typing import Any, Literal, TypeVar

from wsparse.circuits import pairs
from wsparse.circuits.pairs import (
    SPLITS,
    Form,
    Pair,
    Program,
    Split,
    Task,
    TaskBatch,
    margins,
    padded,
    task_accuracy,
    task_loss,
)
from wsparse.data import idioms
from wsparse.data.tokenizer import Tokenizer
from wsparse.errors import UserError, closest

__all__ = [
    "SPLITS",
    "TASKS",
    "Form",
    "Pair",
    "Program",
    "Split",
    "Task",
    "TaskBatch",
    "build",
    "find",
    "load",
    "margins",
    "padded",
    "task_accuracy",
    "task_loss",
]

T = TypeVar("T")

log = logging.getLogger(__name__)


def build(
    task: str | Task,
    tokenizer: Tokenizer,
    n_pairs: int,
    seed: int,
    *,
    split: Split = "search",
    max_tokens: int | None = None,
) -> TaskBatch:
    """Encodes `n_pairs` pairs of a task, or of the name of one; see `pairs.build`."""
    task = _named(task) if isinstance(task, str) else task
    return pairs.build(task, tokenizer, n_pairs, seed, split=split, max_tokens=max_tokens)


def find(name: str) -> Task:
    """The task of a name in `TASKS`, or of a .jsonl or .py file.

    Raises:
      UserError: there is none, or the file is not as it should be.
    """
    return load(name) if name.endswith((".jsonl", ".py")) else _named(name)


def _named(name: str) -> Task:
    if name not in TASKS:
        raise UserError(f"no task {name!r}{closest(name, TASKS)}; tasks are {', '.join(TASKS)}")
    return TASKS[name]


# ---- Drawing programs ----

_CUT = "¦"
"""Marks in a core's text where the prompt ends and, where the form does not say it, the answer."""


@dataclasses.dataclass(frozen=True)
class _Core:
    """The statements that hold the decision, at indentation zero, without what is around them.

    Attributes:
      first: the first side, with `_CUT` at the end of the prompt.
      second: the second side.
      needs: names that the statements read, and the kind of value that each should have.
    """

    first: str
    second: str
    needs: dict[str, idioms.Kind] = dataclasses.field(default_factory=dict)


def _owners() -> dict[object, Split]:
    """Which split has which filler; a word that stands in several lists has one owner."""
    lists = (
        *(idioms.NOUNS, idioms.FLAGS, idioms.VERBS, idioms.WORDS, idioms.PREFIXES, idioms.LETTERS),
        *(idioms.INDICES, idioms.HANDLES, idioms.CALLS, idioms.MODULES, idioms.SUFFIXES),
        *(range(10), range(10, 100)),
    )
    owners: dict[object, Split] = {}
    for fillers in lists:
        # Lists begin with what is common: dealing them out gives each split its part of that.
        fresh = [filler for filler in fillers if filler not in owners]
        for index, filler in enumerate(fresh):
            owners[filler] = SPLITS[index % len(SPLITS)]
    return owners


_OWNERS = _owners()


@functools.cache
def _share(fillers: Sequence[T], split: Split) -> tuple[T, ...]:
    """The fillers that belong to a split, common ones first."""
    return tuple(filler for filler in fillers if _OWNERS[filler] == split)


class _Draw:
    """The fillers of one pair; no name is handed out twice."""

    def __init__(self, rng: random.Random, split: Split):
        self.rng = rng
        self.split: Split = split
        self.taken: set[str] = set()
        # Whether what stands around the core may hold strings.
        self.strings = True

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def either(self, *choices: T) -> T:
        """One of a few turns of phrase, which all splits share."""
        return choices[int(self.rng.random() * len(choices))]

    def one(self, fillers: Sequence[T], *, early: bool = False) -> T:
        """A filler of the split; `early` prefers the front of the list, as the idioms do."""
        share = _share(fillers, self.split)
        return share[int(self.rng.random() ** (2 if early else 1) * len(share))]

    def name(self, *, plain: bool = False, plural: bool = False) -> str:
        """A new variable; a `plain` one is a single word."""
        while True:
            name = self.one(idioms.NOUNS, early=True)
            if not plain and self.chance(0.1):
                name = f"{self.one(idioms.PREFIXES)}_{name}"
            if plural:
                name = f"{name}s"
            if self.free(name):
                return name

    def of(self, fillers: Sequence[str]) -> str:
        """A new name from a list."""
        while True:
            name = self.one(fillers)
            if self.free(name):
                return name

    def free(self, name: str) -> bool:
        """Take `name` if nobody has it."""
        free = name not in self.taken
        self.taken.add(name)
        return free

    def number(self) -> str:
        return str(self.one(range(10) if self.chance(0.8) else range(10, 100)))

    def numbers(self, low: int, high: int) -> str:
        return ", ".join(self.number() for _ in range(self.count(low, high)))

    def count(self, low: int, high: int) -> int:
        return low + int(self.rng.random() * (high - low + 1))

    def words(self, low: int, high: int) -> str:
        count = self.count(low, high)
        return " ".join(self.one(idioms.WORDS, early=True) for _ in range(count))

    def quoted(self, text: str) -> str:
        return self.either(f"'{text}'", f'"{text}"')

    def function(self) -> str:
        verb = self.one(idioms.VERBS, early=True)
        return f"{verb}_{self.one(idioms.NOUNS, early=True)}" if self.chance(0.6) else verb

    def statement(self) -> str:
        """A line that has nothing to do with the task."""
        if self.chance(0.5) or not self.strings:
            return f"{self.name()} = {self.number()}"
        return f"print({self.quoted(self.words(1, 2))})"

    def condition(self, needs: dict[str, idioms.Kind]) -> str:
        if self.chance(0.7):
            flag = self.of(idioms.FLAGS)
            needs[flag] = "flag"
            return flag if self.chance(0.8) else f"not {flag}"
        name = self.name()
        needs[name] = "number"
        return f"{name} {self.either('>', '<', '==')} {self.number()}"

    def items(self) -> tuple[str, str]:
        """A new name for the elements of a list, and the list's, its plural."""
        while True:
            item = self.name(plain=True)
            if self.free(f"{item}s"):
                return item, f"{item}s"

    def value(self, name: str, kind: idioms.Kind) -> str:
        if kind == "number":
            return self.number()
        if kind == "numbers":
            return f"[{self.numbers(1, 3)}]"
        if kind == "words":
            return f"{self.quoted(self.words(2, 3))}.split()"
        if kind == "flag":
            return self.either("True", "False")
        # A path, named after the file.
        return self.quoted(f"{name.split('_')[0]}.{self.one(idioms.SUFFIXES)}")


# ---- What stands around a core ----


def _lead_assignment(d: _Draw) -> str:
    return f"{d.name()} = {d.number()}\n{d.name()} = {d.number()}\n"


def _lead_function(d: _Draw) -> str:
    argument = d.name()
    return f"def {d.function()}({argument}):\n    return {argument}\n"


def _lead_import(d: _Draw) -> str:
    return f"import {d.one(idioms.MODULES)}\n\n{d.name()} = {d.number()}\n"


def _lead_print(d: _Draw) -> str:
    return f"print({d.quoted(d.words(1, 3)) if d.strings else d.number()})\n"


def _lead_from(d: _Draw) -> str:
    return f"from {d.either('helpers', 'tools')} import {d.one(idioms.CALLS)}\n"


def _lead_docstring(d: _Draw) -> str:
    text = f"{d.one(idioms.VERBS).capitalize()} the {d.words(1, 2)}."
    return f'"""{text}"""\n' if d.strings else f"# {text}\n"


_LEADS: dict[Split, dict[str, Callable[[_Draw], str]]] = {
    "search": {"assignment": _lead_assignment, "function": _lead_function},
    "discretize": {"import": _lead_import, "print": _lead_print},
    "report": {"from": _lead_from, "docstring": _lead_docstring},
}
"""How a program begins; each split has its own ways."""

Place = Literal["module", "function", "method", "definition"]
_STATEMENT: tuple[Place, ...] = ("module", "function", "method")
_INSIDE: tuple[Place, ...] = ("function", "method")


def _opening(d: _Draw, place: Place, needs: dict[str, idioms.Kind]) -> tuple[str, int]:
    """The lines between a program's beginning and the core, and the core's indentation."""
    if place == "definition":
        return "", 0
    arguments = ", ".join(needs)
    if place == "module":
        lines, depth = [f"{name} = {d.value(name, kind)}" for name, kind in needs.items()], 0
    elif place == "function":
        lines, depth = [f"def {d.function()}({arguments}):"], 4
    else:
        kind = d.one(idioms.NOUNS).capitalize()
        receiver = f"self, {arguments}" if arguments else "self"
        lines, depth = [f"class {kind}:", f"    def {d.function()}({receiver}):"], 8
    if d.chance(0.35):
        lines.append(" " * depth + d.statement())
    elif d.chance(0.1):
        lines.append(f"{' ' * depth}# {d.one(idioms.VERBS)} the {d.words(1, 1)}")
    return "".join(f"{line}\n" for line in lines), depth


def _program(context: str, core: str, depth: int) -> Program:
    """A program from its context and a core that is still to be indented and cut."""
    # A cut at the start of a line comes before that line's indentation.
    indentation = " " * depth
    lines = [
        _CUT + indentation + line[1:] if line.startswith(_CUT) else indentation + line
        for line in core.splitlines()
    ]
    core = "".join(f"{line}\n" for line in lines)
    prompt, answer, *more = (context + core).split(_CUT)
    return Program(prompt=prompt, rest=answer + "".join(more), answer=answer if more else "")


def _pair(core: Callable[[_Draw], _Core], places: Sequence[Place], d: _Draw) -> Pair:
    place: Place = d.either(*places)
    name, lead = d.either(*_LEADS[d.split].items())
    statements = core(d)
    beginning = lead(d)
    opening, depth = _opening(d, place, statements.needs)
    # Two blank lines around functions and classes, one elsewhere.
    gap = "\n" if place == "module" and name != "function" else "\n\n"
    context = beginning + gap + opening
    return Pair(
        first=_program(context, statements.first, depth),
        second=_program(context, statements.second, depth),
        template=f"{place} after {name}",
    )


def _pairs(
    name: str, core: Callable[[_Draw], _Core], places: Sequence[Place], seed: int, split: Split
) -> Iterator[Pair]:
    for index in itertools.count():
        key = hashlib.blake2b(f"{name}/{split}/{seed}/{index}".encode(), digest_size=8).digest()
        # Only `Random.random` is called, whose sequence Python promises to keep.
        yield _pair(core, places, _Draw(random.Random(int.from_bytes(key, "big")), split))


# ---- The cores of the 20 tasks ----


def _quotes(d: _Draw) -> _Core:
    # The string that is still open is the prompt's only one: nothing but its first quote decides.
    d.strings = False
    text, after = d.words(1, 4), d.statement()
    first, second = (f"print({quote}{text}{_CUT}{quote})\n{after}\n" for quote in "'\"")
    return _Core(first, second)


def _brackets(d: _Draw) -> _Core:
    name, after = d.name(plural=True), d.statement()
    last = d.numbers(1, 4)
    if d.chance(0.5):
        flat, nested = f"[{last}", f"[[{last}"
    else:
        rows = [d.numbers(1, 3) for _ in range(d.count(1, 2))]
        flat, nested = f"[{', '.join([*rows, last])}", f"[[{'], ['.join([*rows, last])}"
    return _Core(f"{name} = {flat}{_CUT}]\n{after}\n", f"{name} = {nested}{_CUT}]]\n{after}\n")


def _accumulators(d: _Draw, *, name: str = "") -> _Core:
    item, items = d.items()
    name = name or d.name(plural=d.chance(0.5))
    lines = [d.statement()] if d.chance(0.5) else []
    if d.chance(0.5):
        lines.append(f"for {item} in {items}:")
    else:
        lines += [f"while {items}:", f"    {item} = {items}.pop()"]
    between = "\n".join(lines)
    return _Core(
        f"{name} = set()\n{between}\n    {name}{_CUT}.add({item})\n",
        f'{name} = ""\n{between}\n    {name}{_CUT} += {item}\n',
        {items: "words"},
    )


def _last_argument(d: _Draw) -> _Core:
    names = [d.name(plain=True) for _ in range(d.count(2, 4))]
    required = int(len(names) > 2 and d.chance(0.4))
    head = f"def {d.function()}("
    defaults = ", ".join([*names[:required], *(f"{name}=None" for name in names[required:-1])])
    body = f"    return {d.either(*names)}\n"
    return _Core(
        f"{head}{defaults}, {names[-1]}{_CUT}=None):\n{body}",
        f"{head}{', '.join(names)}{_CUT}):\n{body}",
    )


def _constructor(d: _Draw) -> _Core:
    names = [d.name(plain=True) for _ in range(d.count(2, 3))]
    head = f"class {d.one(idioms.NOUNS).capitalize()}:\n    def __init__(self, {', '.join(names)}):"
    # Attributes are stored in the order of the arguments or in reverse: either may come first.
    first, second = (
        f"{head}\n        self.{stored[0]} ={_CUT} {stored[0]}{_CUT}\n"
        + "".join(f"        self.{name} = {name}\n" for name in stored[1:])
        for stored in (names, names[::-1])
    )
    return _Core(first, second)


def _use(d: _Draw, handle: str, mode: str) -> str:
    """A line that reads from a file or writes to it."""
    if mode == "r":
        return f"{d.name()} = {handle}.read()"
    return f"{handle}.write({d.quoted(d.words(1, 2))})"


def _opened(d: _Draw) -> _Core:
    mode, handle = d.either("r", "w"), d.one(idioms.HANDLES)
    stem = d.either(*idioms.STEMS[mode])
    needs: dict[str, idioms.Kind] = {}
    if d.chance(0.5):
        path = f"{stem}_{d.either('path', 'file', 'name')}"
        needs[path] = "path"
    else:
        path = d.quoted(f"{stem}_{d.name(plain=True)}.{d.one(idioms.SUFFIXES)}")
    # The quote is part of the candidates, so it is always the same one.
    call, use = f'open({path}, "{mode}{_CUT}")', _use(d, handle, mode)
    return _Core(f"with {call} as {handle}:\n    {use}\n", f"{handle} = {call}\n{use}\n", needs)


def _mode(d: _Draw) -> _Core:
    # What a file is called decides, so these words are no fillers, and all splits share them.
    stems = {mode: d.either(*idioms.STEMS[mode]) for mode in "rw"}
    handle, other, suffix = d.one(idioms.HANDLES), d.name(plain=True), d.one(idioms.SUFFIXES)
    name = d.either("{stem}", "{stem}_{other}", "{other}_{stem}")
    outer, inner = d.either("'", '"'), d.either("'", '"')
    block = d.chance(0.5)

    def side(mode: str) -> str:
        path = f"{outer}{name.format(stem=stems[mode], other=other)}.{suffix}{outer}"
        call, use = f"open({path}, {inner}{_CUT}{mode}{inner})", _use(d, handle, mode)
        if block:
            return f"with {call} as {handle}:\n    {use}\n"
        return f"{handle} = {call}\n{use}\n"

    return _Core(side("r"), side("w"))


def _display(d: _Draw) -> _Core:
    name = d.name()
    if d.chance(0.5):
        keys = [d.name(plain=True) for _ in range(2)]
        needs: dict[str, idioms.Kind] = dict.fromkeys(keys, "number")
    else:
        keys, needs = [d.number() for _ in range(2)], {}
    values = [d.number() for _ in range(2)]
    # The list has the dict's keys and values for its elements; the cut is after a key.
    cuts = ("", _CUT) if d.chance(0.5) else (_CUT, "")

    def elements(mark: str) -> str:
        return f"{keys[0]}{cuts[0]}{mark} {values[0]}, {keys[1]}{cuts[1]}{mark} {values[1]}"

    return _Core(f"{name} = {{{elements(':')}}}\n", f"{name} = [{elements(',')}]\n", needs)


def _loop_head(d: _Draw) -> _Core:
    item, items = d.items()
    return _Core(
        f"for {item}{_CUT} in {items}:\n    print({item})\n",
        f"while {item}{_CUT}:\n    {item} -= 1\n",
        {items: "numbers", item: "number"},
    )


def _alternative(d: _Draw) -> _Core:
    needs: dict[str, idioms.Kind] = {}
    head = f"if {d.condition(needs)}:\n    {d.statement()}\n"
    flag, body = d.of(idioms.FLAGS), f"    {d.statement()}\n"
    needs[flag] = "flag"
    return _Core(
        f"{head}else{_CUT}:\n{body}",
        f"{head}elif{_CUT} not {flag}:\n{body}",
        needs,
    )


def _formatted(d: _Draw) -> _Core:
    name, text, after = d.name(), d.words(1, 2), d.statement()
    sign = d.either("=", "+=")
    change = f"{name} {sign} {d.number()}\n"
    return _Core(
        f'{change}print(f"{text}{_CUT} {{{name}}}")\n{after}\n',
        f'{change}print("{text}{_CUT}")\n{after}\n',
        {name: "number"} if sign == "+=" else {},
    )


def _ternary(d: _Draw) -> _Core:
    needs: dict[str, idioms.Kind] = {}
    condition, name = d.condition(needs), d.name(plain=True)
    number, other = d.number(), d.number()
    return _Core(
        f"if {condition}{_CUT}:\n    {name} = {number}\n",
        f"{name} = {number} if {condition}{_CUT} else {other}\n",
        needs,
    )


def _swap(d: _Draw) -> _Core:
    letters = d.chance(0.4)
    names = [d.of(idioms.LETTERS) if letters else d.name(plain=True) for _ in range(2)]
    before = "".join(f"{name} = {d.number()}\n" for name in names)
    first, second = (
        f"{before}{left}, {right} = {right},{_CUT} {left}{_CUT}\nprint({left})\n"
        for left, right in (names, names[::-1])
    )
    return _Core(first, second)


def _indentation(d: _Draw) -> _Core:
    item, items = d.items()
    # Which of these has as many tokens as the loop's head depends on the tokenizer; most often `pop`.
    value = d.either("{0}.pop()", "{0}.pop()", "sum({0})", "len({0})", "{0}[0]").format(items)
    return _Core(
        f"for {item} in {items}:\n{_CUT}    print({item})\n",
        f"{item} = {value}\n{_CUT}return {item}\n",
        {items: "numbers"},
    )


def _function_or_lambda(d: _Draw) -> _Core:
    argument = d.of(idioms.LETTERS) if d.chance(0.4) else d.name(plain=True)
    name, number = d.name(), d.number()
    return _Core(
        f"{name} = lambda {argument}{_CUT}: {argument} + {number}\n",
        f"def {argument}{_CUT}():\n    return {number}\n",
    )


def _comparison(d: _Draw) -> _Core:
    name, body = d.name(), d.statement()
    value = d.number()
    return _Core(
        f"if {name}{_CUT} == {value}:\n    {body}\n",
        f"{name}{_CUT} = {value}\n{body}\n",
        {name: "number"},
    )


def _counted_loop(d: _Draw) -> _Core:
    index, (item, items) = d.of(idioms.INDICES), d.items()
    body = f"    print({index})\n"
    return _Core(
        f"for {index}, {item} in{_CUT} enumerate({items}):\n{body}",
        f"for {index} in{_CUT} range({d.number()}):\n{body}",
        {items: "numbers"},
    )


def _truth(d: _Draw) -> _Core:
    flag, body = d.of(idioms.FLAGS), d.statement()
    value = d.either("True", "True", "False")
    return _Core(
        f"{flag} = {value}{_CUT}\n{body}\n",
        f"if {flag} == {value}{_CUT}:\n    {body}\n",
        {flag: "flag"},
    )


def _true(d: _Draw) -> _Core:
    needs: dict[str, idioms.Kind] = {}
    head = f"if {d.condition(needs)}:\n"
    return _Core(
        f"{head}    while True{_CUT}:\n        break\nreturn False\n",
        f"{head}    return True{_CUT}\nreturn False\n",
        needs,
    )


def _task(
    name: str,
    summary: str,
    core: Callable[[_Draw], _Core],
    forms: tuple[Form, ...],
    *,
    places: tuple[Place, ...] = _STATEMENT,
) -> Task:
    return Task(
        name=name,
        summary=summary,
        stream=partial(_pairs, name, core, places),
        forms=forms,
    )


# A name where names are one token, else what it begins with.
_OWN = (Form(), Form(beginning=True))

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task(
            "single_double_quote",
            "close a string by the quote that opened it",
            _quotes,
            (Form("')\n", '")\n'), Form("')", '")'), Form("'", '"')),
        ),
        _task(
            "bracket_counting",
            "close a list by its depth",
            _brackets,
            (Form("]\n", "]]\n"), Form("]", "]]"), Form("]\n", "]")),
        ),
        _task(
            "set_or_string",
            "let a variable grow by how it was initialized",
            _accumulators,
            (Form(".add", " +="), Form(".", " +=")),
        ),
        _task(
            "set_or_string_fixedvarname",
            "let a variable grow by how it was initialized; it always has the same name",
            partial(_accumulators, name=idioms.FIXED_VARIABLE),
            (Form(".add", " +="), Form(".", " +=")),
        ),
        _task(
            "final_kwarg",
            "give the last argument a default by whether the ones before it have one",
            _last_argument,
            (Form("=None", "):\n"), Form("=", "):\n"), Form("=", ")")),
            places=("definition",),
        ),
        _task(
            "class_init",
            "store the argument that the attribute is named after",
            _constructor,
            _OWN,
            places=("definition",),
        ),
        _task(
            "with_as",
            "go on with `as` after `with open(...)`, end the line after `f = open(...)`",
            _opened,
            (Form(" as", "\n", given='")'), Form('")', '")\n'), Form('"', '")\n')),
        ),
        _task(
            "with_open",
            "open a file for reading or writing by its name",
            _mode,
            (Form("r", "w"),),
        ),
        _task(
            "bracket_brace",
            "follow an element of a dict or of a list",
            _display,
            (Form(":", ","),),
        ),
        _task(
            "for_while",
            "follow the variable of `for` or of `while`",
            _loop_head,
            (Form(" in", ":\n"), Form(" in", ":")),
        ),
        _task(
            "else_elif",
            "follow `else` or `elif`",
            _alternative,
            (
                Form(":\n", " not"),
                Form(":", " not"),
                Form(":\n", " not", beginning=True),
            ),
        ),
        _task(
            "fstring_brace",
            "insert a variable into an f-string, close a plain one",
            _formatted,
            (Form(" {", '")\n'), Form(" {", '")'), Form(" {", '"')),
        ),
        _task(
            "if_ternary",
            "follow the condition of a statement or of an expression",
            _ternary,
            (Form(":\n", " else"), Form(":", " else")),
        ),
        _task(
            "var_swap",
            "complete the exchange of two variables",
            _swap,
            _OWN,
        ),
        _task(
            "indent_for",
            "indent the line after the head of a loop, not the line after a statement",
            _indentation,
            # Inside a function; the last of the spaces belongs to the word that follows.
            (Form(" " * 7, " " * 3),),
            places=("function",),
        ),
        _task(
            "lambda_func",
            "follow the argument of a lambda or the name of a function",
            _function_or_lambda,
            (Form(":", "():\n"), Form(":", "()"), Form(":", "(")),
            places=("definition",),
        ),
        _task(
            "if_equals",
            "compare in a condition, assign in a statement",
            _comparison,
            (Form(" ==", " ="),),
        ),
        _task(
            "enumerate_range",
            "loop over what fits one or two variables",
            _counted_loop,
            (Form(" enumerate", " range"), Form(" enumerate", " range", beginning=True)),
        ),
        _task(
            "var_if",
            "follow a truth value that is assigned or compared",
            _truth,
            (Form("\n", ":\n"), Form("\n", ":")),
        ),
        _task(
            "while_return_true",
            "follow `while True` or `return True`",
            _true,
            (Form(":\n", "\n"), Form(":", "\n")),
            places=_INSIDE,
        ),
    )
}


# ---- A user's own tasks ----

_FIELDS = ("prompt_a", "prompt_b", "answer_a", "answer_b")


def load(path: str | os.PathLike[str]) -> Task:
    """A task from a file, for `build`.

    A `.jsonl` file holds one pair per line, an object of the strings `prompt_a`, `prompt_b`,
    `answer_a` and `answer_b`. A `.py` file defines `TASK = Task(...)`, or a function `pairs()` that
    yields tuples of these four strings. It is run, so load only what you trust. Pairs are
    divided into the splits by their content: half for the search, a quarter for each other split.

    Raises:
      UserError: the file is missing, or one of its lines or pairs is not as it should be.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no task file at {path}")
    if path.suffix == ".jsonl":
        return _listed(path.stem, _jsonl_pairs(path))
    if path.suffix == ".py":
        return _from_python(path)
    raise UserError(f"{path}: a task file must end in .jsonl or .py")


def _listed(name: str, pairs: Iterable[tuple[str, tuple[str, ...]]]) -> Task:
    """A task of given pairs, each `(where it is from, its four strings)`, checked one by one."""
    by_split: dict[Split, list[Pair]] = {split: [] for split in SPLITS}
    seen: dict[str, str] = {}
    for where, strings in pairs:
        prompt_a, prompt_b, answer_a, answer_b = strings
        for field, text in zip(_FIELDS, strings, strict=True):
            if not text:
                raise UserError(f"{where}: {field} must not be empty")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"{where}: {field} holds half of a surrogate pair: {text!r}")
        if prompt_a == prompt_b:
            raise UserError(f"{where}: prompt_a and prompt_b are the same, nothing decides")
        if answer_a == answer_b:
            raise UserError(f"{where}: answer_a and answer_b are the same: {answer_a!r}")
        for prompt in (prompt_a, prompt_b):
            if prompt in seen:
                raise UserError(f"{where}: the prompt {prompt[-40:]!r} is also at {seen[prompt]}")
            seen[prompt] = where
        digest = hashlib.blake2b(f"{prompt_a}\0{prompt_b}".encode(), digest_size=8).digest()
        split = ("search", "search", "discretize", "report")[digest[0] % 4]
        pair = Pair(
            first=Program(prompt=prompt_a, rest=answer_a, answer=answer_a),
            second=Program(prompt=prompt_b, rest=answer_b, answer=answer_b),
            template=where,
        )
        by_split[split].append(pair)
    if not seen:
        raise UserError(f"task {name!r} has no pairs")
    return Task(
        name=name,
        summary="a task from a file",
        stream=partial(_shuffled, by_split),
        equal_lengths=False,
    )


def _shuffled(by_split: dict[Split, list[Pair]], seed: int, split: Split) -> Iterator[Pair]:
    def key(pair: Pair) -> bytes:
        text = f"{seed}\0{pair.first.prompt}\0{pair.second.prompt}"
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    return iter(sorted(by_split[split], key=key))


def _jsonl_pairs(path: pathlib.Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON in UTF-8: {error}") from error
        if not isinstance(fields, dict):
            raise UserError(f"{where}: must be an object with {', '.join(_FIELDS)}")
        for unknown in sorted(fields.keys() - set(_FIELDS)):
            near = closest(unknown, _FIELDS)
            raise UserError(
                f"{where}: unknown field {unknown!r}{near}; it has {', '.join(_FIELDS)}"
            )
        for field in _FIELDS:
            if not isinstance(fields.get(field), str):
                got = json.dumps(fields[field]) if field in fields else "nothing"
                raise UserError(f"{where}: {field!r} must be a string, got {got}")
        yield where, tuple(fields[field] for field in _FIELDS)


def _from_python(path: pathlib.Path) -> Task:
    def located(error: BaseException) -> UserError:
        """The error with the last line of the file that was running."""
        if isinstance(error, SyntaxError) and error.filename == str(path):
            line = error.lineno
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((f.lineno for f in frames[::-1] if f.filename == str(path)), None)
        where = f"{path}:{line}" if line else str(path)
        return UserError(f"{where}: {type(error).__name__}: {error}")

    try:
        names = runpy.run_path(str(path))
    except Exception as error:  # Whatever the user's code raises.
        raise located(error) from error
    if "TASK" in names:
        task = names["TASK"]
        if not isinstance(task, Task):
            raise UserError(f"{path}: TASK must be a wsparse.circuits.tasks.Task, got {task!r}")
        return task
    if not callable(names.get("pairs")):
        raise UserError(f"{path}: must define TASK = Task(...) or a function pairs()")
    try:
        pairs = list(names["pairs"]())
    except Exception as error:  # As above.
        raise located(error) from error
    return _listed(path.stem, _python_pairs(path, pairs))


def _python_pairs(
    path: pathlib.Path, pairs: Sequence[Any]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for number, pair in enumerate(pairs, start=1):
        where = f"{path}: pair {number}"
        strings = tuple(pair) if isinstance(pair, (tuple, list)) else ()
        if len(strings) != len(_FIELDS) or not all(isinstance(text, str) for text in strings):
            raise UserError(f"{where}: must be four strings ({', '.join(_FIELDS)}), got {pair!r}")
        yield where, strings


if __name__ == "__main__":
    print("note: python -m wsparse.circuits.tasks is now python -m wsparse.tasks", file=sys.stderr)
    runpy.run_module("wsparse.tasks", run_name="__main__", alter_sys=True)

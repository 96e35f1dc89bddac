"""Synthetic Python modules that show both sides of every circuit task.

Real code holds most of the contrasts behind the tasks (a list closed by `]` or `]]`, a variable
updated by `.add` or `+=`), but too thinly for a model of two layers to learn them in minutes. The
documents made here hold little else: each is a small module put together from *snippets*, and a
snippet shows one side of one task's contrast. The table `IDIOMS` maps every task to its sides.

Two rules keep the contrasts honest. The sides of an idiom draw their names, numbers and words from
the same lists, so that nothing but the deciding feature tells them apart. And every string draws
its own quote style, so that the opening quote, not the habit of the file, decides how it closes;
only one document in five keeps to a single style, as people do.

A document is a pure function of `(seed, index)`. Only `random.Random.random` is called, the one
method whose sequence Python promises to keep between versions.

    python -m wsparse.data.idioms --megabytes=5     # bytes per second and distinct documents
    python -m wsparse.data.idioms --print=3         # three documents
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
import dataclasses
from functools import partial
import hashlib
import itertools
import random
import sys
import time
from typing import Literal, TypeVar

from wsparse.command import run_plain
from wsparse.errors import UserError

T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Nouns are variables, arguments, attributes and, with an "s", lists: all have a regular plural.
NOUNS = _words(
    """
    value item name count total key size state node word point line score label level user price
    limit width height offset color group record row field table cell block part step rate weight
    length event task order signal channel packet frame image pixel shape edge root parent owner
    member team player game board card deck turn goal reward agent action model layer unit
    feature sample metric margin ratio factor term digit number symbol letter phrase title author
    book chapter note tag topic post thread message contact phone region zone route road bridge
    river lake hill garden plant flower seed apple lemon meal recipe kitchen chair lamp window
    door wall floor room house store product cart invoice account bank loan budget cost profit
    month week day hour minute second timer clock alarm sensor motor wheel engine car train plane
    ship boat
    """
)
FLAGS = _words(
    """
    ready done valid active found empty full enabled visible hidden changed locked loaded closed
    running failed passed started stopped paused online verbose strict safe
    """
)
VERBS = _words(
    """
    get load make find check update build parse send fetch collect compute create remove reset
    merge split move copy start stop clean convert apply select test measure draw pack join
    """
)
WORDS = (
    *_words(
        """
        the new old first last next all more red blue green black white small large long short
        hello world good bad error missing of to start end left right low high time
        data
        """
    ),
    *FLAGS,
    *NOUNS,
)
PREFIXES = ("max", "min", "new", "old", "last", "first", "best", "num")
LETTERS = ("x", "y", "a", "b", "n", "f", "g", "h", "k", "v")
CLASS_KINDS = ("Store", "Reader", "Writer", "List", "Info", "Task", "Base")
INDICES = ("i", "j", "k", "n", "idx")
CALLS = ("log", "show", "warn", "notify", "trace")
MODULES = ("os", "sys", "json", "math", "time", "random")

STEMS = {
    "r": ("input", "source", "data", "config", "raw", "corpus"),
    "w": ("output", "result", "log", "report", "target", "export"),
}
"""What a file is called, by the mode it is opened with."""
SUFFIXES = ("txt", "csv", "json", "md", "dat")
HANDLES = ("f", "file", "handle", "stream")

FIXED_VARIABLE = "current"
"""The one variable name of `set_or_string_fixedvarname`."""

SMALLEST, ENOUGH = 300, 800
"""A document gets further snippets until it has a number of bytes drawn from this range."""

Kind = Literal["number", "numbers", "words", "text", "flag", "path", "call"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snippet:
    """A few lines of code at indentation zero, for a module or for a function's body.

    Attributes:
      lines: the code, without line ends.
      needs: the names that the lines read before they assign them, with the kind of value expected.
      result: a variable that a function around the lines could return, or "".
    """

    lines: list[str]
    needs: dict[str, Kind]
    result: str = ""


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a contrast.

    Attributes:
      write: draws a new snippet.
      definition: the snippet is a whole function or class, and stands at module level.
    """

    write: Callable[[random.Random], Snippet]
    definition: bool = False


@dataclasses.dataclass(frozen=True)
class Idiom:
    """One task's contrast.

    Attributes:
      sides: each side by name; all are drawn equally often.
      weight: how often the idiom is drawn, relative to the others.
    """

    sides: dict[str, Side]
    weight: float = 1.0


# ---- Drawing ----


def _chance(rng: random.Random, probability: float) -> bool:
    return rng.random() < probability


def _between(rng: random.Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))


def _pick(rng: random.Random, choices: Sequence[T]) -> T:
    return choices[int(rng.random() * len(choices))]


def _pick_early(rng: random.Random, choices: Sequence[T]) -> T:
    """Like `_pick`, but prefers the front, so that a tokenizer gives the common words one token."""
    return choices[int(rng.random() ** 2 * len(choices))]


def _number(rng: random.Random) -> str:
    return str(_between(rng, 0, 9) if _chance(rng, 0.8) else _between(rng, 10, 99))


def _numbers(rng: random.Random, most: int) -> str:
    return f"[{', '.join(_number(rng) for _ in range(_between(rng, 1, most)))}]"


def _phrase(rng: random.Random, low: int, high: int) -> str:
    return " ".join(_pick_early(rng, WORDS) for _ in range(_between(rng, low, high)))


def _quoted(rng: random.Random, text: str) -> str:
    return f"'{text}'" if _chance(rng, 0.5) else f'"{text}"'


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" if line else line for line in lines]


class _Scope:
    """The names of one snippet: none is handed out twice, and those that must exist are noted."""

    def __init__(self, rng: random.Random, arguments: Sequence[str] = ()):
        """With `arguments`, the snippet is a definition and reads those instead of outer names."""
        self.rng = rng
        self.arguments = arguments
        self.taken = set(arguments)
        self.needs: dict[str, Kind] = {}

    def new(self, source: Sequence[str] = NOUNS, *, plural: bool = False) -> str:
        """A name the snippet has not used, for it to assign."""
        while True:
            name = _pick_early(self.rng, source)
            if source is NOUNS and _chance(self.rng, 0.12):
                name = f"{_pick(self.rng, PREFIXES)}_{name}"
            if plural:
                name = f"{name}s"
            if name not in self.taken:
                self.taken.add(name)
                return name

    def expect(self, name: str, kind: Kind) -> str:
        """Note that `name` must exist before the snippet."""
        self.taken.add(name)
        self.needs[name] = kind
        return name

    def given(self, kind: Kind) -> str:
        """A name that must exist before the snippet, not used in it so far."""
        if self.arguments:
            return _pick(self.rng, self.arguments)
        source = FLAGS if kind == "flag" else NOUNS
        return self.expect(self.new(source, plural=kind in ("numbers", "words")), kind)

    def snippet(self, *lines: str, result: str = "") -> Snippet:
        return Snippet(lines=list(lines), needs=self.needs, result=result)


# ---- Pieces that many snippets share ----


def _say(scope: _Scope, *, quote: str = "") -> str:
    """A call that ends with a string."""
    rng = scope.rng
    text = _phrase(rng, 1, 4)
    string = f"{quote}{text}{quote}" if quote else _quoted(rng, text)
    callee = "print" if _chance(rng, 0.6) else scope.expect(_pick(rng, CALLS), "call")
    if _chance(rng, 0.15):
        return f"{callee}({scope.given('number')}, {string})"
    return f"{callee}({string})"


def _formatted(rng: random.Random, variable: str) -> str:
    """A call that prints a variable inside a string."""
    text = _phrase(rng, 1, 2)
    text = f"{{{variable}}} {text}" if _chance(rng, 0.15) else f"{text} {{{variable}}}"
    return f"print(f{_quoted(rng, text)})"


def _ternary(scope: _Scope, name: str) -> str:
    condition = _condition(scope)
    return f"{name} = {_number(scope.rng)} if {condition} else {_number(scope.rng)}"


def _statement(scope: _Scope) -> str:
    """One plain statement on one line."""
    draw = scope.rng.random()
    if draw < 0.3:
        return _say(scope)
    if draw < 0.4:
        return _formatted(scope.rng, scope.given("number"))
    if draw < 0.63:
        return f"{scope.new()} = {_number(scope.rng)}"
    if draw < 0.7:
        return _ternary(scope, scope.new())
    if draw < 0.8:
        return f"{scope.given('number')} += 1"
    if draw < 0.92:
        return f"{scope.new()} = len({scope.given('numbers')})"
    return f"{scope.given('numbers')}.append({_number(scope.rng)})"


def _condition(scope: _Scope) -> str:
    draw = scope.rng.random()
    if draw < 0.45:
        return scope.given("flag")
    if draw < 0.55:
        return f"not {scope.given('flag')}"
    comparison = _pick(scope.rng, (">", "<", "==", "=="))
    return f"{scope.given('number')} {comparison} {_number(scope.rng)}"


def _element_of(scope: _Scope, kind: Kind) -> tuple[str, str]:
    """A new name for the elements of a given list, and the list's name, usually its plural."""
    while True:
        item = scope.new()
        items = f"{item}s" if _chance(scope.rng, 0.75) else f"{_pick_early(scope.rng, NOUNS)}s"
        if items not in scope.taken:
            return item, scope.expect(items, kind)


# ---- Strings ----


def _string_call(rng: random.Random, *, quote: str) -> Snippet:
    scope = _Scope(rng)
    lines = [_say(scope, quote=quote)]
    if _chance(rng, 0.6):
        lines.append(_statement(scope))
    return scope.snippet(*lines)


def _print_variable(rng: random.Random, *, formatted: bool) -> Snippet:
    scope = _Scope(rng)
    if _chance(rng, 0.5):
        variable = scope.new()
        change = f"{variable} = {_number(rng)}"
    else:
        variable = scope.given("number")
        change = f"{variable} += {_number(rng)}"
    if not formatted:
        return scope.snippet(change, f"print({_quoted(rng, _phrase(rng, 1, 3))})")
    return scope.snippet(change, _formatted(rng, variable))


# ---- Lists, dicts and sets ----


def _rows(rng: random.Random, most: int) -> str:
    return f"[{', '.join(_numbers(rng, 3) for _ in range(_between(rng, 1, most)))}]"


def _list(rng: random.Random, *, nested: bool) -> Snippet:
    scope = _Scope(rng)
    if not nested:
        text = _numbers(rng, 7)
    elif _chance(rng, 0.9):
        text = _rows(rng, 3)
    else:
        text = f"[{_rows(rng, 2)}, {_rows(rng, 2)}]"
    name = scope.new(plural=True)
    return scope.snippet(f"{name} = {text}", _statement(scope), result=name)


def _display(rng: random.Random, *, pairs: bool) -> Snippet:
    """A dict (`pairs`) or a list, of the same elements, on one line or on several."""
    scope = _Scope(rng)
    name = scope.new()
    size = _between(rng, 2, 4)
    draw = rng.random()
    if draw < 0.6:
        elements = [_quoted(rng, scope.new(WORDS)) for _ in range(size)]
    elif draw < 0.8:
        elements = [scope.given("number") for _ in range(size)]
    else:
        elements = [_number(rng) for _ in range(size)]
    opening, closing = "[", "]"
    if pairs:
        opening, closing = "{", "}"
        of_text = _chance(rng, 0.25)
        values = [_quoted(rng, _phrase(rng, 1, 1)) if of_text else _number(rng) for _ in elements]
        elements = [f"{key}: {value}" for key, value in zip(elements, values, strict=True)]
    if _chance(rng, 0.65):
        return scope.snippet(f"{name} = {opening}{', '.join(elements)}{closing}", result=name)
    body = _indented([f"{element}," for element in elements])
    return scope.snippet(f"{name} = {opening}", *body, closing, result=name)


def _accumulate(rng: random.Random, *, init: str, update: str, name: str = "") -> Snippet:
    """A variable that starts as `init` and, some lines later, takes in values by `update`."""
    scope = _Scope(rng)
    if name:
        scope.taken.add(name)
    else:
        name = scope.new(plural=_chance(rng, 0.5))
    lines = [f"{name} = {init}", *(_statement(scope) for _ in range(_between(rng, 0, 2)))]
    if _chance(rng, 0.2):
        update = update.format(name=name, item=scope.given("text"))
        return scope.snippet(*lines, update, result=name)
    item, items = _element_of(scope, "words")
    body = [_statement(scope)] if _chance(rng, 0.2) else []
    update = update.format(name=name, item=item)
    body += [f"if {_condition(scope)}:", f"    {update}"] if _chance(rng, 0.25) else [update]
    if _chance(rng, 0.5):
        lines.append(f"for {item} in {items}:")
    else:
        lines += [f"while {items}:", f"    {item} = {items}.pop()"]
    return scope.snippet(*lines, *_indented(body), result=name)


_accumulate_set = partial(_accumulate, init="set()", update="{name}.add({item})")
_accumulate_string = partial(_accumulate, init='""', update="{name} += {item}")


# ---- Functions and classes ----


def _signature(rng: random.Random, arguments: Sequence[str], *, defaults: bool) -> str:
    """Arguments without a default or, all of them or all but the first, with `=None`.

    At least the last two have one, so that the last can be told from the one before it.
    """
    if not defaults or len(arguments) < 2:
        return ", ".join(arguments)
    required = int(len(arguments) > 2 and _chance(rng, 0.4))
    return ", ".join([*arguments[:required], *(f"{name}=None" for name in arguments[required:])])


def _function_name(rng: random.Random) -> str:
    verb = _pick_early(rng, VERBS)
    return f"{verb}_{_pick_early(rng, NOUNS)}" if _chance(rng, 0.6) else verb


def _function(rng: random.Random, *, defaults: bool) -> Snippet:
    names = _Scope(rng)
    arguments = [names.new() for _ in range(_between(rng, 2, 4))]
    scope = _Scope(rng, arguments)
    head = f"def {_function_name(rng)}({_signature(rng, arguments, defaults=defaults)}):"
    body = [_statement(scope)] if _chance(rng, 0.5) else []
    return scope.snippet(head, *_indented([*body, f"return {_pick(rng, arguments)}"]))


def _constructor(rng: random.Random, attributes: Sequence[str], *, reverse: bool) -> list[str]:
    """A class that stores its arguments, in their order or the reverse.

    With both orders about, only the attribute's name tells which argument comes next.
    """
    stored = attributes[::-1] if reverse else attributes
    name = _pick_early(rng, NOUNS).capitalize()
    if _chance(rng, 0.3):
        name += _pick(rng, CLASS_KINDS)
    init = [
        f"def __init__(self, {', '.join(attributes)}):",
        *(f"    self.{attribute} = {attribute}" for attribute in stored),
    ]
    return [f"class {name}:", *_indented(init)]


def _class(rng: random.Random, *, reverse: bool) -> Snippet:
    scope = _Scope(rng)
    attributes = [scope.new() for _ in range(_between(rng, 2, 3))]
    lines = _constructor(rng, attributes, reverse=reverse)
    if _chance(rng, 0.4):
        method = [
            f"def {_function_name(rng)}(self):",
            f"    return self.{_pick(rng, attributes)}",
        ]
        lines += ["", *_indented(method)]
    return scope.snippet(*lines)


def _function_or_argument(rng: random.Random) -> str:
    return _Scope(rng).new(LETTERS if _chance(rng, 0.4) else NOUNS)


def _expression_of(rng: random.Random, name: str) -> str:
    return f"{name} {_pick(rng, ('+', '-', '*'))} {_number(rng)}"


def _lambda(rng: random.Random) -> Snippet:
    scope = _Scope(rng)
    argument = _function_or_argument(rng)
    scope.taken.add(argument)
    function = f"lambda {argument}: {_expression_of(rng, argument)}"
    name = scope.new()
    if _chance(rng, 0.6):
        return scope.snippet(f"{name} = {function}", result=name)
    return scope.snippet(f"{name} = sorted({scope.given('numbers')}, key={function})", result=name)


def _def(rng: random.Random) -> Snippet:
    head = f"def {_function_or_argument(rng)}"
    if _chance(rng, 0.4):
        return Snippet(lines=[f"{head}():", f"    return {_number(rng)}"], needs={})
    argument = _Scope(rng).new()
    return Snippet(
        lines=[f"{head}({argument}):", f"    return {_expression_of(rng, argument)}"], needs={}
    )


# ---- Files ----


def _file(rng: random.Random, *, block: bool | None = None, mode: str = "") -> Snippet:
    """A file opened in a `with` block or by an assignment; the file's name decides the mode."""
    scope = _Scope(rng)
    # Where the mode is not what the snippet is about, the default one is often left out.
    brief = not mode and _chance(rng, 0.5)
    mode = mode or _pick(rng, ("r", "w"))
    block = _chance(rng, 0.5) if block is None else block
    stem, other = _pick(rng, STEMS[mode]), scope.new()
    if _chance(rng, 0.5):
        name = _pick(rng, (stem, stem, f"{stem}_{other}", f"{other}_{stem}"))
        path = _quoted(rng, f"{name}.{_pick(rng, SUFFIXES)}")
    else:
        path = scope.expect(f"{stem}_{_pick(rng, ('path', 'file', 'name'))}", "path")
    how = "" if brief and mode == "r" else f", {_quoted(rng, mode)}"
    handle = _pick(rng, HANDLES)
    if mode == "w":
        content = scope.given("text") if _chance(rng, 0.5) else _quoted(rng, _phrase(rng, 1, 3))
        body = [f"{handle}.write({content})"]
        result = ""
    else:
        result = scope.new()
        body = [f"{result} = {handle}.{_pick(rng, ('read', 'read', 'readlines', 'readline'))}()"]
    if block:
        return scope.snippet(
            f"with open({path}{how}) as {handle}:", *_indented(body), result=result
        )
    return scope.snippet(f"{handle} = open({path}{how})", *body, f"{handle}.close()", result=result)


# ---- Control flow ----


def _for(rng: random.Random) -> Snippet:
    scope = _Scope(rng)
    item, items = _element_of(scope, "numbers")
    body = _indented([_statement(scope)] if _chance(rng, 0.5) else [f"print({item})"])
    return scope.snippet(f"for {item} in {items}:", *body)


def _while(rng: random.Random) -> Snippet:
    scope = _Scope(rng)
    name = scope.given("number")
    body = [_statement(scope)] if _chance(rng, 0.5) else [f"print({name})"]
    return scope.snippet(f"while {name}:", *_indented([*body, f"{name} -= 1"]))


def _enumerate(rng: random.Random) -> Snippet:
    scope = _Scope(rng)
    index = scope.new(INDICES)
    item, items = _element_of(scope, "numbers")
    body = [_statement(scope)] if _chance(rng, 0.4) else [f"print({index}, {item})"]
    return scope.snippet(f"for {index}, {item} in enumerate({items}):", *_indented(body))


def _range(rng: random.Random) -> Snippet:
    scope = _Scope(rng)
    index = scope.new(INDICES)
    stop = _pick(rng, (_number(rng), scope.given("number")))
    body = [_statement(scope)] if _chance(rng, 0.4) else [f"print({index}, {stop})"]
    return scope.snippet(f"for {index} in range({stop}):", *_indented(body))


def _nested_block(rng: random.Random) -> Snippet:
    scope = _Scope(rng)
    item, items = _element_of(scope, "numbers")
    body = [_statement(scope)]
    if _chance(rng, 0.3):
        inner, inner_items = _element_of(scope, "numbers")
        body = [f"for {inner} in {inner_items}:", *_indented(body)]
    return scope.snippet(f"for {item} in {items}:", *_indented(body), _statement(scope))


def _plain_statements(rng: random.Random) -> Snippet:
    scope = _Scope(rng)
    item, items = _element_of(scope, "numbers")
    more = [_statement(scope) for _ in range(_between(rng, 1, 2))]
    return scope.snippet(f"{item} = sum({items})", *more, result=item)


def _else(rng: random.Random, *, condition: bool) -> Snippet:
    scope = _Scope(rng)
    lines = [f"if {_condition(scope)}:", f"    {_statement(scope)}"]
    lines.append(f"elif {_condition(scope)}:" if condition else "else:")
    return scope.snippet(*lines, f"    {_statement(scope)}")


def _if(rng: random.Random, *, ternary: bool) -> Snippet:
    scope = _Scope(rng)
    name = scope.new()
    if ternary:
        return scope.snippet(_ternary(scope, name), result=name)
    return scope.snippet(f"if {_condition(scope)}:", f"    {name} = {_number(rng)}")


def _compare_or_assign(rng: random.Random, *, compare: bool) -> Snippet:
    scope = _Scope(rng)
    kind: Kind = "number" if _chance(rng, 0.7) else "text"
    value = _number(rng) if kind == "number" else _quoted(rng, _phrase(rng, 1, 1))
    if compare:
        return scope.snippet(f"if {scope.given(kind)} == {value}:", f"    {_statement(scope)}")
    return scope.snippet(f"{scope.new()} = {value}", _statement(scope))


def _truth(rng: random.Random, *, compare: bool) -> Snippet:
    scope = _Scope(rng)
    name = scope.new(FLAGS)
    value = "True" if _chance(rng, 0.7) else "False"
    if not compare:
        return scope.snippet(f"{name} = {value}", _statement(scope), result=name)
    scope.expect(name, "flag")
    return scope.snippet(f"if {name} == {value}:", f"    {_statement(scope)}")


def _while_true(rng: random.Random) -> Snippet:
    scope = _Scope(rng)
    body = [_statement(scope)] if _chance(rng, 0.6) else []
    body += [f"if {_condition(scope)}:", "    break"]
    return scope.snippet("while True:", *_indented(body))


def _return_true(rng: random.Random) -> Snippet:
    names = _Scope(rng)
    arguments = [names.new() for _ in range(_between(rng, 1, 2))]
    scope = _Scope(rng, arguments)
    name = f"is_{_pick_early(rng, FLAGS)}" if _chance(rng, 0.6) else _function_name(rng)
    then, otherwise = ("True", "False") if _chance(rng, 0.7) else ("False", "True")
    body = [f"if {_condition(scope)}:", f"    return {then}", f"return {otherwise}"]
    return scope.snippet(f"def {name}({', '.join(arguments)}):", *_indented(body))


def _swap(rng: random.Random, *, reverse: bool) -> Snippet:
    """Two variables exchanged; which one is named first does not follow from the lines before."""
    scope = _Scope(rng)
    source = LETTERS if _chance(rng, 0.25) else NOUNS
    first, second = scope.new(source), scope.new(source)
    lines = [f"{first} = {_number(rng)}", f"{second} = {_number(rng)}"]
    if reverse:
        first, second = second, first
    swap = f"{first}, {second} = {second}, {first}"
    if _chance(rng, 0.4):
        return scope.snippet(*lines, f"if {first} > {second}:", f"    {swap}")
    return scope.snippet(*lines, swap, result=first)


# ---- The table ----

# Heavier are the idioms that need the most practice (a decision many tokens after what decides it)
# and appear nowhere else; lighter are those that other snippets exercise in passing.
IDIOMS: dict[str, Idiom] = {
    "single_double_quote": Idiom(
        {
            "single": Side(partial(_string_call, quote="'")),
            "double": Side(partial(_string_call, quote='"')),
        },
        weight=2.5,
    ),
    "bracket_counting": Idiom(
        {
            "flat": Side(partial(_list, nested=False)),
            "nested": Side(partial(_list, nested=True)),
        },
        weight=1.5,
    ),
    "set_or_string": Idiom(
        {"set": Side(_accumulate_set), "string": Side(_accumulate_string)}, weight=2.5
    ),
    "set_or_string_fixedvarname": Idiom(
        {
            "set": Side(partial(_accumulate_set, name=FIXED_VARIABLE)),
            "string": Side(partial(_accumulate_string, name=FIXED_VARIABLE)),
        },
        weight=1.5,
    ),
    "final_kwarg": Idiom(
        {
            "required": Side(partial(_function, defaults=False), definition=True),
            "default": Side(partial(_function, defaults=True), definition=True),
        }
    ),
    "class_init": Idiom(
        {
            "in_order": Side(partial(_class, reverse=False), definition=True),
            "reversed": Side(partial(_class, reverse=True), definition=True),
        },
        weight=1.0,
    ),
    "with_as": Idiom(
        {"with": Side(partial(_file, block=True)), "assign": Side(partial(_file, block=False))}
    ),
    "with_open": Idiom(
        {"read": Side(partial(_file, mode="r")), "write": Side(partial(_file, mode="w"))},
        weight=1.5,
    ),
    "bracket_brace": Idiom(
        {"list": Side(partial(_display, pairs=False)), "dict": Side(partial(_display, pairs=True))},
        weight=2.0,
    ),
    "for_while": Idiom({"for": Side(_for), "while": Side(_while)}, weight=1.0),
    "else_elif": Idiom(
        {
            "else": Side(partial(_else, condition=False)),
            "elif": Side(partial(_else, condition=True)),
        },
        weight=0.5,
    ),
    "fstring_brace": Idiom(
        {
            "formatted": Side(partial(_print_variable, formatted=True)),
            "plain": Side(partial(_print_variable, formatted=False)),
        },
        weight=1.5,
    ),
    "if_ternary": Idiom(
        {
            "statement": Side(partial(_if, ternary=False)),
            "ternary": Side(partial(_if, ternary=True)),
        },
        weight=1.5,
    ),
    "var_swap": Idiom(
        {
            "in_order": Side(partial(_swap, reverse=False)),
            "reversed": Side(partial(_swap, reverse=True)),
        },
        weight=1.0,
    ),
    "indent_for": Idiom(
        {"block": Side(_nested_block), "plain": Side(_plain_statements)}, weight=0.25
    ),
    "lambda_func": Idiom({"lambda": Side(_lambda), "def": Side(_def, definition=True)}),
    "if_equals": Idiom(
        {
            "compare": Side(partial(_compare_or_assign, compare=True)),
            "assign": Side(partial(_compare_or_assign, compare=False)),
        },
        weight=1.5,
    ),
    "enumerate_range": Idiom({"enumerate": Side(_enumerate), "range": Side(_range)}, weight=1.5),
    "var_if": Idiom(
        {
            "assign": Side(partial(_truth, compare=False)),
            "compare": Side(partial(_truth, compare=True)),
        },
        weight=1.0,
    ),
    "while_return_true": Idiom(
        {"while": Side(_while_true), "return": Side(_return_true, definition=True)}, weight=1.0
    ),
}

_SIDES = [tuple(idiom.sides.values()) for idiom in IDIOMS.values()]
_CUMULATIVE = list(itertools.accumulate(idiom.weight for idiom in IDIOMS.values()))


# ---- Documents ----


def _assigned(rng: random.Random, name: str, kind: Kind) -> str:
    """An assignment that gives `name` a value of its kind."""
    # Were all lists written out, they would drown nested lists and dicts.
    written_out = _chance(rng, 0.5)
    if kind == "number":
        value = _number(rng)
    elif kind == "numbers":
        value = _numbers(rng, 5) if written_out else f"list(range({_number(rng)}))"
    elif kind == "words":
        words = [_phrase(rng, 1, 1) for _ in range(_between(rng, 2, 4))]
        listed = f"[{', '.join(_quoted(rng, word) for word in words)}]"
        value = listed if written_out else f"{_quoted(rng, ' '.join(words))}.split()"
    elif kind == "flag":
        value = _pick(rng, ("True", "False"))
    elif kind == "path":
        value = _quoted(rng, f"{name.split('_')[0]}.{_pick(rng, SUFFIXES)}")
    else:
        value = _quoted(rng, _phrase(rng, 1, 4))
    return f"{name} = {value}"


def _body(rng: random.Random, snippets: Sequence[Snippet]) -> list[str]:
    lines: list[str] = []
    for number, snippet in enumerate(snippets):
        if number and _chance(rng, 0.15):
            lines.append("")
        if _chance(rng, 0.1):
            lines.append(f"# {_pick_early(rng, VERBS)} the {_phrase(rng, 1, 2)}")
        lines += snippet.lines
    return lines


def _block(rng: random.Random, snippets: Sequence[Snippet]) -> list[str]:
    """Statements as they are, or as the body of a function that is given what they need."""
    needs: dict[str, Kind] = {
        name: kind for snippet in snippets for name, kind in snippet.needs.items() if kind != "call"
    }
    place = rng.random()
    if place < 0.35:
        return [
            *(_assigned(rng, name, kind) for name, kind in needs.items()),
            *_body(rng, snippets),
        ]
    arguments = list(needs)[:4]
    signature = _signature(rng, arguments, defaults=_chance(rng, 0.5))
    name = _function_name(rng)
    docstring = f'"""{name.replace("_", " the ").capitalize()}."""'
    body = [
        *([docstring] if _chance(rng, 0.15) else []),
        *(_assigned(rng, name, needs[name]) for name in list(needs)[4:]),
        *_body(rng, snippets),
    ]
    results = [snippet.result for snippet in snippets if snippet.result]
    if results and _chance(rng, 0.75):
        body.append(f"return {results[-1]}")
    if place < 0.85:
        return [f"def {name}({signature}):", *_indented(body)]
    scope = _Scope(rng)
    attributes = [scope.new() for _ in range(_between(rng, 1, 3))]
    constructor = _constructor(rng, attributes, reverse=_chance(rng, 0.5))
    receiver = f"self, {signature}" if signature else "self"
    return [*constructor, "", *_indented([f"def {name}({receiver}):", *_indented(body)])]


def _header(rng: random.Random, needs: dict[str, Kind]) -> list[list[str]]:
    """The docstring and the imports of a module, each a block of lines."""
    blocks = []
    if _chance(rng, 0.2):
        text = f"{_pick_early(rng, VERBS)} the {_phrase(rng, 1, 3)}".capitalize()
        blocks.append([f'"""{text}."""'])
    if _chance(rng, 0.2):
        blocks.append([f"import {_pick(rng, MODULES)}"])
    calls = sorted(name for name, kind in needs.items() if kind == "call")
    if calls:
        blocks.append([f"from {_pick(rng, ('helpers', 'tools'))} import {', '.join(calls)}"])
    return blocks


def _joined(blocks: Sequence[list[str]]) -> str:
    """Two blank lines around functions and classes, one between other blocks."""
    lines = list(blocks[0])
    for before, after in itertools.pairwise(blocks):
        defines = any(block[0].startswith(("def ", "class ")) for block in (before, after))
        lines += ["", "", *after] if defines else ["", *after]
    return "\n".join(lines) + "\n"


def _one_style(lines: list[str], quote: str) -> list[str]:
    """The lines with every string in one quote style; texts hold no quotes. Docstrings stay."""
    other = "'" if quote == '"' else '"'
    return [line if '"""' in line else line.replace(other, quote) for line in lines]


def document(seed: int, index: int) -> str:
    """Document number `index` of the stream `seed`: a module of some 300 to 1500 bytes.

    Args:
      seed: any integer; names the stream.
      index: position in the stream, from 0.

    Returns:
      The text, which depends on nothing but the two arguments.
    """
    if index < 0:
        raise UserError(f"a document's index must be 0 or more, got {index}")
    # `Random` ignores the sign of a seed and knows no pairs: derive one number from both arguments.
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    rng = random.Random(int.from_bytes(digest, "big"))

    enough = _between(rng, SMALLEST, ENOUGH)
    blocks: list[list[str]] = []
    needs: dict[str, Kind] = {}
    pending: list[Snippet] = []
    length = _between(rng, 1, 3)
    size = 0
    # Every snippet drawn is used, whatever its length: dropping long ones would tip the balance.
    while size < enough or pending:
        block = None
        if size < enough:
            idiom = bisect_right(_CUMULATIVE, rng.random() * _CUMULATIVE[-1])
            side = _pick(rng, _SIDES[idiom])
            snippet = side.write(rng)
            needs |= snippet.needs
            if side.definition:
                block = snippet.lines
            else:
                pending.append(snippet)
        if block is None and (len(pending) == length or size >= enough):
            block = _block(rng, pending)
            pending = []
            length = _between(rng, 1, 3)
        if block is not None:
            blocks.append(block)
            size += sum(len(line) + 1 for line in block)

    style = rng.random()
    if style < 0.2:
        blocks = [_one_style(block, "'" if style < 0.1 else '"') for block in blocks]
    return _joined([*_header(rng, needs), *blocks])


def documents(seed: int = 0, *, start: int = 0) -> Iterator[str]:
    """The endless stream `document(seed, start)`, `document(seed, start + 1)` and so on."""
    return (document(seed, index) for index in itertools.count(start))


def main(argv: Sequence[str]) -> None:
    """Print documents, or measure how fast they are made."""
    parser = argparse.ArgumentParser(
        prog="python -m wsparse.data.idioms",
        description="Synthetic Python modules that show both sides of every circuit task.",
    )
    parser.add_argument("--seed", type=int, default=0, help="names the stream of documents")
    parser.add_argument("--print", type=int, default=0, metavar="N", help="only print N documents")
    parser.add_argument("--megabytes", type=float, default=5.0, help="how much text to time")
    options = parser.parse_args(argv)
    if options.print < 0:
        raise UserError(f"--print must be 0 or more documents, got {options.print}")
    if not 0 < options.megabytes < float("inf"):
        raise UserError(f"--megabytes must be a size above 0, got {options.megabytes}")

    if options.print:
        for index in range(options.print):
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


if __name__ == "__main__":
    run_plain(lambda: main(sys.argv[1:]))

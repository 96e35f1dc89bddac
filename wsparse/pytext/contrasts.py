"""The twenty contrasts: small decisions of Python code, each with two sides.

Each contrast is one function that writes either side. Documents show the sides one by one, with everything
that a `Draw` elaborates. A pair of prompts is the same draw written twice, once for each side, and cut
where the sides part (`Draw.cut`). Two rules keep a contrast honest: both sides draw their names, numbers
and words from the same lists, and up to the cut they make the same choices in the same order when they are
drawn for a pair. Documents of a seed never change: whoever edits a function keeps its draws, or changes
every run trained on `idioms`.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Literal

from wsparse.pytext import words
from wsparse.pytext.draw import Draw, Snippet, indented

Place = Literal["module", "function", "method", "definition"]
"""Where a pair's snippet stands; a definition stands alone."""


@dataclasses.dataclass(frozen=True)
class Form:
    """The characters of a task's two candidates.

    Attributes:
      first: Answer of the first side; "" takes each pair's own `Program.answer`.
      second: Answer of the second side; "" likewise.
      given: The beginning of both sides' `rest` that this form moves into the prompts.
      beginning: The candidates are the tokens that the answers begin with, whatever these are.
    """

    first: str = ""
    second: str = ""
    given: str = ""
    beginning: bool = False

    def __str__(self) -> str:
        which = f"{self.first!r} or {self.second!r}" if self.first else "each pair's own answers"
        after = f" after {self.given!r}" if self.given else ""
        return f"{which}{after}{', their first tokens' if self.beginning else ''}"


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One decision.

    Attributes:
      summary: What is decided, and by what.
      write: `(draw, side) -> snippet` of side 0 or 1, which documents show equally often.
      forms: Surface forms of the two sides' answers, best first.
      weight: How often documents show it, relative to the others.
      places: Where the snippet of a pair may stand.
      strings: Whether the text around the snippet of a pair may contain strings.
    """

    summary: str
    write: Callable[[Draw, int], Snippet]
    forms: tuple[Form, ...]
    weight: float = 1.0
    places: tuple[Place, ...] = ("module", "function", "method")
    strings: bool = True


# ---- Strings and displays ----


def _quotes(d: Draw, side: int) -> Snippet:
    lines = [d.say(quote="'\""[side])]
    if d.chance(0.6):
        lines.append(d.statement())
    return d.snippet(*lines)


def _print_variable(d: Draw, side: int) -> Snippet:
    if d.chance(0.5):
        variable = d.new()
        change = f"{variable} = {d.number()}"
    else:
        variable = d.given("number")
        change = f"{variable} += {d.number()}"
    if side == 0:
        return d.snippet(change, d.formatted(variable))
    text = d.phrase(1, 2 if d.paired else 3)
    return d.snippet(change, f"print({d.quoted(f'{text}{d.cut}', answer=True)})")


def _rows(d: Draw, most: int) -> list[str]:
    return [d.numbers(3) for _ in range(d.between(1, most))]


def _list(d: Draw, side: int) -> Snippet:
    """A flat list or a list of lists; in a pair both have the same numbers."""
    if side == 0:
        text = f"[{', '.join(_rows(d, 3) if d.paired else [d.numbers(7)])}{d.cut}]"
    else:
        rows = _rows(d, 3) if d.plain(0.9) else [f"[{'], ['.join(_rows(d, 2))}]" for _ in "ab"]
        text = f"[[{'], ['.join(rows)}{d.cut}]]"
    name = d.new(plural=True)
    return d.snippet(f"{name} = {text}", d.statement(), result=name)


def _display(d: Draw, side: int) -> Snippet:
    """A list or a dict, on one line or on several; in a pair the list has the dict's keys and values."""
    name = d.new()
    size = 2 if d.paired else d.between(2, 4)
    draw = d.rng.random()
    if draw < 0.6 and not d.paired:
        elements = [d.quoted(d.new(words.WORDS)) for _ in range(size)]
    elif draw < 0.8:
        elements = [d.given("number") for _ in range(size)]
    else:
        elements = [d.number() for _ in range(size)]
    mark, opening, closing = ((",", "[", "]"), (":", "{", "}"))[side]
    if side == 1 or d.paired:
        of_text = d.embellish(0.25)
        values = [d.quoted(d.phrase(1, 1)) if of_text else d.number() for _ in elements]
        elements[d.between(0, 1) if d.paired else 0] += d.cut
        elements = [f"{key}{mark} {value}" for key, value in zip(elements, values, strict=True)]
    if d.plain(0.65):
        return d.snippet(f"{name} = {opening}{', '.join(elements)}{closing}", result=name)
    body = indented([f"{element}," for element in elements])
    return d.snippet(f"{name} = {opening}", *body, closing, result=name)


# ---- Variables ----


def _accumulate(d: Draw, side: int, *, name: str = "") -> Snippet:
    """A variable that starts as a set or a string and, some lines later, takes in values."""
    if name:
        d.taken.add(name)
    else:
        name = d.new(plural=d.chance(0.5))
    init = ("set()", '""')[side]
    update = (f"{name}{d.cut}.add({{}})", f"{name}{d.cut} += {{}}")[side]
    count = d.between(0, 1 if d.paired else 2)
    lines = [f"{name} = {init}", *(d.statement() for _ in range(count))]
    if d.embellish(0.2):
        return d.snippet(*lines, update.format(d.given("text")), result=name)
    item, items = d.items("words")
    update = update.format(item)
    body = [d.statement()] if d.embellish(0.2) else []
    body += [f"if {d.condition()}:", f"    {update}"] if d.embellish(0.25) else [update]
    if d.chance(0.5):
        lines.append(f"for {item} in {items}:")
    else:
        lines += [f"while {items}:", f"    {item} = {items}.pop()"]
    return d.snippet(*lines, *indented(body), result=name)


def _swap(d: Draw, side: int) -> Snippet:
    """Two variables exchanged; which one is named first does not follow from the lines before."""
    source = words.LETTERS if d.chance(0.25) else words.NOUNS
    left, right = d.new(source), d.new(source)
    lines = [f"{left} = {d.number()}", f"{right} = {d.number()}"]
    if side == 1:
        left, right = right, left
    swap = f"{left}, {right} = {right},{d.cut} {left}{d.cut}"
    if d.embellish(0.4):
        return d.snippet(*lines, f"if {left} > {right}:", f"    {swap}")
    return d.snippet(*lines, swap, result=left)


def _compare(d: Draw, side: int) -> Snippet:
    number = d.chance(0.7)
    value = d.number() if number else d.quoted(d.phrase(1, 1))
    if side == 0:
        name = d.given("number" if number else "text")
        return d.snippet(f"if {name}{d.cut} == {value}:", f"    {d.statement()}")
    return d.snippet(f"{d.new()}{d.cut} = {value}", d.statement())


def _truth(d: Draw, side: int) -> Snippet:
    name = d.new(words.FLAGS)
    value = "True" if d.chance(0.7) else "False"
    if side == 0:
        return d.snippet(f"{name} = {value}{d.cut}", d.statement(), result=name)
    d.expect(name, "flag")
    return d.snippet(f"if {name} == {value}{d.cut}:", f"    {d.statement()}")


# ---- Functions, classes and files ----


def _function(d: Draw, side: int) -> Snippet:
    arguments = [d.new() for _ in range(d.between(2, 4))]
    name = d.function()
    signature, default = d.signature(arguments, defaults=side == 1), "=None" * side
    inside = d.inside(arguments)
    body = [inside.statement()] if d.chance(0.5) else []
    return inside.snippet(
        f"def {name}({signature.removesuffix(default)}{d.cut}{default}):",
        *indented([*body, f"return {d.either(*arguments)}"]),
    )


def _class(d: Draw, side: int) -> Snippet:
    attributes = [d.new() for _ in range(d.between(2, 3))]
    lines = d.constructor(attributes, reverse=side == 1)
    if d.embellish(0.4):
        head = f"def {d.function()}(self):"
        lines += ["", *indented([head, f"    return self.{d.either(*attributes)}"])]
    return d.snippet(*lines)


def _lambda_or_def(d: Draw, side: int) -> Snippet:
    argument = d.new(words.LETTERS if d.chance(0.4) else words.NOUNS)
    if side == 0:
        function = f"lambda {argument}{d.cut}: {d.arithmetic(argument)}"
        name = d.new()
        if not d.plain(0.6):
            function = f"sorted({d.given('numbers')}, key={function})"
        return d.snippet(f"{name} = {function}", result=name)
    head = f"def {argument}{d.cut}"
    if d.plain(0.4):
        return d.snippet(f"{head}():", f"    return {d.number()}")
    argument = d.inside().new()
    return d.snippet(f"{head}({argument}):", f"    return {d.arithmetic(argument)}")


def _file(d: Draw, side: int, *, by_name: bool) -> Snippet:
    """A file opened in a block or by an assignment, to read or to write.

    With `by_name` the side is the mode, which follows from the file's name; without, it is block or
    assignment, and the default mode is often left out.
    """
    brief = not by_name and d.embellish(0.5)
    mode = "rw"[side] if by_name else d.either("r", "w")
    block = d.chance(0.5) if by_name else side == 0
    # The file's name determines the mode, so stems are not drawn per split.
    stem, other = d.either(*words.STEMS[mode]), d.new()
    if (by_name and d.paired) or d.chance(0.5):
        name = d.either(stem, stem, f"{stem}_{other}", f"{other}_{stem}")
        path = d.quoted(f"{name}.{d.one(words.SUFFIXES)}")
    else:
        path = d.expect(f"{stem}_{d.either('path', 'file', 'name')}", "path")
    how = ""
    if not (brief and mode == "r"):
        text = f"{d.cut}{mode}" if by_name else f"{mode}{d.cut}"
        how = f", {d.quoted(text, answer=not by_name)}"
    handle, result = d.one(words.HANDLES), ""
    if mode == "w":
        content = d.given("text") if d.embellish(0.5) else d.quoted(d.phrase(1, 3))
        body = [f"{handle}.write({content})"]
    else:
        result = d.new()
        body = [f"{result} = {handle}.{d.either('read', 'read', 'readlines', 'readline')}()"]
    if block:
        return d.snippet(f"with open({path}{how}) as {handle}:", *indented(body), result=result)
    return d.snippet(f"{handle} = open({path}{how})", *body, f"{handle}.close()", result=result)


# ---- Control flow ----


def _loop(d: Draw, side: int) -> Snippet:
    if side == 0:
        name, items = d.items("numbers")
        head, end = f"for {name}{d.cut} in {items}:", []
    else:
        name = d.given("number")
        head, end = f"while {name}{d.cut}:", [f"{name} -= 1"]
    body = d.statement() if d.chance(0.5) else f"print({name})"
    return d.snippet(head, *indented([body, *end]))


def _counted_loop(d: Draw, side: int) -> Snippet:
    index = d.new(words.INDICES)
    if side == 0:
        item, items = d.items("numbers")
        head = f"for {index}, {item} in{d.cut} enumerate({items}):"
    else:
        item = d.number() if d.paired else d.either(d.number(), d.given("number"))
        head = f"for {index} in{d.cut} range({item}):"
    return d.snippet(head, f"    {d.statement() if d.chance(0.4) else f'print({index}, {item})'}")


def _indentation(d: Draw, side: int) -> Snippet:
    """The line after the head of a loop, or after a plain statement."""
    item, items = d.items("numbers")
    if side == 0:
        body = [d.statement()]
        if d.embellish(0.3):
            inner, inner_items = d.items("numbers")
            body = [f"for {inner} in {inner_items}:", *indented(body)]
        first, *others = indented(body)
        return d.snippet(f"for {item} in {items}:", f"{d.cut}{first}", *others, d.statement())
    first, *others = [d.statement() for _ in range(d.between(1, 2))]
    value = f"sum({items})"
    if d.paired:
        # Which of these has as many tokens as the loop's head depends on the tokenizer, most often `pop`.
        value = d.either(f"{items}.pop()", f"{items}.pop()", value, f"len({items})", f"{items}[0]")
    return d.snippet(f"{item} = {value}", f"{d.cut}{first}", *others, result=item)


def _else(d: Draw, side: int) -> Snippet:
    lines = [f"if {d.condition()}:", f"    {d.statement()}"]
    if side == 0:
        lines.append(f"else{d.cut}:")
    else:
        # The answer of a pair must be one and the same word.
        condition = f"not {d.given('flag')}" if d.paired else d.condition()
        lines.append(f"elif{d.cut} {condition}:")
    return d.snippet(*lines, f"    {d.statement()}")


def _if(d: Draw, side: int) -> Snippet:
    name = d.new()
    if side == 1:
        return d.snippet(d.ternary(name), result=name)
    return d.snippet(f"if {d.condition()}{d.cut}:", f"    {name} = {d.number()}")


def _while_or_return(d: Draw, side: int) -> Snippet:
    if d.paired:
        # The sides of a document share no line before the decision: a pair gives them one.
        head = f"if {d.condition()}:"
        if side == 0:
            return d.snippet(head, f"    while True{d.cut}:", "        break", "return False")
        return d.snippet(head, f"    return True{d.cut}", "return False")
    if side == 0:
        body = [d.statement()] if d.chance(0.6) else []
        body += [f"if {d.condition()}:", "    break"]
        return d.snippet("while True:", *indented(body))
    arguments = [d.new() for _ in range(d.between(1, 2))]
    inside = d.inside(arguments)
    name = f"is_{d.one(words.FLAGS, early=True)}" if d.chance(0.6) else d.function()
    value, otherwise = ("True", "False") if d.chance(0.7) else ("False", "True")
    body = [f"if {inside.condition()}:", f"    return {value}", f"return {otherwise}"]
    return inside.snippet(f"def {name}({', '.join(arguments)}):", *indented(body))


# ---- The table ----

# A name where names are one token, else what it begins with.
_OWN = (Form(), Form(beginning=True))

# Heavier are the contrasts that need the most practice (a decision many tokens after what decides it) and
# appear nowhere else; lighter are those that other snippets exercise in passing. The order is part of every
# document.
CONTRASTS: dict[str, Contrast] = {
    "single_double_quote": Contrast(
        "close a string by the quote that opened it",
        _quotes,
        (Form("')\n", '")\n'), Form("')", '")'), Form("'", '"')),
        weight=2.5,
        # The string that is still open is the prompt's only one: nothing but its first quote decides.
        strings=False,
    ),
    "bracket_counting": Contrast(
        "close a list by its depth",
        _list,
        (Form("]\n", "]]\n"), Form("]", "]]"), Form("]\n", "]")),
        weight=1.5,
    ),
    "set_or_string": Contrast(
        "let a variable grow by how it was initialized",
        _accumulate,
        (Form(".add", " +="), Form(".", " +=")),
        weight=2.5,
    ),
    "set_or_string_fixedvarname": Contrast(
        "let a variable grow by how it was initialized; it always has the same name",
        partial(_accumulate, name=words.FIXED_VARIABLE),
        (Form(".add", " +="), Form(".", " +=")),
        weight=1.5,
    ),
    "final_kwarg": Contrast(
        "give the last argument a default by whether the ones before it have one",
        _function,
        (Form("):\n", "=None"), Form("):\n", "="), Form(")", "=")),
        places=("definition",),
    ),
    "class_init": Contrast(
        "store the argument that the attribute is named after", _class, _OWN, places=("definition",)
    ),
    "with_as": Contrast(
        "go on with `as` after `with open(...)`, end the line after `f = open(...)`",
        partial(_file, by_name=False),
        (Form(" as", "\n", given='")'), Form('")', '")\n'), Form('"', '")\n')),
    ),
    "with_open": Contrast(
        "open a file for reading or writing by its name",
        partial(_file, by_name=True),
        (Form("r", "w"),),
        weight=1.5,
    ),
    "bracket_brace": Contrast(
        "follow an element of a list or of a dict", _display, (Form(",", ":"),), weight=2.0
    ),
    "for_while": Contrast(
        "follow the variable of `for` or of `while`", _loop, (Form(" in", ":\n"), Form(" in", ":"))
    ),
    "else_elif": Contrast(
        "follow `else` or `elif`",
        _else,
        (Form(":\n", " not"), Form(":", " not"), Form(":\n", " not", beginning=True)),
        weight=0.5,
    ),
    "fstring_brace": Contrast(
        "insert a variable into an f-string, close a plain one",
        _print_variable,
        (Form(" {", '")\n'), Form(" {", '")'), Form(" {", '"')),
        weight=1.5,
    ),
    "if_ternary": Contrast(
        "follow the condition of a statement or of an expression",
        _if,
        (Form(":\n", " else"), Form(":", " else")),
        weight=1.5,
    ),
    "var_swap": Contrast("complete the exchange of two variables", _swap, _OWN),
    "indent_for": Contrast(
        "indent the line after the head of a loop, not the line after a statement",
        _indentation,
        # Inside a function; the last of the spaces belongs to the word that follows.
        (Form(" " * 7, " " * 3),),
        weight=0.25,
        places=("function",),
    ),
    "lambda_func": Contrast(
        "follow the argument of a lambda or the name of a function",
        _lambda_or_def,
        (Form(":", "():\n"), Form(":", "()"), Form(":", "(")),
        places=("definition",),
    ),
    "if_equals": Contrast(
        "compare in a condition, assign in a statement", _compare, (Form(" ==", " ="),), weight=1.5
    ),
    "enumerate_range": Contrast(
        "loop over what fits one or two variables",
        _counted_loop,
        (Form(" enumerate", " range"), Form(" enumerate", " range", beginning=True)),
        weight=1.5,
    ),
    "var_if": Contrast(
        "follow a truth value that is assigned or compared", _truth, (Form("\n", ":\n"), Form("\n", ":"))
    ),
    "while_return_true": Contrast(
        "follow `while True` or `return True`",
        _while_or_return,
        (Form(":\n", "\n"), Form(":", "\n")),
        places=("function", "method"),
    ),
}

"""The twenty contrasts: small decisions of Python code, each with two sides.

Each contrast is one function that writes either side. Documents show the sides one by one, with everything
that a `Draw` elaborates. A pair of prompts is the same draw written twice, once for each side, and cut
where the sides part (`Draw.cut`). Three rules keep a contrast honest:

- Both sides draw their names, numbers and words from the same lists, and up to the cut they make the same
  choices in the same order when they are drawn for a pair.
- No token of the prompt gives the side away alone. Finished statements of both sides stand before the one
  that is cut (the knob `distractors`), so that every token of either is there; or both sides hold the same
  tokens in another order.
- What decides stands more than three tokens before the decision: a string's words, the rest of a list or a
  name of several words (`Draw.long`) come between. Where that cannot be, `Contrast.local` says why.

`wsparse.circuits.probe` measures how far that holds. Documents of a seed never change: whoever edits a
function keeps its draws, or changes every run trained on `idioms`.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Any, Literal

from wsparse.pytext import words
from wsparse.pytext.draw import Draw, Snippet, indented

Place = Literal["module", "function", "method", "definition"]
"""Where a pair's snippet stands; a definition stands alone."""

Write = Callable[[Draw, int], Snippet]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
    """One decision.

    Attributes:
      summary: What is decided, and by what.
      write: `(draw, side) -> snippet` of side 0 or 1, which documents show equally often.
      forms: Surface forms of the two sides' answers, best first.
      weight: How often documents show it, relative to the others.
      places: Where the snippet of a pair may stand.
      distractors: Choices of the knob: finished statements of the contrast before the one that is cut.
      alike: Knobs of which the distractors have the value of what is cut: each value has tokens of its own.
      local: Why one token decides, for a contrast where it does by its nature; else "".
    """

    summary: str
    write: Write
    forms: tuple[Form, ...]
    weight: float = 1.0
    places: tuple[Place, ...] = ("module", "function", "method")
    distractors: tuple[int, ...] = (0, 1, *(2,) * 11, *(3,) * 5)
    alike: tuple[str, ...] = ()
    local: str = ""


# The order is part of every document. Heavier are the contrasts that need the most practice (a decision many
# tokens after what decides it) and appear nowhere else; lighter are those that other snippets exercise in
# passing.
CONTRASTS: dict[str, Contrast] = {}


def _contrast(name: str, summary: str, *forms: Form, **options: Any) -> Callable[[Write], Write]:
    """Enters a function that writes both sides of a contrast into the table."""

    def enter(write: Write) -> Write:
        CONTRASTS[name] = Contrast(summary=summary, write=write, forms=forms, **options)
        return write

    return enter


# A name where names are one token, else what it begins with.
_OWN = (Form(), Form(beginning=True))


# ---- Strings and displays ----


@_contrast(
    "single_double_quote",
    "close a string by the quote that opened it",
    *(Form("')\n", '")\n'), Form("')", '")'), Form("'", '"')),
    weight=2.5,
    alike=("order", "nested"),
)
def _quotes(d: Draw, side: int) -> Snippet:
    quote, other = ("'\"", "\"'")[side]
    callee, first = d.callee(), ""
    if d.knob("order", (0, 0, 0, 0, 1), common=(0, 1)):
        first = f"{d.given('number')}, " if d.chance(0.7) else f"{d.number()}, "
    text = d.text()
    if d.knob("nested", (0, 0, 0, 0, 1), common=(0,) * 15):
        text = f"{d.phrase(1, 2)} {other}{d.phrase(1, 1)}{other} {text}"
    return d.snippet(f"{callee}({first}{quote}{text}{d.cut}{quote})")


@_contrast(
    "bracket_counting",
    "close a list by its depth",
    *(Form("]\n", "]]\n"), Form("]", "]]"), Form("]\n", "]")),
    weight=2.0,
)
def _list(d: Draw, side: int) -> Snippet:
    """A list whose last elements are numbers, or a row of them; rows and numbers stand before."""
    name = d.new(plural=True)
    before = []
    for _ in range(d.knob("length", (1, 1, 2), common=(0, 0, 0, 3))):
        row = d.numbers(1, 3)
        # Mostly one kind, as people write them; which kind says nothing about the last elements.
        before.append(f"[{row}]" if d.chance(0.6) else row)
    last = d.numbers(3, 4) if d.paired else d.numbers(1, 4)
    opening, closing = ("", "]") if side == 0 else ("[", "]]")
    text = ", ".join([*before, f"{opening}{last}{d.cut}"])
    return d.snippet(f"{name} = [{text}{closing}", result=name)


@_contrast(
    "bracket_brace", "follow an element of a list or of a dict", Form(",", ":"), weight=2.0, alike=("kind",)
)
def _display(d: Draw, side: int) -> Snippet:
    """A list or a dict, on one line or on several; in a pair the list has the dict's keys and values."""
    name = d.new()
    size = d.knob("length", (3, 4), common=(1, 2, 2))
    # Numbers, variables or strings.
    kind = d.knob("kind", (0, 1, 2), common=(2, 2))
    make = (d.number, lambda: d.given("number"), lambda: d.quoted(d.new(words.WORDS), answer=True))[kind]
    keys = [make() for _ in range(size)]
    values = [d.quoted(d.phrase(1, 1)) if d.embellish(0.2) else d.number() for _ in keys]
    keys[d.between(min(2, size - 1), size - 1)] += d.cut
    mark, opening, closing = ((",", "[", "]"), (":", "{", "}"))[side]
    elements = [f"{key}{mark} {value}" for key, value in zip(keys, values, strict=True)]
    if side == 0 and d.embellish(0.5):
        elements = keys
    if d.plain(0.65):
        return d.snippet(f"{name} = {opening}{', '.join(elements)}{closing}", result=name)
    body = indented([f"{element}," for element in elements])
    return d.snippet(f"{name} = {opening}", *body, closing, result=name)


@_contrast(
    "fstring_brace",
    "insert a variable into an f-string, close a plain one, though Python allows either in both",
    *(Form(" {", '")\n'), Form(" {", '")'), Form(" {", '"')),
    weight=1.5,
)
def _print_variable(d: Draw, side: int) -> Snippet:
    if d.chance(0.5):
        variable = d.new()
        change = [f"{variable} = {d.number()}"]
    else:
        variable = d.given("number")
        change = [f"{variable} += {d.number()}"] if d.chance(0.5) else []
    text = d.formatted(variable) if side == 0 else f"print({d.quoted(f'{d.text()}{d.cut}', answer=True)})"
    return d.snippet(*change, text)


# ---- Variables ----


def _accumulate(d: Draw, side: int, *, fixed: bool) -> Snippet:
    """A set and a string, one of which takes in values some lines later; in documents sometimes alone.

    Side 0 lets the set grow, side 1 the string. With `fixed` the variable that grows has always one name.
    """
    starts = ["set()", '""']
    if fixed:
        name, other = words.FIXED_VARIABLE, d.new(plural=d.chance(0.5))
        d.taken.add(name)
        lines = [f"{name} = {starts[side]}", f"{other} = {starts[1 - side]}"]
    else:
        both = [d.new(plural=d.chance(0.5)) for _ in starts]
        name = both[side]
        lines = [f"{variable} = {start}" for variable, start in zip(both, starts, strict=True)]
    if d.knob("order", (0, 1)):
        lines.reverse()
    if d.embellish(0.4):
        lines = [line for line in lines if line.startswith(f"{name} ")]
    lines += d.statements((0, 1), common=(2,))
    update = f"{name}{d.cut}.add({{}})" if side == 0 else f"{name}{d.cut} += {{}}"
    if d.embellish(0.2):
        return d.snippet(*lines, update.format(d.given("text")), result=name)
    item, items = d.items("words")
    body = [d.statement()] if d.embellish(0.2) else []
    update = update.format(item)
    body += [f"if {d.condition()}:", f"    {update}"] if d.embellish(0.25) else [update]
    if d.chance(0.5):
        lines.append(f"for {item} in {items}:")
    else:
        lines += [f"while {items}:", f"    {item} = {items}.pop()"]
    return d.snippet(*lines, *indented(body), result=name)


_GROWTH = (Form(".add", " +="), Form(".", " +="))
_contrast(
    "set_or_string",
    "let a variable grow by how it was initialized, where another was initialized otherwise",
    *_GROWTH,
    weight=2.5,
    distractors=(0,),
)(partial(_accumulate, fixed=False))
_contrast(
    "set_or_string_fixedvarname",
    "let a variable grow by how it was initialized; it always has the same name",
    *_GROWTH,
    weight=2.0,
    distractors=(0,),
)(partial(_accumulate, fixed=True))


@_contrast("var_swap", "complete the exchange of two variables", *_OWN, distractors=(0,))
def _swap(d: Draw, side: int) -> Snippet:
    """Two variables exchanged; which one is named first does not follow from the lines before."""
    source = words.LETTERS if d.chance(0.25) else words.NOUNS
    left, right = d.new(source), d.new(source)
    lines = [f"{left} = {d.number()}", f"{right} = {d.number()}", *d.statements((0, 0, 1))]
    if side == 1:
        left, right = right, left
    swap = f"{left}, {right} = {right},{d.cut} {left}{d.cut}"
    if d.embellish(0.4):
        return d.snippet(*lines, f"if {left} > {right}:", f"    {swap}")
    return d.snippet(*lines, swap, result=left)


@_contrast("if_equals", "compare in a condition, assign in a statement", Form(" ==", " ="), weight=1.5)
def _compare(d: Draw, side: int) -> Snippet:
    value = d.number() if d.chance(0.7) else d.quoted(d.phrase(1, 1))
    name = d.long()
    if side == 0:
        d.expect(name, "number")
        return d.snippet(f"if {name}{d.cut} == {value}:", f"    {d.statement()}")
    return d.snippet(f"{name}{d.cut} = {value}", *([d.statement()] if d.chance(0.3) else []))


@_contrast(
    "var_if",
    "follow a truth value that is assigned or compared",
    Form("\n", ":\n"),
    Form("\n", ":"),
    weight=1.5,
)
def _truth(d: Draw, side: int) -> Snippet:
    """The end of `found = ready == True` or of `if ready == True:`; in documents also of `ready = True`."""
    value = "True" if d.chance(0.7) else "False"
    if side == 0 and d.embellish(0.5):
        name = d.new(words.FLAGS)
        return d.snippet(f"{name} = {value}", d.statement(), result=name)
    compared = d.expect(d.new(words.FLAGS), "flag")
    name = d.new(words.FLAGS)
    comparison = f"{compared} {d.either('==', '==', 'is')} {value}{d.cut}"
    if side == 0:
        return d.snippet(f"{name} = {comparison}", result=name)
    return d.snippet(f"if {comparison}:", f"    {d.statement()}")


# ---- Functions, classes and files ----


@_contrast(
    "final_kwarg",
    "give the last argument a default where those before it have one, though Python allows one anywhere",
    *(Form("):\n", "=None"), Form("):\n", "="), Form(")", "=")),
    places=("definition",),
    distractors=(0, *(2,) * 9),
)
def _function(d: Draw, side: int) -> Snippet:
    arguments = [d.new() for _ in range(d.knob("length", (2, 2, 3), common=(4,)) - 1)]
    arguments.append(d.long())
    name = d.function()
    signature, default = d.signature(arguments, defaults=side == 1), "=None" * side
    inside = d.inside(arguments)
    body = [inside.statement()] if d.embellish(0.5) else []
    return inside.snippet(
        f"def {name}({signature.removesuffix(default)}{d.cut}{default}):",
        *indented([*body, f"return {d.either(*arguments)}"]),
    )


@_contrast(
    "class_init",
    "store the argument that the attribute is named after",
    *_OWN,
    places=("definition",),
    distractors=(0,),
    local="the attribute's name, two tokens before, is the answer",
)
def _class(d: Draw, side: int) -> Snippet:
    attributes = [d.new() for _ in range(d.knob("length", (2, 3)))]
    lines = d.constructor(attributes, reverse=side == 1)
    if d.embellish(0.4):
        head = f"def {d.function()}(self):"
        lines += ["", *indented([head, f"    return self.{d.either(*attributes)}"])]
    return d.snippet(*lines)


@_contrast(
    "lambda_func",
    "follow the arguments of a lambda or of a function",
    *(Form(":", "):\n"), Form(":", "):"), Form(":", ")")),
    # Inside a function: a name has a space before it on both sides.
    places=("function", "method"),
    weight=1.5,
)
def _lambda_or_def(d: Draw, side: int) -> Snippet:
    name = d.function() if d.paired or side == 1 else d.new()
    source = words.LETTERS if d.chance(0.3) else words.NOUNS
    arguments = [d.new(source) for _ in range(d.knob("length", (1, 2, 2), common=(1,)) - 1)]
    arguments.append(d.long())
    result = d.arithmetic(d.either(*arguments))
    arguments = ", ".join(arguments)
    if side == 0:
        function = f"lambda {arguments}{d.cut}: {result}"
        if not d.plain(0.7):
            function = f"sorted({d.given('numbers')}, key={function})"
        return d.snippet(f"{name} = {function}", result=name)
    return d.snippet(f"def {name}({arguments}{d.cut}):", f"    return {result}")


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


_contrast(
    "with_as",
    "go on with `as` after `with open(...)`, end the line after `f = open(...)`",
    *(Form(" as", "\n", given='")'), Form('")', '")\n'), Form('"', '")\n')),
    distractors=(0, 1, *(2,) * 16),
)(partial(_file, by_name=False))
_contrast(
    "with_open",
    "open a file for reading or writing by its name, where files of both kinds were opened before",
    Form("r", "w"),
    weight=1.5,
    distractors=(0, 1, *(2,) * 16),
    local="the file's name is the decision",
)(partial(_file, by_name=True))


# ---- Control flow ----


@_contrast(
    "for_while",
    "follow the variable of `for` or of `while`, whose condition may go on with `in` too",
    *(Form(" in", ":\n"), Form(" in", ":")),
)
def _loop(d: Draw, side: int) -> Snippet:
    name = d.long()
    if side == 0:
        items = d.expect(d.new(plural=True), "numbers")
        head, end = f"for {name}{d.cut} in {items}:", []
    else:
        d.expect(name, "number")
        head, end = f"while {name}{d.cut}:", [f"{name} -= 1"]
    body = d.statement() if d.chance(0.5) else f"print({name})"
    return d.snippet(head, *indented([body, *end]))


@_contrast(
    "enumerate_range",
    "loop over what fits one or two variables",
    *(Form(" enumerate", " range"), Form(" enumerate", " range", beginning=True)),
    weight=1.5,
)
def _counted_loop(d: Draw, side: int) -> Snippet:
    # In prompts one index for each split, so that distractors have the same.
    index, name = d.one(words.INDICES[:3] if d.paired else words.INDICES), d.long()
    if side == 0:
        items = d.expect(d.new(plural=True), "numbers")
        head = f"for {index}, {name} in{d.cut} enumerate({items}):"
    else:
        name = name if d.paired or d.chance(0.5) else index
        head = f"for {name} in{d.cut} range({d.number() if d.chance(0.7) else d.given('number')}):"
    return d.snippet(head, f"    {d.statement() if d.chance(0.4) else f'print({name})'}")


@_contrast(
    "indent_for",
    "indent the line after the head of a loop, not the line after a statement",
    # Inside a function; the last of the spaces belongs to the word that follows.
    Form(" " * 7, " " * 3),
    weight=0.25,
    places=("function",),
    local="the token before, a colon and the line's end or only that, decides",
)
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


@_contrast(
    "else_elif",
    "follow `else` or `elif`",
    *(Form(":\n", " not"), Form(":", " not"), Form(":\n", " not", beginning=True)),
    weight=0.5,
    local="the token before, `else` or `elif`, decides",
)
def _else(d: Draw, side: int) -> Snippet:
    lines = [f"if {d.condition()}:", f"    {d.statement()}"]
    if d.embellish(0.15):
        lines += [f"elif {d.condition()}:", f"    {d.statement()}"]
    if side == 0:
        lines.append(f"else{d.cut}:")
    else:
        # The answer of a pair must be one and the same word.
        condition = f"not {d.given('flag')}" if d.plain(0.4) else d.condition()
        lines.append(f"elif{d.cut} {condition}:")
    return d.snippet(*lines, f"    {d.statement()}")


@_contrast(
    "if_ternary",
    "follow the condition of a statement or of an expression",
    *(Form(":\n", " else"), Form(":", " else")),
    weight=2.5,
)
def _if(d: Draw, side: int) -> Snippet:
    name = d.new()
    if side == 1:
        return d.snippet(d.ternary(name), result=name)
    return d.snippet(f"if {d.condition()}{d.cut}:", f"    {name} = {d.number()}")


@_contrast(
    "while_return_true",
    "follow the condition of `while` or what `return` gives back",
    *(Form(":\n", "\n"), Form(":", "\n")),
    places=("function", "method"),
    weight=1.5,
)
def _while_or_return(d: Draw, side: int) -> Snippet:
    """`while ready == True:` or `return ready == True`; in documents also `while True:` and `return True`."""
    value = "True" if d.chance(0.7) else "False"
    if d.embellish(0.5):
        compared = value if side == 1 else "True"
    else:
        compared = f"{d.expect(d.new(words.FLAGS), 'flag')} {d.either('==', '==', 'is')} {value}"
    head = f"if {d.condition()}:"
    if side == 0:
        lines = [f"while {compared}{d.cut}:", "    break"]
        return d.snippet(head, *indented(lines)) if d.plain(0.5) else d.snippet(*lines)
    return d.snippet(head, f"    return {compared}{d.cut}")

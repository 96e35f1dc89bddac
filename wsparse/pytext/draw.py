"""Drawing: every random choice about a program goes through one object.

Text to train on and prompts of tasks are two readings of the same grammar. In documents (`split` is None) a
draw uses all words and all forms; in prompts it uses the words of one split, so that the two sides of a pair,
drawn with the same seed, differ only in what decides.

What makes a prompt easy or hard is a *knob*: a whole number with a name, drawn like everything else, noted,
and set from outside by whoever wants to see a model's loss by its value. The knobs of the grammar are

- `distractors`: finished statements of the same contrast, of both its sides, before the one that is cut;
- `distance`: statements between what decides and the decision;
- `depth`: levels of indentation of the statement that is cut;
- `length`: words of a string, elements of a list, arguments of a function;
- `words`: words of the name before the decision; what decides stands before them;
- `order`: what of two comes first; `callee`: `print` (0) or another function (1);
- `nested`: whether a string holds the other quote;
- `kind`: of what a list or a dict is, numbers (0), variables (1) or strings (2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import itertools
import random
from typing import Literal, TypeVar

from wsparse.pytext import words
from wsparse.pytext.choices import Choices
from wsparse.pytext.words import NOUNS, Split

T = TypeVar("T")
Kind = Literal["number", "numbers", "words", "text", "flag", "path", "call"]

# What decides is further from the decision than a few tokens, but for some prompts that show what that does.
_WORDS_OF_NAME = (1, 2, *(3,) * 10)


def seed_of(text: str) -> int:
    """Returns the seed of the draws that a text names."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snippet:
    """A few lines of code at indentation zero, for a module or for a function's body.

    Attributes:
      lines: Code without line ends.
      needs: Names that the lines read before they assign them, with the kind of value expected.
      result: Variable that a function around the lines could return, or "".
    """

    lines: list[str]
    needs: dict[str, Kind]
    result: str = ""

    @property
    def definition(self) -> bool:
        """Whether the lines are a function or a class, which belongs at module level."""
        return self.lines[0].startswith(("def ", "class ", "@"))


def indented(lines: Sequence[str]) -> list[str]:
    """Returns the lines one level deeper."""
    return [f"    {line}" if line else line for line in lines]


def joined(blocks: Sequence[list[str]]) -> str:
    """Returns the text, with two blank lines around functions and classes, one between other blocks."""
    lines = list(blocks[0])
    for before, after in itertools.pairwise(blocks):
        defines = any(block[0].startswith(("def ", "class ", "@")) for block in (before, after))
        lines += ["", "", *after] if defines else ["", *after]
    return "\n".join(lines) + "\n"


def imports(d: Draw, needs: Mapping[str, Kind]) -> list[list[str]]:
    """Returns the import of the functions that are needed, as blocks of lines."""
    calls = sorted(name for name, kind in needs.items() if kind == "call")
    return [[f"from {d.either('helpers', 'tools')} import {', '.join(calls)}"]] if calls else []


class Draw(Choices):
    """The random choices of one snippet, and its names: each is new, and those it needs are noted.

    Attributes:
      arguments: Names that a definition reads instead of outer names.
      taken: Names that are in use.
      needs: Names that must exist before the snippet, with their kind of value.
    """

    def __init__(
        self,
        rng: random.Random,
        split: Split | None = None,
        *,
        cut: str = "",
        arguments: Sequence[str] = (),
        fixed: Mapping[str, int] | None = None,
    ):
        super().__init__(rng, split, cut=cut, fixed=fixed)
        self.arguments = arguments
        self.taken = set(arguments)
        self.needs: dict[str, Kind] = {}

    def inside(self, arguments: Sequence[str] = ()) -> Draw:
        """Returns a scope of its own, for the inside of a function with these arguments."""
        draw = Draw(self.rng, self.split, cut=self.cut, arguments=arguments, fixed=self.fixed)
        draw.knobs = self.knobs
        return draw

    def snippet(self, *lines: str, result: str = "") -> Snippet:
        """Returns the lines with the names that they need."""
        return Snippet(lines=list(lines), needs=self.needs, result=result)

    def one(self, fillers: Sequence[T], *, early: bool = False) -> T:
        """Returns one of the split's fillers; with `early`, often a common word, which is one token."""
        if self.split is not None:
            fillers = words.fillers_of(self.split, fillers)
        return fillers[int(self.rng.random() ** (2 if early else 1) * len(fillers))]

    # ---- Names ----

    def new(self, source: Sequence[str] = NOUNS, *, plural: bool = False, n_words: int = 0) -> str:
        """Returns a name that is not in use, for the snippet to assign; of one or two words by default."""
        for attempt in itertools.count():
            name = self.one(source, early=True)
            # A split has few letters and flags; where all are taken, names get longer.
            if n_words == 3 or attempt > 200:
                name = f"{self.one(words.PREFIXES)}_{name}_{self.one(NOUNS, early=True)}"
            elif n_words == 2 or attempt > 20 or (not n_words and source is NOUNS and self.embellish(0.12)):
                name = f"{self.one(words.PREFIXES)}_{name}"
            if plural:
                name = f"{name}s"
            if name not in self.taken:
                self.taken.add(name)
                return name
        raise AssertionError("attempts have no end")

    def long(self, source: Sequence[str] = NOUNS) -> str:
        """Returns a new name of as many words as the knob `words` says, to stand before a decision."""
        return self.new(source, n_words=self.knob("words", _WORDS_OF_NAME, common=(1,) * 30))

    def expect(self, name: str, kind: Kind) -> str:
        """Notes that `name` must exist before the snippet, and returns it."""
        self.taken.add(name)
        self.needs[name] = kind
        return name

    def given(self, kind: Kind) -> str:
        """Returns a name that must exist before the snippet: an argument, or one not used so far."""
        if self.arguments:
            return self.either(*self.arguments)
        known = [name for name, other in self.needs.items() if other == kind]
        if known and self.chance(0.7 if self.paired else 0.2):
            return self.either(*known)
        source = words.FLAGS if kind == "flag" else NOUNS
        return self.expect(self.new(source, plural=kind in ("numbers", "words")), kind)

    def items(self, kind: Kind) -> tuple[str, str]:
        """Returns a new name for the elements of a given list, and the list's, usually its plural."""
        while True:
            item = self.new()
            plural = self.chance(0.75)
            items = f"{item if plural else self.one(NOUNS, early=True)}s"
            if items not in self.taken:
                return item, self.expect(items, kind)

    def function(self) -> str:
        """Returns the name of a function."""
        verb = self.one(words.VERBS, early=True)
        return f"{verb}_{self.one(NOUNS, early=True)}" if self.chance(0.6) else verb

    # ---- Values ----

    def number(self) -> str:
        return str(self.one(words.DIGITS if self.chance(0.8) else words.TENS))

    def numbers(self, low: int, high: int) -> str:
        """Returns so many numbers, separated by commas."""
        return ", ".join(self.number() for _ in range(self.between(low, high)))

    def phrase(self, low: int, high: int) -> str:
        """Returns some words, separated by spaces."""
        count = self.between(low, high)
        return " ".join(self.one(words.WORDS, early=True) for _ in range(count))

    def text(self) -> str:
        """Returns as many words as the knob `length` says, to stand before the end of a string."""
        length = self.knob("length", (1, 2, *(3, 4, 5) * 4), common=(1, 2) * 8)
        return self.phrase(length, length)

    def quoted(self, text: str, *, answer: bool = False) -> str:
        """Returns a string literal; where its end is an `answer`, prompts always use double quotes."""
        single = self.embellish(0.5) if answer else self.chance(0.5)
        return f"'{text}'" if single else f'"{text}"'

    def value(self, name: str, kind: Kind) -> str:
        """Returns an expression for a variable of this name and kind."""
        # If all lists were written out, they would outnumber nested lists and dicts by far.
        written_out = self.chance(0.5)
        if kind == "number":
            return self.number()
        if kind == "numbers":
            return f"[{self.numbers(1, 5)}]" if written_out else f"list(range({self.number()}))"
        if kind == "words":
            texts = [self.phrase(1, 1) for _ in range(self.between(2, 4))]
            listed = f"[{', '.join(self.quoted(text) for text in texts)}]"
            return listed if written_out else f"{self.quoted(' '.join(texts))}.split()"
        if kind == "flag":
            return self.either("True", "False")
        if kind == "path":
            return self.quoted(f"{name.split('_')[0]}.{self.one(words.SUFFIXES)}")
        return self.quoted(self.phrase(1, 4))

    # ---- Expressions and statements ----

    def condition(self) -> str:
        """Returns a condition; in prompts of three tokens or more."""
        draw = self.rng.random()
        if draw < 0.3 and not self.paired:
            return self.given("flag")
        if draw < 0.4:
            return f"not {self.given('flag')} {self.either('and', 'or')} {self.given('flag')}"
        if draw < 0.5:
            return f"{self.given('flag')} {self.either('and', 'or')} {self.given('flag')}"
        if draw < 0.55:
            return f"not {self.expect(self.long(words.FLAGS), 'flag')}"
        comparison = self.either(">", "<", ">=", "<=", "==", "==", "!=")
        return f"{self.given('number')} {comparison} {self.number()}"

    def arithmetic(self, name: str) -> str:
        """Returns an expression of a variable."""
        return f"{name} {self.either('+', '-', '*')} {self.number()}"

    def callee(self) -> str:
        """Returns the name of a function that takes strings."""
        return self.expect(self.one(words.CALLS), "call") if self.knob("callee", (0, 0, 1)) else "print"

    def say(self) -> str:
        """Returns a call that ends with a string."""
        first = f"{self.given('number')}, " if self.chance(0.15) else ""
        return f"{self.callee()}({first}{self.quoted(self.phrase(1, 4))})"

    def formatted(self, variable: str) -> str:
        """Returns a call that prints a variable inside a string."""
        text = self.text()
        variable = f"{{{variable}}}"
        leads = self.embellish(0.15)
        text = f"{variable} {text}" if leads else f"{text}{self.cut} {variable}"
        return f"print(f{self.quoted(text, answer=True)})"

    def ternary(self, name: str) -> str:
        condition = self.condition()
        return f"{name} = {self.number()} if {condition}{self.cut} else {self.number()}"

    def statement(self) -> str:
        """Returns one statement on one line; a prompt's has nothing to do with the task."""
        draw = self.rng.random()
        if self.paired:
            if draw < 0.4:
                return f"print({self.quoted(self.phrase(1, 2))})"
            return f"{self.new()} = {self.number()}"
        if draw < 0.3:
            return self.say()
        if draw < 0.4:
            return self.formatted(self.given("number"))
        if draw < 0.63:
            return f"{self.new()} = {self.number()}"
        if draw < 0.7:
            return self.ternary(self.new())
        if draw < 0.8:
            return f"{self.given('number')} += 1"
        if draw < 0.92:
            return f"{self.new()} = len({self.given('numbers')})"
        return f"{self.given('numbers')}.append({self.number()})"

    def statements(self, choices: Sequence[int], *, common: Sequence[int] = ()) -> list[str]:
        """Returns as many statements as the knob `distance` says."""
        return [self.statement() for _ in range(self.knob("distance", choices, common=common))]

    # ---- Functions and classes ----

    def signature(self, arguments: Sequence[str], *, defaults: bool) -> str:
        """Returns arguments without a default, or at least the last two with `=None`."""
        if not defaults or len(arguments) < 2:
            return ", ".join(arguments)
        required = int(len(arguments) > 2 and self.chance(0.4))
        optional = (f"{name}=None" for name in arguments[required:])
        return ", ".join([*arguments[:required], *optional])

    def constructor(self, attributes: Sequence[str], *, reverse: bool) -> list[str]:
        """Returns the head of a class that stores its arguments, in their order or the reverse.

        As both orders occur, only the attribute's name tells which argument comes next.
        """
        first, *others = attributes[::-1] if reverse else attributes
        name = self.one(NOUNS, early=True).capitalize()
        if self.embellish(0.3):
            name += self.one(words.CLASS_KINDS)
        return [
            f"class {name}:",
            f"    def __init__(self, {', '.join(attributes)}):",
            f"        self.{first} ={self.cut} {first}{self.cut}",
            *(f"        self.{attribute} = {attribute}" for attribute in others),
        ]

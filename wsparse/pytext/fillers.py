"""What small programs have besides the contrasts: text for documents, from which no task is made."""

from __future__ import annotations

from collections.abc import Callable

from wsparse.pytext import words
from wsparse.pytext.draw import Draw, Snippet, indented


def _comprehension(d: Draw) -> Snippet:
    item, items = d.items("numbers")
    name = d.new(plural=True)
    condition = f" if {item} {d.either('>', '<', '!=')} {d.number()}" if d.chance(0.5) else ""
    element = d.either(item, d.arithmetic(item), f"str({item})")
    opening, closing = d.either("[]", "[]", "()")
    call = "" if opening == "[" else d.either("sum", "max", "list", "set")
    return d.snippet(
        f"{name} = {call}{opening}{element} for {item} in {items}{condition}{closing}", result=name
    )


def _table_comprehension(d: Draw) -> Snippet:
    item, items = d.items("words")
    name = d.new()
    return d.snippet(f"{name} = {{{item}: len({item}) for {item} in {items}}}", result=name)


def _attempt(d: Draw) -> Snippet:
    name, text, error = d.new(), d.given("text"), d.either("ValueError", "TypeError", "OSError")
    lines = ["try:", f"    {name} = {d.either('int', 'float')}({text})", f"except {error}:"]
    other = d.either(f"    {name} = {d.number()}", "    raise", f"    {name} = None")
    final = ["finally:", f"    {d.statement()}"] if d.chance(0.15) else []
    return d.snippet(*lines, other, *final, result=name)


def _refusal(d: Draw) -> Snippet:
    if d.chance(0.3):
        return d.snippet(f"assert {d.condition()}")
    error = d.either("ValueError", "KeyError", "RuntimeError")
    return d.snippet(f"if {d.condition()}:", f"    raise {error}({d.quoted(d.phrase(2, 4))})")


def _string_method(d: Draw) -> Snippet:
    name, text = d.new(), d.given("text")
    call = d.either(
        "strip()", "lower()", "strip().lower()", "upper()", "title()", f"count({d.quoted(d.phrase(1, 1))})"
    )
    return d.snippet(f"{name} = {text}.{call}", result=name)


def _join(d: Draw) -> Snippet:
    name, items = d.new(), d.given("words")
    return d.snippet(f"{name} = {d.quoted(d.either(' ', ', ', '-', ''))}.join({items})", result=name)


def _subscript(d: Draw) -> Snippet:
    name, items = d.new(), d.given("numbers")
    digit = d.one(words.DIGITS)
    return d.snippet(
        f"{name} = {items}[{d.either('0', '-1', str(digit), f'{digit}:', f':{digit}', '::-1')}]", result=name
    )


def _function_of_list(d: Draw) -> Snippet:
    name, items = d.new(), d.given("numbers")
    call = d.either("max", "min", "sum", "sorted", "len", "any", "all", "reversed")
    return d.snippet(f"{name} = {call}({items})", result=name)


def _table_entry(d: Draw) -> Snippet:
    table, key, name = d.new(), d.quoted(d.phrase(1, 1)), d.new()
    lines = [f"{table} = {d.either('{}', 'dict()')}", f"{table}[{key}] = {d.number()}"]
    return d.snippet(*lines, f"{name} = {table}.get({key}, {d.number()})", result=name)


def _branches(d: Draw) -> Snippet:
    name, value = d.new(), d.given("number")
    low = d.number()
    lines = [f"if {value} < {low}:", f"    {name} = {d.number()}", f"elif {value} == {low}:"]
    return d.snippet(*lines, f"    {name} = {d.number()}", "else:", f"    {name} = {value}", result=name)


def _search(d: Draw) -> Snippet:
    item, items = d.items("numbers")
    word = d.either("break", "continue")
    after = [d.statement()] if word == "continue" or d.chance(0.3) else []
    return d.snippet(
        f"for {item} in {items}:", f"    if {item} == {d.number()}:", f"        {word}", *indented(after)
    )


def _nested_loops(d: Draw) -> Snippet:
    total = d.new()
    loops = [
        f"for i in range({d.number()}):",
        f"    for j in range({d.number()}):",
        f"        {total} += i * j",
    ]
    return d.snippet(f"{total} = 0", *loops, result=total)


def _missing(d: Draw) -> Snippet:
    name = d.given("text")
    negated = d.either("", "not ")
    return d.snippet(f"if {name} is {negated}None:", f"    {d.statement()}")


def _membership(d: Draw) -> Snippet:
    name, items = d.given("number"), d.given("numbers")
    return d.snippet(f"if {name} {d.either('in', 'not in')} {items}:", f"    {items}.append({name})")


def _constant(d: Draw) -> Snippet:
    return d.snippet(f"{d.new().upper()} = {d.either(d.number(), d.quoted(d.phrase(1, 2)))}")


def _typed_function(d: Draw) -> Snippet:
    argument, kind = d.new(), d.either("int", "float", "str", "list")
    returned = d.either(argument, f"{kind}({argument})")
    docstring = [f'    """Return the {d.phrase(1, 2)}."""'] if d.chance(0.4) else []
    return d.snippet(
        f"def {d.function()}({argument}: {kind}) -> {kind}:", *docstring, f"    return {returned}"
    )


def _property(d: Draw) -> Snippet:
    name = d.new()
    head = [f"class {d.new().capitalize()}:", f"    {name} = {d.number()}", ""]
    decorator = d.either("@property", "@property", "@classmethod")
    receiver = "cls" if decorator == "@classmethod" else "self"
    method = [decorator, f"def {d.function()}({receiver}):", f"    return {receiver}.{name}"]
    return d.snippet(*head, *indented(method))


FILLERS: tuple[Callable[[Draw], Snippet], ...] = (
    *(_comprehension, _comprehension, _table_comprehension, _attempt, _refusal, _string_method, _join),
    *(_subscript, _function_of_list, _table_entry, _branches, _search, _nested_loops, _missing),
    *(_membership, _constant, _typed_function, _property),
)
"""Functions that write a snippet each, chosen with equal odds."""

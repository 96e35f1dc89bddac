"""Pairs of prompts: programs that parse, never change, and differ only in what decides.

The texts are judged here with Python's own parser.
"""

from __future__ import annotations

import builtins
from collections import Counter
import hashlib
import itertools
import keyword
import re

from helpers import parses
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from wsparse.errors import UserError
from wsparse.pytext import prompts, words
from wsparse.pytext.contrasts import CONTRASTS

# The first pairs of every task, split and two seeds: whoever changes it changes every circuit.
GOLDEN = "21acfcfeee10d7ffef49e3a8e4e3f6169c5a43dee118dd525f8f4861204d4f01"


def pairs_of(name: str, split: words.Split, count: int, seed: int = 0) -> list[prompts.Pair]:
    return list(itertools.islice(prompts.pairs(name, seed, split), count))


def test_splits_share_neither_templates_nor_fillers():
    # What decides, and Python itself, is no filler.
    shared = {*keyword.kwlist, *dir(builtins), "self", "init", "current", "helpers", "tools", "the"}
    shared |= {"add", "pop", "split", "f", "r", "w", *itertools.chain(*words.STEMS.values())}
    shared |= {"read", "readline", "readlines", "write", "close"}

    def fillers(name: str, split: words.Split) -> set[str]:
        texts = [side.prompt for pair in pairs_of(name, split, 150) for side in (pair.first, pair.second)]
        # The decided word of a user's path, `input_path`, is not a filler either.
        text = re.sub(r"[a-z]+_(path|file|name)\b|\[0\]|-= 1", "", "\n".join(texts)).lower()
        tokens = set(re.findall(r"[a-z]+|\d+", text.replace("_", " ")))
        plurals = {f"{noun}s": noun for noun in words.NOUNS}
        singular = {plurals.get(word, word) for word in tokens}
        return singular - {word.lower() for word in shared}

    for name in CONTRASTS:
        found = [fillers(name, split) for split in words.SPLITS]
        templates = [{p.template for p in pairs_of(name, split, 150)} for split in words.SPLITS]
        for a, b in itertools.combinations(range(3), 2):
            assert not found[a] & found[b], name
            assert not templates[a] & templates[b], name
        assert min(map(len, found)) >= 30, name
        assert min(map(len, templates)) >= 2, name


def test_each_task_has_thousands_of_pairs():
    for name in CONTRASTS:
        made = {(p.first.prompt, p.second.prompt) for p in pairs_of(name, "search", 2200)}
        assert len(made) >= 2000, name


def test_pairs_differ_only_in_what_decides():
    """Both sides have the same context, and the same words but for those that decide."""
    for name in CONTRASTS:
        for pair in pairs_of(name, "discretize", 30):
            counts = [Counter(re.findall(r"\w+", side.prompt)) for side in (pair.first, pair.second)]
            differing = (counts[0] - counts[1]) | (counts[1] - counts[0])
            assert differing.total() <= 8, (pair.first.prompt, pair.second.prompt)
            context = [side.prompt.splitlines()[:2] for side in (pair.first, pair.second)]
            assert context[0] == context[1]


def test_pairs_never_change():
    digest = hashlib.sha256()
    for name, split, seed in itertools.product(CONTRASTS, words.SPLITS, (0, 1)):
        for pair in pairs_of(name, split, 3, seed):
            for side in (pair.first, pair.second):
                digest.update(f"{side.prompt}\0{side.rest}\0{side.answer}\0".encode())
    assert digest.hexdigest() == GOLDEN


@given(st.sampled_from(sorted(CONTRASTS)), st.integers(-(2**40), 2**70), st.sampled_from(words.SPLITS))
@settings(max_examples=60)
def test_any_seed_makes_programs(name, seed, split):
    made = pairs_of(name, split, 3, seed)
    assert made == pairs_of(name, split, 3, seed)
    for pair in made:
        for side in (pair.first, pair.second):
            assert parses(side.prompt + side.rest)
            assert side.rest.startswith(side.answer)
            assert "¦" not in side.prompt + side.rest


def test_knobs_are_noted_with_each_pair_and_can_be_set():
    drawn = pairs_of("single_double_quote", "search", 100)
    assert {pair.knobs["distractors"] for pair in drawn} >= {1, 2, 3}
    for value in (0, 3):
        fixed = list(
            itertools.islice(prompts.pairs("for_while", 0, "search", knobs={"distractors": value}), 20)
        )
        for pair in fixed:
            assert pair.knobs["distractors"] == value
            loops = re.findall(r"^ *(?:for|while) ", pair.first.prompt, flags=re.MULTILINE)
            assert len(loops) == value + 1
    nested = next(prompts.pairs("single_double_quote", 0, "search", knobs={"nested": 1, "distractors": 0}))
    assert re.search(r"'[a-z ]+ \"[a-z]+\" [a-z ]+$", nested.first.prompt)
    assert re.search(r"\"[a-z ]+ '[a-z]+' [a-z ]+$", nested.second.prompt)


@pytest.mark.parametrize("name", ["if_ternary", "while_return_true", "else_elif"])
def test_a_knob_that_few_pairs_have_can_be_set(name):
    few = [pair for pair in pairs_of(name, "search", 300) if "words" in pair.knobs]
    fixed = list(itertools.islice(prompts.pairs(name, 0, "search", knobs={"words": 2}), len(few)))
    assert {pair.knobs["words"] for pair in fixed} == {2} != {pair.knobs["words"] for pair in few}
    assert 5 < len(few) < 40 and [pair.template for pair in fixed] == [pair.template for pair in few]


def test_a_knob_that_a_task_lacks_is_refused():
    with pytest.raises(UserError, match=r"no knob 'nestd' \(did you mean 'nested'\?\); it has .*distractors"):
        next(prompts.pairs("single_double_quote", 0, "search", knobs={"nestd": 1}))
    with pytest.raises(UserError, match="'distractors' must be one of 0, 1, 2, 3 here, got 7"):
        next(prompts.pairs("single_double_quote", 0, "search", knobs={"distractors": 7}))


def test_a_finished_statement_of_each_side_stands_before_the_one_that_is_cut():
    decided = {
        "with_as": (r"with open.* as ", r"\w = open.*\)\n"),
        "if_equals": (r"if .* == .*:\n", r"\w = \S+\n"),
    }
    for name, patterns in decided.items():
        for pair in itertools.islice(prompts.pairs(name, 5, "report", knobs={"distractors": 2}), 20):
            for side in (pair.first, pair.second):
                finished = side.prompt[: side.prompt.rindex("\n") + 1]
                assert all(re.search(pattern, finished) for pattern in patterns), side.prompt

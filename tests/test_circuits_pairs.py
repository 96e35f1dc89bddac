"""Encoded pairs: candidates are one token in context, whatever the tokenizer; scores against float64.

The texts are judged here with Python's own parser and with the tokenizer, not with the forms' table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import difflib
import itertools
import math

from helpers import parses
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse.circuits import tasks
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError
from wsparse.pytext import words
from wsparse.pytext.documents import document

VOCABS = (512, 1024, 2048)


# Tasks whose sides the tokenizer of 1024 cuts into the same number of tokens.
EQUAL_LENGTHS = {
    "single_double_quote",
    "set_or_string",
    "set_or_string_fixedvarname",
    "lambda_func",
    "bracket_counting",
    "class_init",
    "with_open",
    "bracket_brace",
    "for_while",
    "else_elif",
    "var_swap",
    "indent_for",
    "while_return_true",
}


# With the wrong answer and the right one's continuation, Python refuses the program.
SYNTAX = {
    "single_double_quote",
    "bracket_counting",
    "bracket_brace",
    "for_while",
    "else_elif",
    "if_ternary",
    "lambda_func",
    "while_return_true",
}


def pairs_of(task: str, split: tasks.Split, count: int, seed: int = 0) -> list[tasks.Pair]:
    return list(itertools.islice(tasks.TASKS[task].stream(seed, split), count))


def distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens in which two rows differ, insertions and deletions included."""
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return max(len(a), len(b)) - sum(block.size for block in blocks)


def row_ids(batch: tasks.TaskBatch) -> Iterator[list[int]]:
    for tokens_T, position in zip(batch.tokens, batch.position, strict=True):
        yield tokens_T[: position + 1].tolist()


@pytest.mark.parametrize("vocab", [1024, 2048])
@pytest.mark.parametrize("name", tasks.TASKS)
def test_batches(tokenizers, name, vocab):
    tokenizer = tokenizers[vocab]
    batch = tasks.build(name, tokenizer, 12, seed=3, max_tokens=128)
    rows = list(row_ids(batch))

    assert batch.n_pairs == 12
    assert len(rows) == 24
    assert (batch.task, batch.split, batch.seed) == (name, "search", 3)
    for array in (batch.tokens, batch.position, batch.answer, batch.other):
        assert array.dtype == np.int32
    assert batch.tokens.shape == (24, batch.position.max() + 1)
    assert len(set(batch.prompts)) == 24
    equal_lengths = np.array_equal(batch.position[::2], batch.position[1::2])
    assert equal_lengths == (name in EQUAL_LENGTHS)
    np.testing.assert_array_equal(batch.other[::2], batch.answer[1::2])
    np.testing.assert_array_equal(batch.other[1::2], batch.answer[::2])
    assert np.all(batch.answer != batch.other)
    if name not in ("class_init", "var_swap"):
        assert len(set(batch.answer[::2])) == len(set(batch.answer[1::2])) == 1

    for row, ids in enumerate(rows):
        prompt, answer, rest = (texts[row] for texts in (batch.prompts, batch.answers, batch.continuations))
        assert 8 <= len(ids) <= 128
        assert tokenizer.encode(prompt) == ids
        assert np.all(batch.tokens[row, len(ids) :] == tokenizer.end_of_text)
        assert tokenizer.decode([batch.answer[row]]) == answer
        # The natural tokenization of the whole program goes through the prompt and the answer...
        assert tokenizer.encode(prompt + answer + rest)[: len(ids) + 1] == [*ids, batch.answer[row]]
        # ...and both candidates can be asked about at this place.
        assert tokenizer.encode(prompt + answer) == [*ids, batch.answer[row]]
        assert tokenizer.encode(prompt + batch.answers[row ^ 1]) == [*ids, batch.other[row]]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert 1 <= distance(first, second) <= 8


@pytest.mark.parametrize("name", tasks.TASKS)
def test_right_answers_are_programs_and_wrong_ones_are_not(tokenizers, name):
    for split in tasks.SPLITS:
        batch = tasks.build(name, tokenizers[1024], 6, seed=1, split=split)
        for row, (prompt, answer, rest) in enumerate(
            zip(batch.prompts, batch.answers, batch.continuations, strict=True)
        ):
            assert parses(prompt + answer + rest), prompt + answer + rest
            if name in SYNTAX:
                wrong = prompt + batch.answers[row ^ 1] + rest
                assert not parses(wrong), wrong


@pytest.mark.parametrize("name", tasks.TASKS)
def test_512_tokens_are_enough(tokenizers, name):
    batch = tasks.build(name, tokenizers[512], 4, seed=0)
    for row, ids in enumerate(row_ids(batch)):
        program = batch.prompts[row] + batch.answers[row] + batch.continuations[row]
        assert parses(program)
        assert tokenizers[512].encode(program)[: len(ids) + 1] == [*ids, batch.answer[row]]


def test_answers_that_are_cut_in_pieces_give_their_beginning(tokenizers):
    whole = tasks.build("class_init", tokenizers[1024], 20, seed=0)
    assert whole.form == "each pair's own answers"
    assert {answer.strip() for answer in whole.answers} <= set(words.NOUNS)
    begun = tasks.build("class_init", tokenizers[512], 20, seed=0)
    assert begun.form == "each pair's own answers, their first tokens"
    for answer, rest in zip(begun.answers, begun.continuations, strict=True):
        assert (answer + rest).split("\n")[0].strip() in words.NOUNS


def test_a_refusal_names_every_form_and_why(tokenizers):
    smallest = tokenizer_lib.train([document(0, 0)], 260)
    with pytest.raises(UserError) as error:
        tasks.build("for_while", smallest, 4, seed=0)
    message = str(error.value)
    assert "\n" not in message
    assert "task 'for_while' fits no form to this tokenizer of 260 tokens" in message
    for form in tasks.TASKS["for_while"].forms:
        assert f"{form}: " in message
    assert message.count(" is cut as ") == len(tasks.TASKS["for_while"].forms)
    assert "(96 of 96 pairs do not fit)" in message


def test_the_first_form_that_fits_is_taken(tokenizers):
    forms = {vocab: tasks.build("bracket_counting", tokenizers[vocab], 1, 0).form for vocab in VOCABS}
    assert forms == {512: r"']\n' or ']'", 1024: r"']\n' or ']]\n'", 2048: r"']\n' or ']]\n'"}
    with_as = {tasks.build("with_as", tokenizers[1024], 1, 0, split=s).form for s in tasks.SPLITS}
    assert with_as == {r"""'")' or '")\n'"""}, "a line's end merges with the parenthesis"


def test_a_larger_batch_begins_with_the_smaller(tokenizers):
    small = tasks.build("with_open", tokenizers[1024], 5, seed=7)
    large = tasks.build("with_open", tokenizers[1024], 30, seed=7)
    assert large.prompts[:10] == small.prompts
    np.testing.assert_array_equal(large.answer[:10], small.answer)
    again = tasks.build("with_open", tokenizers[1024], 30, seed=7)
    np.testing.assert_array_equal(large.tokens, again.tokens)
    others = tasks.build("with_open", tokenizers[1024], 30, seed=8)
    assert len(set(large.prompts) & set(others.prompts)) < 10


def test_long_prompts_are_passed_over(tokenizers):
    batch = tasks.build("set_or_string", tokenizers[1024], 20, seed=0, max_tokens=40)
    assert batch.position.max() < 40
    with pytest.raises(UserError, match="more than max_tokens=5") as error:
        tasks.build("set_or_string", tokenizers[1024], 20, seed=0, max_tokens=5)
    assert "only 0 distinct pairs" in str(error.value)


def test_wrong_arguments_are_refused(tokenizers):
    with pytest.raises(UserError, match=r"no task 'for_whil' .did you mean 'for_while'"):
        tasks.build("for_whil", tokenizers[512], 4, seed=0)
    with pytest.raises(UserError, match=r"split must be one of .* got 'serch' .did you mean"):
        tasks.build("for_while", tokenizers[512], 4, seed=0, split="serch")
    with pytest.raises(UserError, match="n_pairs must be at least 1, got 0"):
        tasks.build("for_while", tokenizers[512], 0, seed=0)


def test_a_task_that_repeats_itself_is_refused(tokenizers):
    task = tasks.TASKS["for_while"]
    few = pairs_of("for_while", "search", 3)
    repeating = tasks.Task(
        name="few", summary="", stream=lambda seed, split: itertools.cycle(few), forms=task.forms
    )
    assert tasks.build(repeating, tokenizers[1024], 3, seed=0).n_pairs == 3
    with pytest.raises(UserError, match=r"'few' makes only 3 distinct pairs .* 4 were asked for"):
        tasks.build(repeating, tokenizers[1024], 4, seed=0)


def test_padding_to_a_common_length(tokenizers):
    batch = tasks.build("lambda_func", tokenizers[1024], 4, seed=0, max_tokens=128)
    longer = tasks.padded(batch, 140)
    assert longer.tokens.shape == (8, 140)
    assert longer.tokens.dtype == np.int32
    assert list(row_ids(longer)) == list(row_ids(batch))
    assert np.all(longer.tokens[:, batch.tokens.shape[1] :] == tokenizers[1024].end_of_text)
    with pytest.raises(UserError, match="cannot be padded to 3"):
        tasks.padded(batch, 3)


@given(
    # XLA takes subnormal numbers for zeros: two of them would be equal.
    hnp.arrays(np.float32, (6, 9), elements=st.floats(-80, 80, width=32, allow_subnormal=False)),
    st.lists(st.permutations(range(9)), min_size=6, max_size=6),
)
def test_loss_and_accuracy_against_float64(logits, orders):
    answer, other = (np.array([order[i] for order in orders], np.int32) for i in (0, 1))
    chosen = [np.float64(logits[np.arange(6), ids]) for ids in (answer, other)]
    expected = np.mean(np.log(np.exp(chosen[0]) + np.exp(chosen[1])) - chosen[0])
    loss = tasks.task_loss(jnp.asarray(logits), answer, other)
    assert loss.dtype == jnp.float32
    assert loss.shape == ()
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    accuracy = tasks.task_accuracy(jnp.asarray(logits), answer, other)
    assert accuracy.dtype == jnp.float32
    np.testing.assert_allclose(accuracy, np.mean(chosen[0] > chosen[1]), rtol=1e-6)


def test_chance_is_ln_2():
    answer, other = np.array([1, 2], np.int32), np.array([0, 3], np.int32)
    loss = tasks.task_loss(jnp.zeros((2, 4), jnp.bfloat16), answer, other)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)
    # The other logits do not matter, and the loss falls when the answers rise.
    logits = jnp.zeros((2, 4)).at[0, 2].set(50.0)
    np.testing.assert_allclose(tasks.task_loss(logits, answer, other), math.log(2), rtol=1e-6)
    gradient = jax.grad(tasks.task_loss)(logits, answer, other)
    np.testing.assert_allclose(gradient, [[0.25, -0.25, 0, 0], [0, 0, -0.25, 0.25]], atol=1e-7)

"""Tasks: pairs that parse, differ only in what decides, and are one token in context.

The texts are judged here with Python's own parser and with the tokenizer, not with the forms' table.
"""

from __future__ import annotations

import ast
import builtins
from collections import Counter
from collections.abc import Iterator, Sequence
import difflib
import hashlib
import itertools
import json
import keyword
import math
import pathlib
import re
import subprocess
import sys
import sysconfig
import types

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse import model
from wsparse import tasks as command
from wsparse.circuits import tasks
from wsparse.config import ModelConfig
from wsparse.data import idioms
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError

VOCABS = (512, 1024, 2048)

# Tasks whose sides the tokenizer of 1024 cuts into the same number of tokens.
EQUAL_LENGTHS = {
    "single_double_quote",
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

# The first pairs of every task, split and two seeds: whoever changes it changes every circuit.
GOLDEN = "dab0c2012e8bfe55a7911ec06abfba508b31857f3f3db12015d3baaf721c3f48"


@pytest.fixture(scope="module")
def tokenizers() -> dict[int, tokenizer_lib.Tokenizer]:
    texts = list(itertools.islice(idioms.documents(0), 1500))
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts += [(library / f"{name}.py").read_text() for name in ("argparse", "ast", "typing")]
    return {vocab: tokenizer_lib.train(texts, vocab) for vocab in VOCABS}


def pairs(task: str, split: tasks.Split, count: int, seed: int = 0) -> list[tasks.Pair]:
    return list(itertools.islice(tasks.TASKS[task].stream(seed, split), count))


def distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens in which two rows differ, insertions and deletions included."""
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return max(len(a), len(b)) - sum(block.size for block in blocks)


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def row_ids(batch: tasks.TaskBatch) -> Iterator[list[int]]:
    for tokens_T, position in zip(batch.tokens, batch.position, strict=True):
        yield tokens_T[: position + 1].tolist()


# ---- The 20 tasks ----


def test_there_are_20_tasks_and_an_idiom_for_each():
    assert len(tasks.TASKS) == 20
    assert tasks.TASKS.keys() == idioms.IDIOMS.keys()
    for name, task in tasks.TASKS.items():
        assert task.name == name
        assert task.summary
        assert task.forms


@pytest.mark.parametrize("vocab", [1024, 2048])
@pytest.mark.parametrize("name", tasks.TASKS)
def test_batches(tokenizers, name, vocab):
    tokenizer = tokenizers[vocab]
    batch = tasks.build(name, tokenizer, 12, seed=3)
    rows = list(row_ids(batch))

    assert batch.n_pairs == 12
    assert len(rows) == 24
    assert (batch.task, batch.split, batch.seed) == (name, "search", 3)
    for array in (batch.tokens, batch.position, batch.answer, batch.other):
        assert array.dtype == np.int32
    assert batch.tokens.shape == (24, batch.position.max() + 1)
    assert len(set(batch.prompts)) == 24
    assert batch.equal_lengths == (name in EQUAL_LENGTHS)
    np.testing.assert_array_equal(batch.other[::2], batch.answer[1::2])
    np.testing.assert_array_equal(batch.other[1::2], batch.answer[::2])
    assert np.all(batch.answer != batch.other)
    if name not in ("class_init", "var_swap"):
        assert len(set(batch.answer[::2])) == len(set(batch.answer[1::2])) == 1

    for row, ids in enumerate(rows):
        prompt, answer, rest = (
            texts[row] for texts in (batch.prompts, batch.answers, batch.continuations)
        )
        assert 8 <= len(ids) <= 72
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
    assert {answer.strip() for answer in whole.answers} <= set(idioms.NOUNS)
    begun = tasks.build("class_init", tokenizers[512], 20, seed=0)
    assert begun.form == "each pair's own answers, their first tokens"
    for answer, rest in zip(begun.answers, begun.continuations, strict=True):
        assert (answer + rest).split("\n")[0].strip() in idioms.NOUNS


def test_a_refusal_names_every_form_and_why(tokenizers):
    smallest = tokenizer_lib.train([idioms.document(0, 0)], 260)
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
    forms = {
        vocab: tasks.build("bracket_counting", tokenizers[vocab], 1, 0).form for vocab in VOCABS
    }
    assert forms == {512: r"']\n' or ']'", 1024: r"']\n' or ']]\n'", 2048: r"']\n' or ']]\n'"}
    with_as = {tasks.build("with_as", tokenizers[1024], 1, 0, split=s).form for s in tasks.SPLITS}
    assert with_as == {r"""'")' or '")\n'"""}, "a line's end merges with the parenthesis"


def test_splits_share_neither_templates_nor_fillers():
    # What decides, and Python itself, is no filler.
    shared = {*keyword.kwlist, *dir(builtins), "self", "init", "current", "helpers", "tools", "the"}
    shared |= {"add", "pop", "split", "f", "r", "w", *itertools.chain(*idioms.STEMS.values())}

    def fillers(name: str, split: tasks.Split) -> set[str]:
        texts = [
            side.prompt for pair in pairs(name, split, 150) for side in (pair.first, pair.second)
        ]
        # The decided word of a user's path, `input_path`, is not a filler either.
        text = re.sub(r"[a-z]+_(path|file|name)\b|\[0\]", "", "\n".join(texts)).lower()
        words = set(re.findall(r"[a-z]+|\d+", text.replace("_", " ")))
        plurals = {f"{noun}s": noun for noun in idioms.NOUNS}
        singular = {plurals.get(word, word) for word in words}
        return singular - {word.lower() for word in shared}

    for name in tasks.TASKS:
        found = [fillers(name, split) for split in tasks.SPLITS]
        templates = [{p.template for p in pairs(name, split, 150)} for split in tasks.SPLITS]
        for a, b in itertools.combinations(range(3), 2):
            assert not found[a] & found[b], name
            assert not templates[a] & templates[b], name
        assert min(map(len, found)) >= 30, name
        assert min(map(len, templates)) >= 2, name


def test_each_task_has_thousands_of_pairs():
    for name in tasks.TASKS:
        made = {(p.first.prompt, p.second.prompt) for p in pairs(name, "search", 2200)}
        assert len(made) >= 2000, name


def test_pairs_differ_only_in_what_decides():
    """Both sides have the same context, and the same words but for those that decide."""
    for name in tasks.TASKS:
        for pair in pairs(name, "discretize", 30):
            words = [Counter(re.findall(r"\w+", side.prompt)) for side in (pair.first, pair.second)]
            differing = (words[0] - words[1]) | (words[1] - words[0])
            assert differing.total() <= 8, (pair.first.prompt, pair.second.prompt)
            context = [side.prompt.splitlines()[:2] for side in (pair.first, pair.second)]
            assert context[0] == context[1]


def test_pairs_never_change():
    digest = hashlib.sha256()
    for name, split, seed in itertools.product(tasks.TASKS, tasks.SPLITS, (0, 1)):
        for pair in pairs(name, split, 3, seed):
            for side in (pair.first, pair.second):
                digest.update(f"{side.prompt}\0{side.rest}\0{side.answer}\0".encode())
    assert digest.hexdigest() == GOLDEN


@given(
    st.sampled_from(sorted(tasks.TASKS)),
    st.integers(-(2**40), 2**70),
    st.sampled_from(tasks.SPLITS),
)
@settings(max_examples=60)
def test_any_seed_makes_programs(name, seed, split):
    made = pairs(name, split, 3, seed)
    assert made == pairs(name, split, 3, seed)
    for pair in made:
        for side in (pair.first, pair.second):
            assert parses(side.prompt + side.rest)
            assert side.rest.startswith(side.answer)
            assert "¦" not in side.prompt + side.rest


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
    few = pairs("for_while", "search", 3)
    repeating = tasks.Task(
        name="few",
        summary="",
        stream=lambda seed, split: itertools.cycle(few),
        forms=task.forms,
    )
    assert tasks.build(repeating, tokenizers[1024], 3, seed=0).n_pairs == 3
    with pytest.raises(UserError, match=r"'few' makes only 3 distinct pairs .* 4 were asked for"):
        tasks.build(repeating, tokenizers[1024], 4, seed=0)


def test_padding_to_a_common_length(tokenizers):
    batch = tasks.build("lambda_func", tokenizers[1024], 4, seed=0)
    longer = tasks.padded(batch, 40)
    assert longer.tokens.shape == (8, 40)
    assert longer.tokens.dtype == np.int32
    assert list(row_ids(longer)) == list(row_ids(batch))
    assert np.all(longer.tokens[:, batch.tokens.shape[1] :] == tokenizers[1024].end_of_text)
    with pytest.raises(UserError, match="cannot be padded to 3"):
        tasks.padded(batch, 3)


# ---- Scores ----


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


# ---- A user's own tasks ----


def own_pairs(count: int) -> list[dict[str, str]]:
    return [
        {
            "prompt_a": f"value = {i}\nfor item",
            "prompt_b": f"value = {i}\nwhile item",
            "answer_a": " in",
            "answer_b": ":\n",
        }
        for i in range(count)
    ]


def written(path: pathlib.Path, text: str) -> pathlib.Path:
    path.write_text(text)
    return path


def test_a_jsonl_task(tmp_path, tokenizers):
    lines = "\n\n".join(json.dumps(pair) for pair in own_pairs(80))
    task = tasks.load(written(tmp_path / "loops.jsonl", lines))
    assert task.name == "loops"
    by_split = [list(task.stream(0, split)) for split in tasks.SPLITS]
    assert sum(map(len, by_split)) == 80
    assert min(map(len, by_split)) >= 10
    assert len({pair.first.prompt for split in by_split for pair in split}) == 80
    assert {pair.first.prompt for pair in task.stream(1, "search")} == {
        pair.first.prompt for pair in by_split[0]
    }
    assert list(task.stream(1, "search")) != by_split[0]

    batch = tasks.build(task, tokenizers[1024], len(by_split[0]), seed=0)
    assert {tokenizers[1024].decode([i]) for i in batch.answer} == {" in", ":\n"}
    with pytest.raises(UserError, match="'loops' makes only"):
        tasks.build(task, tokenizers[1024], 81, seed=0)


def test_a_jsonl_task_whose_answers_are_no_tokens(tmp_path, tokenizers):
    lines = "\n".join(json.dumps(pair | {"answer_a": " in items"}) for pair in own_pairs(20))
    task = tasks.load(written(tmp_path / "loops.jsonl", lines))
    with pytest.raises(UserError, match=r"fits no form .* ' in items' is cut as ' in', ' items'"):
        tasks.build(task, tokenizers[1024], 4, seed=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON in UTF-8: "),
        ("[1]", "must be an object with prompt_a, prompt_b, answer_a, answer_b"),
        ({"prompt_b": 3}, "'prompt_b' must be a string, got 3"),
        ({"answer_a": ""}, "answer_a must not be empty"),
        ({"answer_a": "\ud800"}, "answer_a holds half of a surrogate pair"),
        ({"promt_a": "x"}, r"unknown field 'promt_a' \(did you mean 'prompt_a'\?\)"),
        ({"prompt_a": "same", "prompt_b": "same"}, "prompt_a and prompt_b are the same"),
        ({"answer_a": ":", "answer_b": ":"}, "answer_a and answer_b are the same: ':'"),
        ({"prompt_b": "value = 0\nfor item"}, r"the prompt .* is also at .*t.jsonl:1$"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    first, second = own_pairs(2)
    text = line if isinstance(line, str) else json.dumps(second | line)
    path = written(tmp_path / "t.jsonl", f"{json.dumps(first)}\n{text}\n")
    with pytest.raises(UserError, match=rf"^{path}:2: {message}") as error:
        tasks.load(path)
    assert "\n" not in str(error.value)


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no task file at"):
        tasks.load(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"must end in .jsonl or .py"):
        tasks.load(written(tmp_path / "task.txt", ""))
    with pytest.raises(UserError, match="task 'empty' has no pairs"):
        tasks.load(written(tmp_path / "empty.jsonl", "\n"))
    field = json.dumps({"prompt_a": "x"})
    with pytest.raises(UserError, match=r"t.jsonl:1: 'prompt_b' must be a string, got nothing"):
        tasks.load(written(tmp_path / "t.jsonl", field))


PAIRS = """
def pairs():
    for i in range(40):
        yield f"value = {i}\\nfor item", f"value = {i}\\nwhile item", " in", ":\\n"
"""

TASK = """
from wsparse.circuits.tasks import Form, Pair, Program, Task


def stream(seed, split):
    for i in range(20):
        lead = f"{split} = {seed + i}\\n"
        yield Pair(
            first=Program(prompt=f"{lead}for item", rest=" in items:\\n    pass\\n"),
            second=Program(prompt=f"{lead}while item", rest=":\\n    pass\\n"),
        )


TASK = Task(name="mine", summary="loops", stream=stream, forms=(Form(" in", ":\\n"),))
"""


def test_python_tasks(tmp_path, tokenizers):
    listed = tasks.load(written(tmp_path / "listed.py", PAIRS))
    assert listed.name == "listed"
    assert sum(len(list(listed.stream(0, split))) for split in tasks.SPLITS) == 40
    mine = tasks.load(written(tmp_path / "mine.py", TASK))
    batch = tasks.build(mine, tokenizers[1024], 20, seed=5, split="report")
    assert batch.prompts[0] == "report = 5\nfor item"
    assert batch.form == r"' in' or ':\n'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", ": must define TASK = Task"),
        ("TASK = 3\n", ": TASK must be a wsparse.circuits.tasks.Task, got 3"),
        ("x = 1\ny = 1 / 0\n", ":2: ZeroDivisionError: "),
        ("x = 1\ny = = 3\n", ":2: SyntaxError: "),
        ("def pairs():\n    yield 1 / 0\n", ":2: ZeroDivisionError: "),
        (
            "def pairs():\n    yield 'a', 'b'\n",
            r": pair 1: must be four strings .* got \('a', 'b'\)",
        ),
        ("def pairs():\n    yield 'a', 'a', 'b', 'c'\n", ": pair 1: prompt_a and prompt_b are"),
    ],
)
def test_wrong_python_tasks(tmp_path, text, message):
    path = written(tmp_path / "task.py", text)
    with pytest.raises(UserError, match=rf"^{path}{message}"):
        tasks.load(path)


# ---- The command ----


def test_report():
    tokenizer = tokenizer_lib.train([idioms.document(0, 0)], 260)
    config = ModelConfig(vocab_size=260, context=256, n_layer=1, d_model=16, n_head=1)
    run = types.SimpleNamespace(
        config=types.SimpleNamespace(model=config),
        params=jax.jit(model.init, static_argnums=0)(config, jax.random.key(0)),
        tokenizer=tokenizer,
    )
    wanted = [tasks.TASKS[name] for name in ("bracket_brace", "for_while", "lambda_func")]
    text = command.report(run, wanted, n_pairs=8, n_examples=1)
    # Fresh parameters know nothing.
    rows = re.findall(r"^(\w+) +(\d\.\d{4}) +\d\.\d{3} +\d+-\d+  '", text, re.M)
    assert [name for name, _ in rows] == ["bracket_brace", "lambda_func"]
    assert all(abs(float(loss) - math.log(2)) < 0.05 for _, loss in rows)
    assert "refused: task 'for_while' fits no form" in text
    # The table comes first, and the programs only where they are asked for.
    assert text.startswith("task ")
    second = tasks.build("lambda_func", tokenizer, 8, 0, max_tokens=256).prompts[1]
    assert text.index(second) > text.index("refused:")
    table = command.report(run, wanted, n_pairs=8)
    assert text.startswith(table) and len(table.splitlines()) == 4


def test_scores_do_not_depend_on_how_rows_are_grouped(monkeypatch):
    tokenizer = tokenizer_lib.train([idioms.document(0, 0)], 260)
    config = ModelConfig(vocab_size=260, context=256, n_layer=1, d_model=16, n_head=1)
    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))
    batch = tasks.build("lambda_func", tokenizer, 7, 0)
    logits_BPV, _ = model.forward(
        params, batch.tokens, config, positions_BP=batch.position[:, None]
    )
    chosen = (logits_BPV[:, 0], batch.answer, batch.other)
    expected = (tasks.task_loss(*chosen), tasks.task_accuracy(*chosen))
    for rows in (4, 14, 32):
        monkeypatch.setattr(command, "_ROWS", rows)
        np.testing.assert_allclose(command._score(params, config, batch), expected, rtol=1e-5)


@pytest.mark.parametrize("module", ["wsparse.tasks", "wsparse.circuits.tasks"])
def test_command_line(tmp_path, module):
    # The task is read first: a user's `Task` is the same class whichever name the command has.
    task = written(tmp_path / "mine.py", TASK)
    command = [sys.executable, "-m", module, "--run=no/such/run"]
    done = subprocess.run([*command, f"--task={task}"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    notice, *_ = [*done.stderr.splitlines(), ""]
    assert notice.startswith("note: ") == (module == "wsparse.circuits.tasks")
    assert done.stderr.splitlines()[-1].startswith("error: no/such/run is not a run folder")
    assert len(done.stderr.splitlines()) <= 2

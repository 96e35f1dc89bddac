"""Tasks of a user's own: JSONL files and Python files, and what is said about malformed ones."""

from __future__ import annotations

import json
import pathlib

from helpers import OWN_TASK
import pytest

from wsparse.circuits import tasks
from wsparse.circuits.pairs import TooFewPairs
from wsparse.errors import UserError
from wsparse.pytext.contrasts import CONTRASTS

PAIRS = """
def pairs():
    for i in range(40):
        yield f"value = {i}\\nfor item", f"value = {i}\\nwhile item", " in", ":\\n"
"""


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
        ("{", "not JSON: "),
        ("[1]", "must be a JSON object, got list"),
        ("[" * 100_000, "its JSON is nested too deep"),
        ('{"prompt_a": ' + "1" * 10_000 + "}", "a number in its JSON has too many digits"),
        ({"prompt_b": 3}, "'prompt_b' must be a string, got int"),
        ({"x" * 100_000: 3}, "unknown field 'x{80}';"),
        ({"answer_a": ""}, "answer_a must not be empty"),
        ({"answer_a": "\ud800"}, "answer_a holds half of a surrogate pair"),
        ({"promt_a": "x"}, r"unknown field 'promt_a' \(did you mean 'prompt_a'\?\)"),
        ({"prompt_a": "same", "prompt_b": "same"}, "prompt_a and prompt_b are the same"),
        ({"answer_a": ":", "answer_b": ":"}, "answer_a and answer_b are the same: ':'"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    first, second = own_pairs(2)
    text = line if isinstance(line, str) else json.dumps(second | line)
    path = written(tmp_path / "t.jsonl", f"{json.dumps(first)}\n{text}\n")
    with pytest.raises(UserError, match=rf"^{path}:2: {message}") as error:
        tasks.load(path)
    assert "\n" not in str(error.value)


def test_a_pair_that_repeats_a_prompt_is_dropped_and_counted(tmp_path, logged):
    listed = own_pairs(40)
    path = tmp_path / "t.jsonl"
    once = tasks.load(written(path, "\n".join(map(json.dumps, listed))))
    assert not logged
    # Three repeat a pair, one only the other side's prompt.
    crossed = listed[5] | {"prompt_a": "new", "prompt_b": listed[5]["prompt_a"]}
    again = [*listed[:2], listed[1], *listed[2:], listed[0], crossed, listed[0]]
    twice = tasks.load(written(path, "\n".join(map(json.dumps, again))))
    assert logged == [
        f"{path}: dropped 4 pairs that repeat an earlier prompt (first at {path}:3, as at {path}:2)"
    ]
    for split in tasks.SPLITS:
        texts = [[(pair.first, pair.second) for pair in task.stream(3, split)] for task in (once, twice)]
        assert texts[0] == texts[1]


def test_a_small_task_says_how_many_pairs_would_do(tmp_path, tokenizers):
    lines = "\n".join(json.dumps(pair) for pair in own_pairs(12))
    task = tasks.load(written(tmp_path / "few.jsonl", lines))
    with pytest.raises(TooFewPairs, match=r"only \d+ distinct pairs for split 'search' .* 64 were") as error:
        tasks.build(task, tokenizers[1024], 64, seed=0)
    count = error.value.made
    assert f"only {count} distinct" in str(error.value) and error.value.split == "search"
    assert tasks.build(task, tokenizers[1024], count, seed=0).n_pairs == count > 1


def test_the_twenty_tasks_are_the_contrasts():
    assert len(tasks.TASKS) == 20
    assert list(tasks.TASKS) == list(CONTRASTS)
    for name, task in tasks.TASKS.items():
        assert task.name == name
        assert task.summary
        assert task.forms


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no task file at"):
        tasks.load(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"must end in .jsonl or .py"):
        tasks.load(written(tmp_path / "task.txt", ""))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"folder.jsonl cannot be read: Is a directory"):
        tasks.load(tmp_path / "folder.jsonl")
    with pytest.raises(UserError, match="task 'empty' has no pairs"):
        tasks.load(written(tmp_path / "empty.jsonl", "\n"))
    field = json.dumps({"prompt_a": "x"})
    with pytest.raises(UserError, match=r"t.jsonl:1: 'prompt_b' must be a string, got nothing"):
        tasks.load(written(tmp_path / "t.jsonl", field))


def test_python_tasks(tmp_path, tokenizers):
    listed = tasks.load(written(tmp_path / "listed.py", PAIRS))
    assert listed.name == "listed"
    assert sum(len(list(listed.stream(0, split))) for split in tasks.SPLITS) == 40
    mine = tasks.load(written(tmp_path / "mine.py", OWN_TASK))
    batch = tasks.build(mine, tokenizers[1024], 20, seed=5, split="report")
    assert batch.prompts[0] == "report = 5\nfor item"
    assert batch.form == r"' in' or ':\n'"
    text = (
        "import dataclasses\nfrom wsparse.circuits.tasks import TASKS\n"
        "TASK = dataclasses.replace(TASKS['for_while'], name='mine')\n"
    )
    built_in = tasks.load(written(tmp_path / "replaced.py", text))
    batch = tasks.build(built_in, tokenizers[1024], 3, seed=0, knobs={"distractors": 3})
    assert {drawn["distractors"] for drawn in batch.knobs} == {3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", ": must define TASK = Task"),
        ("TASK = 3\n", ": TASK must be a wsparse.circuits.tasks.Task, got 3"),
        ("x = 1\ny = 1 / 0\n", ":2: ZeroDivisionError: "),
        ("x = 1\ny = = 3\n", ":2: SyntaxError: "),
        ("def pairs():\n    yield 1 / 0\n", ":2: ZeroDivisionError: "),
        ("def pairs():\n    yield 'a', 'b'\n", r": pair 1: must be four strings .* got \('a', 'b'\)"),
        ("def pairs():\n    yield 'a', 'a', 'b', 'c'\n", ": pair 1: prompt_a and prompt_b are"),
    ],
)
def test_wrong_python_tasks(tmp_path, text, message):
    path = written(tmp_path / "task.py", text)
    with pytest.raises(UserError, match=rf"^{path}{message}"):
        tasks.load(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("        yield 1 / 0", "task.py:8: ZeroDivisionError: division by zero"),
        ("        yield 5", "task.py: TypeError: the stream of TASK must yield Pair, got 5"),
    ],
)
def test_a_stream_that_fails_is_named_by_file_and_line(tmp_path, tokenizers, line, message):
    text = OWN_TASK.replace("        yield Pair(", f"{line}\n        yield Pair(")
    assert text != OWN_TASK
    task = tasks.load(written(tmp_path / "task.py", text))
    with pytest.raises(UserError, match=rf"^{tmp_path}/{message}$"):
        tasks.build(task, tokenizers[512], 4, seed=0)

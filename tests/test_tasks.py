"""The command that shows how well a model does the tasks."""

from __future__ import annotations

import collections
import json
import math
import pathlib
import re
import types

from helpers import OWN_TASK, run_python
import jax
import numpy as np
import pytest

from wsparse import model
from wsparse import tasks as command
from wsparse.circuits import tasks
from wsparse.config import ModelConfig
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError
from wsparse.pytext.documents import document

CONTEXT = 512


def written(path: pathlib.Path, text: str) -> pathlib.Path:
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def fresh_run():
    config = ModelConfig(vocab_size=260, context=CONTEXT, n_layer=1, d_model=16, n_head=1)
    return types.SimpleNamespace(
        config=types.SimpleNamespace(model=config),
        params=jax.jit(model.init, static_argnums=0)(config, jax.random.key(0)),
        tokenizer=tokenizer_lib.train([document(0, 0)], 260),
    )


def test_report(fresh_run, monkeypatch):
    monkeypatch.setattr(command, "_PROBE_PAIRS", 16)
    chosen = [tasks.TASKS[name] for name in ("bracket_brace", "for_while", "lambda_func")]
    text = command.report(fresh_run, chosen, n_pairs=8, n_examples=1)
    # Fresh parameters know nothing, and probes stand beside them.
    probed = r"[01]\.\d{3}  (?:presence|last three|length) +[01]\.\d{3}"
    rows = re.findall(rf"^(\w+) +(\d\.\d{{4}}) +\d\.\d{{3}} +{probed} +\d+-\d+  '", text, re.M)
    assert [name for name, _ in rows] == ["bracket_brace", "lambda_func"]
    assert all(abs(float(loss) - math.log(2)) < 0.05 for _, loss in rows)
    assert "refused: task 'for_while' fits no form" in text
    # The table comes first, and the programs only where they are asked for.
    assert text.startswith("task ")
    second = tasks.build(
        "lambda_func", fresh_run.tokenizer, 8, 0, split="report", max_tokens=CONTEXT
    ).prompts[1]
    assert text.index(second) > text.index("refused:")
    table = command.report(fresh_run, chosen, n_pairs=8)
    assert text.startswith(table) and len(table.splitlines()) == 4


def test_a_users_task_is_probed_without_a_model(fresh_run, tmp_path):
    """Names that stand for nothing decide, or every name stands for either answer."""
    lines = {"given": [], "hidden": [], "few": []}
    for i in range(400):
        one, other = (f"{place}{i}{place}" for place in ("yes", "no"))
        lines["given"].append((f"q={one}:", f"q={other}:", "!", "?"))
        lines["hidden"].append((f"q={i}-{i % 7}:", f"q={i}-{(i + 1) % 7}:", "!", "?"))
    lines["few"] = lines["given"][:12]
    texts = {}
    for name, pairs in lines.items():
        fields = ("prompt_a", "prompt_b", "answer_a", "answer_b")
        jsonl = "".join(json.dumps(dict(zip(fields, pair, strict=True))) + "\n" for pair in pairs)
        task = tasks.load(written(tmp_path / f"{name}.jsonl", jsonl))
        texts[name] = command.report(
            fresh_run.tokenizer, [task], n_pairs=64 if name != "few" else 5, split="search"
        )
    assert re.search(r"^given +1\.000  (presence|last three) +1\.000 +\d+-\d+  ", texts["given"], re.M)
    assert "warning: given: a single token" in texts["given"] and "(100.0% right" in texts["given"]
    accuracy = re.search(r"^hidden +([01]\.\d{3})  ", texts["hidden"], re.M)
    assert accuracy and float(accuracy[1]) < 0.65 and "warning" not in texts["hidden"]
    assert re.search(r"^few +-  - +- ", texts["few"], re.M)
    assert "no probe: task 'few' makes only 1 distinct pairs for split 'report'" in texts["few"]
    refused = command.report(fresh_run.tokenizer, [task], n_pairs=6, split="report")
    assert re.fullmatch(r"refused: .* makes only 1 distinct pairs .* 6 were .*; --pairs=1 would do", refused)
    assert all("loss" not in text for text in texts.values())


def test_scores_do_not_depend_on_how_rows_are_grouped(fresh_run, monkeypatch):
    params, config = fresh_run.params, fresh_run.config.model
    batch = tasks.build("lambda_func", fresh_run.tokenizer, 7, 0)
    forward = jax.jit(model.forward, static_argnums=2)
    logits_BPV, _ = forward(params, batch.tokens, config, positions_BP=batch.position[:, None])
    chosen = (logits_BPV[:, 0], batch.answer, batch.other)
    expected = (tasks.task_loss(*chosen), tasks.task_accuracy(*chosen))
    for rows in (4, 14, 32):
        monkeypatch.setattr(command, "_ROWS", rows)
        np.testing.assert_allclose(command.score(params, config, batch), expected, rtol=1e-5)


def test_scores_are_shown_by_the_values_of_a_knob(fresh_run, monkeypatch):
    """Every pair is in one line of its task, and the lines' mean is what the first table says."""
    monkeypatch.setattr(command, "_PROBE_PAIRS", 16)
    chosen = [tasks.TASKS[name] for name in ("bracket_brace", "lambda_func")]
    text = command.report(fresh_run, chosen, n_pairs=24, by="distractors")
    table = text[text.index("\ntask") :]
    assert table.split("\n")[1].split() == ["task", "loss", "accuracy", "pairs", "distractors"]
    for task in chosen:
        batch = tasks.build(task, fresh_run.tokenizer, 24, 0, split="report", max_tokens=CONTEXT)
        rows = re.findall(rf"^{task.name} +([\d.]+) +([\d.]+) +(\d+)  (\d+)$", table, re.M)
        drawn = collections.Counter(knobs["distractors"] for knobs in batch.knobs)
        assert {int(value): int(n_pairs) for _, _, n_pairs, value in rows} == drawn and len(drawn) > 1
        whole = re.search(rf"^{task.name} +([\d.]+) +([\d.]+) ", text, re.M)
        assert whole
        for column in (0, 1):
            mean = sum(float(row[column]) * int(row[2]) for row in rows) / 24
            assert float(whole[1 + column]) == pytest.approx(mean, abs=1e-3)


def test_a_knob_that_cannot_be_shown_is_refused_in_one_line(fresh_run):
    with pytest.raises(
        UserError, match=r"no task has a knob 'distractor' \(did you mean 'distractors'\?\); knobs"
    ):
        command.report(fresh_run, [tasks.TASKS["lambda_func"]], n_pairs=2, by="distractor")
    with pytest.raises(UserError, match="it needs --run"):
        command.report(fresh_run.tokenizer, [tasks.TASKS["lambda_func"]], n_pairs=2, by="distractors")


@pytest.mark.parametrize("module", ["wsparse.tasks", "wsparse.circuits.tasks"])
def test_command_line(tmp_path, module):
    # The task is read first: a user's `Task` is the same class whichever name the command has.
    task = written(tmp_path / "mine.py", OWN_TASK)
    done = run_python("-m", module, "--run=no/such/run", f"--task={task}")
    assert done.returncode == 2
    notice, *_ = [*done.stderr.splitlines(), ""]
    assert notice.startswith("note: ") == (module == "wsparse.circuits.tasks")
    assert done.stderr.splitlines()[-1].startswith("error: no/such/run is not a run folder")
    assert len(done.stderr.splitlines()) <= 2

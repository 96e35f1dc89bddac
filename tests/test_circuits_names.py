"""A task may have several circuits in a run, which are told apart by their folders' names."""

import dataclasses
import json
import pathlib
import shutil
import types
from typing import Any

from helpers import check
import numpy as np
import pytest

from wsparse import prune, results
from wsparse.circuits import compare, evidence, report
from wsparse.circuits import tasks as task_lib
from wsparse.circuits.circuit import (
    FOUND,
    Baseline,
    Calibration,
    Circuit,
    CircuitNode,
    Counts,
    CurvePoint,
    Score,
    Scores,
    Status,
    check_name,
    joined,
    split,
)
from wsparse.circuits.pairs import TooFewPairs
from wsparse.circuits.settings import Settings
from wsparse.config import ModelConfig, to_dict
from wsparse.errors import UserError
from wsparse.nodes import CONNECTIONS, NODES
from wsparse.sweeps import records

CONFIG = ModelConfig(
    vocab_size=12, context=8, n_layer=1, d_model=4, n_head=1, d_head=2, d_mlp=4, abs_top_k_fraction=None
)


def circuit(task: str, edges: int) -> Circuit:
    """A circuit of one node, whatever it says of its edges."""
    shapes = {name: (1, kind.width(CONFIG)) for name, kind in NODES.items()}
    score = Score(0.1, 1.0)
    counts = Counts(
        nodes=1, edges=edges, edges_between_nodes=edges, embedding_edges=0, unembedding_edges=0, biases=0
    )
    scores = Scores(
        model=score,
        sufficiency=score,
        calibrated=Calibration(scale=1.0, shift=0.0, loss=0.1),
        necessity=score,
        attribution_baseline=Baseline(reached=False),
        edges_before_clean_up=edges,
        seconds_to_find=1.0,
        seconds=1.0,
    )
    return Circuit(
        task=task,
        form="x or y",
        loss=0.1,
        target=0.15,
        counts=counts,
        scores=scores,
        controls={},
        nodes=[CircuitNode("0.attn.q.1", 0.5, 0.2)],
        edges=[],
        curve=[CurvePoint(0.15, 1, edges, 0.1)],
        hyperparameters={},
        model_digest="abc",
        config=CONFIG,
        means={name: np.zeros(shape, np.float32) for name, shape in shapes.items()},
        tau={},
        removed={c.kernel: np.zeros((*shapes[c.source], shapes[c.target][1]), bool) for c in CONNECTIONS},
    )


def save(folder: pathlib.Path, full_name: str, edges: int = 4, settings: Settings | None = None) -> None:
    task = split(full_name)[0]
    place = folder / "circuits" / full_name
    circuit(task, edges).save(place)
    made_with = {} if settings is None else to_dict(settings)
    Status(task=task, status=FOUND, model=Score(0.1, 1.0), settings=made_with, digest="abc").save(place)


@pytest.fixture
def folder(tmp_path):
    for full_name, edges in (("one", 4), ("one@tight", 16), ("two", 9), ("two@tight", 25), ("two@b", 1)):
        save(tmp_path, full_name, edges)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("one", ("one", "")),
        ("one@tight", ("one", "tight")),
        ("mine.jsonl@tight-2", ("mine.jsonl", "tight-2")),
        # The sign in the path of a file.
        ("/home/me@host/mine.jsonl", ("/home/me@host/mine.jsonl", "")),
        ("/home/me@host/mine.jsonl@b", ("/home/me@host/mine.jsonl", "b")),
        ("a@b.py", ("a@b.py", "")),
        ("one@", ("one@", "")),
    ],
)
def test_a_circuits_name_comes_after_the_last_sign(given, parts):
    assert split(given) == parts
    assert joined(*parts) == given


@pytest.mark.parametrize("name", ["a/b", "..", "a b", "a@b", "a.b", "\u00e9"])
def test_what_cannot_be_a_folders_part_is_refused_as_a_name(name):
    with pytest.raises(UserError, match="letters, digits, _ and -"):
        check_name(name)


def test_a_folder_names_its_circuit_and_moving_it_renames(folder):
    assert Circuit.load(folder / "circuits" / "one@tight").full_name == "one@tight"
    assert Status.load(folder / "circuits" / "one@tight").full_name == "one@tight"
    assert Circuit.load(folder / "circuits" / "one").full_name == "one"
    place = shutil.copytree(folder / "circuits" / "one", folder / "circuits" / "one@kept")
    moved = Circuit.load(place)
    assert (moved.task, moved.name) == ("one", "kept")
    # The files themselves say nothing of a name, and a folder elsewhere has none.
    for file in ("circuit.json", "status.json"):
        assert "name" not in json.loads((place / file).read_text())
    moved.save(folder / "elsewhere")
    assert Circuit.load(folder / "elsewhere").full_name == "one"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["all"], ["one", "one@tight", "two", "two@b", "two@tight"]),
        (["one"], ["one"]),
        (["one@tight", "two"], ["one@tight", "two"]),
        (["all@tight"], ["one@tight", "two@tight"]),
        (["some/where/two.jsonl@b"], ["two@b"]),
    ],
)
def test_circuits_are_chosen_by_task_by_name_and_all_of_a_name(folder, given, expected):
    rows, circuits = report.select(folder, given)
    assert sorted(row["task"] for row in rows) == expected
    assert sorted(each.full_name for each in circuits) == expected


def test_a_circuit_that_is_not_there_is_refused_with_the_command_that_finds_it(folder):
    with pytest.raises(UserError, match=r"no circuit of 'one@tigt' \(did you mean 'one@tight'\?\)") as caught:
        report.select(folder, ["one@tigt"])
    assert str(caught.value).endswith("--task=one --name=tigt")


def test_the_table_has_a_mean_for_each_name_and_counts_tasks_once(folder):
    text = report.table(report.collect(folder / "circuits"))
    assert "5 circuits, 2 tasks" in text
    assert "geometric mean over 2 tasks with target" in text and ": 6.0 edges" in text
    assert "geometric mean over 2 tasks named tight" in text and ": 20.0 edges" in text


def test_comparisons_and_results_take_the_circuits_of_one_name(folder, monkeypatch):
    assert {task: row["edges"] for task, row in compare.read(folder).rows.items()} == {"one": 4, "two": 9}
    tight = compare.read(folder, "tight").rows
    assert {task: row["edges"] for task, row in tight.items()} == {"one": 16, "two": 25}
    with pytest.raises(UserError, match=r"no circuits: .* --name=loose"):
        compare.read(folder, "loose")
    with pytest.raises(UserError, match="letters, digits, _ and -"):
        compare.run([str(folder), str(folder)], name="a b")
    summary = dict.fromkeys(("val_loss", "nonzeros", "parameters", "tokens_per_s", "steps", "seconds"), 1)
    (folder / "summary.json").write_text(json.dumps(summary))
    config = types.SimpleNamespace(
        model=types.SimpleNamespace(context=8), data=types.SimpleNamespace(domain="python")
    )
    stub = types.SimpleNamespace(config=config, params={}, tokenizer=None)
    monkeypatch.setattr(records.runs, "load", lambda folder: stub)
    monkeypatch.setattr(records.task_lib, "build_all", lambda *_, **__: ([], {}))
    for name, edges in (("", {"one": 4, "two": 9}), ("b", {"two": 1})):
        found = records.read(folder, pairs=1, name=name)["circuits"]
        assert {task: row["edges"] for task, row in found.items()} == edges


def test_the_recipe_of_results_is_that_of_the_named_circuits(tmp_path):
    save(tmp_path, "one", settings=Settings(trials=3))
    save(tmp_path, "one@default", settings=Settings())
    assert results._prune_recipe(tmp_path / "circuits", "") == ""
    assert results._prune_recipe(tmp_path / "circuits", "default") == "paper"


def test_the_task_of_a_file_is_known_by_its_name_too(tmp_path):
    line = {"prompt_a": "a", "prompt_b": "b", "answer_a": "x", "answer_b": "y"}
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(line))
    found = circuit("mine", 1)
    assert evidence.known_tasks([f"{file}@tight"], [found])["mine"].name == "mine"
    with pytest.raises(UserError, match="name it too"):
        evidence.known_tasks(["mine@tight"], [found])


# ---- prune --name ----


def test_each_name_has_a_folder_and_a_search_of_its_own(tmp_path, monkeypatch):
    """The same settings under two names share neither trials nor results, on one storage too."""
    pairs = types.SimpleNamespace(task="one", search={}, discretize={})
    monkeypatch.setattr(
        prune.procedure, "Subject", lambda *_: types.SimpleNamespace(digest="abc", held=lambda p, _: p)
    )
    monkeypatch.setattr(prune.procedure, "build_pairs", lambda *_, **__: ([pairs], {}))
    monkeypatch.setattr(prune, "Pruner", lambda *_, **__: None)
    config = types.SimpleNamespace(model=types.SimpleNamespace(context=8))
    trained: Any = types.SimpleNamespace(
        folder=tmp_path, config=config, params={}, tokenizer=None, windows=lambda *_, **__: None
    )
    jobs = {
        name: prune._jobs(trained, [task_lib.TASKS["if_equals"]], Settings(), None, 1.0, None, name)[0]
        for name in ("", "tight")
    }
    assert jobs[""].folder == tmp_path / "circuits" / "one"
    assert jobs["tight"].folder == tmp_path / "circuits" / "one@tight"
    names = [job.store.name for job in jobs.values()]
    assert len(set(names)) == 2 and names[0].split("-")[-1] == names[1].split("-")[-1]
    assert all(name in str(job.store.folder) for name, job in zip(names, jobs.values(), strict=True))


def test_a_refused_task_does_not_name_the_circuits_of_the_others(tmp_path, monkeypatch, logged):
    pairs = types.SimpleNamespace(task="one", search={}, discretize={})
    monkeypatch.setattr(
        prune.procedure, "Subject", lambda *_: types.SimpleNamespace(digest="abc", held=lambda p, _: p)
    )
    refused = {
        "two": UserError("too long"),
        "three": TooFewPairs("few", "discretize", 30),
        "four": TooFewPairs("none", "search", 0),
    }
    monkeypatch.setattr(prune.procedure, "build_pairs", lambda *_, **__: ([pairs], refused))
    monkeypatch.setattr(prune, "Pruner", lambda *_, **__: None)
    config = types.SimpleNamespace(model=types.SimpleNamespace(context=8))
    trained: Any = types.SimpleNamespace(
        folder=tmp_path, config=config, params={}, tokenizer=None, windows=lambda *_, **__: None
    )
    for name in ("", "tight"):
        (job,) = prune._jobs(trained, [task_lib.TASKS["if_equals"]], Settings(), None, 1.0, None, name)
        assert job.folder.name == joined("one", name)
    assert logged[:3] == [
        "two: refused: too long",
        "three: refused: few; --discretize_pairs and --confirm_pairs together can be 30 at most",
        "four: refused: none",
    ]


def job(folder: pathlib.Path, settings: Settings, digest: str = "abc", pairs: str = "123") -> prune._Job:
    search: Any = types.SimpleNamespace(
        pairs=types.SimpleNamespace(task="one", report=None, digest=pairs),
        subject=types.SimpleNamespace(digest=digest, score=lambda pairs: Score(0.4, 0.5)),
        settings=settings,
        is_hopeless=lambda: True,
        hint=lambda: "hint",
    )
    store: Any = None
    return prune._Job(search, folder, store, lambda *_: None)


def test_what_will_become_of_a_circuit_of_other_settings_is_said_before_the_search(tmp_path, logged):
    save(tmp_path, "one", settings=Settings())
    place = tmp_path / "circuits" / "one"
    before = (place / "circuit.json").read_bytes()
    assert job(place, Settings()).run() and "done before" in "\n".join(logged)
    assert job(place, Settings(target=0.2)).run()
    said = "\n".join(logged)
    assert "has other settings (target: 0.15 -> 0.2)" in said and "--name=NAME keeps both" in said
    assert said.index("other settings (") < said.index("is in ")
    assert (tmp_path / "circuits" / "earlier" / "one.1" / "circuit.json").read_bytes() == before
    save(tmp_path, "one", settings=Settings())
    assert job(place, Settings(), digest="def").run()
    assert "is of another model" in "\n".join(logged)


def test_a_task_whose_pairs_were_edited_is_not_done(tmp_path, logged):
    save(tmp_path, "one", settings=Settings())
    place = tmp_path / "circuits" / "one"
    # An older file does not say which pairs it is of.
    assert job(place, Settings()).run() and job(place, Settings(), pairs="456").run()
    assert logged == ["  done before"] * 2
    status = Status.load(place)
    dataclasses.replace(status, pairs="123").save(place)
    logged.clear()
    assert job(place, Settings(), pairs="123").run() and logged == ["  done before"]
    assert job(place, Settings(), pairs="456").run()
    assert "is of other pairs: it is moved" in "\n".join(logged)
    assert (tmp_path / "circuits" / "earlier" / "one.1" / "circuit.json").exists()
    assert Status.load(place).pairs == "456"
    # What was found without a circuit is as old.
    logged.clear()
    assert job(place, Settings(), pairs="456").run() and logged == ["  done before"]
    assert job(place, Settings(), pairs="789").run() and "done before" not in logged[1:]
    assert Status.load(place).pairs == "789"


def test_another_name_leaves_the_circuit_where_it_is(tmp_path, logged):
    save(tmp_path, "one", settings=Settings())
    before = (tmp_path / "circuits" / "one" / "circuit.json").read_bytes()
    assert job(tmp_path / "circuits" / "one@tight", Settings(target=0.2)).run()
    assert (tmp_path / "circuits" / "one" / "circuit.json").read_bytes() == before
    assert not (tmp_path / "circuits" / "earlier").exists() and "moved" not in "\n".join(logged)
    assert Status.load(tmp_path / "circuits" / "one@tight").settings["target"] == 0.2


def test_tasks_to_look_for_have_names_of_their_own_and_not_those_of_circuits(tmp_path):
    with pytest.raises(UserError, match="--task=if_equals --name=tight"):
        prune.chosen_tasks(tmp_path, ["if_equals@tight"])
    line = {"prompt_a": "a", "prompt_b": "b", "answer_a": "x", "answer_b": "y"}
    (tmp_path / "mine@b.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match="the task 'mine@b' has the name of a circuit, TASK@NAME: rename it"):
        prune.chosen_tasks(tmp_path, [str(tmp_path / "mine@b.jsonl")])
    with pytest.raises(UserError, match="letters, digits"):
        prune.run(tmp_path, [], Settings(), name="a/b")
    for name, others in (("for_while", []), ("mine", [str(tmp_path / "mine.jsonl")])):
        folder = tmp_path / "other"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text(json.dumps(line))
        (tmp_path / "mine.jsonl").write_text(json.dumps(line))
        check(
            f"{name}.jsonl: another task has the name '{name}' too: rename this one",
            lambda names=[*others, f"{folder / name}.jsonl"]: prune.chosen_tasks(tmp_path, names),
        )
    assert prune.chosen_tasks(tmp_path, ["if_equals", "if_equals"]) == [task_lib.TASKS["if_equals"]]
    options: Any = types.SimpleNamespace(task=["some/mine.jsonl", "if_equals"], name="tight")
    assert prune._wanted(tmp_path, options) == ["mine@tight", "if_equals@tight"]

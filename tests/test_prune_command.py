"""The prune command reads recipes and flags, and never overwrites a circuit of other settings."""

import json
import subprocess
import types
from typing import Any

from helpers import run_python
import pytest

from wsparse import prune, recipes
from wsparse.circuits.circuit import Score, Status
from wsparse.circuits.settings import Settings
from wsparse.config import from_dict
from wsparse.errors import UserError

# Flags belong to a process: each command line is read in one of its own.
READ = """
from wsparse import prune
from wsparse.circuits import evidence
from wsparse.command import given_fields, run_command
def main(argv):
    print(prune.settings_from_flags())
    print(evidence.Options(**given_fields(evidence.Options)))
prune.define_flags()
run_command(main)
"""


def read(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-c", READ, "--run=x", *arguments)


def test_flags_override_the_recipe_and_the_old_spelling_works_with_a_note():
    result = read("--config=quick", "--config.trials=5", "--steps=7", "--discretise_pairs=9")
    assert result.returncode == 0, result.stderr
    expected = Settings(**dict(recipes.load("quick", "prune")) | {
        "trials": 5, "steps": 7, "discretize_pairs": 9,
    })  # fmt: skip
    assert str(expected) in result.stdout
    assert "--discretise_pairs is --discretize_pairs now" in result.stdout
    # Options that are not given have their defaults.
    assert "Options(source='', pairs=6, max_nodes=2000)" in result.stdout


def test_quick_is_the_recipe_of_that_name_and_not_given_beside_another():
    result = read("--quick", "--trials=5")
    assert result.returncode == 0, result.stderr
    expected = Settings(**dict(recipes.load("quick", "prune")) | {"trials": 5})
    assert str(expected) in result.stdout
    assert expected != Settings(trials=5)
    both = read("--quick", "--config=paper")
    assert both.returncode == 2
    assert both.stderr == "error: --quick is short for --config=quick: give one of --quick and --config\n"


def test_a_number_that_is_not_finite_is_refused_in_one_line():
    for argument in ("--lease=nan", "--config.necessity=inf", "--sweep=nan"):
        result = read("--config=quick", argument)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", list(recipes.names("prune")))
def test_every_recipe_of_pruning_gives_settings(name):
    settings = from_dict(Settings, recipes.load(name, "prune"))
    assert (settings == Settings()) == (name == "paper")


def test_a_task_that_the_model_cannot_do_is_finished_with_a_hint(tmp_path, logged):
    hint = "the model cannot do it at 0.15: --target=0.45 would try it"
    search: Any = types.SimpleNamespace(
        pairs=types.SimpleNamespace(task="hard", report=None, digest="123"),
        subject=types.SimpleNamespace(digest="abc", score=lambda pairs: Score(0.4, 0.5)),
        settings=Settings(),
        is_hopeless=lambda: True,
        hint=lambda: hint,
    )
    store: Any = None
    assert prune._Job(search, tmp_path, store, lambda *_: None).run()
    status = Status.load(tmp_path)
    assert (status.status, status.hint) == ("the model cannot do it", hint)
    assert f"  {hint}" in logged
    # An older file has none.
    values = json.loads((tmp_path / "status.json").read_text())
    del values["hint"]
    (tmp_path / "status.json").write_text(json.dumps(values))
    assert Status.load(tmp_path).hint == ""


def test_seeds_beyond_31_bits_are_refused():
    with pytest.raises(UserError, match="below 2"):
        Settings(seed=2**31)


def test_earlier_circuits_are_set_aside_under_numbers_of_their_own(tmp_path):
    task = tmp_path / "a_task"
    for content in ("first", "second"):
        task.mkdir(exist_ok=True)
        (task / "trials").mkdir(exist_ok=True)
        (task / "circuit.json").write_text(content)
        prune._set_aside(task)
        assert [path.name for path in task.iterdir()] == ["trials"]
    earlier = tmp_path / "earlier"
    assert (earlier / "a_task.1" / "circuit.json").read_text() == "first"
    assert (earlier / "a_task.2" / "circuit.json").read_text() == "second"
    # One that was moved away, as docs/circuits.md says, leaves its number free, and no other is written over.
    (earlier / "a_task.1").rename(tmp_path / "a_task@before")
    (task / "circuit.json").write_text("third")
    prune._set_aside(task)
    assert (earlier / "a_task.1" / "circuit.json").read_text() == "third"
    assert (earlier / "a_task.2" / "circuit.json").read_text() == "second"
    # Nothing to set aside leaves nothing behind.
    prune._set_aside(task)
    assert len(list(earlier.iterdir())) == 2

"""A run stops and goes on bit for bit, and refuses what is not its own."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import types

from helpers import assert_bitwise, assert_one_line
import jax
import numpy as np
import pytest
import train_case as case

from wsparse import checkpoint, files, locks, metrics, trackers, train, trees
from wsparse.config import to_dict
from wsparse.errors import UserError
from wsparse.loop import Loop

finished, one_device, source = case.finished, case.one_device, case.source


# Stopping and going on --------------------------------------------------------------------------------


def test_a_run_that_is_interrupted_again_and_again_ends_bitwise_as_one_that_was_not(
    finished, tmp_path, one_device, logged
):
    workdir = tmp_path / "run"
    # At a random step; at one that has just been saved; before anything was logged since.
    at = int(np.random.default_rng().integers(2, 14))
    for number, which in ((at, signal.SIGINT), (15, signal.SIGTERM), (31, signal.SIGINT)):
        before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        with pytest.MonkeyPatch.context() as monkeypatch:
            case.stop_at(monkeypatch, number, which)
            assert train.run(finished.config, workdir) == 128 + which, f"stopped at {at}"
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
        assert case.steps_on_disk(workdir)[-1] == number
        assert f"{which.name}: saved step {number}" in logged[-1]
        assert not (workdir / "summary.json").exists()
        assert all(record["step"] <= number for record in metrics.read(workdir))
    assert train.run(finished.config, workdir) == 0
    assert "resuming at step 31 of 40" in logged

    want_step, want = case.final_state(finished.workdir)
    step, state = case.final_state(workdir)
    assert step == want_step == case.STEPS
    assert_bitwise(state, want)
    # Negative control: a state of another step is not equal.
    with pytest.raises(AssertionError):
        assert_bitwise(state, case.final_state(finished.workdir, step=30)[1])

    key = lambda record: (record["step"], "val_loss" in record)
    found, wanted = metrics.read(workdir), metrics.read(finished.workdir)
    assert [key(record) for record in found] == [key(record) for record in wanted], f"stopped at {at}"
    for one, other in zip(found, wanted, strict=True):
        for name in ("val_loss", "nonzeros_per_matrix", "gradient_rms", "learning_rate", "kurtosis"):
            assert one.get(name) == other.get(name), (name, f"stopped at {at}")


def test_an_interrupted_run_is_one_run_of_a_tracker_and_lacks_no_record(finished, tmp_path, one_device):
    sessions = []
    library = types.SimpleNamespace(
        init=lambda **settings: sessions.append({"name": settings["name"], "logged": []}),
        log=lambda values, step: sessions[-1]["logged"].append(
            (step, values.get("loss"), "val_loss" in values)
        ),
        finish=lambda: sessions[-1].update(finished=True),
    )
    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "trackio", library)
        monkeypatch.setattr(trackers, "_is_installed", lambda name: True)
        with pytest.MonkeyPatch.context() as stopping:
            case.stop_at(stopping, 21, signal.SIGINT)
            assert train.run(finished.config, workdir, tracker=["trackio"]) == 128 + signal.SIGINT
        assert train.run(finished.config, workdir, tracker=["trackio"]) == 0
    first, second = sessions
    assert first["name"] == second["name"] and first["finished"] and second["finished"]
    records = [(r["step"], r.get("loss"), "val_loss" in r) for r in metrics.read(workdir)]
    assert first["logged"] + second["logged"] == records


def test_the_logged_loss_does_not_depend_on_where_a_run_was_interrupted(finished, tmp_path, one_device):
    """A record is the mean over the steps since the record before, those before a stop included."""
    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.stop_at(monkeypatch, 8, signal.SIGINT)
        train.run(finished.config, workdir)
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.stop_at(monkeypatch, 12, signal.SIGINT)
        train.run(finished.config, workdir)
    want = [record["loss"] for record in case.train_records(finished.workdir)]
    assert [record["loss"] for record in case.train_records(workdir)] == pytest.approx(want[:2], rel=1e-6)


def test_after_a_crash_training_goes_on_from_the_last_checkpoint(finished, tmp_path, one_device):
    workdir = tmp_path / "run"

    def crash(state):
        raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as monkeypatch:
        case.before_step(monkeypatch, 28, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train.run(finished.config, workdir)
    assert metrics.read(workdir)[-1]["step"] == 25
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    assert train.run(finished.config, workdir) == 0
    assert_bitwise(case.final_state(workdir)[1], case.final_state(finished.workdir)[1])
    steps = [record["step"] for record in case.train_records(workdir)]
    assert steps == list(range(5, case.STEPS + 1, 5))


def test_a_run_that_died_after_its_last_step_writes_its_summary_when_run_again(
    finished, tmp_path, one_device
):
    workdir = tmp_path / "run"

    def crash(*arguments):
        raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Loop, "_summarize", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train.run(finished.config, workdir)
    assert not (workdir / "summary.json").exists()
    assert train.run(finished.config, workdir) == 0
    mine, theirs = (
        json.loads((folder / "summary.json").read_text()) for folder in (workdir, finished.workdir)
    )
    for key in ("val_loss", "nonzeros", "alive_neurons", "steps"):
        assert mine[key] == theirs[key]
    # What it had recorded is not measured and recorded again.
    steps = [record["step"] for record in metrics.read(workdir) if "val_loss" in record]
    assert steps == [20, case.STEPS]


def test_a_run_that_died_before_its_last_evaluation_was_recorded_is_evaluated(finished, tmp_path, one_device):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    (workdir / "summary.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines.pop())["val_loss"]
    (workdir / "metrics.jsonl").write_text("".join(lines))
    assert train.run(finished.config, workdir) == 0
    mine, theirs = (
        json.loads((folder / "summary.json").read_text()) for folder in (workdir, finished.workdir)
    )
    assert mine["val_loss"] == theirs["val_loss"]
    assert metrics.read(workdir)[-1]["val_loss"] == theirs["val_loss"]


def test_a_checkpoint_is_given_losses_that_do_not_change_while_it_is_written(
    source, tmp_path, one_device, monkeypatch
):
    config, given = case.make_config(source, checkpoint_every=4), []
    save = checkpoint.Checkpointer.save

    def noting(self, step, state, metadata):
        given.append((metadata["losses"], list(metadata["losses"])))
        save(self, step, state, metadata)

    monkeypatch.setattr(checkpoint.Checkpointer, "save", noting)
    case.stop_at(monkeypatch, 7, signal.SIGTERM)
    train.run(config, tmp_path / "run")
    # At step 4, before the record of step 5; and at the stop.
    assert [len(then) for _, then in given] == [4, 2]
    assert [now for now, _ in given] == [then for _, then in given]


def test_a_workdir_of_another_config_is_refused_with_what_differs(finished, one_device):
    changed = dataclasses.replace(
        finished.config, steps=41, optimizer=dataclasses.replace(finished.config.optimizer, b1=0.8)
    )
    with pytest.raises(UserError) as error:
        train.run(changed, finished.workdir)
    assert_one_line(error, str(finished.workdir), "steps: 40 -> 41", "optimizer.b1: 0.9 -> 0.8")
    assert "seed" not in str(error.value)


def test_a_config_that_another_command_wrote_before_the_folder_was_locked_is_refused(
    source, tmp_path, one_device, monkeypatch
):
    workdir, hold = tmp_path / "run", locks.hold
    other = case.make_config(source, seed=7)

    @contextlib.contextmanager
    def late(folder, work):
        with hold(folder, work):
            files.write_json(folder / "config.json", to_dict(other))
            yield

    monkeypatch.setattr(locks, "hold", late)
    with pytest.raises(UserError) as error:
        train.run(case.make_config(source), workdir)
    assert_one_line(error, str(workdir), "seed: 7 -> 0")
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_a_process_that_does_not_see_the_summary_yet_believes_the_first_one(
    finished, tmp_path, one_device, monkeypatch
):
    """A network's file system may show a file to other processes later."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(train.processes, "gather", lambda text: ["True", text] if text == "False" else [text])
    assert train.run(finished.config, tmp_path / "run") == 0


def test_a_run_goes_on_with_its_own_tokens_when_the_source_changes(tmp_path, one_device):
    source = case.write_corpus(tmp_path / "files")
    config, workdir = case.make_config(source), tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.stop_at(monkeypatch, 3, signal.SIGINT)
        train.run(config, workdir)
    stored = (workdir / "data" / "provenance.json").read_bytes()
    for file in (tmp_path / "files").iterdir():
        file.unlink()
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.stop_at(monkeypatch, 5, signal.SIGINT)
        assert train.run(config, workdir) == 128 + signal.SIGINT
    assert case.steps_on_disk(workdir)[-1] == 5
    assert (workdir / "data" / "provenance.json").read_bytes() == stored


def test_changed_data_is_refused(tmp_path, one_device):
    """A run that is older than its folder's tokens has them made again from its sources."""
    source = case.write_corpus(tmp_path / "files")
    config, workdir = case.make_config(source), tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.stop_at(monkeypatch, 3, signal.SIGINT)
        train.run(config, workdir)
    file = tmp_path / "files" / "abc.py"
    content = file.read_text()
    file.write_text(content.replace("return", "  return"))
    shutil.rmtree(workdir / "data")
    with pytest.raises(UserError) as error:
        train.run(config, workdir)
    assert_one_line(error, "data", "digest")
    # Negative control: with the original file back it goes on.
    file.write_text(content)
    shutil.rmtree(workdir / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.stop_at(monkeypatch, 5, signal.SIGINT)
        assert train.run(config, workdir) == 128 + signal.SIGINT
    assert case.steps_on_disk(workdir)[-1] == 5


def test_a_config_that_cannot_start_does_not_claim_the_folder(source, tmp_path, one_device):
    """Whoever corrects the mistake runs the same command again."""
    for wrong in ({"data": {"source": f"files:{tmp_path}/none/*.py"}}, {"data": {"megabytes": 1e-6}}):
        workdir = tmp_path / "run"
        with pytest.raises(UserError):
            train.run(case.make_config(source, **wrong), workdir)
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.stop_at(monkeypatch, 2, signal.SIGINT)
        assert train.run(case.make_config(source), workdir) == 128 + signal.SIGINT


def test_a_refused_start_leaves_a_folder_data_that_was_there_before(source, tmp_path, one_device):
    """A user's own files, or the tokens of another run."""
    own = tmp_path / "mine" / "data"
    own.mkdir(parents=True)
    (own / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not the data of a run"):
        train.run(case.make_config(source), own.parent)
    assert (own / "thesis.tex").read_text() == "years of work"

    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.stop_at(monkeypatch, 2, signal.SIGINT)
        train.run(case.make_config(source), workdir)
    copied = shutil.copytree(workdir / "data", tmp_path / "copy" / "data")
    shard = max(copied.glob("train*record"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"must have .* bytes"):
        train.run(case.make_config(source), copied.parent)
    assert shard.exists()


def test_a_refused_start_takes_the_data_that_it_made_with_it(source, tmp_path, one_device, monkeypatch):
    def refuse(digest, what):
        assert (tmp_path / "run" / "data" / "provenance.json").exists()
        raise UserError(f"{what} must be the same")

    monkeypatch.setattr(train.processes, "require_same", refuse)
    with pytest.raises(UserError, match="the data must be the same"):
        train.run(case.make_config(source), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_config_file_is_an_error_of_one_line(finished, tmp_path, one_device):
    (tmp_path / "config.json").write_text('{"steps": ')
    with pytest.raises(UserError) as error:
        train.run(finished.config, tmp_path)
    assert_one_line(error, "config.json")


# Numbers that are not finite --------------------------------------------------------------------------

CULPRIT = "blocks/1/mlp/fc/kernel"


def poison(state):
    """A moment of one weight becomes NaN, so that the update of one matrix does."""

    def change(path, leaf):
        if not path.endswith("mu/blocks/mlp/fc/kernel"):
            return leaf
        values = np.array(leaf)
        values[1, 0, 0] = np.nan
        return jax.device_put(values, leaf.sharding)

    return trees.map_with_path(change, state)


def run_with_nan_at(number, config, workdir):
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.before_step(monkeypatch, number, poison)
        with pytest.raises(UserError) as error:
            train.run(config, workdir)
    return error


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_nan_stops_training_with_the_name_of_the_matrix_that_has_it(
    source, tmp_path, one_device, log_every
):
    config = case.make_config(source, log_every=log_every, checkpoint_every=4)
    error = run_with_nan_at(7, config, tmp_path / "run")
    assert_one_line(error, "step 7", CULPRIT, "checkpoint is step 4")
    assert str(error.value).count("blocks/") == 1, error.value


@pytest.mark.parametrize("number", [9, 12])
def test_a_nan_never_reaches_a_checkpoint(finished, source, tmp_path, one_device, number, logged):
    """Neither when the step is saved before its report is read (12), nor the step after a save (9)."""
    workdir = tmp_path / "run"
    config = case.make_config(source, log_every=5, checkpoint_every=4)
    run_with_nan_at(number, config, workdir)
    step, state = case.final_state(workdir)
    assert step == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert not (workdir / "damaged").exists()
    assert "not used" not in " ".join(logged)
    # Once the cause is gone, the same command goes on from there.
    assert train.run(config, workdir) == 0
    assert_bitwise(case.final_state(workdir)[1].params, case.final_state(finished.workdir)[1].params)


def test_after_a_nan_another_run_goes_on_from_the_last_checkpoint_with_another_config(
    source, tmp_path, one_device, logged
):
    config = case.make_config(source, log_every=5, checkpoint_every=4)
    error = run_with_nan_at(7, config, tmp_path / "run")
    assert_one_line(error, "lower optimizer.learning_rate", f"--from={tmp_path / 'run'}@4")
    lower = case.make_config(source, log_every=5, checkpoint_every=20, optimizer={"learning_rate": 0.01})
    other = tmp_path / "other"
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.stop_at(monkeypatch, 6, signal.SIGTERM)
        assert train.run(lower, other, origin=f"{tmp_path / 'run'}@4") == 128 + signal.SIGTERM
    assert case.steps_on_disk(other) == [4, 6]
    assert_bitwise(case.final_state(other, step=4)[1], case.final_state(tmp_path / "run", step=4)[1])
    # The folder stands on its own: it goes on without the first run.
    assert train.run(lower, other) == 0
    assert "resuming at step 6 of 40" in logged
    assert [record["step"] for record in case.train_records(other)] == list(range(5, 41, 5))


@pytest.mark.parametrize(
    ("origin", "words"),
    [("x@y", ["RUN@STEP"]), ("missing", ["missing", "does not exist"]), ("full@40", ["step 40"])],
)
def test_an_origin_that_cannot_be_used_is_an_error_of_one_line(finished, tmp_path, one_device, origin, words):
    origin = origin.replace("full", str(finished.workdir))
    with pytest.raises(UserError) as error:
        train.run(finished.config, tmp_path / "run", origin=origin)
    assert_one_line(error, *words)


def test_a_decay_that_overshoots_is_told_to_decay_less(source, tmp_path, one_device):
    config = case.make_config(source, optimizer={"weight_decay": 1e3})
    error = run_with_nan_at(3, config, tmp_path / "run")
    assert_one_line(error, "lower optimizer.weight_decay", "none")
    assert "learning_rate" not in str(error.value)


def test_a_second_run_in_a_folder_is_refused_with_who_holds_it(finished, tmp_path, one_device):
    workdir = tmp_path / "run"
    errors = []

    def try_again(state):
        with pytest.raises(UserError) as error:
            train.run(finished.config, workdir)
        errors.append(error)
        signal.raise_signal(signal.SIGTERM)
        return state

    with pytest.MonkeyPatch.context() as monkeypatch:
        case.before_step(monkeypatch, 2, try_again)
        assert train.run(finished.config, workdir) == 128 + signal.SIGTERM
    assert_one_line(errors[0], str(workdir), f"process {os.getpid()}", "training")
    # The first one was not disturbed, and its lock went with it.
    assert case.steps_on_disk(workdir) == [2]
    assert not (workdir / ".lock").exists()


def test_records_are_kept_when_no_checkpoint_is_usable(finished, tmp_path, one_device, logged):
    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.stop_at(monkeypatch, 12, signal.SIGTERM)
        train.run(finished.config, workdir)
    records = (workdir / "metrics.jsonl").read_text()
    (workdir / "checkpoints" / "12" / "digests.json").write_text("null")
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.stop_at(monkeypatch, 2, signal.SIGTERM)
        train.run(finished.config, workdir)
    assert (workdir / "damaged" / "metrics-0.jsonl").read_text() == records
    assert "training begins anew" in " ".join(logged)


def test_a_failed_save_stops_training_with_one_line(finished, tmp_path, one_device, monkeypatch):
    """The step after the first checkpoint that could not be written, not at the end of the run."""
    workdir, saves = tmp_path / "run", []
    write = checkpoint.files.write_json

    def fail(path, value, **options):
        if path.name == "digests.json":
            saves.append(path)
            raise checkpoint.files.cannot_write(path, OSError(28, "No space left on device"))
        write(path, value, **options)

    monkeypatch.setattr(checkpoint.files, "write_json", fail)
    with pytest.raises(UserError) as error:
        train.run(finished.config, workdir)
    assert_one_line(error, "digests.json", "No space left on device", "MB free")
    assert [path.parent.name for path in saves] == ["15"]

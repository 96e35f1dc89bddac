"""A run writes what it promises, prunes exactly, stops and goes on bit for bit, and fails in one line."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from conftest import log_lines
import jax
import numpy as np
import pytest

from wsparse import checkpoint, metrics, runs, sharding, sparsity, train, trees
from wsparse.config import TrainConfig, from_dict, to_dict
from wsparse.errors import UserError

REPO = pathlib.Path(__file__).resolve().parent.parent
STEPS = 40


def write_corpus(folder: pathlib.Path) -> str:
    """Repetitive documents; returns the source that reads them."""
    names = ["".join(letters) for letters in itertools.product("abcdef", repeat=3)]
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        lines = [f"def {name}(x, y):", f"    return x + {i % 7}", f"print({name}(1, y=2))", ""]
        (folder / f"{name}.py").write_text("\n".join(lines * 6))
    return f"files:{folder}/*.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "files")


def make_config(source: str, **changes) -> TrainConfig:
    settings: dict = {
        "model": {"vocab_size": 300, "context": 16, "n_layer": 2, "d_model": 32, "n_head": 2,
                  "d_head": 8, "d_mlp": 64},
        "sparsity": {"density": 0.25, "anneal_end": 0.5},  # no floor of 4 a neuron binds
        "optimizer": {"learning_rate": 0.02},
        "data": {"source": source, "megabytes": 1.0, "validation_fraction": 0.1},
        "steps": STEPS, "batch_size": 8, "log_every": 5, "eval_every": 20, "eval_batches": 2,
        "checkpoint_every": 15,
    }  # fmt: skip
    for key, value in changes.items():
        if isinstance(value, dict):
            settings.setdefault(key, {}).update(value)
        else:
            settings[key] = value
    return from_dict(TrainConfig, settings)


@functools.cache
def _compiled(config: TrainConfig, mesh) -> train.Program:
    return train_make_program(config, mesh)


train_make_program = train.make_program


def shared_program(config: TrainConfig, mesh) -> train.Program:
    """`train.make_program`, compiled once for all runs whose steps are the same function."""
    same = dataclasses.replace(
        config, log_every=1, eval_every=0, eval_batches=1, checkpoint_every=0, keep_checkpoints=1,
        data=train.TrainConfig().data,
    )  # fmt: skip
    return _compiled(same, mesh)


@pytest.fixture
def one_device(monkeypatch):
    """Runs use one device and share their compiled functions."""
    patch_for_speed(monkeypatch)


def patch_for_speed(monkeypatch):
    alone = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(train.sharding, "make_mesh", alone)
    monkeypatch.setattr(train, "make_program", shared_program)


def before_step(monkeypatch, number: int, act) -> None:
    """Have `act(state) -> state` called before the step that makes step `number`, once."""
    make = train.make_program

    def make_program(config, mesh):
        program = make(config, mesh)

        def step(state, batch):
            if int(state.step) + 1 == number and not done:
                done.append(True)
                state = act(state)
            return program.step(state, batch)

        return dataclasses.replace(program, step=step)

    done: list[bool] = []
    monkeypatch.setattr(train, "make_program", make_program)


def stop_at(monkeypatch, number: int, which: signal.Signals) -> None:
    """The process gets a signal while step `number` runs."""

    def act(state):
        signal.raise_signal(which)
        return state

    before_step(monkeypatch, number, act)


def final_state(workdir: pathlib.Path, step: int | None = None):
    config = runs.read_config(workdir)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: train.init_state(config)),
    )
    found, state = checkpoint.read(workdir / "checkpoints", like, step=step)
    return found, jax.device_get(state)


def assert_bitwise(found, want):
    found, want = trees.flatten(found), trees.flatten(want)
    assert set(found) == set(want)
    for path, leaf in want.items():
        a, b = np.asarray(found[path]), np.asarray(leaf)
        assert a.dtype == b.dtype, path
        assert a.tobytes() == b.tobytes(), path


def steps_on_disk(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def train_records(workdir):
    return [record for record in metrics.read(workdir) if "loss" in record]


def assert_one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text, text
    for word in words:
        assert word in text, text


@dataclasses.dataclass
class Finished:
    workdir: pathlib.Path
    config: TrainConfig
    compiled: list[str]
    printed: str


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory, compilation_names):
    """A complete run of the config above on one device; not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "deeper" / "full"
    config = make_config(source)
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_for_speed(monkeypatch)
        with log_lines() as lines, compilation_names() as names:
            assert train.run(config, workdir) == 0
    return Finished(workdir, config, names, "\n".join(lines))


@pytest.fixture(scope="module")
def compilation_names():
    """conftest's counter, for a fixture that lives as long as this module."""
    import conftest

    return conftest.compilations.__wrapped__()


# What a run writes ------------------------------------------------------------------------------------


def test_a_run_leaves_everything_it_promises(finished):
    workdir = finished.workdir
    for name in ("config.json", "tokenizer.json", "metrics.jsonl", "summary.json", "curves.png"):
        assert (workdir / name).is_file(), name
    assert json.loads((workdir / "config.json").read_text()) == to_dict(finished.config)
    (events,) = workdir.glob("events.out.tfevents.*")
    content = events.read_bytes()
    for name in (b"loss", b"val_loss", b"nonzeros_per_matrix/embed/tokens/0", b"alive_neurons/1"):
        assert name in content
    picture = (workdir / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 1000
    assert steps_on_disk(workdir) == [15, 30, 40]
    summary = json.loads((workdir / "summary.json").read_text())
    assert {"val_loss", "l0", "nonzeros", "tokens_per_s", "steps", "seconds"} <= set(summary)
    assert summary["steps"] == STEPS
    assert summary["tokens_per_s"] > 0 < summary["seconds"]
    last = [record for record in metrics.read(workdir) if "val_loss" in record][-1]
    assert summary["val_loss"] == last["val_loss"]
    assert last["step"] == STEPS
    # Nothing half-written stays behind.
    assert not [path for path in workdir.rglob("*") if "tmp" in path.name]


def test_every_record_has_every_number(finished):
    records = train_records(finished.workdir)
    assert [record["step"] for record in records] == list(range(5, STEPS + 1, 5))
    held_out = [record for record in metrics.read(finished.workdir) if "val_loss" in record]
    assert [record["step"] for record in held_out] == [20, 40]
    for record in records:
        for name in ("tokens", "loss", "learning_rate", "density", "nonzeros", "gradient_rms",
                     "kurtosis", "tokens_per_s"):  # fmt: skip
            assert np.isfinite(record[name]), name
        assert record["tokens"] == record["step"] * 8 * 16
        assert record["tokens_per_s"] > 0
        assert record["gradient_rms"] > 0
        assert len(record["alive_neurons"]) == 2
        assert all(0 <= n <= 64 for n in record["alive_neurons"])
        matrices = record["nonzeros_per_matrix"]
        assert sum(map(sum, matrices.values())) == record["nonzeros"]
        assert len(matrices["blocks/mlp/fc/kernel"]) == 2
        assert len(matrices["embed/tokens"]) == 1


def test_records_follow_the_schedules(finished):
    records = train_records(finished.workdir)
    density = [record["density"] for record in records]
    assert density == pytest.approx([0.8125, 0.625, 0.4375] + [0.25] * 5)
    for record in records:
        # No floor and no rounding up: what is there is what the schedule says.
        assert record["nonzeros_per_matrix"]["embed/tokens"] == [
            round(record["density"] * 300 * 32)
        ]
    rates = [record["learning_rate"] for record in records]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[3] == pytest.approx(0.02 * 2 * 21 / 39)  # the factor 1/sqrt(1/4)


def test_every_projected_matrix_has_exactly_its_share_of_nonzeros(finished):
    run = runs.load(finished.workdir)
    assert run.step == STEPS
    assert run.config == finished.config
    counts = sparsity.l0(run.params)
    assert len(counts) == 2 * 12 + 2
    for path, (nonzeros, size) in counts.items():
        assert nonzeros == round(0.25 * size), path
    summary = json.loads((finished.workdir / "summary.json").read_text())
    assert summary["nonzeros"] == sum(nonzeros for nonzeros, _ in counts.values())
    assert summary["l0"] == pytest.approx(0.25, abs=1e-3)
    # Negative control: at step 15 the anneal was still under way.
    early = sparsity.l0(runs.load(finished.workdir, step=15).params)
    assert all(early[path][0] > nonzeros for path, (nonzeros, _) in counts.items())
    gains = [leaf for path, leaf in trees.flatten(run.params).items() if path.endswith("gain")]
    assert len(gains) == 3
    assert all(np.count_nonzero(leaf) == leaf.size for leaf in gains)


def test_the_step_is_compiled_once_across_the_whole_anneal(finished, compilation_names):
    assert sum("train_step" in name for name in finished.compiled) == 1, finished.compiled
    assert sum("eval_step" in name for name in finished.compiled) == 1, finished.compiled

    # Negative control: the counter does see a function that is compiled twice.
    @jax.jit
    def train_step_again(x):
        return x + 1

    arrays = [np.zeros(3), np.zeros(4)]
    with compilation_names() as names:
        for array in arrays:
            train_step_again(array)
    assert sum("train_step" in name for name in names) == 2


def test_something_is_learned(finished):
    """300 tokens at random cost log(300) = 5.70 nats; this corpus repeats itself."""
    losses = [record["loss"] for record in train_records(finished.workdir)]
    assert losses[0] > 4
    assert losses[-1] < 2.5, losses
    summary = json.loads((finished.workdir / "summary.json").read_text())
    assert summary["val_loss"] < 2.7


def test_without_a_terminal_progress_is_one_line_per_record(finished):
    lines = finished.printed.splitlines()
    progress = [line for line in lines if line.startswith("step ") and "/40" in line]
    assert len(progress) == STEPS // 5
    for word in ("loss", "density", "nonzeros", "tokens/s", "left"):
        assert word in progress[0]
    assert sum("held-out loss" in line and line.startswith("step") for line in lines) == 2
    assert "curves.png" in lines[-1]
    assert "\r" not in finished.printed


def test_a_finished_run_says_so_and_does_nothing(finished, one_device, logged):
    before = {p: p.stat().st_mtime_ns for p in finished.workdir.rglob("*")}
    assert train.run(finished.config, finished.workdir) == 0
    assert "is complete" in logged[0]
    assert {p: p.stat().st_mtime_ns for p in finished.workdir.rglob("*")} == before


def test_evaluating_twice_gives_the_same_number_and_other_weights_another(finished):
    program = _compiled_for(finished.config)
    window = np.random.default_rng(0).integers(0, 300, (8, 17)).astype(np.int32)
    batch = sharding.put_batch(window, program.mesh, train.EVAL_BATCH)
    values = []
    for step in (40, 40, 30):
        params = final_state(finished.workdir, step)[1].params
        placed = jax.tree.map(
            lambda x, s: jax.device_put(x, s.sharding), params, program.abstract_state.params
        )
        values.append(float(program.evaluate(placed, batch)[0]))
    assert values[0] == values[1] != values[2]


def _compiled_for(config):
    return shared_program(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))


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
            stop_at(monkeypatch, number, which)
            assert train.run(finished.config, workdir) == 128 + which, f"stopped at {at}"
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
        assert steps_on_disk(workdir)[-1] == number
        assert f"{which.name}: saved step {number}" in logged[-1]
        assert not (workdir / "summary.json").exists()
        assert all(record["step"] <= number for record in metrics.read(workdir))
    assert train.run(finished.config, workdir) == 0
    assert "resuming at step 31 of 40" in logged

    want_step, want = final_state(finished.workdir)
    step, state = final_state(workdir)
    assert step == want_step == STEPS
    assert_bitwise(state, want)
    # Negative control: a state of another step is not equal.
    with pytest.raises(AssertionError):
        assert_bitwise(state, final_state(finished.workdir, step=30)[1])

    key = lambda record: (record["step"], "val_loss" in record)
    found, wanted = metrics.read(workdir), metrics.read(finished.workdir)
    assert [key(record) for record in found] == [key(record) for record in wanted], (
        f"stopped at {at}"
    )
    for one, other in zip(found, wanted, strict=True):
        for name in (
            "val_loss",
            "nonzeros_per_matrix",
            "gradient_rms",
            "learning_rate",
            "kurtosis",
        ):
            assert one.get(name) == other.get(name), (name, f"stopped at {at}")


def test_the_logged_loss_does_not_depend_on_where_a_run_was_interrupted(
    finished, tmp_path, one_device
):
    """A record is the mean over the steps since the record before, those before a stop included."""
    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, 8, signal.SIGINT)
        train.run(finished.config, workdir)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, 12, signal.SIGINT)
        train.run(finished.config, workdir)
    want = [record["loss"] for record in train_records(finished.workdir)]
    assert [record["loss"] for record in train_records(workdir)] == pytest.approx(
        want[:2], rel=1e-6
    )


def test_after_a_crash_training_goes_on_from_the_last_checkpoint(finished, tmp_path, one_device):
    workdir = tmp_path / "run"

    def crash(state):
        raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as monkeypatch:
        before_step(monkeypatch, 28, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train.run(finished.config, workdir)
    assert metrics.read(workdir)[-1]["step"] == 25
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    assert train.run(finished.config, workdir) == 0
    assert_bitwise(final_state(workdir)[1], final_state(finished.workdir)[1])
    steps = [record["step"] for record in train_records(workdir)]
    assert steps == list(range(5, STEPS + 1, 5))


def test_a_run_that_died_after_its_last_step_writes_its_summary_when_run_again(
    finished, tmp_path, one_device
):
    workdir = tmp_path / "run"

    def crash(*arguments):
        raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train._Loop, "_summarize", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train.run(finished.config, workdir)
    assert not (workdir / "summary.json").exists()
    assert train.run(finished.config, workdir) == 0
    mine, theirs = (
        json.loads((folder / "summary.json").read_text()) for folder in (workdir, finished.workdir)
    )
    for key in ("val_loss", "nonzeros", "alive_neurons", "steps"):
        assert mine[key] == theirs[key]


def test_a_workdir_of_another_config_is_refused_with_what_differs(finished, one_device):
    changed = dataclasses.replace(
        finished.config, steps=41, optimizer=dataclasses.replace(finished.config.optimizer, b1=0.8)
    )
    with pytest.raises(UserError) as error:
        train.run(changed, finished.workdir)
    assert_one_line(error, str(finished.workdir), "steps: 40 -> 41", "optimizer.b1: 0.9 -> 0.8")
    assert "seed" not in str(error.value)


def test_changed_data_is_refused(tmp_path, one_device):
    source = write_corpus(tmp_path / "files")
    config, workdir = make_config(source), tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, 3, signal.SIGINT)
        train.run(config, workdir)
    file = tmp_path / "files" / "abc.py"
    content = file.read_text()
    file.write_text(content.replace("return", "  return"))
    with pytest.raises(UserError) as error:
        train.run(config, workdir)
    assert_one_line(error, "data", "digest")
    # Negative control: with the original file back it goes on.
    file.write_text(content)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, 5, signal.SIGINT)
        assert train.run(config, workdir) == 128 + signal.SIGINT
    assert steps_on_disk(workdir)[-1] == 5


def test_a_config_that_cannot_start_does_not_claim_the_folder(source, tmp_path, one_device):
    """Whoever corrects the mistake runs the same command again."""
    for wrong in (
        {"data": {"source": f"files:{tmp_path}/none/*.py"}},
        {"data": {"megabytes": 1e-6}},
    ):
        workdir = tmp_path / "run"
        with pytest.raises(UserError):
            train.run(make_config(source, **wrong), workdir)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, 2, signal.SIGINT)
        assert train.run(make_config(source), workdir) == 128 + signal.SIGINT


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
        before_step(monkeypatch, number, poison)
        with pytest.raises(UserError) as error:
            train.run(config, workdir)
    return error


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_nan_stops_training_with_the_name_of_the_matrix_that_has_it(
    source, tmp_path, one_device, log_every
):
    config = make_config(source, log_every=log_every, checkpoint_every=4)
    error = run_with_nan_at(7, config, tmp_path / "run")
    assert_one_line(error, "step 7", CULPRIT, "checkpoint is step 4")
    assert str(error.value).count("blocks/") == 1, error.value


@pytest.mark.parametrize("number", [9, 12])
def test_a_nan_never_reaches_a_checkpoint(finished, source, tmp_path, one_device, number, logged):
    """Neither when the step is saved before its report is read (12), nor the step after a save (9)."""
    workdir = tmp_path / "run"
    config = make_config(source, log_every=5, checkpoint_every=4)
    run_with_nan_at(number, config, workdir)
    step, state = final_state(workdir)
    assert step == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert not (workdir / "damaged").exists()
    assert "not used" not in " ".join(logged)
    # Once the cause is gone, the same command goes on from there.
    assert train.run(config, workdir) == 0
    assert_bitwise(final_state(workdir)[1].params, final_state(finished.workdir)[1].params)


# Other ways to compute a step -------------------------------------------------------------------------


DENSE = {"sparsity": {"density": 1.0}, "model": {"abs_top_k_fraction": None}}


def run_steps(config, state, batches):
    """`(parameters, losses)` after some steps on one device."""
    program = _compiled_for(config)
    state = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, program.abstract_state)
    losses = []
    for rows in batches:
        split = rows.reshape(config.accumulate, -1, rows.shape[-1])
        state, report = program.step(state, sharding.put_batch(split, program.mesh))
        losses.append(float(report["loss"]))
    return trees.flatten(jax.device_get(state.params)), losses


def test_full_density_trains_densely(source, tmp_path, one_device):
    config = make_config(source, **DENSE, checkpoint_every=0)
    assert train.run(config, tmp_path / "run") == 0
    run = runs.load(tmp_path / "run")
    counts = sparsity.l0(run.params)
    # Zeros come only from embeddings of tokens that no text has: nothing was pruned.
    assert sum(n for n, _ in counts.values()) > 0.95 * sum(size for _, size in counts.values())
    records = train_records(tmp_path / "run")
    assert {record["density"] for record in records} == {1.0}
    assert records[-1]["loss"] < 2.5
    assert steps_on_disk(tmp_path / "run") == [STEPS]


def test_four_accumulated_micro_batches_equal_one_batch(finished, source):
    """At full density: pruning compiles for long, and does not see how its gradient was made."""
    state = final_state(finished.workdir, step=15)[1]
    rows = np.random.default_rng(0).integers(0, 300, (2, 8, 17)).astype(np.int32)
    config = make_config(source, **DENSE)
    want, want_losses = run_steps(config, state, rows)
    config = dataclasses.replace(config, accumulate=4)
    found, losses = run_steps(config, state, rows)
    assert losses == pytest.approx(want_losses, rel=1e-5)
    for path, leaf in want.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-4, atol=2e-5, err_msg=path)
    # Negative control: with one micro-batch replaced the result is another.
    rows[:, 6:] = 7
    other, _ = run_steps(config, state, rows)
    assert np.max(np.abs(other["blocks/mlp/fc/kernel"] - want["blocks/mlp/fc/kernel"])) > 1e-3


@pytest.mark.slow
def test_bfloat16_on_the_default_mesh_trains(source, tmp_path, monkeypatch):
    """Over all eight devices, as a run without a mesh in its config is."""
    patch_for_speed(monkeypatch)
    monkeypatch.setattr(train.sharding, "make_mesh", sharding_make_mesh)
    model = {"compute_dtype": "bfloat16", "abs_top_k_sites": ["mlp_neuron"]}
    config = make_config(source, model=model)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 20, signal.SIGTERM)
        assert train.run(config, tmp_path / "run") == 128 + signal.SIGTERM
    assert train.run(config, tmp_path / "run") == 0
    run = runs.load(tmp_path / "run")
    assert {leaf.dtype for leaf in jax.tree.leaves(run.params)} == {np.dtype(np.float32)}
    assert all(n == round(0.25 * size) for n, size in sparsity.l0(run.params).values())
    losses = [record["loss"] for record in train_records(tmp_path / "run")]
    assert np.isfinite(losses).all()
    assert losses[-1] < 2.6


sharding_make_mesh = sharding.make_mesh


# The command ------------------------------------------------------------------------------------------

RECIPE = """
from wsparse.config import recipe


def get_config():
    return recipe(
        model={{"vocab_size": 300, "context": 16, "n_layer": 2, "d_model": 32, "n_head": 2,
               "d_head": 8, "d_mlp": 64}},
        sparsity={{"density": 0.25}},
        data={{"source": {source!r}, "megabytes": 1.0, "validation_fraction": 0.1}},
        steps={steps}, batch_size=8, log_every=5, checkpoint_every=20,
    )
"""


# As in conftest.py, in another process.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


def command(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "wsparse.train", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPO), "XLA_FLAGS": "", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# Importing takes seconds, a mistake none: every command is a fork of a process that has imported.
MANY_COMMANDS = """
import json, os, runpy, sys

import wsparse.checkpoint, wsparse.circuits, wsparse.data.batches, wsparse.metrics, wsparse.sharding

statuses = []
for number, arguments in enumerate(json.load(sys.stdin)):
    if (child := os.fork()) == 0:
        output = os.open(f"{sys.argv[1]}/{number}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["train", *arguments]
        runpy.run_module("wsparse.train", run_name="__main__")
    statuses.append(os.waitpid(child, 0)[1])
print(json.dumps(statuses))
"""


@pytest.fixture
def recipe(tmp_path, source):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(source=source, steps=100))
    return f"--config={path}"


def test_mistakes_on_the_command_line_are_errors_of_one_line(recipe, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    workdir = f"--workdir={tmp_path / 'run'}"
    cases = {
        "group": ([recipe, workdir, "--config.modle.x=1"], ["modle", "model"]),
        "key": ([recipe, workdir, "--config.model.n_layr=1"], ["n_layr", "n_layer"]),
        "type": ([recipe, workdir, "--config.steps=abc"], ["steps", "abc"]),
        "value": (
            [recipe, workdir, "--config.model.n_layer=0"],
            ["model.n_layer", "at least 1", "0"],
        ),
        "top": ([recipe, workdir, "--config.zzzz=1"], ["unknown config key 'zzzz'"]),
        "nothing": ([workdir], ["--config"]),
        "file": ([f"--config={tmp_path}/none.py", workdir], ["none.py"]),
        "workdir": ([recipe, f"--workdir={blocked}/run"], ["--workdir", str(blocked)]),
    }

    recipes = {
        "no function": ("x = 1", ["get_config"]),
        "no config": ("def get_config(): return 1", ["ConfigDict", "int"]),
        "raises": ("def get_config():\n    return 1 / 0", [".py:2: ZeroDivisionError"]),
        "syntax": ("def get_config(:", [".py:1: invalid syntax"]),
    }
    for number, (name, (code, words)) in enumerate(recipes.items()):
        path = tmp_path / f"bad{number}.py"
        path.write_text(code)
        cases[name] = ([f"--config={path}", workdir], words)

    outputs = tmp_path / "outputs"
    outputs.mkdir()
    process = subprocess.run(
        [sys.executable, "-c", MANY_COMMANDS, str(outputs)],
        input=json.dumps([arguments for arguments, _ in cases.values()]),
        env={**os.environ, "PYTHONPATH": str(REPO), "XLA_FLAGS": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    statuses = dict(zip(cases, json.loads(process.stdout), strict=True))
    for number, (name, (_, words)) in enumerate(cases.items()):
        printed = (outputs / f"{number}.txt").read_text()
        assert statuses[name] != 0, name
        assert "Traceback" not in printed, (name, printed)
        assert len(printed.strip().splitlines()) == 1, (name, printed)
        for word in words:
            assert word in printed, (name, printed)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_process_loses_only_what_came_after_its_last_checkpoint(source, tmp_path):
    """SIGKILL at a random moment, then the same command: bitwise the run that nothing happened to."""
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(source=source, steps=300))
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        **QUICK,
    }

    def go(workdir):
        return command(f"--config={path}", f"--workdir={workdir}", **cache)

    whole = go(tmp_path / "whole")
    _, err = whole.communicate(timeout=600)
    assert whole.returncode == 0, err

    killed = go(tmp_path / "killed")
    wait = float(np.random.default_rng().uniform(0, 1))
    limit = time.monotonic() + 300
    while not (tmp_path / "killed" / "checkpoints" / "40" / "digests.json").exists():
        assert killed.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.005)
    time.sleep(wait)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it finished before it was killed"
    assert not (tmp_path / "killed" / "summary.json").exists()

    again = go(tmp_path / "killed")
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert "resuming at step" in out
    assert_bitwise(final_state(tmp_path / "killed")[1], final_state(tmp_path / "whole")[1])
    steps = [record["step"] for record in train_records(tmp_path / "killed")]
    assert steps == list(range(5, 301, 5))


@pytest.mark.slow
def test_a_learning_rate_that_explodes_stops_with_a_name(recipe, tmp_path):
    arguments = [recipe, f"--workdir={tmp_path / 'run'}", "--config.optimizer.learning_rate=1e30"]
    process = command(*arguments, **QUICK)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2
    (line,) = err.strip().splitlines()
    assert "NaN or infinity at step" in line
    assert "learning_rate" in line
    assert any(part in line for part in ("blocks/", "embed/", "head/"))
    assert not (tmp_path / "run" / "summary.json").exists()

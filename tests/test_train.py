"""A run writes what it promises, prunes exactly, and computes the step it is said to."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest
import train_case as case

from wsparse import metrics, runs, sharding, sparsity, train, trees
from wsparse.config import to_dict
from wsparse.step import EVAL_BATCH

finished, one_device, source = case.finished, case.one_device, case.source


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
    assert case.steps_on_disk(workdir) == [15, 30, 40]
    summary = json.loads((workdir / "summary.json").read_text())
    assert {"val_loss", "l0", "nonzeros", "tokens_per_s", "steps", "seconds"} <= set(summary)
    assert summary["steps"] == case.STEPS
    assert summary["tokens_per_s"] > 0 < summary["seconds"]
    last = [record for record in metrics.read(workdir) if "val_loss" in record][-1]
    assert summary["val_loss"] == last["val_loss"]
    assert last["step"] == case.STEPS
    # Nothing half-written stays behind.
    assert not [path for path in workdir.rglob("*") if "tmp" in path.name]


def test_every_record_has_every_number(finished):
    records = case.train_records(finished.workdir)
    assert [record["step"] for record in records] == list(range(5, case.STEPS + 1, 5))
    held_out = [record for record in metrics.read(finished.workdir) if "val_loss" in record]
    assert [record["step"] for record in held_out] == [20, 40]
    for record in records:
        for name in ("tokens", "loss", "learning_rate", "density", "nonzeros", "gradient_rms",
                     "kurtosis", "tokens_per_s"):  # fmt: skip
            assert np.isfinite(record[name]), name
        assert record["tokens"] == record["step"] * 8 * 16
        assert record["tokens_per_s"] > 0
        assert record["gradient_rms"] > 0
        assert 0 <= record["turnover"] < 0.5
        assert len(record["alive_neurons"]) == 2
        assert all(0 <= n <= 64 for n in record["alive_neurons"])
        matrices = record["nonzeros_per_matrix"]
        assert sum(map(sum, matrices.values())) == record["nonzeros"]
        assert len(matrices["blocks/mlp/fc/kernel"]) == 2
        assert len(matrices["embed/tokens"]) == 1


def test_records_follow_the_schedules(finished):
    records = case.train_records(finished.workdir)
    density = [record["density"] for record in records]
    assert density == pytest.approx([0.8125, 0.625, 0.4375] + [0.25] * 5)
    for record in records:
        # No floor and no rounding up: what is there is what the schedule says.
        assert record["nonzeros_per_matrix"]["embed/tokens"] == [round(record["density"] * 300 * 32)]
    rates = [record["learning_rate"] for record in records]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[3] == pytest.approx(0.02 * 2 * 21 / 39)  # the factor 1/sqrt(1/4)


def test_every_projected_matrix_has_exactly_its_share_of_nonzeros(finished):
    run = runs.load(finished.workdir)
    assert run.step == case.STEPS
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


def test_the_step_is_compiled_once_across_the_whole_anneal(finished, compilations):
    assert sum("train_step" in name for name in finished.compiled) == 1, finished.compiled
    assert sum("eval_step" in name for name in finished.compiled) == 1, finished.compiled

    # Negative control: the counter does see a function that is compiled twice.
    @jax.jit
    def train_step_again(x):
        return x + 1

    arrays = [np.zeros(3), np.zeros(4)]
    with compilations() as names:
        for array in arrays:
            train_step_again(array)
    assert sum("train_step" in name for name in names) == 2


def test_something_is_learned(finished):
    """300 tokens at random cost log(300) = 5.70 nats; this corpus repeats itself."""
    losses = [record["loss"] for record in case.train_records(finished.workdir)]
    assert losses[0] > 4
    assert losses[-1] < 2.5, losses
    summary = json.loads((finished.workdir / "summary.json").read_text())
    assert summary["val_loss"] < 2.7


def test_without_a_terminal_progress_is_one_line_per_record(finished):
    lines = finished.printed.splitlines()
    progress = [line for line in lines if line.startswith("step ") and "/40" in line]
    assert len(progress) == case.STEPS // 5
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
    program = case.compiled_for(finished.config)
    window = np.random.default_rng(0).integers(0, 300, (8, 17)).astype(np.int32)
    batch = sharding.put_batch(window, program.mesh, EVAL_BATCH)
    values = []
    for step in (40, 40, 30):
        params = case.final_state(finished.workdir, step)[1].params
        placed = jax.tree.map(
            lambda x, s: jax.device_put(x, s.sharding), params, program.abstract_state.params
        )
        values.append(float(program.evaluate(placed, batch)[0]))
    assert values[0] == values[1] != values[2]


# Other ways to compute a step -------------------------------------------------------------------------


DENSE = {"sparsity": {"density": 1.0}, "model": {"abs_top_k_fraction": None}}


def run_steps(config, state, batches):
    """`(parameters, losses)` after some steps on one device."""
    program = case.compiled_for(config)
    state = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, program.abstract_state)
    losses = []
    for rows in batches:
        split = rows.reshape(config.accumulate, -1, rows.shape[-1])
        state, report = program.step(state, sharding.put_batch(split, program.mesh))
        losses.append(float(report["loss"]))
    return trees.flatten(jax.device_get(state.params)), losses


def test_full_density_trains_densely(source, tmp_path, one_device):
    config = case.make_config(source, **DENSE, checkpoint_every=0)
    assert train.run(config, tmp_path / "run") == 0
    run = runs.load(tmp_path / "run")
    counts = sparsity.l0(run.params)
    # Zeros come only from embeddings of tokens that no text has: nothing was pruned.
    assert sum(n for n, _ in counts.values()) > 0.95 * sum(size for _, size in counts.values())
    records = case.train_records(tmp_path / "run")
    assert {record["density"] for record in records} == {1.0}
    assert records[-1]["loss"] < 2.5
    assert case.steps_on_disk(tmp_path / "run") == [case.STEPS]


def test_four_accumulated_micro_batches_equal_one_batch(finished, source):
    """At full density: pruning compiles for long, and does not see how its gradient was made."""
    state = case.final_state(finished.workdir, step=15)[1]
    rows = np.random.default_rng(0).integers(0, 300, (2, 8, 17)).astype(np.int32)
    config = case.make_config(source, **DENSE)
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
    case.patch_for_speed(monkeypatch)
    monkeypatch.setattr(train.sharding, "make_mesh", sharding_make_mesh)
    model = {"compute_dtype": "bfloat16", "abs_top_k_sites": ["mlp_neuron"]}
    config = case.make_config(source, model=model)
    with pytest.MonkeyPatch.context() as patch:
        case.stop_at(patch, 20, signal.SIGTERM)
        assert train.run(config, tmp_path / "run") == 128 + signal.SIGTERM
    assert train.run(config, tmp_path / "run") == 0
    run = runs.load(tmp_path / "run")
    assert {leaf.dtype for leaf in jax.tree.leaves(run.params)} == {np.dtype(np.float32)}
    assert all(n == round(0.25 * size) for n, size in sparsity.l0(run.params).values())
    losses = [record["loss"] for record in case.train_records(tmp_path / "run")]
    assert np.isfinite(losses).all()
    assert losses[-1] < 2.6


sharding_make_mesh = sharding.make_mesh

"""What the README tells a newcomer to type, from any folder: train, interrupt, resume, sample."""

import json
import signal
import time

from helpers import REPO, start_python
import numpy as np
import pytest

from wsparse import metrics, runs, sparsity
from wsparse.circuits import Circuit

STEPS = 400
# configs/tiny.py, small enough for a minute.
SMALLER = (
    "--config.model.vocab_size=512",
    "--config.model.d_model=64",
    "--config.model.n_head=4",
    "--config.model.context=32",
    "--config.data.source=idioms",
    "--config.data.megabytes=0.5",
    "--config.sparsity.density=0.125",
    f"--config.steps={STEPS}",
    "--config.batch_size=16",
    "--config.log_every=5",
    "--config.eval_every=0",
    "--config.checkpoint_every=0",
)


@pytest.mark.slow
def test_train_interrupt_resume_and_sample_from_another_folder(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(module, *arguments):
        return start_python("-m", f"wsparse.{module}", *arguments, cwd=elsewhere, **cache)

    def finish(process):
        out, err = process.communicate(timeout=600)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    recipe = f"--config={REPO / 'configs' / 'tiny.py'}"
    first = start("train", recipe, *SMALLER)
    workdir = elsewhere / "runs" / "tiny"  # The folder is named after the recipe.
    limit = time.monotonic() + 400
    while first.poll() is None and len(metrics.read(workdir)) < 2:
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert first.poll() is None, finish(first)
    first.send_signal(signal.SIGTERM)
    status, out, err = finish(first)
    assert status == 128 + signal.SIGTERM, out + err
    assert "SIGTERM: saved step" in out
    assert not (workdir / "summary.json").exists()

    # What was saved can be used already.
    early = runs.load(workdir)
    assert 0 < early.step < STEPS

    # A different command on the same folder is refused, the same one goes on.
    status, _, err = finish(start("train", recipe, *SMALLER, "--config.seed=1"))
    assert status == 2
    assert "seed: 0 -> 1" in err
    status, out, err = finish(start("train", recipe, *SMALLER))
    assert status == 0, out + err
    assert f"resuming at step {early.step} of {STEPS}" in out
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["val_loss"] < np.log(512) - 0.5
    steps = [record["step"] for record in metrics.read(workdir) if "loss" in record]
    assert steps == list(range(5, STEPS + 1, 5))
    run = runs.load(workdir)
    for path, (nonzeros, size) in sparsity.l0(run.params).items():
        assert nonzeros == round(0.125 * size), path
    assert summary["nonzeros"] == sum(nonzeros for nonzeros, _ in sparsity.l0(run.params).values())

    status, out, err = finish(start("train", recipe, *SMALLER))
    assert status == 0, err
    assert "is complete" in out

    prompt = "def f(a):\n"
    arguments = ("--run=runs/tiny", f"--prompt={prompt}", "--tokens=8", "--samples=2", "--seed=3")
    status, out, err = finish(start("sample", *arguments))
    assert status == 0, err
    assert out.startswith("--- sample 1\n" + prompt)
    assert "--- sample 2\n" + prompt in out

    # Briefly trained, but enough to go through every stage of pruning, for a loss that takes a few nodes.
    # These tasks are at 0.14 to 0.5 nats by now, however a processor rounds; most others are at chance.
    arguments = ("--run=runs/tiny", "--task=var_if,final_kwarg", "--target=0.6", "--trials=2")
    quick = ("--steps=3", "--pairs_per_step=4", "--search_pairs=8", "--discretize_pairs=8")
    command = (*arguments, *quick, "--report_pairs=8", "--single_removals=16", "--sweep=0.6")
    status, out, err = finish(start("prune", *command))
    assert status == 0, err
    folder = workdir / "circuits"
    found = [path.parent.name for path in folder.glob("*/circuit.json")]
    assert found, out
    circuit = Circuit.load(folder / found[0])
    circuit.check(run.params)
    assert circuit.counts.nodes == len(circuit.nodes)
    assert set(circuit.controls) == {"shuffled_labels", "random_model"}
    assert found[0] in (folder / "table.txt").read_text()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert all(
        (folder / name / "evidence.json").exists() == bool(Circuit.load(folder / name).nodes)
        for name in found
    )
    status, out, err = finish(start("prune", *command))
    assert status == 0, err
    assert out.count("done before") >= 1
    circuits = [Circuit.load(folder / name) for name in found]
    drawn = [circuit.task for circuit in circuits if circuit.nodes]
    assert drawn, circuits
    status, out, err = finish(start("view", "--run=runs/tiny"))
    assert status == 0, err
    page = (workdir / "report.html").read_text()
    assert all(name in page for name in drawn)
    status, out, err = finish(start("circuits.compare", "--runs", "runs/tiny", "runs/tiny"))
    assert status == 0, err
    assert " 1.0" in out

    status, _, err = finish(start("prune", "--run=runs/tiny", "--task=indent_four"))
    assert status == 2
    assert "indent_for" in err
    status, out, err = finish(start("sample", "--run=runs/none", "--prompt=x"))
    assert status == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "runs/none" in err

"""Several processes train as one does, stop at one step together, and others go on from what they saved."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

from helpers import REPO, assert_bitwise
import jax
import numpy as np
import pytest

from wsparse import checkpoint, metrics, processes, sharding, train, trees
from wsparse.config import MeshConfig, TrainConfig, from_dict, to_dict
from wsparse.data import encode
from wsparse.errors import UserError
from wsparse.step import Program, make_program

STEPS = 40
# Trains what argv[1] describes in argv[2], each step argv[3] seconds late.
WORKER = """
import functools, json, pathlib, sys, time
from wsparse import command, processes, train
from wsparse.config import TrainConfig, from_dict
from wsparse.data import batches

train_batches = batches.train_batches
def late(*args, **options):
    for batch in train_batches(*args, **options):
        time.sleep(float(sys.argv[3]))
        yield batch
batches.train_batches = late
# One disk shows a file at once.
processes.blind_processes = functools.partial(processes.blind_processes, seconds=2)
config = from_dict(TrainConfig, json.loads(pathlib.Path(sys.argv[1]).read_text()))
with command.log_to_stdout():
    processes.initialize_processes()
    sys.exit(train.run(config, pathlib.Path(sys.argv[2])))
"""


@pytest.fixture(autouse=True)
def no_other_job(monkeypatch):
    """No job that the tests are a part of is theirs."""
    for name in list(os.environ):
        if name.startswith(
            ("JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROCESS", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_")
        ):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i, letters in enumerate(itertools.product("abcdef", repeat=3)):
        name = "".join(letters)
        lines = [f"def {name}(x, y):", f"    return x + {i % 7}", f"print({name}(1, y=2))", ""]
        (folder / f"{name}.py").write_text("\n".join(lines * 2))
    return f"files:{folder}/*.py"


def make_config(source: str, **changes) -> TrainConfig:
    settings = {
        "model": {"vocab_size": 300, "context": 8, "n_layer": 1, "d_model": 16, "n_head": 2,
                  "d_head": 8, "d_mlp": 32},
        "sparsity": {"density": 0.25, "anneal_end": 0.5},
        "optimizer": {"learning_rate": 0.02},
        "data": {"source": source, "megabytes": 1.0, "validation_fraction": 0.1},
        "mesh": {"data": 1, "fsdp": -1},
        "steps": STEPS, "batch_size": 8, "accumulate": 2, "log_every": 1, "eval_batches": 2,
    }  # fmt: skip
    return from_dict(TrainConfig, settings | changes)


@contextlib.contextmanager
def started(config, workdir, *, processes: int, late: float = 0.0, folders=None, file=None):
    """Processes of one device that train together; killed at the end of the block if still there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = file or workdir.parent / f"{workdir.name}.json"
    file.write_text(json.dumps(to_dict(config)))
    shared = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "PYTHONPATH": str(REPO),
    }
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, file, workdir, str(late)],
            cwd=folders[index] if folders else REPO,
            env=shared | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        yield jobs
    finally:
        for job in jobs:
            job.kill()
            job.wait()


def results(jobs) -> list[tuple[int, str]]:
    """Exit status and output of each."""
    outputs = [job.communicate(timeout=300)[0] for job in jobs]
    return [(job.returncode, output) for job, output in zip(jobs, outputs, strict=True)]


@functools.cache
def compiled(config: TrainConfig, mesh) -> Program:
    return make_program(config, mesh)


def shared_program(config: TrainConfig, mesh) -> Program:
    """`make_program`, compiled once for runs that differ in their data alone."""
    return compiled(dataclasses.replace(config, data=TrainConfig().data), mesh)


def train_here(monkeypatch, config, workdir, devices: int) -> int:
    """Train in this process on some of its devices."""
    some = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
    with monkeypatch.context() as patch:
        patch.setattr(train.sharding, "make_mesh", some)
        patch.setattr(train, "make_program", shared_program)
        return train.run(config, workdir)


def saved(workdir, mesh_config: MeshConfig, devices: int = 1) -> tuple[int, dict[str, np.ndarray]]:
    """The newest checkpoint, restored onto a mesh of this process."""
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    config = from_dict(TrainConfig, json.loads((workdir / "config.json").read_text()))
    program = make_program(dataclasses.replace(config, mesh=mesh_config), mesh)
    with checkpoint.Checkpointer(workdir / "checkpoints") as checkpoints:
        step, state, _ = checkpoints.restore(program.abstract_state)
    found = trees.flatten(state)
    for path, wanted in trees.flatten(program.abstract_state).items():
        assert found[path].sharding == wanted.sharding
    return step, {path: np.asarray(leaf) for path, leaf in found.items()}


def losses(workdir) -> list[float]:
    return [record["loss"] for record in metrics.read(workdir) if "loss" in record]


def stop_one(jobs, workdir, *, which: int, after: int) -> None:
    """SIGTERM one process once the job has made some steps."""
    deadline = time.monotonic() + 240
    while len(losses(workdir)) < after:
        assert time.monotonic() < deadline and all(job.poll() is None for job in jobs)
        time.sleep(0.05)
    jobs[which].send_signal(signal.SIGTERM)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_and_one_goes_on_bit_for_bit(
    source, tmp_path, monkeypatch
):
    config = make_config(source)
    workdir = tmp_path / "two"
    with started(config, workdir, processes=2, late=0.4) as jobs:
        stop_one(jobs, workdir, which=1, after=2)
        (first, said), (second, silent) = results(jobs)
    assert first == second == 128 + signal.SIGTERM, said + silent
    (name,) = [path.name for path in (workdir / "checkpoints").iterdir()]
    stopped = int(name)
    assert 2 <= stopped < STEPS
    assert f"SIGTERM: saved step {stopped}; run the same command again to go on" in said
    # One process speaks and writes for both.
    assert "saved step" not in silent
    assert len(losses(workdir)) == stopped
    assert len(list(workdir.glob("events*"))) == 1

    # What two processes saved in parts is whole, on a mesh of another shape.
    step, whole = saved(workdir, MeshConfig())
    assert step == stopped
    assert_bitwise(whole, saved(workdir, MeshConfig(data=2, fsdp=2, tensor=2), devices=8)[1])

    # The sum of two numbers does not depend on their order, so that one process with two devices is the
    # same computation to the bit.
    assert train_here(monkeypatch, config, workdir, devices=2) == 0
    alone = tmp_path / "alone"
    assert train_here(monkeypatch, config, alone, devices=2) == 0
    assert_bitwise(saved(workdir, MeshConfig())[1], saved(alone, MeshConfig())[1])
    assert losses(workdir) == losses(alone)
    # Control: another seed of the data ends elsewhere.
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=1))
    assert train_here(monkeypatch, other, tmp_path / "other", devices=2) == 0
    other, alone = (trees.digest(saved(tmp_path / name, MeshConfig())[1]) for name in ("other", "alone"))
    assert other != alone


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [{"data": 4}, {"data": 1, "fsdp": 4}, {"data": 2, "tensor": 2}, {"data": 1, "tensor": 4}]
)
def test_four_processes_go_where_one_goes_and_two_go_on(source, tmp_path, monkeypatch, mesh):
    config = make_config(source, mesh=mesh)
    workdir = tmp_path / "four"
    with started(config, workdir, processes=4, late=0.4) as jobs:
        stop_one(jobs, workdir, which=2, after=2)
        assert [status for status, _ in results(jobs)] == [128 + signal.SIGTERM] * 4
    stopped, _ = saved(workdir, MeshConfig())
    assert stopped < STEPS
    fewer = make_config(source, mesh={"data": -1})
    with started(fewer, workdir, processes=2) as jobs:
        (status, output), (other, _) = results(jobs)
    assert status == other == 0, output
    assert f"resuming at step {stopped}" in output

    alone = tmp_path / "alone"
    assert train_here(monkeypatch, config, alone, devices=4) == 0
    (_, found), (_, wanted) = saved(workdir, MeshConfig()), saved(alone, MeshConfig())
    # Sums of four numbers depend on their order, in the last bits.
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-4)
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-2, atol=1e-4, err_msg=path)


@pytest.mark.slow
def test_processes_that_read_different_data_are_refused(source, tmp_path):
    config = make_config(source)
    folders = [tmp_path / "0", tmp_path / "1"]
    # Each process finds tokens through its own current folder: of one tokenizer, and different.
    options = encode.Options(source="idioms", vocab_size=config.model.vocab_size, megabytes=0.05)
    for seed, folder in enumerate(folders):
        folder.mkdir()
        encode.write(dataclasses.replace(options, seed=seed), folder / "tokens")
        options = dataclasses.replace(options, tokenizer=str(folder / "tokens" / "tokenizer.json"))
    relative = dataclasses.replace(config, data=dataclasses.replace(config.data, source="arrayrecord:tokens"))
    with started(relative, tmp_path / "run", processes=2, folders=folders) as jobs:
        outputs = results(jobs)
    for status, output in outputs:
        assert status != 0
        assert "is not what it was made from (arrayrecord:tokens, its digest differs)" in output
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.slow
def test_processes_whose_workdirs_are_different_folders_are_refused(source, tmp_path, monkeypatch):
    config = make_config(source)
    for index in range(2):
        (tmp_path / str(index)).mkdir()
    folders = [tmp_path / "0", tmp_path / "1"]
    with started(config, pathlib.Path("run"), processes=2, folders=folders, file=tmp_path / "c") as jobs:
        outputs = results(jobs)
    for status, output in outputs:
        assert status != 0
        assert "must be one folder for all processes, but process 1 does not see" in output


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "got None, 2, None"),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_PROCESS_ID": "0"}, "got host:1, None, 0"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "got host:1, 2, 2",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            "got host, 2, 1",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "1"},
            "got h:1, two, 1",
        ),
    ],
)
def test_variables_that_contradict_each_other_are_refused(monkeypatch, variables, match):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"one of 0, 1, ... below it, {match}"):
        processes.initialize_processes()


@pytest.mark.parametrize(
    ("variables", "joins"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, False),  # a batch script, outside srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a[1-2]"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
        ({"TPU": "1", "JAX_PLATFORMS": ""}, True),
        ({"TPU": "1", "JAX_PLATFORMS": "cpu"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, True),
    ],
)
def test_other_processes_are_joined_where_the_environment_has_them(monkeypatch, variables, joins):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "accelerators", lambda: ["tpu"] if "TPU" in variables else [])
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    processes.initialize_processes()
    assert bool(calls) == joins
    if "JAX_PROCESS_ID" in variables:
        assert calls == [{"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}]


def test_one_process_on_a_machine_with_a_tpu_of_its_own_goes_on_alone(monkeypatch):
    """Or with what looks like one: devices of VFIO may be anything."""

    def initialize(**given):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(processes, "accelerators", lambda: ["tpu"])
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    processes.initialize_processes()
    # Control: where the environment names others, they must be found.
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    with pytest.raises(UserError, match="cannot join the other processes: coordinator_address should be"):
        processes.initialize_processes()


@pytest.mark.parametrize("index", [0, 1])
def test_process_0_chooses_the_checkpoint_that_all_begin_from_and_alone_hashes_it(
    tmp_path, monkeypatch, index
):
    asked = []

    def find_step(folder, step):
        asked.append((folder, step))
        return 7

    # What process 0 says of itself, and which step it found.
    said = iter(["", "7"])
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(processes, "gather", lambda text: [next(said), text])
    monkeypatch.setattr(checkpoint, "find_step", find_step)
    monkeypatch.setattr(checkpoint, "read_step", lambda folder, like, step: (folder, like, step))
    program = types.SimpleNamespace(abstract_state="state")
    folder = tmp_path / "checkpoints"
    assert train._read_origin(str(tmp_path), program) == (7, (folder, "state", 7))
    assert asked == ([(folder, None)] if index == 0 else [])


def test_a_run_may_go_on_with_another_mesh_and_nothing_else_changed(source, tmp_path):
    config = make_config(source)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    train.refuse_other(tmp_path, dataclasses.replace(config, mesh=MeshConfig(tensor=2)))
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        train.refuse_other(tmp_path, dataclasses.replace(config, seed=1))


def test_a_buckets_url_is_refused_instead_of_becoming_a_local_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="must be a folder: mount the bucket"):
        train.run(make_config(source), pathlib.Path("gs://bucket/run"))
    assert list(tmp_path.iterdir()) == []

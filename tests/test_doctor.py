"""The doctor finds what is wrong, says what to do, goes on with the next check, and leaves nothing behind."""

import collections
import importlib.metadata
import os
import subprocess
import sys
import tomllib

from conftest import log_lines
from etils import epath
from helpers import REPO
import jax
import numpy as np
import pytest

from wsparse import doctor, processes, sharding
from wsparse.config import TrainConfig, from_dict
from wsparse.errors import UserError

SETTINGS = {
    "model": {"vocab_size": 300, "context": 8, "n_layer": 1, "d_model": 16, "n_head": 2,
              "d_head": 8, "d_mlp": 32},
    "batch_size": 16, "accumulate": 2,
}  # fmt: skip
CONFIG = from_dict(TrainConfig, SETTINGS)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """What wsparse needs is known, also where it is not installed."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: project["dependencies"])


def examine(checks: dict[str, doctor.Check]) -> tuple[bool, list[str]]:
    with log_lines() as lines:
        return doctor.examine(checks), lines


def examine_one(find) -> str:
    healthy, (line,) = examine({"it": find})
    assert healthy == line.startswith("OK  ")
    return line


def fails(find) -> str:
    line = examine_one(find)
    assert line.startswith("FAIL  it: "), line
    assert "\n" not in line
    return line


def test_on_a_sound_machine_every_check_is_ok_and_nothing_is_left_behind(tmp_path):
    workdir = tmp_path / "runs" / "new"
    healthy, lines = examine(doctor._checks(CONFIG, epath.Path(workdir)))
    assert healthy, lines
    assert [line.split(":")[0] for line in lines] == [
        f"OK    {name}"
        for name in ("versions", "processes", "devices", "collectives", "storage", "disk", "step")
    ]
    assert f"jax {jax.__version__}" in lines[0]
    assert "8 x cpu (cpu), 8 a process" in lines[2]
    assert "a sum over 8 devices is right" in lines[3]
    assert "a step over data 8 x fsdp 1 x tensor 1" in lines[6]
    # About the entropy of a uniform choice among 300 tokens.
    assert float(lines[6].split()[-1]) == pytest.approx(np.log(300), abs=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_breaks_does_not_keep_others_from_running():
    def breaks():
        raise ZeroDivisionError("division by zero\nand more")

    def refuses():
        raise UserError("batch_size must be even")

    def says_nothing():
        raise TimeoutError

    healthy, lines = examine({"a": breaks, "b": lambda: "fine", "c": refuses, "d": says_nothing})
    assert not healthy
    assert lines == [
        "FAIL  a: ZeroDivisionError: division by zero",
        "OK    b: fine",
        "FAIL  c: batch_size must be even",
        "FAIL  d: TimeoutError",
    ]


def test_what_another_process_found_is_said_with_its_number(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda text: [text, "OK fine", "FAIL no disk"])
    healthy, lines = examine({"disk": lambda: "fine"})
    assert not healthy
    assert lines == ["FAIL  disk: no disk (process 2 of 3)"]


def test_packages_that_are_old_or_missing_are_named(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "optuna":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "grain" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    line = fails(doctor.versions)
    assert "grain>=0.2.12, found 0.1" in line
    assert "optuna>=4.0, found nothing" in line
    assert "jax" not in line


def test_a_checkout_that_is_not_installed_is_named(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert "wsparse needs to be installed itself" in fails(doctor.versions)


def test_processes_with_other_packages_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda text: [text, text + "!"])
    with pytest.raises(UserError, match="packages must be the same in all 2 processes"):
        doctor.versions()


@pytest.mark.parametrize(
    ("kind", "platforms", "wrong"),
    [("tpu", "", True), ("cuda", "", True), ("tpu", "cpu", False), (None, "", False)],
)
def test_an_accelerator_that_jax_does_not_use_is_noticed(monkeypatch, kind, platforms, wrong):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(processes, "accelerators", lambda: [kind] if kind else [])
    if wrong:
        assert f"pip install 'wsparse[{kind}]'" in fails(doctor.devices)
    else:
        assert examine_one(doctor.devices).startswith("OK")


def test_a_wrong_sum_is_noticed(monkeypatch):
    put = sharding.put_batch
    monkeypatch.setattr(sharding, "put_batch", lambda rows, *args, **options: put(rows * 2, *args, **options))
    assert "sum to 56: do not train here" in fails(doctor.collectives)


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    line = fails(lambda: doctor.storage(epath.Path(tmp_path / "file" / "run")))
    assert f"cannot use {tmp_path / 'file' / 'run'}: NotADirectoryError" in line


def test_a_folder_that_is_not_shared_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "blind_processes", lambda path: [3])
    line = fails(lambda: doctor.storage(epath.Path(tmp_path)))
    assert "process 3 does not see what process 0 wrote" in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path):
    (tmp_path / "run").mkdir()
    assert examine_one(lambda: doctor.storage(epath.Path(tmp_path / "run"))).startswith("OK")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_a_bucket_without_its_driver_or_rights_is_a_failure(monkeypatch):
    def refuse(self, *args, **options):
        raise PermissionError("no rights")

    path = epath.Path("gs://no-such-bucket/run")
    monkeypatch.setattr(type(path), "exists", lambda self: False)
    monkeypatch.setattr(type(path), "mkdir", refuse)
    monkeypatch.setattr(type(path), "unlink", lambda self, **options: None)
    assert "cannot use gs://no-such-bucket/run: PermissionError: no rights" in fails(
        lambda: doctor.storage(path)
    )


def test_a_bucket_without_its_driver_names_the_extra(monkeypatch):
    def refuse(self):
        raise ImportError("Please install gcsfs")

    path = epath.Path("gs://no-such-bucket/run")
    monkeypatch.setattr(type(path), "exists", refuse)
    line = fails(lambda: doctor.storage(path))
    assert "cannot use gs://no-such-bucket/run: Please install gcsfs (" in line
    assert "pip install 'wsparse[gcs]'" in line


def test_checkpoints_must_fit_on_the_disk(monkeypatch, tmp_path):
    usage = collections.namedtuple("usage", "free")
    path = epath.Path(tmp_path / "new")
    state = 4 * 3 * 20_000  # parameters and two moments of some ten thousand weights
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda there: usage(int(1e9)))
    assert "4 checkpoints need 1.0 GB" in fails(lambda: doctor.disk(path, CONFIG))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda there: usage(int(1e9) + 40 * state))
    assert "checkpoints need 1.0 GB" in examine_one(lambda: doctor.disk(path, CONFIG))


def test_a_batch_or_mesh_that_does_not_fit_is_named():
    odd = from_dict(TrainConfig, SETTINGS | {"mesh": {"data": 3}})
    assert "must be the 8 devices, got 3 x 1 x 1" in fails(lambda: doctor.step(odd))
    small = from_dict(TrainConfig, SETTINGS | {"batch_size": 2})
    assert "multiple of the 8 data-parallel devices" in fails(lambda: doctor.step(small))


@pytest.mark.slow
def test_the_command_examines_two_processes_together(tmp_path):
    command = [REPO / "launch" / "local.sh", "wsparse.doctor", f"--workdir={tmp_path / 'run'}"]
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(REPO), "DEVICES": "2"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK    processes: 2 on 1 machines" in done.stdout
    assert "OK    devices: 4 x cpu (cpu), 2 a process" in done.stdout
    assert "OK    collectives: a sum over 4 devices is right" in done.stdout
    assert done.stdout.count("ready") == 1
    (tmp_path / "file").write_text("")
    command[-1] = f"--workdir={tmp_path / 'file' / 'run'}"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAIL  storage: cannot use" in done.stdout
    assert "not ready: fix the checks marked FAIL" in done.stdout

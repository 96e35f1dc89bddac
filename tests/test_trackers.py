"""Trackers get what the run's own files get, go on where they were, and never cost a run."""

import json
import sys
import types

from helpers import run_python
import jax
import pytest
import train_case

from wsparse import metrics, trackers, train
from wsparse.config import TrainConfig
from wsparse.errors import UserError

source = train_case.source


class Library(types.ModuleType):
    """A tracker's library: the three calls, `init`, `log` and `finish`, for either."""

    def __init__(self, name, fails=""):
        super().__init__(name)
        self.sessions, self.fails = [], fails

    def init(self, **settings):
        self._call("init")
        self.sessions.append({"settings": settings, "logged": [], "finished": False})
        return self

    def define_metric(self, name, *, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values, step=None):
        self._call("log")
        values = dict(values)
        self.sessions[-1]["logged"].append((values.pop("step", step), values))

    def finish(self):
        self._call("finish")
        self.sessions[-1]["finished"] = True

    def _call(self, name):
        if name == self.fails:
            raise RuntimeError(f"no {name} today\nand more")


@pytest.fixture
def library(monkeypatch):
    """Puts a library in place of one that may be installed."""

    def make(name, fails=""):
        made = Library(name, fails)
        monkeypatch.setitem(sys.modules, name, made)
        monkeypatch.setattr(trackers, "_is_installed", lambda name: True)
        return made

    return make


def record(workdir, start_step, steps, names=("wandb",)):
    started = trackers.start(names, workdir, TrainConfig())
    with metrics.MetricsWriter(workdir, start_step, started) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step, "alive": [4, 5], "gone": float("nan")})


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_tracker_gets_each_number_by_name_at_its_step(name, library, tmp_path):
    made = library(name)
    record(tmp_path, 0, [1, 2], [name])
    (session,) = made.sessions
    assert session["logged"] == [(s, {"loss": 1 / s, "alive/0": 4, "alive/1": 5}) for s in (1, 2)]
    assert session["finished"]
    assert session["settings"]["project"] == "wsparse" and session["settings"]["resume"] == "allow"
    assert session["settings"]["config"]["optimizer"]["learning_rate"] > 0


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_resumed_run_goes_on_in_the_same_run_and_another_folder_in_another(name, library, tmp_path):
    made = library(name)
    for folder, start in (("a", 0), ("a", 5), ("b", 0)):
        (tmp_path / folder).mkdir(exist_ok=True)
        record(tmp_path / folder, start, [start + 1], [name])
    first, second, other = (session["settings"]["name"] for session in made.sessions)
    assert first == second != other
    assert first.startswith("a-") and other.startswith("b-")


def test_a_run_has_a_name_of_its_own_in_each_tracker(library, tmp_path):
    made = [library("wandb"), library("trackio")]
    record(tmp_path, 0, [1], ["wandb", "trackio", "wandb"])
    (a,), (b,) = (each.sessions for each in made)
    assert a["settings"]["id"] == a["settings"]["name"] != b["settings"]["name"]
    assert set(json.loads((tmp_path / "trackers.json").read_text())) == {"wandb", "trackio"}


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(fails, library, tmp_path, logged):
    library("wandb", fails)
    works = library("trackio")
    record(tmp_path, 0, [1, 2, 3], ["wandb", "trackio"])
    assert logged == [f"wandb no longer records this run: no {fails} today"]
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3]
    assert len(works.sessions[0]["logged"]) == 3 and works.sessions[0]["finished"]


def test_a_tracker_that_cannot_start_is_one_line_and_the_others_end(library, tmp_path):
    works = library("trackio")
    library("wandb", "init")
    with pytest.raises(UserError) as error:
        trackers.start(["trackio", "wandb"], tmp_path, TrainConfig())
    assert str(error.value) == (
        "--tracker=wandb cannot be started: no init today; WANDB_MODE=offline needs no account and no network"
    )
    assert works.sessions[0]["finished"]


def test_only_process_0_starts_trackers_and_needs_them(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "_is_installed", lambda name: False)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert trackers.start(["wandb", "trackio"], tmp_path, TrainConfig()) == []
    assert not list(tmp_path.iterdir())
    # Negative control.
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(UserError):
        trackers.start(["wandb"], tmp_path, TrainConfig())


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_missing_extra_is_named_before_anything_is_made_or_compiled(
    name, source, tmp_path, monkeypatch, compilations
):
    monkeypatch.setattr(trackers, "_is_installed", lambda name: False)
    config = train_case.make_config(source)
    with (
        compilations() as compiled,
        pytest.raises(UserError, match=rf"--tracker={name} needs .*pip install 'wsparse\[{name}\]'"),
    ):
        train.run(config, tmp_path / "run", tracker=[name])
    assert not compiled and not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_with_the_nearest(source, tmp_path):
    config = train_case.make_config(source)
    with pytest.raises(UserError, match=r"--tracker=wandbe is not known \(did you mean 'wandb'"):
        train.run(config, tmp_path / "run", tracker=["wandbe"])


REAL = """
import json, pathlib, struct, sys
from wsparse import metrics, trackers
from wsparse.config import TrainConfig

name, workdir = sys.argv[1], pathlib.Path(sys.argv[2])
for start in (0, 2):
    with metrics.MetricsWriter(workdir, start, trackers.start([name], workdir, TrainConfig())) as writer:
        for step in (start + 1, start + 2):
            writer.write(step, {"loss": 1 / step, "alive": [4, 5]})
identity = json.loads((workdir / "trackers.json").read_text())[name]
if name == "trackio":
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("wsparse", identity)
else:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    # Its service writes the last of a file when it ends.
    wandb.teardown()

    def records(data):
        # A log of LevelDB: blocks of 32 KiB, each part with a checksum, its length and its kind.
        place, whole = 7, b""
        while place + 7 <= len(data):
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            size, kind = struct.unpack_from("<HB", data, place + 4)
            whole += data[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):
                yield Record.FromString(whole)
                whole = b""

    rows = []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path.read_bytes()):
            if record.HasField("run"):
                assert record.run.run_id == identity, record.run.run_id
            if record.HasField("history"):
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
print(json.dumps(rows))
"""


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_the_real_library_records_offline_and_goes_on_in_the_same_run(name, tmp_path):
    """In a process of its own: it has threads, and a service beside it."""
    pytest.importorskip(name, exc_type=ImportError)
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    workdir = tmp_path / "run"
    workdir.mkdir()
    done = run_python("-c", REAL, name, workdir, **settings)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    found = [(row["step"], row["loss"], row["alive/0"], row["alive/1"]) for row in rows if "loss" in row]
    assert found == [(step, 1 / step, 4, 5) for step in (1, 2, 3, 4)]

"""Workers that share a search do each piece once, take over from the dead, and find what one would."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

from helpers import REPO
import numpy as np
import pytest

from wsparse.circuits import search as search_lib
from wsparse.circuits import workers
from wsparse.circuits.search import FAST, TrialStore, search
from wsparse.circuits.workers import WorkItems, WorkPending, open_storage
from wsparse.errors import UserError
from wsparse.files import read_json


@pytest.fixture(params=["journal", "sqlite"])
def where(request, tmp_path):
    return str(tmp_path / "j") if request.param == "journal" else f"sqlite:///{tmp_path / 'd'}"


@pytest.fixture
def clock(monkeypatch):
    """Seconds to add to the time that claims see."""
    ahead = [0.0]
    real = time.time
    monkeypatch.setattr(workers.time, "time", lambda: real() + ahead[0])
    return ahead


# ---- Claims ----


def test_workers_that_come_at_once_do_every_piece_exactly_once(where):
    done, lock, start = [], threading.Lock(), threading.Barrier(4)
    storages = [open_storage(where) for _ in range(4)]
    WorkItems(20, storage=storages[0], name="work")

    def work(index):
        pieces = WorkItems(20, storage=storages[index], name="work")
        start.wait()
        while pieces.any_free():
            with pieces.lease(3) as leased:
                for trial in leased:
                    with lock:
                        done.append((index, trial.number))
                    pieces.finish(trial, float(trial.number))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finished = [trial.number for trial in WorkItems(20, storage=storages[0], name="work").finished()]
    assert len(finished) == 20
    assert sorted(number for _, number in done) == finished
    assert len({index for index, _ in done}) > 1


def test_a_piece_is_free_again_once_its_holder_fails_or_is_silent_for_a_lease(where, clock):
    first, second = (WorkItems(2, storage=open_storage(where), name="work", lease=60) for _ in range(2))

    def fail_at_the_second():
        with first.lease(2) as leased:
            assert len(leased) == 2
            assert not second.any_free()
            first.finish(leased[0], 1.0)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail_at_the_second()
    assert second.any_free()
    with first.lease(2) as leased:
        (lost,) = leased
        clock[0] = 59.0
        assert not second.any_free()
        clock[0] = 61.0
        assert second.any_free()
        with second.lease(2) as taken:
            assert len(taken) == 1
            second.finish(taken[0], 2.0)
        # What the silent one finds after all does not count a second time.
        first.finish(lost, 3.0)
    assert [trial.value for trial in first.finished()] == [1.0, 2.0]
    assert not first.any_free()


def test_a_holder_at_work_keeps_its_claim_for_longer_than_a_lease(where, clock):
    first, second = (WorkItems(1, storage=open_storage(where), name="work", lease=8.0) for _ in range(2))
    with first.lease() as (trial,):
        clock[0] = 100.0
        # A quarter of a lease later it says that it is alive.
        limit = time.monotonic() + 60
        while workers.time.time() - second._trials()[0].user_attrs["seen"] > 8.0:
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert not second.any_free()
        first.finish(trial, 1.0)
    assert len(second.finished()) == 1


def test_pieces_without_a_value_are_done_as_the_worst():
    pieces = WorkItems(1)
    with pieces.lease() as (trial,):
        pieces.finish(trial, float("nan"))
    assert not pieces.any_free()
    assert pieces.finished()[0].value == float("inf")


@pytest.mark.parametrize("where", ["nodriver://host/name", "/dev/null/folder/journal"])
def test_a_storage_that_cannot_be_opened_is_refused_in_one_line(where, capsys):
    with pytest.raises(UserError) as error:
        open_storage(where)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"--storage={where} cannot be opened")
    # Drivers print nothing of their own beside it.
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [(ImportError("no module"), "needs the package 'psycopg2': pip install 'wsparse[postgres]'"),
     (ValueError(""), "cannot be opened: ValueError; give")],
)  # fmt: skip
def test_a_database_that_cannot_be_opened_is_named_without_its_password(monkeypatch, error, words):
    def refuse(url):
        raise error

    monkeypatch.setattr(workers, "RDBStorage", refuse)
    with pytest.raises(UserError) as told:
        open_storage("postgresql://me:se:c/r@et@host/sweeps")
    assert str(told.value).startswith(f"--storage=postgresql://me:***@host/sweeps {words}")


# ---- Searches ----


class Pruner:
    """Learns its hyperparameters."""

    parallel = 2

    def __init__(self, before=lambda: None):
        self.trials, self.before = 0, before

    def __call__(self, params, pairs, means, hparams, seeds):
        self.before()
        self.trials += len(hparams)
        return np.asarray([[tried.k_coef, tried.noise] for tried in hparams], np.float32)


def objective(tau_U):
    return float(np.log(tau_U[0]) ** 2), float(tau_U[1])


def share(where, folder) -> TrialStore:
    return TrialStore(folder, open_storage(where), "search", lease=60.0)


def run(pruner, joined, trials=9):
    return search(pruner, None, None, None, objective, trials=trials, store=joined)


def test_two_workers_see_the_same_trials_and_run_each_once(where, tmp_path):
    first, second = Pruner(), Pruner()
    found = []

    def other():
        with pytest.raises(WorkPending):
            # The first one is in the middle of its third call: what is left of its trials is missing.
            run(second, second_store)
        found.append(second.trials)

    calls = []

    def interrupted():
        calls.append(None)
        if len(calls) == 3:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    second_store = share(where, tmp_path)
    first.before = interrupted
    in_first = run(first, share(where, tmp_path))
    assert found == [3]
    assert (first.trials, second.trials) == (6, 3)
    in_second = run(second, second_store)
    assert (first.trials, second.trials) == (6, 3)
    assert len(in_first) == 9
    assert in_first[0].hparams == FAST
    for a, b in zip(in_first, in_second, strict=True):
        assert (a.number, a.hparams, a.value, a.result()) == (
            b.number, b.hparams, b.value, b.result(),
        )  # fmt: skip
        np.testing.assert_array_equal(a.tau, b.tau)
        np.testing.assert_array_equal(a.tau, np.float32([a.hparams.k_coef, a.hparams.noise]))
    # Nobody tried what another did.
    assert len({trial.hparams for trial in in_first}) == 9


def test_what_a_failed_worker_had_claimed_is_done_by_the_next(where, tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Pruner(fail), share(where, tmp_path))
    pruner = Pruner()
    assert len(run(pruner, share(where, tmp_path))) == 9
    assert pruner.trials == 9


def test_a_trial_whose_file_is_gone_is_named(where, tmp_path):
    run(Pruner(), share(where, tmp_path), trials=2)
    gone = sorted(tmp_path.glob("*.npy"))[0]
    gone.unlink()
    with pytest.raises(UserError, match=f"{gone} cannot be read, though the storage says"):
        run(Pruner(), share(where, tmp_path), trials=2)


def test_a_search_alone_is_the_same_every_time(tmp_path):
    first, second = run(Pruner(), None), run(Pruner(), None)
    assert [t.hparams for t in first] == [t.hparams for t in second]
    # Control: where the search is shared, each process draws its own.
    a = run(Pruner(), share(str(tmp_path / "a"), tmp_path / "x"))
    b = run(Pruner(), share(str(tmp_path / "b"), tmp_path / "y"))
    assert {t.hparams for t in a} & {t.hparams for t in b} == {FAST, search_lib.HParams()}


def test_an_interrupted_search_goes_on_with_the_trials_it_finished(tmp_path):
    def go(pruner):
        return search(pruner, None, None, None, objective, trials=9, store=TrialStore(tmp_path))

    calls = []

    def interrupted():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(Pruner(interrupted))
    # A file cut short counts as missing, and the call it belongs to is run again.
    (tmp_path / "3.npy").write_bytes(b"")
    pruner = Pruner()
    resumed = go(pruner)
    assert pruner.trials == 9 - 2
    alone = run(Pruner(), None)
    for a, b in zip(resumed, alone, strict=True):
        assert (a.number, a.hparams, a.value) == (b.number, b.hparams, b.value)
        np.testing.assert_array_equal(a.tau, b.tau)


# ---- Processes ----

QUICK = (
    "--task=indent_for,lambda_func", "--target=0.69", "--trials=4", "--parallel=1", "--steps=3",
    "--pairs_per_step=4", "--search_pairs=8", "--discretize_pairs=8", "--report_pairs=8",
    "--single_removals=8", "--sweep=0.6", "--nocontrols", "--lease=20",
)  # fmt: skip
SMALL = (
    "--config.model.vocab_size=512", "--config.model.d_model=64", "--config.model.n_head=4",
    "--config.model.context=32", "--config.data.source=idioms", "--config.data.megabytes=0.5",
    "--config.sparsity.density=0.125", "--config.steps=60", "--config.batch_size=16",
)  # fmt: skip


@pytest.mark.slow
def test_a_sweep_survives_the_death_of_one_of_two_processes(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(REPO),
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    logs: list[pathlib.Path] = []

    def start(module, *arguments):
        logs.append(tmp_path / f"log{len(logs)}")
        with logs[-1].open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"wsparse.{module}", *arguments],
                cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    assert start("train", f"--config={REPO}/configs/tiny.py", *SMALL).wait(600) == 0
    command = ("prune", "--run=runs/tiny", *QUICK, "--storage=sweep.journal")
    workers = [start(*command) for _ in range(2)]
    try:
        limit = time.monotonic() + 300
        while "trial 1/4" not in logs[1].read_text() + logs[2].read_text():
            assert time.monotonic() < limit and all(worker.poll() is None for worker in workers)
            time.sleep(0.1)
        dies = next(i for i in (0, 1) if "trial 1/4" in logs[1 + i].read_text())
        workers[dies].send_signal(signal.SIGKILL)
        assert workers[1 - dies].wait(600) == 0, logs[2 - dies].read_text()
    finally:
        for worker in workers:
            worker.kill()
    folder = tmp_path / "runs/tiny/circuits"
    statuses = {path.parent.name: read_json(path) for path in folder.glob("*/status.json")}
    assert set(statuses) == {"indent_for", "lambda_func"}
    assert "found" in {status["status"] for status in statuses.values()}
    # The one that lived did not do again what the other had finished.
    said = logs[1].read_text() + logs[2].read_text()
    for task, status in statuses.items():
        if status["status"] != "the model cannot do it":
            assert len(list((folder / task / "trials").glob("*/*.npy"))) == 4
    assert said.count("trial 1/4") <= len(statuses)
    (folder / "table.txt").unlink()
    assert start("prune", "--run=runs/tiny", "--report").wait(120) == 0
    assert "indent_for" in (folder / "table.txt").read_text()

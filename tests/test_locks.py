"""A folder is written to by one command at a time, and a dead command's lock is no obstacle."""

import errno
import json
import os
import signal
import socket
import threading
import time

from helpers import start_python
import pytest

from wsparse import locks
from wsparse.errors import UserError

HOLDER = """
import pathlib, sys, time
from wsparse import locks
with locks.hold(pathlib.Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = start_python("-c", HOLDER, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def foreign_lock(folder, beat=0):
    holder = {"host": "elsewhere", "pid": 7, "work": "pruning", "beat": beat}
    (folder / ".lock").write_text(json.dumps(holder))


def test_a_lock_is_gone_after_the_block(tmp_path):
    for _ in range(2):
        with locks.hold(tmp_path, "training"):
            holder = json.loads((tmp_path / ".lock").read_text())
            assert holder["host"] == socket.gethostname()
            assert holder["pid"] == os.getpid()
        assert list(tmp_path.iterdir()) == []


def test_every_sign_of_life_is_synchronized(tmp_path, monkeypatch):
    """Or a bucket that is mounted keeps it from other machines."""
    synchronized, sync = [], os.fsync
    beat = lambda: json.loads((tmp_path / ".lock").read_text())["beat"]
    monkeypatch.setattr(os, "fsync", lambda file: (synchronized.append(beat()), sync(file)))
    monkeypatch.setattr(locks, "_BEAT", 0.01)
    with locks.hold(tmp_path, "training"):
        limit = time.monotonic() + 30
        while len(synchronized) < 3:
            assert time.monotonic() < limit
            time.sleep(0.01)
    assert synchronized[:3] == [f"{count:012}" for count in range(3)]


def test_a_second_holder_is_refused_in_one_line_that_names_the_first(tmp_path, other):
    with pytest.raises(locks.Held) as error, locks.hold(tmp_path, "training"):
        raise AssertionError
    message = str(error.value)
    assert "\n" not in message
    for word in (str(tmp_path), f"process {other.pid}", socket.gethostname(), "training"):
        assert word in message
    # Control: another folder is free, and so is this one under another name.
    (tmp_path / "x").mkdir()
    with locks.hold(tmp_path / "x", "training"), locks.hold(tmp_path, "x", name=".other"):
        pass


def test_a_lock_is_seen_to_be_held_while_its_holder_lives(tmp_path, other):
    assert locks.is_held(tmp_path)
    assert not locks.is_held(tmp_path, name=".other")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / ".lock").exists() and not locks.is_held(tmp_path)


def test_the_lock_of_a_killed_process_is_free(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / ".lock").exists()
    with locks.hold(tmp_path, "training"):
        pass


def test_a_silent_holder_on_another_machine_counts_as_dead(tmp_path, monkeypatch, logged):
    monkeypatch.setattr(locks, "_PATIENCE", 0.3)
    foreign_lock(tmp_path)
    with locks.hold(tmp_path, "training"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert "process 7 on elsewhere" in logged[0]


def test_a_living_holder_on_another_machine_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE", 5.0)

    def live():
        time.sleep(0.3)
        foreign_lock(tmp_path, beat=1)

    foreign_lock(tmp_path)
    thread = threading.Thread(target=live)
    thread.start()
    match = "process 7 on elsewhere is pruning"
    with pytest.raises(UserError, match=match), locks.hold(tmp_path, "training"):
        raise AssertionError
    thread.join()
    # A refused command leaves the holder's file alone.
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == 7


def test_a_holder_shows_that_it_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_BEAT", 0.02)
    with locks.hold(tmp_path, "training"):
        first = json.loads((tmp_path / ".lock").read_text())["beat"]
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / ".lock").read_text() or "{}").get("beat") in (first, None):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("content", ["", "null", '{"host": '])
def test_a_damaged_lock_file_that_nobody_holds_is_taken(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with locks.hold(tmp_path, "training"):
        pass
    assert not (tmp_path / ".lock").exists()


def test_an_error_inside_the_block_is_left_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), locks.hold(tmp_path, "training"):
        (tmp_path / "missing").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot write") as error, locks.hold(tmp_path / "missing", "x"):
        raise AssertionError
    assert not isinstance(error.value, locks.Held)


def test_a_lock_that_a_full_disk_keeps_from_being_written_is_not_one_that_is_held(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks, "_write", full)
    with pytest.raises(UserError, match="No space left") as error, locks.hold(tmp_path, "training"):
        raise AssertionError
    assert not isinstance(error.value, locks.Held)
    assert not locks.is_held(tmp_path)

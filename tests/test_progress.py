"""Progress reads well in a terminal and in a log, and says how long it will take."""

import io
import sys
import types

import pytest

from wsparse import progress
from wsparse.progress import duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def show_steps():
    with progress.progress(20, "step", start=5, seconds_per_line=None) as bar:
        for _ in range(5):
            bar.advance()
        bar.record({"loss": "3.25", "density": "0.5"})


def test_without_a_terminal_each_record_is_one_plain_line(logged, capsys):
    show_steps()
    assert logged == ["step 10/20  loss 3.25  density 0.5"]
    assert capsys.readouterr() == ("", "")


def test_in_a_terminal_there_is_a_bar_with_what_is_done_and_left(logged, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    show_steps()
    shown = terminal.getvalue()
    assert "10/20" in shown
    assert "50%" in shown
    assert "loss=3.25" in shown
    assert "\r" in shown
    assert logged == []


@pytest.mark.parametrize(("shell", "bar"), [(None, False), (types.SimpleNamespace(kernel=1), True)])
def test_a_notebook_shows_a_bar_and_a_library_of_notebooks_does_not(monkeypatch, capsys, logged, shell, bar):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    show_steps()
    assert ("10/20" in capsys.readouterr().err) == bar
    assert bool(logged) != bar


def test_where_log_lines_are_hidden_there_is_no_bar_either(logged, monkeypatch):
    import logging

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    logging.getLogger("wsparse").setLevel(logging.WARNING)
    show_steps()
    assert terminal.getvalue() == ""
    assert logged == []


def test_plain_lines_are_sparse_and_estimate_the_time_left(logged, clock):
    items = []
    for item in progress.progress(list(range(10)), "cleaning up", seconds_per_line=30.0):
        items.append(item)
        clock.now += 20
    assert items == list(range(10))
    assert logged == [
        "cleaning up: 2 of 10, 2m40s left",
        "cleaning up: 4 of 10, 2m00s left",
        "cleaning up: 6 of 10, 1m20s left",
        "cleaning up: 8 of 10, 0m40s left",
        "cleaning up: 10 of 10, 0m00s left",
    ]


def test_a_quick_stage_says_nothing(logged):
    assert sum(progress.progress(range(100), "adding")) == 4950
    assert logged == []


def test_work_of_unknown_length_is_counted(logged, clock):
    def numbers():
        for number in range(3):
            clock.now += 40
            yield number

    assert list(progress.progress(numbers(), "reading")) == [0, 1, 2]
    assert logged == ["reading: 1", "reading: 2", "reading: 3"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0m00s"), (80, "1m20s"), (3599.6, "1h00m"), (11100, "3h05m")]
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text

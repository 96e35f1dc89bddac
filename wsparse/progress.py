"""Progress of stages that take more than some seconds, with an estimate of the time left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
import logging
import sys
import time
from typing import Generic, TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)
T = TypeVar("T")


class progress(Generic[T]):
    """Shows how far some work is: a bar in a terminal, elsewhere a log line now and then.

    Nothing is shown where the package's log lines are hidden, as in all processes of a job but the first.

        for candidate in progress(candidates, "cleaning up"):
            ...
        with progress(steps, "training") as bar:
            bar.advance()

    Args:
      work: Items to iterate over, or the number of calls of `advance` to expect.
      label: Name of the stage.
      start: Items that were done before.
      seconds_per_line: Least time between two plain lines; None leaves them to `record`.
    """

    def __init__(
        self, work: Iterable[T] | int, label: str, *, start: int = 0, seconds_per_line: float | None = 30.0
    ):
        self._items = () if isinstance(work, int) else work
        self._total = work if isinstance(work, int) else _length(work)
        self._label, self._start, self._done = label, start, start
        self._seconds_per_line = seconds_per_line
        self._began: float | None = None
        self._last_line = time.monotonic()
        self._bar = None
        if _shows_bars() and logging.getLogger("wsparse").level <= logging.INFO:
            self._bar = tqdm(total=self._total, initial=start, desc=label, leave=False)

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                yield item
                self.advance()

    def __enter__(self) -> progress[T]:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def advance(self, count: int = 1) -> None:
        """Count finished items."""
        self._done += count
        if self._began is None:
            # The first item may have had to be compiled.
            self._began, self._start = time.monotonic(), self._done
        if self._bar is not None:
            self._bar.update(count)
            return
        now, pause = time.monotonic(), self._seconds_per_line
        if pause is not None and now - self._last_line >= pause:
            self._last_line = now
            of_total = "" if self._total is None else f" of {self._total}, {self.time_left()} left"
            log.info("%s: %d%s", self._label, self._done, of_total)

    def record(self, values: Mapping[str, str]) -> None:
        """Show short values: beside the bar, or as a line of their own."""
        if self._bar is not None:
            self._bar.set_postfix(values)
            return
        text = "  ".join(f"{name} {value}" for name, value in values.items())
        log.info("%s %d/%s  %s", self._label, self._done, self._total, text)

    def time_left(self) -> str:
        """Returns an estimate from the pace so far, such as "1m20s"."""
        if self._total is None or self._began is None or self._done == self._start:
            return "?"
        pace = (time.monotonic() - self._began) / (self._done - self._start)
        return duration(pace * (self._total - self._done))

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Returns a duration in the two units that fit it, such as "1m20s" or "3h05m"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def _shows_bars() -> bool:
    """Returns whether standard error is a terminal or the output of a notebook's cell."""
    # Libraries import ipykernel in processes that are no notebook's; only a notebook's shell has a kernel.
    ipython = sys.modules.get("IPython")
    return sys.stderr.isatty() or (ipython is not None and hasattr(ipython.get_ipython(), "kernel"))


def _length(work: Iterable[T]) -> int | None:
    return len(work) if hasattr(work, "__len__") else None  # pyrefly: ignore

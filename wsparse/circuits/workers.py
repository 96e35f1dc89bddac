"""Work items shared by independent processes through an Optuna storage: leased, done once, retried when lost.

Any number of workers, on any machines that see the storage and the run's folder, do the items of a task
together. Nothing but the storage connects them, so they may come, go and die at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import math
import pathlib
import re
import threading
import time
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from wsparse import files
from wsparse.errors import UserError, missing_extra, reason

_SEEN = "seen"


class WorkPending(Exception):
    """Every unfinished work item is leased to another process for now; come back later."""


def open_storage(where: str) -> BaseStorage:
    """Open the storage at a database's URL, or in a journal file, which is made when missing.

    Raises:
      UserError: It cannot be opened.
    """
    try:
        if "://" in where:
            return RDBStorage(where)
        files.make_folder(pathlib.Path(where).parent)
        return JournalStorage(JournalFileBackend(where))
    # The drivers of databases raise errors of their own kinds.
    except Exception as error:
        # Errors are logged, and stay there.
        shown = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", where)
        if isinstance(error, ImportError) and where.startswith("postgresql://"):
            raise missing_extra("psycopg2", "postgres", f"--storage={shown}") from error
        raise UserError(
            f"--storage={shown} cannot be opened: {reason(error)}; give the path of a file "
            "that all workers see, or a URL such as postgresql://user@host/name whose driver is installed"
        ) from error


class WorkItems:
    """A number of work items under one name, each to be done once by a process that leases it.

    A leased item is a running Optuna trial. Its holder writes the time into it every quarter of a lease; once
    that is a lease ago the holder counts as dead, and the item is free again. Clocks must agree to a fraction
    of a lease.
    """

    def __init__(
        self,
        count: int,
        *,
        sampler: optuna.samplers.BaseSampler | None = None,
        storage: BaseStorage | None = None,
        name: str | None = None,
        lease: float = 600.0,
        first: Sequence[Mapping[str, Any]] = (),
    ):
        """Join the work of this name, or begin it.

        Args:
          storage: Storage shared with other processes; None is this process's memory.
          name: Name of the work in the storage.
          lease: Seconds of a lease.
          first: Parameters of the first items.
        """
        self._count, self._lease = count, lease
        options: dict[str, Any] = {"study_name": name, "storage": storage, "sampler": sampler}
        try:
            self._study = optuna.create_study(direction="minimize", **options)
            for parameters in first:
                self._study.enqueue_trial(dict(parameters))
        except optuna.exceptions.DuplicatedStudyError:
            self._study = optuna.load_study(**options)
        self._held: dict[int, optuna.Trial] = {}
        self._lock = threading.Lock()

    def finished(self) -> list[FrozenTrial]:
        """Returns the finished items, in order."""
        return [trial for trial in self._trials() if trial.state == TrialState.COMPLETE]

    def any_free(self) -> bool:
        """Returns whether unfinished items remain that nobody holds; those of silent holders are freed."""
        for trial in self._trials():
            if trial.state != TrialState.RUNNING or trial.number in self._held:
                continue
            began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
            if time.time() - trial.user_attrs.get(_SEEN, began) > self._lease:
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        return self._n_alive() < self._count

    @contextlib.contextmanager
    def lease(self, limit: int = 1) -> Iterator[list[optuna.Trial]]:
        """Lease up to `limit` free items while the block runs; those it does not `finish` are free again."""
        n_free = self._count - self._n_alive() if self.any_free() else 0
        asked = [self._study.ask() for _ in range(min(limit, n_free))]
        for trial in asked:
            trial.set_user_attr(_SEEN, time.time())
            self._held[trial.number] = trial
        # Where several processes ask at once there may be too many: the youngest are given back.
        leased = [trial for trial in asked if self._n_alive(before=trial.number) < self._count]
        for trial in asked:
            if trial not in leased:
                self._tell(trial, state=TrialState.FAIL)
        ended = threading.Event()
        thread = threading.Thread(target=self._renew, args=(ended,), daemon=True)
        thread.start()
        try:
            yield leased
        finally:
            for trial in list(self._held.values()):
                self._tell(trial, state=TrialState.FAIL)
            ended.set()
            thread.join()

    def finish(self, trial: optuna.Trial, value: float) -> None:
        """Mark a leased item as done; ignored where the lease was lost meanwhile. NaN counts as the worst."""
        # Optuna takes NaN for a failure, and the item would be tried for ever.
        self._tell(trial, math.inf if math.isnan(value) else value)

    def _tell(self, trial: optuna.Trial, value: float | None = None, **options: Any) -> None:
        with self._lock:
            self._held.pop(trial.number, None)
            self._study.tell(trial, value, skip_if_finished=True, **options)

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _n_alive(self, *, before: float = math.inf) -> int:
        alive = (TrialState.RUNNING, TrialState.COMPLETE)
        return sum(trial.number < before and trial.state in alive for trial in self._trials())

    def _renew(self, ended: threading.Event) -> None:
        """Write the time into the held items until the lease has ended."""
        while not ended.wait(self._lease / 4):
            with self._lock:
                for trial in list(self._held.values()):
                    try:
                        trial.set_user_attr(_SEEN, time.time())
                    except optuna.exceptions.UpdateFinishedTrialError:
                        # Others took this process for dead; its result is not used.
                        del self._held[trial.number]

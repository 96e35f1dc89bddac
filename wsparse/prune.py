"""Find circuits in a trained run: `python -m wsparse.prune --run=runs/tiny --task=fstring_brace`.

For every task: a search over pruning runs, the smallest circuit of its best ones, and the evidence. Each
task's result is a folder under `RUN/circuits/`; tasks that are done are not done again, and the trials of an
interrupted task are kept. `table.txt`, `results.json` and `curves.png` beside them are rewritten each time.
`--name=NAME` finds further circuits of tasks, with other settings: they are under `RUN/circuits/TASK@NAME`.

Recipes of settings are in `configs/prune/`: `--config=quick`, or `--quick`, with `--trials=16` to override a
setting. Any number of workers on any machines share a sweep through `--storage=FILE_OR_URL`: see
docs/multihost.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import pathlib
import time
from typing import Any

from absl import flags
from optuna.storages import BaseStorage

from wsparse import files, locks, recipes, runs, trees
from wsparse.circuits import evidence, procedure, report, tasks
from wsparse.circuits.circuit import (
    FOUND,
    NOT_FOUND,
    Circuit,
    Score,
    Status,
    check_name,
    folder_of,
    joined,
    split,
)
from wsparse.circuits.pairs import PairArrays, TooFewPairs
from wsparse.circuits.procedure import Settings
from wsparse.circuits.search import Pruner, TrialStore
from wsparse.circuits.subject import N_WINDOWS
from wsparse.circuits.workers import WorkPending, open_storage
from wsparse.command import define_fields, given_fields, run_command
from wsparse.config import differences, from_dict, to_dict
from wsparse.errors import UserError, quoted
from wsparse.ops import cpu

log = logging.getLogger(__name__)

# Seconds between looks at what other workers have left.
_POLL = 10.0
# What says how many pairs a task must make of a split.
_FLAGS: dict[tasks.Split, str] = {
    "search": "--search_pairs",
    "discretize": "--discretize_pairs and --confirm_pairs together",
    "report": "--report_pairs",
}
_NO_TASK = "--task is empty: give names, .jsonl or .py files, or all"


def run(
    folder: pathlib.Path,
    chosen: Sequence[tasks.Task],
    settings: Settings,
    *,
    storage: BaseStorage | None = None,
    lease: float = 600.0,
    shown: evidence.Options | None = None,
    name: str = "",
) -> list[dict[str, Any]]:
    """Find the circuits of tasks that are not done, and return the rows of the table of all.

    Args:
      storage: Storage that shares the work with all processes that are given the same one; without one the
        folder is locked.
      lease: Seconds of silence after which other processes count this one as dead.
      shown: What to measure of each circuit for the viewer; None measures nothing.
      name: Name of the circuits, where a task has several.

    Raises:
      UserError: The name cannot be one, the folder is not a run, another process prunes it, or no task can
        be built for it.
    """
    check_name(name)
    trained = runs.load(folder)
    out = folder_of(folder)
    files.make_folder(out)
    with locks.hold(out, "pruning") if storage is None else contextlib.nullcontext():
        jobs = _jobs(trained, chosen, settings, storage, lease, shown, name)
        pending = []
        for number, job in enumerate(jobs, start=1):
            log.info("[%d/%d] %s", number, len(jobs), job.folder.name)
            if not job.run():
                pending.append(job)
        if pending:
            log.info("with other workers: %d tasks; waiting for them, in case one dies", len(pending))
        while pending:
            time.sleep(min(_POLL, lease / 4))
            pending = [job for job in pending if not job.run()]
        return write_report(folder)


def _jobs(
    trained: runs.Run,
    chosen: Sequence[tasks.Task],
    settings: Settings,
    storage: BaseStorage | None,
    lease: float,
    shown: evidence.Options | None,
    name: str,
) -> list[_Job]:
    """Returns the work of every task that can be built."""
    config = trained.config.model
    subject = procedure.Subject(trained.params, config, trained.windows("train", n=N_WINDOWS))
    pairs, refused = procedure.build_pairs(chosen, trained.tokenizer, settings, context=config.context)
    for task, error in refused.items():
        hint = ""
        if isinstance(error, TooFewPairs) and error.made:
            hint = f"; {_FLAGS[error.split]} can be {error.made} at most"
        log.info("%s: refused: %s%s", task, error, hint)
    if not pairs:
        raise UserError("no task is left: see the reasons above")
    pruner = Pruner(config, settings, parallel=min(settings.parallel, settings.trials))
    summaries = {task.name: task.summary for task in chosen}
    # Read when it is first needed: a sweep may find nothing.
    text = functools.cache(functools.partial(evidence.read_text, trained))
    store_model = functools.cache(functools.partial(evidence.store_model, trained))

    def measure(circuit: Circuit, report_pairs: PairArrays, task_folder: pathlib.Path) -> None:
        if shown is None or not circuit.nodes:
            return
        try:
            store_model()
            measured = evidence.measure(
                trained, circuit, report_pairs, text(shown.source), summary=summaries[circuit.task],
                options=shown,
            )  # fmt: skip
        except UserError as error:
            # The circuit is found and saved, and its evidence can be measured at any time.
            log.info("  no evidence: %s", error)
        else:
            measured.save(task_folder)

    def job(of_task: procedure.Pairs) -> _Job:
        full_name = joined(of_task.task, name)
        task_folder = folder_of(trained.folder, full_name)
        splits = trees.digest({"search": of_task.search, "discretize": of_task.discretize})
        key = json.dumps([subject.digest, to_dict(settings), splits]).encode()
        study = f"{full_name}-{hashlib.sha256(key).hexdigest()[:16]}"
        store = TrialStore(task_folder / "trials" / study, storage, study, lease)
        held = subject.held(of_task, settings.held_to)
        task_search = procedure.CircuitSearch(subject, held, pruner, settings)
        return _Job(task_search, task_folder, store, measure)

    return list(map(job, pairs))


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """One task of a sweep, by this process alone or shared."""

    search: procedure.CircuitSearch
    folder: pathlib.Path
    store: TrialStore
    measure: Callable[[Circuit, PairArrays, pathlib.Path], None]

    def run(self) -> bool:
        """Do what is left of the task, and return whether it is done: other workers may have leased it."""
        if self._is_done():
            log.info("  done before")
            return True
        self._tell_what_is_there()
        if self._is_hopeless:
            hint = self.search.hint()
            log.info("  %s", hint)
            self._finish(None, "the model cannot do it", hint)
            return True
        started = time.monotonic()
        try:
            trials = self.search.trials(self.store)
        except WorkPending:
            return False
        # Only one worker cleans up and measures; the lease is free again afterwards.
        with self.store.items(1, "-circuit").lease() as leased:
            # Another worker may have finished it while we waited.
            if leased and not self._is_done():
                circuit = self.search.circuit(trials, started=started)
                self._finish(circuit, circuit.status if circuit else NOT_FOUND)
        self.store.close()
        return bool(leased)

    @functools.cached_property
    def _model_score(self) -> Score:
        return self.search.subject.score(self.search.pairs.report)

    @functools.cached_property
    def _is_hopeless(self) -> bool:
        log.info("  the model: loss %.4f, accuracy %.3f", self._model_score.loss, self._model_score.accuracy)
        return self.search.is_hopeless()

    def _status(self) -> Status | None:
        """Returns the status in the task's folder, if it is of this model, these settings and these pairs."""
        try:
            status = Status.load(self.folder)
            # Older results do not name these.
            added = {"objective": "mean", "held_to": "labels", "confirm_pairs": 0}
            added |= {"max_tokens": self.search.settings.max_tokens}
            values = added | {"robust_target": self.search.settings.robust_target} | status.settings
            made_with = status.digest, from_dict(Settings, values)
        except UserError:
            return None
        same = made_with == (self.search.subject.digest, self.search.settings)
        return status if same and status.pairs in ("", self.search.pairs.digest) else None

    def _is_done(self) -> bool:
        status = self._status()
        try:
            if status and status.has_circuit:
                Circuit.load(self.folder)
        except UserError as error:
            log.info("  %s", error)
            return False
        return status is not None

    def _tell_what_is_there(self) -> None:
        """Log what will become of a circuit of another model, other settings or other pairs."""
        if self._status() is not None or not (self.folder / "circuit.json").exists():
            return
        try:
            there = Status.load(self.folder)
        except UserError:
            what = "is damaged"
        else:
            changes = differences(there.settings, to_dict(self.search.settings))
            if there.digest != self.search.subject.digest:
                what = "is of another model"
            else:
                what = f"has other settings ({', '.join(changes)})" if changes else "is of other pairs"
        log.info(
            "  the circuit that is there %s: it is moved to circuits/earlier once this search has ended; "
            "--name=NAME keeps both",
            what,
        )

    def _finish(self, circuit: Circuit | None, outcome: str, hint: str = "") -> None:
        """Write the result of the task."""
        if self._status() is None:
            _set_aside(self.folder)
        if circuit is not None:
            circuit.save(self.folder)
            files.write_text(self.folder / "circuit.txt", report.text(circuit))
            log.info("  %s", report.summary(circuit))
        Status(
            task=self.search.pairs.task,
            status=outcome,
            model=self._model_score,
            hint=hint,
            digest=self.search.subject.digest,
            settings=to_dict(self.search.settings),
            pairs=self.search.pairs.digest,
        ).save(self.folder)
        if circuit is not None:
            self.measure(circuit, self.search.pairs.report, self.folder)


def _set_aside(folder: pathlib.Path) -> None:
    """Move the circuit of another model, other settings or other pairs out of a task's folder."""
    if not (folder / "circuit.json").exists():
        return
    earlier = folder.parent / "earlier"
    # Folders may have been moved away: a count of them is not a free number.
    target = next(path for n in itertools.count(1) if not (path := earlier / f"{folder.name}.{n}").exists())
    files.make_folder(target)
    for path in folder.iterdir():
        if path.is_file():
            # Another worker may be doing the same.
            with contextlib.suppress(FileNotFoundError):
                path.replace(target / path.name)
    log.info("  the earlier circuit is in %s now", target)


def write_report(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Write the table and curves of the tasks that are done, and return the table's rows."""
    out = folder_of(folder)
    rows = report.collect(out)
    if not rows:
        raise UserError(f"{out} holds no finished task: run without --report first")
    report.write(out, rows, title=folder.name)
    log.info("%s", (out / "table.txt").read_text(encoding="utf-8"))
    return rows


def main(argv: Sequence[str]) -> int:
    """Run the command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    if not options.task:
        raise UserError(_NO_TASK)
    check_name(options.name)
    settings, shown = settings_from_flags(), evidence.Options(**given_fields(evidence.Options))
    folder = pathlib.Path(options.run)
    rows: list[dict[str, Any]] = []
    if options.report:
        rows = write_report(folder)
    elif options.evidence:
        cpu.enable()
        evidence.measure_run(folder, [joined(name, options.name) for name in options.task], shown)
    else:
        chosen = chosen_tasks(folder, options.task)
        storage = None if options.storage is None else open_storage(options.storage)
        cpu.enable()
        shown = shown if options.evidence is None else None
        sharing: dict[str, Any] = {"storage": storage, "lease": options.lease}
        rows = run(folder, chosen, settings, shown=shown, name=options.name, **sharing)
    return int(options.strict and not options.evidence and not _all_confirmed(rows, _wanted(folder, options)))


def _wanted(folder: pathlib.Path, options: Any) -> list[str]:
    """Returns the names of the circuits that flags ask for."""
    return [report.name_in_run(joined(name, options.name)) for name in _named(folder, options.task)]


def _named(folder: pathlib.Path, names: Sequence[str]) -> Sequence[str]:
    """Returns the names of `--task`; "all" is every task for the kind of text of the run in a folder."""
    return tasks.names_of(runs.read_config(folder).data.domain) if list(names) == ["all"] else names


def chosen_tasks(folder: pathlib.Path, names: Sequence[str]) -> list[tasks.Task]:
    """Returns the tasks of names and files, or "all" of a run.

    Raises:
      UserError: There is no name, a task or the run does not exist, a circuit is named, or a task has the
        name of one or of another task.
    """
    if not names:
        raise UserError(_NO_TASK)
    for full_name in names:
        task, name = split(full_name)
        if name:
            raise UserError(
                f"--task={full_name} names a circuit, and circuits are found for tasks: "
                f"--task={task} --name={name}"
            )
    chosen = tasks.find_all(_named(folder, names))
    for task in chosen:
        if split(task.name)[1]:
            raise UserError(f"the task {quoted(task.name)} has the name of a circuit, TASK@NAME: rename it")
    return chosen


def _all_confirmed(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> bool:
    """Returns whether every task has a confirmed circuit; logs which have not."""
    status = {row["task"]: row["status"] for row in rows}
    others = [f"{name} ({status.get(name, 'not tried')})" for name in names if status.get(name) != FOUND]
    if others:
        log.info("no confirmed circuit: %s", ", ".join(others))
    return not others


def settings_from_flags() -> Settings:
    """Returns the settings of `--config`, with the flags that override them.

    Raises:
      UserError: A value is refused.
    """
    if flags.FLAGS["discretise_pairs"].present:
        log.info("--discretise_pairs is --discretize_pairs now")
    config = flags.FLAGS["config"].value
    if flags.FLAGS["quick"].value:
        if config is not None:
            raise UserError("--quick is short for --config=quick: give one of --quick and --config")
        config = recipes.load("quick", "prune")
    values = ({} if config is None else config.to_dict()) | given_fields(Settings)
    if "sweep" in values:
        try:
            values["sweep"] = [float(target) for target in values["sweep"]]
        except ValueError as error:
            raise UserError(f"--sweep must be numbers separated by commas: {error}") from error
    return from_dict(Settings, values)


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_string("run", None, "Folder of a training run.", required=True)
    flags.DEFINE_list("task", ["all"], "Names, .jsonl or .py files, or all.")
    flags.DEFINE_string(
        "name", "", "Name of the circuits, where a task has several: they are stored as circuits/TASK@NAME."
    )
    flags.DEFINE_string(
        "storage", None, "Share the work with all workers that are given the same file or database URL."
    )
    flags.DEFINE_float(
        "lease", 600.0, "Seconds of silence after which other workers count a worker as dead.", lower_bound=1
    )
    flags.DEFINE_bool("strict", False, "Exit with 1 unless every task has a confirmed circuit.")
    flags.DEFINE_bool("report", False, "Only write the table and curves of the tasks that are done.")
    flags.DEFINE_bool(
        "evidence",
        None,
        "What the viewer shows of a circuit is measured when it is found. --noevidence leaves it out, "
        "--evidence does nothing else, for circuits that were found before.",
    )
    recipes.define_flag(text="Recipe of the settings below", kind="prune")
    flags.DEFINE_bool("quick", False, "Short for --config=quick.")
    define_fields(Settings)
    define_fields(evidence.Options, "For the viewer: ")
    flags.DEFINE_alias("discretise_pairs", "discretize_pairs")


if __name__ == "__main__":
    define_flags()
    run_command(main)

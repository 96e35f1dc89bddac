"""Find circuits in a trained run: `python -m wsparse.prune --run=runs/tiny --task=single_double_quote`.

For every task: a search over pruning runs, the smallest circuit of its best ones, and the evidence. Each
task's result is a folder under `RUN/circuits/`; tasks that are done are not done again, and the trials of an
interrupted task are kept. `table.txt`, `results.json` and `curves.png` beside them are rewritten each time.

Recipes of settings are in `configs/prune/`: `--config=quick`, with `--config.trials=16` or `--trials=16` to
override one. Any number of workers on any machines share a sweep through `--storage=FILE_OR_URL`: see
docs/multihost.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import shutil
import time
from typing import Any, get_args

from absl import flags
from optuna.storages import BaseStorage

from wsparse import files, locks, recipes, runs, trees
from wsparse.circuits import evidence, procedure, report, tasks
from wsparse.circuits.circuit import Circuit, Score, Status
from wsparse.circuits.procedure import Settings
from wsparse.circuits.search import Pruner, SharedSearch
from wsparse.circuits.settings import Sampler
from wsparse.circuits.workers import WorkItems, WorkPending, open_storage
from wsparse.command import run_command
from wsparse.config import from_dict, to_dict
from wsparse.errors import UserError
from wsparse.ops import cpu

log = logging.getLogger(__name__)

# Windows of training text for the means.
_WINDOWS = 512
# Seconds between looks at what other workers have left.
_POLL = 10.0
# Circuits that pruning with other settings has replaced.
_EARLIER = "earlier"

_OLD_FLAGS = {"discretise_pairs": "discretize_pairs"}


def run(
    folder: pathlib.Path,
    chosen: Sequence[tasks.Task],
    settings: Settings,
    *,
    storage: BaseStorage | None = None,
    lease: float = 600.0,
    shown: evidence.Options | None = None,
) -> list[dict[str, Any]]:
    """Find the circuits of tasks that are not done, and write the table of all.

    Args:
      folder: Folder of the run.
      chosen: Tasks.
      settings: Settings of the procedure.
      storage: Storage that shares the work with all processes that are given the same one; without one the
        folder is locked.
      lease: Seconds of silence after which other processes count this one as dead.
      shown: What to measure of each circuit for the viewer; None measures nothing.

    Returns:
      The rows of the table, see `report.row`.

    Raises:
      UserError: The folder is not a run, another process prunes it, or no task can be built for it.
    """
    trained = runs.load(folder)
    out = folder / "circuits"
    files.make_folder(out)
    with locks.hold(out, "pruning") if storage is None else contextlib.nullcontext():
        jobs = _jobs(trained, chosen, settings, storage, lease, shown)
        _run_jobs(jobs, lease)
        return write_report(folder)


def _jobs(
    trained: runs.Run,
    chosen: Sequence[tasks.Task],
    settings: Settings,
    storage: BaseStorage | None,
    lease: float,
    shown: evidence.Options | None,
) -> list[_Job]:
    """Returns the work of every task that can be built."""
    config, out = trained.config.model, trained.folder / "circuits"
    subject = procedure.Subject(trained.params, config, trained.windows("train", n=_WINDOWS))
    pairs, refused = procedure.build_pairs(chosen, trained.tokenizer, settings, context=config.context)
    for name, reason in refused.items():
        log.info("%s: refused: %s", name, reason)
    if not pairs:
        raise UserError("no task is left: see the reasons above")
    pruner = Pruner(
        config,
        steps=settings.steps,
        pairs_per_step=settings.pairs_per_step,
        tie_qk=settings.tie_qk,
        parallel=min(settings.parallel, settings.trials),
    )
    measure = _measurer(trained, chosen, shown)
    return [
        _Job(subject, of_task, pruner, settings, out / of_task.task, storage, lease, measure)
        for of_task in pairs
    ]


def _run_jobs(jobs: Sequence[_Job], lease: float) -> None:
    """Run jobs until all are done, here or by other workers."""
    waiting = False
    todo = list(enumerate(jobs, start=1))
    while todo:
        pending = []
        for number, job in todo:
            if not waiting:
                log.info("[%d/%d] %s", number, len(jobs), job.pairs.task)
            try:
                job.run()
            except WorkPending:
                pending.append((number, job))
        if pending:
            if not waiting:
                log.info("with other workers: %d tasks; waiting for them, in case one dies", len(pending))
            waiting = True
            time.sleep(min(_POLL, lease / 4))
        todo = pending


def _measurer(
    trained: runs.Run, chosen: Sequence[tasks.Task], shown: evidence.Options | None
) -> Callable[[Circuit, procedure.Pairs, pathlib.Path], None]:
    """Returns a function that measures a circuit's evidence and writes it into its folder."""
    summaries = {task.name: task.summary for task in chosen}
    # Read when it is first needed: a sweep may find nothing.
    text = functools.cache(lambda source: evidence.read_text(trained, source))

    def measure(circuit: Circuit, pairs: procedure.Pairs, folder: pathlib.Path) -> None:
        if shown is None or not circuit.nodes:
            return
        try:
            measured = evidence.measure(
                trained,
                circuit,
                pairs.report,
                text(shown.source),
                summary=summaries[circuit.task],
                options=shown,
            )
        except UserError as error:
            # The circuit is found and saved, and its evidence can be measured at any time.
            log.info("  no evidence: %s", error)
            return
        measured.save(folder)

    return measure


def write_report(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Write the table and curves of the tasks that are done, and return the table's rows."""
    out = folder / "circuits"
    rows = report.collect(out)
    if not rows:
        raise UserError(f"{out} holds no finished task: run without --report first")
    report.write(out, rows, title=folder.name)
    log.info("%s", (out / "table.txt").read_text(encoding="utf-8"))
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """One task of a sweep, by this process alone or shared."""

    subject: procedure.Subject
    pairs: procedure.Pairs
    pruner: Pruner
    settings: Settings
    folder: pathlib.Path
    storage: BaseStorage | None
    lease: float
    measure: Callable[[Circuit, procedure.Pairs, pathlib.Path], None]

    def run(self) -> None:
        """Do what is left of the task.

        Raises:
          WorkPending: What is left is leased to other workers.
        """
        if self._is_done():
            log.info("  done before")
        elif self._is_hopeless:
            self._finish(None, "the model cannot do it")
        elif self._shared is None:
            self._find(folder=self._trials)
            shutil.rmtree(self._trials, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._trials.parent.rmdir()
        else:
            trials = procedure.search_trials(
                self.subject, self.pairs, self.pruner, self.settings, shared=self._shared
            )
            # Only one worker cleans up and measures; the lease is free again afterwards.
            name = f"{self._name}-circuit"
            with WorkItems(1, storage=self.storage, name=name, lease=self.lease).lease() as leased:
                if not leased:
                    raise WorkPending
                # Another worker may have finished it while we waited.
                if not self._is_done():
                    self._find(trials=trials)

    def _find(self, **options: Any) -> None:
        circuit = procedure.find_circuit(self.subject, self.pairs, self.pruner, self.settings, **options)
        self._finish(circuit, circuit.status if circuit else "not found")

    @functools.cached_property
    def _is_hopeless(self) -> bool:
        log.info("  the model: loss %.4f, accuracy %.3f", *self._model_score)
        return procedure.is_hopeless(self.subject, self.pairs, self.settings)

    @functools.cached_property
    def _model_score(self) -> tuple[float, float]:
        return self.subject.score(self.pairs.report)

    @functools.cached_property
    def _name(self) -> str:
        """A name that model, task and settings decide."""
        pairs = trees.digest({"search": self.pairs.search, "discretize": self.pairs.discretize})
        key = json.dumps([self.subject.digest, to_dict(self.settings), pairs]).encode()
        return f"{self.pairs.task}-{hashlib.sha256(key).hexdigest()[:16]}"

    @functools.cached_property
    def _trials(self) -> pathlib.Path:
        return self.folder / "trials" / self._name

    @functools.cached_property
    def _shared(self) -> SharedSearch | None:
        if self.storage is None:
            return None
        return SharedSearch(self.storage, self._name, self._trials, self.lease)

    def _is_done(self) -> bool:
        if not _was_made_with(self.folder, self.subject.digest, self.settings):
            return False
        try:
            if Status.load(self.folder).has_circuit:
                Circuit.load(self.folder)
        except UserError as error:
            log.info("  %s", error)
            return False
        return True

    def _finish(self, circuit: Circuit | None, outcome: str) -> None:
        """Write the result of the task."""
        if not _was_made_with(self.folder, self.subject.digest, self.settings):
            _set_aside(self.folder)
        status = Status(
            task=self.pairs.task,
            status=outcome,
            model=Score(*self._model_score),
            digest=self.subject.digest,
            settings=to_dict(self.settings),
        )
        if circuit is not None:
            circuit.save(self.folder)
            with files.replacing(self.folder / "circuit.txt") as part:
                part.write_text(report.text(circuit), encoding="utf-8")
            log.info("  %s", report.summary(circuit))
        status.save(self.folder)
        if circuit is not None:
            self.measure(circuit, self.pairs, self.folder)


def _was_made_with(folder: pathlib.Path, digest: str, settings: Settings) -> bool:
    """Returns whether the result in a task's folder is of this model and these settings."""
    if not (folder / "status.json").exists():
        return False
    try:
        status = Status.load(folder)
        # Older results do not name the limit of tokens.
        values = {"max_tokens": settings.max_tokens, **status.settings}
        return status.digest == digest and from_dict(Settings, values) == settings
    except UserError:
        return False


def _set_aside(folder: pathlib.Path) -> None:
    """Move the circuit of other settings, or of another model, out of a task's folder."""
    if not (folder / "circuit.json").exists():
        return
    earlier = folder.parent / _EARLIER
    number = 1 + sum(1 for _ in earlier.glob(f"{folder.name}.*"))
    target = earlier / f"{folder.name}.{number}"
    files.make_folder(target)
    for path in folder.iterdir():
        if path.is_file():
            # Another worker may be doing the same.
            with contextlib.suppress(FileNotFoundError):
                path.replace(target / path.name)
    log.info("  the earlier circuit, of another model or other settings, is in %s now", target)


def main(argv: Sequence[str]) -> int:
    """Run the command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    names = list(tasks.TASKS) if options.task == ["all"] else options.task
    if not names:
        raise UserError("--task is empty: give names, .jsonl or .py files, or all")
    chosen = [tasks.find(name) for name in names]
    settings = settings_from_flags()
    shown = evidence.Options(**_present(evidence.Options))
    folder = pathlib.Path(options.run)
    if options.report:
        write_report(folder)
        return 0
    if options.evidence:
        evidence.measure_run(folder, options.task, shown)
        return 0
    if options.lease < 1:
        raise UserError(f"--lease must be at least 1 second, got {options.lease}")
    storage = None if options.storage is None else open_storage(options.storage)
    cpu.enable()
    run(
        folder,
        chosen,
        settings,
        storage=storage,
        lease=options.lease,
        shown=shown if options.evidence is None else None,
    )
    return 0


def settings_from_flags() -> Settings:
    """Returns the settings of `--config`, with the flags that override them.

    Raises:
      UserError: A value is refused.
    """
    holders = flags.FLAGS
    config = holders["config"].value
    values: dict[str, Any] = {} if config is None else config.to_dict()
    values |= _present(Settings)
    for old, new in _OLD_FLAGS.items():
        if holders[old].present:
            log.info("--%s is --%s now", old, new)
            values[new] = holders[old].value
    try:
        values |= {"sweep": [float(target) for target in values.get("sweep", Settings().sweep)]}
    except ValueError as error:
        raise UserError(f"--sweep must be numbers separated by commas: {error}") from error
    return from_dict(Settings, values)


def _present(cls: type) -> dict[str, Any]:
    """Returns the values of the flags that were given for the fields of a dataclass."""
    holders = flags.FLAGS
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: holders[name].value for name in names if holders[name].present}


def _define_fields(cls: type, *, about: str = "", old: Mapping[str, str] | None = None) -> None:
    """Define a flag for every field of a dataclass with defaults and help."""
    old_names = {new: name for name, new in (old or {}).items()}
    for field in dataclasses.fields(cls):
        default = field.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{about}{field.metadata['help']} Default: {shown!r}."
        for name in filter(None, (field.name, old_names.get(field.name))):
            text = text if name == field.name else f"Old name of --{field.name}."
            if field.name == "sampler":
                flags.DEFINE_enum(name, None, get_args(Sampler), text)
            elif isinstance(default, bool):
                flags.DEFINE_bool(name, None, text)
            elif isinstance(default, int):
                flags.DEFINE_integer(name, None, text)
            elif isinstance(default, float):
                flags.DEFINE_float(name, None, text)
            elif isinstance(default, tuple):
                flags.DEFINE_list(name, None, text)
            else:
                flags.DEFINE_string(name, None, text)


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_string("run", None, "Folder of a training run.", required=True)
    flags.DEFINE_list("task", ["all"], "Names, .jsonl or .py files, or all.")
    flags.DEFINE_string(
        "storage", None, "Share the work with all workers that are given the same file or database URL."
    )
    flags.DEFINE_float("lease", 600.0, "Seconds of silence after which other workers count a worker as dead.")
    flags.DEFINE_bool("report", False, "Only write the table and curves of the tasks that are done.")
    flags.DEFINE_bool(
        "evidence",
        None,
        "What the viewer shows of a circuit is measured when it is found. --noevidence leaves it out, "
        "--evidence does nothing else, for circuits that were found before.",
    )
    recipes.define_flag(text="Recipe of the settings below", kind="prune")
    _define_fields(Settings, old=_OLD_FLAGS)
    _define_fields(evidence.Options, about="For the viewer: ")


if __name__ == "__main__":
    define_flags()
    run_command(main)

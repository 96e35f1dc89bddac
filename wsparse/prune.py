"""Find circuits in a trained run: `python -m wsparse.prune --run=runs/tiny --task=single_double_quote`.

For every task: a search over pruning runs, the smallest circuit of its best ones, and the evidence. Each
task's result is a folder under `RUN/circuits/`; tasks that are done are not done again. `table.txt`,
`results.json` and `curves.png` beside them are made anew each time.

Any number of workers on any machines share a sweep through `--storage=FILE_OR_URL`: see docs/multihost.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import re
import signal
import sys
import time
from typing import Any, get_args

from absl import flags
import numpy as np
from optuna.storages import BaseStorage

from wsparse import files, runs
from wsparse.circuits import evidence, procedure, report, scoring, tasks
from wsparse.circuits.circuit import Circuit, Score, Status
from wsparse.circuits.search import Pruner, Sampler, Shared, Trial
from wsparse.circuits.workers import ElsewhereError, Pieces, open_storage
from wsparse.command import run_command
from wsparse.config import from_dict
from wsparse.data import batches
from wsparse.errors import UserError
from wsparse.ops import cpu

log = logging.getLogger(__name__)

# Windows of pretraining text for the means, and the megabytes they are drawn from.
_WINDOWS, _MEGABYTES = 512, 2.0
# Seconds between looks at what other workers have left.
_POLL = 10.0


def run(
    folder: pathlib.Path,
    wanted: Sequence[tasks.Task],
    settings: procedure.Settings,
    *,
    max_tokens: int,
    storage: BaseStorage | None = None,
    lease: float = 600.0,
    shown: evidence.Options | None = None,
) -> list[dict[str, Any]]:
    """Find the circuits of tasks that are not done, and write the table of all.

    Args:
      folder: of the run.
      wanted: tasks.
      settings: of the procedure.
      max_tokens: longest prompt to use.
      storage: shares the work with all processes that are given the same one.
      lease: seconds of silence after which the others take a process for dead.

      shown: What to measure of each circuit for the viewer; None measures nothing.

    Returns:
      The rows of the table, see `report.row`.

    Raises:
      UserError: the folder is no run, or no task can be built for it.
    """
    say = functools.partial(print, flush=True)
    trained = runs.load(folder)
    config = trained.config.model
    out = folder / "circuits"
    subject = procedure.Subject(trained.params, config, pretraining_windows(trained, out))
    pairs, refused = procedure.build_pairs(
        wanted, trained.tokenizer, settings, max_tokens=min(max_tokens, config.context)
    )
    for name, reason in refused.items():
        say(f"{name}: refused: {reason}")
    if not pairs:
        raise UserError("no task is left: see the reasons above")
    pruner = Pruner(
        config,
        steps=settings.steps,
        pairs_per_step=settings.pairs_per_step,
        tie_qk=settings.tie_qk,
        parallel=min(settings.parallel, settings.trials),
    )
    measure = _measurer(trained, wanted, shown)
    jobs = [
        _Job(subject, each, pruner, settings, out / each.task, storage, lease, say, measure)
        for each in pairs
    ]
    waiting = False
    todo = list(enumerate(jobs, start=1))
    while todo:
        left = []
        for number, job in todo:
            if not waiting:
                say(f"[{number}/{len(jobs)}] {job.pairs.task}")
            try:
                job.run()
            except ElsewhereError:
                left.append((number, job))
        if left:
            if not waiting:
                say(f"with other workers: {len(left)} tasks; waiting for them, in case one dies")
            waiting = True
            time.sleep(min(_POLL, lease / 4))
        todo = left
    return write_report(folder, say)


def _measurer(
    trained: runs.Run, wanted: Sequence[tasks.Task], shown: evidence.Options | None
) -> Callable[[Circuit, procedure.Pairs, pathlib.Path], None]:
    """Returns a function that measures a circuit's evidence and writes it into its folder."""
    summaries = {task.name: task.summary for task in wanted}
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


def write_report(folder: pathlib.Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Write the table and curves of the tasks that are done, and return the table's rows."""
    out = folder / "circuits"
    rows = report.collect(out)
    if not rows:
        raise UserError(f"{out} holds no finished task: run without --report first")
    report.write(out, rows, title=folder.name)
    say((out / "table.txt").read_text())
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """One task of a sweep, alone or with others."""

    subject: procedure.Subject
    pairs: procedure.Pairs
    pruner: Pruner
    settings: procedure.Settings
    where: pathlib.Path
    storage: BaseStorage | None
    lease: float
    say: Callable[[str], None]
    measure: Callable[[Circuit, procedure.Pairs, pathlib.Path], None]

    def run(self) -> None:
        """Do what is left of the task.

        Raises:
          ElsewhereError: others are at what is left.
        """
        if _is_done(self.where, self.subject.digest, self.settings):
            self.say("  done before")
            return
        if self.score.loss >= self.settings.target:
            self._finish(None, "the model cannot do it")
            return
        trials = self._search()
        with self._alone():
            # It may have been finished by whom it was waited for.
            if not _is_done(self.where, self.subject.digest, self.settings):
                circuit = procedure.find_circuit(
                    self.subject, self.pairs, self.pruner, self.settings, self.say, trials=trials
                )
                self._finish(circuit, circuit.status if circuit else "not found")

    @functools.cached_property
    def score(self) -> scoring.Score:
        score = procedure.model_score(self.subject, self.pairs.report)
        self.say(f"  the model: loss {score.loss:.4f}, accuracy {score.accuracy:.3f}")
        return score

    @functools.cached_property
    def _shared(self) -> Shared | None:
        if self.storage is None:
            return None
        decided_by = json.dumps([self.subject.digest, _as_json(self.settings)]).encode()
        name = f"{self.pairs.task}-{hashlib.sha256(decided_by).hexdigest()[:16]}"
        return Shared(self.storage, name, self.where / "trials" / name, self.lease)

    def _search(self) -> list[Trial] | None:
        if self._shared is None:
            return None
        return procedure.search_trials(
            self.subject, self.pairs, self.pruner, self.settings, self.say, shared=self._shared
        )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one worker cleans up and measures; the claim is free again afterwards."""
        if self._shared is None:
            yield
            return
        name = f"{self._shared.name}-circuit"
        with Pieces(1, storage=self.storage, name=name, lease=self.lease).claim() as claimed:
            if not claimed:
                raise ElsewhereError
            yield

    def _finish(self, circuit: Circuit | None, outcome: str) -> None:
        status = Status(
            task=self.pairs.task,
            status=outcome,
            model=Score(*self.score),
            digest=self.subject.digest,
            settings=_as_json(self.settings),
        )
        if circuit is not None:
            circuit.save(self.where)
            with files.replacing(self.where / "circuit.txt") as part:
                part.write_text(report.text(circuit))
            self.say(f"  {report.summary(circuit)}")
        status.save(self.where)
        if circuit is not None:
            self.measure(circuit, self.pairs, self.where)


def pretraining_windows(trained: runs.Run, out: pathlib.Path) -> np.ndarray:
    """`(W, T)` windows of the run's own pretraining text, drawn once and kept."""
    path = out / "windows.npz"
    if path.exists():
        with np.load(path) as stored:
            return stored["tokens"].astype(np.int32)
    data = trained.config.data
    dataset = batches.open_dataset(
        dataclasses.replace(data, megabytes=min(data.megabytes, _MEGABYTES)),
        vocab_size=trained.config.model.vocab_size,
        context=trained.config.model.context,
        tokenizer_file=trained.folder / "tokenizer.json",
    )
    stream = batches.train_batches(
        dataset.train,
        batch_size=_WINDOWS,
        context=trained.config.model.context,
        seed=data.seed,
        start_step=0,
        threads=0,
        prefetch=0,
    )
    windows = np.asarray(next(iter(stream)))[:, :-1]
    out.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as part:
        np.savez_compressed(part, tokens=windows)
    return windows


def _is_done(where: pathlib.Path, digest: str, settings: procedure.Settings) -> bool:
    if not (where / "status.json").exists():
        return False
    try:
        status = Status.load(where)
        done = status.digest == digest
        done = done and from_dict(procedure.Settings, status.settings) == settings
    except UserError:
        return False
    if done and status.has_circuit:
        # A damaged one is refused now, not by the table after all other tasks.
        Circuit.load(where)
    return done


def _as_json(settings: procedure.Settings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def main(argv: Sequence[str]) -> int:
    """The command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    names = list(tasks.TASKS) if options.task == ["all"] else options.task
    if not names:
        raise UserError("--task is empty: give names, .jsonl or .py files, or all")
    wanted = [tasks.find(name) for name in names]
    values: dict[str, Any] = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(procedure.Settings)
    }
    try:
        values["sweep"] = tuple(float(each) for each in values["sweep"])
    except ValueError as error:
        raise UserError(f"--sweep must be numbers separated by commas: {error}") from error
    settings = procedure.Settings(**values)
    folder = pathlib.Path(options.run)
    if options.report:
        write_report(folder, functools.partial(print, flush=True))
        return 0
    shown = evidence.Options(
        source=options.source, pairs=options.pairs, max_nodes=options.max_nodes
    )
    if options.evidence:
        evidence.measure_run(folder, options.task, shown)
        return 0
    if options.lease <= 0:
        raise UserError(f"--lease must be above 0 seconds, got {options.lease}")
    storage = None if options.storage is None else open_storage(options.storage)
    cpu.enable()
    # A worker that is told to leave gives its claims back.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        run(
            folder,
            wanted,
            settings,
            max_tokens=options.max_tokens,
            storage=storage,
            lease=options.lease,
            shown=shown if options.evidence is None else None,
        )
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on with the tasks that are not done")
        return 130
    return 0


def _help_of(name: str, cls: type = procedure.Settings) -> str:
    """Returns what the docstring of `Settings` says about an attribute."""
    about = re.search(
        rf"^ +{name}: (.*?)(?=^ +\w+: |\Z)",
        cls.__doc__ or "",
        re.MULTILINE | re.DOTALL,
    )
    assert about is not None, name
    return " ".join(about[1].split())


def _define_flags() -> None:
    defaults = procedure.Settings()
    flags.DEFINE_string("run", None, "The folder of a training run.", required=True)
    flags.DEFINE_list("task", ["all"], "Names, .jsonl or .py files, or all.")
    flags.DEFINE_integer("max_tokens", 4096, "Longest prompt to use; at most the context.")
    flags.DEFINE_string(
        "storage",
        None,
        "Share the work with all workers that are given the same file or database URL.",
    )
    flags.DEFINE_float(
        "lease", 600.0, "Seconds of silence after which other workers take a worker for dead."
    )
    flags.DEFINE_bool(
        "report", False, "Only write the table and curves of the tasks that are done."
    )
    flags.DEFINE_bool(
        "evidence",
        None,
        "What the viewer shows of a circuit is measured when it is found. --noevidence leaves it out, "
        "--evidence does nothing else, for circuits that were found before.",
    )
    for field in dataclasses.fields(evidence.Options()):
        define = flags.DEFINE_string if field.name == "source" else flags.DEFINE_integer
        about = _help_of(field.name, evidence.Options)
        define(field.name, field.default, f"Of the evidence: {about}")
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        about = _help_of(field.name)
        if field.name == "sampler":
            flags.DEFINE_enum("sampler", value, get_args(Sampler), about)
        elif isinstance(value, bool):
            flags.DEFINE_bool(field.name, value, about)
        elif isinstance(value, int):
            flags.DEFINE_integer(field.name, value, about)
        elif isinstance(value, float):
            flags.DEFINE_float(field.name, value, about)
        else:
            flags.DEFINE_list(field.name, [str(each) for each in value], about)


if __name__ == "__main__":
    _define_flags()
    run_command(main)

"""Test a circuit and write a report of it: `python -m wsparse.audit --run=runs/tiny --task=if_equals`.

An audit asks what a circuit's loss alone does not say: whether the circuit holds when the rest of the model
is let through in part, at random or by an adversary; whether its nodes do in the model what they do in the
circuit; what nonsense the same search finds. docs/evidence.md says what each test shows and what it does not.

Writes `audit.json` and `audit.html` into the circuit's folder, `RUN/circuits/TASK/`.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import logging
import pathlib
import shlex
import time
from typing import Any

from absl import flags

from wsparse import __version__, files, runs
from wsparse.circuits import evidence, report
from wsparse.circuits.audits import context as contexts
from wsparse.circuits.audits import report as audit_report
from wsparse.circuits.audits import tests
from wsparse.circuits.audits.context import Context, Options
from wsparse.circuits.audits.record import Audit
from wsparse.circuits.circuit import FOUND, folder_of
from wsparse.command import define_fields, given_fields, run_command
from wsparse.errors import UserError
from wsparse.ops import cpu
from wsparse.progress import progress

log = logging.getLogger(__name__)


def audit(context: Context, names: Sequence[str] = tuple(tests.TESTS), *, command: str = "") -> Audit:
    """Returns the audit of a circuit.

    Args:
      context: From `contexts.make`.
      names: Tests to run, of `tests.TESTS`.
      command: Command line that makes it again.
    """
    started = time.monotonic()
    results = []
    with progress(len(names), "audit", seconds_per_line=None) as bar:
        for result in tests.run(context, names):
            results.append(result)
            why = f"  {result.reason}" if result.reason else ""
            log.info("  %-20s %-8s %5.1f s%s", result.name, result.verdict, result.seconds, why)
            bar.advance()
    circuit, run = context.circuit, context.run
    return Audit(
        task=circuit.full_name,
        form=circuit.form,
        run=run.folder.resolve().name,
        step=run.step,
        model=circuit.model_digest,
        data=run.data.digest,
        circuit=circuit.digest,
        wsparse=__version__,
        status=circuit.status,
        objective=context.settings.objective,
        loss=circuit.loss,
        target=circuit.target,
        nodes=len(circuit.nodes),
        edges=len(circuit.edges),
        pairs=context.n_pairs,
        options=dataclasses.asdict(context.options),
        tests=results,
        seconds=round(time.monotonic() - started, 1),
        command=command,
        held_to=context.settings.held_to,
    )


def audit_run(
    folder: pathlib.Path,
    tasks: Sequence[str],
    options: Options,
    names: Sequence[str] = tuple(tests.TESTS),
    *,
    run: runs.Run | None = None,
) -> list[Audit]:
    """Audits circuits of a run, writes the audits into their folders, and returns them.

    Args:
      folder: Folder of the run.
      tasks: Names of tasks, files of tasks, or "all" that have a circuit.
      options: How much is tested.
      names: Tests to run, of `tests.TESTS`.
      run: The run, if it is loaded.

    Raises:
      UserError: A test, task or circuit does not exist, or a circuit belongs to other parameters; nothing is
        computed then.
    """
    tests.check_names(names)
    run, chosen = evidence.opened(folder, tasks, "the audit", run=run)
    made = [contexts.make(run, circuit, task, options) for circuit, task in chosen]
    sources = {report.name_in_run(name): name for name in tasks}
    audits = []
    for number in range(1, len(chosen) + 1):
        # Activations that a context has recorded go with it.
        context = made.pop(0)
        task = context.circuit.full_name
        log.info("[%d/%d] %s: %d nodes", number, len(chosen), task, len(context.circuit.nodes))
        command = _command(folder, sources.get(task, task), options, names)
        audits.append(audit(context, names, command=command))
        _write(folder_of(folder, task), audits[-1])
    return audits


def _command(folder: pathlib.Path, task: str, options: Options, names: Sequence[str]) -> str:
    """Returns the command line of the audit of one task."""
    arguments = [f"--run={folder}", f"--task={task}"]
    if set(names) != set(tests.TESTS):
        arguments.append(f"--tests={','.join(names)}")
    arguments += [f"--{name}={value}" for name, value in dataclasses.asdict(options).items()]
    return shlex.join(["python", "-m", "wsparse.audit", *arguments])


def _write(folder: pathlib.Path, done: Audit) -> None:
    """Writes an audit and its report into a circuit's folder."""
    # The report is complete before the audit that it is of takes the place of an earlier one.
    with files.replacing(folder / audit_report.FILE) as part:
        part.write_text(audit_report.render(done), encoding="utf-8")
        done.save(folder)
    log.info("  written to %s", folder / audit_report.FILE)


def rewrite(folder: pathlib.Path, tasks: Sequence[str]) -> list[Audit]:
    """Writes the reports of audits that were made before, and returns the audits.

    Raises:
      UserError: A task that was named, or all of them, has no audit of its circuit.
    """
    circuits = report.select(folder, tasks)[1]
    places = {c.full_name: folder_of(folder, c.full_name) for c in circuits}
    found = {c.full_name: Audit.load(places[c.full_name], circuit=c.digest) for c in circuits}
    audits = {task: done for task, done in found.items() if done is not None}
    if missing := [task for task in found if task not in audits]:
        text = f"no audit of the circuit of {', '.join(missing)}: run without --report makes it"
        if "all" not in tasks or not audits:
            raise UserError(text)
        log.info("note: %s", text)
    for task, done in audits.items():
        files.write_text(places[task] / audit_report.FILE, audit_report.render(done))
        log.info("%s: written to %s", task, places[task] / audit_report.FILE)
    return list(audits.values())


def main(argv: Sequence[str]) -> int:
    """Runs the command; see the module's docstring."""
    del argv
    flag: Any = flags.FLAGS
    names = list(tests.TESTS) if flag.tests is None else flag.tests
    tests.check_names(names)
    options, folder = Options(**given_fields(Options)), pathlib.Path(flag.run)
    if flag.report:
        audits = rewrite(folder, flag.task)
    else:
        cpu.enable()
        audits = audit_run(folder, flag.task, options, names)
    log.info("%s", audit_report.table(audits))
    return int(flag.strict and not all(map(_stands, audits)))


def _stands(done: Audit) -> bool:
    """Returns whether the circuit is confirmed and no test failed."""
    return done.status == FOUND and all(test.verdict != "failed" for test in done.tests)


def _define_flags() -> None:
    flags.DEFINE_string("run", None, "Folder of a training run.", required=True)
    flags.DEFINE_list("task", ["all"], "Names, .jsonl or .py files, or all that have a circuit.")
    flags.DEFINE_list(
        "tests", None, "Names of tests to run, instead of all; the audit that is written has these alone."
    )
    flags.DEFINE_bool("report", False, "Only write the reports of earlier audits anew.")
    flags.DEFINE_bool("strict", False, "Exit with 1 if a test failed or a circuit is not confirmed.")
    define_fields(Options)


if __name__ == "__main__":
    _define_flags()
    run_command(main)

"""Find circuits in a trained run: `python -m wsparse.prune --run=runs/tiny --task=single_double_quote`.

For every task: a search over pruning runs, the smallest circuit of its best ones, and the evidence. Each
task's result is a folder under `RUN/circuits/`; tasks that are done are not done again. `table.txt`,
`results.json` and `curves.png` beside them are made anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import json
import pathlib
import re
from typing import Any, get_args

from absl import flags
import numpy as np

from wsparse import files, runs
from wsparse.circuits import find, report, tasks
from wsparse.circuits.circuit import Circuit
from wsparse.circuits.search import Pruner, Sampler
from wsparse.data import pipeline
from wsparse.errors import UserError, run_command

# Windows of pretraining text for the means, and the megabytes they are drawn from.
_WINDOWS, _MEGABYTES = 512, 2.0


def run(
    folder: pathlib.Path, wanted: Sequence[tasks.Task], settings: find.Settings, *, max_tokens: int
) -> list[dict[str, Any]]:
    """Find the circuits of tasks that are not done, and write the table of all.

    Returns:
      The rows of the table, see `report.row`.

    Raises:
      UserError: the folder is no run, or no task can be built for it.
    """
    say = functools.partial(print, flush=True)
    trained = runs.load(folder)
    config = trained.config.model
    out = folder / "circuits"
    subject = find.Subject(trained.params, config, pretraining_windows(trained, out))
    pairs, refused = find.build_pairs(
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
    for number, each in enumerate(pairs, start=1):
        where = out / each.task
        say(f"[{number}/{len(pairs)}] {each.task}")
        if _is_done(where, subject.digest, settings):
            say("  done before")
            continue
        score = find.model_score(subject, each.report)
        say(f"  the model: loss {score.loss:.4f}, accuracy {score.accuracy:.3f}")
        circuit, outcome = None, "the model cannot do it"
        if score.loss < settings.target:
            circuit = find.find_circuit(subject, each, pruner, settings, say)
            outcome = "found" if circuit else "not found"
        status = {
            "task": each.task,
            "status": outcome,
            "model": score._asdict(),
            "digest": subject.digest,
            "settings": _as_json(settings),
        }
        if circuit is not None:
            circuit.save(where)
            say(f"  {report.summary(circuit)}")
        where.mkdir(parents=True, exist_ok=True)
        files.write_json(where / "status.json", status)
    rows = report.collect(out)
    report.write(out, rows, title=folder.name)
    say((out / "table.txt").read_text())
    return rows


def pretraining_windows(trained: runs.Run, out: pathlib.Path) -> np.ndarray:
    """`(W, T)` windows of the run's own pretraining text, drawn once and kept."""
    path = out / "windows.npz"
    if path.exists():
        with np.load(path) as stored:
            return stored["tokens"].astype(np.int32)
    data = trained.config.data
    dataset = pipeline.open_dataset(
        dataclasses.replace(data, megabytes=min(data.megabytes, _MEGABYTES)),
        vocab_size=trained.config.model.vocab_size,
        context=trained.config.model.context,
        tokenizer_file=trained.folder / "tokenizer.json",
    )
    batches = pipeline.train_batches(
        dataset.train,
        batch_size=_WINDOWS,
        context=trained.config.model.context,
        seed=data.seed,
        start_step=0,
        process_index=0,
        process_count=1,
        threads=0,
        prefetch=0,
    )
    windows = np.asarray(next(iter(batches)))[:, :-1]
    out.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as part:
        np.savez_compressed(part, tokens=windows)
    return windows


def _is_done(where: pathlib.Path, digest: str, settings: find.Settings) -> bool:
    path = where / "status.json"
    if not path.exists():
        return False
    try:
        status = files.read_json(path)
    except UserError:
        return False
    done = status.get("digest") == digest and status.get("settings") == _as_json(settings)
    if done and status["status"] == "found":
        # A damaged one is refused now, not by the table after all other tasks.
        Circuit.load(where)
    return done


def _as_json(settings: find.Settings) -> dict[str, Any]:
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
        field.name: getattr(options, field.name) for field in dataclasses.fields(find.Settings)
    }
    try:
        values["sweep"] = tuple(float(each) for each in values["sweep"])
    except ValueError as error:
        raise UserError(f"--sweep must be numbers separated by commas: {error}") from error
    settings = find.Settings(**values)
    try:
        run(pathlib.Path(options.run), wanted, settings, max_tokens=options.max_tokens)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on with the tasks that are not done")
        return 130
    return 0


def _help_of(name: str) -> str:
    """What the docstring of `Settings` says about an attribute."""
    about = re.search(
        rf"^ +{name}: (.*?)(?=^ +\w+: |\Z)", find.Settings.__doc__ or "", re.MULTILINE | re.DOTALL
    )
    assert about is not None, name
    return " ".join(about[1].split())


def _define_flags() -> None:
    defaults = find.Settings()
    flags.DEFINE_string("run", None, "The folder of a training run.", required=True)
    flags.DEFINE_list("task", ["all"], "Names, .jsonl or .py files, or all.")
    flags.DEFINE_integer("max_tokens", 4096, "Longest prompt to use; at most the context.")
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

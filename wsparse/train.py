"""Train a weight-sparse transformer: `python -m wsparse.train --config=configs/tiny.py`.

A run's folder is checked and claimed, its data opened, its state restored where there is one; then
`wsparse.loop` makes the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import logging
import pathlib
import shutil
import time
from typing import Any

from absl import flags
import jax

from wsparse import (
    checkpoint,
    files,
    locks,
    metrics,
    processes,
    recipes,
    sharding,
    sparsity,
    trackers,
)
from wsparse.command import run_command
from wsparse.config import TrainConfig, describe, differences, from_dict, to_dict
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.data.dataset import PROVENANCE, Dataset, open_dataset
from wsparse.errors import UserError
from wsparse.loop import Loop, checkpoint_metadata
from wsparse.ops import cpu
from wsparse.step import Program, TrainState, make_program

# isort: split
# For programs that are older than wsparse.step.
from wsparse.step import eval_step, init_state, loss, make_optimizer, train_step  # noqa: F401

log = logging.getLogger(__name__)


def run(
    config: TrainConfig, workdir: pathlib.Path, *, origin: str | None = None, tracker: Sequence[str] = ()
) -> int:
    """Train to the end, or on from where an earlier call stopped.

    Args:
      config: The run.
      workdir: Folder of the run.
      origin: Checkpoint to begin from where the folder has none, "RUN" or "RUN@STEP".
      tracker: Names of trackers that record it too, see `wsparse.trackers`.

    Returns:
      The exit status: 0 when training is complete, 128 + the signal's number when it was told to stop.

    Raises:
      UserError: The folder belongs to another config or other data, or is in use; the data or mesh does not
        fit the config; a weight became NaN or infinite; something could not be written; a tracker is unknown
        or not installed.
    """
    started = time.monotonic()
    _in_all_processes(lambda: trackers.check(tracker))
    _refuse_unwritable(workdir)
    refuse_other(workdir, config)
    summary = workdir / "summary.json"
    # Process 0 decides: a network's file system may show the file to others later.
    if processes.gather(str(summary.exists()))[0] == "True":
        if jax.process_index() == 0:
            log.info("%s is complete: %s", workdir, summary.read_text().strip())
        return 0
    program = make_program(config, sharding.make_mesh(config.mesh))
    for line in sparsity.budget_warnings(config.sparsity, program.abstract_state.params):
        log.warning(line)
    with _locked(workdir):
        # Again: another command may have claimed the folder before it was locked.
        _in_all_processes(lambda: refuse_other(workdir, config))
        dataset = _open_data(config, workdir)
        # Only now: a start that failed above leaves the folder free for the corrected command.
        _claim(workdir, config, dataset)
        with checkpoint.Checkpointer(workdir / "checkpoints", keep=config.keep_checkpoints) as checkpoints:
            state, step, past = _restore(config, checkpoints, program, dataset, origin)
            if step:
                log.info("resuming at step %d of %d", step, config.steps)
            elif checkpoint.has_steps(workdir):
                metrics.set_aside(workdir, workdir / checkpoint.SET_ASIDE)
            tracked = _in_all_processes(lambda: trackers.start(tracker, workdir, config))
            # One process writes for all: what it writes is the same in all of them.
            first = jax.process_index() == 0
            writing = metrics.MetricsWriter(workdir, step, tracked) if first else contextlib.nullcontext()
            with writing as writer:
                # Checkpoints used to be without the turnover.
                memory = past["losses"], past.get("turnover", 0.0), started - past["seconds"]
                return Loop(config, program, dataset, checkpoints, writer, step, *memory).run(state)


# Folders ----------------------------------------------------------------------------------------------


def refuse_other(workdir: pathlib.Path, config: TrainConfig) -> None:
    """Refuse a folder that holds the run of another config.

    Raises:
      UserError: It does; the keys that differ are named.
    """
    path, ours = workdir / "config.json", to_dict(config)
    if not path.exists():
        return
    theirs = files.read_json(path)
    # Older spellings of the same config.
    with contextlib.suppress(UserError):
        theirs = to_dict(from_dict(TrainConfig, theirs))
    # Arrays are saved as one, whatever mesh they were sharded over.
    changed = differences(theirs | {"mesh": None}, ours | {"mesh": None})
    if changed:
        raise UserError(
            f"{workdir} holds a run of a different config ({'; '.join(changed)}): choose another --workdir "
            f"(--from={workdir} begins it from this run's newest checkpoint), or undo the change"
        )


def _refuse_unwritable(workdir: pathlib.Path) -> None:
    """Refuse a folder that could not be made, before any work is done for it."""
    # It would become a local folder of the name `gs:`.
    if workdir.parts[:1] and workdir.parts[0].endswith(":") and not workdir.drive:
        raise UserError(f"--workdir={workdir} must be a folder: mount the bucket and give the folder in it")
    parent = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    files.check_writable(parent, f"to --workdir={workdir}")


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the folder's lock in process 0; all processes fail where it cannot."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            if not workdir.exists():
                files.make_folder(workdir)
                stack.callback(_remove_empty, workdir)
            stack.enter_context(locks.hold(workdir, "training"))

        _in_all_processes(lock if jax.process_index() == 0 else lambda: None)
        yield


def _remove_empty(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _open_data(config: TrainConfig, workdir: pathlib.Path) -> Dataset:
    """Opens the run's data, which process 0 makes where it is not there yet."""
    folder = workdir / "data"
    is_new = jax.process_index() == 0 and not folder.exists()

    def opened() -> Dataset:
        path = workdir / "tokenizer.json"
        return open_dataset(folder, config, tokenizer=tokenizer_lib.load(path) if path.exists() else None)

    try:
        # The others open the folder only when process 0 has made it.
        dataset = _in_all_processes(opened if jax.process_index() == 0 else lambda: None)
        if jax.process_count() > 1:
            _require_shared(workdir, folder / PROVENANCE)
            dataset = _in_all_processes(lambda: dataset or opened())
        processes.require_same(dataset.digest, "the data")
    except UserError:
        # What was made here only: a folder that was there before may be the user's own.
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    for line in (*str(dataset.report).splitlines(), dataset.provenance):
        log.info("%s", line)
    return dataset


def _in_all_processes(action: Callable[[], Any]) -> Any:
    """Returns the result of `action`; an error of one process is raised in all of them."""
    result, reason = None, ""
    try:
        result = action()
    except UserError as error:
        reason = str(error)
    for message in processes.gather(reason):
        if message:
            raise UserError(message)
    return result


def _claim(workdir: pathlib.Path, config: TrainConfig, dataset: Dataset) -> None:
    """Make the folder this config's."""
    path = workdir / "config.json"
    if jax.process_index() == 0:
        if not path.exists():
            files.write_json(path, to_dict(config))
        if not (workdir / "tokenizer.json").exists():
            dataset.tokenizer.save(workdir / "tokenizer.json")
    _require_shared(workdir, path)


def _require_shared(workdir: pathlib.Path, path: pathlib.Path) -> None:
    """Refuse a folder in which a process does not see the file that process 0 wrote."""
    if blind := processes.blind_processes(path):
        raise UserError(
            f"--workdir={workdir} must be one folder for all processes, but process {blind[0]} does not see "
            "what process 0 wrote there: use a network's file system, or a bucket that is mounted"
        )


def _restore(
    config: TrainConfig,
    checkpoints: checkpoint.Checkpointer,
    program: Program,
    dataset: Dataset,
    origin: str | None,
) -> tuple[TrainState, int, dict[str, Any]]:
    """Returns `(state, step, metadata)` to go on from, see `checkpoint_metadata`."""
    if restored := checkpoints.restore(program.abstract_state):
        step, state, metadata = restored
        if metadata["data_digest"] != dataset.digest:
            raise UserError(
                "the data is not what this run was trained on so far (its digest differs): restore the "
                "original files and delete the run's folder data, or choose another --workdir"
            )
        return state, step, metadata
    begun = checkpoint_metadata(config, dataset, 0.0, [], 0.0)
    if origin is None:
        return program.init(), 0, begun
    step, state = _read_origin(origin, program)
    if step >= config.steps:
        raise UserError(f"--from={origin} is at step {step}, and steps={config.steps} ends before")
    log.info("beginning from %s", origin)
    # From now on the folder knows where it began.
    checkpoints.save(step, state, begun)
    return state, step, begun


def _read_origin(origin: str, program: Program) -> tuple[int, TrainState]:
    folder, at, number = origin.rpartition("@") if "@" in origin else (origin, "", "")
    if at and not number.isdecimal():
        raise UserError(f"--from={origin} must be RUN or RUN@STEP, with a number for STEP")
    checkpoints, given = pathlib.Path(folder) / "checkpoints", int(number) if at else None
    # Process 0 chooses, and alone hashes: the run that it is from may have saved another step meanwhile.
    first = jax.process_index() == 0
    chosen = _in_all_processes(lambda: checkpoint.find_step(checkpoints, given) if first else None)
    step = int(processes.gather(str(chosen))[0])
    return step, checkpoint.read_step(checkpoints, program.abstract_state, step)


# The command ------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """The command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    name, config = recipes.from_flag()
    processes.initialize_processes()
    cpu.enable()
    return run(
        config,
        pathlib.Path(options.workdir or f"runs/{name}"),
        origin=options["from"].value,
        tracker=[each for given in options.tracker or () for each in given.split(",")],
    )


def _define_flags() -> None:
    recipes.define_flag()
    flags.DEFINE_string("workdir", None, "Folder of the run; runs/NAME for the recipe NAME.")
    flags.DEFINE_string(
        "from",
        None,
        "RUN or RUN@STEP: begin a new run from another one's checkpoint, with a config that may differ.",
    )
    flags.DEFINE_multi_string(
        "tracker", None, "wandb or trackio, or both with a comma: record the run there too."
    )


def config_help() -> str:
    """Returns the keys of a config with their defaults and meanings, as `--help` lists them."""
    lines = ["Keys of the config, with their defaults:"]
    lines += [
        f"\n  --config.{key}={default!r}\n      {text}" for key, default, text in describe(TrainConfig())
    ]
    return "".join(lines)


if __name__ == "__main__":
    __doc__ = f"{__doc__}\n{config_help()}\n"
    _define_flags()
    run_command(main)

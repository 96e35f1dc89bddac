"""Train a weight-sparse transformer: `python -m wsparse.train --config=configs/tiny.py`.

The step is one jitted pure function `(state, batch) -> (state, metrics)`; the loop around it keeps the
device busy (metrics are read one step late), writes what happened, and can be stopped and started again
at any step without changing a bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import signal
import statistics
import time
from typing import Any

from absl import flags
import jax
from jax.experimental import multihost_utils
import numpy as np

from wsparse import checkpoint, files, metrics, model, processes, recipes, sharding, sparsity, trees
from wsparse.command import run_command
from wsparse.config import TrainConfig, differences, to_dict
from wsparse.data import batches
from wsparse.errors import UserError
from wsparse.ops import cpu

# Some of these are only imported from here by programs that are older than wsparse.step.
from wsparse.progress import progress
from wsparse.step import (  # noqa: F401
    EVAL_BATCH,
    Program,
    TrainState,
    eval_step,
    init_state,
    loss,
    make_optimizer,
    make_program,
    train_step,
)

log = logging.getLogger(__name__)


def run(config: TrainConfig, workdir: pathlib.Path) -> int:
    """Train to the end, or on from where an earlier call stopped.

    Returns:
      The exit status: 0 when training is complete, 128 + the signal's number when it was told to stop.

    Raises:
      UserError: the folder belongs to another config or other data; the data or mesh does not fit the
        config; a weight became NaN or infinite.
    """
    started = time.monotonic()
    _refuse_url(workdir)
    _refuse_unwritable(workdir)
    _refuse_other(workdir, config)
    finished = workdir / "summary.json"
    quiet = jax.process_index() != 0
    # What process 0 sees decides: a network's file system may show it to others later.
    if processes.gather(str(finished.exists()))[0] == "True":
        log.info(f"{workdir} is complete: {finished.read_text().strip()}")
        return 0
    mesh = sharding.make_mesh(config.mesh)
    program = make_program(config, mesh)
    tokenizer_file = workdir / "tokenizer.json"
    dataset = batches.open_dataset(
        config.data,
        vocab_size=config.model.vocab_size,
        context=config.model.context,
        tokenizer_file=tokenizer_file if tokenizer_file.exists() else None,
        progress=log.info,
    )
    for line in str(dataset.report).splitlines():
        log.info(line)
    processes.require_same(dataset.digest, "the data")
    # Only now: a start that failed above leaves the folder free for the corrected command.
    _claim(workdir, config)
    if not quiet and not tokenizer_file.exists():
        dataset.tokenizer.save(tokenizer_file)

    with checkpoint.Checkpointer(
        workdir / "checkpoints", keep=config.keep_checkpoints
    ) as checkpoints:
        state, step, seconds, losses = _restore(checkpoints, program, dataset)
        if step:
            log.info(f"resuming at step {step} of {config.steps}")
        loop = _Loop(config, program, dataset, checkpoints, workdir, quiet, started - seconds)
        return loop.run(state, step, losses)


def _refuse_other(workdir: pathlib.Path, config: TrainConfig) -> None:
    """Refuse a folder that holds the run of another config."""
    path, mine = workdir / "config.json", to_dict(config)
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(
                f"{path} is not JSON: move the folder away or choose another --workdir"
            ) from error
        # Arrays are saved whole, whatever they were spread over.
        changed = differences(theirs | {"mesh": None}, mine | {"mesh": None})
        if changed:
            raise UserError(
                f"{workdir} holds a run of a different config ({'; '.join(changed)}): "
                "choose another --workdir, or undo the change"
            )


def _refuse_url(workdir: pathlib.Path) -> None:
    """Refuse what would become a local folder of the name `gs:`."""
    if workdir.parts[:1] and workdir.parts[0].endswith(":") and not workdir.drive:
        raise UserError(
            f"--workdir={workdir} must be a folder: mount the bucket and give the folder in it"
        )


def _refuse_unwritable(workdir: pathlib.Path) -> None:
    """Refuse a folder that could not be made, before any work is done for it."""
    there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"cannot write to --workdir={workdir}: {there} is no folder one can write to"
        )


def _claim(workdir: pathlib.Path, config: TrainConfig) -> None:
    """Make the folder this config's."""
    path = workdir / "config.json"
    if not path.exists() and jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            files.write_json(path, to_dict(config))
        except OSError as error:
            raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    blind = processes.blind_processes(path)
    if blind:
        raise UserError(
            f"--workdir={workdir} must be one folder for all processes, but process {blind[0]} does not see "
            "what process 0 wrote there: use a network's file system, or a bucket that is mounted"
        )


def _restore(checkpoints, program: Program, dataset: batches.Dataset):
    """`(state, step, seconds so far, losses since the last record)`: of a checkpoint, or a start."""
    restored = checkpoints.restore(program.abstract_state)
    if restored is None:
        return program.init(), 0, 0.0, []
    step, state, metadata = restored
    if metadata["data_digest"] != dataset.digest:
        raise UserError(
            "the data is not what this run was trained on so far (its digest differs): restore the "
            "original files, or choose another --workdir"
        )
    return state, step, metadata["seconds"], metadata["losses"]


@dataclasses.dataclass
class _Loop:
    """The training loop: everything around `Program.step`."""

    config: TrainConfig
    program: Program
    dataset: batches.Dataset
    checkpoints: checkpoint.Checkpointer
    workdir: pathlib.Path
    quiet: bool
    started: float
    stop_signal: int = 0

    def run(self, state: TrainState, step: int, losses: list[float]) -> int:
        config = self.config
        stream = batches.train_batches(
            self.dataset.train,
            batch_size=config.batch_size,
            context=config.model.context,
            seed=config.data.seed,
            start_step=step,
            rows=sharding.local_rows(self.program.mesh, config.batch_size, config.accumulate),
            threads=config.data.threads,
            prefetch=config.data.prefetch,
        )
        self.progress = progress(config.steps, "step", start=step, seconds_per_line=None)
        handlers = {s: signal.signal(s, handler) for s, handler in self._handlers().items()}
        try:
            # One process writes for all: what it writes is the same in all of them.
            with (
                contextlib.nullcontext()
                if self.quiet
                else metrics.MetricsWriter(self.workdir, step) as self.writer
            ):
                return self._steps(state, step, stream, losses)
        finally:
            self.progress.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _handlers(self) -> dict[signal.Signals, Callable[..., None]]:
        if jax.process_count() == 1:
            return dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._on_signal)
        # Here SIGTERM belongs to jax's service, which tells all processes; the terminal's signal joins it.
        return {signal.SIGINT: lambda *_: signal.raise_signal(signal.SIGTERM)}

    def _on_signal(self, number, frame):
        del frame
        self.stop_signal = number
        # A second one is not caught: whoever insists gets out at once.
        signal.signal(number, signal.SIG_DFL)

    def _steps(self, state: TrainState, step: int, stream, losses: list[float]) -> int:
        config = self.config
        pending, evaluation = None, {}
        window_start, window_step = time.monotonic(), step
        while step < config.steps and not self._must_stop(step):
            state, report = self.program.step(state, self._put(next(stream)))
            step += 1
            # The device works on this step while the host reads the one before.
            if pending is not None:
                losses.append(self._read(pending))
            pending = (step, report)
            self.progress.advance()
            self.checkpoints.poll()
            last = step == config.steps
            if step % config.log_every == 0 or last:
                losses.append(self._read(pending))
                pending = None
                elapsed = (time.monotonic() - window_start) / (step - window_step)
                self._log(state, step, report, losses, elapsed)
                losses.clear()
                window_start, window_step = time.monotonic(), step
            if last or (config.eval_every and step % config.eval_every == 0):
                evaluation = self._evaluate(state, step)
                window_start, window_step = time.monotonic(), step
            if last or (config.checkpoint_every and step % config.checkpoint_every == 0):
                # A state is saved only once its own step is known to be finite.
                if pending is not None:
                    losses.append(self._read(pending))
                    pending = None
                self._save(state, step, losses)
        if pending is not None:
            losses.append(self._read(pending))
        if step < config.steps:
            self._save(state, step, losses)
            self.checkpoints.finish()
            name = signal.Signals(self.stop_signal).name
            log.info(f"{name}: saved step {step}; run the same command again to go on")
            return 128 + self.stop_signal
        self.checkpoints.finish()
        # A run that was killed between its last checkpoint and its summary has nothing evaluated yet.
        self._summarize(state, step, evaluation or self._evaluate(state, step))
        return 0

    def _must_stop(self, step: int) -> bool:
        # Every process must leave at the same step, whichever of them was told to. The service that
        # jax runs for that agrees on one in the background: the devices are not waited for.
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.stop_signal = signal.SIGTERM
        return bool(self.stop_signal)

    def _put(self, local: np.ndarray) -> jax.Array:
        accumulate, size = self.config.accumulate, self.config.batch_size // self.config.accumulate
        split = local.reshape(accumulate, -1, local.shape[-1])
        return sharding.put_batch(split, self.program.mesh, size=size)

    def _read(self, pending) -> float:
        """The loss of a step; stops training when a weight is no longer finite."""
        step, report = pending
        finite = jax.device_get(report["finite"])
        if not all(np.all(flags) for flags in finite.values()):
            names = sparsity.nonfinite_matrices(finite)
            saved = self.checkpoints.latest_step()
            raise UserError(
                f"NaN or infinity at step {step} in {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}: lower "
                "optimizer.learning_rate or raise optimizer.warmup; the last checkpoint is "
                + ("none" if saved is None else f"step {saved}")
            )
        return float(report["loss"])

    def _log(self, state, step, report, losses, seconds_per_step):
        config = self.config
        nonzeros = sparsity.find_state(state.optimizer).nonzeros
        alive = self.program.alive(state.params)
        nonzeros, alive, report = jax.device_get((nonzeros, alive, report))
        density = sparsity.density_schedule(config.sparsity, config.steps)
        rate = sparsity.learning_rate_schedule(config.optimizer, config.steps, density=density)
        tokens_per_step = config.batch_size * config.model.context
        total = sum(int(np.sum(each)) for each in nonzeros.values())
        values = {
            "tokens": step * tokens_per_step,
            "loss": statistics.fmean(losses),
            "learning_rate": float(np.asarray(rate(step - 1))),
            "density": float(np.asarray(density(step - 1))),
            "nonzeros": total,
            "nonzeros_per_matrix": {path: each.tolist() for path, each in nonzeros.items()},
            "alive_neurons": alive.tolist(),
            "gradient_rms": float(report["gradient_rms"]),
            "kurtosis": float(report["kurtosis"]),
            "tokens_per_s": tokens_per_step / seconds_per_step,
        }
        self._write(step, values)
        self.progress.record(
            {
                "loss": f"{values['loss']:.3f}",
                "density": f"{values['density']:.4f}",
                "nonzeros": str(total),
                "tokens/s": f"{values['tokens_per_s']:.0f}",
                "left": self.progress.time_left(),
            },
        )

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(step, values)

    def _evaluate(self, state: TrainState, step: int) -> dict[str, Any]:
        config = self.config
        results, size = [], config.batch_size // config.accumulate
        for local in batches.eval_batches(
            self.dataset.validation,
            batch_size=size,
            context=config.model.context,
            batches=config.eval_batches,
            rows=sharding.local_rows(self.program.mesh, size),
        ):
            batch = sharding.put_batch(local, self.program.mesh, EVAL_BATCH, size=size)
            results.append(jax.device_get(self.program.evaluate(state.params, batch)))
        fired = np.any([each for _, each in results], axis=0)
        values = {
            "tokens": step * config.batch_size * config.model.context,
            "val_loss": statistics.fmean(float(value) for value, _ in results),
            "alive_neurons_fired": jax.device_get(self.program.alive(state.params, fired)).tolist(),
        }
        self._write(step, values)
        log.info(f"step {step}: held-out loss {values['val_loss']:.4f}")
        return values

    def _save(self, state: TrainState, step: int, losses: list[float]) -> None:
        metadata = {
            "config": to_dict(self.config),
            "data_digest": self.dataset.digest,
            "tokenizer": self.dataset.tokenizer.to_json(),
            "seconds": time.monotonic() - self.started,
            # Of the steps since the last record, so that the next one is what it would have been.
            "losses": losses,
        }
        self.checkpoints.save(step, state, metadata)

    def _summarize(self, state: TrainState, step: int, evaluation: dict[str, Any]) -> None:
        if self.quiet:
            return
        kept = jax.device_get(sparsity.find_state(state.optimizer).nonzeros)
        nonzeros = sum(int(np.sum(each)) for each in kept.values())
        size = sum(leaf.size for path, leaf in trees.flatten(state.params).items() if path in kept)
        records = metrics.read(self.workdir)
        rates = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
        summary = {
            "val_loss": evaluation["val_loss"],
            "l0": nonzeros / size,
            "nonzeros": nonzeros,
            "parameters": model.count_parameters(state.params),
            "alive_neurons": evaluation["alive_neurons_fired"],
            "tokens_per_s": statistics.median(rates),
            "steps": step,
            "seconds": round(time.monotonic() - self.started, 1),
        }
        metrics.plot_curves(records, self.workdir / "curves.png")
        files.write_json(self.workdir / "summary.json", summary)
        log.info(
            f"done: held-out loss {summary['val_loss']:.4f}, {nonzeros} nonzero weights, "
            f"{summary['seconds']:.0f} s; see {self.workdir / 'curves.png'}"
        )


def main(argv: Sequence[str]) -> int:
    """The command; see the module's docstring."""
    options: Any = flags.FLAGS
    name, config = recipes.from_flag()
    processes.initialize_processes()
    cpu.enable()
    return run(config, pathlib.Path(options.workdir or f"runs/{name}"))


def _define_flags() -> None:
    recipes.define_flag()
    flags.DEFINE_string("workdir", None, "Folder of the run; runs/NAME for the recipe NAME.")


if __name__ == "__main__":
    _define_flags()
    run_command(main)

"""The training loop: everything around the jitted step of `wsparse.step`.

It keeps the device busy (the report of a step is read while the next one is computed), writes what happened,
and can be stopped and started again at any step without changing a bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import logging
import math
import signal
import statistics
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from wsparse import checkpoint, files, metrics, model, processes, sharding, sparsity, trees
from wsparse.config import TrainConfig, to_dict
from wsparse.data import batches
from wsparse.data.dataset import Dataset
from wsparse.errors import UserError
from wsparse.progress import progress
from wsparse.step import EVAL_BATCH, Program, TrainState

log = logging.getLogger(__name__)


def checkpoint_metadata(
    config: TrainConfig, dataset: Dataset, seconds: float, losses: list[float], turnover: float
) -> dict[str, Any]:
    """Returns what a checkpoint holds beside the state.

    Losses are those of the steps since the last record, and the turnover is that of the last exploration
    step, so that the next record is what it would have been.
    """
    return {
        "config": to_dict(config),
        "data_digest": dataset.digest,
        "tokenizer": dataset.tokenizer.to_json(),
        "seconds": seconds,
        # A copy: it is written while training goes on.
        "losses": list(losses),
        "turnover": turnover,
    }


@dataclasses.dataclass
class Loop:
    """The training loop: everything around `Program.step`."""

    config: TrainConfig
    program: Program
    dataset: Dataset
    checkpoints: checkpoint.Checkpointer
    writer: metrics.MetricsWriter | None
    step: int
    # Of the steps since the last record.
    losses: list[float]
    # Of the last exploration step.
    turnover: float
    # When the run would have begun, had it never been interrupted.
    started: float

    def __post_init__(self):
        config = self.config
        # The report of a step waits here to be read.
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.stop_signal = 0
        self.density = sparsity.density_schedule(config.sparsity, config.steps)
        self.explores = sparsity.exploration_steps(config.sparsity, config.steps)
        self.frozen = sparsity.frozen_steps(config.sparsity, config.steps)
        # Where the nonzeros are, found anew after each exploration, and whether there was room for them.
        self.places: dict[str, jax.Array] | None = None
        self.places_fit = True
        self.rate = sparsity.learning_rate_schedule(config.optimizer, config.steps, density=self.density)
        self.progress = progress(config.steps, "step", start=self.step, seconds_per_line=None)

    def run(self, state: TrainState) -> int:
        """Train to the end or to a signal, and return the exit status."""
        with self._signals(), self.progress:
            return self._steps(state)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        handlers: dict[signal.Signals, Callable[..., None]]
        if jax.process_count() == 1:
            handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._on_signal)
        else:
            # SIGTERM belongs to jax's service, which tells all processes; the terminal's signal joins it.
            handlers = {signal.SIGINT: lambda *_: signal.raise_signal(signal.SIGTERM)}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        del frame
        self.stop_signal = number
        # Restore the default handler, so that a second signal kills the process.
        signal.signal(number, signal.SIG_DFL)

    def _steps(self, state: TrainState) -> int:
        config, evaluation = self.config, None
        stream = batches.train_batches(
            self.dataset.train,
            batch_size=config.batch_size,
            context=config.model.context,
            seed=config.data.seed,
            start_step=self.step,
            rows=sharding.local_rows(self.program.mesh, config.batch_size, config.accumulate),
            threads=config.data.threads,
            prefetch=config.data.prefetch,
        )
        self._restart_clock()
        while self.step < config.steps and not self._must_stop():
            state, report = self._advance(state, self._put(next(stream)))
            self.step += 1
            # The device works on this step while the host reads the one before.
            self._read()
            self.pending = self.step, report
            self.progress.advance()
            self.checkpoints.poll()
            if self._due(config.log_every):
                self._read()
                self._log(state, report)
            if self._due(config.eval_every):
                evaluation = self._evaluate(state)
            if self._due(config.checkpoint_every):
                # A state is saved only once its own step is known to be finite.
                self._read()
                self._save(state)
        self._read()
        if self.step < config.steps:
            self._save(state)
            self.checkpoints.finish()
            name = signal.Signals(self.stop_signal).name
            log.info("%s: saved step %d; run the same command again to go on", name, self.step)
            return 128 + self.stop_signal
        self.checkpoints.finish()
        self._summarize(state, evaluation or self._recorded_evaluation() or self._evaluate(state))
        return 0

    def _advance(self, state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, Any]]:
        """Makes one step, over the nonzeros alone where that is possible."""
        if self.program.frozen_step is None or not self.frozen[self.step]:
            self.places = None
            return self.program.step(state, batch)
        if self.places is None:
            self.places, fits = self.program.find_places(state.params)
            # A state that another config left (--from) may have more nonzeros until the next exploration.
            if self.places_fit and not fits:
                log.info("step %d: too many nonzeros for steps over them alone: steps are dense", self.step)
            self.places_fit = bool(fits)
        if not self.places_fit:
            return self.program.step(state, batch)
        return self.program.frozen_step(state, self.places, batch)

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _restart_clock(self) -> None:
        self.clock_time, self.clock_step = time.monotonic(), self.step

    def _must_stop(self) -> bool:
        # Every process must leave at the same step, whichever of them was told to. The service that
        # jax runs for that agrees on one in the background: the devices are not waited for.
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self.step):
            self.stop_signal = signal.SIGTERM
        return bool(self.stop_signal)

    def _put(self, local: np.ndarray) -> jax.Array:
        accumulate, size = self.config.accumulate, self.config.batch_size // self.config.accumulate
        split = local.reshape(accumulate, -1, local.shape[-1])
        return sharding.put_batch(split, self.program.mesh, size=size)

    def _read(self) -> None:
        """Read the loss of the pending step; stop training when a weight is no longer finite."""
        if self.pending is None:
            return
        (step, report), self.pending = self.pending, None
        finite = jax.device_get(report["finite"])
        if not all(np.all(matrices) for matrices in finite.values()):
            names = sparsity.nonfinite_matrices(finite)
            raise UserError(
                f"NaN or infinity at step {step} in {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {self._advice()}"
            )
        self.losses.append(float(report["loss"]))
        if self.explores[step - 1]:
            self.turnover = float(report["turnover"])

    def _advice(self) -> str:
        """Returns what to change after a weight became NaN or infinite, and where to go on from."""
        settings, saved = self.config.optimizer, self.checkpoints.latest_step()
        sharkfin = self.config.sparsity.density**-0.5 if settings.sharkfin else 1.0
        peak, decay = settings.learning_rate * sharkfin, settings.weight_decay
        change = "lower optimizer.learning_rate or raise optimizer.warmup"
        # A decay of more than the whole weight overshoots; the larger factor is the likely mistake.
        if peak * decay > 1 and decay > peak:
            change = "lower optimizer.weight_decay"
        if saved is None:
            return f"{change}, in another --workdir; the last checkpoint is none"
        return (
            f"{change}; the last checkpoint is step {saved}: go on from it with "
            f"--from={self.checkpoints.folder.parent}@{saved} and another --workdir"
        )

    def _log(self, state: TrainState, report: dict[str, Any]) -> None:
        config, step = self.config, self.step
        seconds_per_step = (time.monotonic() - self.clock_time) / (step - self.clock_step)
        nonzeros = sparsity.find_state(state.optimizer).nonzeros
        alive = self.program.alive(state.params)
        nonzeros, alive, report = jax.device_get((nonzeros, alive, report))
        tokens_per_step = config.batch_size * config.model.context
        values = {
            "tokens": step * tokens_per_step,
            "loss": statistics.fmean(self.losses),
            "learning_rate": float(np.asarray(self.rate(step - 1))),
            "density": float(np.asarray(self.density(step - 1))),
            "nonzeros": sum(int(np.sum(counts)) for counts in nonzeros.values()),
            "nonzeros_per_matrix": {path: counts.tolist() for path, counts in nonzeros.items()},
            "alive_neurons": alive.tolist(),
            "turnover": self.turnover,
            "gradient_rms": float(report["gradient_rms"]),
            "kurtosis": float(report["kurtosis"]),
            "tokens_per_s": tokens_per_step / seconds_per_step,
        }
        self._write(values)
        self.progress.record(
            {
                "loss": f"{values['loss']:.3f}",
                "density": f"{values['density']:.4f}",
                "nonzeros": str(values["nonzeros"]),
                "tokens/s": f"{values['tokens_per_s']:.0f}",
                "left": self.progress.time_left(),
            }
        )
        self.losses.clear()
        self._restart_clock()

    def _write(self, values: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(self.step, values)

    def _evaluate(self, state: TrainState) -> dict[str, Any]:
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
        fired = np.any([neurons for _, neurons in results], axis=0)
        values = {
            "tokens": self.step * config.batch_size * config.model.context,
            "val_loss": statistics.fmean(float(value) for value, _ in results),
            "alive_neurons_fired": jax.device_get(self.program.alive(state.params, fired)).tolist(),
        }
        self._write(values)
        log.info("step %d: held-out loss %.4f", self.step, values["val_loss"])
        self._restart_clock()
        return values

    def _recorded_evaluation(self) -> dict[str, Any] | None:
        """Returns the evaluation of this step by a run that was killed before its summary, or None."""
        found = self.writer and metrics.last_record(self.checkpoints.folder.parent, self.step, "val_loss")
        # All processes evaluate, or none; process 0 alone has the records, and a summary to write.
        is_recorded = processes.gather(str(found is not None))[0] == "True"
        return (found or {"step": self.step}) if is_recorded else None

    def _save(self, state: TrainState) -> None:
        seconds = time.monotonic() - self.started
        metadata = checkpoint_metadata(self.config, self.dataset, seconds, self.losses, self.turnover)
        self.checkpoints.save(self.step, state, metadata)

    def _summarize(self, state: TrainState, evaluation: dict[str, Any]) -> None:
        if self.writer is None:
            return
        workdir = self.checkpoints.folder.parent
        projected = jax.device_get(sparsity.find_state(state.optimizer).nonzeros)
        nonzeros = sum(int(np.sum(counts)) for counts in projected.values())
        leaves = trees.flatten(state.params)
        records = metrics.read(workdir)
        rates = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
        summary = {
            "val_loss": evaluation["val_loss"],
            "l0": nonzeros / sum(leaves[path].size for path in projected),
            "nonzeros": nonzeros,
            "parameters": model.count_parameters(state.params),
            "alive_neurons": evaluation["alive_neurons_fired"],
            "tokens_per_s": statistics.median(rates or [math.nan]),
            "steps": self.step,
            "seconds": round(time.monotonic() - self.started, 1),
            "machine": processes.machine(),
        }
        metrics.plot_curves(records, workdir / "curves.png")
        files.write_json(workdir / "summary.json", metrics.strict(summary))
        log.info(
            "done: held-out loss %.4f, %d nonzero weights, %.0f s; see %s",
            summary["val_loss"], nonzeros, summary["seconds"], workdir / "curves.png",
        )  # fmt: skip

"""Hyperparameters of pruning: a Bayesian search in batches of vmapped trials, and a random one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import logging
import math
import pathlib
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optuna

from wsparse import files, model
from wsparse.circuits import masks
from wsparse.circuits.mask_learning import HParams, prune
from wsparse.circuits.pairs import HasPairs, arrays
from wsparse.circuits.settings import Sampler
from wsparse.circuits.workers import WorkItems, WorkPending
from wsparse.config import ModelConfig
from wsparse.errors import UserError
from wsparse.progress import progress

log = logging.getLogger(__name__)

# Each hyperparameter is searched on a logarithmic scale between these; the paper's centers are inside.
_BETWEEN = HParams(
    k_coef=(1e-4, 1e-2),
    noise=(3e-3, 1e-1),
    bias=(3e-2, 3e-1),
    weight_decay=(1e-4, 1e-2),
    learning_rate=(3e-3, 3e-2),
    one_minus_b2=(2e-2, 2e-1),
    warmup=(2e-2, 2e-1),
    temperature=(0.3, 3.0),
)

# Where a search starts beside the paper's centers: for runs of a hundred steps instead of thousands.
FAST = HParams(k_coef=1e-3, learning_rate=1e-2)
# With fewer trials than this the paper's centers are not tried.
_FEW = 8


class Trial(NamedTuple):
    """One pruning run of a search.

    Attributes:
      number: Number from 0; the first is at `FAST`, in longer searches the second at the paper's centers.
      hparams: Floats.
      tau: float32 `(U,)`.
      value: Value that the search minimizes.
      result: Function that returns the objective's result, computed anew for a trial of another process.
    """

    number: int
    hparams: HParams
    tau: np.ndarray
    value: float
    result: Callable[[], Any]


class Pruner:
    """`prune` of one model, vmapped over trials and compiled once for all tasks and trials.

    Over several devices the trials are sharded as evenly as they divide; everything else is replicated.

    Attributes:
      parallel: Trials in one call.
      devices: Number of devices that they are sharded over.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        steps: int,
        pairs_per_step: int,
        tie_qk: bool = True,
        parallel: int = 4,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Make a pruner; its settings are static.

        Args:
          config: Config of the model.
          steps: Steps of each trial.
          pairs_per_step: Pairs drawn for each step.
          tie_qk: See `prune`.
          parallel: Trials in one call.
          devices: Devices to shard trials over; None is all of them.
        """
        self.parallel = parallel
        run = functools.partial(
            prune, config=config, steps=steps, pairs_per_step=pairs_per_step, tie_qk=tie_qk
        )

        def trials(params, pairs, means, hparams, keys):
            def trial(hparams, key):
                learned = run(params, task_batch=pairs, means=means, hparams=hparams, key=key)
                return masks.flatten(learned.tau)

            return jax.vmap(trial)(hparams, keys)

        available = jax.devices() if devices is None else list(devices)
        self.devices = math.gcd(parallel, len(available))
        self._sharding = None
        if self.devices > 1 or devices is not None:
            mesh = jax.sharding.Mesh(np.asarray(available[: self.devices]), ("trials",))
            self._sharding = NamedSharding(mesh, P("trials")), NamedSharding(mesh, P())
            # Trials are independent: each device runs its own, kernels included.
            sharded, replicated = P("trials"), P()
            trials = jax.shard_map(
                trials,
                mesh=mesh,
                in_specs=(replicated, replicated, replicated, sharded, sharded),
                out_specs=sharded,
                check_vma=False,
            )
        self._run = jax.jit(trials)

    def __call__(
        self,
        params: model.Params,
        pairs: HasPairs,
        means: dict[str, jax.Array],
        hparams: Sequence[HParams],
        seeds: Sequence[int],
    ) -> np.ndarray:
        """Returns tau of every trial, `(trials, U)`; fewer than `parallel` are padded with the first."""
        n_trials = len(hparams)
        padding = self.parallel - n_trials
        columns = HParams(
            *(
                np.asarray([*column, *[column[0]] * padding], np.float32)
                for column in zip(*hparams, strict=True)
            )
        )
        seeds = [seed % 2**32 for seed in [*seeds, *[seeds[0]] * padding]]
        keys = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
        common = (params, arrays(pairs), means)
        if self._sharding is not None:
            sharded, replicated = self._sharding
            columns, keys = jax.device_put((columns, keys), sharded)
            common = jax.device_put(common, replicated)
        return np.asarray(self._run(*common, columns, keys))[:n_trials]

    def lower(self, params: model.Params, pairs: Any, means: Mapping[str, Any]) -> jax.stages.Lowered:
        """Returns the lowered call for trees of shapes and dtypes, for compiling ahead of time."""
        sharded, replicated = self._sharding or (None, None)

        def place(tree, sharding):
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
            )

        number = jax.ShapeDtypeStruct((self.parallel,), np.float32)
        keys = jax.eval_shape(jax.vmap(jax.random.key), np.zeros(self.parallel, np.uint32))
        of_trials = HParams(*[number] * len(HParams._fields)), keys
        common = (params, pairs, means)
        return self._run.lower(*place(common, replicated), *place(of_trials, sharded))


@dataclasses.dataclass(frozen=True, eq=False)
class SharedSearch:
    """A search for one task's circuit that several processes do together.

    Attributes:
      storage: Storage of the leases.
      name: Name of this search in the storage; model, task and settings must decide it.
      folder: Folder of what trials learned, seen by all processes.
      lease: Seconds after which a silent process counts as dead.
      scored: Trials of this process, which need not be scored again.
    """

    storage: optuna.storages.BaseStorage
    name: str
    folder: pathlib.Path
    lease: float
    scored: dict[int, Trial] = dataclasses.field(default_factory=dict)

    def tau(self, number: int) -> np.ndarray:
        """Returns what a trial learned, in whichever process."""
        path = _trial_file(self.folder, number)
        try:
            return np.load(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read, though the storage says that the trial is done: all workers must "
                "see one folder; if it was deleted, begin again with another --storage"
            ) from error


def search(
    pruner: Pruner,
    params: model.Params,
    pairs: HasPairs,
    means: dict[str, jax.Array],
    objective: Callable[[np.ndarray], tuple[float, Any]],
    *,
    trials: int,
    sampler: Sampler = "tpe",
    seed: int = 0,
    folder: pathlib.Path | None = None,
    shared: SharedSearch | None = None,
) -> list[Trial]:
    """Run trials, `pruner.parallel` at a time, and score each.

    Args:
      pruner: Runs the trials.
      params: Parameters of the model.
      pairs: Pairs of the search split.
      means: See `prune`.
      objective: Pure function `tau_U -> (value to minimize, result)`; the result's `str` is logged.
      trials: Number of trials.
      sampler: "tpe" (Optuna's tree-structured Parzen estimator) or "random" (the same ranges).
      seed: Seed of the sampler and of the trials; the sampler of a shared search is seeded at random.
      folder: Folder that keeps what trials learned, for a search by this process alone. Trials that an
        interrupted search of the same arguments left there are not run again; the result is the same.
      shared: Search that other processes take part in; None is a search by this process alone.

    Returns:
      All trials, in order.

    Raises:
      WorkPending: All trials are leased, and other processes have not finished theirs.
    """
    items = _items(pruner.parallel, trials, sampler, seed, shared)
    folder = folder if shared is None else shared.folder
    scored = {} if shared is None else shared.scored
    with progress(trials, "  search", seconds_per_line=None) as bar:
        while items.any_free():
            with items.lease(pruner.parallel) as leased:
                if not leased:
                    break
                hparams = [_suggest(trial) for trial in leased]
                # The numbers of a shared search do not decide its hyperparameters.
                taus = _read_trials(folder, leased) if folder and shared is None else None
                if taus is None:
                    seeds = [seed * 100_003 + trial.number for trial in leased]
                    taus = pruner(params, pairs, means, hparams, seeds)
                for trial, values, tau_U in zip(leased, hparams, taus, strict=True):
                    value, result = objective(tau_U)
                    if folder:
                        _keep_trial(folder, trial.number, tau_U)
                    items.finish(trial, value)
                    scored[trial.number] = Trial(
                        trial.number, values, tau_U, value, lambda result=result: result
                    )
                    bar.advance()
                    number = trial.number + 1
                    which = f"{number}/{trials}" if number <= trials else "for a lost one"
                    log.info("  trial %s: %s", which, result)
    finished = items.finished()
    if len(finished) < trials:
        raise WorkPending
    for trial in finished:
        if trial.number not in scored:
            assert shared is not None and trial.value is not None
            tau_U = shared.tau(trial.number)
            result = functools.cache(lambda tau_U=tau_U: objective(tau_U)[1])
            values = HParams(**trial.params)
            scored[trial.number] = Trial(trial.number, values, tau_U, trial.value, result)
    return [scored[trial.number] for trial in finished]


def _items(parallel: int, trials: int, sampler: Sampler, seed: int, shared: SharedSearch | None) -> WorkItems:
    """Returns the trials as work items."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Processes with the same seed would all try the same.
    chosen_seed = seed if shared is None else None
    chosen: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=chosen_seed)
    if sampler == "tpe":
        chosen = optuna.samplers.TPESampler(
            seed=chosen_seed, n_startup_trials=max(parallel, min(8, trials // 3)), constant_liar=True
        )
    starts = (FAST, HParams()) if trials >= _FEW else (FAST,)
    options: dict[str, Any] = {}
    if shared is not None:
        options = {"storage": shared.storage, "name": shared.name, "lease": shared.lease}
    first = [start._asdict() for start in starts]
    return WorkItems(trials, sampler=chosen, first=first, **options)


def _trial_file(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"{number}.npy"


def _keep_trial(folder: pathlib.Path, number: int, tau_U: np.ndarray) -> None:
    """Write what a trial learned; before it is said to be done."""
    files.make_folder(folder)
    with files.replacing(_trial_file(folder, number)) as part:
        np.save(part, tau_U)


def _read_trials(folder: pathlib.Path, trials: Sequence[optuna.Trial]) -> list[np.ndarray] | None:
    """Returns what trials learned before an interruption; None where one of them is missing."""
    try:
        return [np.load(_trial_file(folder, trial.number)) for trial in trials]
    except (OSError, ValueError, EOFError):
        return None


def _suggest(trial: optuna.Trial) -> HParams:
    return HParams(
        **{
            name: trial.suggest_float(name, low, high, log=True)
            for name, (low, high) in _BETWEEN._asdict().items()
        }
    )


def log_size(edges: int | None, least_loss: float) -> float:
    """Returns what a search minimizes: the log of the edges, or, where the target was missed, by how much.

    Any miss (`edges` None) is worse than any circuit.
    """
    return 100.0 + least_loss if edges is None else math.log1p(edges)

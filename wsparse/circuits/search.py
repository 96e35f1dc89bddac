"""Hyperparameters of pruning: a Bayesian search in batches of vmapped trials, and a random one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optuna

from wsparse import files, model
from wsparse.circuits import masks
from wsparse.circuits.mask_learning import HParams, prune
from wsparse.circuits.pairs import PairArrays
from wsparse.circuits.settings import Sampler, Settings
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
# The same where closed nodes are let through: gates that close at once never open again in time.
GENTLE = HParams(k_coef=2e-4, learning_rate=5e-3)
# With fewer trials than this the paper's centers are not tried.
_FEW = 8


class Trial(NamedTuple):
    """One pruning run of a search."""

    number: int
    """From 0; the first is at `search`'s start, in longer searches the second at the paper's centers."""
    hparams: HParams
    tau: np.ndarray
    """float32 `(U,)`."""
    value: float
    """Value that the search minimizes."""
    result: Callable[[], Any]
    """Returns the objective's result, computed anew for a trial of another process."""


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
        settings: Settings,
        *,
        parallel: int,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Make a pruner of the settings' masks; `devices` are all by default."""
        self.parallel = parallel
        self._n_nodes = masks.n_nodes(config)

        def trials(params, pairs, means, forbidden_U, hparams, keys):
            def trial(hparams, key):
                found = prune(
                    params, config, pairs, means, hparams, key, steps=settings.steps,
                    pairs_per_step=settings.pairs_per_step, tie_qk=settings.tie_qk,
                    objective=settings.objective, forbidden_U=forbidden_U,
                )  # fmt: skip
                return masks.flatten(found.tau)

            return jax.vmap(trial)(hparams, keys)

        available = jax.devices() if devices is None else list(devices)
        self.devices = math.gcd(parallel, len(available))
        self._sharding = None
        if self.devices > 1 or devices is not None:
            mesh = jax.sharding.Mesh(np.asarray(available[: self.devices]), ("trials",))
            self._sharding = NamedSharding(mesh, P("trials")), NamedSharding(mesh, P())
            # Trials are independent: each device runs its own, kernels included.
            in_specs = (P(), P(), P(), P(), P("trials"), P("trials"))
            trials = jax.shard_map(
                trials, mesh=mesh, in_specs=in_specs, out_specs=P("trials"), check_vma=False
            )
        self._run = jax.jit(trials)

    def __call__(
        self,
        params: model.Params,
        pairs: PairArrays,
        means: dict[str, jax.Array],
        hparams: Sequence[HParams],
        seeds: Sequence[int],
        forbidden_U: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns tau of every trial, `(trials, U)`; fewer than `parallel` are padded with the first.

        Nodes of which `forbidden_U` is true stay closed.
        """
        if forbidden_U is None:
            forbidden_U = np.zeros(self._n_nodes, bool)
        padding = self.parallel - len(hparams)
        rows = [*hparams, *[hparams[0]] * padding]
        columns = HParams(*(np.asarray(column, np.float32) for column in zip(*rows, strict=True)))
        seeds = [seed % 2**32 for seed in [*seeds, *[seeds[0]] * padding]]
        keys = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
        common = (params, pairs, means, np.asarray(forbidden_U, np.float32))
        if self._sharding is not None:
            sharded, replicated = self._sharding
            columns, keys = jax.device_put((columns, keys), sharded)
            common = jax.device_put(common, replicated)
        return np.asarray(self._run(*common, columns, keys))[: len(hparams)]

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
        forbidden_U = jax.ShapeDtypeStruct((self._n_nodes,), np.float32)
        common = place((params, pairs, means, forbidden_U), replicated)
        return self._run.lower(*common, *place(of_trials, sharded))


@dataclasses.dataclass(frozen=True, eq=False)
class TrialStore:
    """Where the trials of one search are kept, and shared with other processes.

    Attributes:
      folder: Folder of what trials learned, seen by all processes.
      storage: Storage of the leases; None where this process works alone.
      name: Name of this search in the storage; model, task and settings must decide it.
      lease: Seconds of silence after which a process counts as dead.
      scored: Trials of this process, which need not be scored again.
    """

    folder: pathlib.Path | None = None
    storage: optuna.storages.BaseStorage | None = None
    name: str | None = None
    lease: float = 600.0
    scored: dict[int, Trial] = dataclasses.field(default_factory=dict)

    def items(self, count: int, suffix: str = "", **options: Any) -> WorkItems:
        """Returns work items of the search, or of another stage of it."""
        name = f"{self.name}{suffix}" if self.name else None
        return WorkItems(count, storage=self.storage, name=name, lease=self.lease, **options)

    def keep(self, number: int, tau_U: np.ndarray) -> None:
        """Write what a trial learned."""
        if self.folder is not None:
            files.make_folder(self.folder)
            with files.replacing(self.folder / f"{number}.npy") as part:
                np.save(part, tau_U)

    def tau(self, number: int) -> np.ndarray:
        """Returns what a trial learned, in whichever process.

        Raises:
          UserError: Its file cannot be read.
        """
        path = pathlib.Path(self.folder or "") / f"{number}.npy"
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path} cannot be read, though the storage says that the trial is done: all workers must "
                "see one folder; if it was deleted, begin again with another --storage"
            ) from error

    def close(self) -> None:
        """Remove the files of a finished search, where no other process may need them."""
        if self.folder is not None and self.storage is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()

    def earlier(self, trials: Sequence[optuna.Trial]) -> list[np.ndarray] | None:
        """Returns what trials learned before an interruption; None where one of them is missing."""
        # The numbers of a shared search do not decide its hyperparameters.
        if self.folder is None or self.storage is not None:
            return None
        try:
            return [self.tau(trial.number) for trial in trials]
        except UserError:
            return None


def search(
    pruner: Pruner,
    params: model.Params,
    pairs: PairArrays,
    means: dict[str, jax.Array],
    objective: Callable[[np.ndarray], tuple[float, Any]],
    *,
    trials: int,
    sampler: Sampler = "tpe",
    start: HParams = FAST,
    seed: int = 0,
    store: TrialStore | None = None,
) -> list[Trial]:
    """Returns trials, run `pruner.parallel` at a time and scored, in order.

    Trials that an interrupted search of the same arguments left in the store are not run again; by one
    process alone, the result is the same as without the interruption.

    Args:
      objective: Pure function `tau_U -> (value to minimize, result)`; the result's `str` is logged.
      sampler: "tpe" (Optuna's tree-structured Parzen estimator) or "random" (the same ranges).
      start: Hyperparameters of the first trial.
      seed: Seed of the sampler and of the trials; the sampler of a shared search is seeded at random.
      store: Where trials are kept and shared; by default they are not.

    Raises:
      WorkPending: All trials are leased, and other processes have not finished theirs.
    """
    store = store or TrialStore()
    scored = store.scored
    starts = (start, HParams()) if trials >= _FEW else (start,)
    items = store.items(
        trials,
        sampler=_sampler(sampler, pruner.parallel, trials, seed if store.storage is None else None),
        first=[start._asdict() for start in starts],
    )
    with progress(trials, "  search", seconds_per_line=None) as bar:
        while items.any_free():
            with items.lease(pruner.parallel) as leased:
                if not leased:
                    break
                hparams = [_suggest(trial) for trial in leased]
                taus = store.earlier(leased)
                if taus is None:
                    seeds = [seed * 100_003 + trial.number for trial in leased]
                    taus = pruner(params, pairs, means, hparams, seeds)
                for trial, values, tau_U in zip(leased, hparams, taus, strict=True):
                    number = trial.number
                    value, result = objective(tau_U)
                    # Before it is said to be done.
                    store.keep(number, tau_U)
                    items.finish(trial, value)
                    scored[number] = Trial(number, values, tau_U, value, lambda result=result: result)
                    bar.advance()
                    which = f"{number + 1}/{trials}" if number < trials else "for a lost one"
                    log.info("  trial %s: %s", which, result)
    finished = items.finished()
    if len(finished) < trials:
        raise WorkPending
    for trial in finished:
        if trial.number not in scored:
            assert trial.value is not None
            tau_U = store.tau(trial.number)
            result = functools.cache(lambda tau_U=tau_U: objective(tau_U)[1])
            scored[trial.number] = Trial(trial.number, HParams(**trial.params), tau_U, trial.value, result)
    return [scored[trial.number] for trial in finished]


def _sampler(name: Sampler, parallel: int, trials: int, seed: int | None) -> optuna.samplers.BaseSampler:
    """Returns a sampler; processes that share a search have no seed, or all would try the same."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    n_startup_trials = max(parallel, min(8, trials // 3))
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=n_startup_trials, constant_liar=True)


def _suggest(trial: optuna.Trial) -> HParams:
    ranges = _BETWEEN._asdict().items()
    return HParams(**{name: trial.suggest_float(name, low, high, log=True) for name, (low, high) in ranges})


def log_size(edges: int | None, least_loss: float) -> float:
    """Returns what a search minimizes: the log of the edges, or, where the target was missed, by how much.

    Any miss (`edges` None) is worse than any circuit.
    """
    return 100.0 + least_loss if edges is None else math.log1p(edges)
